"""`klein-kv plan` beside what it plans: files and engines."""

import json
import os
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES
from klein_kv.artifacts.signature import KVFormat
from klein_kv.artifacts.weights import read_header
from klein_kv.cli import main
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.errors import ArtifactError, BuildError, RequestError
from klein_kv.export.checkpoints.weight_index import read_folder
from klein_kv.runtime.planning.edit_plan import EditPlan, PlanOptions, plan_artifacts
from klein_kv.runtime.planning.footprint import base_footprint
from klein_kv.runtime.planning.memory_plan import RESERVED, Stage
from klein_kv.runtime.planning.plan_text import text_from_plans
from tests.runtime.backends.fake_engines import make_engines

SHAPE = {"size": (256, 192), "reference_size": (128, 112), "references": (2,)}
SIZES = {"batch": 1, "text_tokens": 512, "image_tokens": 16 * 12, "ref_tokens": 2 * 8 * 7}
SCRATCH = {"text_encoder": 100_000, "first_step": 300_000, "cached_step": 200_000}
ENGINES = "engines/rtx5090-bf16-tiny"


def unique_bytes(folder, blocks):
    """Bytes of the tensors that are read, from the headers of a checkpoint's files."""
    nbytes = {}
    for part in ("transformer", "text_encoder", "vae"):
        index = read_folder(folder / part, part)
        unread = ("lm_head.", "model.norm.", *(f"model.layers.{i}." for i in range(blocks, 99)))
        nbytes[part] = sum(
            ref.nbytes
            for name, ref in index.items()
            if not name.startswith(unread) and ref.dtype != "int64"
        )
    return nbytes


@pytest.fixture(scope="module")
def built(tiny_bf16_artifacts, tmp_path_factory):
    """The tiny artifacts with some engines of one shape."""
    folder = tmp_path_factory.mktemp("plan") / "artifacts"
    shutil.copytree(tiny_bf16_artifacts, folder, copy_function=os.link)
    make_engines(folder, folder / ENGINES, sizes=dict.fromkeys(SCRATCH, SIZES), scratch=SCRATCH)
    return folder


def one(artifacts, **options) -> EditPlan:
    (edit,) = plan_artifacts(
        artifacts, PlanOptions(**{"precisions": ("bf16",), **SHAPE, **options})
    ).edits
    return edit


def stage_of(plan, name) -> Stage:
    stage = plan.stage(name)
    assert stage is not None
    return stage


# --- memory ---


def test_weights_are_the_tensors_of_the_files_each_once(
    tiny_checkpoint, tiny_artifacts, tiny_bf16_artifacts
):
    expected = unique_bytes(tiny_checkpoint, 27)
    footprint = base_footprint(tiny_bf16_artifacts, Manifest.load(tiny_bf16_artifacts))
    assert footprint.weights == {part: nbytes // 2 for part, nbytes in expected.items()}
    # float32 exports are planned as a GPU would run them.
    wide = base_footprint(tiny_artifacts, Manifest.load(tiny_artifacts))
    assert (wide.weights, wide.graphs) == (footprint.weights, footprint.graphs)
    assert wide.graphs.dtype == "bfloat16"


def test_scratch_is_what_the_engines_report(built):
    edit = one(built)
    for plan in (edit.first, edit.again, one(built, memory=602_500_000).first):
        for stage in plan.stages:
            known = stage.name in SCRATCH
            assert stage.scratch_source == ("rtx5090-bf16-tiny" if known else "estimated")
            if known and not plan.all_fits:
                assert stage.parts["scratch"] == SCRATCH[stage.name]
        if plan.all_fits:  # all engines share what the largest needs
            (shared,) = {stage.parts["scratch"] for stage in plan.stages}
            assert shared >= max(SCRATCH.values())
    assert not plan.all_fits


def test_what_engines_take_is_told_in_pixels(built, capsys):
    area, references = "an area of 0.05 million pixels", "0.03 million pixels together"
    takes = f"takes outputs of {area}; references of {references}"
    plans = plan_artifacts(built, PlanOptions(precisions=("bf16",), **SHAPE))
    assert plans.to_dict()["engines"] == (f"rtx5090-bf16-tiny {takes}",)
    text = " ".join(text_from_plans(plans).split())
    assert f"rtx5090-bf16-tiny {takes} not all in engines, scratch is estimated: bf16" in text
    lines = Path(__file__).parents[2] / "engines/plan/single_block_lines.txt"
    for graph in SCRATCH:
        plan = KernelPlan.from_lines(graph, "a build", lines.read_text().splitlines()[1:15])
        (built / ENGINES / f"{graph}.layers.json").write_text(plan.to_json())
    assert main(["inspect", str(built / ENGINES)]) == 0
    assert f"\n{takes}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"size": (256, 208)},
        {"references": (3,)},
        {"batch": 2},
        {"gpu": "rtx4090"},
        {"precisions": ("fp8",)},
        {"kv_dtype": "fp8"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_engines_of_something_else_do_not_count(built, change):
    """The text encoder does not know of the image: its engine may still serve."""
    first = one(built, **change).first
    for name in ("first_step", "cached_step"):
        assert stage_of(first, name).scratch_source == "estimated"


def test_engines_of_another_export_do_not_count_and_embedded_weights_are_there_twice(
    built, tmp_path
):
    folder = shutil.copytree(built, tmp_path / "artifacts")
    engines = EngineManifest.load(folder / ENGINES)
    replace(engines, weights="embedded").save(folder / ENGINES)
    shared, embedded = one(built).first, one(folder).first
    assert embedded.footprint.weights["transformer"] == 2 * shared.footprint.weights["transformer"]

    manifest = Manifest.load(folder)
    name = "transformer/cached_step.onnx"
    files = manifest.files | {name: replace(manifest.files[name], digest="other")}
    replace(manifest, files=files).save(folder)
    # The runtime refuses the whole folder.
    assert {stage.scratch_source for stage in one(folder).first.stages} == {"estimated"}


@pytest.mark.slow
def test_klein_9b_on_a_32_gb_card(klein_export):
    """Weights to the byte; what fits is arithmetic on them, worked out beside each line."""
    artifacts = klein_export.artifacts
    weights = unique_bytes(klein_export.checkpoint, 27)
    assert base_footprint(artifacts, Manifest.load(artifacts)).weights == weights
    edits = {
        (e.first.footprint.precisions["transformer"], len(e.first.request.references)): e
        for e in plan_artifacts(artifacts, PlanOptions()).edits
    }
    assert len(edits) == 15
    for (precision, count), edit in edits.items():
        assert edit.first.fits
        kv = 2**31 * count  # 2 GiB each
        assert edit.first.kv_bytes == kv
        saved = {"bf16": 0, "fp8": 8_724_152_320, "nvfp4": 12_540_968_960}[precision]
        step = stage_of(edit.first, "cached_step")
        known = weights["transformer"] - saved + kv + step.parts["scratch"] + RESERVED
        others = {"vae": weights["vae"], "text_encoder": weights["text_encoder"]}
        others["text_encoder"] -= 0 if precision == "bf16" else 5_209_325_568
        stays = sum(nbytes for part, nbytes in others.items() if part in step.resident)
        assert step.total == pytest.approx(known + stays, rel=0.02)
    # 18.2 + 11.7 + 0.2 GB of weights leave no room for keys and values
    assert edits["bf16", 1].first.loads == {"text_encoder": weights["text_encoder"]}
    assert edits["nvfp4", 4].first.loads == {}  # 5.6 + 6.5 + 0.2 + 8.6
    assert edits["nvfp4", 4].first.peak < 24e9  # 5.6 + 6.5 + 0.2 + 8.6, scratch 2.0

    small = PlanOptions(
        precisions=("nvfp4",),
        text_precision="fp8",
        references=(4,),
        kv_dtype="fp8",
        memory=24 * 10**9,
    )
    (edit,) = plan_artifacts(artifacts, small).edits
    for plan in (edit.first, edit.again):
        assert plan is not None
        assert plan.fits
        assert plan.loads == {}


# --- quantized precisions ---


def test_quantized_weights_are_those_of_the_files(quantized_bf16_artifacts, tiny_bf16_artifacts):
    """What is planned from shapes before they are made is what they then take."""
    planned = one(tiny_bf16_artifacts, precisions=("nvfp4",)).first.footprint
    made = one(quantized_bf16_artifacts, precisions=("nvfp4",)).first.footprint
    networks = {"transformer": "nvfp4", "text_encoder": "fp8"}
    assert made.precisions == planned.precisions == networks
    assert dict(made.weights) == dict(planned.weights)
    # Independent of the planner: numbers and block scales of the files, and what stays as it is.
    full = base_footprint(quantized_bf16_artifacts, Manifest.load(quantized_bf16_artifacts)).weights
    for component, name in networks.items():
        held = read_header(
            quantized_bf16_artifacts / component / f"{name}.safetensors", quantized=True
        )
        originals = sum(2 * prod(r.shape) for n, r in held.items() if not n.endswith(BLOCK_SCALES))
        stored = sum(ref.nbytes for ref in held.values())
        assert made.weights[component] == full[component] - originals + stored


NVFP4 = {"precision": "nvfp4"}
STATIC = NVFP4 | {"kv_dtype": KVFormat.FP8_CONSTANT}
ATTENTION = STATIC | {"attention": "fp8"}


@pytest.mark.parametrize(
    ("engine", "kind", "asked", "counts"),
    [
        ("nvfp4.cached_step", NVFP4, {}, True),
        ("nvfp4.cached_step", NVFP4, {"kv_dtype": "fp8"}, False),
        ("nvfp4.cached_step_static_fp8_kv", STATIC, {"kv_dtype": "fp8"}, True),
        ("nvfp4.cached_step_static_fp8_kv", STATIC, {"attention": "fp8"}, True),
        ("nvfp4.cached_step_fp8_attention", ATTENTION, {"attention": "fp8"}, True),
        ("nvfp4.cached_step_fp8_attention", ATTENTION, {"kv_dtype": "fp8"}, False),
        ("cached_step", {}, {}, False),
    ],
)
def test_engines_count_for_what_they_were_built_from(
    engine, kind, asked, counts, built, quantized_bf16_artifacts, tmp_path
):
    """Attention in float8 falls back to engines that share its keys and values."""
    digest = Manifest.load(quantized_bf16_artifacts).files[f"transformer/{engine}.onnx"].digest
    engines = EngineManifest.load(built / ENGINES)
    record = replace(engines.engines["cached_step"], onnx_digest=digest)
    replace(engines, engines={"cached_step": record}, **kind).save(tmp_path)
    first = one(quantized_bf16_artifacts, precisions=("nvfp4",), engines=tmp_path, **asked).first
    expected = tmp_path.name if counts else "estimated"
    assert stage_of(first, "cached_step").scratch_source == expected


def test_plain_weights(plain_artifacts):
    edit = one(plain_artifacts, size=(128, 128))
    assert (edit.again, edit.first.kv_bytes, edit.kept_sets) == (None, 0, 0)
    names = [stage.name for stage in edit.first.stages]
    assert names == ["text_encoder", "vae_encoder", "plain_step", "vae_decoder"]


# --- the command ---


def test_bad_options(tiny_artifacts, tmp_path):
    for options, error, message in (
        ({"references": (-1,)}, RequestError, "references is -1"),
        ({"batch": 0}, RequestError, "batch is 0"),
        ({"kv_dtype": "int3"}, RequestError, "kv_dtype is 'int3', expected 'bf16' or 'fp8'"),
        ({"precisions": ("int3",)}, RequestError, "precision is 'int3', expected one of bf16"),
        ({"attention": "int3"}, RequestError, "attention is 'int3', expected 'fp8' or None"),
        (
            {"attention": "fp8", "precisions": ("bf16",)},
            RequestError,
            "belong to a quantized precision",
        ),
        ({"text_precision": "fp32"}, RequestError, "precision is 'fp32'"),
        ({"size": (100, 128)}, RequestError, "size is 100x128, expected multiples of 16"),
        ({"gpu": "abacus"}, BuildError, "unknown target"),
        ({"gpu": "rtx4080"}, RequestError, "figures of rtx4080 are not known"),
        ({"engines": tmp_path}, ArtifactError, "holds no engines"),
    ):
        with pytest.raises(error, match=message):
            plan_artifacts(tiny_artifacts, PlanOptions(**options))


def test_command_prints_a_line_per_request(tiny_artifacts, capsys):
    assert main(["plan", str(tiny_artifacts), "--size", "512x256", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    plans = value["plans"]
    needs = ["export", "build, shared weights", "run: pinned buffers for uploads"]
    assert list(value["host"]) == needs
    assert [plan["references"] for plan in plans] == [0, 1, 2, 3, 4] * 3
    assert all(plan["size"] == [512, 256] and plan["fits"] for plan in plans)
    last = plans[-1]
    kinds = last["precision"], last["text_precision"], last["kv_dtype"]
    assert kinds == ("nvfp4", "fp8", "bfloat16")
    for edit in ("first_edit", "repeated_edit"):
        for stage in last[edit]["stages"]:
            parts = [v for k, v in stage.items() if k not in ("total", "loads") and type(v) is int]
            assert sum(parts) == stage["total"]
    assert plans[0]["repeated_edit"] is None


def test_what_comes_again_is_read_from_the_host(tiny_bf16_artifacts):
    edit = one(tiny_bf16_artifacts)
    weights = edit.first.footprint.weights
    memory = edit.first.peak - weights["text_encoder"]
    options = PlanOptions(precisions=("bf16",), memory=memory, **SHAPE)
    plans = plan_artifacts(tiny_bf16_artifacts, options)
    loads = [sum(p.loads.values()) for e in plans.edits for p in (e.first, e.again) if p]
    assert plans.host["run: file cache for weights"] == max(loads)
    assert max(loads) >= weights["text_encoder"]
    assert "run: file cache for weights" in text_from_plans(plans)


def test_command_says_what_would_fit(tiny_artifacts, capsys):
    request = ["--refs", "4", "--precision", "bf16", "--memory", "0.7", "--size", "512x512"]
    assert main(["plan", str(tiny_artifacts), *request]) == 1
    out = capsys.readouterr().out
    assert "does NOT fit" in out
    assert "bf16/bf16, 4 references: no references (0.63); references up to 896x896 (0.70)" in out
    assert main(["plan", str(tiny_artifacts), *request, "--kv-dtype", "fp8", "--json"]) == 1
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert not plan["fits"]
    assert plan["kv_dtype"] == "float8_e4m3fn"
    assert all(choice["peak"] <= 0.7e9 for choice in plan["what_fits"])


@pytest.mark.parametrize("memory", [None, 620_000_000])
def test_text_is_for_a_terminal_of_100_columns(tiny_artifacts, memory):
    options = PlanOptions(memory=memory, size=(256, 256), reference_size=(512, 512))
    lines = text_from_plans(plan_artifacts(tiny_artifacts, options)).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith(("bf16/bf16 ", "fp8/fp8 ", "nvfp4/fp8 ")) for line in lines) == 15
    assert ("what would fit instead:" in lines) == (memory is not None)
