"""Results of `edit.py` and `build.py` as Markdown tables, and a plot of where edits spend time.

    python benchmarks/edit.py > edit.txt
    python benchmarks/table.py edit.txt more.json ... [--plot FILE.png]

A file is a result's JSON document, or all that the script printed. Plots need matplotlib (the extra
`bench`). Tables go to stdout.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STAGES = {  # and their colours
    "text": "#d08b2c",
    "vae_encode": "#b3483d",
    "first_step": "#1f4e79",
    "later_steps": "#5b9bd5",
    "vae_decode": "#3d9a50",
    "rest": "#b8bcc4",
}
PLAN = ("seconds", "ideal_seconds", "ratio", "kernels", "scratch_bytes")


def load(path: Path) -> dict[str, Any]:
    """A result: the last line of a file. Raises a ValueError where that is none."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path} holds no JSON document in its last line: {error}") from error
    if not isinstance(document, dict) or document.get("benchmark") not in ("edit", "build"):
        raise ValueError(f"{path} holds {document!r:.60}, expected what edit.py or build.py wrote")
    return document


def markdown(documents: Sequence[dict[str, Any]]) -> str:
    """A section for every result."""
    sections = {"edit": edit_section, "build": build_section}
    return "\n\n".join(sections[document["benchmark"]](document) for document in documents)


def edit_section(document: dict[str, Any]) -> str:
    machine, options, speed = (document[key] for key in ("machine", "options", "matrix_speed"))
    rows = []
    for name, edit in document["edits"].items():
        row = [name, by(edit), spread(edit["median_seconds"], edit["seconds"])]
        row += [f"{seconds:.2f}" for seconds in edit["stages"].values()]
        rate, share = edit["operations_per_second"] / 1e9, edit["share_of_matrix_speed"]
        memory = [edit[f"peak_{place}_bytes"] for place in ("host", "device")]
        row += [f"{rate:.0f} ({share:.0%})", *(f"{x / 1e9:.2f}" if x else "" for x in memory)]
        rows.append(row)
    names = [stage.replace("_", " ") for stage in STAGES]
    rates = listed({name: f"{rate / 1e9:.0f}" for name, rate in speed.items()})
    pairs = [
        (pair, spread(x["median"], (x["min"], x["max"])), f"{x['operations']:.2f}")
        for pair, x in document["ratios"].items()
    ]
    parts = [
        f"    {document['command']}",
        f"{machine['name']}, {options['threads']} threads, load {machine['load']:.1f} "
        f"before; matrix products: {rates} GFLOP/s. {options['output']} pixels square, "
        f"{options['references']} references of {options['reference_size']}, {options['steps']} "
        f"steps; median and range of {options['rounds']} rounds. {listed(document['versions'])}.",
        table(("edit", "by", "seconds", *names, "GFLOP/s (share)", "GB host", "device"), rows),
        table(("ratio", "of seconds", "of operations"), pairs),
        f"Largest difference of pixels: {listed(document['largest_pixel_difference'])} (of 255).",
    ]
    return "\n\n".join(parts if pairs else parts[:3])


def build_section(document: dict[str, Any]) -> str:
    rows = [
        (recipe, graph, *("-" if plan[key] is None else f"{plan[key]:.4g}" for key in PLAN))
        for recipe, build in document["build"].items()
        for graph, plan in build["plans"].items()
    ]
    return (
        f"Kernel plans at size {document['size']}, a model and no measurement: each kernel that "
        "TensorRT chose is priced at the GPU's peak throughput or bandwidth.\n\n"
        + table(("recipe", "graph", *PLAN), rows)
    )


def by(edit: dict[str, Any]) -> str:
    return f"{edit['backend']} {edit['dtype']}"


def spread(median: float, values: Sequence[float]) -> str:
    return f"{median:.2f} ({min(values):.2f} to {max(values):.2f})"


def listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, to be read as it is."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def plot(documents: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for every result of `edit.py`: a bar for every edit, cut into its stages."""
    from matplotlib.figure import Figure

    height = 1.3 + 0.45 * max(len(document["edits"]) for document in documents)
    figure = Figure((9, height * len(documents)), layout="constrained")
    axes = figure.subplots(len(documents), squeeze=False).flat
    for axis, document in zip(axes, documents, strict=True):
        edits, left = document["edits"], [0.0] * len(document["edits"])
        for stage, colour in STAGES.items():
            widths = [edit["stages"][stage] for edit in edits.values()]
            axis.barh(list(edits), widths, left=left, color=colour, label=stage)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("seconds")
        axis.set_title(f"{document['machine']['name']}: {document['command']}", fontsize=8)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG, SVG or PDF to write")
    args = parser.parse_args()
    try:
        documents = [load(path) for path in args.results]
    except ValueError as error:
        sys.exit(f"table.py: {error}")
    print(markdown(documents))
    edits = [document for document in documents if document["benchmark"] == "edit"]
    if args.plot and edits:
        plot(edits, args.plot)


if __name__ == "__main__":
    main()
