"""ONNX graphs to TensorRT engines, ahead of time and without a GPU, and what the builder made."""

from typing import TYPE_CHECKING

from klein_kv.lazy import lazy_names

if TYPE_CHECKING:
    from klein_kv.engines.build import build_artifacts
    from klein_kv.engines.sizes.recipe import Recipe, Size
    from klein_kv.engines.sizes.shape_engines import build_shape, shape_recipe

__all__ = ["Recipe", "Size", "build_artifacts", "build_shape", "shape_recipe"]

__getattr__ = lazy_names(
    __name__,
    {
        "Recipe": "klein_kv.engines.sizes.recipe",
        "Size": "klein_kv.engines.sizes.recipe",
        "build_artifacts": "klein_kv.engines.build",
        "build_shape": "klein_kv.engines.sizes.shape_engines",
        "shape_recipe": "klein_kv.engines.sizes.shape_engines",
    },
)
