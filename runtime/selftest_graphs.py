"""Every graph of a folder on one backend: it runs, repeats itself, and computes what it should."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.config import ModelConfig
from klein_kv.runtime.backend import Backend, Buffer
from klein_kv.runtime.selftest_limits import EXACT, Limit, tensor_limit
from klein_kv.runtime.selftest_report import CheckError, Report
from klein_kv.runtime.selftest_sizes import CaseSizes, random_inputs
from klein_kv.signature import GraphSet
from klein_kv.weights import NUMPY_DTYPES

__all__ = ["GraphRunner", "Limits", "check_graphs", "check_identities", "compare"]

Arrays = dict[str, NDArray[Any]]
Limits = Limit | Callable[[str], Limit]
"""Of all tensors, or of each by its name."""


@dataclass(frozen=True, slots=True)
class GraphRunner:
    """Graphs of one backend, on host arrays.

    Attributes:
        label: of the backend, for messages.
        backend: where they run.
        graphs: which ones.
        config: the networks.
        present: names of the graphs that are there.
        kv_scales: of keys and values whose scales are constants of the graphs, by tensor.
    """

    label: str
    backend: Backend
    graphs: GraphSet
    config: ModelConfig
    present: tuple[str, ...]
    kv_scales: Mapping[str, float] = field(default_factory=dict)

    def upload(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Buffer]:
        """Buffers in the types that the graph takes."""
        return {
            spec.name: self.backend.upload(inputs[spec.name].astype(NUMPY_DTYPES[spec.dtype]))
            for spec in self.graphs.signature(graph, self.config).inputs
        }

    def download(self, outputs: Mapping[str, Buffer]) -> Arrays:
        """Host copies; floating point as float32."""
        arrays = {}
        for name, buffer in outputs.items():
            array = self.backend.download(buffer)
            whole = array.dtype.kind in "iu"
            arrays[name] = np.array(array, dtype=array.dtype if whole else np.float32)
        return arrays

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Outputs on the host."""
        return self.download(self.backend.run(graph, self.upload(graph, inputs)))

    def limits(self, graph: str) -> Callable[[str], Limit]:
        """What passes for the outputs of a graph."""
        return functools.partial(tensor_limit, self.graphs, self.config, graph)

    def values(self, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        """What inputs or outputs stand for: keys and values in float8 times their scales."""
        found = {}
        for name, array in arrays.items():
            part, _, block = name.partition(".")
            if name in self.kv_scales:
                found[name] = array * np.float32(self.kv_scales[name])
            elif f"{part}_scale.{block}" in arrays:
                found[name] = array * arrays[f"{part}_scale.{block}"]
            elif "_scale." not in name:
                found[name] = array
        return found


def round_inputs(
    graphs: GraphSet, config: ModelConfig, graph: str, inputs: Mapping[str, NDArray[Any]]
) -> Arrays:
    """The same numbers as the graph sees them, so that the reference sees them too."""
    rounded = {}
    for spec in graphs.signature(graph, config).inputs:
        array = inputs[spec.name]
        floats = array.dtype == np.float32
        narrow = array.astype(NUMPY_DTYPES[spec.dtype]).astype(np.float32) if floats else array
        rounded[spec.name] = narrow
    return rounded


def check_finite(outputs: Mapping[str, NDArray[Any]]) -> None:
    """Refuses infinities and NaNs.

    Raises:
        CheckError: with the outputs that hold them.
    """
    bad = {
        name: int(np.size(array) - np.isfinite(array).sum())
        for name, array in outputs.items()
        if not np.isfinite(array).all()
    }
    if bad:
        worst = max(bad, key=lambda name: bad[name])
        raise CheckError(
            f"{len(bad)} outputs hold values that are not finite, {worst} {bad[worst]} of them",
            {"not_finite": bad},
        )


def compare(
    got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], limits: Limits
) -> dict[str, Any]:
    """Compares tensors by name.

    Returns:
        What was measured: the output with the largest share of its limit, its errors, and whether
        all outputs are equal bit for bit.

    Raises:
        CheckError: another shape, values that are not finite, or an error above the limit.
    """
    check_finite(got)
    check_finite(expected)
    worst: dict[str, Any] = {"output": None, "norm": 0.0, "largest": 0.0}
    failed, bitwise, most = [], True, -1.0
    for name, right in expected.items():
        left = got[name]
        if left.shape != right.shape:
            raise CheckError(f"{name} has shape {left.shape}, expected {right.shape}")
        bitwise = bitwise and np.array_equal(left, right)
        a, b = left.astype(np.float64), right.astype(np.float64)
        scale, top = np.linalg.norm(b) or 1.0, np.abs(b).max(initial=0.0) or 1.0
        norm = float(np.linalg.norm(a - b) / scale)
        largest = float(np.abs(a - b).max(initial=0.0) / top)
        limit = limits if isinstance(limits, Limit) else limits(name)
        share = max(norm / (limit.norm or 1.0), largest / (limit.largest or 1.0))
        if share > most:
            most = share
            worst = {
                "output": name,
                "norm": norm,
                "largest": largest,
                "limit_norm": limit.norm,
                "limit_largest": limit.largest,
            }
        if norm > limit.norm or largest > limit.largest:
            failed.append(
                f"{name} (norm {norm:.3g}, largest {largest:.3g}, expected at most "
                f"{limit.norm:.3g} and {limit.largest:.3g})"
            )
    measured = {**worst, "bitwise": bitwise}
    if failed:
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise CheckError(
            f"relative errors of {', '.join(failed[:3])}{more} are above the limits", measured
        )
    return measured


def check_graphs(
    report: Report,
    case: str,
    ours: GraphRunner,
    reference: GraphRunner | str,
    sizes: CaseSizes,
) -> None:
    """Runs every graph twice, and compares it with a reference.

    Args:
        report: where the results go.
        case: what they belong to; begins the checks' names.
        ours: what is tested.
        reference: what it is compared with, or why it is not.
        sizes: of the inputs.
    """
    if isinstance(reference, str):
        report.skip(f"{case}: graphs against a reference", reference)
    for graph in ours.graphs.files:
        name = f"{case}: {graph}"
        if graph not in ours.present:
            report.skip(name, "it was not built")
            continue
        numbers = random_inputs(ours.graphs, ours.config, graph, sizes, seed=1)
        inputs = round_inputs(ours.graphs, ours.config, graph, numbers)
        found: Arrays = {}
        report.run(f"{name} runs", functools.partial(_run_twice, ours, graph, inputs, found))
        if not isinstance(reference, str):
            against = f"{name} against {reference.label}"
            if found:
                compared = functools.partial(_against, ours, reference, graph, inputs, found)
                report.run(against, compared)
            else:
                report.skip(against, "it did not run")
        if graph == "text_encoder":  # it does not fit beside the transformer everywhere
            report.attempt(f"{name} is released", functools.partial(ours.backend.release, graph))


def _run_twice(ours: GraphRunner, graph: str, inputs: Arrays, found: Arrays) -> Mapping[str, Any]:
    buffers = ours.upload(graph, inputs)
    outputs, seconds = [], []
    for _ in range(2):
        start = time.perf_counter()
        outputs.append(ours.download(ours.backend.run(graph, buffers)))
        seconds.append(time.perf_counter() - start)
    first, second = outputs
    found.update(first)
    measured = {
        "first_seconds": seconds[0],  # loads it
        "seconds": seconds[1],
        "repeats_bitwise": all(np.array_equal(first[name], second[name]) for name in first),
    }
    check_finite(first)
    flat = [name for name, array in first.items() if array.size > 1 and np.ptp(array) == 0]
    if flat:
        raise CheckError(f"every value of {', '.join(flat[:3])} is the same", measured)
    try:
        compare(ours.values(second), ours.values(first), ours.limits(graph))
    except CheckError as error:
        raise CheckError(f"the second run differs: {error}", measured) from error
    return measured


def _against(
    ours: GraphRunner, reference: GraphRunner, graph: str, inputs: Arrays, found: Arrays
) -> Mapping[str, Any]:
    start = time.perf_counter()
    alike = reference.graphs.kv_dtype == ours.graphs.kv_dtype
    expected = reference.run(graph, inputs if alike else ours.values(inputs))
    seconds = time.perf_counter() - start
    reference.backend.release(graph)
    return {
        **compare(ours.values(found), reference.values(expected), ours.limits(graph)),
        "reference_seconds": seconds,
    }


class _Steps:
    """The first step, and the two ways to repeat it; each computed when first asked for."""

    def __init__(self, runner: GraphRunner, sizes: CaseSizes) -> None:
        self._runner = runner
        numbers = random_inputs(runner.graphs, runner.config, "first_step", sizes, seed=2)
        self._inputs = runner.upload("first_step", numbers)
        tensors = runner.graphs.kv_tensors(runner.config.transformer, ref_tokens=0)
        self.names = [spec.name for spec in tensors]

    @functools.cached_property
    def first(self) -> dict[str, Buffer]:
        return self._runner.backend.run("first_step", self._inputs)

    @functools.cached_property
    def kv(self) -> Arrays:
        return self._runner.download({name: self.first[name] for name in self.names})

    def encoded(self) -> Arrays:
        references = {name: x for name, x in self._inputs.items() if name.startswith("ref_")}
        return self._runner.download(self._runner.backend.run("encode_references", references))

    def cached(self) -> Arrays:
        feeds = {name: x for name, x in self._inputs.items() if not name.startswith("ref_")}
        feeds |= {name: self.first[name] for name in self.names}
        return self._runner.download(self._runner.backend.run("cached_step", feeds))


def check_identities(
    report: Report, case: str, ours: GraphRunner, sizes: CaseSizes, limits: Limits
) -> None:
    """What reusing references rests on; only weights that are KV weights have it.

    Args:
        report: where the results go.
        case: begins the checks' names.
        ours: what is tested.
        sizes: of the inputs.
        limits: how near is equal on this backend.
    """
    graphs = ("first_step", "encode_references", "cached_step")
    names = (
        "first_step and encode_references give the same keys and values",
        "cached_step on these keys and values repeats first_step",
        "cached_step leaves the keys and values as they were",
    )
    missing = [graph for graph in graphs if graph not in ours.present]
    if missing:
        for name in names:
            report.skip(f"{case}: {name}", f"without {', '.join(missing)}")
        return
    steps = functools.cache(lambda: _Steps(ours, sizes))

    def same_kv() -> Mapping[str, Any]:
        return compare(ours.values(steps().encoded()), ours.values(steps().kv), limits)

    def repeats() -> Mapping[str, Any]:
        first = steps().first
        expected = ours.download({name: first[name] for name in ("noise_pred", "latents")})
        return compare(steps().cached(), expected, limits)

    def untouched() -> Mapping[str, Any]:
        before = steps().kv
        steps().cached()
        after = ours.download({name: steps().first[name] for name in steps().names})
        return compare(after, before, EXACT)

    checks: tuple[Callable[[], Mapping[str, Any]], ...] = (same_kv, repeats, untouched)
    for name, check in zip(names, checks, strict=True):
        report.run(f"{case}: {name}", check)
