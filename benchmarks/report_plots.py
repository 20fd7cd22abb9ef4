"""Plots of `gpu_suite.py`'s results as PNG; matplotlib is loaded only here, and may be missing."""

import io
import logging
from typing import Any

from report_tables import cell_name, in_order

__all__ = ["plots"]

_log = logging.getLogger(__name__)
_COLOURS = {"diffusers": "#8a8f98", "ours": "#2f6f9f", "ours_hit": "#3d9a50"}
_KINDS = {
    "matmul": "#2f6f9f",
    "attention": "#3d9a50",
    "compiled": "#d08b2c",
    "copy": "#b3483d",
    "other": "#8a8f98",
}


def plots(documents: list[dict[str, Any]]) -> dict[str, bytes]:
    """PNG images by name; none, and a warning, where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        _log.warning("no plots: matplotlib is not installed; pip install 'klein-kv[bench]'")
        return {}
    mpl.use("agg")
    images: dict[str, bytes] = {}
    for i, document in enumerate(documents):
        suffix = f"-{i + 1}" if len(documents) > 1 else ""
        title = f"{document['device']['name']}, size {document['size']}"
        for name, draw in (
            ("seconds", _seconds), ("ratios", _ratios), ("memory", _memory), ("kernels", _kernels),
        ):  # fmt: skip
            image = draw(document, title)
            if image is not None:
                images[f"{name}{suffix}"] = image
    return images


def _measured(document: dict[str, Any]) -> list[dict[str, Any]]:
    cells = [
        cell
        for cell in document.get("cells", [])
        if any("seconds" in run for run in cell["runs"].values())
    ]
    return sorted(cells, key=lambda cell: (-cell["output"], -cell["references"]))


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return out.getvalue()


def _colour(name: str) -> str:
    for prefix in ("ours_hit", "ours", "diffusers"):
        if name.startswith(prefix):
            return _COLOURS[prefix]
    return "black"


def _grid(count: int, title: str) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot as plt

    columns = min(count, 4)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def _seconds(document: dict[str, Any], title: str) -> bytes | None:
    """Medians with their quartiles, a panel per cell."""
    cells = _measured(document)
    if not cells:
        return None
    figure, axes = _grid(len(cells), f"{title}: seconds per request, denoising steps only")
    for axis, cell in zip(axes, cells, strict=True):
        named = {name: run["seconds"] for name, run in cell["runs"].items() if "seconds" in run}
        runs = {name: named[name] for name in in_order(named)}
        medians = [value["median"] for value in runs.values()]
        errors = [
            [value["median"] - value["q1"] for value in runs.values()],
            [value["q3"] - value["median"] for value in runs.values()],
        ]
        bars = axis.barh(
            list(runs), medians, xerr=errors, color=[_colour(name) for name in runs], height=0.7
        )
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.margins(x=0.18)
        axis.locator_params(axis="x", nbins=5)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.set_title(cell_name(cell), fontsize=10)
    return _png(figure)


def _ratios(document: dict[str, Any], title: str) -> bytes | None:
    """Measured ratios against those of the operations; the line is where both are equal."""
    points = [
        (ratio["expected_by_flops"], ratio["measured"]["median"], ratio["slow"], ratio["fast"])
        for cell in _measured(document)
        for ratio in cell.get("ratios", [])
    ]
    if not points:
        return None
    figure, (axis,) = _grid(1, f"{title}: measured ratios against operations")
    for start, label in (("ours_hit", "a hit"), ("ours", "ours"), ("diffusers", "diffusers alone")):
        mine = [p for p in points if _colour(p[3]) == _COLOURS[start]]
        axis.scatter(
            [p[0] for p in mine], [p[1] for p in mine], s=22, color=_COLOURS[start], label=label
        )
    most = 1.1 * max(max(p[0], p[1]) for p in points)
    axis.plot([0, most], [0, most], color="black", linewidth=0.8)
    axis.set_xlabel("ratio of the operations")
    axis.set_ylabel("ratio of the seconds")
    axis.legend(fontsize=8)
    return _png(figure)


def _memory(document: dict[str, Any], title: str) -> bytes | None:
    """Weights, what is held and what a request takes, in the cell with the most."""
    cells = [
        cell
        for cell in _measured(document)
        if any(run.get("memory") for run in cell["runs"].values())
    ]
    if not cells:
        return None
    figure, axes = _grid(len(cells), f"{title}: device memory, GB")
    for axis, cell in zip(axes, cells, strict=True):
        named = {name: run["memory"] for name, run in cell["runs"].items() if run.get("memory")}
        runs = {name: named[name] for name in in_order(named)}
        left = [0.0] * len(runs)
        for part, shade in (("weights", 0.45), ("held", 0.75), ("transient", 1.0)):
            widths = [memory[f"{part}_bytes"] / 1e9 for memory in runs.values()]
            axis.barh(
                list(runs), widths, left=left, color=[_colour(name) for name in runs],
                alpha=shade, height=0.7, label=part,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.set_title(f"{cell_name(cell)}: weights, held, transient", fontsize=10)
    return _png(figure)


def _kernels(document: dict[str, Any], title: str) -> bytes | None:
    """Where the time of a request goes."""
    contenders = document.get("profile", {}).get("contenders", {})
    if not contenders:
        return None
    figure, (axis,) = _grid(1, f"{title}: seconds by kind of kernel")
    left = [0.0] * len(contenders)
    for kind, colour in _KINDS.items():
        widths = [entry["seconds"].get(kind, 0.0) for entry in contenders.values()]
        axis.barh(list(contenders), widths, left=left, color=colour, height=0.6, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.legend(fontsize=8)
    axis.tick_params(labelsize=8)
    return _png(figure)
