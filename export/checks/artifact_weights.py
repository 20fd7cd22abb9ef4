"""The weights of an artifact folder as whole tensors, and as torch reads them.

The tables beside the graphs list what each graph reads, and a graph may read ranges of rows. Here
they are whole again, under the checkpoint's names. Tensors are mapped when they are used and let go
afterwards, so that a model larger than memory can be run, slowly.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.weights import WeightRef, graph_weights, whole_weights
from klein_kv.errors import ArtifactError
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.backends.pytorch.memory import map_tensor

__all__ = ["MappedWeights", "component_parameters", "component_weights"]


def component_parameters(config: ModelConfig, component: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of "transformer" or "text_encoder"."""
    if component == "transformer":
        return transformer_parameters(config.transformer)
    return text_encoder_parameters(config.text_encoder)


def component_weights(folder: Path, manifest: Manifest, component: str) -> dict[str, WeightRef]:
    """Where each tensor of "transformer" or "text_encoder" lies.

    An `ArtifactError` tells of one that the graphs' tables lack, or have in another shape.
    """
    graph = "text_encoder"
    if component == "transformer":
        graph = "first_step" if manifest.variant == "kv" else "plain_step"
    whole = whole_weights(graph_weights(folder, manifest.graphs.files[graph]))
    shapes = component_parameters(manifest.config, component)
    for name, shape in shapes.items():
        if name not in whole or whole[name].shape != shape:
            got = f"of shape {whole[name].shape}" if name in whole else "missing"
            raise ArtifactError(
                f"{folder}: {name} is {got} in the weight table of graph {graph}, expected shape "
                f"{shape}; export the checkpoint again"
            )
    return {name: whole[name] for name in shapes}


class MappedWeights(Mapping[str, torch.Tensor]):
    """Tensors in files, read anew at each use; floats in `dtype`, where one is given."""

    def __init__(
        self,
        refs: Mapping[str, WeightRef],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._refs = refs
        self._dtype = dtype
        self._device = torch.device(device)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = map_tensor(self._refs[name])
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)
