"""What a self-test compares with: the same graphs on a CPU, where a CPU can be asked."""

import importlib.util
from pathlib import Path

from klein_kv.attention_scales import attention_scales, kv_scales
from klein_kv.errors import KleinKVError
from klein_kv.flops import reference_flops, step_flops
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.quantization import PRECISION_FORMATS
from klein_kv.quantized_weights import load_quantized
from klein_kv.runtime.backend import open_backend
from klein_kv.runtime.memory import available_memory
from klein_kv.runtime.ort_backend import OrtBackend
from klein_kv.runtime.ort_device import CPU
from klein_kv.runtime.selftest_graphs import GraphRunner
from klein_kv.runtime.selftest_report import CheckError, Report
from klein_kv.runtime.selftest_sizes import CaseSizes
from klein_kv.signature import KV_STATIC_FLOAT8, GraphSet, kv_names

__all__ = ["find_reference", "static_kv_scales"]

_TORCH_NEEDS = ("torch", "diffusers")
_MOST_FLOPS = 5e12
"""What a CPU is asked for unless it was named: some ten seconds."""


def find_reference(
    report: Report,
    case: str,
    backend: str,
    artifacts: Path,
    manifest: Manifest,
    graphs: GraphSet,
    named: Path | None,
    sizes: CaseSizes,
) -> GraphRunner | str:
    """What computes the expected outputs, or why nothing does.

    Quantized graphs are compared with themselves where ONNX Runtime computes them on a CPU, and
    with graphs that are not quantized elsewhere: bfloat16 and nvfp4 it does not know.

    Args:
        report: where it is noted if the named artifacts cannot be used.
        case: begins the check's name.
        backend: name of the backend that is tested.
        artifacts: the folder that is tested.
        manifest: its manifest.
        graphs: which of its graphs are tested.
        named: artifacts of the same model that a CPU can run; None takes the tested ones.
        sizes: that it would run at.
    """
    if named is not None:
        found: list[GraphRunner] = []
        report.run(
            f"{case}: reference artifacts", lambda: found.append(_same_model(named, manifest))
        )
        return found[0] if found else "the reference artifacts cannot be used"
    try:
        return _too_much(artifacts, manifest, sizes) or _other_backend(
            backend, artifacts, manifest, graphs
        )
    except KleinKVError as error:
        return str(error)


def static_kv_scales(artifacts: Path, manifest: Manifest, graphs: GraphSet) -> dict[str, float]:
    """Scales of reference keys and values that are constants of the graphs, by tensor.

    Raises:
        ArtifactError: the precision's files are not whole.
    """
    if graphs.kv_dtype != KV_STATIC_FLOAT8:
        return {}
    net = manifest.config.transformer
    layers = load_quantized(artifacts, "transformer", dict(graphs.quantized)["transformer"])
    weights = graph_weights(artifacts, graphs.files["first_step"])
    scales = attention_scales(net, layers.attention, weights)
    return dict(zip(kv_names(net.num_blocks), kv_scales(net, scales), strict=True))


def _other_backend(
    backend: str, artifacts: Path, manifest: Manifest, graphs: GraphSet
) -> GraphRunner | str:
    """The same artifacts on a CPU, by another backend than the tested one."""
    if backend != CPU.backend and manifest.dtype in CPU.dtypes:
        formats = [PRECISION_FORMATS[name] for _, name in graphs.quantized]
        alike = formats and "nvfp4" not in formats
        return _runner(artifacts, manifest, graphs if alike else manifest.graphs)
    if backend.startswith("torch"):
        return (
            f"nothing but torch computes {manifest.dtype} on a CPU; export the checkpoint in fp32 "
            "too and name it with --reference-artifacts"
        )
    missing = [name for name in _TORCH_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{missing[0]} is not installed, with which a CPU would be asked; pip install "
            "'klein-kv[torch]', or name fp32 artifacts with --reference-artifacts"
        )
    return GraphRunner(
        label=f"torch on a CPU, {manifest.dtype}",
        backend=open_backend("torch", artifacts, manifest, "cpu", None),
        graphs=manifest.graphs,
        config=manifest.config,
        present=tuple(manifest.graphs.files),
    )


def _same_model(artifacts: Path, ours: Manifest) -> GraphRunner:
    manifest = Manifest.load(artifacts)
    if (manifest.config, manifest.variant) != (ours.config, ours.variant):
        raise CheckError(
            "the reference artifacts are of another model: their configuration or variant differs; "
            "export them from the same checkpoint"
        )
    return _runner(artifacts, manifest, manifest.graphs)


def _runner(artifacts: Path, manifest: Manifest, graphs: GraphSet) -> GraphRunner:
    quantized = "" if graphs.precision is None else f", {graphs.precision}"
    return GraphRunner(
        label=f"onnxruntime on a CPU, {manifest.dtype}{quantized}",
        backend=OrtBackend(artifacts, manifest, graphs=graphs),
        graphs=graphs,
        config=manifest.config,
        present=tuple(graphs.files),
        kv_scales=static_kv_scales(artifacts, manifest, graphs),
    )


def _too_much(artifacts: Path, manifest: Manifest, sizes: CaseSizes) -> str | None:
    output, references = sizes.grids(manifest.config.vae.multiple_of)
    tokens = sum(height * width for height, width in references)
    net = manifest.config.transformer
    flops = reference_flops(net, tokens) + step_flops(
        net,
        batch=1,
        image_tokens=output[0] * output[1],
        text_tokens=sizes.text_tokens,
        ref_tokens=tokens,
    )
    refs = {
        ref
        for graph, file in manifest.graphs.files.items()
        if graph.endswith("_step")
        for ref in graph_weights(artifacts, file).values()
    }
    weights = sum(ref.nbytes for ref in refs)
    if flops <= _MOST_FLOPS and weights <= available_memory():
        return None
    return (
        f"a CPU would need {flops / 1e12:.1f} TFLOP and {weights / 1e9:.1f} GB for it; ask for it "
        "with --reference-artifacts"
    )
