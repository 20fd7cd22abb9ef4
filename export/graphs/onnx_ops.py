"""`Ops` that writes ONNX nodes: the networks of `klein_kv.networks` as graphs.

Opset 23 has every operator the networks need (Attention, RotaryEmbedding, RMSNormalization).
Float32 graphs are for ONNX Runtime on CPUs and use its `MultiHeadAttention`, which never holds the
score matrix; TensorRT fuses `Attention` in bfloat16 and float16 only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from klein_kv.artifacts.numbers import FP8_MAX
from klein_kv.artifacts.signature import Signature, TensorSpec
from klein_kv.artifacts.weights import NUMPY_DTYPES, WeightRef
from klein_kv.networks.kv_float8 import SMALLEST_SCALE
from klein_kv.networks.ops import Ops

__all__ = ["IR_DTYPES", "MICROSOFT", "OnnxOps", "part_name"]

P = ParamSpec("P")
R = TypeVar("R")

_OPSET = 23
MICROSOFT = "com.microsoft"
IR_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "uint8": ir.DataType.UINT8,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float4_e2m1fn": ir.DataType.FLOAT4E2M1,
}
"""Tensor types of ONNX by the names that signatures and weights give them."""

_INT64_MAX = np.iinfo(np.int64).max


class OnnxOps:
    """Collects nodes and initializers of one graph, whose inputs exist from the start.

    `dtype` is the type of activations and weights; the weights' files are referred to by name,
    beside the graph.
    """

    def __init__(self, signature: Signature, dtype: str, weights: Mapping[str, WeightRef]) -> None:
        self.signature = signature
        self.dtype = dtype
        self._weights = weights
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._shapes: dict[tuple[object, ...], ir.Value] = {}
        self._scope = signature.graph
        self._opsets = {"": _OPSET, MICROSOFT: 1}
        self.inputs = {spec.name: self._value_from_spec(spec) for spec in signature.inputs}

    @property
    def onnx_dtype(self) -> ir.DataType:
        """ONNX's constant for `dtype`."""
        return IR_DTYPES[self.dtype]

    def _value_from_spec(self, spec: TensorSpec) -> ir.Value:
        value = ir.val(spec.name, IR_DTYPES[spec.dtype], spec.shape)
        value.meta["rank"] = len(spec.shape)
        if len(spec.shape) == 4:
            value.meta["heads"] = spec.shape[2:]
        return value

    def _emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        outputs: int = 1,
        rank: int | None = None,
    ) -> list[ir.Value]:
        name = f"{self._scope}/{op_type}_{len(self._nodes)}"
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes or {},
            domain=domain,
            num_outputs=outputs,
            name=name,
        )
        for i, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}:{i}"
            if rank is not None:
                value.meta["rank"] = rank
        self._nodes.append(node)
        return list(node.outputs)

    def _one(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        rank: int | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        return self._emit(op_type, inputs, attributes, domain, rank=rank)[0]

    def _weight(self, name: str, part: tuple[int, int] | None = None) -> ir.Value:
        self._enter_block(name)
        ref = self._weights[name] if part is None else self._weights[name].rows(*part)
        return self._initializer(part_name(name, part), ref)

    def _enter_block(self, weight: str) -> None:
        """Scope names follow the block whose weight was used last: node names then tell it."""
        pieces = weight.split(".")
        blocks = [i for i, piece in enumerate(pieces) if piece.isdigit()]
        self._scope = ".".join(pieces[: blocks[0] + 1]) if blocks else pieces[0]

    def _initializer(self, key: str, ref: WeightRef) -> ir.Value:
        """A tensor of a safetensors file beside the graph."""
        if key not in self._initializers:
            tensor = ir.ExternalTensor(
                ref.path.name,
                ref.offset,
                ref.nbytes,
                IR_DTYPES[ref.dtype],
                shape=ir.Shape(ref.shape),
                name=key,
                base_dir=str(ref.path.parent),
            )
            self._initializers[key] = ir.val(key, const_value=tensor)
        return self._initializers[key]

    def _ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def _axes(self, like: ir.Value, start: int, end: int) -> ir.Value:
        """Sizes of axes `start` to `end` (exclusive) of `like`, computed once per graph."""
        key = ("axes", like, start, end)
        if key not in self._shapes:
            self._shapes[key] = self._one("Shape", like, start=start, end=end)
        return self._shapes[key]

    def _shape(self, like: ir.Value, lead: int, *rest: int) -> ir.Value:
        """[sizes of the first `lead` axes of `like`, *rest], computed once per graph."""
        key = ("shape", like, lead, rest)
        if key not in self._shapes:
            parts = [self._axes(like, 0, lead), self._ints(*rest)]
            self._shapes[key] = self._one("Concat", *parts, axis=0)
        return self._shapes[key]

    def block(
        self,
        function: "Callable[Concatenate[Ops[ir.Value], str, P], R]",
        name: str,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        return function(self, name, *args, **kwargs)

    def constant(self, value: NDArray[Any]) -> ir.Value:
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = ir.val(name, const_value=ir.tensor(value, name=name))
        return self._constants[key]

    def linear(self, rows: ir.Value, weight: str, part: tuple[int, int] | None = None) -> ir.Value:
        out = self._one("Gemm", rows, self._weight(weight, part), transB=1)
        out.meta["features"] = self._features(weight, part)
        return out

    def projection(
        self,
        rows: ir.Value,
        weight: str,
        features: tuple[int, int],  # noqa: ARG002
    ) -> Callable[[int, int], ir.Value]:
        return lambda start, stop: self.linear(rows, weight, (start, stop))

    def _features(self, weight: str, part: tuple[int, int] | None) -> int:
        return self._weights[weight].shape[0] if part is None else part[1] - part[0]

    def embedding(self, ids: ir.Value, weight: str) -> ir.Value:
        return self.rows(self._one("Gather", self._weight(weight), ids, axis=0))

    def layer_norm(self, rows: ir.Value, weight: ir.Value, bias: ir.Value, eps: float) -> ir.Value:
        return self._one("LayerNormalization", rows, weight, bias, axis=-1, epsilon=eps)

    def rms_norm(self, x: ir.Value, weight: str, eps: float) -> ir.Value:
        scale = self._weight(weight)
        out = self._one("RMSNormalization", x, scale, axis=-1, epsilon=eps)
        out.meta.update(x.meta)
        return out

    def timestep_embedding(self, timestep: ir.Value, frequencies: NDArray[np.float32]) -> ir.Value:
        angles = self._one("Mul", timestep, self.constant(frequencies))
        waves = [self._one("Cos", angles), self._one("Sin", angles)]
        row = self._one("Unsqueeze", self._one("Concat", *waves, axis=0), self._ints(0))
        return self.to_model_dtype(row)

    def rope_table(self, ids: ir.Value, tables: Sequence[NDArray[np.float32]]) -> ir.Value:
        columns = []
        for axis, table in enumerate(tables):
            position = self._one("Gather", ids, self.constant(np.array(axis, np.int64)), axis=1)
            columns.append(self._one("Gather", self.constant(table), position, axis=0))
        joined = columns[0] if len(columns) == 1 else self._one("Concat", *columns, axis=1)
        return self._one("Unsqueeze", joined, self._ints(0), rank=3)

    def sequence_positions(self, like: ir.Value) -> ir.Value:
        length = self._one("Squeeze", self._axes(like, 1, 2))
        zero, one = (self.constant(np.array(i, np.int64)) for i in (0, 1))
        return self._one("Unsqueeze", self._one("Range", zero, length, one), self._ints(1))

    def norm_rope(
        self,
        x: ir.Value,
        weight: str,
        eps: float,
        cos: ir.Value,
        sin: ir.Value,
        interleaved: bool,
    ) -> ir.Value:
        heads, dim = x.meta["heads"]
        to_sequence, to_heads = self._ints(0, 0, heads * dim), self._ints(0, 0, heads, dim)
        attributes = {"num_heads": heads, "interleaved": int(interleaved)}
        if self.dtype == "float32":
            flat = self._one("Reshape", self.rms_norm(x, weight, eps), to_sequence)
            turned = self._one("RotaryEmbedding", flat, cos, sin, **attributes)
            return self._with_heads(self._one("Reshape", turned, to_heads, rank=4), heads, dim)
        # RoPE is linear, so the norm's factor (one per token and head) can come after it. Written
        # like this TensorRT fuses the whole into one kernel; RMSNormalization followed by
        # RotaryEmbedding leaves a float32 copy of q and k in memory.
        up = self.to_float32(x)
        mean = self._one("ReduceMean", self._one("Mul", up, up), self._ints(-1), keepdims=1)
        root = self._one("Sqrt", self._one("Add", mean, self._float(eps)))
        weighted = self.to_float32(self._one("Mul", x, self._weight(weight)))
        flat = self._one("Reshape", weighted, to_sequence)
        turned = self._one("RotaryEmbedding", flat, cos, sin, **attributes)
        scaled = self._one(
            "Mul", self._one("Reshape", turned, to_heads), self._one("Reciprocal", root)
        )
        return self._with_heads(self._one("Cast", scaled, to=self.onnx_dtype, rank=4), heads, dim)

    def _with_heads(self, x: ir.Value, heads: int, dim: int) -> ir.Value:
        x.meta["heads"] = heads, dim
        return x

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None = None
    ) -> ir.Value:
        (q_heads, _), (kv_heads, _) = q.meta["heads"], k.meta["heads"]
        q, k, v = (
            self._one("Reshape", x, self._ints(0, 0, math.prod(x.meta["heads"]))) for x in (q, k, v)
        )
        if self.dtype == "float32" and mask is None and q_heads == kv_heads:
            return self._one("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=q_heads)
        inputs = (q, k, v) if mask is None else (q, k, v, mask)
        heads = {"q_num_heads": q_heads, "kv_num_heads": kv_heads}
        out = self._one("Attention", *inputs, rank=3, **heads)
        return out if mask is None else self._one("Mul", out, self._sees_a_key(mask), rank=3)

    def joint_attention(
        self,
        q: ir.Value,
        k: Sequence[ir.Value],
        v: Sequence[ir.Value],
        references: Sequence[ir.Value],
        like: ir.Value,
    ) -> ir.Value:
        if references:
            k_ref, v_ref = (self.expand_batch(x, like) for x in references)
            k, v = [k_ref, *k], [v_ref, *v]
        keys, values = (x[0] if len(x) == 1 else self.concat(x, 1) for x in (k, v))
        return self.attention(q, keys, values)

    def _sees_a_key(self, mask: ir.Value) -> ir.Value:
        """[B, T, 1]: 0 where an additive mask [B, 1, T, K] hides every key from a query, else 1."""
        key = ("sees a key", mask)
        if key not in self._shapes:
            # In float32: ONNX Runtime has no bfloat16 kernel for this, on no device.
            highest = self._one("ReduceMax", self.to_float32(mask), self._ints(-1), keepdims=1)
            hidden = self._one("Cast", highest, to=ir.DataType.BOOL)
            seen = self._one("Cast", self._one("Not", hidden), to=self.onnx_dtype)
            self._shapes[key] = self._one("Squeeze", seen, self._ints(1))
        return self._shapes[key]

    def causal_mask(self, attention_mask: ir.Value) -> ir.Value:
        position = self.sequence_positions(attention_mask)  # [T, 1]
        row = self._one("Transpose", position, perm=[1, 0])
        causal = self._one("LessOrEqual", row, position)
        present = self._one("Cast", attention_mask, to=ir.DataType.BOOL)
        allowed = self._one("And", causal, self._one("Unsqueeze", present, self._ints(1, 2)))
        least = float(ml_dtypes.finfo(NUMPY_DTYPES[self.dtype]).min)  # type: ignore[no-untyped-call]
        zero, lowest = (self.to_model_dtype(self._float(x)) for x in (0.0, least))
        return self._one("Where", allowed, zero, lowest)

    def quantize_kv(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        wide = self.to_float32(x)
        # Minus infinity where R = 0.
        largest = self._one("ReduceMax", self._one("Abs", wide), self._ints(1, 3), keepdims=1)
        smallest = self._float(SMALLEST_SCALE * FP8_MAX)
        scale = self._one("Div", self._one("Max", largest, smallest), self._float(FP8_MAX), rank=4)
        scaled, float8 = self._one("Div", wide, scale), ir.DataType.FLOAT8E4M3FN
        values = self._one("QuantizeLinear", scaled, self._float(1), output_dtype=float8, rank=4)
        return self._with_heads(values, *x.meta["heads"]), scale

    def dequantize_kv(self, values: ir.Value, scale: ir.Value) -> ir.Value:
        # The scale is not the operator's: TensorRT takes constants there.
        wide = self._one("DequantizeLinear", values, self._float(1))
        out = self.to_model_dtype(self._one("Mul", wide, scale))
        out.meta["rank"] = 4
        return self._with_heads(out, *values.meta["heads"])

    def _float(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def heads(self, rows: ir.Value, like: ir.Value, num_heads: int) -> ir.Value:
        dim = rows.meta["features"] // num_heads
        shape = self._shape(like, 2, num_heads, dim)
        return self._with_heads(self._one("Reshape", rows, shape, rank=4), num_heads, dim)

    def rows(self, x: ir.Value) -> ir.Value:
        return self._one("Flatten", x, axis=2)

    def sequence(self, rows: ir.Value, like: ir.Value) -> ir.Value:
        return self._one("Reshape", rows, self._shape(like, 2, -1))

    def expand_batch(self, x: ir.Value, like: ir.Value) -> ir.Value:
        ones = [1] * (x.meta["rank"] - 1)
        out = self._one("Expand", x, self._shape(like, 1, *ones))
        out.meta.update(x.meta)
        return out

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        out = self._one("Concat", *parts, axis=axis)
        out.meta.update(parts[0].meta)
        return out

    def compact(self, x: ir.Value) -> ir.Value:
        return x

    def split_tokens(self, x: ir.Value, at: ir.Value) -> tuple[ir.Value, ir.Value]:
        count, axis = self._axes(at, 1, 2), self._ints(1)
        first = self._one("Slice", x, self._ints(0), count, axis)
        rest = self._one("Slice", x, count, self._ints(_INT64_MAX), axis)
        return first, rest

    def split_features(self, x: ir.Value, parts: int) -> list[ir.Value]:
        flat = self._one("Reshape", x, self._ints(-1))
        return self._emit("Split", [flat], {"axis": 0, "num_outputs": parts}, outputs=parts)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._one("Add", a, b)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._one("Mul", a, b)

    def silu(self, x: ir.Value) -> ir.Value:
        return self._one("Mul", x, self._one("Sigmoid", x))

    def saturate(self, x: ir.Value) -> ir.Value:
        if self.dtype != "float16":
            return x
        low, high = (self.constant(np.array(v, np.float16)) for v in (-65504, 65504))
        return self._one("Clip", x, low, high)

    def to_float32(self, x: ir.Value) -> ir.Value:
        wide = self.dtype == "float32" and x.dtype in (None, ir.DataType.FLOAT)
        return x if wide else self._one("Cast", x, to=ir.DataType.FLOAT)

    def to_model_dtype(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == "float32" else self._one("Cast", x, to=self.onnx_dtype)

    def model(self, outputs: Sequence[ir.Value], doc: str) -> ir.Model:
        """The finished graph: outputs named by the signature, dead nodes removed."""
        named = []
        for value, spec in zip(outputs, self.signature.outputs, strict=True):
            final = self._one("Identity", value) if value.is_graph_input() else value
            final.name = spec.name
            final.type = ir.TensorType(IR_DTYPES[spec.dtype])
            final.shape = ir.Shape(spec.shape)
            named.append(final)
        graph = ir.Graph(
            list(self.inputs.values()),
            named,
            nodes=self._nodes,
            initializers=[*self._initializers.values(), *self._constants.values()],
            name=self.signature.graph,
            doc_string=doc,
            opset_imports=self._opsets,
        )
        model = ir.Model(graph, ir_version=11, producer_name="klein-kv")
        RemoveUnusedNodesPass()(model)
        return model


def part_name(weight: str, part: tuple[int, int] | None) -> str:
    """Name of an initializer that is a range of a weight's rows."""
    return weight if part is None else f"{weight}[{part[0]}:{part[1]}]"
