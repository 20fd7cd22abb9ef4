"""ONNX graphs to TensorRT engines, ahead of time and without a GPU, and what the builder made."""

from klein_kv.engines.build import build_artifacts
from klein_kv.engines.sizes.recipe import Recipe, Size
from klein_kv.engines.sizes.shape_engines import build_shape, shape_recipe

__all__ = ["Recipe", "Size", "build_artifacts", "build_shape", "shape_recipe"]
