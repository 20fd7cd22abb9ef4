"""`OnnxOps` with quantized linear layers and float8 attention, as TensorRT makes kernels of them.

The rule that keeps a product native and its weight untouched at run time: numbers and block scales
are initializers in the checkpoint's own [out, in] layout (the builder makes inputs of them), tensor
scales are constants.

    fp8     x -> QuantizeLinear -> DequantizeLinear -+
                          weight -> DequantizeLinear -+-> Gemm(transB=1)
    nvfp4   the same with blocks of 16 along the input features; an activation's block scales come
            from `trt::TRT_FP4DynamicQuantize`, which TensorRT alone knows
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from klein_kv.artifacts.attention_scales import AttentionScales
from klein_kv.artifacts.numbers import BLOCK, QuantizedLinear
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES
from klein_kv.artifacts.signature import Signature
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError
from klein_kv.export.graphs.onnx_ops import OnnxOps, part_name

__all__ = ["QuantizedOnnxOps"]

_FLOAT8 = ir.DataType.FLOAT8E4M3FN
_TENSORRT = "trt"


class QuantizedOnnxOps(OnnxOps):
    """Writes the networks of `klein_kv.networks` with some layers quantized, by weight name.

    `attention` are the scales of attention in float8, by block; None computes it in `dtype`.
    """

    def __init__(
        self,
        signature: Signature,
        dtype: str,
        weights: Mapping[str, WeightRef],
        quantized: Mapping[str, QuantizedLinear],
        attention: Mapping[str, AttentionScales] | None = None,
    ) -> None:
        super().__init__(signature, dtype, weights)
        if dtype == "float32" and any(layer.format == "nvfp4" for layer in quantized.values()):
            raise ArtifactError(
                "nvfp4 graphs are for TensorRT, which wants bfloat16 or float16 activations; got "
                "float32; export the checkpoint with --dtype bf16"
            )
        self._quantized = quantized
        self._attention = attention

    def linear(self, rows: ir.Value, weight: str, part: tuple[int, int] | None = None) -> ir.Value:
        layer = self._quantized.get(weight)
        if layer is None:
            return super().linear(rows, weight, part)
        self._enter_block(weight)
        layer = layer if part is None else layer.rows(*part)
        numbers = self._dequantized(part_name(weight, part), layer)
        out = self._one("Gemm", self._rounded(rows, layer), numbers, transB=1)
        out.meta["features"] = layer.shape[0]
        return out

    def _dequantized(self, name: str, layer: QuantizedLinear) -> ir.Value:
        """What the weight's numbers stand for, [out, in]."""
        numbers, scale = self._initializer(name, layer.weight), self._float(layer.weight_scale)
        if layer.block_scales is None:
            return self._dequantize(numbers, scale)
        steps = self._dequantize(self._initializer(name + BLOCK_SCALES, layer.block_scales), scale)
        return self._dequantize(numbers, steps, axis=-1, block_size=BLOCK)

    def _rounded(self, rows: ir.Value, layer: QuantizedLinear) -> ir.Value:
        """The layer's input as its kernel reads it; once for all layers that read the same."""
        if layer.input_scale is None:
            return rows
        key = ("rounded", rows, layer.format, layer.input_scale)
        if key not in self._shapes:
            scale = self._float(layer.input_scale)
            if layer.format == "fp8":
                self._shapes[key] = self._round_to_fp8(rows, scale)
            else:
                self._shapes[key] = self._round_to_nvfp4(rows, scale, layer.shape[1])
        return self._shapes[key]

    def _round_to_fp8(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        return self._dequantize(self._quantize(x, scale), scale)

    def _round_to_nvfp4(self, rows: ir.Value, scale: ir.Value, features: int) -> ir.Value:
        self._opsets[_TENSORRT] = 1
        # TensorRT wants to know the blocked axis at build, even where all shapes are dynamic.
        rows = self._one("Reshape", rows, self._ints(-1, features))
        attributes = {"axis": -1, "block_size": BLOCK, "scale_type": int(_FLOAT8)}
        numbers, block_scales = self._emit(
            "TRT_FP4DynamicQuantize", [rows, scale], attributes, _TENSORRT, outputs=2
        )
        steps = self._dequantize(block_scales, scale)
        return self._dequantize(numbers, steps, axis=-1, block_size=BLOCK)

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None = None
    ) -> ir.Value:
        if self._attention is None:
            return super().attention(q, k, v, mask)
        # The builder quantizes the softmax too, for which ONNX has no word.
        scales = self._attention[self._scope]
        q, k, v = (
            self.unpack_kv(self.pack_kv(x, scale), scale)
            for x, scale in ((q, scales.q), (k, scales.k), (v, scales.v))
        )
        return super().attention(q, k, v, mask)

    def pack_kv(self, x: ir.Value, scale: float) -> ir.Value:
        """Keys or values [1, R, H, D] as float8 numbers."""
        out = self._quantize(x, self._float(scale))
        out.meta.update(x.meta)
        return out

    def unpack_kv(self, numbers: ir.Value, scale: float) -> ir.Value:
        """What the numbers of `pack_kv` stand for."""
        out = self._dequantize(numbers, self._float(scale))
        out.meta.update(numbers.meta)
        return out

    def _quantize(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        return self._one("QuantizeLinear", x, scale, output_dtype=int(_FLOAT8))

    def _dequantize(self, numbers: ir.Value, scale: ir.Value, **attributes: Any) -> ir.Value:
        return self._one(
            "DequantizeLinear", numbers, scale, output_dtype=int(self.onnx_dtype), **attributes
        )
