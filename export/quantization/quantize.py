"""Quantized weights, scales and graphs beside an artifact folder's own: `klein-kv quantize`.

Everything is written aside and moved into place when it is whole; the manifest comes last. An
interrupted run leaves the folder as it was.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.digest import file_digest
from klein_kv.artifacts.manifest import FileRecord, Manifest
from klein_kv.artifacts.numbers import PRECISION_FORMATS, fp8_scale, is_block_linear, nvfp4_scale
from klein_kv.artifacts.quantized_weights import (
    load_quantized,
    quantized_files,
    save_quantized_scales,
)
from klein_kv.artifacts.signature import quantized_graph_sets
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.export.checkpoints.quantized_files import PublishedWeight
from klein_kv.export.checks.artifact_weights import component_parameters, component_weights
from klein_kv.export.checks.samples import Sample
from klein_kv.export.graphs.graph_files import save_quantized_graphs
from klein_kv.export.quantization.calibration import Ranges, calibrate
from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
from klein_kv.export.quantization.quantized_source import read_quantized_source
from klein_kv.export.quantization.quantized_writer import LayerSource, write_layers
from klein_kv.export.staging import partial_folder

__all__ = ["QuantizeResult", "QuantizedPart", "quantize_artifacts"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QuantizedPart:
    """What became of one network."""

    precision: str  # what its files are called
    layers: int  # number of quantized layers
    bytes: int  # of their numbers and block scales
    bytes_before: int  # of the same layers in the artifacts' own type
    reused: bool  # they were there already, made in the same way


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a quantization did: the precision to ask for, parts by component, wall time."""

    artifacts: Path
    precision: str
    parts: dict[str, QuantizedPart]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    """One network to write, and how: what `QuantizedComponent.origin` keeps."""

    component: str
    precision: str
    layers: dict[str, LayerSource]
    origin: dict[str, Any]

    def input_scale(self, name: str, ranges: Ranges | None, percentile: float) -> float | None:
        """As the file's maker or as calibration found it; None leaves activations alone."""
        kind, weight = self.layers[name]
        if isinstance(weight, PublishedWeight) and weight.input_scale is not None:
            return weight.input_scale
        if ranges is None:
            return None
        largest = ranges.input_range(name, percentile)
        return fp8_scale(largest) if kind == "fp8" else nvfp4_scale(largest)

    def uncalibrated(self) -> list[str]:
        """Layers whose input scale calibration has to find."""
        if self.precision == "fp8-weight-only":
            return []
        return [name for name in self.layers if self.input_scale(name, None, 100) is None]


def quantize_artifacts(
    artifacts: Path,
    recipe: QuantizationRecipe,
    samples: Sequence[Sample],
    *,
    source: Path | None = None,
    device: str | None = None,
    text_tokens: int = 512,
) -> QuantizeResult:
    """Adds a precision to an artifact folder.

    Args:
        artifacts: what `klein-kv export` wrote; its own files are not changed.
        recipe: which layers get which format.
        samples: requests to calibrate with.
        source: a file with the transformer's quantized weights and input scales, as Black Forest
            Labs publishes them: they are taken as they are, whatever the recipe says of them.
        device: where calibration runs: "cpu" or "cuda"; None takes a GPU where there is one.
        text_tokens: prompt tokens of calibration.

    Raises:
        ArtifactError: the folder is not whole.
        RequestError: a recipe or a source that does not fit the artifacts.
        CheckpointError: weights or activations that are not finite; a source that is damaged.
        CapacityError: not enough disk.
    """
    start = time.perf_counter()
    manifest = Manifest.load(artifacts)
    jobs = _plan_jobs(artifacts, manifest, recipe, source, _samples_digest(samples, text_tokens))
    networks = {job.component: job.precision for job in jobs}
    _check_names(artifacts, manifest, networks)
    todo = [job for job in jobs if not _is_there(artifacts, manifest, job)]
    uncalibrated = {job.component: names for job in todo if (names := job.uncalibrated())}
    ranges: dict[str, Ranges] = {}
    if uncalibrated:
        ranges = calibrate(
            artifacts,
            manifest,
            samples,
            uncalibrated,
            percentiles=recipe.percentile < 100,
            device=device,
            text_tokens=text_tokens,
        )
    _remove_orphans(artifacts, manifest)
    with partial_folder(artifacts, "quantize", artifacts) as stage:
        for job in todo:
            began = time.perf_counter()
            _write(job, stage, ranges.get(job.component), recipe.percentile)
            own = component_weights(artifacts, manifest, job.component)
            quantized = load_quantized(stage, job.component, job.precision)
            save_quantized_graphs(
                stage, manifest.config, manifest.graphs, job.component, own, quantized
            )
            _log.info(
                "%s: %d layers in %s, %.2f GB, %.1f s",
                job.component,
                len(job.layers),
                job.precision,
                quantized.nbytes / 1e9,
                time.perf_counter() - began,
            )
        manifest = _install(artifacts, manifest, stage, networks, todo)
    parts = {}
    for job in jobs:
        done = load_quantized(artifacts, job.component, job.precision)
        own = component_weights(artifacts, manifest, job.component)
        parts[job.component] = QuantizedPart(
            precision=job.precision,
            layers=len(done.linears),
            bytes=done.nbytes,
            bytes_before=sum(own[name].nbytes for name in done.linears),
            reused=job not in todo,
        )
    return QuantizeResult(artifacts, networks["transformer"], parts, time.perf_counter() - start)


def _plan_jobs(
    artifacts: Path,
    manifest: Manifest,
    recipe: QuantizationRecipe,
    source: Path | None,
    samples: str,
) -> list[_Job]:
    jobs, names = [], []
    for component in ("transformer", "text_encoder"):
        shapes = component_parameters(manifest.config, component)
        names += [name for name in shapes if is_block_linear(name, shapes[name])]
        own = component_weights(artifacts, manifest, component)
        precision = recipe.component_precision(component)
        layers: dict[str, LayerSource]
        origin: dict[str, Any]
        if component == "transformer" and source is not None:
            published = read_quantized_source(source, manifest, own)
            layers = {name: (weight.format, weight) for name, weight in published.items()}
            formats = {weight.format for weight in published.values()}
            precision = "nvfp4" if "nvfp4" in formats else "fp8"
            origin = {"file": source.name, "digest": file_digest(source)}
        else:
            layers = {
                name: (kind, own[name]) for name, kind in recipe.assign(component, shapes).items()
            }
            origin = {
                "recipe": recipe.component_dict(component),
                "samples": samples,
                "weights": _weights_digest(manifest, component),
            }
        if precision is not None and layers:
            jobs.append(_Job(component, precision, layers, origin))
    recipe.check_overrides(names)
    if not jobs or jobs[0].component != "transformer":
        raise RequestError(
            f"recipe {recipe.name} leaves every layer of the transformer as it is; expected at "
            "least one to be quantized"
        )
    return jobs


def _weights_digest(manifest: Manifest, component: str) -> str:
    quantized = manifest.quantized_files
    lines = [
        f"{name} {record.digest}"
        for name, record in sorted(manifest.files.items())
        if name.startswith(f"{component}/")
        and name.endswith(".safetensors")
        and name not in quantized
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _samples_digest(samples: Sequence[Sample], text_tokens: int) -> str:
    """Tells one set of requests from another: their number, and a digest of all that is in them."""
    state = hashlib.sha256(str(text_tokens).encode())
    for sample in samples:
        state.update(f"{sample.prompt!r} {sample.width} {sample.height} {sample.seed}".encode())
        for image in sample.images:
            state.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return f"{len(samples)}, sha256:{state.hexdigest()}"


def _is_there(artifacts: Path, manifest: Manifest, job: _Job) -> bool:
    """Whether the folder holds this very network, made in the same way."""
    held = [networks.get(job.component) for networks in manifest.precisions.values()]
    if job.precision not in held:
        return False
    try:
        done = load_quantized(artifacts, job.component, job.precision)
    except ArtifactError:
        return False
    same = done.origin == job.origin and set(done.linears) == set(job.layers)
    formats = {layer.format for layer in done.linears.values()}
    if not (manifest.dtype == "float32" and "nvfp4" in formats):  # those have no graphs
        sets = quantized_graph_sets(
            manifest.variant, manifest.dtype, {job.component: job.precision}
        )
        same = same and all(x in manifest.files for graphs in sets for x in graphs.files.values())
    if same:
        _log.info("%s: %s is there already", job.component, job.precision)
    return same


def _check_names(artifacts: Path, manifest: Manifest, networks: Mapping[str, str]) -> None:
    """Refuses to write over a file of the artifacts' own that happens to have the name."""
    held = manifest.quantized_files
    for component, precision in networks.items():
        for name in quantized_files(component, precision):
            if name in manifest.files and name not in held:
                raise RequestError(
                    f"{artifacts / name} belongs to the artifacts themselves; rename the "
                    "checkpoint's file and export it again"
                )


def _remove_orphans(artifacts: Path, manifest: Manifest) -> None:
    """Removes files of precisions that a killed run moved into place and did not list."""
    for component in ("transformer", "text_encoder"):
        for precision in PRECISION_FORMATS:
            for path in (artifacts / component).glob(f"{precision}.*"):
                name = path.relative_to(artifacts).as_posix()
                if name not in manifest.files and path.suffix in (".safetensors", ".onnx", ".json"):
                    path.unlink()
                    _log.info("removed %s, which a process that is gone left there", path)


def _write(job: _Job, stage: Path, ranges: Ranges | None, percentile: float) -> None:
    weights, scales = (stage / name for name in quantized_files(job.component, job.precision))
    weights.parent.mkdir(exist_ok=True)
    weight_scales = write_layers(weights, job.layers)
    entries = {
        name: (kind, weight_scales[name], job.input_scale(name, ranges, percentile))
        for name, (kind, _) in job.layers.items()
    }
    save_quantized_scales(scales, entries, {} if ranges is None else ranges.attention, job.origin)


def _install(
    artifacts: Path,
    manifest: Manifest,
    stage: Path,
    networks: Mapping[str, str],
    jobs: Sequence[_Job],
) -> Manifest:
    """Moves what was written into place; the manifest is never wrong about what is there."""
    new = {
        path.relative_to(stage).as_posix(): path
        for path in sorted(stage.rglob("*"))
        if path.is_file()
    }
    records = {
        name: FileRecord(path.stat().st_size, file_digest(path)) for name, path in new.items()
    }
    written = {(job.component, job.precision) for job in jobs}
    stale = {name for name, parts in manifest.precisions.items() if written & set(parts.items())}
    if stale:  # their files are about to change
        files = {file for name in stale for file in manifest.precision_files(name)}
        replace(
            manifest,
            files={name: x for name, x in manifest.files.items() if name not in files},
            precisions={name: x for name, x in manifest.precisions.items() if name not in stale},
        ).save(artifacts)
    for name, path in new.items():
        (artifacts / name).parent.mkdir(exist_ok=True)
        path.replace(artifacts / name)
    manifest = replace(
        manifest,
        files=manifest.files | records,
        precisions=manifest.precisions | {networks["transformer"]: dict(networks)},
    )
    manifest.save(artifacts)
    return manifest
