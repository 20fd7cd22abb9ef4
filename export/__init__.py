"""Checkpoint to ONNX graphs: weights, graphs, quantization, checks against diffusers."""

from typing import TYPE_CHECKING

from klein_kv.lazy import lazy_names

if TYPE_CHECKING:
    from klein_kv.export.checks.against import verify_against
    from klein_kv.export.checks.samples import make_samples
    from klein_kv.export.checks.verify import verify_artifacts
    from klein_kv.export.exporter import export_checkpoint
    from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
    from klein_kv.export.quantization.quantize import quantize_artifacts

__all__ = [
    "QuantizationRecipe",
    "export_checkpoint",
    "make_samples",
    "quantize_artifacts",
    "verify_against",
    "verify_artifacts",
]

__getattr__ = lazy_names(
    __name__,
    {
        "QuantizationRecipe": "klein_kv.export.quantization.quantization_recipe",
        "export_checkpoint": "klein_kv.export.exporter",
        "make_samples": "klein_kv.export.checks.samples",
        "quantize_artifacts": "klein_kv.export.quantization.quantize",
        "verify_against": "klein_kv.export.checks.against",
        "verify_artifacts": "klein_kv.export.checks.verify",
    },
)
