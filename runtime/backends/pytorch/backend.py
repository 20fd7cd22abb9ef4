"""Backend "torch": the project's own networks on a CPU or any CUDA GPU, without engines.

Transformer and text encoder are those of `klein_kv.networks`, the VAE is diffusers'. Buffers are
torch tensors; outputs of one graph are inputs of the next without a copy. On a GPU nothing waits
for the device but a download (and a weight's upload, for its staging buffer).
"""

import contextlib
import logging
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet, kv_names
from klein_kv.errors import BackendError, CapacityError
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.runtime.backends.backend import Buffer, GraphMemory
from klein_kv.runtime.backends.pytorch.cuda_graphs import CudaCapture, StepGraphs
from klein_kv.runtime.backends.pytorch.graphs import (
    COMPONENTS,
    Graph,
    text_encoder_graph,
    transformer_graph,
    vae_graph,
)
from klein_kv.runtime.backends.pytorch.memory import (
    TORCH_DTYPES,
    array_from_tensor,
    find_device,
    free_bytes,
    tensor_from_array,
)
from klein_kv.runtime.backends.pytorch.weights import FolderWeights, GivenWeights

__all__ = ["ATTENTION", "TorchBackend"]

_log = logging.getLogger(__name__)

_OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ATTENTION: dict[str, list[SDPBackend]] = {
    "auto": [],
    "flash": _OTHERS,
    "cudnn": [SDPBackend.CUDNN_ATTENTION, *_OTHERS],
}
"""Attention kernels in order of preference: torch's own order, flash attention first, or cuDNN's
first, which knows instructions of newer GPUs. The first that takes an input computes it."""


class TorchBackend:
    """Runs an artifact folder, or tensors at hand (`from_tensors`), with PyTorch.

    Args:
        artifacts: the folder, its manifest checked.
        manifest: the manifest.
        device: "cpu", "cuda" or "cuda:N"; None for the first GPU, else the CPU.
        threads: CPU threads, which torch has one setting for in the whole process; None leaves it.
        graphs: which graphs of the folder; None takes the manifest's.
        compile_blocks: run the transformer's blocks through `torch.compile`, which needs Triton on
            a GPU and a C++ compiler on a CPU, and takes its time when a graph runs first.
        cuda_graphs: replay denoising steps as CUDA graphs from the second run at a shape on, at
            the price of a second place for keys and values; see `torch_cuda_graphs`.
        attention: a key of `ATTENTION`: which of torch's attention kernels come first.
        split_attention: attend to references and to the rest apart, so that keys and values are
            neither copied at every step nor repeated for a batch; see `split_attention`.

    Attributes:
        name: "torch", and what else rounds in a way of its own, e.g. "torch-cuda-compiled".
        device: where it runs.

    Raises:
        BackendError: no such device, or an option that it does not have.
    """

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        *,
        device: str | None = None,
        threads: int | None = None,
        graphs: GraphSet | None = None,
        compile_blocks: bool = False,
        cuda_graphs: bool = False,
        attention: str = "auto",
        split_attention: bool = False,
    ) -> None:
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and (not whole or threads < 1):
            raise BackendError(f"threads is {threads!r}, expected a whole number of 1 or more")
        graphs = graphs or manifest.graphs
        if graphs.quantized or graphs.attention:
            raise BackendError(
                f"the torch backend does not compute precision {graphs.precision!r}; use engines, "
                "ONNX Runtime, or `klein-kv verify --precision` to simulate it"
            )
        place = find_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        weights = FolderWeights(artifacts, manifest, graphs, place)
        self._open(
            manifest.config,
            graphs,
            place,
            weights,
            compile_blocks=compile_blocks,
            cuda_graphs=cuda_graphs,
            attention=attention,
            split_attention=split_attention,
        )

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        dtype: str,
        *,
        device: str | None = None,
        transformer: Mapping[str, torch.Tensor] | None = None,
        text_encoder: Mapping[str, torch.Tensor] | None = None,
        vae: torch.nn.Module | None = None,
        compile_blocks: bool = False,
        cuda_graphs: bool = False,
        attention: str = "auto",
        split_attention: bool = False,
    ) -> Self:
        """A backend on weights that already lie on the device; nothing is copied.

        Args:
            config: shapes of the networks.
            dtype: type of weights and activations, e.g. "bfloat16".
            device: where the tensors lie; None as in the constructor.
            transformer: tensors by the names of diffusers' `Flux2Transformer2DModel.state_dict()`;
                others are ignored. None: the transformer's graphs cannot be run.
            text_encoder: tensors by the names of transformers' `Qwen3ForCausalLM.state_dict()`,
                alike.
            vae: diffusers' `AutoencoderKLFlux2`, alike.
            compile_blocks: see the class.
            cuda_graphs: see the class.
            attention: see the class.
            split_attention: see the class.

        Raises:
            BackendError: a tensor is missing, has another shape or type, or lies elsewhere.
        """
        place = find_device(device)
        components = {"transformer": transformer, "text_encoder": text_encoder}
        weights = GivenWeights(config, TORCH_DTYPES[dtype], place, components, vae)
        self = cls.__new__(cls)
        self._open(
            config,
            GraphSet("kv", dtype),
            place,
            weights,
            compile_blocks=compile_blocks,
            cuda_graphs=cuda_graphs,
            attention=attention,
            split_attention=split_attention,
        )
        return self

    def _open(
        self,
        config: ModelConfig,
        graphs: GraphSet,
        device: torch.device,
        weights: FolderWeights | GivenWeights,
        *,
        compile_blocks: bool,
        cuda_graphs: bool,
        attention: str,
        split_attention: bool,
    ) -> None:
        if cuda_graphs and device.type != "cuda":
            raise BackendError(f"cuda_graphs is set, but the device is {device}; expected a GPU")
        if attention not in ATTENTION:
            raise BackendError(
                f"attention is {attention!r}, expected one of {', '.join(ATTENTION)}"
            )
        kind = "-cuda" if device.type == "cuda" else ""
        kernels = "" if attention == "auto" else f"-{attention}"
        split = "-split" * split_attention
        self.name = f"torch{kind}{'-compiled' * compile_blocks}{kernels}{split}"
        self.device = device
        self._config = config
        self._graphs = graphs
        self._weights = weights
        self._attention = ATTENTION[attention]
        self._apart = None
        if split_attention:
            self._apart = "cudnn" if attention == "cudnn" else "flash"
        self._compile_blocks = compile_blocks
        self._capture = CudaCapture(device) if cuda_graphs else None
        self._loaded: dict[str, Graph] = {}

    def prepare(
        self,
        graph: str,
        shapes: Mapping[str, tuple[int, ...]],
        kv: Mapping[str, Buffer] | None = None,
        *,
        eager: bool = False,
    ) -> None:
        with self._here(), _errors(graph):
            if graph not in self._loaded:
                self._load(graph)

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        with self._here(), _errors(graph):
            function = self._loaded.get(graph) or self._load(graph)
            return function(inputs)

    def upload(self, array: NDArray[Any]) -> Buffer:
        with self._here(), _errors("upload"):
            return tensor_from_array(array, self.device)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        with _errors("download"):
            return array_from_tensor(buffer)

    def upload_kv(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Buffer]:
        return {name: self.upload(array) for name, array in arrays.items()}

    def view(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        view: torch.Tensor = buffer.reshape(-1)[start : start + math.prod(shape)].view(shape)
        return view

    def assemble(self, shape: tuple[int, ...], parts: Iterable[Buffer]) -> Buffer:
        with self._here(), _errors("copy"):
            return torch.cat([part.reshape(-1) for part in parts]).view(shape)

    def release(self, graph: str) -> None:
        if self._loaded.pop(graph, None) is not None and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def available_memory(self) -> int:
        return free_bytes(self.device)

    def graph_memory(self, graph: str) -> GraphMemory:
        weights: dict[Hashable, int] = dict(self._weights.nbytes(graph).items())
        copies = int(self._capture is not None and graph == "cached_step")
        return GraphMemory(weights, kv_copies=copies)

    def scratch_bytes(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return None

    def close(self) -> None:
        for graph in list(self._loaded):
            self.release(graph)

    def mark(self) -> object:
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

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """No gradients, the backend's GPU as the current one, and its attention kernels."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            if self._attention:
                stack.enter_context(sdpa_kernel(self._attention, set_priority=True))
            yield

    def _load(self, graph: str) -> Graph:
        start = time.perf_counter()
        self._graphs.signature(graph, self._config)  # a KeyError for what is no graph
        function: Graph
        kv_dtype = self._graphs.kv_dtype
        if COMPONENTS[graph] == "vae":
            function = vae_graph(graph, self._weights.vae(graph))
        else:
            tensors = self._weights.tensors(graph)
            dtype = TORCH_DTYPES[self._graphs.dtype]
            ops = TorchOps(tensors, dtype, self._compile_blocks, self._apart)
            if graph == "text_encoder":
                function = text_encoder_graph(self._config, ops)
            else:
                function = transformer_graph(graph, self._config, ops, kv_dtype)
        if self._capture is not None and graph in ("cached_step", "plain_step"):
            names = kv_names(self._config.transformer.num_blocks, kv_dtype)
            function = StepGraphs(function, names, self._capture)
        self._loaded[graph] = function
        _log.info("loaded %s on %s in %.1f s", graph, self.device, time.perf_counter() - start)
        return function


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turns torch's errors into the project's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{what}: out of GPU memory ({_first_line(error)}); use fewer references, a smaller "
            "output or a smaller batch"
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch's CPU allocator has no error of its own
            raise CapacityError(
                f"{what}: out of memory ({_first_line(error)}); use fewer references, a smaller "
                "output or a smaller batch"
            ) from error
        raise BackendError(f"{what} failed in torch: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
