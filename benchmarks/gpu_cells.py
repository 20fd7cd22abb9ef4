"""One cell of the GPU suite: an output size and a number of references, everyone in turn."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_contenders import Contender
from gpu_models import Networks, Scene, SuiteSize, make_scene
from gpu_record import Record
from gpu_timing import Sample, held_bytes, with_spread

from klein_kv.config import TransformerConfig
from klein_kv.flops import diffusers_kv_edit_flops, edit_flops, plain_edit_flops

__all__ = ["PAIRS", "CellRunner", "attempt", "empty_cache", "family_flops", "relative_distance"]

MIN_ROUNDS = 2
WARM_UP_STEPS = 2  # the first and a later one

# Who is compared with whom: seconds of the first over seconds of the second.
PAIRS = (
    ("diffusers_kv_eager", "ours_eager"),
    ("diffusers_kv_eager", "ours_compiled"),
    ("diffusers_kv_eager", "ours_graphs"),
    ("diffusers_kv_compiled", "ours_compiled"),
    ("diffusers_kv_compiled", "ours_graphs"),
    ("diffusers_plain_eager", "diffusers_kv_eager"),
    ("diffusers_plain_compiled", "diffusers_kv_compiled"),
    ("diffusers_plain_eager", "ours_hit_eager"),
    ("diffusers_plain_compiled", "ours_hit_compiled"),
    ("diffusers_plain_compiled", "ours_hit_graphs"),
    ("diffusers_kv_eager", "ours_hit_eager"),
    ("diffusers_kv_compiled", "ours_hit_graphs"),
    ("ours_eager", "ours_hit_eager"),
    ("ours_compiled", "ours_hit_compiled"),
    ("ours_graphs", "ours_hit_graphs"),
)


def family_flops(net: TransformerConfig, sizes: dict[str, int], steps: int) -> dict[str, int]:
    """Operations of all steps of a request, by family of contenders."""
    return {
        "diffusers_kv": diffusers_kv_edit_flops(net, steps=steps, **sizes),
        "plain": plain_edit_flops(net, steps=steps, **sizes),
        "kv": edit_flops(net, steps=steps, references_known=False, **sizes),
        "hit": edit_flops(net, steps=steps, references_known=True, **sizes),
    }


def relative_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| in Euclid's norm, computed in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@dataclass(slots=True)
class CellRunner:
    """Measures cells with one set of contenders.

    Attributes:
        record: where results go, and how much time is left.
        networks: the weights.
        size: what is measured.
        contenders: the most important first.
        steps: denoising steps of a request.
        rounds: at most so many samples of everyone in a cell.
        latents: results by (output, references) and contender, on the host.
    """

    record: Record
    networks: Networks
    size: SuiteSize
    contenders: list[Contender]
    steps: int
    rounds: int
    latents: dict[tuple[int, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    _scenes: dict[tuple[int, int], Scene] = field(default_factory=dict)

    def scene(self, output: int, references: int) -> Scene:
        """A cell's request, made once: its references might be encoded otherwise a second time."""
        key = output, references
        if key not in self._scenes:
            self._scenes[key] = make_scene(self.networks, self.size, output, references)
        return self._scenes[key]

    def measure(self, output: int, references: int, seconds: float, reserve: float = 0.0) -> None:
        """Measures one cell and adds it to the document.

        Args:
            output: side of the output in pixels.
            references: how many.
            seconds: after these, no round beyond the least number.
            reserve: seconds that must be left of the suite's when the cell ends.
        """
        label = f"{output}x{output}, {references} references"
        until = self.record.elapsed + seconds
        end = self.record.elapsed + self.record.left - reserve
        scene = self.scene(output, references)
        flops = family_flops(self.networks.config.transformer, scene.sizes, self.steps)
        cell: dict[str, Any] = {
            "output": output,
            "references": references,
            "reference_side": self.size.reference,
            "steps": self.steps,
            **scene.sizes,
            "flops": flops,
            "expected_by_flops": {
                "plain_over_kv": flops["plain"] / flops["diffusers_kv"],
                "plain_over_hit": flops["plain"] / flops["hit"],
                "kv_over_hit": flops["diffusers_kv"] / flops["hit"],
            },
            "runs": {},
        }
        self.record.document.setdefault("cells", []).append(cell)
        self.record.say(label)
        ready = self._prepare(scene, label, cell["runs"], end)
        try:
            self._rounds(scene, label, cell["runs"], ready, min(until, end), end)
        finally:
            self._summarise(cell)
            kept = {c.name: c.latents.cpu() for c in ready if c.latents is not None}
            self.latents[output, references] = kept
            cell["hit_equals_miss"] = _hit_equals_miss(kept)
            for contender in self.contenders:
                contender.release()
            empty_cache(self.networks.device, collect=True)
            self.record.save()

    def _prepare(
        self, scene: Scene, label: str, runs: dict[str, Any], end: float
    ) -> list[Contender]:
        """Compiles, warms up and weighs everyone; who fails is noted and left out."""
        ready: list[Contender] = []
        device = self.networks.device
        for contender in self.contenders:
            if contender.family == "hit" and not scene.images:
                continue
            what = f"{label}: {contender.name}"
            if self.record.elapsed > end:
                self.record.miss(what, "no time left")
                continue
            empty_cache(device)
            before = held_bytes(device)
            start = self.record.elapsed

            def warm_up(contender: Contender = contender) -> tuple[float | None, Sample]:
                for _ in range(contender.warm_up_runs):
                    seconds = contender.prepare(scene)
                    sample = contender.run(scene, WARM_UP_STEPS)
                return seconds, sample

            warm = attempt(self.record, what, warm_up)
            if warm is None:
                contender.release()
                continue
            ready.append(contender)
            empty_cache(device)
            runs[contender.name] = {
                "family": contender.family,
                "held_bytes": held_bytes(device) - before,
                "warm_up_seconds": self.record.elapsed - start,
                "encode_references_seconds": warm[0],
                "samples": [],
            }
            self.record.say(
                f"  {contender.name}: warm after {self.record.elapsed - start:.1f} s, "
                f"{WARM_UP_STEPS} steps {warm[1].seconds:.3f} s"
            )
        return ready

    def _rounds(
        self,
        scene: Scene,
        label: str,
        runs: dict[str, Any],
        ready: list[Contender],
        until: float,
        end: float,
    ) -> None:
        """Samples of everyone in turn; who begins changes from round to round."""
        first: dict[str, torch.Tensor] = {}
        last_round = 0.0
        for i in range(self.rounds):
            after = self.record.elapsed + last_round
            if not ready or after > end or (i >= MIN_ROUNDS and after > until):
                break
            start = self.record.elapsed
            for contender in ready[i % len(ready) :] + ready[: i % len(ready)]:

                def run(contender: Contender = contender) -> Sample:
                    return contender.run(scene, self.steps)

                sample = attempt(self.record, f"{label}: {contender.name}", run)
                if sample is None:
                    ready.remove(contender)
                    contender.release()
                    continue
                entry = runs[contender.name]
                entry["samples"].append(
                    {
                        "seconds": sample.seconds,
                        "wall_seconds": sample.wall,
                        "steps": sample.steps,
                        "peak_bytes": sample.peak_bytes,
                    }
                )
                assert contender.latents is not None
                seen = first.setdefault(contender.name, contender.latents.cpu())
                same = torch.equal(seen, contender.latents.cpu())
                entry["repeatable"] = entry.get("repeatable", True) and same
                entry["finite"] = bool(torch.isfinite(contender.latents).all())
            last_round = self.record.elapsed - start
            medians = ", ".join(
                f"{c.name} {runs[c.name]['samples'][-1]['seconds']:.3f}" for c in ready
            )
            self.record.say(f"  round {i + 1}: {medians}")
        for contender in ready:
            if len(runs[contender.name]["samples"]) < MIN_ROUNDS:
                self.record.miss(
                    f"{label}: {contender.name}",
                    f"time for {len(runs[contender.name]['samples'])} of {MIN_ROUNDS} rounds only",
                )

    def _summarise(self, cell: dict[str, Any]) -> None:
        """Medians, memory, share of the peak and ratios, from the samples."""
        runs = cell["runs"]
        peak = self.record.document.get("matmul_peak", {}).get("tflops_per_second")
        for name, entry in runs.items():
            samples = entry["samples"]
            if not samples:
                continue
            entry["seconds"] = with_spread([sample["seconds"] for sample in samples])
            entry["wall_seconds"] = with_spread([sample["wall_seconds"] for sample in samples])
            entry["step_seconds"] = [
                statistics.median(step)
                for step in zip(*(sample["steps"] for sample in samples), strict=True)
            ]
            rate = cell["flops"][entry["family"]] / entry["seconds"]["median"] / 1e12
            entry["tflops_per_second"] = rate
            entry["peak_fraction"] = rate / peak if peak else None
            entry["memory"] = self._memory(name, runs)
        cell["ratios"] = [
            _ratio(cell, slow, fast)
            for slow, fast in PAIRS
            if all(runs.get(name, {}).get("samples") for name in (slow, fast))
        ]

    def _memory(self, name: str, runs: dict[str, Any]) -> dict[str, int] | None:
        """Device memory as if this contender were alone; None on a CPU."""
        peaks = [sample["peak_bytes"] for sample in runs[name]["samples"]]
        if None in peaks:
            return None
        held, weights = runs[name]["held_bytes"], self.networks.weight_bytes
        return {
            "weights_bytes": weights,
            "held_bytes": held,
            "transient_bytes": max(peaks),
            "total_bytes": weights + held + max(peaks),
        }


def attempt(record: Record, what: str, function: Callable[[], Any]) -> Any:
    """The function's result; None, and a note of what is missing, where it fails."""
    try:
        return function()
    # Whatever a compiler, a driver or a full memory raises: the rest can still be measured.
    except Exception as error:  # noqa: BLE001
        record.miss(what, f"{type(error).__name__}: {str(error).strip()[:500]}")
        return None


def _ratio(cell: dict[str, Any], slow: str, fast: str) -> dict[str, Any]:
    runs = cell["runs"]
    pairs = zip(runs[slow]["samples"], runs[fast]["samples"], strict=False)
    flops = [cell["flops"][runs[name]["family"]] for name in (slow, fast)]
    return {
        "slow": slow,
        "fast": fast,
        "measured": with_spread([a["seconds"] / b["seconds"] for a, b in pairs]),
        "expected_by_flops": flops[0] / flops[1],
    }


def _hit_equals_miss(latents: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Whether a request with known references gives the bits of one without, by mode."""
    result = {}
    for name, hit in latents.items():
        miss = latents.get(name.replace("_hit_", "_"))
        if "_hit_" in name and miss is not None:
            largest = float((hit.float() - miss.float()).abs().max())
            result[name] = {"bitwise": torch.equal(hit, miss), "largest_difference": largest}
    return result


def empty_cache(device: torch.device, collect: bool = False) -> None:
    """Gives memory that nobody uses back to the device.

    Args:
        device: which.
        collect: look for objects that hold each other, like a pipeline and the watch on its
            scheduler.
    """
    if collect:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
