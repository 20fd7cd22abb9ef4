"""What is known of one engine: its tensors, where its weights lie, which shapes it serves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from klein_kv.artifacts.signature import TensorSpec
from klein_kv.artifacts.weights import WeightPlace, WeightRef, refs_from_places
from klein_kv.errors import RequestError

__all__ = ["EngineRecord", "ProfileRecord", "Shapes"]

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""(min, opt, max) shapes by input."""


@dataclass(frozen=True, slots=True)
class ProfileRecord:
    """One optimization profile."""

    name: str
    symbols: dict[str, tuple[int, int, int]]  # symbolic axis -> (min, opt, max)
    shapes: Shapes  # inputs of fixed shape are absent
    scratch_bytes: int = 0  # activation memory at its largest shapes

    def __post_init__(self) -> None:
        for name, shapes in self.shapes.items():
            if len({len(shape) for shape in shapes}) > 1:
                raise ValueError(f"shapes of {name} have different numbers of axes")

    @property
    def fixed(self) -> bool:
        """Whether it is one single shape."""
        return all(low == high for low, _, high in self.shapes.values())

    def holds(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes fit; inputs that are not named here are not asked."""
        for name, (low, _, high) in self.shapes.items():
            shape = shapes.get(name)
            if shape is not None and (
                len(shape) != len(low)
                or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
            ):
                return False
        return True


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One engine."""

    graph: str
    file: str  # name of the engine file in the folder of the manifest
    layers: str  # name of the kernel plan file beside it
    bytes: int
    sha256: str  # hex digest of the engine file
    key: str  # digest of everything that the engine was built from
    onnx_digest: str  # digest of the ONNX file, as in `klein.json`
    inputs: tuple[TensorSpec, ...]  # without the weights
    outputs: tuple[TensorSpec, ...]
    # weight inputs, in the artifact folder; empty where weights are embedded
    weights: dict[str, WeightPlace]
    profiles: tuple[ProfileRecord, ...]  # in TensorRT's order
    scratch_bytes: int  # activation memory at the largest shapes of all profiles
    seconds: float
    peak_rss: int  # peak resident memory of the building process until then, bytes

    def profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Number of the first profile that holds inputs of these shapes, or a `RequestError`."""
        for number, profile in enumerate(self.profiles):
            if profile.holds(shapes):
                return number
        limits = "; ".join(
            ", ".join(f"{symbol} {low}..{high}" for symbol, (low, _, high) in p.symbols.items())
            for p in self.profiles
        )
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise RequestError(
            f"{self.graph}: no profile of this engine holds {got}; it was built for {limits}"
        )

    @property
    def fixed(self) -> bool:
        """Whether the engine serves one single shape."""
        return len(self.profiles) == 1 and self.profiles[0].fixed

    def scratch_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Activation memory that inputs of these shapes need at most; errors as `profile_for`."""
        return self.profiles[self.profile_for(shapes)].scratch_bytes

    def weight_refs(self, artifacts: Path) -> dict[str, WeightRef]:
        """Where the weight inputs lie in an artifact folder, checked by `refs_from_places`."""
        return refs_from_places(artifacts, self.weights, f"weights of the engine of {self.graph}")
