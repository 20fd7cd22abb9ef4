"""The plan of device memory: exact where it can be, and honest about what it estimates."""

import json
from pathlib import Path

import pytest

from klein_kv.cli import main
from klein_kv.errors import BuildError, RequestError
from klein_kv.manifest import Manifest
from klein_kv.runtime.memory_plan import (
    PRECISIONS,
    RESERVED,
    Request,
    component_bytes,
    make_plan,
    plan_artifacts,
)
from klein_kv.signature import GraphSet
from klein_kv.weights import WeightIndex

GRAPHS = GraphSet("kv", "float32")
WEIGHTS = {"text_encoder": 1_000_000, "transformer": 2_000_000, "vae": 300_000}


def test_weights_are_the_tensors_of_the_files_each_once(tiny_artifacts: Path):
    found = component_bytes(tiny_artifacts, GRAPHS, "fp32")
    for part in ("transformer", "vae"):
        index = WeightIndex.from_folder(tiny_artifacts / part, part)
        floats = sum(ref.nbytes for ref in index.values() if ref.dtype == "float32")
        assert found[part] == floats
    index = WeightIndex.from_folder(tiny_artifacts / "text_encoder", "text_encoder")
    unread = [n for n in index if n.startswith(("model.layers.27.", "model.norm", "lm_head"))]
    assert unread
    read = sum(ref.nbytes for name, ref in index.items() if name not in unread)
    assert found["text_encoder"] == read


def test_low_precision_shrinks_the_block_linears_alone(tiny_artifacts: Path):
    full, fp8, fp4 = (component_bytes(tiny_artifacts, GRAPHS, p) for p in ("fp32", "fp8", "nvfp4"))
    assert full["vae"] == fp8["vae"]
    assert full["text_encoder"] == fp8["text_encoder"]
    linears = (full["transformer"] - fp8["transformer"]) / (4 - PRECISIONS["fp8"])
    assert fp8["transformer"] - fp4["transformer"] == pytest.approx(
        linears * (1 - PRECISIONS["nvfp4"]), rel=1e-6
    )


def test_stages_add_up(tiny_artifacts: Path):
    config = Manifest.load(tiny_artifacts).config
    request = Request(256, 128, 2, reference_side=128, batch=3)
    scratch = dict.fromkeys(
        ("text_encoder", "vae_encoder", "first_step", "cached_step", "vae_decoder"), 7
    )
    plan = make_plan(config, "float32", WEIGHTS, request, 10**12, scratch=scratch)
    net = config.transformer
    kv = 2 * (2 * 64) * net.num_blocks * net.inner_dim * 4
    assert plan.kv_bytes == kv
    stages = {stage.name: stage.parts for stage in plan.stages}
    assert stages["cached_step"]["reference K/V"] == kv
    assert "reference K/V" not in stages["text_encoder"]
    pixels = 3 * 256 * 128 * 3
    latents = 3 * 128 * net.in_channels * 4
    assert stages["vae_decoder"]["inputs and outputs"] == pixels + 4 * pixels + latents
    assert all(parts["reserved"] == RESERVED for parts in stages.values())
    assert plan.peak == max(sum(parts.values()) for parts in stages.values())
    assert plan.scratch_source == "engines"


def test_text_encoder_goes_where_it_does_not_fit(tiny_artifacts: Path):
    config = Manifest.load(tiny_artifacts).config
    request = Request(128, 128, 4, reference_side=128)
    roomy = make_plan(config, "float32", WEIGHTS, request, 10**12)
    assert roomy.text_stays
    assert roomy.fits
    tight = make_plan(config, "float32", WEIGHTS, request, roomy.peak - 1)
    assert not tight.text_stays
    assert tight.fits
    assert tight.peak < roomy.peak
    assert not make_plan(config, "float32", WEIGHTS, request, RESERVED).fits


def test_without_references_there_is_no_first_step(tiny_artifacts: Path):
    config = Manifest.load(tiny_artifacts).config
    plan = make_plan(config, "float32", WEIGHTS, Request(128, 128, 0), 10**12)
    assert [s.name for s in plan.stages] == ["text_encoder", "cached_step", "vae_decoder"]
    assert plan.scratch_source == "estimated"


def test_bad_requests(tiny_artifacts: Path):
    with pytest.raises(RequestError, match="references is -1"):
        Request(128, 128, -1)
    with pytest.raises(RequestError, match="batch is 0"):
        Request(128, 128, 1, batch=0)
    with pytest.raises(RequestError, match="precision is 'int3'"):
        plan_artifacts(tiny_artifacts, "rtx5090", [Request(128, 128, 1)], ["int3"])
    with pytest.raises(BuildError, match="unknown target"):
        plan_artifacts(tiny_artifacts, "abacus", [Request(128, 128, 1)], ["bf16"])
    with pytest.raises(RequestError, match="memory of rtx4080 is not known"):
        plan_artifacts(tiny_artifacts, "rtx4080", [Request(128, 128, 1)], ["bf16"])


def test_command_prints_a_line_per_request(tiny_artifacts: Path, capsys):
    assert main(["plan", str(tiny_artifacts), "--size", "512x256", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert len(plans) == 15
    assert {plan["references"] for plan in plans} == {0, 1, 2, 3, 4}
    assert all(plan["size"] == [512, 256] and plan["fits"] for plan in plans)
    assert main(["plan", str(tiny_artifacts), "--refs", "2", "--precision", "bf16"]) == 0
    assert "fits" in capsys.readouterr().out
