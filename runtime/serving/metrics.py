"""Figures for Prometheus. No prompt, key or address is ever a label."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from klein_kv.runtime.serving.jobs import EditResult

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One service's figures, in a registry of their own.

    Args:
        gauges: `Engine.gauges`; names that end in "_total" are counts, "@NAME" is whose.
        shelf_bytes: of uploaded references.
    """

    def __init__(
        self, gauges: Callable[[], dict[str, float]], shelf_bytes: Callable[[], float]
    ) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_EngineGauges(gauges))
        seconds = partial(Histogram, buckets=_SECONDS, registry=registry)
        self.seconds = seconds(
            "klein_kv_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["route"],
        )
        self.queued = seconds("klein_kv_queue_seconds", "Jobs' time in the queue")
        self.stages = seconds("klein_kv_stage_seconds", "Jobs' time by stage", ["stage"])
        text, labels = "Answers by route and status", ["route", "code"]
        self.requests = Counter("klein_kv_requests", text, labels, registry=registry)
        text, labels = "Jobs done, by whether their references were known", ["references"]
        self.edits = Counter("klein_kv_edits", text, labels, registry=registry)
        text = "Pixels of uploaded references"
        Gauge("klein_kv_shelf_bytes", text, registry=registry).set_function(shelf_bytes)

    def note_edit(self, result: EditResult, references: int) -> None:
        """Counts a job that is done."""
        kind = "known" if result.references_known else "new" if references else "none"
        self.edits.labels(kind).inc()
        self.queued.observe(result.queued_s)
        for stage, seconds in result.stages_s.items():
            if seconds and stage not in ("total", "stages"):
                self.stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineGauges(Collector):
    def __init__(self, gauges: Callable[[], dict[str, float]]) -> None:
        self._gauges = gauges

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for key, value in self._gauges().items():
            name, _, replica = key.partition("@")
            if name not in families:
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                labels = ["replica"] if replica else []
                text = name.replace("_", " ")
                families[name] = kind(f"klein_kv_engine_{name}", text, labels=labels)
            families[name].add_metric([replica] if replica else [], value)
        yield from families.values()
