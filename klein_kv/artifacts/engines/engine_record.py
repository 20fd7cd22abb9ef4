"""What is known of one engine: its tensors, where its weights lie, which shapes it serves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from klein_kv.artifacts.digest import inside
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError, RequestError

__all__ = ["EngineRecord", "ProfileRecord", "TensorInfo", "WeightInput", "record_from_json"]


class TensorInfo(NamedTuple):
    """An input or output of an engine; -1 marks an axis that varies."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class WeightInput(NamedTuple):
    """Where the bytes of a weight input lie: `nbytes` from `offset` of `file`.

    `file` is relative to the artifact folder.
    """

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProfileRecord:
    """One optimization profile.

    Attributes:
        name: from the recipe.
        symbols: symbolic axis -> (min, opt, max).
        shapes: input -> (min, opt, max) shapes; inputs of fixed shape are absent.
        scratch_bytes: activation memory at its largest shapes.
    """

    name: str
    symbols: dict[str, tuple[int, int, int]]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    scratch_bytes: int = 0

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
    """One engine.

    Attributes:
        graph: name of the graph.
        file: name of the engine file in the folder of the manifest.
        layers: name of the kernel plan file beside it.
        bytes: size of the engine file.
        sha256: hex digest of the engine file.
        key: digest of everything that the engine was built from; see `build.engine_key`.
        onnx_digest: digest of the ONNX file, as in `klein.json`.
        inputs: without the weights.
        outputs: outputs.
        weights: weight inputs by name; empty where weights are embedded.
        profiles: in TensorRT's order.
        scratch_bytes: activation memory at the largest shapes of all profiles.
        seconds: time of the build.
        peak_rss: peak resident memory of the building process until then, bytes.
    """

    graph: str
    file: str
    layers: str
    bytes: int
    sha256: str
    key: str
    onnx_digest: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: dict[str, WeightInput]
    profiles: tuple[ProfileRecord, ...]
    scratch_bytes: int
    seconds: float
    peak_rss: int

    def profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Number of the first profile that holds inputs of these shapes.

        Raises:
            RequestError: no profile does.
        """
        for number, profile in enumerate(self.profiles):
            if profile.holds(shapes):
                return number
        limits = "; ".join(
            ", ".join(f"{symbol} {low}..{high}" for symbol, (low, _, high) in p.symbols.items())
            for p in self.profiles
        )
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise RequestError(
            f"{self.graph}: no profile of this engine holds {got}; it was built for {limits}. "
            "Build engines with a recipe that covers these sizes"
        )

    @property
    def fixed(self) -> bool:
        """Whether the engine serves one single shape."""
        return len(self.profiles) == 1 and self.profiles[0].fixed

    def scratch_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Activation memory that inputs of these shapes need at most.

        Raises:
            RequestError: no profile holds them.
        """
        return self.profiles[self.profile_for(shapes)].scratch_bytes

    def weight_refs(self, artifacts: Path) -> dict[str, WeightRef]:
        """Where the weight inputs lie in an artifact folder.

        Raises:
            ArtifactError: a path leaves the folder, or a file is missing or too short.
        """
        refs, sizes = {}, {}
        for name, weight in self.weights.items():
            path = inside(artifacts, weight.file)
            if path not in sizes:
                try:
                    sizes[path] = path.stat().st_size
                except OSError as error:
                    raise ArtifactError(
                        f"weight file {path} cannot be read ({error.strerror}); export again"
                    ) from error
            if weight.offset < 0 or weight.offset + weight.nbytes > sizes[path]:
                raise ArtifactError(
                    f"{self.graph}: weight {name} ends at byte {weight.offset + weight.nbytes} of "
                    f"{path}, which has {sizes[path]}; export and build again"
                )
            refs[name] = WeightRef(path, weight.offset, weight.nbytes, weight.dtype, weight.shape)
        return refs


def record_from_json(value: Mapping[str, Any]) -> EngineRecord:
    """Reads what `dataclasses.asdict` and JSON made of a record.

    Raises:
        KeyError, TypeError, ValueError: the value is not a record.
    """
    return EngineRecord(
        graph=value["graph"],
        file=value["file"],
        layers=value["layers"],
        bytes=int(value["bytes"]),
        sha256=value["sha256"],
        key=value["key"],
        onnx_digest=value["onnx_digest"],
        inputs=tuple(_tensor(tensor) for tensor in value["inputs"]),
        outputs=tuple(_tensor(tensor) for tensor in value["outputs"]),
        weights={
            name: WeightInput(file, int(offset), int(nbytes), dtype, tuple(shape))
            for name, (file, offset, nbytes, dtype, shape) in value["weights"].items()
        },
        profiles=tuple(
            _profile(profile, int(value["scratch_bytes"])) for profile in value["profiles"]
        ),
        scratch_bytes=int(value["scratch_bytes"]),
        seconds=float(value["seconds"]),
        peak_rss=int(value["peak_rss"]),
    )


def _tensor(value: Any) -> TensorInfo:
    name, dtype, shape = value
    return TensorInfo(name, dtype, tuple(shape))


def _profile(value: Mapping[str, Any], largest_scratch: int) -> ProfileRecord:
    symbols: dict[str, tuple[int, int, int]] = {
        symbol: (low, typical, high) for symbol, (low, typical, high) in value["symbols"].items()
    }
    shapes = {
        name: (tuple(low), tuple(typical), tuple(high))
        for name, (low, typical, high) in value["shapes"].items()
    }
    # Engines of an earlier klein-kv say it of all profiles together.
    scratch = int(value.get("scratch_bytes", largest_scratch))
    return ProfileRecord(value["name"], symbols, shapes, scratch)
