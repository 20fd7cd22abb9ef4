"""`klein-kv inspect` and `klein-kv doctor`: what lies there, and what this machine can run."""

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_kv.cli.arguments import AddVerb, Result
from klein_kv.errors import RequestError

if TYPE_CHECKING:
    from klein_kv.artifacts.engines.engine_record import EngineRecord
    from klein_kv.artifacts.signature import TensorSpec
    from klein_kv.engines.plan.kernel_price import PlanPrice

__all__ = ["add_doctor", "add_inspect"]

_PRICE_NOTE = "times are a model (peak throughput and bandwidth), not a measurement"


def add_inspect(add: AddVerb) -> None:
    """Adds `klein-kv inspect`."""
    sub = add(
        "inspect", _inspect, "Show what artifacts, engines or a LoRA hold; check their files."
    )
    sub.add_argument("folder", type=Path, metavar="ARTIFACTS[/engines/NAME]|LORA_FILE")
    sub.add_argument("--artifacts", type=Path, help="LoRA: match it against this model")
    sub.add_argument("--gpu", help="engines: price the kernel plans for this GPU")
    sub.add_argument(
        "--polygraphy", action="store_true", help="print commands that compare a graph's outputs"
    )


def add_doctor(add: AddVerb) -> None:
    """Adds `klein-kv doctor`."""
    add("doctor", _doctor, "Show versions, devices, and what is missing.")


def _inspect(args: argparse.Namespace) -> Result:
    if args.folder.is_file():
        return _inspect_lora(args.folder, args.artifacts)
    if args.artifacts:
        raise RequestError(f"{args.folder} is no file; expected a LoRA to match with --artifacts")
    if (args.folder / "engine.json").exists():
        return _inspect_engines(args.folder, args.gpu)
    if args.gpu:
        raise RequestError(
            f"{args.folder} holds no engines; expected a folder below ARTIFACTS/engines"
        )
    return _polygraphy(args.folder) if args.polygraphy else _inspect_artifacts(args.folder)


def _inspect_artifacts(folder: Path) -> Result:
    from klein_kv.artifacts.manifest import Manifest
    from klein_kv.artifacts.quantized_weights import load_quantized
    from klein_kv.artifacts.signature import distinct_graphs
    from klein_kv.artifacts.weights import graph_weights

    manifest = Manifest.load(folder)
    lines = [
        f"model     {manifest.model_id}, variant {manifest.variant}, {manifest.dtype}",
        f"digest    {manifest.model_digest}",
        f"licence   {manifest.licence}",
    ]
    precisions: dict[str, Any] = {}
    for name, networks in manifest.precisions.items():
        parts = {part: load_quantized(folder, part, files) for part, files in networks.items()}
        components = {
            part: {"files": networks[part], "layers": len(x.linears), "bytes": x.nbytes}
            for part, x in parts.items()
        }
        precisions[name] = {"digest": manifest.precision_digest(name), "components": components}
        texts = (
            f"{part} {len(x.linears)} layers in {networks[part]}, {x.nbytes / 1e9:.3f} GB"
            for part, x in parts.items()
        )
        lines.append(f"precision {name}: {', '.join(texts)}")
    graphs: dict[str, Any] = {}
    for label, graph, held in distinct_graphs(manifest.graph_sets):
        file, signature = held.files[graph], held.signature(graph, manifest.config)
        weights = graph_weights(folder, file)
        size, weight_bytes = manifest.files[file].bytes, sum(w.nbytes for w in weights.values())
        graphs[label] = {
            "file": file,
            "bytes": size,
            "weights": len(weights),
            "weight_bytes": weight_bytes,
            "inputs": [spec._asdict() for spec in signature.inputs],
            "outputs": [spec._asdict() for spec in signature.outputs],
        }
        lines.append(
            f"\n{label}: {file}, {size / 1e6:.2f} MB, reads {weight_bytes / 1e9:.3f} GB of weights"
        )
        for arrow, specs in (("<-", signature.inputs), ("->", signature.outputs)):
            lines += [f"  {arrow} {line}" for line in _tensor_lines(specs)]
    facts = ("model_id", "variant", "dtype", "model_digest")
    value = {
        "artifacts": str(folder),
        **{name: getattr(manifest, name) for name in facts},
        "config": manifest.config.to_dict(),
        "graphs": graphs,
        "precisions": precisions,
        "files": {name: record.bytes for name, record in sorted(manifest.files.items())},
    }
    return value, "\n".join(lines), 0


def _inspect_lora(path: Path, artifacts: Path | None) -> Result:
    from klein_kv.artifacts.manifest import Manifest
    from klein_kv.networks.transformer import transformer_parameters
    from klein_kv.runtime.lora.lora_file import describe_lora, read_adapter

    value: dict[str, Any] = {"lora": str(path), "bytes": path.stat().st_size, **describe_lora(path)}
    kinds = ", ".join(f"{count} {kind}" for kind, count in value["kinds"].items())
    lines = [
        f"format    {value['format']}, {value['bytes'] / 1e6:.2f} MB, {value['keys']} keys",
        f"modules   {kinds or 'none'}",
        f"rank      {', '.join(map(str, value['ranks'])) or '-'}",
        f"alpha     {', '.join(f'{alpha:g}' for alpha in value['alphas']) or 'that of the rank'}",
    ]
    if artifacts is not None:
        shapes = transformer_parameters(Manifest.load(artifacts).config.transformer)
        adapter = read_adapter(path, shapes, strict=False)
        value |= {"digest": adapter.digest, "tensors": sorted(adapter.changes)}
        value["unmatched"] = list(adapter.ignored)
        lines.append(f"changes   {len(adapter.changes)} of {len(shapes)} tensors of {artifacts}")
        lines += [f"unmatched {key}" for key in adapter.ignored]
    return value, "\n".join(lines), 0


def _tensor_lines(specs: "tuple[TensorSpec, ...]") -> list[str]:
    """One line per tensor; the keys and values of all blocks share one."""
    from klein_kv.artifacts.signature import is_kv

    named = [(spec.name, spec) for spec in specs if not is_kv(spec.name)]
    for kind in ("_ref.", "_ref_scale."):
        kv = [spec for spec in specs if kind in spec.name]
        if kv:
            named.append((f"{kv[0].name} ... {kv[-1].name}", kv[0]))
    return [
        f"{name:32} {spec.dtype:13} [{', '.join(str(axis) for axis in spec.shape)}]"
        for name, spec in named
    ]


def _polygraphy(folder: Path) -> Result:
    """Commands that compare each graph between ONNX Runtime and TensorRT, for debugging.

    Polygraphy is no part of the runtime: it lets engine files bring host code.
    """
    from klein_kv.artifacts.manifest import Manifest
    from klein_kv.artifacts.signature import distinct_graphs

    manifest = Manifest.load(folder)
    sizes = {"batch": 1, "image_tokens": 256, "ref_tokens": 256, "text_tokens": 64}
    unit = manifest.config.vae.multiple_of
    sizes |= {"grid_height": 16, "grid_width": 16, "height": 16 * unit, "width": 16 * unit}
    commands = {}
    for label, graph, held in distinct_graphs(manifest.graph_sets):
        shapes = " ".join(
            f"{spec.name}:[{','.join(str(axis) for axis in spec.concrete(sizes))}]"
            for spec in held.signature(graph, manifest.config).inputs
        )
        path = shlex.quote(str(folder / held.files[graph]))
        commands[label] = f"polygraphy run {path} --onnxrt --trt --input-shapes {shapes}"
    return {"commands": commands}, "\n\n".join(commands.values()), 0


def _inspect_engines(folder: Path, gpu: str | None) -> Result:
    from klein_kv.artifacts.engines.engine_manifest import EngineManifest
    from klein_kv.artifacts.engines.engine_sizes import sizes_text
    from klein_kv.artifacts.engines.targets import find_target
    from klein_kv.artifacts.manifest import MANIFEST, Manifest
    from klein_kv.engines.plan.kernel_plan import KernelPlan
    from klein_kv.engines.plan.kernel_price import price_plan

    manifest = EngineManifest.load(folder)
    target = find_target(gpu or manifest.target)
    if target.gpu is None:
        raise RequestError(
            f"no figures are known for {target.name}; name another GPU with --gpu, e.g. rtx5090"
        )
    sizes, artifacts = "", folder.absolute().parent.parent
    if (artifacts / MANIFEST).exists():  # it knows the pixels of a token
        config = Manifest.load(artifacts, check_files=False).config
        sizes = sizes_text(manifest, config.vae.multiple_of)
    engines: dict[str, Any] = {}
    prices: dict[str, PlanPrice] = {}
    unpriced: dict[str, str] = {}
    for graph, record in manifest.engines.items():
        manifest.read_engine(folder, graph)  # refuses a changed file
        facts = ("file", "bytes", "sha256", "scratch_bytes")
        engines[graph] = {name: getattr(record, name) for name in facts} | {
            "build_seconds": record.seconds,
            "weights": len(record.weights),
            "profiles": [profile.symbols for profile in record.profiles],
        }
        plan = KernelPlan.load(folder / record.layers)
        if plan.known:
            prices[graph] = price_plan(plan, target.gpu)
        else:
            unpriced[graph] = "no price: its shapes are dynamic (build a recipe of one shape)"
    value = {
        "engines_of": manifest.title,
        **{name: getattr(manifest, name) for name in ("target", "precision", "weights")},
        "sizes": sizes,
        "engines": engines,
        "note": _PRICE_NOTE,
        "plans": [asdict(price) for price in prices.values()],
        "unpriced": unpriced,
    }
    lines = [
        f"{manifest.title}, priced for {target.gpu.name}",
        *([f"takes {sizes}"] if sizes else []),
        f"{'engine':17} {'MB':>6} {'built s':>7} {'shapes':>6} {'scratch GB':>10} {'plan ms':>8} "
        f"{'ideal ms':>8} {'ratio':>6} {'kernels':>7} {'attention':>9}  low precision",
        *(_engine_row(record, prices.get(graph)) for graph, record in manifest.engines.items()),
        f"ideal: matrix products and attention alone; {_PRICE_NOTE}",
        *(f"{graph}: {reason}" for graph, reason in unpriced.items()),
    ]
    for graph, price in prices.items():
        lines += [f"{graph}: {name} copies a weight at every run" for name in price.weight_copies]
        lines += [
            f"{graph}: {name} spreads a modulation over tokens at every run"
            for name in price.blended_modulations
        ]
    return value, "\n".join(lines), 0


def _engine_row(record: "EngineRecord", price: "PlanPrice | None") -> str:
    row = (
        f"{record.graph:17} {record.bytes / 1e6:6.2f} {record.seconds:7.1f} "
        f"{len(record.profiles):6} {record.scratch_bytes / 1e9:10.3f}"
    )
    if price is None:
        return row
    ratio = "-" if price.ratio is None else f"{price.ratio:.4f}"
    native = [f"{count} {name}" for name, count in sorted(price.native_products.items())]
    if price.float8_attentions:
        native.append(f"{price.float8_attentions} attention fp8")
    if price.block_scale_moves:
        native.append(f"{price.block_scale_moves} block scales reordered")
    return (
        f"{row} {price.seconds * 1e3:8.2f} {price.ideal_seconds * 1e3:8.2f} {ratio:>6} "
        f"{price.kernels:7} {price.attention_kernels:9}  {', '.join(native) or '-'}"
    )


def _doctor(_args: argparse.Namespace) -> Result:
    from klein_kv.machine import DISTRIBUTIONS, examine_machine

    value = examine_machine()
    packages, gpus = value["packages"], value["gpus"]
    lines = [
        f"klein-kv {value['klein_kv']}, Python {value['python']}, {value['platform']}",
        f"{value['cpus']} CPUs, {value['memory_bytes'] / 1e9:.1f} GB memory, "
        f"{value['memory_available_bytes'] / 1e9:.1f} GB free",
        f"GPU: {'; '.join(gpus) or 'no NVIDIA driver found'}",
    ]
    for name, purpose, extra in DISTRIBUTIONS:
        state = packages[name] or f"missing: pip install 'klein-kv[{extra}]'"
        lines.append(f"  {name:18} {state:40} {purpose}")
    lines.append(
        "ready to run artifacts"
        if value["ready"]
        else "no backend is installed; pip install 'klein-kv[cpu]' is the smallest"
    )
    return value, "\n".join(lines), 0 if value["ready"] else 1
