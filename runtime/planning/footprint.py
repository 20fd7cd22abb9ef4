"""What a model takes on a device: its weights by component, and its keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from klein_kv.artifacts.config import (
    ITEM_SIZE,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    dtype_name,
)
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.weights import WeightRef, graph_weights
from klein_kv.errors import RequestError
from klein_kv.runtime.planning.request import Request
from klein_kv.runtime.planning.scratch import load_vae_shapes

__all__ = [
    "COMPONENTS",
    "PRECISIONS",
    "Footprint",
    "base_footprint",
    "block_weights",
    "component_bytes",
    "component_of",
    "text_block_weights",
]

COMPONENTS = ("transformer", "vae", "text_encoder")
"""Parts of a model that are loaded and released whole; the first stay longest."""

PRECISIONS = {
    "bf16": 2.0,
    "fp16": 2.0,
    "fp32": 4.0,
    "fp8": 1.0,
    "fp8-weight-only": 1.0,
    "nvfp4": 0.5 + 1 / 16,
}
"""Bytes per weight of a block's linear layer; nvfp4 has one fp8 scale for 16 weights."""


def component_of(graph: str) -> str:
    """The component whose weights a graph needs."""
    if graph == "text_encoder":
        return graph
    return "vae" if graph.startswith("vae_") else "transformer"


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes on a device, whatever is asked of it.

    Attributes:
        config: the checkpoint's configuration.
        dtype: type of activations.
        weights: bytes by component.
        vae_shapes: weights of "vae_encoder" and "vae_decoder", for estimates.
        precision: of the transformer's block linears, a key of `PRECISIONS`.
        text_precision: of the text encoder's.
        kv_dtype: type that keys and values are handed on in.
        attention: "fp8" where the transformer's attention is computed in float8.
    """

    config: ModelConfig
    dtype: str
    weights: Mapping[str, int]
    vae_shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    precision: str = "bf16"
    text_precision: str = "bf16"
    kv_dtype: str = "bfloat16"
    attention: str | None = None

    def quantized(self, precision: str, text_precision: str) -> "Footprint":
        """The same model with its block linears in other precisions; the rest keeps its type."""
        for name in (precision, text_precision):
            if name not in PRECISIONS:
                raise RequestError(
                    f"precision is {name!r}, expected one of {', '.join(PRECISIONS)}"
                )
        saved = PRECISIONS[self.precision] - PRECISIONS[precision]
        text_saved = PRECISIONS[self.text_precision] - PRECISIONS[text_precision]
        weights = dict(self.weights)
        weights["transformer"] -= int(block_weights(self.config.transformer) * saved)
        weights["text_encoder"] -= int(text_block_weights(self.config.text_encoder) * text_saved)
        weights = {component: max(0, nbytes) for component, nbytes in weights.items()}
        return replace(self, weights=weights, precision=precision, text_precision=text_precision)

    def kv_bytes(self, request: Request) -> int:
        """Bytes of keys and values; in eight bits with a float32 scale per head and tensor."""
        net, ref_tokens = self.config.transformer, request.ref_tokens(self.config)
        scales = 2 * net.num_blocks * net.num_attention_heads * 4
        eight = ref_tokens > 0 and self.kv_dtype.startswith("float8")
        return net.kv_bytes(ref_tokens, self.kv_dtype) + (scales if eight else 0)


def block_weights(net: TransformerConfig) -> int:
    """Weights of the linear layers of all blocks; a double block has one set for each stream."""
    dim = net.inner_dim
    return (2 * net.num_layers + net.num_single_layers) * dim * (4 * dim + 3 * net.mlp_hidden_dim)


def text_block_weights(config: TextEncoderConfig) -> int:
    """Weights of the linear layers of the text encoder's exported blocks."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    width = heads * config.head_dim + 3 * config.intermediate_size
    return config.num_exported_layers * config.hidden_size * width


def base_footprint(artifacts: Path, manifest: Manifest) -> Footprint:
    """The exported model in 16 bits, as GPUs run it.

    Args:
        artifacts: the folder; float32 is planned as if it had been exported in bfloat16.
        manifest: its manifest.
    """
    dtype = "bfloat16" if manifest.dtype == "float32" else manifest.dtype
    precision = dtype_name(dtype)
    files = manifest.graphs.files
    return Footprint(
        config=manifest.config,
        dtype=dtype,
        weights={
            component: component_bytes(artifacts, manifest, component, files, dtype)
            for component in COMPONENTS
        },
        vae_shapes=load_vae_shapes(artifacts, files),
        precision=precision,
        text_precision=precision,
        kv_dtype=dtype,
    )


def component_bytes(
    artifacts: Path, manifest: Manifest, component: str, files: Mapping[str, str], dtype: str
) -> int:
    """Bytes of the tensors that a component's graphs read, each once.

    Args:
        artifacts: the folder.
        manifest: its manifest.
        component: one of `COMPONENTS`.
        files: ONNX files by graph; those of other components are left out.
        dtype: type that tensors of the folder's floating point type are counted in.
    """
    tensors: dict[WeightRef, int] = {}
    for graph, file in files.items():
        if component_of(graph) == component:
            for ref in graph_weights(artifacts, file).values():
                tensors[ref] = ref.nbytes
                if ref.dtype == manifest.dtype:
                    tensors[ref] = ref.nbytes * ITEM_SIZE[dtype] // ITEM_SIZE[ref.dtype]
    return sum(tensors.values())
