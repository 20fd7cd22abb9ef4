"""The comparer, its tolerances, and PSNR and SSIM against scikit-image."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.signature import GraphSet, KVFormat
from klein_kv.errors import ArtifactError
from klein_kv.export.checks.compare import Difference, compare, psnr, ssim
from klein_kv.export.checks.samples import made_up_image
from klein_kv.export.checks.tolerances import EXACT, TOLERANCES, Tolerance, output_tolerance
from tests.klein_configs import KLEIN_9B


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


# --- the comparer ---


def test_a_difference() -> None:
    error = compare(np.array([3.0, 4.04]), torch.tensor([3.0, 4.0]))
    assert error.relative == pytest.approx(0.04 / 5)
    assert error.snr == pytest.approx(20 * math.log10(5 / 0.04))
    assert (error.max, error.mean) == (pytest.approx(0.04), pytest.approx(0.02))
    assert not error.equal
    with pytest.raises(ArtifactError, match="does not belong together"):
        compare(np.zeros(2), np.zeros(3))


def test_differences_are_added_up() -> None:
    error = Difference()
    error.add(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.0, 1.0]))
    error.add(torch.tensor([[3.0]]), torch.tensor([[3.0]]))
    assert error.relative == pytest.approx(math.sqrt(1 / 11))
    assert error.cosine == pytest.approx((1 + 2 + 9) / math.sqrt(14 * 11))
    assert (error.max, error.mean, error.peak) == (1, pytest.approx(1 / 3), 3)


def test_equal_zero_and_lost_numbers() -> None:
    exact, nothing = compare(np.ones(3), np.ones(3)), compare(np.zeros(2), np.zeros(2))
    assert (exact.snr, exact.cosine, exact.max) == (math.inf, pytest.approx(1), 0)
    assert (nothing.relative, nothing.cosine) == (0, 1)
    wide = Tolerance(1e9, 0)
    for got, expected in ((np.nan, 1.0), (np.inf, 1.0), (np.inf, np.inf), (1.0, 0.0)):
        lost = compare(np.full(2, got), np.full(2, expected))
        assert lost.snr == -math.inf
        assert not wide.allows(lost)
        assert not EXACT.allows(lost)
    assert lost.to_dict()["relative"] is None
    later = compare(np.full(2, np.nan), np.ones(2))
    later.add(np.ones(2), np.ones(2))
    assert not wide.allows(later)


# --- tolerances ---


def test_a_tolerance_bounds_the_whole_and_the_worst() -> None:
    expected, noise = np.full(10_000, 2.0), np.zeros(10_000)
    tolerance = Tolerance(1e-3, 0)
    assert tolerance.allows(compare(expected * 1.0009, expected))
    assert not tolerance.allows(compare(expected * 1.0011, expected))
    noise[7] = 0.007  # 3.5 thousandths of the largest in one place, 35 millionths of the whole
    assert not tolerance.allows(compare(expected + noise, expected))
    noise[7] = 0.005
    assert tolerance.allows(compare(expected + noise, expected))
    assert Tolerance(1e-3, 0, step=1).allows(
        compare(expected * 100 + noise / 0.005, expected * 100)
    )
    assert EXACT.allows(compare(expected, expected))
    assert not EXACT.allows(compare(expected, np.nextafter(expected, 3)))


def test_every_bound_is_above_what_was_measured() -> None:
    for key, tolerance in TOLERANCES.items():
        assert tolerance.bound >= 1.7 * tolerance.measured, key


def test_bounds_of_outputs() -> None:
    """They grow with the blocks of a model, and with what quantization rounds."""

    def bound(graphs: GraphSet, graph: str, name: str) -> float:
        return output_tolerance(graphs, KLEIN_9B, graph, name).bound

    bf16, kv8 = GraphSet("kv", "bfloat16"), GraphSet("kv", "bfloat16", KVFormat.FP8_PER_HEAD)
    depth = math.sqrt(32 / 5)
    own = TOLERANCES["cached_step", "bfloat16"].bound
    assert bound(bf16, "cached_step", "noise_pred") == pytest.approx(own * depth)
    assert bound(bf16, "vae_decoder", "image") == TOLERANCES["pixels", "bfloat16"].bound
    assert bound(GraphSet("plain", "bfloat16"), "plain_step", "latents") > own
    narrow = bound(GraphSet("kv", "float32"), "first_step", "k_ref.0")
    assert (
        narrow
        < 1e-4
        < bound(GraphSet("kv", "float32", KVFormat.FP8_PER_HEAD), "first_step", "k_ref.0")
    )
    assert bound(kv8, "text_encoder", "encoder_hidden_states") == bound(
        bf16, "text_encoder", "encoder_hidden_states"
    )
    for precision in ("fp8", "nvfp4"):
        graphs = GraphSet("kv", "float16", None, (("transformer", precision),))
        first, fourth = (bound(graphs, "first_step", f"v_ref.{i}") for i in (0, 3))
        assert first == TOLERANCES["transformer", precision].bound
        assert fourth == pytest.approx(min(0.7, 2 * first))
        assert bound(graphs, "first_step", "latents") <= 0.7
