"""What the GPU's thread does with a job: the one place where the service calls the pipeline."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from klein_kv.errors import (
    ArtifactError,
    BackendError,
    CapacityError,
    NotFiniteError,
    RequestError,
)
from klein_kv.runtime.inpaint_pipeline import KleinKVInpaintPipeline
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.references.reference_encoder import PreparedReferences
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import EditJob, EditResult, EncodeResult, EngineFacts, Job
from klein_kv.runtime.timings import Timings

__all__ = [
    "DeviceLostError",
    "PipelineRunner",
    "StoppedError",
    "WarmUp",
    "is_out_of_memory",
    "preview_steps",
    "refusal",
]

_log = logging.getLogger(__name__)


class DeviceLostError(BackendError):
    """The device does not answer any more, or nothing works on it: only a new process helps."""


class StoppedError(Exception):
    """Nobody waits for the job any more."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """An edit, with references of its size, that is compiled for before the service is ready."""

    width: int
    height: int
    references: int = 0


class PipelineRunner:
    """A pipeline that is opened and used by one thread.

    Args:
        open_pipeline: opens it.
        warm_ups: sizes to warm up.
        loras: files of adapters by the name under which requests know them.

    Attributes:
        facts: what was opened.
    """

    def __init__(
        self,
        open_pipeline: Callable[[], KleinKVPipeline],
        warm_ups: tuple[WarmUp, ...] = (),
        loras: Mapping[str, Path] | None = None,
    ) -> None:
        self.pipe = pipe = open_pipeline()
        pipe.set_progress_bar_config(disable=True)
        self._masked = KleinKVInpaintPipeline.from_pipe(pipe)
        for name, file in (loras or {}).items():
            pipe.load_lora_weights(file, adapter_name=name)
        pipe.set_adapters([], [])
        self._loras: tuple[tuple[str, float], ...] = ()
        self.facts = EngineFacts(
            model=pipe.manifest.model_id,
            model_digest=pipe.manifest.graphs_digest(pipe.graphs),
            variant=pipe.manifest.variant,
            unit=pipe.config.vae.multiple_of,
            backend=pipe.backend.name,
            loras=tuple(loras or ()),
        )
        self._warm_ups = warm_ups
        if not warm_ups:
            _log.info("nothing is warmed up: the first request of each size loads and compiles")
        for size in warm_ups:
            _log.info("warmed up %dx%d: %s", size.width, size.height, self._warm_up(size).to_text())

    def edit(
        self, job: EditJob, wanted: Callable[[], bool], on_denoised: Callable[[Any], None]
    ) -> EditResult:
        """Makes the images of a job, one after the other: image i has the noise of `seed + i`.

        `wanted` is asked after every step, and ends the job by `StoppedError`; `on_denoised` gets
        the latents that a step foresees, where previews are wanted. Raises what the pipeline does.
        """
        shown = preview_steps(job.steps, job.previews)

        def after_step(_pipe: Any, step: int, _timestep: float, tensors: Any) -> None:
            if not wanted():
                raise StoppedError
            if step in shown:
                on_denoised(tensors["denoised"])

        self._use(job.loras)
        images: list[Image.Image] = []
        references_known = False
        stages_s: dict[str, float] = {}
        for i in range(job.num_images):
            result = self._call(
                job,
                seed=job.seed + i,
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=("denoised",) if shown else (),
            )
            timings = self.pipe.timings
            if i == 0:
                computed = timings.first_step or timings.plain_steps
                references_known = bool(job.references) and not computed
            images += result.images
            _add(stages_s, timings)
        return EditResult(tuple(images), references_known, stages_s=stages_s)

    def encode(self, job: Job) -> EncodeResult:
        """Makes keys and values, or finds them."""
        self._use(job.loras)
        store = self.pipe.reference_store
        before = store.stats.misses
        references = self.pipe.encode_references(_prepared(job))
        return EncodeResult(
            known=store.stats.misses == before,
            nbytes=references.nbytes,
            tokens=references.num_tokens,
        )

    def preview(self, denoised: Any) -> Image.Image | None:
        """A picture of foreseen latents, in any thread; None where artifacts cannot make one."""
        try:
            return self.pipe.preview(denoised)[0]
        except ArtifactError as error:
            _log.warning("no previews: %s", error)
            return None

    def free(self) -> None:
        """Gives up what is kept between requests."""
        self.pipe.reference_store.clear()
        self.pipe.prompt_cache.clear()

    def works(self, *, thoroughly: bool = False) -> bool:
        """Whether the device still answers: after some errors it never does again.

        `thoroughly` asks it for a whole edit, of the first size that was warmed up.
        """
        try:
            sent = np.arange(4, dtype=np.float32)
            session = self.pipe.session
            if thoroughly and self._warm_ups:
                self._warm_up(self._warm_ups[0])
            return bool((session.download(session.upload(sent)) == sent).all())
        except Exception:  # noqa: BLE001 - whatever a library raises
            _log.exception("the device does not answer any more")
            return False

    def gauges(self) -> dict[str, float]:
        """What the reference store holds and did."""
        stats = self.pipe.reference_store.stats
        names = ("bytes", "entries", "hits", "misses", "restored", "evictions")
        return {f"reference_store_{name}": getattr(stats, name) for name in names}

    def close(self) -> None:
        """Frees the pipeline."""
        self.pipe.close()

    def _warm_up(self, size: WarmUp) -> Timings:
        references = [(size.height, size.width)] * size.references
        return self.pipe.warm_up(size.height, size.width, references)

    def _call(self, job: EditJob, **more: Any) -> Any:
        arguments: dict[str, Any] = {
            "prompt": job.prompt,
            "height": job.height,
            "width": job.width,
            "num_inference_steps": job.steps,
            **more,
        }
        if job.mask is None:
            return self.pipe(image=_prepared(job), **arguments)
        first, *others = (Image.fromarray(x) for x in job.references)
        return self._masked(
            image=first,
            image_reference=others,
            mask_image=Image.fromarray(job.mask),
            strength=job.strength,
            overlay=True,
            **arguments,
        )

    def _use(self, loras: tuple[tuple[str, float], ...]) -> None:
        if loras != self._loras:
            self.pipe.set_adapters([name for name, _ in loras], [weight for _, weight in loras])
            self._loras = loras


def preview_steps(steps: int, count: int) -> set[int]:
    """Indices of at most `count` steps, evenly spread, the last one left out."""
    chosen = {round(k * steps / (count + 1)) - 1 for k in range(1, count + 1)}
    return {step for step in chosen if 0 <= step < steps - 1}


def refusal(error: Exception) -> ServiceError | None:
    """What a caller is told of an error of the pipeline; None where nobody foresaw it."""
    if is_out_of_memory(error):
        return ServiceError(
            "out_of_memory",
            "there is not enough memory for this request; ask for a smaller image, or fewer "
            "references",
            retry_after_s=5,
        )
    if isinstance(error, RequestError):
        return ServiceError("invalid_value", "the model refuses these arguments")
    if isinstance(error, NotFiniteError):
        return ServiceError(
            "internal_error", "the result is not finite; other weights of LoRAs may help"
        )
    if isinstance(error, ArtifactError):
        return ServiceError(
            "unsupported_parameter", "the model was exported without what this request needs"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in words of ours or of a library below."""
    if isinstance(error, CapacityError | MemoryError):
        return True
    words = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(
        sign in words for sign in ("out of memory", "failed to allocate", "bad allocation")
    )


def _prepared(job: Job) -> Any:
    """References with their digest, so that nothing is resized or hashed on this thread."""
    if not job.references:
        return None
    return PreparedReferences(tuple(x[None] for x in job.references), job.digest, "")


def _add(seconds: dict[str, float], timings: Timings) -> None:
    for name, value in timings.to_dict().items():
        total = sum(value) if isinstance(value, tuple) else value
        seconds[name] = seconds.get(name, 0.0) + total
