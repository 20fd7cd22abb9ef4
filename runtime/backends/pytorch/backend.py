"""Backend "torch": the project's own networks on a CPU or any CUDA GPU, without engines.

Buffers are torch tensors; outputs of one graph are inputs of the next without a copy. On a GPU
nothing waits for the device but a download, and the upload of what is large.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from numpy.typing import NDArray

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import kv_names
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError, BackendError, CapacityError
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.runtime.backends.backend import Buffer, GraphMemory, WeightChanges
from klein_kv.runtime.backends.pytorch.cuda_graphs import CudaCapture, StepGraphs
from klein_kv.runtime.backends.pytorch.graphs import Graph, make_graph
from klein_kv.runtime.backends.pytorch.memory import (
    TORCH_DTYPES,
    Staging,
    array_from_tensor,
    map_tensor,
    tensor_from_array,
)
from klein_kv.runtime.backends.pytorch.weights import FolderWeights, GivenWeights
from klein_kv.runtime.planning import memory

__all__ = ["TorchBackend"]

_log = logging.getLogger(__name__)


class TorchBackend:
    """Runs the graphs of an artifact folder, or on tensors at hand (`from_tensors`), with PyTorch.

    Args:
        weights: they say which graphs there are, and where these run.
        threads: CPU threads, which torch has one setting for in the whole process; None leaves it.
        compile_blocks: run the transformer's blocks through `torch.compile`, which needs Triton on
            a GPU and a C++ compiler on a CPU, and takes its time when a graph runs first.
        cuda_graphs: replay denoising steps as CUDA graphs from the second run at a shape on, at
            the price of a second place for keys and values; see `pytorch.cuda_graphs`.

    Attributes:
        name: "torch", and what else rounds in a way of its own, e.g. "torch-cuda-compiled".

    Raises:
        BackendError: an option that the device does not have.
    """

    def __init__(
        self,
        weights: FolderWeights | GivenWeights,
        *,
        threads: int | None = None,
        compile_blocks: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        device = weights.device
        if cuda_graphs and device.type != "cuda":
            raise BackendError(f"cuda_graphs is set, but the device is {device}; expected a GPU")
        if threads is not None:
            torch.set_num_threads(threads)
        kind = "-cuda" if device.type == "cuda" else ""
        self.name = f"torch{kind}-compiled" if compile_blocks else f"torch{kind}"
        self.device = device
        self._weights = weights
        self._compile_blocks = compile_blocks
        self._capture = CudaCapture(device) if cuda_graphs else None
        self._networks: dict[str, TorchOps] = {}  # by component, while one of its graphs is loaded
        self._loaded: dict[str, Graph] = {}

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        dtype: str,
        *,
        device: str | None = None,
        transformer: Mapping[str, torch.Tensor] | None = None,
        text_encoder: Mapping[str, torch.Tensor] | None = None,
        vae: Mapping[str, torch.Tensor] | None = None,
        **options: bool,
    ) -> Self:
        """A backend on weights that already lie on the device; nothing is copied.

        Args:
            config: shapes of the networks.
            dtype: type of weights and activations, e.g. "bfloat16".
            device: where the tensors lie; see `find_device`.
            transformer: tensors by the names of diffusers' `Flux2Transformer2DModel.state_dict()`;
                others are ignored. What is None has graphs that cannot be run.
            text_encoder: tensors by the names of transformers' `Qwen3ForCausalLM.state_dict()`.
            vae: tensors by the names of diffusers' `AutoencoderKLFlux2.state_dict()`.
            options: `compile_blocks` and `cuda_graphs`, as the class takes them.

        Raises:
            BackendError: a tensor is missing, has another shape or type, or lies elsewhere.
        """
        components = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        return cls(GivenWeights(components, config, dtype, device), **options)

    def prepare(
        self,
        graph: str,
        shapes: Mapping[str, tuple[int, ...]],
        kv: Mapping[str, Buffer] | None = None,
        *,
        eager: bool = False,
    ) -> None:
        with self._torch(graph):
            self._graph(graph)

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        with self._torch(graph):
            return self._graph(graph)(inputs)

    def upload(self, array: NDArray[Any]) -> Buffer:
        with self._torch("upload"):
            return tensor_from_array(array, self.device)

    def upload_weight(self, ref: WeightRef) -> Buffer:
        with self._torch("upload"):
            tensor = map_tensor(ref)
            return tensor if self.device.type == "cpu" else Staging(self.device).copy(tensor)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        with self._torch("download"):
            return array_from_tensor(buffer)

    def upload_kv(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Buffer]:
        return {name: self.upload(array) for name, array in arrays.items()}

    def view(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        return buffer.reshape(-1)[start : start + math.prod(shape)].view(shape)

    def assemble(self, shape: tuple[int, ...], parts: Iterable[Buffer]) -> Buffer:
        with self._torch("copy"):
            return torch.cat([part.reshape(-1) for part in parts]).view(shape)

    def release(self, graph: str) -> None:
        if self._loaded.pop(graph, None) is None:
            return
        component = self._component(graph)
        if all(self._component(other) != component for other in self._loaded):
            del self._networks[component]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def replace_weights(self, changes: WeightChanges) -> None:
        with self._torch("a change of weights"):
            network = self._networks.get("transformer")
            self._weights.replace(changes, {} if network is None else network.weights)

    def available_memory(self) -> int:
        if self.device.type == "cpu":
            return memory.available_memory()
        free, _total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)  # what torch keeps to reuse counts
        return int(free) + reserved - torch.cuda.memory_allocated(self.device)

    def graph_memory(self, graph: str) -> GraphMemory:
        component = self._component(graph)
        nbytes = self._weights.nbytes(component)
        copies = int(self._capture is not None and graph == "cached_step")
        return GraphMemory({component: nbytes} if nbytes else {}, kv_copies=copies)

    def scratch_bytes(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return None

    def close(self) -> None:
        for graph in list(self._loaded):
            self.release(graph)

    def mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        if self.device.type == "cpu":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _component(self, graph: str) -> str:
        """Whose weights a graph reads; "" of the small ones."""
        graphs = self._weights.graphs
        if graph in graphs.small_files:
            return ""
        if graph not in graphs.files:
            expected = ", ".join(graphs.files)
            raise ArtifactError(f"there is no graph {graph!r}, expected one of {expected}")
        return graphs.files[graph].partition("/")[0]

    def _graph(self, graph: str) -> Graph:
        """A graph, loaded if need be."""
        if graph in self._loaded:
            return self._loaded[graph]
        start = time.perf_counter()
        component = self._component(graph)
        graphs, config = self._weights.graphs, self._weights.config
        if component not in self._networks:
            weights = self._weights.load(component) if component else {}
            dtype = TORCH_DTYPES[graphs.dtype]
            self._networks[component] = TorchOps(weights, dtype, self._compile_blocks, self.device)
        function = make_graph(graph, config, self._networks[component], graphs.kv_dtype)
        if self._capture is not None and graph in ("cached_step", "plain_step"):
            names = kv_names(config.transformer.num_blocks, graphs.kv_dtype)
            function = StepGraphs(function, names, self._capture)
        self._loaded[graph] = function
        _log.info("loaded %s on %s in %.1f s", graph, self.device, time.perf_counter() - start)
        return function

    @contextlib.contextmanager
    def _torch(self, what: str) -> Iterator[None]:
        """No gradients, the backend's GPU as the current one, and errors of the project."""
        on_gpu = self.device.type == "cuda"
        place = torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()
        try:
            with torch.no_grad(), place:
                yield
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            # torch's CPU allocator has no error of its own.
            full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason
            if not full:
                raise BackendError(f"{what} failed in torch: {reason}") from error
            raise CapacityError(
                f"{what}: out of {'GPU ' if on_gpu else ''}memory ({reason}); use fewer "
                "references, a smaller output or a smaller batch"
            ) from error
