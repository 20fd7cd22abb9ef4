"""Names, types and symbolic shapes of every graph's tensors: the one place that knows them.

ONNX axes, TensorRT profiles, runtime buffers and tests all read a `Signature`. Names are diffusers'
where diffusers has one. Symbols:

    batch         images made at once
    image_tokens  S, tokens of the image being made ((height / 16) x (width / 16) for klein)
    ref_tokens    R, tokens of all reference images together; 0 is text-to-image
    text_tokens   T, prompt tokens, 512 unless the caller says otherwise
    height, width pixels of an image; grid_height, grid_width tokens of it
    rows, columns some rows of a weight matrix; rank of a change of them
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from klein_kv.artifacts.config import ModelConfig, TransformerConfig, tensor_bytes
from klein_kv.errors import RequestError

__all__ = [
    "FLOAT8_KV_FILES",
    "GRAPH_FILES",
    "MAX_POSITION",
    "PLAIN_GRAPH_FILES",
    "SMALL_GRAPH_FILES",
    "VARIANTS",
    "GraphSet",
    "KVFormat",
    "Signature",
    "TensorSpec",
    "distinct_graphs",
    "graph_sets",
    "is_kv",
    "kv_names",
    "kv_tensors",
    "make_signature",
    "quantized_graph_sets",
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

SMALL_GRAPH_FILES = {
    "blend": "latents/blend.onnx",
    "merge_lora": "transformer/merge_lora.onnx",
    "merge_lora_fp8": "transformer/merge_lora_fp8.onnx",
}
"""Graphs without weights beside the networks', of every variant. A folder from before there was one
lacks it: what `merge_lora` does is then done on the host, what needs `blend` is refused."""


class KVFormat(StrEnum):
    """How reference keys and values are handed on where that is not in the graphs' own type.

    The values are what `engines.json` and saved sets name them.
    """

    FP8_PER_HEAD = "float8_e4m3fn"
    """Float8, each with a tensor of scales, one per head, that go along."""

    FP8_CONSTANT = "float8_e4m3fn static"
    """Float8 whose scales are constants of the graphs."""


_FLOAT8_KV = "_fp8_kv"

FLOAT8_KV_FILES = GRAPH_FILES | {
    graph: file.replace(".onnx", f"{_FLOAT8_KV}.onnx")
    for graph, file in GRAPH_FILES.items()
    if file.startswith("transformer/")
}
"""The graphs of KV weights that hand keys and values on like that. They lie beside the others: ONNX
lets a graph refer to weights in its own folder only."""


@dataclass(frozen=True, slots=True)
class GraphSet:
    """The graphs of an artifact folder that belong together, and their types."""

    variant: str  # a key of `VARIANTS`
    dtype: str  # floating point type of inputs, outputs and activations
    # type that reference keys and values are handed on in, `dtype` or a `KVFormat`; None for
    # `dtype`
    kv_dtype: str | None = None
    # (component, name of its quantized files) of quantized networks, sorted
    quantized: tuple[tuple[str, str], ...] = ()
    attention: str | None = None  # "fp8" where the transformer's attention is computed in float8

    @property
    def files(self) -> dict[str, str]:
        """Path of each graph relative to the folder, by the graph's name."""
        if self.variant == "kv" and self.kv_dtype == KVFormat.FP8_PER_HEAD:
            return FLOAT8_KV_FILES
        end = "_static_fp8_kv" if self.kv_dtype == KVFormat.FP8_CONSTANT else ""
        if self.attention is not None:
            end = "_fp8_attention"
        files, quantized = dict(VARIANTS[self.variant]), dict(self.quantized)
        for graph, file in files.items():
            component, _, name = file.partition("/")
            if component == "transformer":
                name = name.replace(".onnx", f"{end}.onnx")
            if component in quantized:
                files[graph] = f"{component}/{quantized[component]}.{name}"
        return files

    @property
    def small_files(self) -> dict[str, str]:
        """The same for the graphs of `SMALL_GRAPH_FILES`."""
        fp8 = self.precision is not None  # which some GPUs have not
        return {name: file for name, file in SMALL_GRAPH_FILES.items() if fp8 or "fp8" not in name}

    def file(self, graph: str) -> str:
        """Path of one graph of either kind."""
        return (self.files | self.small_files)[graph]

    @property
    def precision(self) -> str | None:
        """Name of the quantized precision; None for the artifacts' own."""
        return dict(self.quantized).get("transformer")

    @property
    def kv_numbers(self) -> str:
        """Type of the numbers of keys and values, wherever their scales are."""
        return _numbers(self.dtype, self.kv_dtype)

    def signature(self, graph: str, config: ModelConfig) -> "Signature":
        """The contract of one of these graphs."""
        return make_signature(graph, config, self.dtype, self.kv_dtype)

    def kv_tensors(self, net: TransformerConfig, ref_tokens: int) -> "tuple[TensorSpec, ...]":
        """What `encode_references` gives out for that many reference tokens, in order."""
        sizes = {"ref_tokens": ref_tokens}
        return tuple(
            TensorSpec(spec.name, spec.dtype, spec.concrete(sizes))
            for spec in kv_tensors(net, self.dtype, self.kv_dtype)
        )


MAX_POSITION = 4096
"""Position ids run from 0 to MAX_POSITION - 1 on each axis: the rows of the graphs' RoPE tables."""


def graph_sets(variant: str, dtype: str) -> list[GraphSet]:
    """All sets of graphs that an export writes, the one with `kv_dtype` None first."""
    types = (None, KVFormat.FP8_PER_HEAD) if variant == "kv" else (None,)
    return [GraphSet(variant, dtype, kv_dtype) for kv_dtype in types]


def quantized_graph_sets(variant: str, dtype: str, networks: Mapping[str, str]) -> list[GraphSet]:
    """All sets of graphs of a quantized precision; `networks` names its files by component.

    Three for KV weights: keys and values in `dtype`; in float8 with constant scales; and attention
    in float8 too, which reads them as they are. One for plain weights, and where activations are
    kept (names that end in "-weight-only").
    """
    quantized = tuple(sorted(networks.items()))
    own = GraphSet(variant, dtype, None, quantized)
    if variant != "kv" or networks.get("transformer", "").endswith("-weight-only"):
        return [own]
    packed = GraphSet(variant, dtype, KVFormat.FP8_CONSTANT, quantized)
    return [own, packed, GraphSet(variant, dtype, KVFormat.FP8_CONSTANT, quantized, "fp8")]


def distinct_graphs(sets: Iterable[GraphSet]) -> Iterator[tuple[str, str, GraphSet]]:
    """Label, name and set of every graph; one that several sets share comes with the first.

    The label is the name, or `NAME_fp8_kv`.
    """
    seen: set[str] = set()
    for graphs in sets:
        for graph, file in graphs.files.items():
            if file not in seen:
                seen.add(file)
                yield graph if graphs.kv_dtype is None else graph + _FLOAT8_KV, graph, graphs


class TensorSpec(NamedTuple):
    """One input or output: `shape` holds integers and the symbols of this module's docstring.

    Of an engine, -1 marks an axis that varies.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def concrete(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its size."""
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.shape)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of the tensor at these sizes."""
        return tensor_bytes(self.dtype, self.concrete(sizes))


@dataclass(frozen=True, slots=True)
class Signature:
    """The contract of one graph."""

    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbolic axes of the inputs, in order of appearance."""
        axes = (axis for spec in self.inputs for axis in spec.shape)
        return tuple(dict.fromkeys(axis for axis in axes if isinstance(axis, str)))

    def output_shapes(
        self, inputs: Mapping[str, tuple[int, ...]], unit: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs that such inputs give; `unit` is the pixels of a token's side.

        A `RequestError` if the inputs do not fit the signature, or each other.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            shape = inputs.get(spec.name, ())
            for axis, size in zip(spec.shape, shape, strict=False):
                wanted = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
                if size != wanted or len(shape) != len(spec.shape):
                    raise RequestError(
                        f"{self.graph}: {spec.name} has shape {shape}, expected "
                        f"{tuple(sizes.get(str(a), a) for a in spec.shape)}"
                    )
        for side in ("height", "width"):
            if side in sizes:
                sizes[f"grid_{side}"] = sizes[side] // unit
            elif f"grid_{side}" in sizes:
                sizes[side] = sizes[f"grid_{side}"] * unit
        return {spec.name: spec.concrete(sizes) for spec in self.outputs}

    def input(self, name: str) -> TensorSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def output(self, name: str) -> TensorSpec:
        """The output of that name."""
        return next(spec for spec in self.outputs if spec.name == name)


def kv_names(num_blocks: int, kv_dtype: str | None = None) -> list[str]:
    """Tensors that reference keys and values are handed on in: double blocks first, then single.

    `k_ref.0`, `v_ref.0`, `k_ref.1`, ...; with the scale behind each where they are float8:
    `k_ref.0`, `k_ref_scale.0`, `v_ref.0`, ...
    """
    parts = ["k_ref", "k_ref_scale", "v_ref", "v_ref_scale"]
    if kv_dtype != KVFormat.FP8_PER_HEAD:
        parts = ["k_ref", "v_ref"]
    return [f"{part}.{block}" for block in range(num_blocks) for part in parts]


def is_kv(name: str) -> bool:
    """Whether a tensor of a graph is one of `kv_names`."""
    return name[1:].startswith(("_ref.", "_ref_scale."))


def kv_tensors(net: TransformerConfig, dtype: str, kv_dtype: str | None = None) -> list[TensorSpec]:
    """The same with types and shapes; a `RequestError` if there is no such `kv_dtype`."""
    if kv_dtype not in (None, dtype, *KVFormat):
        raise RequestError(
            f"kv_dtype is {kv_dtype!r}, expected {dtype!r}, '" + "' or '".join(KVFormat) + "'"
        )
    stored = _numbers(dtype, kv_dtype)
    heads = net.num_attention_heads
    shape = (1, "ref_tokens", heads, net.attention_head_dim)
    return [
        TensorSpec(name, "float32", (1, 1, heads, 1))
        if "_scale." in name
        else TensorSpec(name, stored, shape)
        for name in kv_names(net.num_blocks, kv_dtype)
    ]


def _numbers(dtype: str, kv_dtype: str | None) -> str:
    return dtype if kv_dtype in (None, dtype) else "float8_e4m3fn"


def make_signature(
    graph: str, config: ModelConfig, dtype: str, kv_dtype: str | None = None
) -> Signature:
    """The signature of one graph: of `GRAPH_FILES`, `PLAIN_GRAPH_FILES` or `SMALL_GRAPH_FILES`.

    `dtype` is the graph's floating point type, `kv_dtype` that of reference keys and values: the
    same, a `KVFormat`, or None for the same. A `RequestError` tells of another.
    """
    net = config.transformer
    channels, width = net.in_channels, net.joint_attention_dim
    latents, prompt = ("batch", "image_tokens", channels), ("batch", "text_tokens")
    pixels, grid = ("height", "width", 3), ("grid_height", "grid_width", channels)
    weight = ("rows", "columns")
    kv = tuple(kv_tensors(net, dtype, kv_dtype))
    text = TensorSpec("encoder_hidden_states", dtype, (*prompt, width))
    references = (
        TensorSpec("ref_hidden_states", dtype, (1, "ref_tokens", channels)),
        TensorSpec("ref_ids", "int64", ("ref_tokens", 4)),
    )
    step = (
        TensorSpec("hidden_states", dtype, latents),
        text,
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("sigma_step", "float32", (1,)),
        TensorSpec("img_ids", "int64", ("image_tokens", 4)),
        TensorSpec("txt_ids", "int64", ("text_tokens", 4)),
    )
    step_out = (TensorSpec("noise_pred", dtype, latents), TensorSpec("latents", dtype, latents))
    blend = (
        TensorSpec("hidden_states", dtype, latents),
        TensorSpec("image_latents", dtype, (1, *latents[1:])),
        TensorSpec("noise", dtype, latents),
        TensorSpec("mask", dtype, (*latents[:2], 1)),
        TensorSpec("sigma", "float32", (1,)),
    )
    merge = (
        TensorSpec("weight", dtype, weight),
        TensorSpec("up", "float32", ("rows", "rank")),
        TensorSpec("down", "float32", ("rank", "columns")),
        TensorSpec("largest_before", "float32", (1,)),
    )
    scale = TensorSpec("scale", "float32", (1,))
    largest = TensorSpec("largest", "float32", (1,))
    ids = TensorSpec("input_ids", "int64", prompt), TensorSpec("attention_mask", "int64", prompt)
    image = TensorSpec("image", "uint8", ("batch", *pixels))
    sample = TensorSpec("sample", dtype, ("batch", 3, "height", "width"))
    table: dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "first_step": (step + references, step_out + kv),
        "cached_step": (step + kv, step_out),
        "plain_step": (step + references, step_out),
        "encode_references": (references, kv),
        "text_encoder": (ids, (text,)),
        "vae_encoder": (
            (TensorSpec("image", "uint8", (1, *pixels)),),
            (TensorSpec("ref_hidden_states", dtype, (1, *grid)),),
        ),
        "vae_decoder": ((TensorSpec("latents", dtype, ("batch", *grid)),), (image, sample)),
        "blend": (blend, step_out[1:]),
        "merge_lora": (merge, (TensorSpec("merged", dtype, weight), largest)),
        "merge_lora_fp8": (
            (*merge, scale),
            (TensorSpec("merged", "float8_e4m3fn", weight), largest),
        ),
    }
    inputs, outputs = table[graph]
    return Signature(graph, inputs, outputs)
