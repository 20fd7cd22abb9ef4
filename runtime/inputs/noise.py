"""The noise a run starts from: torch's numbers, with torch or without it.

A `torch.Generator` gives what diffusers draws from it. A plain `seed` needs no torch: the same
Mersenne Twister words, cut to 24-bit fractions and sent through Box and Muller's transform in the
order of torch's CPU kernel, give the noise of `torch.Generator().manual_seed(seed)`.

The words are exact; logarithm, sine and cosine are numpy's, so a value may differ from torch's in
the last bit (measured: at most 4.8e-7, with torch 2.13 on x86 with AVX2 or AVX-512; up to 3e-6
where torch has no vector kernel and rounds the angle otherwise). bfloat16 and float16 noise is
float32 noise rounded, as in torch 2.13.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.errors import BackendError, RequestError
from klein_kv.schedule import round_to_dtype

__all__ = ["initial_noise", "random_seed"]

_LANES = 16  # Box-Muller works on rows of 16: 8 radii, then 8 angles


def initial_noise(
    shape: Sequence[int], *, generator: Any = None, seed: int | None = None, dtype: str = "float32"
) -> NDArray[Any]:
    """Draws standard normal noise as diffusers does.

    Source: diffusers, `utils.torch_utils.randn_tensor`; torch,
    `aten/src/ATen/native/cpu/DistributionTemplates.h` (`normal_fill`).

    Args:
        shape: [B, C, h, w], positive; with a seed the values must be a multiple of 16.
        generator: a `torch.Generator`, which is advanced, or a list of B of them, each for one
            item.
        seed: -2**63 to 2**64 - 1, as torch takes: one CPU generator with that seed, of which torch
            reads the low 32 bits. With neither argument the operating system gives one.
        dtype: "float32", "float16" or "bfloat16", which comes as float32.

    Raises:
        RequestError: both `generator` and `seed`, or one of the arguments is not as above.
        BackendError: a generator was given and torch is not installed.
    """
    sizes = tuple(shape)
    if generator is not None:
        if seed is not None:
            raise RequestError("both generator and seed are given, expected one of them")
        return _torch_noise(sizes, generator, dtype)
    noise = _normal(sizes, random_seed() if seed is None else seed)
    return noise.astype(np.float16) if dtype == "float16" else round_to_dtype(noise, dtype)


def random_seed() -> int:
    """A seed from the operating system's entropy, 0 to 2**32 - 1: all that change the noise."""
    return secrets.randbits(32)


def _normal(sizes: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Standard normal float32 values of the stream of `seed`, shaped `sizes`."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not -(2**63) <= int(seed) < 2**64:
        raise RequestError(f"seed is {seed!r}, expected an integer from -2**63 to 2**64 - 1")
    count = math.prod(sizes)
    if count < 1 or count % _LANES:  # torch fills an incomplete row of 16 in another way
        raise RequestError(
            f"noise shape is {sizes}, {count} values, expected a multiple of {_LANES}, as klein's "
            "128 channels give; pass generator= with a torch.Generator instead of seed="
        )
    # torch: mt19937(seed) keeps the low 32 bits. numpy promises RandomState's stream for good.
    words = np.random.RandomState(int(seed) & 0xFFFFFFFF).bytes(4 * count)
    bits = np.frombuffer(words, dtype="<u4") & np.uint32(0xFFFFFF)
    uniform = bits.astype(np.float32) * np.float32(2.0**-24)  # in [0, 1)
    rows = uniform.reshape(-1, 2, _LANES // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - rows[:, 0]))
    angle = np.float32(2.0 * math.pi) * rows[:, 1]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normal.reshape(sizes)


def _torch_noise(sizes: tuple[int, ...], generator: Any, dtype: str) -> NDArray[Any]:
    try:
        import torch
    except ImportError as error:
        raise BackendError(
            f"generator is a {type(generator).__name__}, and torch is not installed; "
            "pass seed= instead, which needs no torch"
        ) from error

    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    if not generators or not all(isinstance(one, torch.Generator) for one in generators):
        got = ", ".join(type(one).__name__ for one in generators) or "an empty list"
        raise RequestError(f"generator is {got}, expected a torch.Generator or a list of them")
    if len(generators) not in (1, sizes[0]):
        raise RequestError(
            f"{len(generators)} generators for a batch of {sizes[0]}; expected one, or one each"
        )
    item = sizes if len(generators) == 1 else (1, *sizes[1:])
    items = [
        torch.randn(item, generator=one, device=one.device, dtype=getattr(torch, dtype)).cpu()
        for one in generators
    ]
    noise = torch.cat(items)
    if dtype == "bfloat16":  # numpy has no such type
        noise = noise.float()
    array: NDArray[Any] = noise.numpy()
    return array
