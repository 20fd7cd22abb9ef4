"""Parity of an artifact folder with diffusers on the same checkpoint, graph by graph and whole.

Ours runs first and is released before diffusers loads its weights, one part of them at a time: the
memory needed is that of diffusers' largest part. Both get the same inputs.

float32 and float16 artifacts are held against diffusers in float32, so that the table shows their
whole error; bfloat16 ones against diffusers in bfloat16, on the same device.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.config import ITEM_SIZE
from klein_kv.artifacts.weights import WeightIndex
from klein_kv.errors import CapacityError
from klein_kv.export.checks.compare import compare
from klein_kv.export.checks.diffusers_run import DiffusersRun
from klein_kv.export.checks.graph_runs import (
    GraphRuns,
    Row,
    compare_outputs,
    smallest_sizes,
)
from klein_kv.export.checks.tolerances import run_tolerance
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.planning.memory import available_memory

__all__ = ["text_from_rows", "verify_artifacts"]

_SEED, _MOST_REFERENCES = 0, 2

Array = NDArray[Any]


def verify_artifacts(
    artifacts: Path,
    checkpoint: Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    threads: int | None = None,
) -> list[Row]:
    """Runs both and compares.

    Args:
        artifacts: an exported folder.
        checkpoint: the checkpoint it came from, in diffusers layout.
        backend: what runs the artifacts, a name of `runtime.backends.backend.BACKENDS`.
        device: where; diffusers runs there too if that is a GPU of the torch backend, else on the
            CPU.
        threads: CPU threads of our backend.

    Raises:
        CheckpointError: diffusers cannot load the checkpoint, or it is another model.
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
    place = getattr(ours.backend, "device", None)
    if not isinstance(place, torch.device):  # not the torch backend's
        place = torch.device("cpu")
    dtype = torch.bfloat16 if ours.manifest.dtype == "bfloat16" else torch.float32
    _check_memory(checkpoint, dtype, place)
    layers = ours.config.text_encoder.layers
    with torch.no_grad():
        runs = GraphRuns(ours, smallest_sizes(ours))
        results = {}
        for graph in ours.graphs.files:
            if graph != "vae_decoder":  # seen in whole runs
                results[graph] = runs.inputs(graph), runs.run(graph)
                ours.backend.release(graph)
        embeds = results["text_encoder"][1]["encoder_hidden_states"]
        images = list(_our_images(ours, runs, embeds))
        ours.close()
        theirs = DiffusersRun(checkpoint, ours.manifest.variant, layers, dtype, place)
        return list(_rows(ours, theirs, runs, results, images, embeds))


def _our_images(
    ours: KleinKVPipeline, runs: GraphRuns, embeds: Array
) -> Iterator[tuple[Array, Array]]:
    """Last latents and pixels of whole runs with no, one and two references."""
    latents: list[Array] = []

    def keep(_pipe: Any, _i: int, _time: float, tensors: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [np.array(tensors["latents"])]
        return {}

    height, width = runs.sizes.output
    for count in range(_MOST_REFERENCES + 1):
        out: Any = ours(
            image=runs.sizes.pictures()[:count] or None,
            prompt_embeds=embeds,
            generator=torch.Generator().manual_seed(_SEED),
            height=height,
            width=width,
            callback_on_step_end=keep,
        )
        yield latents[0], np.stack([np.asarray(image) for image in out.images])


def _rows(
    ours: KleinKVPipeline,
    theirs: DiffusersRun,
    runs: GraphRuns,
    results: dict[str, tuple[dict[str, Array], dict[str, Array]]],
    images: list[tuple[Array, Array]],
    embeds: Array,
) -> Iterator[Row]:
    for graph, (inputs, outputs) in results.items():
        rows = compare_outputs(ours, graph, outputs, theirs.run(graph, inputs))
        if graph == "text_encoder":
            theirs.load_denoiser()
        yield from rows
    dtype, config = ours.manifest.dtype, ours.config
    for count, pair in enumerate(images):
        expected_pair = theirs.images(
            embeds, runs.sizes.pictures()[:count], runs.sizes.output, _SEED
        )
        for what, got, expected in zip(("latents", "pixels"), pair, expected_pair, strict=True):
            name = f"end to end, {count} references, {what}"
            yield Row(name, compare(got, expected), run_tolerance(what, dtype, config))


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


def text_from_rows(rows: list[Row]) -> str:
    """A table of comparisons."""
    lines = [f"{'':40} {'relative':>10} {'max abs':>10} {'mean abs':>10} {'cosine':>12}"]
    for row in rows:
        mark = "" if row.ok else f"  FAILED, tolerance {row.tolerance.bound:.3g}"
        difference = row.difference
        lines.append(
            f"{row.name:40} {difference.relative:10.2e} {difference.max:10.2e} "
            f"{difference.mean:10.2e} {difference.cosine:12.9f}{mark}"
        )
    return "\n".join(lines)
