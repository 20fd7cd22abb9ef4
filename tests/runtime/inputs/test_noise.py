"""Noise against torch and diffusers' randn_tensor."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_kv.errors import RequestError
from klein_kv.runtime.inputs.noise import initial_noise, random_seed

# Measured: 4.8e-7 (one bit in [4, 8)), between numpy's and torch's logarithm, sine and cosine;
# 2.7e-6 where torch has no vector kernel and rounds the angle otherwise. In float16 and bfloat16
# the difference may fall across a rounding boundary: one bit, relatively.
TOLERANCE = 1e-6 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 4e-6
ONE_BIT = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}

SHAPE = (1, 128, 16, 16)
SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**63 - 1, 2**63, 2**64 - 1]
SEEDS += [-1, -42, -(2**32), -(2**63)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> Any:
    noise = randn_tensor(shape, generator=generator(seed), dtype=getattr(torch, dtype))
    return noise.float().numpy()


def assert_near(ours: Any, theirs: Any, dtype: str) -> None:
    ours = np.asarray(ours, dtype=np.float32)
    np.testing.assert_allclose(ours, theirs, rtol=ONE_BIT[dtype], atol=TOLERANCE)
    if dtype != "float32" and ours.size > 10_000:
        assert (ours != theirs).mean() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", SEEDS)
def test_seed_gives_torch_noise(seed: int, dtype: str) -> None:
    assert_near(initial_noise(SHAPE, seed=seed, dtype=dtype), drawn(SHAPE, seed, dtype), dtype)


@settings(max_examples=30)
@given(rows=st.integers(1, 40), seed=st.integers(-(2**63), 2**64 - 1))
def test_every_size_and_seed(rows: int, seed: int) -> None:
    shape = (rows, 16)
    assert_near(initial_noise(shape, seed=seed), drawn(shape, seed), "float32")


def test_result_types() -> None:
    for dtype, expected in [
        ("float32", np.float32),
        ("float16", np.float16),
        ("bfloat16", np.float32),
    ]:
        for source in ({"seed": 1}, {"generator": generator(1)}):
            noise = initial_noise(SHAPE, dtype=dtype, **source)
            assert noise.dtype == expected
            assert noise.shape == SHAPE
            if dtype == "bfloat16":
                assert not (noise.view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("how", ["one", "list of one", "list", "tuple"])
def test_generator_gives_exactly_diffusers_noise(dtype: str, how: str) -> None:
    shape = (3, 4, 6, 6)
    make: Any = {
        "one": lambda: generator(7),
        "list of one": lambda: [generator(7)],
        "list": lambda: [generator(s) for s in (7, 8, 9)],
        "tuple": lambda: tuple(generator(s) for s in (7, 8, 9)),
    }[how]
    theirs = make()
    expected = randn_tensor(
        shape,
        generator=list(theirs) if isinstance(theirs, tuple) else theirs,
        dtype=getattr(torch, dtype),
    )
    noise = initial_noise(shape, generator=make(), dtype=dtype)
    np.testing.assert_array_equal(noise.astype(np.float32), expected.float().numpy())


@pytest.mark.parametrize("seed", [np.int64(-9), np.uint64(2**64 - 9), np.uint8(9)])
def test_numpy_integers_are_seeds(seed: Any) -> None:
    expected = initial_noise(SHAPE, seed=int(seed))
    np.testing.assert_array_equal(initial_noise(SHAPE, seed=seed), expected)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        (SHAPE, {"seed": 1.0}, r"seed is 1.0, .* from -2\*\*63 to 2\*\*64 - 1"),
        (SHAPE, {"seed": True}, "seed is True"),
        (SHAPE, {"generator": []}, r"torch\.Generator"),
        (SHAPE, {"generator": [5]}, r"torch\.Generator"),
        ((3, 16), {"generator": [generator(0)] * 2}, "2 generators for a batch of 3"),
        ((1, 3, 5, 7), {"seed": 1}, "105 values, expected a multiple of 16"),
        ((0, 16), {"seed": 1}, "0 values, expected a multiple of 16"),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], arguments: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        initial_noise(shape, **arguments)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_limits_of_seeds_are_torchs(seed: int) -> None:
    with pytest.raises(RequestError, match="seed is"):
        initial_noise(SHAPE, seed=seed)
    with pytest.raises((RuntimeError, ValueError, OverflowError)):
        generator(seed)


def test_system_seeds_are_all_that_change_the_noise() -> None:
    assert 0 <= random_seed() < 2**32


def test_seeds_and_the_other_light_modules_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from klein_kv.runtime.inputs import noise, prompts\n"
        "from klein_kv.artifacts import pixels\n"
        "from klein_kv.runtime.outputs import metadata\n"
        "noise.initial_noise((1, 128, 4, 4), seed=1)\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
