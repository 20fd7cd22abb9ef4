"""Arguments of a call, checked before anything is computed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import MAX_POSITION
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import RequestError

__all__ = [
    "check_call",
    "check_embeds",
    "host_array",
    "is_integer",
    "output_size",
    "prompt_may_come_first",
]

_DEFAULT_LATENT_SIDE = 128
_MAX_SIDE = 2048
_CALLBACK_TENSORS = ("latents", "prompt_embeds")

P = ParamSpec("P")
R = TypeVar("R")


def prompt_may_come_first(call: Callable[P, R]) -> Callable[P, R]:
    """Lets `pipe("a prompt", image=...)` work although `image` is the first parameter."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[1] if len(args) > 1 else None
        texts = isinstance(first, list) and first and all(isinstance(x, str) for x in first)
        if isinstance(first, str) or texts:
            if len(args) > 2 or "prompt" in kwargs:
                raise RequestError(
                    "the first argument is a prompt, and another prompt or positional argument "
                    "follows; pass the rest by name"
                )
            kwargs["prompt"] = first
            args = args[:1]  # type: ignore[assignment]
        return call(*args, **kwargs)

    return wrapped


def check_call(
    prompt: Any,
    prompt_embeds: Any,
    output_type: str,
    tensors: Sequence[str] | None,
    steps: Any,
    per_prompt: Any,
    sigmas: Any,
) -> None:
    """Refuses arguments that contradict each other or are out of range.

    Raises:
        RequestError: says which.
    """
    if (prompt is None) == (prompt_embeds is None):
        got = "neither" if prompt is None else "both"
        raise RequestError(f"expected one of prompt and prompt_embeds, got {got}")
    texts = isinstance(prompt, list) and prompt and all(isinstance(x, str) for x in prompt)
    if prompt is not None and not isinstance(prompt, str) and not texts:
        raise RequestError(f"prompt is {prompt!r:.80}, expected a text or a list of texts")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise RequestError(
            f"output_type is {output_type!r}, expected 'pil', 'np', 'pt' or 'latent'"
        )
    unknown = [name for name in tensors or () if name not in _CALLBACK_TENSORS]
    if unknown:
        raise RequestError(
            f"callback_on_step_end_tensor_inputs names {unknown}, expected some of "
            f"{list(_CALLBACK_TENSORS)}"
        )
    for name, value, most in (
        ("num_inference_steps", steps, None if sigmas is not None else 50),
        ("num_images_per_prompt", per_prompt, None),
    ):
        if not is_integer(value) or value < 1 or (most is not None and value > most):
            limit = "1 or more" if most is None else f"1 to {most}"
            raise RequestError(f"{name} is {value!r}, expected {limit}")


def is_integer(value: object) -> bool:
    """Whether a number is whole: Python's or numpy's integers, but no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def host_array(value: Any, name: str, dtype: str) -> NDArray[Any]:
    """A numpy array of type `dtype` from a numpy array or a torch tensor.

    Raises:
        RequestError: not floating point, or not finite.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    array = np.asarray(value)
    if array.dtype.kind != "f" and array.dtype != NUMPY_DTYPES["bfloat16"]:
        raise RequestError(f"{name} has dtype {array.dtype}, expected floating point values")
    if not np.isfinite(array).all():
        raise RequestError(f"{name} holds values that are not finite")
    return np.ascontiguousarray(array, dtype=NUMPY_DTYPES[dtype])


def check_embeds(embeds: NDArray[Any], config: ModelConfig) -> None:
    """Refuses text embeddings of another shape than [B, T, D].

    Raises:
        RequestError: says what was expected.
    """
    width = config.transformer.joint_attention_dim
    if embeds.ndim != 3 or embeds.shape[2] != width or 0 in embeds.shape:
        raise RequestError(
            f"prompt_embeds has shape {embeds.shape}, expected [batch, tokens, {width}]"
        )
    if embeds.shape[1] > MAX_POSITION:
        raise RequestError(
            f"prompt_embeds has {embeds.shape[1]} tokens, expected at most {MAX_POSITION}"
        )


def output_size(
    config: ModelConfig,
    height: int | None,
    width: int | None,
    first: tuple[int, int] | None,
    noise: NDArray[Any] | None,
) -> tuple[int, int]:
    """Height and width of the output in pixels.

    Args:
        config: gives the pixels of a token.
        height: as asked for, or None.
        width: alike.
        first: size of the first reference, the default where there is one.
        noise: latents of the caller's own, [B, C, h, w]: the default before all others.

    Raises:
        RequestError: not a multiple of a token's side, or above 2048.
    """
    unit = config.vae.multiple_of
    for name, value in (("height", height), ("width", width)):
        if value is None:
            continue
        if not is_integer(value) or not unit <= value <= _MAX_SIDE or value % unit:
            raise RequestError(
                f"{name} is {value!r}, expected a multiple of {unit} from {unit} to {_MAX_SIDE}"
            )
    if noise is not None and noise.ndim == 4:
        if max(noise.shape[2:]) > MAX_POSITION:
            raise RequestError(
                f"latents has shape {noise.shape}, expected at most {MAX_POSITION} tokens a side"
            )
        default = noise.shape[2] * unit, noise.shape[3] * unit
    else:
        side = _DEFAULT_LATENT_SIDE * config.vae.scale_factor
        default = first or (side, side)
    return int(height or default[0]), int(width or default[1])
