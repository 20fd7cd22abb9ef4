"""How far a result may be from diffusers' and transformers' own, and how far it was measured to be.

One table for the whole suite, by (graph, precision). Graphs are those of `artifacts.signature`;
"latents", "sample" and "pixels" are what a whole run gives. `pytest --measured` prints the largest
error of a run beside each entry.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["MEASURED", "TOLERANCES", "Tolerance", "assert_close"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest absolute difference: the one allowed, and the one measured.

    Measured with torch 2.13, diffusers 0.42, transformers 5.23 and onnxruntime 1.31 on two cores
    of an x86 CPU with AVX2, over every comparison of the suite. The bounds leave room for other
    CPUs, whose kernels add in another order.
    """

    bound: float
    measured: float


TOLERANCES: dict[tuple[str, str], Tolerance] = {
    # Whole runs against diffusers in the same precision: latents after every step (their standard
    # deviation is about 1.4), decoded samples in 0..1, uint8 pixels.
    ("latents", "float32"): Tolerance(1e-4, 6.0e-6),
    ("sample", "float32"): Tolerance(2e-5, 5.5e-6),
    ("pixels", "float32"): Tolerance(1, 1),
    ("latents", "float16"): Tolerance(3e-2, 7.9e-3),
    ("sample", "float16"): Tolerance(6e-3, 2.1e-3),
    ("pixels", "float16"): Tolerance(2, 1),
    ("latents", "bfloat16"): Tolerance(0.2, 0.063),
    ("sample", "bfloat16"): Tolerance(0.07, 0.022),
    ("pixels", "bfloat16"): Tolerance(20, 6),
    # Graphs of each backend against the modules of diffusers and transformers in float32.
    ("first_step", "float32"): Tolerance(1e-5, 1.7e-6),
    ("cached_step", "float32"): Tolerance(1e-5, 3.0e-6),
    ("encode_references", "float32"): Tolerance(1e-5, 1.7e-6),
    ("text_encoder", "float32"): Tolerance(1e-4, 1.8e-5),
    ("vae_encoder", "float32"): Tolerance(1e-4, 2.2e-5),
    ("first_step", "float16"): Tolerance(2e-2, 4.1e-3),
    ("cached_step", "float16"): Tolerance(2e-2, 6.6e-3),
    ("encode_references", "float16"): Tolerance(2e-2, 3.6e-3),
    ("text_encoder", "float16"): Tolerance(0.15, 5.6e-2),
    ("vae_encoder", "float16"): Tolerance(2e-2, 6.1e-3),
    ("first_step", "bfloat16"): Tolerance(0.12, 0.033),
    ("cached_step", "bfloat16"): Tolerance(0.15, 0.051),
    ("encode_references", "bfloat16"): Tolerance(0.1, 0.031),
    ("text_encoder", "bfloat16"): Tolerance(1.6, 0.56),
    ("vae_encoder", "bfloat16"): Tolerance(0.15, 0.052),
    # The two ways to the first step: bit for bit.
    ("first_step = references + cached", "float32"): Tolerance(0, 0),
    ("first_step = references + cached", "float16"): Tolerance(0, 0),
    ("first_step = references + cached", "bfloat16"): Tolerance(0, 0),
    # The same descriptions computed by torch, against the modules in the same precision.
    ("torch denoise", "float32"): Tolerance(1e-5, 1.5e-6),
    ("torch encode_references", "float32"): Tolerance(1e-5, 1.5e-6),
    ("torch encode_text", "float32"): Tolerance(5e-5, 6.8e-6),
    ("torch denoise", "bfloat16"): Tolerance(0.1, 2.4e-2),
    ("torch encode_references", "bfloat16"): Tolerance(0.1, 3.2e-2),
    ("torch encode_text", "bfloat16"): Tolerance(0.6, 0.23),
}

MEASURED: dict[tuple[str, str], float] = {}
"""Largest error of this process, by entry."""


def assert_close(graph: str, precision: str, ours: Any, theirs: Any, what: str = "") -> None:
    """Compares two arrays or tensors under the table's bound.

    Args:
        graph: first half of a key of `TOLERANCES`.
        precision: second half.
        ours: numpy array, torch tensor, PIL image or list of them.
        theirs: alike, of the same shape.
        what: which output, for the message.
    """
    ours, theirs = _array(ours), _array(theirs)
    label = f"{graph} ({precision}){', ' * bool(what)}{what}"
    assert ours.shape == theirs.shape, f"{label}: shape {ours.shape}, expected {theirs.shape}"
    difference = np.abs(ours - theirs)
    largest = float(difference.max(initial=0.0))
    key = graph, precision
    MEASURED[key] = max(MEASURED.get(key, 0.0), largest)
    norm = np.linalg.norm(ours) * np.linalg.norm(theirs)
    cosine = float((ours * theirs).sum() / norm) if norm else float("nan")
    tolerance = TOLERANCES[key]
    assert largest <= tolerance.bound, (  # false for NaN too
        f"{label}: max {largest:.3g} (allowed {tolerance.bound:g}, was measured "
        f"{tolerance.measured:g}), mean {difference.mean():.3g}, cosine {cosine:.8f}, at "
        f"{np.unravel_index(int(difference.argmax()), difference.shape)} of {ours.shape}"
    )


def _array(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return np.stack([_array(item) for item in value])
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value).astype(np.float64)
