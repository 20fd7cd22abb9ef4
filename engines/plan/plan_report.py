"""Kernel plans for people: a table, and a page with bars per block and a comparison of builds."""

import html
from collections.abc import Sequence

from klein_kv.engines.plan.plan_cost import MODEL_NOTE, PlanCost

__all__ = ["html_from_costs", "text_from_cost"]

_BAR_WIDTH = 620
_ROW = 17
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color: #1d2127; background: #fff; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid #dde1e6; }
td.name, th.name { text-align: left; font-family: ui-monospace, monospace; font-size: 12px;
       max-width: 34rem; overflow-wrap: anywhere; }
.note { background: #fff6d6; padding: .5rem .8rem; border-left: 3px solid #c79a00; }
.legend span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
svg text { font: 11px system-ui, sans-serif; fill: #1d2127; }
"""
_IDEAL, _OTHER = "#4c78a8", "#e08a3c"


def text_from_cost(cost: PlanCost, largest: int = 12) -> str:
    """A table of one plan.

    Args:
        cost: the priced plan.
        largest: how many of the largest costs beyond necessary arithmetic to list.
    """
    lines = [f"{cost.graph}: {cost.engine}, priced for {cost.gpu}: {MODEL_NOTE}"]
    lines += [f"  {label:<24} {value}" for label, value in _summary(cost)]
    lines.append("  largest costs beyond necessary arithmetic:")
    lines.append(f"  {'ms':>9} {'share':>6} {'times':>6}  kernel")
    for group in cost.groups[:largest]:
        if group.overhead <= 0:
            break
        lines.append(
            f"  {group.overhead * 1e3:9.3f} {group.overhead / cost.seconds:6.2%} {group.count:6d}  "
            f"{_short(group.operation)}  {group.shapes}"
        )
    return "\n".join(lines)


def html_from_costs(costs: Sequence[PlanCost], other: Sequence[PlanCost] = ()) -> str:
    """One self-contained page, no scripts and nothing loaded from elsewhere.

    Args:
        costs: plans of one build.
        other: plans of a second build to compare with; graphs are matched by name.
    """
    body = ["<h1>Kernel plans</h1>", f"<p class='note'>Times are a {MODEL_NOTE}.</p>"]
    if other:
        body.append(_comparison(costs, other))
    partner = {cost.graph: cost for cost in other}
    for cost in costs:
        body.append(_section(cost))
        if cost.graph in partner:
            body.append(_section(partner[cost.graph], "compared with"))
    title = ", ".join(cost.graph for cost in costs)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>Kernel plans: {html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _summary(cost: PlanCost) -> list[tuple[str, str]]:
    return [
        ("plan time", f"{cost.seconds * 1e3:.2f} ms"),
        ("ideal time", f"{cost.ideal_seconds * 1e3:.2f} ms (matrix products and attention only)"),
        ("plan / ideal", f"{cost.ratio:.4f}"),
        ("not necessary arithmetic", f"{cost.other_share:.2%} of the plan time"),
        ("kernels", f"{cost.kernels}, of which {cost.attention_kernels} fused attention"),
        ("products in low precision", _native(cost)),
        ("arithmetic", f"{cost.flops / 1e12:.2f} TFLOP"),
        ("memory traffic", f"{cost.bytes / 1e9:.2f} GB"),
        ("scratch", f"{cost.scratch_bytes / 1e9:.3f} GB"),
        ("weights copied per run", str(len(cost.weight_copies))),
        ("blended modulations", str(len(cost.blended_modulations))),
    ]


def _native(cost: PlanCost) -> str:
    kinds = [f"{count} {kind}" for kind, count in sorted(cost.native_products.items())]
    kinds += [f"{cost.float8_attentions} attention fp8"] if cost.float8_attentions else []
    moves = f"; {cost.block_scale_moves} block scales reordered" if cost.block_scale_moves else ""
    return (", ".join(kinds) or "none") + moves


def _short(name: str, length: int = 60) -> str:
    return name if len(name) <= length else name[: length - 3] + "..."


def _section(cost: PlanCost, prefix: str = "") -> str:
    heading = f"{prefix} {cost.graph}, {cost.engine}, {cost.gpu}".strip()
    rows = "".join(
        f"<tr><td class='name'>{html.escape(label)}</td><td>{html.escape(value)}</td></tr>"
        for label, value in _summary(cost)
    )
    costs = "".join(
        f"<tr><td class='name'>{html.escape(group.operation)}<br>{html.escape(group.shapes)}</td>"
        f"<td>{group.count}</td><td>{group.overhead * 1e3:.3f}</td>"
        f"<td>{group.overhead / cost.seconds:.2%}</td><td>{group.bytes / 1e9:.2f}</td></tr>"
        for group in cost.groups[:20]
        if group.overhead > 0
    )
    return (
        f"<h2>{html.escape(heading)}</h2><table>{rows}</table>{_bars(cost)}"
        "<table><tr><th class='name'>largest costs beyond necessary arithmetic</th><th>times</th>"
        f"<th>ms</th><th>share</th><th>GB</th></tr>{costs}</table>"
    )


def _bars(cost: PlanCost) -> str:
    """Plan time per block: necessary arithmetic, then the rest."""
    scale = _BAR_WIDTH / max((block.seconds for block in cost.blocks), default=1.0)
    left = 190
    rows = []
    for i, block in enumerate(cost.blocks):
        y, ideal = i * _ROW, block.ideal_seconds * scale
        rows.append(
            f"<text x='0' y='{y + 12}'>{html.escape(block.block)}</text>"
            f"<rect x='{left}' y='{y + 2}' width='{ideal:.1f}' height='{_ROW - 4}' "
            f"fill='{_IDEAL}'/>"
            f"<rect x='{left + ideal:.1f}' y='{y + 2}' "
            f"width='{block.seconds * scale - ideal:.1f}' height='{_ROW - 4}' fill='{_OTHER}'/>"
            f"<text x='{left + block.seconds * scale + 6:.1f}' y='{y + 12}'>"
            f"{block.seconds * 1e3:.2f} ms, {block.kernels} kernels</text>"
        )
    width, height = left + _BAR_WIDTH + 150, len(cost.blocks) * _ROW
    return (
        f"<p class='legend'><span style='background:{_IDEAL}'></span>necessary arithmetic"
        f"<span style='background:{_OTHER}'></span>everything else</p>"
        f"<svg viewBox='0 0 {width} {height}' width='100%' role='img' "
        f"aria-label='plan time per block'>{''.join(rows)}</svg>"
    )


def _comparison(costs: Sequence[PlanCost], other: Sequence[PlanCost]) -> str:
    partner = {cost.graph: cost for cost in other}
    rows = []
    for cost in costs:
        if (second := partner.get(cost.graph)) is None:
            continue
        for label, a, b in (
            ("plan ms", cost.seconds * 1e3, second.seconds * 1e3),
            ("plan / ideal", cost.ratio, second.ratio),
            ("kernels", float(cost.kernels), float(second.kernels)),
            ("traffic GB", cost.bytes / 1e9, second.bytes / 1e9),
            ("scratch GB", cost.scratch_bytes / 1e9, second.scratch_bytes / 1e9),
        ):
            change = f"{a / b - 1:+.2%}" if b else ""
            rows.append(
                f"<tr><td class='name'>{html.escape(cost.graph)}: {label}</td><td>{a:.4g}</td>"
                f"<td>{b:.4g}</td><td>{change}</td></tr>"
            )
    names = [group[0].engine if group else "" for group in (costs, other)]
    return (
        f"<h2>Comparison</h2><table><tr><th class='name'></th><th>{html.escape(names[0])}</th>"
        f"<th>{html.escape(names[1])}</th><th>change</th></tr>{''.join(rows)}</table>"
    )
