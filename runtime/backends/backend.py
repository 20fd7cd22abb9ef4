"""What a backend is: loaded graphs that run on named buffers and leave outputs on the device."""

import importlib.util
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import BackendError

__all__ = [
    "BACKENDS",
    "Backend",
    "Buffer",
    "DeviceContent",
    "GraphMemory",
    "WeightChanges",
    "WeightMaker",
    "keep_changes",
    "open_backend",
]

BACKENDS = ("auto", "onnxruntime", "tensorrt", "torch")

_TORCH_OPTIONS = ("compile_blocks", "cuda_graphs")

Buffer = Any
"""A tensor on the backend's device; only the backend that made it knows what it is."""

WeightChanges = Mapping[str, Callable[[], Any] | None]
"""By tensor, named without rows: what gives its content, whole and in the table's type, or None for
that of the file. An array or a `DeviceContent`; asked for again where a graph is loaded again."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceContent:
    """Content that graphs of a `WeightMaker` make, in the thread that changes weights."""

    make: Callable[[], Iterator[tuple[slice, Any]]]

    def __call__(self) -> Iterator[tuple[slice, Any]]:
        """Rows of the tensor, and what they hold: a buffer or an array; written as they come."""
        return self.make()


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """What a graph takes on the device besides the buffers that go in and come out."""

    # Bytes by tensor while the graph is loaded, which graphs that name the same tensor share. Empty
    # where weights are mapped files, which the system drops by itself.
    weights: Mapping[Hashable, int] = field(default_factory=dict)
    keeps_scratch: bool = False  # for the next run, as memory in use for `available_memory`
    fixed_buffers: bool = False  # own inputs and outputs while loaded, scratch shared by all graphs
    kv_copies: int = 0  # further places that the backend keeps for a request's keys and values


class Backend(Protocol):
    """Graphs of one artifact folder on one device. One thread at a time runs graphs."""

    name: str

    def prepare(
        self,
        graph: str,
        shapes: Mapping[str, tuple[int, ...]],
        kv: Mapping[str, Buffer] | None = None,
        *,
        eager: bool = False,
    ) -> None:
        """Does ahead what the next run at these shapes of all inputs would: loads, takes memory.

        `kv` are the keys and values that it will be given, where there are some already; `eager`
        has it compile for these very shapes at once.
        """

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Runs a graph, a key of `GraphSet.files`, on all its inputs; loads it when first used.

        Keys and values that it gives belong to the caller; other outputs may be written to when the
        graph runs again: `assemble` keeps what must outlast that.
        """

    def upload(self, array: NDArray[Any]) -> Buffer:
        """A buffer with the array's content."""

    def upload_kv(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Buffer]:
        """Keys and values of one set, by the names of `signature.kv_names`."""

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """The buffer's content on the host; without a copy where the device is the host."""

    def view(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        """The same memory from element `start` on, under another shape."""

    def assemble(self, shape: tuple[int, ...], parts: Iterable[Buffer]) -> Buffer:
        """A new buffer of the elements of its parts, each copied before the next is asked for."""

    def release(self, graph: str) -> None:
        """Frees what a loaded graph holds; the next run loads it again."""

    def replace_weights(self, changes: WeightChanges) -> None:
        """Gives weights of the transformer another content, now and wherever they are loaded.

        After an error it must be called again for the same tensors before graphs run. BackendError:
        the weights are not the backend's to change.
        """

    def available_memory(self) -> int:
        """Bytes that can still be taken on the device; what the backend keeps to reuse counts."""

    def graph_memory(self, graph: str) -> GraphMemory:
        """What a graph takes, loaded or not; ArtifactError: there is no such graph here."""

    def scratch_bytes(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Bytes that a run at these shapes takes, None: not known; RequestError: it cannot run."""

    def mark(self) -> Any:
        """A point in the device's work, taken without waiting for it."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds of the device between two marks; waits until it has passed both."""

    def close(self) -> None:
        """Frees everything. Nothing may be called afterwards; buffers are gone."""


@runtime_checkable
class WeightMaker(Protocol):
    """A backend whose graphs may make weights; see `DeviceContent`."""

    def upload_weight(self, ref: WeightRef) -> Buffer:
        """A buffer with the content of a tensor of the files, which is only read."""


def open_backend(
    name: str,
    artifacts: Path,
    manifest: Manifest,
    device: str | None,
    threads: int | None,
    graphs: GraphSet | None = None,
    options: Mapping[str, Any] | None = None,
) -> Backend:
    """Opens a backend on an artifact folder whose manifest has been checked.

    "auto" is "tensorrt" where the folder holds engines and the device is not "cpu"; else "torch"
    where that is installed, for bfloat16 on any device and for any type on a device "cuda" that
    torch sees; else, and for quantized graphs, "onnxruntime". The device is "cpu", "cuda" or
    "cuda:N", None for the backend's own: a CPU for onnxruntime. Threads are the CPU's, None leaves
    them to the library. None takes the manifest's graphs. Options are `TorchBackend`'s.

    Raises:
        BackendError: unknown backend, device or option, a missing library, or a type it cannot
            compute.
        ArtifactError: the folder's engines are not whole.
        BuildError: the engines are for another GPU or TensorRT.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    kind, _, ordinal = (device or "").partition(":")
    if kind not in ("", "cpu", "cuda") or not (ordinal or "0").isdigit():
        raise BackendError(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:N'")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise BackendError(f"threads is {threads!r}, expected a whole number of 1 or more")
    graphs = graphs or manifest.graphs
    if name == "auto":
        name = _choose_backend(artifacts, graphs, kind)
    options = dict(options or {})
    known = _TORCH_OPTIONS if name == "torch" else ()
    if unknown := sorted(options.keys() - set(known)):
        expected = f"expected some of {', '.join(known)}" if known else "which has none"
        raise BackendError(f"backend_options {unknown} are none of the {name} backend, {expected}")

    if name == "tensorrt":
        if kind == "cpu":
            raise BackendError("device is 'cpu', expected 'cuda' for the tensorrt backend")
        from klein_kv.runtime.backends.trt.backend import TrtBackend

        return TrtBackend(artifacts, manifest, device=int(ordinal or 0), graphs=graphs)
    if name == "torch":
        if not _has_torch():
            raise BackendError(
                "backend torch needs torch, which is not installed; install it with "
                "pip install 'klein-kv[torch]'"
            )
        from klein_kv.runtime.backends.pytorch.backend import TorchBackend
        from klein_kv.runtime.backends.pytorch.weights import FolderWeights

        weights = FolderWeights(artifacts, manifest, graphs, device)
        return TorchBackend(weights, threads=threads, **options)
    from klein_kv.runtime.backends.ort.backend import OrtBackend
    from klein_kv.runtime.backends.ort.device import CPU, OrtDevice

    place = OrtDevice("cuda", int(ordinal or 0)) if kind == "cuda" else CPU
    return OrtBackend(artifacts, manifest, threads, graphs, device=place)


def _choose_backend(artifacts: Path, graphs: GraphSet, kind: str) -> str:
    """The backend that "auto" stands for; see `open_backend`."""
    from klein_kv.artifacts.engines.engine_manifest import find_engines

    if kind != "cpu" and find_engines(artifacts):
        return "tensorrt"
    if graphs.quantized or graphs.attention or not _has_torch():
        return "onnxruntime"
    if kind == "cuda":
        import torch

        return "torch" if torch.cuda.is_available() else "onnxruntime"
    return "torch" if graphs.dtype == "bfloat16" else "onnxruntime"


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def keep_changes(kept: dict[str, Callable[[], Any]], changes: WeightChanges) -> None:
    """Notes changes for weights that are loaded later; a None takes back an earlier one."""
    for name, content in changes.items():
        kept.pop(name, None)
        if content is not None:
            kept[name] = content
