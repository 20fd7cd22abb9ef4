"""What a model takes on a device: weights by component, keys and values, scratch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from klein_kv.artifacts.config import ITEM_SIZE, ModelConfig, dtype_name
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet, KVFormat
from klein_kv.artifacts.weights import WeightRef, graph_weights
from klein_kv.networks.vae import vae_scratch
from klein_kv.runtime.planning.request import Request

__all__ = [
    "COMPONENTS",
    "PRECISIONS",
    "Footprint",
    "base_footprint",
    "component_of",
    "file_weights",
    "linear_weights",
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
    """What a model takes on a device, whatever is asked of it."""

    config: ModelConfig
    graphs: GraphSet  # which run: their types and precisions
    weights: Mapping[str, int]  # bytes by component

    @property
    def precisions(self) -> dict[str, str]:
        """Of the block linears of transformer and text encoder, keys of `PRECISIONS`."""
        own = dtype_name(self.graphs.dtype)
        return {"transformer": own, "text_encoder": own} | dict(self.graphs.quantized)

    @property
    def float8_kv(self) -> bool:
        """Whether keys and values are handed on in eight bits."""
        return self.graphs.kv_dtype in tuple(KVFormat)

    def changed(
        self, *, float8_kv: bool = False, attention: str | None = None, **precisions: str
    ) -> "Footprint":
        """The same model with its block linears in other precisions; the rest keeps its type.

        `float8_kv` has keys and values in eight bits, which `attention` "fp8" needs.
        """
        own, now = dtype_name(self.graphs.dtype), self.precisions
        after, linears = now | precisions, linear_weights(self.config)
        weights = dict(self.weights)
        for part, name in after.items():
            saved = int(linears[part] * (PRECISIONS[now[part]] - PRECISIONS[name]))
            weights[part] = max(0, weights[part] - saved)
        kv_dtype = self.graphs.kv_dtype
        if float8_kv or self.float8_kv:
            quantized = after["transformer"] != own
            kv_dtype = KVFormat.FP8_CONSTANT if quantized else KVFormat.FP8_PER_HEAD
        graphs = replace(
            self.graphs,
            kv_dtype=kv_dtype,
            quantized=tuple(sorted(item for item in after.items() if item[1] != own)),
            attention=attention or self.graphs.attention,
        )
        return replace(self, graphs=graphs, weights=weights)

    def kv_bytes(self, request: Request) -> int:
        """Bytes of the references' keys and values, and of their scales."""
        tokens = request.ref_tokens(self.config)
        if not tokens or self.graphs.variant == "plain":
            return 0
        specs = self.graphs.kv_tensors(self.config.transformer, tokens)
        return sum(spec.nbytes({}) for spec in specs)

    def scratch_bytes(self, graph: str, sizes: Mapping[str, int]) -> int:
        """Estimates what lies between a graph's inputs and outputs: what one block holds at once.

        Beside the engines of klein 9B for 1024x1024 and four references (bf16, TensorRT-RTX 1.7.1):
        `first_step` 2.01 GB here and 2.10 there, `cached_step` 0.84 and 0.52, `encode_references`
        2.01 and 1.62, `text_encoder` 0.055 and 0.052, VAE 0.81 and 1.34 against 0.81 and 1.35. ONNX
        Runtime takes more: for it these are lower bounds.
        """
        config, batch = self.config, sizes["batch"]
        item = ITEM_SIZE[self.graphs.dtype]
        if graph == "text_encoder":
            text = config.text_encoder
            width = 4 * text.hidden_size + 3 * text.intermediate_size
            return item * batch * sizes["text_tokens"] * width
        if graph == "blend":  # elementwise: nothing between inputs and outputs
            return 0
        if graph.startswith("vae_"):
            images = batch if graph == "vae_decoder" else 1
            image = {"height": sizes["height"], "width": sizes["width"]}
            return item * vae_scratch(config.vae, graph, batch=images, **image)
        # One block: the residual stream, its norm, q, k, v with the references in front, and both
        # halves of the SwiGLU.
        net, references = config.transformer, sizes["ref_tokens"]
        row = 6 * net.inner_dim + 3 * net.mlp_hidden_dim
        rows = batch * (sizes["image_tokens"] + sizes["text_tokens"])
        denoise = rows * row + 2 * batch * references * net.inner_dim
        elements = {
            "plain_step": (rows + batch * references) * row,
            "cached_step": denoise,
            "encode_references": references * row,
            "first_step": max(denoise, references * row),
        }
        return item * elements[graph]


def linear_weights(config: ModelConfig) -> dict[str, int]:
    """Weights of the blocks' linear layers, by component; those of text blocks that are exported.

    A double block has one set for each stream.
    """
    net, text = config.transformer, config.text_encoder
    dim = net.inner_dim
    row = 4 * dim + 3 * net.mlp_hidden_dim
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    text_row = heads * text.head_dim + 3 * text.intermediate_size
    return {
        "transformer": (2 * net.num_layers + net.num_single_layers) * dim * row,
        "text_encoder": text.num_exported_layers * text.hidden_size * text_row,
    }


def base_footprint(artifacts: Path, manifest: Manifest) -> Footprint:
    """The exported model in 16 bits, as GPUs run it: float32 is planned as bfloat16."""
    dtype = "bfloat16" if manifest.dtype == "float32" else manifest.dtype
    graphs = GraphSet(manifest.variant, dtype)
    return Footprint(manifest.config, graphs, file_weights(artifacts, manifest, graphs))


def file_weights(artifacts: Path, manifest: Manifest, graphs: GraphSet) -> dict[str, int]:
    """Bytes of the tensors that graphs read, each once, of every component whose files are there.

    Tensors of the folder's floating point type are counted in that of `graphs`.
    """
    weights: dict[str, int] = {}
    for component in COMPONENTS:
        files = [f for graph, f in graphs.files.items() if component_of(graph) == component]
        if not all(file in manifest.files for file in files):
            continue
        tensors: dict[WeightRef, int] = {}
        for file in files:
            for ref in graph_weights(artifacts, file).values():
                tensors[ref] = ref.nbytes
                if ref.dtype == manifest.dtype:
                    tensors[ref] = ref.nbytes * ITEM_SIZE[graphs.dtype] // ITEM_SIZE[ref.dtype]
        weights[component] = sum(tensors.values())
    return weights
