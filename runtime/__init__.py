"""Runs klein artifacts: schedule in, images out. No torch, diffusers or transformers at import."""

from typing import TYPE_CHECKING

from klein_kv.lazy import lazy_names

if TYPE_CHECKING:
    from klein_kv.runtime.inpaint_pipeline import KleinKVInpaintPipeline
    from klein_kv.runtime.options import RuntimeOptions
    from klein_kv.runtime.pipeline import KleinKVPipeline
    from klein_kv.runtime.planning.edit_plan import PlanOptions, plan_artifacts
    from klein_kv.runtime.references.reference_set import ReferenceSet
    from klein_kv.runtime.timings import Timings

__all__ = [
    "KleinKVInpaintPipeline",
    "KleinKVPipeline",
    "PlanOptions",
    "ReferenceSet",
    "RuntimeOptions",
    "Timings",
    "plan_artifacts",
]

__getattr__ = lazy_names(
    __name__,
    {
        "KleinKVInpaintPipeline": "klein_kv.runtime.inpaint_pipeline",
        "KleinKVPipeline": "klein_kv.runtime.pipeline",
        "PlanOptions": "klein_kv.runtime.planning.edit_plan",
        "ReferenceSet": "klein_kv.runtime.references.reference_set",
        "RuntimeOptions": "klein_kv.runtime.options",
        "Timings": "klein_kv.runtime.timings",
        "plan_artifacts": "klein_kv.runtime.planning.edit_plan",
    },
)
