"""Comparisons and sizes of the self-test."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from klein_kv.engines.manifest import EngineManifest, EngineRecord, ProfileRecord
from klein_kv.manifest import Manifest
from klein_kv.runtime.selftest_graphs import compare
from klein_kv.runtime.selftest_limits import EXACT, Limit, tensor_limit
from klein_kv.runtime.selftest_report import CheckError
from klein_kv.runtime.selftest_sizes import engine_sizes, random_inputs, small_sizes
from klein_kv.signature import GRAPH_FILES, KV_STATIC_FLOAT8, GraphSet
from tests.klein_configs import KLEIN_9B
from tests.runtime.fake_engines import make_engines

LIMIT = Limit(norm=0.01, largest=0.1)


def values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((20, 30), np.float32)


def test_equal_tensors_have_no_error() -> None:
    measured = compare({"x": values()}, {"x": values()}, EXACT)
    assert (measured["norm"], measured["largest"], measured["bitwise"]) == (0, 0, True)


def test_the_worst_output_is_told() -> None:
    expected = {"x": values(), "y": values(1)}
    got = {"x": values(), "y": values(1) * np.float32(1.005)}
    measured = compare(got, expected, LIMIT)
    assert measured["output"] == "y"
    assert measured["norm"] == pytest.approx(0.005, rel=1e-3)
    assert not measured["bitwise"]


@pytest.mark.parametrize("exponent", [-20, 0, 20])
def test_errors_are_relative(exponent: int) -> None:
    scale = np.float32(2.0**exponent)
    compare({"x": values() * scale * np.float32(1.009)}, {"x": values() * scale}, LIMIT)
    with pytest.raises(CheckError, match="above the limits"):
        compare({"x": values() * scale * np.float32(1.02)}, {"x": values() * scale}, LIMIT)


def test_one_wrong_element_of_many_is_found() -> None:
    expected = np.random.default_rng(0).standard_normal((1000, 1000), np.float32)
    got = expected.copy()
    got[7, 9] += 1
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < LIMIT.norm
    with pytest.raises(CheckError, match=r"x \(norm .*, largest 0\.2"):
        compare({"x": got}, {"x": expected}, LIMIT)


def test_shapes_and_not_finite_values() -> None:
    with pytest.raises(CheckError, match=r"shape \(20, 30\), expected \(30, 20\)"):
        compare({"x": values()}, {"x": values().T}, LIMIT)
    bad = values()
    bad[0, :3] = np.nan, np.inf, -np.inf
    with pytest.raises(CheckError, match="not finite, x 3 of them") as caught:
        compare({"x": bad}, {"x": values()}, LIMIT)
    assert caught.value.measured == {"not_finite": {"x": 3}}


def test_empty_and_zero_tensors() -> None:
    empty, zero = np.zeros((0, 4), np.float32), np.zeros((2, 2), np.float32)
    compare({"e": empty, "z": zero}, {"e": empty, "z": zero}, EXACT)
    with pytest.raises(CheckError):
        compare({"z": zero + 1}, {"z": zero}, LIMIT)


# --- limits ---


def test_limits_of_quantized_graphs_grow_with_the_blocks_before() -> None:
    config = KLEIN_9B
    own = GraphSet("kv", "bfloat16")
    both = (("text_encoder", "fp8"), ("transformer", "nvfp4"))
    nvfp4 = GraphSet("kv", "bfloat16", None, both)
    fp8 = GraphSet("kv", "bfloat16", None, (("text_encoder", "fp8"), ("transformer", "fp8")))
    packed = replace(fp8, kv_dtype=KV_STATIC_FLOAT8, attention="fp8")

    def norm(graphs: GraphSet, graph: str, name: str) -> float:
        return tensor_limit(graphs, config, graph, name).norm

    values = [norm(fp8, "first_step", f"v_ref.{i}") for i in range(32)]
    assert values == sorted(values)
    assert values[8] == pytest.approx(3 * 2 * 0.039)
    assert norm(fp8, "cached_step", "noise_pred") == values[-1] < 0.5
    assert norm(packed, "first_step", "v_ref.8") > values[8] < norm(nvfp4, "first_step", "v_ref.8")
    # A tensor of zeros has the error 1, whatever the noise and the depth.
    assert norm(nvfp4, "first_step", "noise_pred") == 0.7
    assert norm(fp8, "text_encoder", "encoder_hidden_states") == norm(
        nvfp4, "text_encoder", "encoder_hidden_states"
    )
    for graph, name in (("vae_decoder", "sample"), ("vae_encoder", "ref_hidden_states")):
        assert tensor_limit(nvfp4, config, graph, name) == tensor_limit(own, config, graph, name)
    # Never narrower than what the type of activations allows.
    assert norm(fp8, "first_step", "v_ref.0") == norm(own, "first_step", "v_ref.0")


def test_bytes_of_an_image_may_round_to_either_side() -> None:
    def limit(name: str) -> Limit:
        return tensor_limit(GraphSet("kv", "float32"), KLEIN_9B, "vae_decoder", name)

    image = np.full((1, 40, 40, 3), 128, np.uint8)
    other = image.copy()
    other[0, :2] += 1  # a twentieth of them
    compare({"image": other}, {"image": image}, limit)
    with pytest.raises(CheckError):
        compare({"image": image + 1}, {"image": image}, limit)
    with pytest.raises(CheckError):
        compare({"sample": other / 255}, {"sample": image / 255}, limit)


def test_each_tensor_has_its_own_limit() -> None:
    expected = {"x": values(), "y": values(1)}
    got = {name: array * np.float32(1.05) for name, array in expected.items()}
    limits = {"x": Limit(0.01, 0.1), "y": Limit(0.1, 0.2)}
    with pytest.raises(
        CheckError, match=r"of x \(norm 0\.05, .* at most 0\.01 and 0\.1\) are"
    ) as e:
        compare(got, expected, limits.__getitem__)
    assert (e.value.measured["output"], e.value.measured["limit_norm"]) == ("x", 0.01)


# --- sizes ---


@pytest.mark.parametrize("unit", [8, 16, 32])
def test_small_sizes_are_requests_that_are_served(unit: int) -> None:
    sizes = small_sizes(unit)
    assert all(side % unit == 0 and 128 <= side <= 2048 for side in sizes.output)
    assert all(side % unit == 0 and side >= 64 for size in sizes.references for side in size)
    assert len({sizes.output[0], sizes.output[1]}) == 2


def engines_with(
    artifacts: Path, folder: Path, symbols: dict[str, dict[str, tuple[int, int, int]]]
) -> EngineManifest:
    folder.mkdir()
    loaded = EngineManifest.load(make_engines(artifacts, folder))
    fields = EngineRecord.__slots__
    for graph, ranges in symbols.items():
        record = {name: getattr(loaded.engines[graph], name) for name in fields}
        record["profiles"] = (ProfileRecord("p", ranges, {}),)
        loaded.engines[graph] = EngineRecord(**record)
    return loaded


def test_sizes_that_the_engines_serve(tiny_artifacts: Path, tmp_path: Path) -> None:
    config = Manifest.load(tiny_artifacts).config
    grid, reference = (32, 64, 90), (64, 1024, 1536)
    step = {
        "image_tokens": (1024, 4096, 8100),
        "text_tokens": (512, 512, 512),
        "ref_tokens": (16, 8192, 16384),
    }
    dynamic = engines_with(
        tiny_artifacts,
        tmp_path / "dynamic",
        {
            "vae_decoder": {"grid_height": grid, "grid_width": grid},
            "vae_encoder": {"height": reference, "width": reference},
            "first_step": step,
            "cached_step": step | {"ref_tokens": (0, 8192, 16384)},
        },
    )
    least = engine_sizes(dynamic, config, typical=False)
    assert (least.output, least.references) == ((512, 512), ((64, 64),))
    assert (least.text_tokens, least.without_references) == (512, True)
    usual = engine_sizes(dynamic, config, typical=True)
    assert (usual.output, usual.references) == ((1024, 1024), ((1024, 1024),) * 2)
    fixed = engines_with(
        tiny_artifacts,
        tmp_path / "fixed",
        {
            "vae_decoder": {"grid_height": (64, 64, 64), "grid_width": (64, 64, 64)},
            "vae_encoder": {"height": (1024, 1024, 1024), "width": (1024, 1024, 1024)},
            "first_step": step | {"ref_tokens": (16384, 16384, 16384)},
            "cached_step": step | {"ref_tokens": (16384, 16384, 16384)},
        },
    )
    sizes = engine_sizes(fixed, config, typical=False)
    assert sizes.references == ((1024, 1024),) * 4
    assert not sizes.without_references
    assert sizes == engine_sizes(fixed, config, typical=True)


@pytest.mark.parametrize("graph", GRAPH_FILES)
def test_inputs_fit_the_signature(graph: str, tiny_artifacts: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
    sizes = small_sizes(manifest.config.vae.multiple_of)
    inputs = random_inputs(manifest.graphs, manifest.config, graph, sizes, seed=0)
    signature = manifest.graphs.signature(graph, manifest.config)
    assert list(inputs) == [spec.name for spec in signature.inputs]
    for spec in signature.inputs:
        assert inputs[spec.name].dtype == spec.dtype
        assert inputs[spec.name].ndim == len(spec.shape)
