"""FLUX.2 [klein] 9B-KV as ONNX graphs and TensorRT engines, and the runtime for them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klein_kv.runtime.pipeline import KleinKVPipeline

__version__ = "0.1.0"
__all__ = ["KleinKVPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded when first used: `import klein_kv` itself stays under a tenth of a second.
    if name == "KleinKVPipeline":
        from klein_kv.runtime.pipeline import KleinKVPipeline

        return KleinKVPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
