"""What a pipeline is opened with, and what one call asks for; both check themselves."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.pixels import check_matte
from klein_kv.artifacts.positions import MAX_OUTPUT_AREA
from klein_kv.artifacts.signature import MAX_POSITION
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import RequestError
from klein_kv.runtime.inputs.start_image import StartImage

__all__ = [
    "CallArguments",
    "RuntimeOptions",
    "check_count",
    "embeds_array",
    "host_array",
    "output_size",
    "prompt_may_come_first",
    "texts_of",
]

_DEFAULT_LATENT_SIDE = 128
_CALLBACK_TENSORS = ("latents", "prompt_embeds", "denoised")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """How artifacts are opened.

    Attributes:
        backend: "auto", "onnxruntime", "tensorrt" or "torch"; see `open_backend`.
        device: "cpu", "cuda" or "cuda:N"; None for the backend's own.
        threads: CPU threads of the backend; None leaves it to the library.
        backend_options: further arguments of the torch backend (`TorchBackend`), e.g.
            `{"compile_blocks": True}`.
        kv_dtype: "fp8" takes the graphs that hand keys and values on in a quarter of float32's
            bytes (half of 16 bits'), with a loss; None, or the graphs' own type, keeps them as they
            are computed.
        precision: "fp8", "nvfp4" or "fp8-weight-only" computes with weights that `klein-kv
            quantize` made; None with the folder's own.
        attention: "fp8" computes attention in float8 too, and keeps keys and values so.
        reference_cache_bytes: budget of the reference store; 0 turns reuse off; None takes all that
            weights and the largest request leave free of a GPU's memory, on a CPU a quarter of the
            memory that is free now.
        host_cache_bytes: on a GPU, pinned host memory for sets that the store gives up.
        prompt_cache_bytes: budget for text embeddings; 0 keeps none; None takes 256 MiB.
        check_finite: refuse results that hold NaN or infinity.
        matte: colour under transparent references, as `PIL.ImageColor` names it; None drops their
            transparency instead, as diffusers does.
        nvtx: mark every graph and copy as an NVTX range (needs the nvtx package).

    Raises:
        RequestError: `matte` is no colour.
    """

    backend: str = "auto"
    device: str | None = None
    threads: int | None = None
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    kv_dtype: str | None = None
    precision: str | None = None
    attention: str | None = None
    reference_cache_bytes: int | None = None
    host_cache_bytes: int = 0
    prompt_cache_bytes: int | None = None
    check_finite: bool = True
    matte: str | None = "white"
    nvtx: bool = False

    def __post_init__(self) -> None:
        check_matte(self.matte)

    @classmethod
    def from_names(cls, options: Mapping[str, Any]) -> Self:
        """Options by name; a RequestError tells of one that there is not."""
        names = [item.name for item in fields(cls)]
        if unknown := sorted(options.keys() - set(names)):
            raise RequestError(f"there is no option {unknown[0]!r}, expected {', '.join(names)}")
        return cls(**options)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallArguments:
    """What `KleinKVPipeline.__call__` was asked for; see there for each."""

    image: Any = None
    prompt: str | list[str] | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 4
    sigmas: list[float] | None = None
    num_images_per_prompt: int = 1
    generator: Any = None
    latents: Any = None
    prompt_embeds: Any = None
    output_type: str = "pil"
    callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",)
    max_sequence_length: int = 512
    text_encoder_out_layers: tuple[int, ...] = (9, 18, 27)
    references: Any = None
    seed: int | None = None
    start: StartImage | None = None  # of `KleinKVInpaintPipeline`

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            got = "neither" if self.prompt is None else "both"
            raise RequestError(f"expected one of prompt and prompt_embeds, got {got}")
        if self.prompt is not None:
            texts_of(self.prompt)
        if self.output_type not in ("pil", "np", "pt", "latent"):
            raise RequestError(
                f"output_type is {self.output_type!r}, expected 'pil', 'np', 'pt' or 'latent'"
            )
        names = self.callback_on_step_end_tensor_inputs or ()
        if unknown := [name for name in names if name not in _CALLBACK_TENSORS]:
            raise RequestError(
                f"callback_on_step_end_tensor_inputs names {unknown}, expected some of "
                f"{list(_CALLBACK_TENSORS)}"
            )
        check_count("num_inference_steps", self.num_inference_steps, 50 if not self.sigmas else 0)
        check_count("num_images_per_prompt", self.num_images_per_prompt)
        if self.images and self.references is not None:
            raise RequestError("both image and references are given, expected one of them")

    @property
    def images(self) -> list[Any]:
        """Reference images, in order."""
        if self.image is None:
            return []
        return self.image if isinstance(self.image, list) else [self.image]


def texts_of(prompt: Any) -> list[str]:
    """The texts of an argument `prompt`: a text, or a list of at least one."""
    if isinstance(prompt, str):
        return [prompt]
    if not _are_texts(prompt):
        raise RequestError(f"prompt is {prompt!r:.80}, expected a text or a list of texts")
    return list(prompt)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def check_count(name: str, value: object, most: int = 0) -> None:
    """Refuses what is no whole number (Python's or numpy's) from 1 to `most`, if there is one."""
    if not _is_integer(value) or value < 1 or (most and value > most):  # type: ignore[operator]
        limit = f"1 to {most}" if most else "1 or more"
        raise RequestError(f"{name} is {value!r}, expected {limit}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def prompt_may_come_first(call: Callable[P, R]) -> Callable[P, R]:
    """Lets `pipe("a prompt", image=...)` work although `image` is the first parameter."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[1] if len(args) > 1 else None
        if isinstance(first, str) or _are_texts(first):
            if len(args) > 2 or "prompt" in kwargs:
                raise RequestError(
                    "the first argument is a prompt, and another prompt or positional argument "
                    "follows; pass the rest by name"
                )
            kwargs["prompt"] = first
            args = args[:1]  # type: ignore[assignment]
        return call(*args, **kwargs)

    return wrapped


def host_array(value: Any, name: str, dtype: str) -> NDArray[Any]:
    """A numpy array of type `dtype` from a numpy array or torch tensor of finite numbers."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    array = np.asarray(value)
    if array.dtype.kind != "f" and array.dtype != NUMPY_DTYPES["bfloat16"]:
        raise RequestError(f"{name} has dtype {array.dtype}, expected floating point values")
    if not np.isfinite(array).all():
        raise RequestError(f"{name} holds values that are not finite")
    return np.ascontiguousarray(array, dtype=NUMPY_DTYPES[dtype])


def embeds_array(value: Any, config: ModelConfig, dtype: str) -> NDArray[Any]:
    """Text embeddings of the caller's own, [B, T, D] of type `dtype`."""
    embeds = host_array(value, "prompt_embeds", dtype)
    width = config.transformer.joint_attention_dim
    if embeds.ndim != 3 or embeds.shape[2] != width or 0 in embeds.shape:
        raise RequestError(
            f"prompt_embeds has shape {embeds.shape}, expected [batch, tokens, {width}]"
        )
    if embeds.shape[1] > MAX_POSITION:
        raise RequestError(
            f"prompt_embeds has {embeds.shape[1]} tokens, expected at most {MAX_POSITION}"
        )
    return embeds


def output_size(
    config: ModelConfig,
    height: int | None,
    width: int | None,
    first: tuple[int, int] | None,
    noise: NDArray[Any] | None,
) -> tuple[int, int]:
    """Height and width of the output in pixels, as asked for.

    Where one is None: that of the caller's own latents [B, C, h, w], else of the first reference.
    """
    unit = config.vae.multiple_of
    longest = unit * MAX_POSITION
    for name, value in (("height", height), ("width", width)):
        if value is None:
            continue
        if not _is_integer(value) or not unit <= value <= longest or value % unit:
            raise RequestError(
                f"{name} is {value!r}, expected a multiple of {unit} from {unit} to {longest}"
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
    height, width = int(height or default[0]), int(width or default[1])
    if height * width > MAX_OUTPUT_AREA:
        raise RequestError(
            f"output is {width}x{height}, {height * width / 1e6:.1f} megapixels, expected at most "
            "the area of 2048x2048; ask for a smaller height or width"
        )
    return height, width
