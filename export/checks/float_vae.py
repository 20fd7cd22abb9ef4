"""The VAE of an artifact folder in float32 on a CPU, whatever type its graphs have.

Calibration and quality measurements need reference tokens and images where no backend runs bfloat16
graphs, and should not depend on the VAE's rounding.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.weights import WeightRef, graph_weights, map_weight
from klein_kv.errors import ArtifactError, BackendError

__all__ = ["FloatVae"]

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


class FloatVae:
    """Encodes reference images and decodes latents.

    Args:
        artifacts: the artifact folder, its files checked.
        manifest: its manifest.
        threads: CPU threads; None lets ONNX Runtime choose.

    Raises:
        BackendError: onnxruntime is not installed.
    """

    def __init__(self, artifacts: Path, manifest: Manifest, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                "the VAE runs in onnxruntime, which is not installed; install it with "
                "pip install 'klein-kv[cpu]'"
            ) from error
        self._ort = onnxruntime
        self._artifacts = artifacts
        self._files = manifest.graphs.files
        self._threads = threads
        self._sessions: dict[str, Any] = {}

    def encode(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Reference tokens [1, h, w, C] of pixels [1, H, W, 3]."""
        tokens: NDArray[np.float32] = self._run("vae_encoder", "image", image)[0]
        return tokens

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Images [B, H, W, 3] of latents in grid order [B, h, w, C]."""
        image: NDArray[np.uint8] = self._run("vae_decoder", "latents", latents)[0]
        return image

    def _run(self, graph: str, name: str, array: NDArray[Any]) -> Any:
        if graph not in self._sessions:
            self._sessions[graph] = self._load(graph)
        return self._sessions[graph].run(None, {name: array})

    def _load(self, graph: str) -> Any:
        path = self._artifacts / self._files[graph]
        model = ir.load(path)
        _widen(model.graph, graph_weights(self._artifacts, self._files[graph]))
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        try:
            return self._ort.InferenceSession(
                ir.to_proto(model).SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise ArtifactError(
                f"{os.fspath(path)} cannot be run in float32: {error}; export again"
            ) from error


def _widen(graph: ir.Graph, weights: Mapping[str, WeightRef]) -> None:
    """Makes every narrow float of a graph float32, and takes its weights in (under 1 GB)."""
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        if value.dtype in _NARROW:
            value.dtype = ir.DataType.FLOAT
    for name, ref in weights.items():  # onnx_ir itself reads no file that has several links
        graph.initializers[name].const_value = ir.tensor(_wide(map_weight(ref)), name=name)
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if name == "to" and attribute.value in _NARROW:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _NARROW:
                tensor = ir.tensor(_wide(attribute.value.numpy()))
                node.attributes[name] = ir.AttrTensor(name, tensor)
        for value in node.outputs:
            if value.dtype in _NARROW:
                value.dtype = ir.DataType.FLOAT


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array
