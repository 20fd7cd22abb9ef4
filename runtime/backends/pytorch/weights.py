"""The weights that each graph of an artifact folder needs, as torch takes them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from klein_kv.artifacts.config import ModelConfig, read_json
from klein_kv.artifacts.manifest import Manifest, graph_weights
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError, BackendError, CheckpointError
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.backends.pytorch.graphs import COMPONENTS
from klein_kv.runtime.backends.pytorch.memory import TORCH_DTYPES, DeviceWeights

__all__ = ["FolderWeights", "GivenWeights", "whole_weights"]

_VAE_CONFIG = "vae/config.json"

Tensors = Mapping[str, torch.Tensor]


def _parameters(component: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if component == "transformer":
        return transformer_parameters(config.transformer)
    return text_encoder_parameters(config.text_encoder)


class FolderWeights:
    """Weights of an artifact folder, on the device while a graph holds them.

    Args:
        artifacts: the folder.
        manifest: its manifest.
        graphs: which of its graphs.
        device: where the weights go.
    """

    def __init__(
        self, artifacts: Path, manifest: Manifest, graphs: GraphSet, device: torch.device
    ) -> None:
        self.on_device = DeviceWeights(device)
        self._artifacts = artifacts
        self._manifest = manifest
        self._files = graphs.files

    def tensors(self, graph: str) -> dict[str, torch.Tensor]:
        """What `graph` reads of the transformer's or the text encoder's weights.

        Raises:
            ArtifactError: the folder does not hold them.
            BackendError: they are of a type that torch does not compute with.
        """
        whole, used = self._find(graph)
        shapes = _parameters(COMPONENTS[graph], self._manifest.config)
        refs = {name: ref for name, ref in whole.items() if name in used}
        for name, ref in refs.items():
            if ref.shape != shapes.get(name):
                raise ArtifactError(
                    f"{self._artifacts}: {name} has shape {ref.shape}, expected "
                    f"{shapes.get(name, 'no such tensor')}; export again"
                )
        return self.on_device.load(refs)

    def vae(self, graph: str) -> torch.nn.Module:
        """diffusers' VAE with the weights that `graph` reads; the others are on "meta".

        Raises:
            ArtifactError: the folder does not hold them, or not the VAE's configuration.
        """
        from klein_kv.networks.vae import build_vae  # diffusers takes seconds to import

        if _VAE_CONFIG not in self._manifest.files:
            raise ArtifactError(
                f"{self._artifacts} has no {_VAE_CONFIG}, which the torch backend needs; it was "
                "exported by an older klein-kv, export again"
            )
        try:
            config = read_json(self._artifacts / _VAE_CONFIG, "vae config")
            with torch.device("meta"):
                vae = build_vae(config, TORCH_DTYPES[self._manifest.dtype])
        except CheckpointError as error:
            raise ArtifactError(f"{self._artifacts}: {error}; export again") from error
        whole, used = self._find(graph)
        tensors = self.on_device.load({name: whole[name] for name in used})
        try:
            vae.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:
            raise ArtifactError(
                f"{self._artifacts}: the VAE's weights do not fit {_VAE_CONFIG} ({error}); export "
                "again"
            ) from error
        if vae.use_slicing is False:
            vae.enable_slicing()  # one image of a batch at a time: memory of one
        module: torch.nn.Module = vae.requires_grad_(False)
        return module

    def nbytes(self, graph: str) -> dict[WeightRef, int]:
        """Bytes of each tensor that `graph` takes on the device; none on a CPU, which maps files.

        Raises:
            ArtifactError: the folder does not hold them.
        """
        if self.on_device.device.type == "cpu":
            return {}
        whole, used = self._find(graph)
        return {ref: ref.nbytes for name, ref in whole.items() if name in used}

    def _find(self, graph: str) -> tuple[dict[str, WeightRef], set[str]]:
        """All weights of the graph's component, and the names of those that it reads."""
        tables = {
            name: graph_weights(self._artifacts, file)
            for name, file in self._files.items()
            if COMPONENTS[name] == COMPONENTS[graph]
        }
        whole = whole_weights(item for table in tables.values() for item in table.items())
        return whole, {key.partition("[")[0] for key in tables[graph]}


class GivenWeights:
    """Weights that somebody else holds on the device.

    Args:
        config: shapes of the networks.
        dtype: type of all tensors.
        device: where they lie.
        components: tensors by name of "transformer" and "text_encoder"; None for one that is not
            there.
        vae: diffusers' module.

    Raises:
        BackendError: a tensor is missing, has another shape or type, or lies elsewhere.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        components: Mapping[str, Tensors | None],
        vae: torch.nn.Module | None,
    ) -> None:
        self._components: dict[str, dict[str, torch.Tensor]] = {}
        self._vae = vae
        for component, tensors in components.items():
            if tensors is None:
                continue
            shapes = _parameters(component, config)
            for name, shape in shapes.items():
                expected = f"{dtype} {shape} on {device}"
                tensor = tensors.get(name)
                if tensor is None:
                    raise BackendError(
                        f"{component}: tensor {name} is missing, expected {expected}"
                    )
                if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
                    raise BackendError(
                        f"{component}: {name} is {tensor.dtype} {tuple(tensor.shape)} on "
                        f"{tensor.device}, expected {expected}"
                    )
            self._components[component] = {name: tensors[name].detach() for name in shapes}

    def tensors(self, graph: str) -> dict[str, torch.Tensor]:
        """The transformer's or the text encoder's tensors.

        Raises:
            BackendError: they were not given.
        """
        if COMPONENTS[graph] not in self._components:
            raise self._absent(graph)
        return self._components[COMPONENTS[graph]]

    def vae(self, graph: str) -> torch.nn.Module:
        """The module that was given.

        Raises:
            BackendError: none was.
        """
        if self._vae is None:
            raise self._absent(graph)
        return self._vae

    def nbytes(self, _graph: str) -> dict[WeightRef, int]:
        """Nothing: what somebody else holds is not the backend's to free."""
        return {}

    def _absent(self, graph: str) -> BackendError:
        return BackendError(
            f"{graph} cannot be run: this backend was made without the {COMPONENTS[graph]}'s "
            "weights; give them to from_tensors"
        )


def whole_weights(table: Iterable[tuple[str, WeightRef]]) -> dict[str, WeightRef]:
    """Joins the row ranges that graphs name apart: `x[0:8]` and `x[8:24]` make `x`.

    Args:
        table: initializers of all graphs of one component, by name.

    Returns:
        Whole tensors by the checkpoint's names.

    Raises:
        ArtifactError: rows are missing, or are not neighbours in the file.
    """
    whole: dict[str, WeightRef] = {}
    parts: dict[str, dict[tuple[int, int], WeightRef]] = {}
    for key, ref in table:
        name, _, span = key.partition("[")
        if span:
            first, _, last = span.rstrip("]").partition(":")
            parts.setdefault(name, {})[int(first), int(last)] = ref
        else:
            whole[name] = ref
    for name, rows in parts.items():
        if name not in whole:
            whole[name] = _join(name, rows)
    return whole


def _join(name: str, rows: Mapping[tuple[int, int], WeightRef]) -> WeightRef:
    start = rows[min(rows)]
    end, offset = 0, start.offset
    for (first, last), ref in sorted(rows.items(), key=lambda item: item[0]):
        if first != end or ref.offset != offset or ref.path != start.path:
            raise ArtifactError(
                f"{name}: rows {first} to {last} at byte {ref.offset} of {ref.path.name} do not "
                f"follow row {end}, which ends at byte {offset} of {start.path.name}; export again"
            )
        end, offset = last, offset + ref.nbytes
    shape = (end, *start.shape[1:])
    return WeightRef(start.path, start.offset, offset - start.offset, start.dtype, shape)
