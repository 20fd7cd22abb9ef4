"""What changes between an exported ONNX graph and the network that TensorRT builds.

Two things, both on the graph's description alone; no weight is read:

- Shared weights: every initializer that lies in a safetensors file becomes an input of the same
  name, type and shape. The engine then holds no weights, and all engines bind one device copy.
- Wide attention: TensorRT-RTX has no fused attention for heads wider than 256 (the VAE's is 512),
  and decomposing it whole holds all scores at once, 17 GB for a 2048x2048 image. Written as
  `QUERY_CHUNKS` products over parts of the queries it takes 5.4 GB, which the convolutions need
  anyhow.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klein_kv.artifacts.signature import Signature
from klein_kv.artifacts.weights import WeightPlace, WeightRef, refs_from_places
from klein_kv.engines.rewrite.graph_quantization import QuantizedNodes, find_quantized
from klein_kv.errors import ArtifactError, BackendError, BuildError

if TYPE_CHECKING:
    import onnx

__all__ = ["MAX_FUSED_HEAD_DIM", "Graph", "check_signature", "read_graph"]

MAX_FUSED_HEAD_DIM = 256
"""Widest attention head that TensorRT-RTX 1.7 fuses (measured for SM120 in bf16)."""

QUERY_CHUNKS = 4
"""Parts that wide attention is computed in. The VAE attends over 2x2 cells per token: the number
of queries is always a multiple of 4."""

_DTYPES = {
    1: "float32",
    10: "float16",
    16: "bfloat16",
    17: "float8_e4m3fn",
    23: "float4_e2m1fn",
    7: "int64",
    2: "uint8",
}
_FLOAT, _INT64 = 1, 7


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph, ready to parse."""

    path: Path  # the exported file; external data is relative to its folder
    model: bytes  # serialized ONNX
    weights: dict[str, WeightRef]  # where the external initializers lie, by name
    shared: bool  # whether they are inputs of `model`; otherwise TensorRT reads them
    quantized: QuantizedNodes  # which nodes are to become kernels of low precision

    @property
    def weight_bytes(self) -> int:
        """Bytes of all external initializers."""
        return sum(ref.nbytes for ref in self.weights.values())


def read_graph(path: Path, signature: Signature, shared: bool) -> Graph:
    """Reads an exported graph, checks it and rewrites it; `shared` makes inputs of the weights.

    An `ArtifactError` tells of no ONNX, another graph, or weights outside the graph's folder.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendError(
            "building engines needs the onnx package; install it: pip install 'klein-kv[export]'"
        ) from error
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise ArtifactError(
            f"{path} is not a readable ONNX file ({error}); export the checkpoint again"
        ) from error
    check_signature(model, signature, path)
    weights = _external_weights(model, path)
    quantized = find_quantized(model)
    if shared:
        _move_to_inputs(model, weights)
    _chunk_wide_attention(model, path)
    return Graph(path, model.SerializeToString(), weights, shared, quantized)


def check_signature(model: "onnx.ModelProto", signature: Signature, path: Path) -> None:
    """Refuses, with an `ArtifactError`, other names, types or shapes of inputs and outputs."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    for kind, values, specs in (
        ("inputs", model.graph.input, signature.inputs),
        ("outputs", model.graph.output, signature.outputs),
    ):
        got = [_described(value) for value in values if value.name not in initializers]
        expected = [f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs]
        if got != expected:
            wrong = next(
                (pair for pair in zip(got, expected, strict=False) if pair[0] != pair[1]),
                (f"{len(got)} {kind}", f"{len(expected)} {kind}"),
            )
            raise ArtifactError(
                f"{path} is not the graph {signature.graph!r} of this klein-kv: got {wrong[0]}, "
                f"expected {wrong[1]}; export the checkpoint again"
            )


def _described(value: "onnx.ValueInfoProto") -> str:
    tensor = value.type.tensor_type
    dtype = _DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}")
    shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    return f"{value.name} {dtype}{shape}"


def _external_weights(model: "onnx.ModelProto", path: Path) -> dict[str, WeightRef]:
    places: dict[str, WeightPlace] = {}
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = [entries.get(key, "0") for key in ("offset", "length")]
        if not all(text.isdecimal() for text in place):
            raise ArtifactError(
                f"{path}: weight {tensor.name} has offset and length {place}, expected whole "
                "numbers; export the checkpoint again"
            )
        places[tensor.name] = WeightPlace(
            entries.get("location", ""),
            int(place[0]),
            int(place[1]),
            _DTYPES.get(tensor.data_type, f"type {tensor.data_type}"),
            tuple(tensor.dims),
        )
    return refs_from_places(path.parent, places, path)


def _move_to_inputs(model: "onnx.ModelProto", names: Iterable[str]) -> None:
    import onnx

    moving = set(names)
    for tensor in model.graph.initializer:
        if tensor.name in moving:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    staying = [tensor for tensor in model.graph.initializer if tensor.name not in moving]
    del model.graph.initializer[:]
    model.graph.initializer.extend(staying)


def _chunk_wide_attention(model: "onnx.ModelProto", path: Path) -> None:
    """Replaces 4-D attention over wide heads."""
    import onnx

    if not any(_is_plain_attention(node) for node in model.graph.node):
        return
    inferred = onnx.shape_inference.infer_shapes(_without_data(model), data_prop=True).graph
    known = {value.name: value for value in (*inferred.value_info, *inferred.input)}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        value = known.get(node.input[0]) if _is_plain_attention(node) else None
        dim = value.type.tensor_type.shape.dim[-1].dim_value if value is not None else 0
        if value is not None and dim > MAX_FUSED_HEAD_DIM:
            nodes += _chunks(model, node, dim, value.type.tensor_type.elem_type, path)
        else:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _is_plain_attention(node: "onnx.NodeProto") -> bool:
    """4-D attention: heads are an axis of the tensors, not an attribute."""
    heads = any(attribute.name == "q_num_heads" for attribute in node.attribute)
    return node.op_type == "Attention" and not node.domain and not heads


def _without_data(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy whose external initializers are inputs, so that shape inference looks for no file."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _move_to_inputs(copy, [t.name for t in copy.graph.initializer if t.external_data])
    return copy


def _chunks(
    model: "onnx.ModelProto", node: "onnx.NodeProto", dim: int, dtype: int, path: Path
) -> list["onnx.NodeProto"]:
    """softmax(scale q k^T) v over parts of the queries, the softmax in float32.

    Only 4-D attention ([B, heads, N, D]) without mask is rewritten: what the VAE has.
    """
    from onnx.helper import make_node, make_tensor

    options = {attribute.name: attribute for attribute in node.attribute}
    plain = all(
        not options[name].i and not options[name].f
        for name in ("is_causal", "softcap", "qk_matmul_output_mode")
        if name in options
    )
    if len(node.input) != 3 or len(node.output) != 1 or not plain or dtype not in _DTYPES:
        raise BuildError(
            f"{path}: attention {node.name} has heads of {dim}, which TensorRT does not fuse, and "
            "is not the plain 4-D attention of the VAE that klein-kv computes in parts"
        )
    scale = options["scale"].f if "scale" in options else dim**-0.5
    name = node.name or node.output[0]
    query, key, value = node.input
    factor, shape, axis = f"{name}/scale", f"{name}/shape", f"{name}/axis"
    model.graph.initializer.extend(
        [
            make_tensor(factor, dtype, [1], [scale]),
            make_tensor(shape, _INT64, [5], [0, 0, QUERY_CHUNKS, -1, dim]),
            make_tensor(axis, _INT64, [1], [2]),
        ]
    )
    scaled, turned, grouped = f"{name}/query", f"{name}/key", f"{name}/grouped"
    parts = [f"{name}/query:{i}" for i in range(QUERY_CHUNKS)]
    # Through a fifth axis, not by splitting N: so all parts have one symbolic shape, and TensorRT
    # gives them one piece of scratch memory.
    nodes = [
        make_node("Mul", [query, factor], [scaled], scaled),
        make_node("Transpose", [key], [turned], turned, perm=[0, 1, 3, 2]),
        make_node("Reshape", [scaled, shape], [grouped], grouped),
        make_node("Split", [grouped], parts, f"{name}/split", axis=2, num_outputs=QUERY_CHUNKS),
    ]
    outputs = []
    for i, part in enumerate(parts):
        steps = [f"{name}/{step}:{i}" for step in ("rows", "scores", "up", "soft", "down", "out")]
        rows, scores, up, soft, down, out = steps
        nodes += [
            make_node("Squeeze", [part, axis], [rows], rows),
            make_node("MatMul", [rows, turned], [scores], scores),
            make_node("Cast", [scores], [up], up, to=_FLOAT),
            make_node("Softmax", [up], [soft], soft, axis=-1),
            make_node("Cast", [soft], [down], down, to=dtype),
            make_node("MatMul", [down, value], [out], out),
        ]
        outputs.append(out)
    return [*nodes, make_node("Concat", outputs, [node.output[0]], f"{name}/join", axis=2)]
