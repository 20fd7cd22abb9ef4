"""FLUX.2 [klein] 9B-KV as ONNX graphs and TensorRT engines, and the runtime for them."""

from typing import TYPE_CHECKING

from klein_kv.lazy import lazy_names

if TYPE_CHECKING:
    from klein_kv.runtime.inpaint_pipeline import KleinKVInpaintPipeline
    from klein_kv.runtime.pipeline import KleinKVPipeline

__version__ = "0.1.0"
__all__ = ["KleinKVInpaintPipeline", "KleinKVPipeline", "__version__"]

__getattr__ = lazy_names(
    __name__,
    {
        "KleinKVInpaintPipeline": "klein_kv.runtime.inpaint_pipeline",
        "KleinKVPipeline": "klein_kv.runtime.pipeline",
    },
)
