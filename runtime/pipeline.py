"""`KleinKVPipeline`: prompt and reference images in, images out.

The call is diffusers' `Flux2KleinKVPipeline.__call__` (same arguments, meaning and defaults), with
`references=` and `seed=` added. Arrays are numpy's; torch is used only for torch generators and
`output_type="pt"`.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from klein_kv.errors import BackendError, RequestError
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.runtime.backend import Backend, Buffer, open_backend
from klein_kv.runtime.images import images_from_uint8, prepare_reference
from klein_kv.runtime.loop import LoopInputs, LoopTimes, denoise_loop
from klein_kv.runtime.memory import check_request_memory, request_bytes
from klein_kv.runtime.noise import initial_noise
from klein_kv.runtime.prompts import PromptTokenizer
from klein_kv.runtime.references import ReferenceSet, grid_ids, reference_ids, text_ids
from klein_kv.schedule import make_schedule
from klein_kv.signature import MAX_POSITION, kv_names
from klein_kv.weights import NUMPY_DTYPES, map_weight

__all__ = ["KleinKVOutput", "KleinKVPipeline"]

_log = logging.getLogger(__name__)
_DEFAULT_LATENT_SIDE = 128
_MIN_SIDE, _MAX_SIDE = 128, 2048
_CALLBACK_TENSORS = ("latents", "prompt_embeds")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class KleinKVOutput:
    """Result of a call.

    Attributes:
        images: list of PIL images; or for output_type "np" float32 [B, H, W, 3] in 0..1, "pt" a
            torch tensor [B, 3, H, W] in 0..1, "latent" float [B, C, H / 8, W / 8].
    """

    images: Any


def _prompt_may_come_first(call: Callable[P, R]) -> Callable[P, R]:
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


class KleinKVPipeline:
    """A loaded artifact folder, ready to make images. Use `from_pretrained`.

    Attributes:
        manifest: what the folder says of itself.
        backend: where the graphs run.
        times: step times of the last call.
    """

    def __init__(self, artifacts: Path, manifest: Manifest, backend: Backend) -> None:
        self.artifacts = artifacts
        self.manifest = manifest
        self.backend = backend
        self.config = manifest.config
        self.tokenizer = PromptTokenizer(artifacts / "tokenizer")
        self.times = LoopTimes()
        self._progress_bar_config: dict[str, Any] = {}
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: float | None = None

    @classmethod
    def from_pretrained(
        cls,
        artifacts: str | Path,
        *,
        backend: str = "auto",
        device: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Opens an artifact folder that `klein-kv export` wrote.

        Args:
            artifacts: the folder.
            backend: "auto" or "onnxruntime".
            device: "cpu".
            threads: CPU threads of the backend; None leaves it to the library.

        Raises:
            ArtifactError: the folder is not whole, or not what its manifest says.
            BackendError: the backend cannot run these artifacts here.
        """
        folder = Path(artifacts)
        manifest = Manifest.load(folder)
        return cls(folder, manifest, open_backend(backend, folder, manifest, device, threads))

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments for tqdm's progress bar, e.g. `disable=True`."""
        self._progress_bar_config = config

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> float | None:
        """Timestep of the step under way; None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt = True` in a callback to end the loop early."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str],
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
    ) -> NDArray[Any]:
        """Text embeddings of prompts.

        Args:
            prompt: one text or B of them.
            max_sequence_length: T; shorter prompts are padded to it (which is part of the result),
                longer ones are cut with a warning.
            text_encoder_out_layers: hidden states to read, among the exported ones.

        Returns:
            [B, T, len(layers) * hidden_size] in the artifacts' dtype.

        Raises:
            RequestError: not a text, or hidden states that were not exported.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if max_sequence_length > MAX_POSITION:
            raise RequestError(
                f"max_sequence_length is {max_sequence_length}, expected at most {MAX_POSITION}"
            )
        input_ids, attention_mask = self.tokenizer(prompts, max_sequence_length)
        outputs = self.backend.run(
            "text_encoder",
            {
                "input_ids": self.backend.upload(input_ids),
                "attention_mask": self.backend.upload(attention_mask),
            },
        )
        embeds = self.backend.download(outputs["encoder_hidden_states"])
        return self._select_layers(embeds, tuple(text_encoder_out_layers))

    def _select_layers(self, embeds: NDArray[Any], layers: tuple[int, ...]) -> NDArray[Any]:
        exported = self.config.text_encoder.layers
        if layers in (exported, _DEFAULT_LAYERS):
            return embeds
        if any(layer not in exported for layer in layers) or len(layers) != len(exported):
            raise RequestError(
                f"text_encoder_out_layers is {layers}, the artifacts hold {exported}; export again "
                "with --text-layers"
            )
        width = self.config.text_encoder.hidden_size
        at = [exported.index(layer) for layer in layers]
        return np.concatenate([embeds[..., i * width : (i + 1) * width] for i in at], axis=-1)

    def encode_references(self, image: Image.Image | Sequence[Image.Image]) -> ReferenceSet:
        """Keys and values of reference images, before any prompt is known.

        Args:
            image: one image or several, in order; the order is part of the result.

        Returns:
            A set to pass as `references=`: the same images then cost only cached steps.

        Raises:
            RequestError: see `images.prepare_reference`.
            CapacityError: the keys and values do not fit into memory.
        """
        images = [image] if isinstance(image, Image.Image) else list(image)
        if not images:
            raise RequestError("no reference image was given, expected at least one")
        pixels = [prepare_reference(x, self.config.vae.multiple_of) for x in images]
        count = self._count_tokens(pixels)
        parts = request_bytes(
            self.config,
            self.manifest.dtype,
            batch=1,
            image_tokens=0,
            ref_tokens=count,
            text_tokens=0,
        )
        check_request_memory(parts, count)
        tokens = self._reference_tokens(pixels)
        kv = self.backend.run("encode_references", tokens)
        return ReferenceSet(
            kv=kv,
            num_tokens=count,
            nbytes=self.config.transformer.kv_bytes(count, self.manifest.dtype),
            first_size=(pixels[0].shape[1], pixels[0].shape[2]),
            model_digest=self.manifest.model_digest,
        )

    def _count_tokens(self, pixels: list[NDArray[np.uint8]]) -> int:
        unit = self.config.vae.multiple_of
        return sum((x.shape[1] // unit) * (x.shape[2] // unit) for x in pixels)

    def _reference_tokens(self, pixels: list[NDArray[np.uint8]]) -> dict[str, Buffer]:
        backend = self.backend
        tokens, grids = [], []
        for image in pixels:
            out = backend.run("vae_encoder", {"image": backend.upload(image)})
            grid = backend.download(out["ref_hidden_states"])  # [1, h, w, C]
            grids.append((grid.shape[1], grid.shape[2]))
            tokens.append(grid.reshape(1, -1, grid.shape[3]))
        return {
            "ref_hidden_states": backend.upload(np.concatenate(tokens, axis=1)),
            "ref_ids": backend.upload(reference_ids(grids)),
        }

    @_prompt_may_come_first
    def __call__(
        self,
        image: list[Image.Image] | Image.Image | None = None,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        sigmas: list[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
        references: ReferenceSet | None = None,
        seed: int | None = None,
    ) -> KleinKVOutput | tuple[Any]:
        """Makes images.

        Source of the meaning of all but the last two arguments: diffusers,
        `Flux2KleinKVPipeline.__call__`.

        Args:
            image: reference image or images, at most 1024x1024 pixels of each are used.
            prompt: a text, or one per image; "" is allowed.
            height: pixels, a multiple of 16 from 128 to 2048 (diffusers rounds down with a
                warning; here another size is an error); default the first reference's, else 1024.
            width: alike.
            num_inference_steps: steps, 1 to 50; klein is distilled for 4.
            sigmas: a schedule of one's own, before the resolution-dependent shift.
            num_images_per_prompt: images per prompt.
            generator: `torch.Generator`, or one per image.
            latents: noise [B, C, H / 16, W / 16] of one's own, numpy or torch.
            prompt_embeds: text embeddings [B, T, D] in place of `prompt`, numpy or torch.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple of the images alone.
            attention_kwargs: accepted for compatibility; no key has an effect.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step;
                may return a dict with new "latents" [B, S, C] or "prompt_embeds". Tensors are
                numpy arrays.
            callback_on_step_end_tensor_inputs: which tensors the callback gets.
            max_sequence_length: prompt tokens.
            text_encoder_out_layers: hidden states of the text encoder, among the exported ones.
            references: a set from `encode_references`, in place of `image`.
            seed: 0 to 2**63 - 1: noise without torch, in place of `generator`; the stream is that
                of a torch CPU generator to within 1e-6.

        Raises:
            RequestError: a bad argument; nothing has been computed then.
            CapacityError: the request does not fit into memory.
        """
        self._check_call(
            prompt,
            prompt_embeds,
            output_type,
            callback_on_step_end_tensor_inputs,
            num_inference_steps,
            num_images_per_prompt,
            sigmas,
        )
        if attention_kwargs:
            _log.warning("attention_kwargs %s have no effect", sorted(attention_kwargs))
        images = [] if image is None else [image] if not isinstance(image, list) else image
        if images and references is not None:
            raise RequestError("both image and references are given, expected one of them")
        if references is not None and references.model_digest != self.manifest.model_digest:
            raise RequestError(
                "references belong to other weights than this pipeline's; encode them again"
            )
        pixels = [prepare_reference(x, self.config.vae.multiple_of) for x in images]
        first = references.first_size if references is not None else None
        if pixels:
            first = (pixels[0].shape[1], pixels[0].shape[2])
        noise = None if latents is None else self._host(latents, "latents")
        height, width = self._output_size(height, width, first, noise)

        given = None if prompt_embeds is None else self._host(prompt_embeds, "prompt_embeds")
        if given is not None:
            self._check_embeds(given)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        count = len(given) if given is not None else len(prompts or [])
        batch = count * num_images_per_prompt
        unit = self.config.vae.multiple_of
        grid = height // unit, width // unit
        ref_tokens = references.num_tokens if references is not None else self._count_tokens(pixels)
        check_request_memory(
            request_bytes(
                self.config,
                self.manifest.dtype,
                batch=batch,
                image_tokens=grid[0] * grid[1],
                ref_tokens=ref_tokens,
                text_tokens=max_sequence_length if given is None else given.shape[1],
            ),
            ref_tokens,
        )
        schedule = make_schedule(
            self.manifest.scheduler, num_inference_steps, grid[0] * grid[1], sigmas
        )
        noise = self._noise(
            noise, (batch, self.config.transformer.in_channels, *grid), generator, seed
        )

        if given is None:
            given = self.encode_prompt(prompts or [], max_sequence_length, text_encoder_out_layers)
        text = np.repeat(given, num_images_per_prompt, axis=0)
        inputs = self._loop_inputs(noise, text, grid)
        if references is not None:
            inputs.kv = references.kv
        elif pixels:
            inputs.references = self._reference_tokens(pixels)
        else:
            inputs.kv = self._no_references()

        self._interrupt = False
        self._num_timesteps = schedule.num_steps
        with tqdm(**{"total": schedule.num_steps, **self._progress_bar_config}) as bar:

            def after_step(i: int, state: LoopInputs) -> bool:
                self._current_timestep = float(schedule.timesteps[i])
                bar.update()
                if callback_on_step_end is not None:
                    self._call_back(
                        callback_on_step_end, i, state, callback_on_step_end_tensor_inputs
                    )
                return self._interrupt

            self.times = denoise_loop(
                self.backend, schedule, inputs, self.manifest.dtype, after_step
            )
        self._current_timestep = None
        inputs.kv = {}  # gigabytes that decoding can use
        result = self._finish(inputs.latents, (batch, *grid), output_type)
        return KleinKVOutput(result) if return_dict else (result,)

    def _check_call(
        self,
        prompt: Any,
        prompt_embeds: Any,
        output_type: str,
        tensors: Sequence[str],
        steps: Any,
        per_prompt: Any,
        sigmas: Any,
    ) -> None:
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
        unknown = [name for name in tensors if name not in _CALLBACK_TENSORS]
        if unknown:
            raise RequestError(
                f"callback_on_step_end_tensor_inputs names {unknown}, expected some of "
                f"{list(_CALLBACK_TENSORS)}"
            )
        for name, value, most in (
            ("num_inference_steps", steps, None if sigmas is not None else 50),
            ("num_images_per_prompt", per_prompt, None),
        ):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < 1 or (most is not None and value > most):
                limit = "1 or more" if most is None else f"1 to {most}"
                raise RequestError(f"{name} is {value!r}, expected {limit}")

    def _host(self, value: Any, name: str) -> NDArray[Any]:
        """A numpy array in the artifacts' dtype from a numpy array or a torch tensor."""
        if hasattr(value, "detach"):
            value = value.detach().cpu().float().numpy()
        array = np.asarray(value)
        if array.dtype.kind != "f":
            raise RequestError(f"{name} has dtype {array.dtype}, expected floating point values")
        if not np.isfinite(array).all():
            raise RequestError(f"{name} holds values that are not finite")
        return np.ascontiguousarray(array, dtype=NUMPY_DTYPES[self.manifest.dtype])

    def _check_embeds(self, embeds: NDArray[Any]) -> None:
        width = self.config.transformer.joint_attention_dim
        if embeds.ndim != 3 or embeds.shape[2] != width or 0 in embeds.shape:
            raise RequestError(
                f"prompt_embeds has shape {embeds.shape}, expected [batch, tokens, {width}]"
            )
        if embeds.shape[1] > MAX_POSITION:
            raise RequestError(
                f"prompt_embeds has {embeds.shape[1]} tokens, expected at most {MAX_POSITION}"
            )

    def _output_size(
        self,
        height: int | None,
        width: int | None,
        first: tuple[int, int] | None,
        noise: NDArray[Any] | None,
    ) -> tuple[int, int]:
        unit = self.config.vae.multiple_of
        for name, value in (("height", height), ("width", width)):
            if value is None:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not _MIN_SIDE <= value <= _MAX_SIDE or value % unit:
                raise RequestError(
                    f"{name} is {value!r}, expected a multiple of {unit} from {_MIN_SIDE} to "
                    f"{_MAX_SIDE}"
                )
        if noise is not None and noise.ndim == 4:
            default = noise.shape[2] * unit, noise.shape[3] * unit
        else:
            side = _DEFAULT_LATENT_SIDE * self.config.vae.scale_factor
            default = first or (side, side)
        return height or default[0], width or default[1]

    def _noise(
        self,
        latents: NDArray[Any] | None,
        shape: tuple[int, ...],
        generator: Any,
        seed: int | None,
    ) -> NDArray[Any]:
        if latents is None:
            dtype = self.manifest.dtype
            drawn = initial_noise(shape, generator=generator, seed=seed, dtype=dtype)
            return drawn.astype(NUMPY_DTYPES[dtype], copy=False)
        if latents.shape != shape:
            raise RequestError(
                f"latents has shape {latents.shape}, expected {shape} for this batch and size"
            )
        return latents

    def _loop_inputs(
        self, noise: NDArray[Any], text: NDArray[Any], grid: tuple[int, int]
    ) -> LoopInputs:
        batch, channels = noise.shape[:2]
        tokens = noise.reshape(batch, channels, -1).transpose(0, 2, 1)  # [B, S, C]
        upload = self.backend.upload
        return LoopInputs(
            latents=upload(tokens),
            text=upload(text),
            img_ids=upload(grid_ids(*grid)),
            txt_ids=upload(text_ids(text.shape[1])),
        )

    def _no_references(self) -> dict[str, Buffer]:
        net = self.config.transformer
        shape = (1, 0, net.num_attention_heads, net.attention_head_dim)
        empty = np.zeros(shape, NUMPY_DTYPES[self.manifest.dtype])
        return {name: self.backend.upload(empty) for name in kv_names(net.num_blocks)}

    def _call_back(
        self,
        callback: Callable[[Any, int, float, dict[str, Any]], Any],
        i: int,
        state: LoopInputs,
        names: Sequence[str],
    ) -> None:
        backend = self.backend
        held = {"latents": state.latents, "prompt_embeds": state.text}
        tensors = {name: backend.download(held[name]) for name in names}
        returned = callback(self, i, self._current_timestep or 0.0, tensors) or {}
        for name, buffer in (("latents", state.latents), ("prompt_embeds", state.text)):
            new = returned.get(name)
            if new is None or new is tensors.get(name):
                continue
            array, shape = self._host(new, name), backend.download(buffer).shape
            if array.shape != shape:
                raise RequestError(
                    f"the callback returned {name} of shape {array.shape}, expected {shape}"
                )
            if name == "latents":
                state.latents = backend.upload(array)
            else:
                state.text = backend.upload(array)

    def _finish(self, latents: Buffer, grid: tuple[int, int, int], output_type: str) -> Any:
        channels = self.config.transformer.in_channels
        if output_type == "latent":
            return self._vae_latents(self.backend.download(latents).reshape(*grid, channels))
        tokens = self.backend.view(latents, (*grid, channels))
        outputs = self.backend.run("vae_decoder", {"latents": tokens})
        if output_type == "pil":
            return images_from_uint8(self.backend.download(outputs["image"]))
        sample = self.backend.download(outputs["sample"])
        if output_type == "np":
            return np.ascontiguousarray(sample.transpose(0, 2, 3, 1), dtype=np.float32)
        try:
            import torch
        except ImportError as error:
            raise BackendError(
                "output_type 'pt' needs torch, which is not installed; use 'np'"
            ) from error
        return torch.from_numpy(np.array(sample))

    def _vae_latents(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """Tokens [B, h, w, 4C] to the VAE's latents [B, C, 2h, 2w] (diffusers: "latent")."""
        weights = graph_weights(self.artifacts, "vae_decoder")
        mean, var = (map_weight(weights[f"bn.running_{name}"]) for name in ("mean", "var"))
        std = np.sqrt(var + np.asarray(self.config.vae.batch_norm_eps, var.dtype))
        b, h, w, c = tokens.shape
        z = (tokens * std + mean).reshape(b, h, w, c // 4, 2, 2)
        return np.ascontiguousarray(z.transpose(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w))


_DEFAULT_LAYERS = (9, 18, 27)
