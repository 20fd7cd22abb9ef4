"""How far numbers are from what they should be: the one comparer of all checks and tests."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.errors import ArtifactError

__all__ = ["Difference", "compare", "psnr", "ssim"]

_SIGMA, _RADIUS = 1.5, 5  # an 11x11 Gaussian window
_K1, _K2 = 0.01, 0.03


@dataclass(slots=True)
class Difference:
    """The difference of one pair of tensors, or of several pairs that were added up."""

    signal: float = 0.0  # sum of the squares of what was expected
    other: float = 0.0  # ... of what was got
    noise: float = 0.0  # ... of the difference
    product: float = 0.0  # sum of the products of both
    absolute: float = 0.0  # sum of the absolute differences
    count: int = 0  # how many numbers
    max: float = 0.0  # largest absolute difference; NaN where something was not finite
    peak: float = 0.0  # largest absolute value of what was expected
    equal: bool = True  # bit for bit

    def add(self, got: Any, expected: Any) -> None:
        """Adds one pair: numpy arrays, torch tensors, images or lists of images.

        Raises:
            ArtifactError: their shapes differ.
        """
        a, b = _float64(got), _float64(expected)
        if a.shape != b.shape:
            raise ArtifactError(
                f"shape {a.shape}, expected {b.shape}; what is compared does not belong together"
            )
        a, b = a.ravel(), b.ravel()
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(a - b)
            self.signal += float(b @ b)
            self.other += float(a @ a)
            self.noise += float(difference @ difference)
            self.product += float(a @ b)
        self.absolute += float(difference.sum())
        self.count += difference.size
        self.max = float(np.maximum(self.max, difference.max(initial=0.0)))
        self.peak = float(np.maximum(self.peak, np.abs(b).max(initial=0.0)))
        self.equal = self.equal and not difference.any()

    @property
    def mean(self) -> float:
        """Mean absolute difference."""
        return self.absolute / self.count if self.count else 0.0

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of what was expected; NaN if not finite."""
        if self.noise == 0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in dB: infinite without an error, minus infinity if not finite."""
        relative = self.relative
        if relative == 0:
            return math.inf
        return -20 * math.log10(relative) if math.isfinite(relative) else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity of all pairs as one long vector."""
        norm = math.sqrt(self.signal * self.other)
        return self.product / norm if norm else float(self.signal == self.other)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: null for what is not finite."""
        values = {
            "relative": self.relative,
            "max_abs": self.max,
            "mean_abs": self.mean,
            "cosine": self.cosine,
        }
        return {name: x if math.isfinite(x) else None for name, x in values.items()}


def compare(got: Any, expected: Any) -> Difference:
    """The difference of one pair; see `Difference.add`."""
    difference = Difference()
    difference.add(got, expected)
    return difference


def _float64(value: Any) -> NDArray[np.float64]:
    if isinstance(value, list | tuple):
        return np.stack([_float64(item) for item in value])
    if hasattr(value, "detach"):  # a torch tensor, perhaps of a type that numpy does not know
        value = value.detach().cpu().double().numpy()
    return np.asarray(value).astype(np.float64)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; infinite for equal ones."""
    difference = compare(a, b)
    squares = difference.noise / difference.count
    return math.inf if squares == 0 else 10 * math.log10(255.0**2 / squares)


def ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean structural similarity of two uint8 images [H, W, 3], over their colours.

    Source: Z. Wang et al., "Image quality assessment: from error visibility to structural
    similarity", 2004: Gaussian window of 11x11 with sigma 1.5, K1 0.01, K2 0.03. Only windows that
    lie inside the image count.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    likeness = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(likeness.mean())


def _blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        size = x.shape[axis] - 2 * _RADIUS
        pieces = (np.take(x, range(i, i + size), axis) for i in range(len(weights)))
        x = sum(w * piece for w, piece in zip(weights, pieces, strict=True))
    return x
