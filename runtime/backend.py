"""What a backend is: loaded graphs that run on named buffers and leave outputs on the device.

Backends: "onnxruntime" (a CPU, or a CUDA GPU) and "tensorrt" (engines on an NVIDIA GPU).
`open_backend` picks one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from klein_kv.errors import BackendError
from klein_kv.manifest import Manifest
from klein_kv.signature import GraphSet

__all__ = ["BACKENDS", "Backend", "Buffer", "DeviceClock", "open_backend"]

BACKENDS = ("auto", "onnxruntime", "tensorrt")

Buffer = Any
"""A tensor on the backend's device; only the backend that made it knows what it is."""


class Backend(Protocol):
    """Graphs of one artifact folder on one device."""

    name: str

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Runs a graph.

        Args:
            graph: a key of `GraphSet.files`; loaded when first used.
            inputs: every input of the graph's signature. Buffers stay the caller's.

        Returns:
            All outputs by name, newly allocated on the device.
        """

    def upload(self, array: NDArray[Any]) -> Buffer:
        """A buffer with the array's content. The array must not change while the buffer lives."""

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """The buffer's content on the host; without a copy where the device is the host."""

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        """The same memory under another shape."""

    def release(self, graph: str) -> None:
        """Frees what a loaded graph holds; the next run loads it again."""


@runtime_checkable
class DeviceClock(Protocol):
    """What a backend offers besides if its calls return before the device has done the work."""

    def mark(self) -> object:
        """A point in the device's work, taken without waiting for it."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds of the device between two marks; waits until it has passed both."""


def open_backend(
    name: str,
    artifacts: Path,
    manifest: Manifest,
    device: str | None,
    threads: int | None,
    graphs: GraphSet | None = None,
) -> Backend:
    """Opens a backend on an artifact folder whose manifest has been checked.

    Args:
        name: one of `BACKENDS`; "auto" is "tensorrt" where the folder holds engines and the device
            is not "cpu", else "onnxruntime".
        artifacts: the folder.
        manifest: its manifest.
        device: "cpu", "cuda" or "cuda:N"; None for the backend's own, a CPU for onnxruntime.
        threads: CPU threads; None leaves it to the library.
        graphs: which graphs of the folder; None takes the manifest's.

    Raises:
        BackendError: unknown backend or device, a missing library, or a type it cannot compute.
        ArtifactError: the folder's engines are not whole.
        BuildError: the engines are for another GPU or TensorRT.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    kind, _, ordinal = (device or "").partition(":")
    if kind not in ("", "cpu", "cuda") or not (ordinal or "0").isdigit():
        raise BackendError(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:N'")
    if name == "auto":
        from klein_kv.engines.manifest import find_engines

        built = kind != "cpu" and find_engines(artifacts)
        name = "tensorrt" if built else "onnxruntime"
    if name == "tensorrt":
        if kind == "cpu":
            raise BackendError("device is 'cpu', expected 'cuda' for the tensorrt backend")
        from klein_kv.runtime.trt_backend import TrtBackend

        return TrtBackend(artifacts, manifest, device=int(ordinal or 0), graphs=graphs)
    from klein_kv.runtime.ort_backend import OrtBackend
    from klein_kv.runtime.ort_device import CPU, cuda_device

    place = cuda_device(int(ordinal or 0)) if kind == "cuda" else CPU
    return OrtBackend(artifacts, manifest, threads, graphs, device=place)
