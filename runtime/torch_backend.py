"""Backend "torch": the project's own networks on a CPU or any CUDA GPU, without engines.

Transformer and text encoder are `klein_kv.model` and `text_model`, the VAE is diffusers'. The same
named buffers as the other backends', here torch tensors; outputs of one graph are inputs of the
next without a copy, and nothing synchronises except a download.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from klein_kv.config import ModelConfig, read_json
from klein_kv.errors import ArtifactError, BackendError, CapacityError, CheckpointError
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.model import transformer_parameters
from klein_kv.runtime.backend import Buffer
from klein_kv.runtime.torch_graphs import (
    COMPONENTS,
    Graph,
    text_encoder_graph,
    transformer_graph,
    vae_graph,
)
from klein_kv.runtime.torch_weights import TORCH_DTYPES, DeviceWeights, whole_weights
from klein_kv.signature import VARIANTS, make_signature
from klein_kv.text_model import text_encoder_parameters
from klein_kv.torch_ops import TorchOps
from klein_kv.weights import NUMPY_DTYPES

__all__ = ["TorchBackend", "find_device"]

_log = logging.getLogger(__name__)
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_VAE_CONFIG = "vae/config.json"

Tensors = Mapping[str, torch.Tensor]


def find_device(name: str | None) -> torch.device:
    """The device of that name; None for the first GPU, or the CPU where there is none.

    Raises:
        BackendError: no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise BackendError(
            f"device is {name!r}, but torch {torch.__version__} sees {count} CUDA GPUs; use "
            "another device, or install a driver and a torch built for CUDA"
        )
    return torch.device("cuda", index)


class TorchBackend:
    """Runs an artifact folder, or tensors at hand (`from_tensors`), with PyTorch.

    Args:
        artifacts: the folder, its manifest checked.
        manifest: the manifest.
        device: "cpu", "cuda" or "cuda:N"; None for the first GPU, else the CPU.
        threads: CPU threads, a setting of the whole process in torch; None leaves it.
        compile_blocks: run the transformer's blocks through `torch.compile`; needs a C++ compiler
            (CPU) or Triton (GPU), and takes a minute or so when a graph runs first.
        cuda_graphs: replay `cached_step` as a CUDA graph from its second run at a shape on; see
            `torch_cuda_graphs`.

    Raises:
        BackendError: no such device, or an option that it does not have.
    """

    name = "torch"

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        *,
        device: str | None = None,
        threads: int | None = None,
        compile_blocks: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        weights = _FolderWeights(artifacts, manifest, find_device(device))
        self._open(
            manifest.config,
            manifest.dtype,
            weights.device,
            weights.load,
            threads=threads,
            compile_blocks=compile_blocks,
            cuda_graphs=cuda_graphs,
        )

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        dtype: str,
        *,
        device: str | None = None,
        transformer: Tensors | None = None,
        text_encoder: Tensors | None = None,
        vae: torch.nn.Module | None = None,
        compile_blocks: bool = False,
        cuda_graphs: bool = False,
    ) -> Self:
        """A backend on weights that already lie on the device; nothing is copied.

        Args:
            config: shapes of the networks.
            dtype: type of weights and activations, e.g. "bfloat16".
            device: where the tensors lie; None as in the constructor.
            transformer: tensors by the names of diffusers' `Flux2Transformer2DModel.state_dict()`;
                other names are ignored. None: the transformer's graphs cannot be run.
            text_encoder: tensors by the names of transformers' `Qwen3ForCausalLM.state_dict()`,
                alike.
            vae: diffusers' `AutoencoderKLFlux2`, alike.
            compile_blocks: see the class.
            cuda_graphs: see the class.

        Raises:
            BackendError: a tensor is missing, has another shape or type, or lies elsewhere.
        """
        self = cls.__new__(cls)
        place = find_device(device)
        parts: dict[str, Any] = {"vae": vae}
        for part, tensors, shapes in (
            ("transformer", transformer, transformer_parameters(config.transformer)),
            ("text_encoder", text_encoder, text_encoder_parameters(config.text_encoder)),
        ):
            if tensors is not None:
                parts[part] = _checked(part, tensors, shapes, TORCH_DTYPES[dtype], place)

        def load(graph: str) -> Any:
            found = parts.get(COMPONENTS[graph])
            if found is None:
                raise BackendError(
                    f"{graph} cannot be run: this backend was made without {COMPONENTS[graph]}"
                )
            return found

        self._open(
            config,
            dtype,
            place,
            load,
            threads=None,
            compile_blocks=compile_blocks,
            cuda_graphs=cuda_graphs,
        )
        return self

    def _open(
        self,
        config: ModelConfig,
        dtype: str,
        device: torch.device,
        load: Callable[[str], Any],
        *,
        threads: int | None,
        compile_blocks: bool,
        cuda_graphs: bool,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._load_weights = load
        self._graphs: dict[str, Graph] = {}

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        function = self._graphs.get(graph) or self._load(graph)
        try:
            with torch.no_grad():
                return function(inputs)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{graph} ran out of memory on {self.device}: {error}; use fewer references, a "
                "smaller output, or a smaller batch"
            ) from error
        except RuntimeError as error:
            raise BackendError(f"{graph} failed in torch: {error}") from error

    def upload(self, array: NDArray[Any]) -> Buffer:
        return _tensor_from_array(array).to(self.device)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        return _array_from_tensor(buffer)

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        view: torch.Tensor = buffer.view(shape)
        return view

    def release(self, graph: str) -> None:
        self._graphs.pop(graph, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, graph: str) -> Graph:
        weights = self._load_weights(graph)
        if COMPONENTS[graph] == "vae":
            function = vae_graph(graph, weights)
        else:
            ops = TorchOps(weights, TORCH_DTYPES[self.dtype])
            function = (
                text_encoder_graph(self.config, ops)
                if graph == "text_encoder"
                else transformer_graph(graph, self.config, ops)
            )
        self._graphs[graph] = function
        return function


def _checked(
    part: str,
    tensors: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The tensors of these names, without their gradients."""
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        expected = f"{dtype} {shape} on {device}"
        if tensor is None:
            raise BackendError(f"{part}: tensor {name} is missing, expected {expected}")
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, device):
            raise BackendError(
                f"{part}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"expected {expected}"
            )
    return {name: tensors[name].detach() for name in shapes}


class _FolderWeights:
    """Finds and places what each graph of an artifact folder needs."""

    def __init__(self, artifacts: Path, manifest: Manifest, device: torch.device) -> None:
        self.device = device
        self._artifacts = artifacts
        self._manifest = manifest
        self._weights = DeviceWeights(device)

    def load(self, graph: str) -> Any:
        """The graph's weights by name; for the VAE a module that holds them."""
        component = COMPONENTS[graph]
        graphs = [name for name in VARIANTS[self._manifest.variant] if COMPONENTS[name] == component]
        tables = {name: graph_weights(self._artifacts, name) for name in graphs}
        whole = whole_weights({key: ref for table in tables.values() for key, ref in table.items()})
        used = {key.partition("[")[0] for key in tables[graph]}
        if component == "vae":
            return self._vae({name: whole[name] for name in used})
        config = self._manifest.config
        shapes = (
            transformer_parameters(config.transformer)
            if component == "transformer"
            else text_encoder_parameters(config.text_encoder)
        )
        wanted = {name: shape for name, shape in shapes.items() if name in used}
        for name, shape in wanted.items():
            if whole[name].shape != shape:
                raise ArtifactError(
                    f"{graph}: {name} has shape {whole[name].shape}, expected {shape}; export again"
                )
        return self._weights.load({name: whole[name] for name in wanted})

    def _vae(self, refs: Mapping[str, Any]) -> torch.nn.Module:
        from klein_kv.vae_model import build_vae

        if _VAE_CONFIG not in self._manifest.files:
            raise ArtifactError(
                f"{self._artifacts} has no {_VAE_CONFIG}, which the torch backend needs: it was "
                "exported by an older klein-kv; export again"
            )
        try:
            config = read_json(self._artifacts / _VAE_CONFIG, "vae config")
            with torch.device("meta"):
                vae = build_vae(config, TORCH_DTYPES[self._manifest.dtype])
        except CheckpointError as error:
            raise ArtifactError(f"{self._artifacts}: {error}; export again") from error
        # What the graph does not use stays on "meta", without memory.
        vae.load_state_dict(self._weights.load(refs), strict=False, assign=True)
        return vae.requires_grad_(False)


def _tensor_from_array(array: NDArray[Any]) -> torch.Tensor:
    """A tensor with memory of its own."""
    names = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
    name = names.get(array.dtype)
    if name not in TORCH_DTYPES:
        raise BackendError(f"cannot upload {array.dtype}, expected one of {', '.join(TORCH_DTYPES)}")
    copy = np.array(array, order="C", copy=True)
    if name == "bfloat16":  # which numpy does not know by itself
        return torch.from_numpy(copy.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def _array_from_tensor(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype != torch.bfloat16:
        array: NDArray[Any] = tensor.numpy()
        return array
    return tensor.view(torch.uint16).numpy().view(NUMPY_DTYPES["bfloat16"])
