"""How far each contender's latents are from the same weights in float32 arithmetic."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_cells import CellRunner, attempt, family_flops, relative_distance
from gpu_contenders import Contender, Diffusers, ours_contenders
from gpu_models import Scene

from klein_kv.schedule import make_schedule

__all__ = ["PARITY_RUNS", "measure_parity"]

# Float32 runs, and the family of each.
PARITY_RUNS = (
    ("kv", "diffusers_kv"),
    ("kv_bf16_timesteps", "diffusers_kv"),
    ("ours", "kv"),
    ("plain", "plain"),
)

JUDGE = "diffusers_kv_eager"
# What float32 without TF32 reaches at least, for the estimate of whether there is time.
FLOAT32_FLOPS_PER_SECOND = {"cuda": 25e12, "cpu": 1e9}


def measure_parity(
    cells: CellRunner,
    state: dict[str, torch.Tensor],
    output: int,
    references: int,
    names: Sequence[tuple[str, str]],
) -> None:
    """Compares the latents of a measured cell with float32 runs; adds the result to the document.

    Three float32 runs of diffusers: its KV pipeline as it is; the same with the timesteps that
    bfloat16 rounds to, which leaves rounding inside the transformer as the only difference; and
    its plain pipeline. And one of ours, which must agree with diffusers to float32's own rounding.

    Args:
        cells: what was measured.
        state: the denoiser's weights in float32.
        output: side of the cell's output in pixels.
        references: the cell's number of references.
        names: which float32 runs, of `PARITY_RUNS`.
    """
    label = f"parity at {output}x{output}, {references} references"
    found = cells.latents.get((output, references), {})
    if not found:
        cells.record.miss(label, "the cell was not measured")
        return
    networks, record = cells.networks, cells.record
    scene = cells.scene(output, references)
    flops = family_flops(networks.config.transformer, scene.sizes, cells.steps)
    rate = FLOAT32_FLOPS_PER_SECOND[networks.device.type]
    clock = cells.contenders[0].clock

    def theirs(kind: str, rounded: bool = False) -> Diffusers:
        transformer = networks.transformer(state)
        timesteps = _bfloat16_timesteps(cells, scene) if rounded else None
        return Diffusers.make(f"{kind}_fp32", kind, transformer, networks.vae, clock, timesteps)

    make: dict[str, Callable[[], Contender]] = {
        "kv": lambda: theirs("kv"),
        "kv_bf16_timesteps": lambda: theirs("kv", rounded=True),
        "ours": lambda: ours_contenders(networks, clock, state, "eager")[0],
        "plain": lambda: theirs("plain"),
    }
    exact: dict[str, torch.Tensor] = {}
    for name, family in names:
        what = f"{label}: float32 run {name}"
        if record.left < flops[family] / rate:
            record.miss(what, "no time left")
            continue
        latents = attempt(record, what, lambda name=name: _run(make[name](), scene, cells.steps))
        if latents is not None:
            exact[name] = latents
            record.say(f"  {what}")
    record.document.setdefault("parity", []).append(
        {
            "output": output,
            "references": references,
            "judge": JUDGE,
            "contenders": _distances(found, exact),
            "ours_float32_against_diffusers_float32": _difference(exact),
        }
    )
    record.save()


def _run(contender: Contender, scene: Scene, steps: int) -> torch.Tensor:
    contender.run(scene, steps)
    assert contender.latents is not None
    latents = contender.latents.cpu()
    contender.release()
    return latents


def _bfloat16_timesteps(cells: CellRunner, scene: Scene) -> Callable[[torch.Tensor], torch.Tensor]:
    """Replaces timesteps by those that the transformer sees in bfloat16."""
    scheduler: Any = next(c.pipe for c in cells.contenders if isinstance(c, Diffusers)).scheduler
    schedule = make_schedule(dict(scheduler.config), cells.steps, scene.sizes["image_tokens"])
    values = [float(schedule.model_timestep(i, "bfloat16")) for i in range(cells.steps)]
    return lambda timesteps: torch.tensor(values, dtype=timesteps.dtype, device=timesteps.device)


def _distances(
    found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """Relative distances from the float32 runs, and their ratios to those of the judge."""
    result: dict[str, dict[str, float]] = {}
    for name, latents in found.items():
        plain = "plain" in name
        keys = ("plain",) if plain else ("kv", "kv_bf16_timesteps")
        result[name] = {}
        for key in keys:
            if key not in exact:
                continue
            distance = relative_distance(latents, exact[key])
            result[name][f"distance_from_{key}"] = distance
            if not plain and JUDGE in found:
                result[name][f"ratio_{key}"] = distance / relative_distance(
                    found[JUDGE], exact[key]
                )
    return result


def _difference(exact: dict[str, torch.Tensor]) -> dict[str, float] | None:
    if not {"ours", "kv"} <= exact.keys():
        return None
    return {
        "relative_distance": relative_distance(exact["ours"], exact["kv"]),
        "largest_difference": float((exact["ours"] - exact["kv"]).abs().max()),
        "standard_deviation": float(exact["kv"].std()),
    }
