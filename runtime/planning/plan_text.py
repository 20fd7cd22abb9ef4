"""The plan of `klein-kv plan` for people, in at most 100 columns."""

import textwrap
from collections.abc import Iterator

from klein_kv.runtime.planning.edit_plan import EditPlan, Plans
from klein_kv.runtime.planning.memory_plan import RESERVED, MemoryPlan

__all__ = ["text_from_plans"]

_NAMES = {"text_encoder": "text encoder", "transformer": "transformer", "vae": "VAE"}
_COLUMNS = {
    "text": "text_encoder",
    "transf.": "transformer",
    "VAE": "vae",
    "K/V": "kv",
    "scratch": "scratch",
    "in/out": "activations",
}


def text_from_plans(plans: Plans) -> str:
    """A line per precision and number of references, the stages of one of them, and the host."""
    first = plans.edits[0].first
    request, footprint = first.request, first.footprint
    kv = "fp8" if footprint.float8_kv else "16 bits"
    if footprint.graphs.attention is not None:
        kv += f", attention {footprint.graphs.attention}"
    lines = [
        f"{plans.gpu}, {plans.capacity / 1e9:g} GB, of which {RESERVED / 1e9:.1f} are left "
        f"to CUDA (an estimate)",
        f"{request.width}x{request.height}, batch {request.batch}; K/V {kv}; GB; precision: "
        "transformer/text encoder",
        "",
        f"{'precision':10} {'refs':>4} {'weights':>7} {'K/V':>5} {'peak':>6} {'kept':>4}  "
        "loaded for each new prompt (where references are known)",
        *(_row(edit) for edit in plans.edits),
        "kept: sets of four 1024x1024 references whose K/V stay by default",
    ]
    # The most references of the first precision.
    same = [edit for edit in plans.edits if _precision(edit) == _precision(plans.edits[0])]
    shown = max(same, key=lambda edit: len(edit.first.request.references))
    lines += ["", f"{_title(shown)}, GB by stage, with what is left to CUDA:"]
    lines += _stages("first edit", shown.first)
    if shown.again is not None:
        lines += _stages("repeated edit", shown.again)
    refused = [edit for edit in plans.edits if not edit.first.fits]
    if refused:
        lines += ["", "what would fit instead:"]
    for edit in refused:
        choices = "; ".join(f"{x.text} ({_gb(x.plan.peak)})" for x in edit.choices)
        lines += _wrapped(f"{_title(edit)}: {choices or 'nothing that was tried'}")
    if plans.engines:
        lines += ["", "engines:", *(line for text in plans.engines for line in _wrapped(text))]
        if others := [_title(edit) for edit in plans.edits if _is_estimated(edit)]:
            lines += _wrapped(f"not all in engines, scratch is estimated: {'; '.join(others)}")
    lines += ["", f"{'host':34} {'memory':>8}  GB"]
    lines += [f"{what:34} {_gb(nbytes):>8}" for what, nbytes in plans.host.items()]
    return "\n".join(lines)


def _precision(edit: EditPlan) -> str:
    return "{transformer}/{text_encoder}".format(**edit.first.footprint.precisions)


def _title(edit: EditPlan) -> str:
    count = len(edit.first.request.references)
    return f"{_precision(edit)}, {count} reference{'s' * (count != 1)}"


def _row(edit: EditPlan) -> str:
    first, loads = edit.first, _loads(edit.first)
    if first.fits and edit.again is not None and (again := _loads(edit.again)) != loads:
        loads += f" ({again})"
    return (
        f"{_precision(edit):10} {len(first.request.references):>4} "
        f"{_gb(sum(first.footprint.weights.values())):>7} {_gb(first.kv_bytes):>5} "
        f"{_gb(first.peak):>6} {edit.kept_sets:>4}  {loads}"
    )


def _is_estimated(edit: EditPlan) -> bool:
    return any(stage.scratch_source == "estimated" for stage in edit.first.stages)


def _loads(plan: MemoryPlan) -> str:
    """What a new prompt loads."""
    if not plan.fits:
        return "does NOT fit"
    return ", ".join(_NAMES[component] for component in plan.loads) or "nothing: all stays"


def _stages(what: str, plan: MemoryPlan) -> Iterator[str]:
    heads = " ".join(f"{head:>7}" for head in _COLUMNS)
    yield f"{what:13} {heads} {'total':>6} {'loads':>6}"
    for stage in plan.stages:
        cells = " ".join(f"{_gb(stage.parts.get(part, 0)):>7}" for part in _COLUMNS.values())
        yield f"{stage.name:13} {cells} {_gb(stage.total):>6} {_gb(stage.loads or None):>6}"
    sources = sorted({stage.scratch_source for stage in plan.stages})
    yield from _wrapped(f"scratch: {', '.join(sources)}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _gb(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"
