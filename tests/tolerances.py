"""How far a result may be from diffusers' and transformers' own, and how far it was measured to be.

One table for the whole suite, by (graph, precision). Graphs are those of `klein_kv.signature`;
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
    # Whole runs: prompt and pictures to the last latents, the decoded sample in 0..1, uint8 pixels.
    ("latents", "float32"): Tolerance(1e-4, 0),
    ("sample", "float32"): Tolerance(1e-4, 0),
    ("pixels", "float32"): Tolerance(1, 1),
    ("latents", "float16"): Tolerance(1, 0),
    ("sample", "float16"): Tolerance(1, 0),
    ("pixels", "float16"): Tolerance(100, 0),
    ("text_encoder", "float32"): Tolerance(1e-4, 0),
    ("first_step = references + cached", "float32"): Tolerance(0, 0),
    ("first_step = references + cached", "float16"): Tolerance(0, 0),
    ("text_encoder", "float16"): Tolerance(1, 0),
    **{
        (g, p): Tolerance(1e-4 if p == "float32" else 1, 0)
        for g in ("torch denoise", "torch encode_references", "torch encode_text")
        for p in ("float32", "bfloat16")
    },
    **{
        (g, p): Tolerance(1e-4 if p == "float32" else 1, 0)
        for g in ("encode_references", "first_step", "cached_step", "vae_encoder")
        for p in ("float32", "float16")
    },
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
