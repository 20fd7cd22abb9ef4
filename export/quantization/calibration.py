"""Ranges of the inputs of quantized layers, from whole requests.

A layer's range covers all that it reads: every timestep, the reference stream and the image stream,
the first step and the cached ones. The attention's queries, keys and values are watched too, for
engines that compute it in fp8.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import CheckpointError
from klein_kv.export.checks.artifact_weights import MappedWeights, component_weights
from klein_kv.export.checks.float_vae import FloatVae
from klein_kv.export.checks.samples import Sample
from klein_kv.export.checks.torch_loop import (
    encode_prompt,
    prepare_request,
    reference_kv,
    run_loop,
)
from klein_kv.networks.torch_ops import TorchOps

__all__ = ["Ranges", "calibrate"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Ranges:
    """Largest magnitudes, by name."""

    inputs: dict[str, float] = field(default_factory=dict)  # of layers' inputs, by weight name
    # of "q", "k" (after RoPE) and "v", by block
    attention: dict[str, dict[str, float]] = field(default_factory=dict)
    # If percentiles are wanted: how often each magnitude came, by weight name. Bin b holds those
    # whose float32 has b as its upper 16 bits, so that a bin is at most 1/128 wide.
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def input_range(self, name: str, percentile: float = 100.0) -> float:
        """Magnitude that covers `percentile` percent of a layer's input values.

        Raises:
            KeyError: a layer that was never run.
        """
        if percentile >= 100:
            return self.inputs[name]
        counts = self.histograms[name].cumsum()
        bin_ = int(np.searchsorted(counts, counts[-1] * (percentile / 100)))
        edge = np.array([(bin_ + 1) << 16], np.uint32).view(np.float32)[0]
        return min(float(edge), self.inputs[name])


class _WatchingOps(TorchOps):
    """Computes as `TorchOps` does and notes what layers and attentions read."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        names: frozenset[str],
        ranges: Ranges,
        histograms: bool,
    ) -> None:
        super().__init__(weights, dtype)
        self._names = names
        self._ranges = ranges
        self._histograms = histograms
        self._block = ""
        self._last: tuple[torch.Tensor | None, str, float] = None, "", 0.0

    def linear(
        self, rows: torch.Tensor, weight: str, part: tuple[int, int] | None = None
    ) -> torch.Tensor:
        self._block = ".".join(weight.split(".")[:2])
        if weight in self._names:
            self._note(weight, rows)
        return super().linear(rows, weight, part)

    def _note(self, weight: str, rows: torch.Tensor) -> None:
        last_rows, last_weight, largest = self._last
        if rows is last_rows and weight == last_weight:
            return  # another part of the weight
        if rows is not last_rows:
            largest = float(rows.abs().amax()) if rows.numel() else 0.0
        self._last = rows, weight, largest
        if not np.isfinite(largest):
            raise CheckpointError(
                f"{weight} reads values that are not finite ({largest}) in {self.dtype}; calibrate "
                "artifacts of another --dtype"
            )
        self._ranges.inputs[weight] = max(self._ranges.inputs.get(weight, 0.0), largest)
        if self._histograms:
            bins = rows.float().contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF) >> 16
            counts = torch.bincount(bins.flatten(), minlength=1 << 15).cpu().numpy()
            held = self._ranges.histograms.setdefault(weight, np.zeros(1 << 15, np.int64))
            held += counts

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        held = self._ranges.attention.setdefault(self._block, dict.fromkeys("qkv", 0.0))
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            held[name] = max(held[name], float(tensor.abs().amax()))
        return super().attention(q, k, v, mask)


def calibrate(
    artifacts: Path,
    manifest: Manifest,
    samples: Sequence[Sample],
    names: Mapping[str, Sequence[str]],
    *,
    percentiles: bool = False,
    device: str | None = None,
    text_tokens: int = 512,
) -> dict[str, Ranges]:
    """Runs the samples through the artifacts' own weights, and gives ranges by component.

    Weights are mapped and used one at a time, so memory is bounded by the largest of them and the
    activations of one request.

    `names` are the layers to watch, by component. Without "transformer" only the text encoder
    runs; it always does, since the transformer reads what it makes.

    Raises:
        CheckpointError: activations that are not finite.
        RequestError: samples that cannot be run.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    steps = 4 if "transformer" in names else 0
    vae = FloatVae(artifacts, manifest)
    ranges = {component: Ranges() for component in ("text_encoder", "transformer")}
    ops = {
        component: _WatchingOps(
            MappedWeights(component_weights(artifacts, manifest, component), dtype, device),
            dtype,
            frozenset(names.get(component, ())),
            ranges[component],
            percentiles,
        )
        for component in ranges
    }
    progress: Any = tqdm(total=len(samples) * (steps + 1), desc="calibrating", disable=None)
    with torch.inference_mode(), progress as bar:
        for i, sample in enumerate(samples):
            text = encode_prompt(
                ops["text_encoder"], artifacts, manifest, sample.prompt, text_tokens
            )
            bar.update()
            if steps:
                request = prepare_request(sample, manifest, vae, steps)
                kv = reference_kv(ops["transformer"], manifest, request)
                for _ in run_loop(ops["transformer"], manifest, request, text, kv):
                    bar.update()
            _log.info(
                "calibrated on request %d of %d: %dx%d, %d references",
                i + 1,
                len(samples),
                sample.width,
                sample.height,
                len(sample.images),
            )
    ranges["text_encoder"].attention.clear()  # only the transformer's may be computed in fp8
    return {component: ranges[component] for component in names}
