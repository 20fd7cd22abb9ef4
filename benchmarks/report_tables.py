"""What result files say, as tables: measured numbers, and apart from them the kernel-plan model."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Section",
    "Table",
    "cell_name",
    "in_order",
    "markdown",
    "measured_section",
    "model_section",
]

Row = tuple[str, ...]

_FAMILIES = ("diffusers_plain", "diffusers_kv", "ours_hit", "ours")
_MODES = ("eager", "compiled", "graphs")


@dataclass(frozen=True, slots=True)
class Table:
    """One table with a heading, and a sentence that says what its numbers are."""

    title: str
    note: str
    header: Row
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Section:
    """The tables of one result file.

    Attributes:
        title: what it is the result of.
        text: machine, command and date.
        tables: those that have rows.
        missing: what was not measured, and why.
    """

    title: str
    text: list[str]
    tables: list[Table]
    missing: list[str] = field(default_factory=list)


def measured_section(document: dict[str, Any]) -> Section:
    """The tables of a result of `gpu_suite.py`."""
    device, versions = document["device"], document["versions"]
    gpu = device["kind"] == "cuda"
    title = (
        f"{device['name']}, size {document['size']}"
        if gpu
        else f"Check of the suite on a CPU, size {document['size']}: nothing about a GPU"
    )
    known = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    machine = f"Machine: {device['name']}"
    if gpu:
        machine += f", {device['memory_bytes'] / 2**30:.0f} GiB, driver {device['driver']}"
    peak = document.get("matmul_peak")
    rate = f" Large bf16 matrix products: {peak['tflops_per_second']:.4g} TFLOP/s." if peak else ""
    text = [
        f"    {' '.join(document['command'])}",
        f"{machine}; {known}; {document['date'][:10]}; commit {document['commit'] or 'unknown'}."
        f"{rate} Took {document['elapsed_seconds']:.0f} s.",
    ]
    tables = [
        _targets(document),
        *_seconds(document),
        *_ratios(document),
        *_shares(document),
        *_steps(document),
        *_encoding(document),
        *_memory(document),
        _parity(document),
        _stages(document),
        _parts(document),
        _attention(document),
        _profile(document),
    ]
    missing = [f"{entry['what']}: {entry['reason']}" for entry in document.get("missing", [])]
    return Section(title, text, [table for table in tables if table.rows], missing)


def model_section(document: dict[str, Any]) -> Section:
    """The plans in a result of `build.py`, which are a model."""
    rows = [
        (
            recipe,
            graph,
            f"{1e3 * plan['seconds']:.1f}",
            f"{1e3 * plan['ideal_seconds']:.1f}",
            f"{plan['ratio']:.3f}",
            str(plan["kernels"]),
            f"{plan['scratch_bytes'] / 1e9:.2f}",
        )
        for recipe, build in document["build"].items()
        for graph, plan in build["plans"].items()
    ]
    table = Table(
        "Milliseconds by the kernel plans",
        "A model, not a measurement: kernels that TensorRT-RTX chose, each priced at peak "
        "throughput or bandwidth.",
        ("recipe", "graph", "plan, ms", "ideal, ms", "plan / ideal", "kernels", "scratch, GB"),
        rows,
    )
    return Section("Model of an RTX 5090, nothing measured", [], [table] if rows else [])


def markdown(sections: Iterable[Section]) -> str:
    """Sections as Markdown, below a heading of the second level."""
    lines: list[str] = []
    for section in sections:
        lines += [f"### {section.title}", ""]
        for text in section.text:
            lines += [text, ""]
        for table in section.tables:
            lines += [f"#### {table.title}", "", table.note, ""]
            lines.append(_line(table.header))
            lines.append("|" + "---|" * len(table.header))
            lines += [*(_line(row) for row in table.rows), ""]
        if section.missing:
            lines += ["Missing:", "", *(f"- {entry}" for entry in section.missing), ""]
    return "\n".join(lines)


def cell_name(cell: dict[str, Any]) -> str:
    """ "1024x1024, 4 references"."""
    side, count = cell["output"], cell["references"]
    return f"{side}x{side}, {count} reference{'' if count == 1 else 's'}"


def _line(cells: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def in_order(names: Iterable[str]) -> list[str]:
    """Contenders from diffusers' plain pipeline to our hits, and from eager on."""

    def place(name: str) -> tuple[int, int]:
        family = next((f for f in _FAMILIES if name.startswith(f)), _FAMILIES[-1])
        mode = name.rpartition("_")[2]
        order = ("diffusers_plain", "diffusers_kv", "ours", "ours_hit")
        return order.index(family), _MODES.index(mode) if mode in _MODES else len(_MODES)

    return sorted(names, key=place)


def _cells(document: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Cells by output, largest first, most references first."""
    cells = sorted(document.get("cells", []), key=lambda cell: -cell["references"])
    outputs = sorted({cell["output"] for cell in cells}, reverse=True)
    return {output: [cell for cell in cells if cell["output"] == output] for output in outputs}


def _runs(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: run for name, run in cell["runs"].items() if "seconds" in run}


def _by_cell(
    document: dict[str, Any],
    title: str,
    note: str,
    value: Callable[[dict[str, Any]], str | None],
) -> list[Table]:
    """A table per output: one row per contender, one column per number of references."""
    tables = []
    for output, cells in _cells(document).items():
        rows = []
        for name in in_order({name for cell in cells for name in _runs(cell)}):
            found = [_runs(cell).get(name) for cell in cells]
            values = [None if run is None else value(run) for run in found]
            if any(text is not None for text in values):
                rows.append((name, *(text or "" for text in values)))
        tables.append(Table(f"{title}, {output}x{output}", note, _header("", cells), rows))
    return tables


def _header(first: str, cells: list[dict[str, Any]]) -> Row:
    return (first, *(cell_name(cell).partition(", ")[2] for cell in cells))


def _targets(document: dict[str, Any]) -> Table:
    said = {True: "yes", False: "no", None: "not measured"}
    rows = [
        (
            entry["what"],
            f"{entry['at'][0]}x{entry['at'][0]}, {entry['at'][1]}",
            entry["required"],
            "" if entry["measured"] is None else f"{entry['measured']:.4g}",
            "" if entry["expected_by_flops"] is None else f"{entry['expected_by_flops']:.2f}",
            said[entry["reached"]],
        )
        for entry in document.get("targets", [])
    ]
    note = "Medians; the column FLOPs is what the operations alone would give."
    header = ("what", "output, references", "required", "measured", "FLOPs", "reached")
    return Table("Targets", note, header, rows)


def _seconds(document: dict[str, Any]) -> list[Table]:
    def value(run: dict[str, Any]) -> str:
        seconds = run["seconds"]
        digits = 3 if seconds["median"] > 0.05 else 5
        median, low, high, least = (
            f"{seconds[key]:.{digits}f}" for key in ("median", "q1", "q3", "min")
        )
        return f"{median} ({low} to {high}; {least})"

    note = "All denoising steps on the device: median (quartiles; smallest)."
    return _by_cell(document, "Seconds per request", note, value)


def _ratios(document: dict[str, Any]) -> list[Table]:
    note = "Seconds over seconds, medians of the rounds; in brackets the ratio of the operations."
    tables = []
    for output, cells in _cells(document).items():
        found = [{(r["slow"], r["fast"]): r for r in cell.get("ratios", [])} for cell in cells]
        rows = []
        for pair in dict.fromkeys(pair for ratios in found for pair in ratios):
            entries = [ratios.get(pair) for ratios in found]
            values = [
                f"{entry['measured']['median']:.2f} [{entry['expected_by_flops']:.2f}]"
                if entry
                else ""
                for entry in entries
            ]
            rows.append((" / ".join(pair), *values))
        tables.append(Table(f"Ratios, {output}x{output}", note, _header("", cells), rows))
    return tables


def _shares(document: dict[str, Any]) -> list[Table]:
    def value(run: dict[str, Any]) -> str | None:
        share = run.get("peak_fraction")
        return f"{run['tflops_per_second']:.4g} ({share:.0%})" if share else None

    note = "TFLOP/s over the whole loop, and the share of the matrix products' rate above."
    return _by_cell(document, "Operations per second", note, value)


def _steps(document: dict[str, Any]) -> list[Table]:
    def value(run: dict[str, Any]) -> str:
        first, *later = run["step_seconds"]
        return f"{1e3 * first:.1f} / {1e3 * statistics.median(later):.1f}"

    note = "First step / the median of the later ones."
    return _by_cell(document, "Milliseconds per step", note, value)


def _encoding(document: dict[str, Any]) -> list[Table]:
    def value(run: dict[str, Any]) -> str | None:
        seconds = run.get("encode_references_seconds")
        return None if seconds is None else f"{1e3 * seconds:.1f}"

    note = "What a request with known references has behind it; one sample."
    return _by_cell(document, "Milliseconds of encode_references", note, value)


def _memory(document: dict[str, Any]) -> list[Table]:
    def value(run: dict[str, Any]) -> str | None:
        memory = run.get("memory")
        if not memory:
            return None
        parts = " + ".join(
            f"{memory[f'{part}_bytes'] / 1e9:.1f}" for part in ("weights", "held", "transient")
        )
        return f"{memory['total_bytes'] / 1e9:.1f} = {parts}"

    note = "The transformer's weights + what is held between requests + the most taken during one."
    return _by_cell(document, "Device memory in GB", note, value)


def _parity(document: dict[str, Any]) -> Table:
    rows = []
    for parity in document.get("parity", []):
        for name in in_order(parity["contenders"]):
            entry = parity["contenders"][name]
            distance = entry.get("distance_from_kv", entry.get("distance_from_plain"))
            rounded = entry.get("distance_from_kv_bf16_timesteps")
            if distance is None and rounded is None:
                continue
            rows.append(
                (
                    cell_name(parity),
                    name,
                    "" if distance is None else f"{distance:.4g}",
                    f"{entry['ratio_kv']:.3f}" if "ratio_kv" in entry else "",
                    "" if rounded is None else f"{rounded:.4g}",
                    f"{entry['ratio_kv_bf16_timesteps']:.3f}"
                    if "ratio_kv_bf16_timesteps" in entry
                    else "",
                )
            )
        ours = parity.get("ours_float32_against_diffusers_float32")
        if ours:
            value = f"{ours['relative_distance']:.3g}"
            rows.append((cell_name(parity), "ours in float32", value, "", "", ""))
    return Table(
        "Parity",
        "Relative distance of the final bf16 latents from a float32 run of diffusers with the same "
        "weights, and its ratio to that of diffusers' eager KV pipeline; then both against a "
        "float32 run with the timesteps that bf16 rounds to.",
        ("cell", "latents of", "distance", "ratio", "same timesteps", "ratio"),
        rows,
    )


def _stages(document: dict[str, Any]) -> Table:
    rows = [
        (
            name,
            f"{1e3 * stage['seconds']['median']:.2f}",
            "" if stage["peak_bytes"] is None else f"{stage['peak_bytes'] / 1e9:.2f}",
        )
        for name, stage in document.get("stages", {}).items()
    ]
    note = "Eager; the side of the image is in the name."
    return Table("VAE", note, ("stage", "ms", "memory taken, GB"), rows)


def _parts(document: dict[str, Any]) -> Table:
    rows = []
    for step in document.get("parts", []):
        for kind in ("linear", "attention"):
            rows.append(
                (
                    step["graph"],
                    kind,
                    f"{1e3 * step[f'{kind}_seconds']:.1f}",
                    f"{step[f'{kind}_tflops_per_second']:.4g}",
                )
            )
    note = "Matrix products and attention of one step of the first cell, each kernel timed alone."
    return Table("Parts of a step", note, ("graph", "part", "ms", "TFLOP/s"), rows)


def _attention(document: dict[str, Any]) -> Table:
    rows = [
        (
            row["backend"],
            f"{1e3 * row['seconds']:.3f}" if "seconds" in row else "not available",
            f"{row['tflops_per_second']:.4g}" if "seconds" in row else "",
        )
        for row in document.get("attention", [])
    ]
    note = "One attention of a cached step of the first cell, with each of torch's kernels."
    return Table("Attention", note, ("backend", "ms", "TFLOP/s"), rows)


def _profile(document: dict[str, Any]) -> Table:
    contenders = document.get("profile", {}).get("contenders", {})
    kinds = dict.fromkeys(kind for entry in contenders.values() for kind in entry["seconds"])
    rows = [
        (name, *(f"{1e3 * entry['seconds'].get(kind, 0.0):.1f}" for kind in kinds))
        for name, entry in contenders.items()
    ]
    note = "Milliseconds of a whole request of the first cell by kind of kernel, from a profiler."
    return Table("Kernels", note, ("contender", *kinds), rows)
