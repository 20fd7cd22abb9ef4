"""The weights of an artifact folder as whole tensors, and as torch reads them.

The tables beside the graphs list what each graph reads, and a graph may read ranges of rows. Here
they are whole again, under the checkpoint's names. Tensors are mapped when they are used and let go
afterwards, so that a model larger than memory can be run, slowly.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from klein_kv.artifacts.config import ModelConfig, tensor_bytes
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.weights import WeightRef, graph_weights
from klein_kv.errors import ArtifactError
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters

__all__ = ["MappedWeights", "component_parameters", "component_weights"]


def component_parameters(config: ModelConfig, component: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of "transformer" or "text_encoder"."""
    if component == "transformer":
        return transformer_parameters(config.transformer)
    return text_encoder_parameters(config.text_encoder)


def component_weights(folder: Path, manifest: Manifest, component: str) -> dict[str, WeightRef]:
    """Where each tensor of "transformer" or "text_encoder" lies.

    Raises:
        ArtifactError: a tensor is missing from the graphs' tables, or has another shape.
    """
    graph = "text_encoder"
    if component == "transformer":
        graph = "first_step" if manifest.variant == "kv" else "plain_step"
    file = manifest.graphs.files[graph]
    shapes = component_parameters(manifest.config, component)
    whole: dict[str, WeightRef] = {}
    for key, ref in graph_weights(folder, file).items():
        name, _, rows = key.partition("[")
        if name in shapes and name not in whole:
            whole[name] = _whole(ref, rows, shapes[name])
    missing = [name for name in shapes if name not in whole]
    if missing:
        raise ArtifactError(
            f"{folder}: the weight table of graph {graph} has no {missing[0]} (and "
            f"{len(missing) - 1} more are missing); export the checkpoint again"
        )
    return whole


def _whole(ref: WeightRef, rows: str, shape: tuple[int, ...]) -> WeightRef:
    first = int(rows.partition(":")[0]) if rows else 0
    row_bytes = tensor_bytes(ref.dtype, shape[1:])
    start, nbytes = ref.offset - first * row_bytes, tensor_bytes(ref.dtype, shape)
    if ref.shape[1:] != shape[1:] or start < 0 or start + nbytes > ref.path.stat().st_size:
        raise ArtifactError(
            f"{ref.path}: rows {rows or 'all'} of shape {ref.shape} are no part of a tensor of "
            f"shape {shape}; export the checkpoint again"
        )
    return WeightRef(ref.path, start, nbytes, ref.dtype, shape)


class MappedWeights(Mapping[str, torch.Tensor]):
    """Tensors in files, read anew at each use.

    Args:
        refs: where they lie.
        dtype: what to convert floats to; None leaves them.
        device: where to put them.
    """

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
        ref = self._refs[name]
        # Copy on write: nothing is written, but torch takes no read-only arrays without a warning.
        mapped = np.memmap(ref.path, np.uint8, "c", ref.offset, (ref.nbytes,))
        tensor = torch.from_numpy(mapped).view(getattr(torch, ref.dtype)).reshape(ref.shape)
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)
