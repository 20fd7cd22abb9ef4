"""What one run did, for people."""

from dataclasses import dataclass
from typing import Self

from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.planning.memory_plan import size_text
from klein_kv.runtime.references.reference_store import StoreStats
from klein_kv.runtime.timings import Timings

__all__ = ["RunFacts"]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of one run.

    Attributes:
        model: its name, backend and precision.
        references: how many images.
        timings: where the time went.
        held: bytes on the device beside kept references.
        store: what is kept of references.
        budget: bytes that those may take.
    """

    model: str
    references: int
    timings: Timings
    held: int
    store: StoreStats
    budget: int

    @classmethod
    def of(cls, pipe: KleinKVPipeline, precision: str, references: int) -> Self:
        """Of the last call of a pipeline."""
        return cls(
            model=f"{pipe.manifest.model_id}, {pipe.backend.name}, {precision} precision",
            references=references,
            timings=pipe.timings,
            held=pipe.session.held_bytes,
            store=pipe.reference_store.stats,
            budget=pipe.reference_store.budget,
        )

    @property
    def known(self) -> bool:
        """Whether the references' keys and values were there before the run."""
        timings = self.timings
        return bool(self.references and timings.cached_steps) and not (
            timings.first_step or timings.encode_references
        )

    @property
    def text(self) -> str:
        """Four lines."""
        how = "hit: keys and values were kept" if self.known else "miss: encoded in this run"
        if not self.references:
            how = "none"
        elif self.timings.plain_steps:
            how = "take part in every step (plain weights)"
        return "\n".join(
            (
                self.model,
                self.timings.to_text(),
                f"references: {how}",
                f"memory: {size_text(self.held)} of weights and work space (mapped files not "
                f"counted); reference sets kept: {self.store.entries}, "
                f"{size_text(self.store.bytes)} of at most {size_text(self.budget)}",
            )
        )
