"""What a folder of engines holds, and what its kernel plans cost: `klein-kv inspect`."""

import os
from pathlib import Path
from typing import Any

from klein_kv.artifacts.engine_manifest import EngineManifest, write_atomic
from klein_kv.artifacts.targets import Gpu, find_target
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.plan.plan_cost import PlanCost, price_plan
from klein_kv.engines.plan.plan_report import html_from_costs, text_from_cost
from klein_kv.errors import RequestError

__all__ = ["inspect_engines", "price_engines"]


def inspect_engines(
    folder: Path, gpu: str | None = None, page: Path | None = None, compare: Path | None = None
) -> tuple[dict[str, Any], str]:
    """Describes engines and prices their kernel plans.

    Args:
        folder: with `engine.json`; every engine file is checked against it.
        gpu: price for this GPU; None takes the one the engines were built for.
        page: write one self-contained HTML page here.
        compare: a second folder of engines to set beside the first on the page.

    Returns:
        The description as plain values, and as a text. Plan times are a model, not measured.

    Raises:
        ArtifactError: engines or plans are not what the manifest says.
        RequestError: no figures for that GPU.
    """
    manifest = EngineManifest.load(folder)
    lines = [manifest.title]
    engines: dict[str, Any] = {}
    for graph, record in manifest.engines.items():
        manifest.read_engine(folder, graph)  # refuses a changed file
        engines[graph] = {
            "file": record.file,
            "bytes": record.bytes,
            "sha256": record.sha256,
            "scratch_bytes": record.scratch_bytes,
            "build_seconds": record.seconds,
            "weights": len(record.weights),
            "profiles": [profile.symbols for profile in record.profiles],
        }
        lines.append(
            f"{graph:18} {record.bytes / 1e6:8.2f} MB, "
            f"{record.scratch_bytes / 1e9:.2f} GB scratch, built in {record.seconds:.1f} s, "
            f"{len(record.profiles)} profiles"
        )
    costs, unpriced = price_engines(folder, manifest, gpu)
    lines += [text_from_cost(cost) for cost in costs]
    lines += [f"{graph}: {reason}" for graph, reason in unpriced.items()]
    if page is not None:
        others: list[PlanCost] = []
        if compare is not None:
            others, _ = price_engines(compare, EngineManifest.load(compare), gpu)
        _write_page(page, html_from_costs(costs, others))
        lines.append(str(page))
    value = {
        "engines_of": manifest.title,
        "target": manifest.target,
        "precision": manifest.precision,
        "weights": manifest.weights,
        "engines": engines,
        "plans": [cost.to_dict() for cost in costs],
        "unpriced": unpriced,
    }
    return value, "\n".join(lines)


def price_engines(
    folder: Path, manifest: EngineManifest, gpu: str | None = None
) -> tuple[list[PlanCost], dict[str, str]]:
    """Prices every kernel plan of a folder.

    Returns:
        The priced plans; and by graph the reason why another one has no price (dynamic shapes).

    Raises:
        ArtifactError: a plan is missing or damaged.
        RequestError: no figures for that GPU.
    """
    figures = _figures(gpu or manifest.target)
    costs, unpriced = [], {}
    for graph, record in manifest.engines.items():
        plan = KernelPlan.load(folder / record.layers)
        if plan.known:
            costs.append(price_plan(plan, figures))
        else:
            unpriced[graph] = "no price: its shapes are dynamic (build a recipe of one shape)"
    return costs, unpriced


def _figures(name: str) -> Gpu:
    target = find_target(name)
    if target.gpu is None:
        raise RequestError(
            f"no figures are known for {target.name}; name another GPU with --gpu, e.g. rtx5090"
        )
    return target.gpu


def _write_page(path: Path, text: str) -> None:
    if not path.absolute().parent.is_dir():
        raise RequestError(f"folder {path.absolute().parent} does not exist; make it first")
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise RequestError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error
