"""Names, types and symbolic shapes of every graph's tensors: the one place that knows them.

ONNX axes, TensorRT profiles, runtime buffers and tests all read a `Signature`. Names are diffusers'
where diffusers has one. Symbols:

    batch         images made at once
    image_tokens  S, tokens of the image being made ((height / 16) x (width / 16) for klein)
    ref_tokens    R, tokens of all reference images together; 0 is text-to-image
    text_tokens   T, prompt tokens, 512 unless the caller says otherwise
    height, width pixels of an image; grid_height, grid_width tokens of it
"""

from collections.abc import Mapping
from dataclasses import dataclass

from klein_kv.config import ITEM_SIZE, ModelConfig

__all__ = [
    "GRAPH_FILES",
    "MAX_POSITION",
    "PLAIN_GRAPH_FILES",
    "VARIANTS",
    "GraphSet",
    "Signature",
    "TensorSpec",
    "kv_names",
    "make_signature",
]

GRAPH_FILES = {
    "text_encoder": "text_encoder/model.onnx",
    "vae_encoder": "vae/encoder.onnx",
    "vae_decoder": "vae/decoder.onnx",
    "encode_references": "transformer/encode_references.onnx",
    "first_step": "transformer/first_step.onnx",
    "cached_step": "transformer/cached_step.onnx",
}
"""Where an artifact folder keeps each graph of KV weights."""

PLAIN_GRAPH_FILES = {
    graph: file for graph, file in GRAPH_FILES.items() if not file.startswith("transformer/")
} | {"plain_step": "transformer/plain_step.onnx"}
"""The same for plain weights: one transformer graph, which takes the references at every step."""

VARIANTS = {"kv": GRAPH_FILES, "plain": PLAIN_GRAPH_FILES}
"""Kinds of weights, and the graphs of each."""


@dataclass(frozen=True, slots=True)
class GraphSet:
    """The graphs of an artifact folder that belong together, and their types.

    Attributes:
        variant: a key of `VARIANTS`.
        dtype: floating point type of inputs, outputs and activations.
    """

    variant: str
    dtype: str

    @property
    def files(self) -> dict[str, str]:
        """Path of each graph relative to the folder, by the graph's name."""
        return VARIANTS[self.variant]

    def signature(self, graph: str, config: ModelConfig) -> "Signature":
        """The contract of one of these graphs."""
        return make_signature(graph, config, self.dtype)


MAX_POSITION = 4096
"""Position ids run from 0 to MAX_POSITION - 1 on each axis: the rows of the graphs' RoPE tables."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: `shape` holds integers and the symbols of this module's docstring."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def concrete(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its size."""
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.shape)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of the tensor at these sizes."""
        count = ITEM_SIZE[self.dtype]
        for axis in self.concrete(sizes):
            count *= axis
        return count


@dataclass(frozen=True, slots=True)
class Signature:
    """The contract of one graph."""

    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbolic axes of the inputs, in order of appearance."""
        found: dict[str, None] = {}
        for spec in self.inputs:
            found.update(dict.fromkeys(axis for axis in spec.shape if isinstance(axis, str)))
        return tuple(found)

    def input(self, name: str) -> TensorSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def output(self, name: str) -> TensorSpec:
        """The output of that name."""
        return next(spec for spec in self.outputs if spec.name == name)


def kv_names(num_blocks: int) -> list[str]:
    """`k_ref.0`, `v_ref.0`, `k_ref.1`, ...: double blocks first, then single blocks."""
    return [f"{part}_ref.{block}" for block in range(num_blocks) for part in "kv"]


def make_signature(graph: str, config: ModelConfig, dtype: str) -> Signature:
    """The signature of one graph.

    Args:
        graph: a key of `GRAPH_FILES` or `PLAIN_GRAPH_FILES`.
        config: the checkpoint's configuration.
        dtype: the floating point type of the graph, e.g. "bfloat16".

    Raises:
        KeyError: no graph of that name.
    """
    net = config.transformer
    kv_shape = (1, "ref_tokens", net.num_attention_heads, net.attention_head_dim)
    kv = tuple(TensorSpec(name, dtype, kv_shape) for name in kv_names(net.num_blocks))
    references = (
        TensorSpec("ref_hidden_states", dtype, (1, "ref_tokens", net.in_channels)),
        TensorSpec("ref_ids", "int64", ("ref_tokens", 4)),
    )
    latents = ("batch", "image_tokens", net.in_channels)
    step_inputs = (
        TensorSpec("hidden_states", dtype, latents),
        TensorSpec(
            "encoder_hidden_states", dtype, ("batch", "text_tokens", net.joint_attention_dim)
        ),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("sigma_step", "float32", (1,)),
        TensorSpec("img_ids", "int64", ("image_tokens", 4)),
        TensorSpec("txt_ids", "int64", ("text_tokens", 4)),
    )
    step_outputs = (
        TensorSpec("noise_pred", dtype, latents),
        TensorSpec("latents", dtype, latents),
    )
    prompt = ("batch", "text_tokens")
    pixels = ("height", "width", 3)
    grid = ("grid_height", "grid_width", net.in_channels)
    table: dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "first_step": (step_inputs + references, step_outputs + kv),
        "cached_step": (step_inputs + kv, step_outputs),
        "plain_step": (step_inputs + references, step_outputs),
        "encode_references": (references, kv),
        "text_encoder": (
            (
                TensorSpec("input_ids", "int64", prompt),
                TensorSpec("attention_mask", "int64", prompt),
            ),
            (TensorSpec("encoder_hidden_states", dtype, (*prompt, net.joint_attention_dim)),),
        ),
        "vae_encoder": (
            (TensorSpec("image", "uint8", (1, *pixels)),),
            (TensorSpec("ref_hidden_states", dtype, (1, *grid)),),
        ),
        "vae_decoder": (
            (TensorSpec("latents", dtype, ("batch", *grid)),),
            (
                TensorSpec("image", "uint8", ("batch", *pixels)),
                TensorSpec("sample", dtype, ("batch", 3, "height", "width")),
            ),
        ),
    }
    inputs, outputs = table[graph]
    return Signature(graph, inputs, outputs)
