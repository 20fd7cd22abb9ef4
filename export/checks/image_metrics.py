"""How alike two images are: PSNR, SSIM, and LPIPS where its package and weights are at hand."""

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["lpips_distance", "lpips_missing", "psnr", "ssim"]

_SIGMA, _RADIUS = 1.5, 5  # an 11x11 Gaussian window
_K1, _K2 = 0.01, 0.03


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; infinite for equal ones."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


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


def lpips_missing() -> str:
    """What LPIPS lacks on this machine; "" if it can run. Nothing is downloaded for it."""
    for module in ("lpips", "torchvision"):
        if importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
    from torch import hub

    folder = Path(hub.get_dir()) / "checkpoints"
    if not any(folder.glob("alexnet-*.pth")):
        return f"the weights of AlexNet are not in {folder}"
    return ""


def lpips_distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Learned perceptual distance (AlexNet) of two uint8 images [H, W, 3]; 0 for equal ones.

    Source: R. Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", 2018, in its authors' package `lpips`. Call it only if `lpips_missing` returns "".
    """
    import lpips
    import torch

    network = lpips.LPIPS(net="alex", verbose=False)
    pair = [
        torch.from_numpy(x.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None] for x in (a, b)
    ]
    with torch.inference_mode():
        return float(network(*pair))
