"""What an artifact folder holds, and what this machine can run: `klein-kv inspect` and `doctor`."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from klein_kv import __version__
from klein_kv.artifacts.manifest import Manifest, graph_weights
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.artifacts.signature import TensorSpec, distinct_graphs, is_kv

__all__ = ["examine_machine", "inspect_artifacts", "polygraphy_commands"]

# Distribution, what it is for, and the extra that brings it.
_DISTRIBUTIONS = (
    ("onnxruntime", "runs artifacts on a CPU", "cpu"),
    ("onnxruntime-gpu", "runs artifacts on a CUDA GPU", "cuda"),
    ("tensorrt-rtx-cu13", "builds and runs engines for RTX GPUs", "rtx"),
    ("tensorrt", "builds and runs engines for data-centre GPUs", "tensorrt"),
    ("cuda-python", "device memory and streams for engines", "rtx"),
    ("torch", "runs artifacts on a CPU or a CUDA GPU, export, verify", "torch"),
    ("diffusers", "VAE of the torch backend, export, verify", "torch"),
    ("transformers", "export of the tokenizer, verify", "export"),
    ("onnx", "export", "export"),
    ("onnx_ir", "export", "export"),
    ("safetensors", "fixture checkpoints", "export"),
)


def inspect_artifacts(folder: Path) -> tuple[dict[str, Any], str]:
    """Checks an artifact folder and describes it.

    Args:
        folder: what `klein-kv export` wrote.

    Returns:
        The description as plain values, and as a text.

    Raises:
        ArtifactError: the folder is not whole, or not what its manifest says.
    """
    manifest = Manifest.load(folder)
    graphs: dict[str, Any] = {}
    lines = [
        f"model     {manifest.model_id}, variant {manifest.variant}, {manifest.dtype}",
        f"digest    {manifest.model_digest}",
        f"licence   {manifest.licence}",
    ]
    for label, graph, held in distinct_graphs(manifest.graph_sets):
        file, signature = held.files[graph], held.signature(graph, manifest.config)
        weights = graph_weights(folder, file)
        size, weight_bytes = manifest.files[file].bytes, sum(w.nbytes for w in weights.values())
        graphs[label] = {
            "file": file,
            "bytes": size,
            "weights": len(weights),
            "weight_bytes": weight_bytes,
            "inputs": [_spec(spec) for spec in signature.inputs],
            "outputs": [_spec(spec) for spec in signature.outputs],
        }
        lines.append(
            f"\n{label}: {file}, {size / 1e6:.2f} MB, reads {weight_bytes / 1e9:.3f} GB of weights"
        )
        for arrow, specs in (("<-", signature.inputs), ("->", signature.outputs)):
            lines += [f"  {arrow} {line}" for line in _folded(specs)]
    precisions = {}
    for name, networks in manifest.precisions.items():
        parts = {part: load_quantized(folder, part, files) for part, files in networks.items()}
        precisions[name] = {
            "digest": manifest.precision_digest(name),
            "components": {
                part: {"files": networks[part], "layers": len(held.linears), "bytes": held.nbytes}
                for part, held in parts.items()
            },
        }
        what = ", ".join(
            f"{part} {len(held.linears)} layers in {networks[part]}, {held.nbytes / 1e9:.3f} GB"
            for part, held in parts.items()
        )
        lines.insert(3, f"precision {name}: {what}")
    value = {
        "artifacts": str(folder),
        "model_id": manifest.model_id,
        "variant": manifest.variant,
        "dtype": manifest.dtype,
        "model_digest": manifest.model_digest,
        "config": manifest.config.to_dict(),
        "graphs": graphs,
        "precisions": precisions,
        "files": {name: record.bytes for name, record in sorted(manifest.files.items())},
    }
    return value, "\n".join(lines)


def polygraphy_commands(folder: Path) -> tuple[dict[str, Any], str]:
    """Commands that compare each graph between ONNX Runtime and TensorRT, for debugging.

    Polygraphy is no part of the runtime: it lets engine files bring host code.

    Raises:
        ArtifactError: the folder is not whole.
    """
    manifest = Manifest.load(folder)
    sizes = {"batch": 1, "image_tokens": 256, "ref_tokens": 256, "text_tokens": 64}
    unit = manifest.config.vae.multiple_of
    sizes |= {"grid_height": 16, "grid_width": 16, "height": 16 * unit, "width": 16 * unit}
    commands = {}
    for label, graph, held in distinct_graphs(manifest.graph_sets):
        file, signature = held.files[graph], held.signature(graph, manifest.config)
        shapes = " ".join(
            f"{spec.name}:[{','.join(str(axis) for axis in spec.concrete(sizes))}]"
            for spec in signature.inputs
        )
        commands[label] = (
            f"polygraphy run {shlex.quote(str(folder / file))} --onnxrt --trt "
            f"--input-shapes {shapes}"
        )
    return {"commands": commands}, "\n\n".join(commands.values())


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _folded(specs: tuple[TensorSpec, ...]) -> list[str]:
    """One line per tensor; the keys and values of all blocks share one."""
    lines = [_line(spec.name, spec) for spec in specs if not is_kv(spec.name)]
    for kind in ("_ref.", "_ref_scale."):
        kv = [spec for spec in specs if kind in spec.name]
        if kv:
            lines.append(_line(f"{kv[0].name} ... {kv[-1].name}", kv[0]))
    return lines


def _line(name: str, spec: TensorSpec) -> str:
    return f"{name:32} {spec.dtype:13} [{', '.join(str(axis) for axis in spec.shape)}]"


def examine_machine() -> tuple[dict[str, Any], str]:
    """Lists versions, devices, and what is missing.

    Returns:
        The findings as plain values ("ready": whether some backend can run here), and as a text.
    """
    packages = {name: _version(name) for name, _, _ in _DISTRIBUTIONS}
    memory = psutil.virtual_memory()
    gpus = _gpus()
    torch_ready = packages["torch"] and packages["diffusers"]
    ready = bool(packages["onnxruntime"] or packages["onnxruntime-gpu"] or torch_ready)
    value = {
        "klein_kv": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "gpus": gpus,
        "packages": packages,
        "ready": ready,
    }
    lines = [
        f"klein-kv {__version__}, Python {value['python']}, {value['platform']}",
        f"{value['cpus']} CPUs, {memory.total / 1e9:.1f} GB memory, "
        f"{memory.available / 1e9:.1f} GB free",
        "GPU: " + ("; ".join(gpus) if gpus else "no NVIDIA driver found"),
    ]
    for name, purpose, extra in _DISTRIBUTIONS:
        found = packages[name]
        state = found or f"missing: pip install 'klein-kv[{extra}]'"
        lines.append(f"  {name:18} {state:40} {purpose}")
    lines.append(
        "ready to run artifacts"
        if ready
        else "no backend is installed; pip install 'klein-kv[cpu]' is the smallest"
    )
    return value, "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Name, driver and memory of each GPU, as nvidia-smi tells them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
