"""The plan of `klein-kv plan` for people, in at most 100 columns."""

import textwrap
from collections.abc import Iterator

from klein_kv.runtime.planning.edit_plan import EditPlan, Plans
from klein_kv.runtime.planning.latency import Latency
from klein_kv.runtime.planning.memory_plan import RESERVED, MemoryPlan

__all__ = ["text_from_plans"]

_NAMES = {"text_encoder": "text encoder", "transformer": "transformer", "vae": "VAE"}
_COLUMNS = (
    ("text", ("text_encoder",)),
    ("transf.", ("transformer",)),
    ("VAE", ("vae",)),
    ("K/V", ("kv",)),
    ("scratch", ("scratch",)),
    ("in/out", ("activations", "images")),
)


def text_from_plans(plans: Plans) -> str:
    """A line per precision and number of references, the stages of one of them, and the host."""
    request = plans.edits[0].first.request
    lines = [
        f"{plans.gpu.name}, {plans.capacity / 1e9:g} GB, of which {RESERVED / 1e9:.1f} are left "
        f"to CUDA (an estimate)",
        f"{request.width}x{request.height}, batch {request.batch}, {plans.steps} steps; "
        f"K/V {_kv(plans.edits[0])}; GB and seconds; precision: transformer/text encoder",
        "",
        f"{'precision':10} {'refs':>4} {'weights':>7} {'K/V':>5} {'peak':>6} {'first':>6} "
        f"{'again':>6} {'kept':>4}  loaded for each new prompt (again)",
    ]
    for edit in plans.edits:
        lines += _row(edit)
    lines.append("first: a new prompt and new references; again: a new prompt, references known")
    lines.append("kept: sets of four 1024x1024 references whose K/V stay by default")
    shown = _shown(plans)
    lines += ["", f"{_title(shown)}, GB and ms by stage:"]
    lines += _stages("first edit", shown.first, shown.first_time)
    if shown.again is not None and shown.again_time is not None:
        lines += _stages("repeated edit", shown.again, shown.again_time)
    lines.append("totals hold what is left to CUDA; times are a model, not a measurement")
    if any(edit.choices for edit in plans.edits):
        lines += ["", *_choices(plans)]
    lines += ["", f"{'host':44} {'memory':>8} {'disk':>8}  GB"]
    for need in plans.host:
        lines += [
            f"{need.what:44} {_gb(need.memory):>8} {_gb(need.disk, 3):>8}",
            f"  {need.source}",
        ]
    return "\n".join(lines)


def _kv(edit: EditPlan) -> str:
    footprint = edit.first.footprint
    kv = "fp8" if footprint.kv_dtype.startswith("float8") else "16 bits"
    return kv if footprint.attention is None else f"{kv}, attention {footprint.attention}"


def _precision(edit: EditPlan) -> str:
    return f"{edit.first.footprint.precision}/{edit.first.footprint.text_precision}"


def _row(edit: EditPlan) -> Iterator[str]:
    first = edit.first
    yield (
        f"{_precision(edit):10} {len(first.request.references):>4} "
        f"{_gb(sum(first.footprint.weights.values())):>7} {_gb(first.kv_bytes):>5} "
        f"{_gb(first.peak):>6} {_seconds(edit.first_time):>6} {_seconds(edit.again_time):>6} "
        f"{edit.kept_sets:>4}  {_verdict(edit)}"
    )


def _verdict(edit: EditPlan) -> str:
    if not edit.first.fits:
        return "does NOT fit"
    first = _loads(edit.first)
    if edit.again is None:
        return first
    again = _loads(edit.again) if edit.again.fits else "does NOT fit"
    return first if first == again else f"{first} ({again})"


def _loads(plan: MemoryPlan) -> str:
    """What a new prompt loads."""
    return ", ".join(_NAMES[component] for component in plan.loads) or "nothing: all stays"


def _shown(plans: Plans) -> EditPlan:
    """The edit with most references among those of the first precision."""
    precision = plans.edits[0].first.footprint.precision
    same = [edit for edit in plans.edits if edit.first.footprint.precision == precision]
    return max(same, key=lambda edit: len(edit.first.request.references))


def _title(edit: EditPlan) -> str:
    count = len(edit.first.request.references)
    return f"{_precision(edit)}, {count} reference{'s' * (count != 1)}"


def _stages(what: str, plan: MemoryPlan, time: Latency) -> Iterator[str]:
    heads = " ".join(f"{head:>7}" for head, _ in _COLUMNS)
    yield f"{what:13} {heads} {'total':>6} {'loads':>6} {'ms':>8}  source"
    for stage in plan.stages:
        cells = " ".join(
            f"{_gb(sum(stage.parts.get(part, 0) for part in parts)):>7}" for _, parts in _COLUMNS
        )
        took = time.of(stage.name)
        known = took is not None and took.seconds is not None
        ms = f"{took.seconds * 1e3:.1f}" if known and took is not None and took.seconds else "-"
        runs = f"{took.runs}x" if took is not None and took.runs > 1 else ""
        source = took.source if took is not None else ""
        loads = _gb(stage.loads or None)
        yield f"{stage.name:13} {cells} {_gb(stage.total):>6} {loads:>6} {runs + ms:>8}  {source}"
    link = sum(t.seconds or 0 for t in time.stages if t.source == "host link")
    if link:
        yield f"  weights loaded: {link * 1e3:.0f} ms at the peak of the host link"
    yield f"  in all {_seconds(time)} s"
    scratch = sorted({stage.scratch_source for stage in plan.stages})
    yield from _wrapped(f"scratch: {', '.join(scratch)}")


def _choices(plans: Plans) -> Iterator[str]:
    yield "what would fit instead:"
    for edit in plans.edits:
        if not edit.first.fits:
            found = "; ".join(f"{c.text} ({_gb(c.plan.peak)})" for c in edit.choices)
            yield from _wrapped(f"{_title(edit)}: {found or 'nothing that was tried'}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _gb(value: int | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value / 1e9:.{digits}f}"


def _seconds(time: Latency | None) -> str:
    total = None if time is None else time.total
    return "-" if total is None else f"{total:.2f}"
