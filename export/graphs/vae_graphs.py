"""The VAE's two graphs, written from their description."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import make_signature
from klein_kv.artifacts.weights import WeightRef
from klein_kv.export.graphs.onnx_ops import MICROSOFT, OnnxOps
from klein_kv.networks.vae import vae_decoder, vae_encoder

__all__ = ["vae_graph"]


class ImageOnnxOps(OnnxOps):
    """`OnnxOps` with the operations on images."""

    def conv2d(self, x: ir.Value, name: str, stride: int = 1) -> ir.Value:
        weight, bias = self._layer(name)
        side = self._weights[f"{name}.weight"].shape[-1]
        first, last = (0, 1) if stride == 2 else (side // 2, side // 2)
        return self._one(
            "Conv",
            x,
            weight,
            bias,
            kernel_shape=[side, side],
            strides=[stride, stride],
            pads=[first, first, last, last],
        )

    def group_norm(self, x: ir.Value, name: str, groups: int, eps: float) -> ir.Value:
        return self._one(
            "GroupNormalization", x, *self._layer(name), num_groups=groups, epsilon=eps
        )

    def upsample(self, x: ir.Value) -> ir.Value:
        # In float32 (nearest, so exact): ONNX Runtime has no bfloat16 kernel for it.
        narrow = self.dtype == "bfloat16"
        wide = self.to_float32(x) if narrow else x
        scales = self.constant(np.array([1, 1, 2, 2], np.float32))
        large = self._one(
            "Resize",
            wide,
            None,
            scales,
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )
        return self.to_model_dtype(large) if narrow else large

    def affine(self, x: ir.Value, name: str) -> ir.Value:
        weight, bias = self._layer(name)
        product = self._one("MatMul", x, self._one("Transpose", weight, perm=[1, 0]))
        out = self._one("Add", product, bias)
        out.meta["features"] = self._features(f"{name}.weight", None)
        return out

    def grid_attention(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        features = q.meta["features"]
        if self.dtype == "float32":
            cells = [self._one("Reshape", x, self._ints(0, -1, features)) for x in (q, k, v)]
            out = self._one("MultiHeadAttention", *cells, domain=MICROSOFT, num_heads=1)
        else:
            # With the head as an axis: engines.rewrite computes such attention in parts, and needs
            # the width, which ONNX's shape inference loses at GroupNormalization.
            cells = [self._one("Reshape", x, self._ints(0, 1, -1, features)) for x in (q, k, v)]
            for x in cells:
                x.type = ir.TensorType(self.onnx_dtype)
                x.shape = ir.Shape((None, 1, None, features))
            out = self._one("Attention", *cells)
        return self._one("Reshape", out, self._shape(q, 3, features))

    def statistics(self, name: str, eps: float) -> tuple[ir.Value, ir.Value]:
        mean, variance = (self._weight(f"{name}.running_{x}") for x in ("mean", "var"))
        return mean, self._one("Sqrt", self.add(variance, self.to_model_dtype(self._float(eps))))

    def patchify(self, x: ir.Value, channels: int) -> ir.Value:
        zero, one = self._ints(0), self._ints(1)
        some = self._one("Slice", x, zero, self._ints(channels), one)
        columns = self._one("Reshape", some, self._ints(0, 0, 0, -1, 2))  # [B, C, 2 * h, w, 2]
        turned = self.permute(columns, (0, 3, 1, 4, 2))
        rows = self._one("Reshape", turned, self._ints(0, 0, 0, 0, -1, 2))  # [B, w, C, 2, h, 2]
        cells = self.permute(rows, (0, 4, 1, 2, 5, 3))
        return self._one("Reshape", cells, self._ints(0, 0, 0, 4 * channels))

    def unpatchify(self, x: ir.Value, channels: int) -> ir.Value:
        cells = self._one("Reshape", x, self._ints(0, 0, 0, channels, 2, 2))
        sides = self._one("Mul", self._axes(x, 1, 3), self._ints(2))
        shape = self._one("Concat", self._axes(x, 0, 1), self._ints(channels), sides, axis=0)
        return self._one("Reshape", self.permute(cells, (0, 3, 1, 4, 2, 5)), shape)

    def permute(self, x: ir.Value, axes: tuple[int, ...]) -> ir.Value:
        return self._one("Transpose", x, perm=axes)

    def div(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._one("Div", a, b)

    def clip(self, x: ir.Value, low: float, high: float) -> ir.Value:
        least, most = (self.to_model_dtype(self._float(bound)) for bound in (low, high))
        return self._one("Min", self._one("Max", x, least), most)

    def to_uint8(self, x: ir.Value) -> ir.Value:
        return self._one("Cast", self._one("Round", x), to=ir.DataType.UINT8)

    def _layer(self, name: str) -> tuple[ir.Value, ir.Value]:
        return self._weight(f"{name}.weight"), self._weight(f"{name}.bias")


def vae_graph(
    graph: str, config: ModelConfig, dtype: str, weights: Mapping[str, WeightRef]
) -> ir.Model:
    """Writes `vae_encoder` or `vae_decoder`, whose activations and weights are of type `dtype`."""
    ops = ImageOnnxOps(make_signature(graph, config, dtype), dtype, weights)
    if graph == "vae_encoder":
        tokens = vae_encoder(ops, config.vae, ops.inputs["image"])
        return ops.model([tokens], "Pixels to the transformer's tokens.")
    outputs = vae_decoder(ops, config.vae, ops.inputs["latents"])
    return ops.model(outputs, "The transformer's tokens to pixels, and their values in 0..1.")
