"""Parity of an artifact folder with diffusers on the same checkpoint, graph by graph and whole.

diffusers runs in float32 whatever the artifacts' type, so the table shows their whole error.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinKVPipeline
from numpy.typing import NDArray
from PIL import Image

from klein_kv.errors import CheckpointError
from klein_kv.runtime.images import prepare_reference
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.references import grid_ids, reference_ids, text_ids
from klein_kv.signature import kv_names

__all__ = ["TOLERANCES", "ParityRow", "verify_artifacts"]

_log = logging.getLogger(__name__)

TOLERANCES = {
    # Largest absolute difference allowed, by type of the artifacts: tensors, then uint8 pixels.
    "float32": (1e-4, 1.0),
    "float16": (5e-2, 8.0),
}
_PROMPT = "a red kite over the sea, photograph"
_TIMESTEP = np.float32(0.7435) * np.float32(1000)  # as it comes out of diffusers' round trip


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One comparison.

    Attributes:
        name: graph and tensor, or "end to end" with what was asked for.
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        cosine: cosine similarity of the flattened arrays.
        tolerance: what `max_abs` may be.
    """

    name: str
    max_abs: float
    mean_abs: float
    cosine: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within tolerance."""
        return bool(self.max_abs <= self.tolerance)


def verify_artifacts(
    artifacts: Path, checkpoint: Path, *, threads: int | None = None
) -> list[ParityRow]:
    """Runs both and compares.

    Args:
        artifacts: an exported folder, float32 or float16.
        checkpoint: the checkpoint it came from, in diffusers layout.
        threads: CPU threads of our backend.

    Raises:
        CheckpointError: diffusers cannot load the checkpoint.
        ArtifactError: the artifacts are not whole.
        BackendError: bfloat16 artifacts, which no CPU backend runs.
    """
    ours = KleinKVPipeline.from_pretrained(artifacts, threads=threads)
    ours.set_progress_bar_config(disable=True)
    # A first call makes sure that the artifacts run at all before diffusers loads its weights.
    embeds = ours.encode_prompt(_PROMPT, 64, ours.config.text_encoder.layers)
    theirs = _load_diffusers(checkpoint)
    tolerance, pixel_tolerance = TOLERANCES[ours.manifest.dtype]
    rows = []
    with torch.no_grad():
        for name, got, expected in _graphs(ours, theirs, embeds):
            rows.append(_row(name, got, expected, tolerance))
        for name, got, expected in _end_to_end(ours, theirs):
            pixels = got.dtype == np.uint8
            rows.append(_row(name, got, expected, pixel_tolerance if pixels else tolerance))
    return rows


def _load_diffusers(checkpoint: Path) -> Any:
    try:
        pipe = Flux2KleinKVPipeline.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"diffusers cannot load {checkpoint}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _row(name: str, got: NDArray[Any], expected: NDArray[Any], tolerance: float) -> ParityRow:
    a, b = (x.astype(np.float64).ravel() for x in (got, expected))
    if a.shape != b.shape:
        raise CheckpointError(
            f"{name}: ours has shape {got.shape}, diffusers' {expected.shape}; artifacts and "
            "checkpoint do not belong together"
        )
    difference = np.abs(a - b)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norm if norm else 1.0
    return ParityRow(name, float(difference.max()), float(difference.mean()), cosine, tolerance)


def _picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth colour picture with some detail; any will do, it only has to be the same."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


Comparison = tuple[str, NDArray[Any], NDArray[Any]]


def _graphs(ours: KleinKVPipeline, theirs: Any, embeds: NDArray[Any]) -> Iterator[Comparison]:
    backend, unit = ours.backend, ours.config.vae.multiple_of
    dtype = embeds.dtype
    layers = ours.config.text_encoder.layers
    text, txt_ids = theirs.encode_prompt(
        _PROMPT, max_sequence_length=64, text_encoder_out_layers=layers
    )
    yield "text_encoder", embeds, text.numpy()

    images = [_picture(9 * unit, 8 * unit, 1), _picture(8 * unit, 10 * unit, 2)]
    pixels = [prepare_reference(image, unit) for image in images]
    grids, tokens = [], []
    for i, image in enumerate(pixels):
        out = backend.run("vae_encoder", {"image": backend.upload(image)})
        got = backend.download(out["ref_hidden_states"])
        normal = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        latent = theirs._encode_vae_image(normal, None)
        yield f"vae_encoder, image {i + 1}", got, latent.permute(0, 2, 3, 1).numpy()
        grids.append(got.shape[1:3])
        tokens.append(theirs._pack_latents(latent))

    grid = (8, 11)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, grid[0] * grid[1], ours.config.transformer.in_channels))
    ref = torch.cat(tokens, dim=1)
    ref_ids = torch.from_numpy(reference_ids(grids))
    step = {
        "hidden_states": latents.astype(dtype),
        "encoder_hidden_states": text.numpy().astype(dtype),
        "timestep": np.array([_TIMESTEP]),
        "sigma_step": np.array([-0.25], np.float32),
        "img_ids": grid_ids(*grid),
        "txt_ids": text_ids(text.shape[1]),
    }
    references = {"ref_hidden_states": ref.numpy().astype(dtype), "ref_ids": ref_ids.numpy()}
    uploaded = {name: backend.upload(array) for name, array in (step | references).items()}
    first = backend.run("first_step", uploaded)
    hidden, img_ids = torch.from_numpy(latents).float(), torch.from_numpy(grid_ids(*grid))
    common = {
        "encoder_hidden_states": text,
        "timestep": torch.tensor([0.7435]),
        "txt_ids": txt_ids,
        "return_dict": False,
    }
    noise, cache = theirs.transformer(
        hidden_states=torch.cat([ref, hidden], dim=1),
        img_ids=torch.cat([ref_ids, img_ids])[None],
        kv_cache_mode="extract",
        num_ref_tokens=ref.shape[1],
        **common,
    )
    yield "first_step, noise_pred", backend.download(first["noise_pred"]), noise.numpy()
    caches = [*cache.double_block_caches, *cache.single_block_caches]
    expected = np.stack([x.numpy() for layer in caches for x in (layer.k_ref, layer.v_ref)])
    names = kv_names(len(caches))
    got = np.stack([backend.download(first[name]) for name in names])
    yield "first_step, k_ref and v_ref", got, expected
    encoded = backend.run("encode_references", {name: uploaded[name] for name in references})
    got = np.stack([backend.download(encoded[name]) for name in names])
    yield "encode_references, k_ref and v_ref", got, expected
    feeds = {name: uploaded[name] for name in step} | {name: first[name] for name in names}
    cached = backend.run("cached_step", feeds)
    noise = theirs.transformer(
        hidden_states=hidden,
        img_ids=img_ids[None],
        kv_cache=cache,
        kv_cache_mode="cached",
        **common,
    )[0]
    yield "cached_step, noise_pred", backend.download(cached["noise_pred"]), noise.numpy()


def _end_to_end(ours: KleinKVPipeline, theirs: Any) -> Iterator[Comparison]:
    unit = ours.config.vae.multiple_of
    layers = ours.config.text_encoder.layers
    pictures = [_picture(10 * unit, 9 * unit, 3), _picture(8 * unit, 13 * unit, 4)]
    for count in (0, 1, 2):
        images = pictures[:count] or None
        for kind in ("latent", "pil"):
            results = []
            pipes: tuple[Any, Any] = (ours, theirs)
            for pipe in pipes:
                out = pipe(
                    prompt=_PROMPT,
                    image=images,
                    generator=torch.Generator().manual_seed(0),
                    output_type=kind,
                    text_encoder_out_layers=layers,
                    height=12 * unit,
                    width=9 * unit,
                ).images
                results.append(np.stack([np.asarray(image) for image in out]))
            what = "latents" if kind == "latent" else "pixels"
            yield f"end to end, {count} references, {what}", results[0], results[1]
