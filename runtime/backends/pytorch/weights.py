"""The weights that the graphs need, as torch takes them: an artifact folder's, or given ones."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import WeightRef, graph_weights, whole_weights
from klein_kv.errors import ArtifactError, BackendError
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.networks.vae import vae_parameters
from klein_kv.runtime.backends.backend import DeviceContent, WeightChanges, keep_changes
from klein_kv.runtime.backends.pytorch.memory import (
    TORCH_DTYPES,
    Staging,
    find_device,
    map_tensor,
    tensor_from_array,
)

__all__ = ["FolderWeights", "GivenWeights"]


class FolderWeights:
    """Weights of an artifact folder whose manifest has been checked.

    Raises:
        BackendError: no such device, or graphs of a precision that torch does not compute.
    """

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        graphs: GraphSet | None = None,
        device: str | None = None,
    ) -> None:
        self.config = manifest.config
        self.graphs = graphs or manifest.graphs
        self.device = find_device(device)
        self._artifacts = artifacts
        self._changes: dict[str, Callable[[], Any]] = {}
        if self.graphs.quantized or self.graphs.attention:
            raise BackendError(
                f"the torch backend does not compute precision {self.graphs.precision!r}; use "
                "engines, ONNX Runtime, or `klein-kv verify --precision` to simulate it"
            )

    def load(self, component: str) -> dict[str, torch.Tensor]:
        """The tensors of "transformer", "text_encoder" or "vae" by name.

        Raises:
            ArtifactError: the folder does not hold them as the networks need them.
        """
        # In the order of the files, which are read as they are copied.
        refs = self._refs(component)
        in_order = sorted(refs.items(), key=lambda x: (x[1].path, x[1].offset))
        tensors = {name: map_tensor(ref) for name, ref in in_order}
        if self.device.type != "cpu":
            staging = Staging(self.device)
            tensors = {name: staging.copy(tensor) for name, tensor in tensors.items()}
        if component == "transformer":
            self._write(tensors, self._changes, refs)
        try:
            return _checked(component, tensors, self.config, self.graphs.dtype, self.device)
        except BackendError as error:
            raise ArtifactError(f"{self._artifacts}: {error}; export again") from error

    def nbytes(self, component: str) -> int:
        """Bytes that a component takes on the device; none on a CPU, which maps files."""
        if self.device.type == "cpu":
            return 0
        return sum(ref.nbytes for ref in self._refs(component).values())

    def replace(self, changes: WeightChanges, loaded: Mapping[str, torch.Tensor]) -> None:
        """Gives tensors of the transformer another content: loaded ones in place, others later."""
        keep_changes(self._changes, changes)
        if loaded:
            self._write(loaded, changes, self._refs("transformer"))

    def _write(
        self,
        tensors: Mapping[str, torch.Tensor],
        names: Iterable[str],
        refs: Mapping[str, WeightRef],
    ) -> None:
        """Writes into tensors what they should hold now; their own content lies at `refs`."""
        for name in names:
            change = self._changes.get(name)
            content = map_tensor(refs[name]) if change is None else change()
            pieces = content if isinstance(change, DeviceContent) else [(slice(None), content)]
            for rows, piece in pieces:
                if not isinstance(piece, torch.Tensor):
                    piece = tensor_from_array(piece, torch.device("cpu"))
                tensors[name][rows].copy_(piece)

    def _refs(self, component: str) -> dict[str, WeightRef]:
        table: dict[str, WeightRef] = {}
        for file in self.graphs.files.values():
            if file.startswith(f"{component}/"):
                table |= graph_weights(self._artifacts, file)
        return whole_weights(table)


class GivenWeights:
    """Weights that somebody else holds on the device; see `TorchBackend.from_tensors`.

    Raises:
        BackendError: a tensor is missing, has another shape or type, or lies elsewhere.
    """

    def __init__(
        self,
        components: Mapping[str, Mapping[str, torch.Tensor] | None],
        config: ModelConfig,
        dtype: str,
        device: str | None,
    ) -> None:
        self.config = config
        self.graphs = GraphSet("kv", dtype)
        self.device = find_device(device)
        self._components = {
            name: _checked(name, given, config, dtype, self.device)
            for name, given in components.items()
            if given is not None
        }

    def load(self, component: str) -> dict[str, torch.Tensor]:
        """What was given, as `FolderWeights.load` returns it; BackendError: it was not given."""
        if component not in self._components:
            raise BackendError(
                f"this backend was made without the {component}'s weights; give them to "
                "from_tensors"
            )
        return self._components[component]

    def replace(self, _changes: WeightChanges, _loaded: Mapping[str, torch.Tensor]) -> None:
        """Refused, with a BackendError: they are somebody else's."""
        raise BackendError(
            "this backend runs on weights that somebody else holds, and does not change them; "
            "open the artifact folder with from_pretrained to use adapters"
        )

    def nbytes(self, _component: str) -> int:
        """None: what somebody else holds is not the backend's to free."""
        return 0


def _checked(
    component: str,
    tensors: Mapping[str, torch.Tensor],
    config: ModelConfig,
    dtype: str,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The tensors that a network reads; BackendError: one is missing, or is not as it should be."""
    if component == "transformer":
        shapes = transformer_parameters(config.transformer)
    elif component == "vae":
        shapes = vae_parameters(config.vae)
    else:
        shapes = text_encoder_parameters(config.text_encoder)
    for name, shape in shapes.items():
        wanted = shape, TORCH_DTYPES[dtype], device
        expected = f"expected {wanted[1]} {shape} on {device}"
        tensor = tensors.get(name)
        if tensor is None:
            raise BackendError(f"{component}: tensor {name} is missing, {expected}")
        if (tensor.shape, tensor.dtype, tensor.device) != wanted:
            raise BackendError(
                f"{component}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"{expected}"
            )
    return {name: tensors[name].detach() for name in shapes}
