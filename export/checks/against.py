"""`klein-kv verify ARTIFACTS --against FP32_ARTIFACTS`: what a machine computes, part by part.

Engines, graphs or the torch backend are compared with the float32 artifacts of the same checkpoint,
run by ONNX Runtime on the CPU; diffusers is not needed, nor torch but for its backend. Then the
loop makes an image twice. A check that fails is noted in the report and the next one runs.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.engines.engine_manifest import EngineManifest, find_engines
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import is_block_linear
from klein_kv.artifacts.signature import is_kv
from klein_kv.artifacts.weights import map_weight
from klein_kv.errors import ArtifactError
from klein_kv.export.checks.artifact_weights import component_weights
from klein_kv.export.checks.compare import compare
from klein_kv.export.checks.graph_runs import (
    PROMPT,
    GraphRuns,
    Row,
    Sizes,
    compare_outputs,
    smallest_sizes,
)
from klein_kv.export.checks.report import Report
from klein_kv.export.checks.tolerances import EXACT, TOLERANCES, output_tolerance
from klein_kv.machine import examine_machine
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.backends.backend import DeviceContent
from klein_kv.runtime.backends.ort.backend import OrtBackend
from klein_kv.runtime.lora.lora_file import read_adapter
from klein_kv.runtime.lora.merge import WeightMerger
from klein_kv.runtime.pipeline import KleinKVPipeline

__all__ = ["verify_against"]

_EXACT_BACKENDS = ("onnxruntime", "torch")
"""All graphs of a network run the same kernels: what must be the same is so bit for bit."""
_STEPS, _SEED, _RANK = 4, 7, 8
_FLATTEST = 1e-3
"""Standard deviation of an image in 0..1 below which it shows nothing."""

Array = NDArray[Any]


def verify_against(
    artifacts: Path, reference: Path, *, out: Path | None = None, **options: Any
) -> Report:
    """Checks everything that can be checked, and goes on when something fails.

    Args:
        artifacts: what is checked: graphs, or the engines below it.
        reference: float32 artifacts of the same checkpoint.
        out: file of the report, kept up to date from check to check.
        options: of `KleinKVPipeline.from_pretrained`.
    """
    artifacts, reference = artifacts.resolve(), reference.resolve()
    report = Report(out, {str(artifacts): "ARTIFACTS", str(reference): "FP32_ARTIFACTS"})
    report.facts["options"] = {name: x for name, x in options.items() if x is not None}
    with report.check("machine"):
        report.facts["machine"] = examine_machine()
    pipe: KleinKVPipeline | None = None
    with report.check("artifacts and backend open"):
        pipe = KleinKVPipeline.from_pretrained(artifacts, prompt_cache_bytes=0, **options)
        pipe.set_progress_bar_config(disable=True)
        report.facts |= _facts(pipe)
    if pipe is None:
        return report
    with contextlib.closing(pipe):
        theirs: OrtBackend | None = None
        runs: GraphRuns | None = None
        with report.check("float32 artifacts open"):
            theirs = _open_reference(reference, pipe)
        with report.check("inputs"):
            runs = GraphRuns(pipe, smallest_sizes(pipe))
            report.facts["sizes"] = asdict(runs.sizes)
        if runs is not None:
            _check_graphs(report, pipe, theirs, runs)
            _check_merge(report, pipe)
            _check_loop(report, pipe, runs.sizes)
    return report


def _facts(pipe: KleinKVPipeline) -> dict[str, Any]:
    """What was checked: digests and types, and the record of every engine."""
    manifest, graphs = pipe.manifest, pipe.graphs
    facts: dict[str, Any] = {
        "backend": pipe.backend.name,
        "artifacts": {
            "digest": manifest.graphs_digest(graphs),
            "variant": manifest.variant,
            "dtype": manifest.dtype,
            "precision": graphs.precision,
            "kv_dtype": graphs.kv_dtype,
            "attention": graphs.attention,
            "config": manifest.config.to_dict(),
        },
    }
    if pipe.backend.name == "tensorrt":
        facts["engines"] = [asdict(EngineManifest.load(x)) for x in find_engines(pipe.artifacts)]
        for engines in facts["engines"]:
            for record in engines["engines"].values():
                for name in ("inputs", "outputs", "weights", "layers"):
                    del record[name]
    return facts


def _open_reference(folder: Path, pipe: KleinKVPipeline) -> OrtBackend:
    manifest, ours = Manifest.load(folder), pipe.manifest
    if manifest.dtype != "float32":
        raise ArtifactError(
            f"{folder} is {manifest.dtype}, expected float32; export the checkpoint with "
            "--dtype fp32"
        )
    if (manifest.config, manifest.variant) != (ours.config, ours.variant):
        raise ArtifactError(
            f"{folder} holds another model: its configuration or variant differs; export it from "
            "the same checkpoint"
        )
    return OrtBackend(folder, manifest)


def _check_graphs(
    report: Report, pipe: KleinKVPipeline, theirs: OrtBackend | None, runs: GraphRuns
) -> None:
    """Every graph against its reference, then the transformer's against each other."""
    results: dict[str, dict[str, Array]] = {}
    for graph in runs.graphs:
        with report.check(f"{graph} runs"):
            inputs = runs.inputs(graph)  # before a graph can write into them
            results[graph] = runs.run(graph)
        if theirs is not None and graph in results:
            with report.check(f"{graph} computes what float32 does") as check:
                feeds = {name: theirs.upload(x) for name, x in inputs.items()}
                outputs = theirs.run(graph, feeds)
                expected = {name: theirs.download(x) for name, x in outputs.items()}
                check.hold(compare_outputs(pipe, graph, results[graph], expected))
                theirs.release(graph)
        if graph == "text_encoder":  # it does not fit beside the transformer everywhere
            with report.check("text_encoder is released"):
                pipe.backend.release(graph)
    if {"encode_references", "first_step", "cached_step"} <= results.keys():
        first, cached = results["first_step"], results["cached_step"]
        kv = results["encode_references"]
        exact = EXACT if pipe.backend.name in _EXACT_BACKENDS else None
        with report.check("first_step and encode_references give the same K/V") as check:
            keys = {name: x for name, x in first.items() if is_kv(name)}
            check.hold(compare_outputs(pipe, "encode_references", kv, keys, exact))
        with report.check("cached_step on this K/V repeats first_step") as check:
            expected = {name: x for name, x in first.items() if not is_kv(name)}
            check.hold(compare_outputs(pipe, "cached_step", cached, expected, exact))
        with report.check("cached_step leaves K/V as it was") as check:
            check.hold(compare_outputs(pipe, "encode_references", runs.kept_kv(), kv, EXACT))
    with report.check("graphs are released"):  # the loop plans its memory itself
        for graph in runs.graphs:
            pipe.backend.release(graph)


def _check_merge(report: Report, pipe: KleinKVPipeline) -> None:
    """A LoRA in one tensor, where the backend merges itself, against numpy."""
    shapes = transformer_parameters(pipe.config.transformer)
    name, shape = next((x, shape) for x, shape in shapes.items() if is_block_linear(x, shape))
    own = map_weight(component_weights(pipe.artifacts, pipe.manifest, "transformer")[name])
    rng, module = np.random.default_rng(_SEED), f"transformer.{name.removesuffix('.weight')}"
    size = float(own[:64].astype(np.float32).std()) / 4 / _RANK**0.5
    tensors = {
        f"{module}.lora_A.weight": rng.standard_normal((_RANK, shape[1]), np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((shape[0], _RANK), np.float32) * size,
    }
    adapters = [(read_adapter(tensors, shapes), 1.0)]
    here, on_host = (
        WeightMerger(pipe.artifacts, pipe.manifest, pipe.graphs, backend).contents(adapters)[name]
        for backend in (pipe.backend, None)
    )
    if not isinstance(here, DeviceContent):
        return
    with report.check("a LoRA is merged as on the host") as check:
        expected: Array = on_host()
        merged = np.zeros_like(expected)
        for rows, piece in here():
            whole = isinstance(piece, np.ndarray)  # there was no memory for it on the device
            merged[rows] = piece if whole else pipe.backend.download(piece)
        difference = compare(merged.astype(np.float32), expected.astype(np.float32))
        check.hold([Row(name, difference, TOLERANCES["merge_lora", expected.dtype.name])])


def _check_loop(report: Report, pipe: KleinKVPipeline, sizes: Sizes) -> None:
    """The same edit twice: the second one finds its references, and is the same image."""
    images: list[Array] = []
    height, width = sizes.output
    for name in ("an edit", "the same edit again"):
        with report.check(name) as check:
            out: Any = pipe(
                prompt=PROMPT,
                image=sizes.pictures(),
                height=height,
                width=width,
                num_inference_steps=_STEPS,
                max_sequence_length=sizes.text_tokens,
                seed=11,
                output_type="np",
            )
            check.measured["timings"] = pipe.timings.to_dict()
            image = np.asarray(out.images)
            if not np.isfinite(image).all() or float(image.std()) < _FLATTEST:
                raise ArtifactError(
                    f"the image has the standard deviation {float(image.std()):.2g}, expected "
                    f"finite values and at least {_FLATTEST:g}"
                )
            images.append(image)
    if len(images) < 2:
        return
    with report.check("a hit equals a miss") as check:
        timings = pipe.timings
        if pipe.manifest.variant == "kv" and len(timings.cached_steps) != _STEPS:
            raise ArtifactError(
                f"the second edit took {timings.to_text()}; expected {_STEPS} cached steps"
            )
        step = "cached_step" if pipe.manifest.variant == "kv" else "plain_step"
        allowed = EXACT
        if pipe.backend.name not in _EXACT_BACKENDS:
            allowed = output_tolerance(pipe.graphs, pipe.config, step, "latents")
        check.hold([Row("image", compare(images[1], images[0]), allowed)])
