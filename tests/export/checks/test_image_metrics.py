"""PSNR and SSIM against scikit-image."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from klein_kv.export.checks.image_metrics import lpips_distance, lpips_missing, psnr, ssim
from klein_kv.export.checks.samples import made_up_image


def pair(noise: float, size: tuple[int, int] = (72, 56)) -> tuple[NDArray[np.uint8], ...]:
    a = np.asarray(made_up_image(*size, 0))
    change = np.random.default_rng(1).normal(0, noise, a.shape)
    return a, np.clip(a + change, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [1.0, 10.0, 60.0])
def test_scikit_images_numbers(noise: float) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pair(noise)
    assert psnr(a, b) == pytest.approx(metrics.peak_signal_noise_ratio(a, b), abs=1e-9)
    expected = metrics.structural_similarity(
        a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)


def test_equal_images() -> None:
    a, _ = pair(0)
    assert psnr(a, a) == float("inf")
    assert ssim(a, a) == pytest.approx(1)


def test_lpips_is_missed_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch import hub

    monkeypatch.setattr(hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "lpips is not installed" in lpips_missing()
    for name in ("lpips", "torchvision"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    assert "AlexNet are not in" in lpips_missing()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/alexnet-owt-7be5be79.pth").touch()
    assert lpips_missing() == ""


def test_lpips_gets_images_as_its_package_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        def __init__(self, net: str, verbose: bool) -> None:
            assert (net, verbose) == ("alex", False)

        def __call__(self, a, b):
            assert a.shape == b.shape == (1, 3, 56, 72)
            assert (a.min() >= -1, a.max() <= 1) == (True, True)
            return ((a - b) ** 2).mean()

    module = types.ModuleType("lpips")
    module.LPIPS = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    a, b = pair(10)
    expected = np.mean(((a.astype(float) - b.astype(float)) / 127.5) ** 2)
    assert lpips_distance(a, b) == pytest.approx(expected, rel=1e-4)
