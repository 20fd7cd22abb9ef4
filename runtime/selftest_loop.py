"""The whole loop on one backend: images that are images, reuse that changes nothing, timings."""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.selftest_graphs import Limits, check_finite, compare
from klein_kv.runtime.selftest_report import CheckError, Report
from klein_kv.runtime.selftest_sizes import CaseSizes
from klein_kv.runtime.timings import Timings

__all__ = ["check_loop", "make_pictures"]

_PROMPT = "a red kite over the sea, photograph"
_STEPS = 4
_ROUNDS, _PATIENCE = 3, 60.0
_FLATTEST = 1e-3
"""Standard deviation of an image in 0..1 below which it shows nothing."""


def make_pictures(sizes: CaseSizes) -> list[Image.Image]:
    """Smooth colour pictures of the references' sizes."""
    rng = np.random.default_rng(3)
    pictures = []
    for height, width in sizes.references:
        coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        image = Image.fromarray(coarse)
        pictures.append(image.resize((width, height), Image.Resampling.BICUBIC))
    return pictures


@dataclass(slots=True)
class _Loop:
    """Calls of one pipeline, all of the same sizes."""

    pipe: KleinKVPipeline
    sizes: CaseSizes
    embeds: NDArray[Any] | None = None
    images: dict[str, NDArray[Any]] = field(default_factory=dict)

    def text(self) -> Mapping[str, Any]:
        with self.pipe.session.record() as timings:
            self.embeds = self.pipe.encode_prompt(
                _PROMPT, self.sizes.text_tokens, self.pipe.config.text_encoder.layers
            )
            spent = timings()
        check_finite({"prompt_embeds": self.embeds.astype(np.float32)})
        return {"timings": spent.to_dict()}

    def call(self, label: str, references: bool, output_type: str = "np") -> Timings:
        height, width = self.sizes.output
        out = self.pipe(
            prompt_embeds=self.embeds,
            image=make_pictures(self.sizes) if references else None,
            height=height,
            width=width,
            num_inference_steps=_STEPS,
            seed=11,
            output_type=output_type,
        )
        assert not isinstance(out, tuple)  # noqa: S101 - return_dict is True
        array = np.asarray(out.images, dtype=np.float32)
        check_finite({"image" if output_type == "np" else "latents": array})
        if output_type == "np" and float(array.std()) < _FLATTEST:
            raise CheckError(
                f"the image is flat: standard deviation {float(array.std()):.2g}, expected at "
                f"least {_FLATTEST:g}"
            )
        self.images[label] = array
        return self.pipe.timings

    def without_references(self) -> Mapping[str, Any]:
        timings = self.call("text", references=False)
        return {"timings": timings.to_dict()}

    def first(self) -> Mapping[str, Any]:
        self.pipe.reference_store.clear()
        timings = self.call("first", references=True)
        plain = self.pipe.manifest.variant == "plain"
        steps = len(timings.plain_steps) if plain else 1 + len(timings.cached_steps)
        if steps != _STEPS or (not plain and not timings.first_step):
            raise CheckError(f"expected {_STEPS} steps, timings tell of {timings.to_text()}")
        return {"timings": timings.to_dict()}

    def repeated(self, limits: Limits) -> Mapping[str, Any]:
        timings = self.call("repeated", references=True)
        measured = {"timings": timings.to_dict()}
        if timings.first_step or timings.vae_encode or len(timings.cached_steps) != _STEPS:
            raise CheckError("the references were encoded again, expected a hit", measured)
        expected = {"image": self.images["first"]}
        return measured | compare({"image": self.images["repeated"]}, expected, limits)

    def stage_times(self) -> Mapping[str, Any]:
        """First and repeated edits in turn, three times or as often as a minute allows."""
        found: dict[str, list[dict[str, Any]]] = {"first": [], "repeated": []}
        start = time.perf_counter()
        while len(found["first"]) < _ROUNDS and time.perf_counter() - start < _PATIENCE:
            self.pipe.reference_store.clear()
            for label, timings in found.items():
                timings.append(self.call(label, references=True).to_dict())
        return {"timings": found}

    def latents(self) -> Mapping[str, Any]:
        timings = self.call("latents", references=True, output_type="latent")
        return {"timings": timings.to_dict(), "std": float(self.images["latents"].std())}


def check_loop(
    report: Report, case: str, pipe: KleinKVPipeline, sizes: CaseSizes, limits: Limits
) -> None:
    """Makes images: of text alone, of references, and of the same references again.

    Args:
        report: where the results go.
        case: begins the checks' names.
        pipe: what is tested, with room in its reference store.
        sizes: of the requests.
        limits: how near a repeated edit is to the first one on this backend.
    """
    pipe.set_progress_bar_config(disable=True)
    loop, kv = _Loop(pipe, sizes), pipe.manifest.variant == "kv"
    names = ["text to image", "first edit", *(["repeated edit equals the first"] if kv else [])]
    names += ["latents are finite", "stage times"]
    if not report.run(f"{case}: prompt to embeddings", loop.text):
        for name in names:
            report.skip(f"{case}: {name}", "there are no text embeddings")
        return
    if sizes.without_references:
        report.run(f"{case}: {names[0]}", loop.without_references)
    else:
        report.skip(f"{case}: {names[0]}", "the engines were built for references only")
    first = report.run(f"{case}: {names[1]}", loop.first)
    if kv and first:
        report.run(f"{case}: {names[2]}", functools.partial(loop.repeated, limits))
    elif kv:
        report.skip(f"{case}: {names[2]}", "there is no first edit")
    report.run(f"{case}: {names[-2]}", loop.latents)
    report.run(f"{case}: {names[-1]}", loop.stage_times)
