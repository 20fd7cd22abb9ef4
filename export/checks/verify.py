"""Parity of an artifact folder with diffusers on the same checkpoint, graph by graph and whole.

Ours runs first and is released before diffusers loads its weights, one part of them at a time: the
memory needed is that of diffusers' largest part. Both get the same inputs.

float32 and float16 artifacts are held against diffusers in float32, so that the table shows their
whole error; bfloat16 ones against diffusers in bfloat16, on the same device.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.config import ITEM_SIZE
from klein_kv.artifacts.pixels import prepare_reference
from klein_kv.artifacts.positions import grid_ids, reference_ids, text_ids
from klein_kv.artifacts.signature import kv_names
from klein_kv.artifacts.weights import WeightIndex
from klein_kv.errors import CapacityError, CheckpointError
from klein_kv.export.checks.diffusers_run import DiffusersRun
from klein_kv.runtime.backends.backend import Backend
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.planning.memory import available_memory
from klein_kv.schedule import round_to_dtype

__all__ = ["TOLERANCES", "ParityRow", "verify_artifacts"]

_log = logging.getLogger(__name__)

TOLERANCES = {
    # Largest relative error allowed, by type of the artifacts: tensors, then uint8 pixels. Measured
    # on small random models on a CPU, whose errors grow with depth as those of large ones do:
    "float32": (1e-4, 1e-3),  # 1.6e-6, 5.4e-5
    "float16": (3e-2, 2e-2),  # 9.4e-3, 4.4e-3 (the timesteps' rounding)
    "bfloat16": (0.1, 5e-2),  # 2.8e-2 (text encoder), 5.6e-3
}
_PROMPT = "a red kite over the sea, photograph"
_TEXT_TOKENS = 64
_TIME = np.array([0.7435], np.float32)
_SEED = 0

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One comparison.

    Attributes:
        name: graph and tensor, or "end to end" with what was asked for.
        relative: norm of the difference over the norm of diffusers' result.
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        cosine: cosine similarity of the flattened arrays.
        tolerance: what `relative` may be.
    """

    name: str
    relative: float
    max_abs: float
    mean_abs: float
    cosine: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within tolerance."""
        return bool(self.relative <= self.tolerance)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What both sides compute on, on the host.

    Attributes:
        pixels: reference images, uint8 [1, H, W, 3].
        embeds: our text embeddings [1, T, D].
        step: inputs of a step, except the text.
        references: `ref_hidden_states`, from our VAE encoder, and `ref_ids`.
        pictures: reference images of whole runs.
        size: height and width of what whole runs make.
    """

    pixels: list[NDArray[np.uint8]]
    embeds: Array
    step: dict[str, Array]
    references: dict[str, Array]
    pictures: list[Image.Image]
    size: tuple[int, int]


def verify_artifacts(
    artifacts: Path,
    checkpoint: Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    threads: int | None = None,
) -> list[ParityRow]:
    """Runs both and compares.

    Args:
        artifacts: an exported folder.
        checkpoint: the checkpoint it came from, in diffusers layout.
        backend: what runs the artifacts, a name of `runtime.backend.BACKENDS`.
        device: where; diffusers runs there too if that is a GPU of the torch backend, else on the
            CPU.
        threads: CPU threads of our backend.

    Raises:
        CheckpointError: diffusers cannot load the checkpoint.
        ArtifactError: the artifacts are not whole.
        BackendError: the backend cannot run them, as onnxruntime bfloat16 on a CPU.
        CapacityError: diffusers' weights do not fit into memory.
    """
    ours = KleinKVPipeline.from_pretrained(
        artifacts,
        backend=backend,
        device=device,
        threads=threads,
        reference_cache_bytes=0,
        prompt_cache_bytes=0,
    )
    ours.set_progress_bar_config(disable=True)
    kind = ours.manifest.dtype
    place = getattr(ours.backend, "device", None)
    if not isinstance(place, torch.device):  # not the torch backend's
        place = torch.device("cpu")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    _check_memory(checkpoint, dtype, place)

    found: dict[str, Array] = {}
    with torch.no_grad():
        inputs = _our_inputs(ours, found, str(dtype).removeprefix("torch."))
        found |= _our_graphs(ours, inputs)
        found |= _our_images(ours, inputs)
        for graph in ours.manifest.graphs.files:
            ours.backend.release(graph)
        variant, layers = ours.manifest.variant, ours.config.text_encoder.layers
        del ours
        theirs = DiffusersRun(checkpoint, variant, dtype, place)
        rows = []
        for name, expected in _their_results(theirs, inputs, layers):
            tolerance = TOLERANCES[kind][expected.dtype == np.uint8]
            rows.append(_row(name, found.pop(name), expected, tolerance))
    return rows


def _check_memory(checkpoint: Path, dtype: torch.dtype, place: torch.device) -> None:
    """Refuses what cannot be loaded: diffusers' largest part, on the host and on the device."""
    parts = {}
    for part in ("text_encoder", "transformer", "vae"):
        index = WeightIndex.from_folder(checkpoint / part, part)
        count = sum(ref.nbytes // ITEM_SIZE[ref.dtype] for ref in index.values())
        parts[part] = count * dtype.itemsize
    needed = max(parts["text_encoder"], parts["transformer"] + parts["vae"])
    free = {"host": available_memory()}
    if place.type == "cuda":
        free["GPU"] = torch.cuda.mem_get_info(place)[0]
    for where, available in free.items():
        if needed > available:
            raise CapacityError(
                f"diffusers needs at least {needed / 1e9:.1f} GB of {where} memory for this "
                f"checkpoint in {str(dtype).removeprefix('torch.')} (text encoder "
                f"{parts['text_encoder'] / 1e9:.1f} GB, then transformer and VAE "
                f"{(parts['transformer'] + parts['vae']) / 1e9:.1f} GB), "
                f"{available / 1e9:.1f} GB are free; verify on a larger machine, or bfloat16 "
                "artifacts, with --backend torch"
            )


def _picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth colour picture with some detail; any will do, it only has to be the same."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _run(backend: Backend, graph: str, inputs: dict[str, Array]) -> dict[str, Array]:
    buffers = {name: backend.upload(array) for name, array in inputs.items()}
    return {name: backend.download(x) for name, x in backend.run(graph, buffers).items()}


def _our_inputs(ours: KleinKVPipeline, found: dict[str, Array], time_dtype: str) -> _Inputs:
    """Runs text encoder and VAE encoder, whose results are inputs of the transformer."""
    config, unit = ours.config, ours.config.vae.multiple_of
    embeds = ours.encode_prompt(_PROMPT, _TEXT_TOKENS, config.text_encoder.layers)
    ours.backend.release("text_encoder")
    found["text_encoder"] = embeds
    images = [_picture(9 * unit, 8 * unit, 1), _picture(8 * unit, 10 * unit, 2)]
    pixels = [prepare_reference(image, unit) for image in images]
    grids, tokens = [], []
    for i, image in enumerate(pixels):
        got = _run(ours.backend, "vae_encoder", {"image": image})["ref_hidden_states"]
        found[f"vae_encoder, image {i + 1}"] = got
        grids.append((got.shape[1], got.shape[2]))
        tokens.append(got.reshape(1, -1, got.shape[3]))
    grid = (8, 11)
    shape = (1, grid[0] * grid[1], config.transformer.in_channels)
    latents = np.random.default_rng(_SEED).standard_normal(shape).astype(embeds.dtype)
    # As it comes out of diffusers, which rounds the time to its own type and back.
    time = round_to_dtype(round_to_dtype(_TIME, time_dtype) * np.float32(1000), time_dtype)
    return _Inputs(
        pixels=pixels,
        embeds=embeds,
        step={
            "hidden_states": latents,
            "timestep": time,
            "sigma_step": np.array([-0.25], np.float32),
            "img_ids": grid_ids(*grid),
            "txt_ids": text_ids(_TEXT_TOKENS),
        },
        references={
            "ref_hidden_states": np.concatenate(tokens, axis=1),
            "ref_ids": reference_ids(grids),
        },
        pictures=[_picture(10 * unit, 9 * unit, 3), _picture(8 * unit, 13 * unit, 4)],
        size=(12 * unit, 9 * unit),
    )


def _our_graphs(ours: KleinKVPipeline, inputs: _Inputs) -> dict[str, Array]:
    backend = ours.backend
    step = inputs.step | {"encoder_hidden_states": inputs.embeds}
    if ours.manifest.variant == "plain":
        out = _run(backend, "plain_step", step | inputs.references)
        return {"plain_step, noise_pred": out["noise_pred"]}
    names = kv_names(ours.config.transformer.num_blocks)
    first = _run(backend, "first_step", step | inputs.references)
    encoded = _run(backend, "encode_references", inputs.references)
    cached = _run(backend, "cached_step", step | {name: first[name] for name in names})
    return {
        "first_step, noise_pred": first["noise_pred"],
        "first_step, k_ref and v_ref": np.stack([first[name] for name in names]),
        "encode_references, k_ref and v_ref": np.stack([encoded[name] for name in names]),
        "cached_step, noise_pred": cached["noise_pred"],
    }


def _our_images(ours: KleinKVPipeline, inputs: _Inputs) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for count in (0, 1, 2):

        def keep(_pipe: Any, _i: int, _time: float, tensors: dict[str, Any], n: int = count) -> Any:
            found[f"end to end, {n} references, latents"] = np.array(tensors["latents"])
            return {}

        out: Any = ours(
            image=inputs.pictures[:count] or None,
            prompt_embeds=inputs.embeds,
            generator=torch.Generator().manual_seed(_SEED),
            height=inputs.size[0],
            width=inputs.size[1],
            callback_on_step_end=keep,
        )
        found[f"end to end, {count} references, pixels"] = np.stack(
            [np.asarray(image) for image in out.images]
        )
    return found


def _their_results(
    theirs: DiffusersRun, inputs: _Inputs, layers: tuple[int, ...]
) -> Iterator[tuple[str, Array]]:
    """diffusers' results by the names of ours."""
    embeds = theirs.encode_prompt(_PROMPT, _TEXT_TOKENS, layers)
    yield "text_encoder", embeds
    theirs.load_denoiser()
    for i, image in enumerate(inputs.pixels):
        yield f"vae_encoder, image {i + 1}", theirs.encode_image(image)
    step = inputs.step | {"encoder_hidden_states": inputs.embeds}
    if theirs.variant == "plain":
        yield "plain_step, noise_pred", theirs.plain_step(step, inputs.references)
    else:
        noise, kv = theirs.first_step(step, inputs.references)
        yield "first_step, noise_pred", noise
        yield "first_step, k_ref and v_ref", kv
        yield "encode_references, k_ref and v_ref", kv
        yield "cached_step, noise_pred", theirs.cached_step(step)
    for count in (0, 1, 2):
        latents, pixels = theirs.images(embeds, inputs.pictures[:count], inputs.size, _SEED)
        yield f"end to end, {count} references, latents", latents
        yield f"end to end, {count} references, pixels", pixels


def _row(name: str, got: Array, expected: Array, tolerance: float) -> ParityRow:
    a, b = (x.astype(np.float64).ravel() for x in (got, expected))
    if a.shape != b.shape:
        raise CheckpointError(
            f"{name}: ours has shape {got.shape}, diffusers' {expected.shape}; artifacts and "
            "checkpoint do not belong together"
        )
    difference, ours, theirs = np.abs(a - b), np.linalg.norm(a), np.linalg.norm(b)
    distance = float(np.linalg.norm(difference))
    return ParityRow(
        name=name,
        relative=distance / float(theirs) if theirs else distance,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        cosine=float(a @ b) / float(ours * theirs) if ours and theirs else 1.0,
        tolerance=tolerance,
    )
