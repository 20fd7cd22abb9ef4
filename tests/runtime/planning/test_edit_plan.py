"""`klein-kv plan` beside what it plans: files and engines."""

import json
import os
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES
from klein_kv.artifacts.signature import KVFormat
from klein_kv.artifacts.weights import read_header
from klein_kv.cli import main
from klein_kv.errors import ArtifactError, BuildError, RequestError
from klein_kv.export.checkpoints.weight_index import read_folder
from klein_kv.runtime.planning.edit_plan import EditPlan, PlanOptions, Plans, plan_artifacts
from klein_kv.runtime.planning.footprint import base_footprint
from klein_kv.runtime.planning.memory_plan import RESERVED
from klein_kv.runtime.planning.plan_text import text_from_plans
from tests.conftest import KleinExport

RECIPE = """
[[profiles]]
name = "tiny"
output = "256x192"
references = 2
reference_size = "128x112"
"""
SHAPE = {"size": (256, 192), "reference_size": (128, 112), "references": (2,)}
BUILT = ["text_encoder", "first_step", "cached_step"]


def unique_bytes(folder: Path, blocks: int) -> dict[str, int]:
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
def built(tiny_bf16_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifacts with some engines of one shape."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'klein-kv[rtx]'")
    from klein_kv.engines.build import build_artifacts
    from klein_kv.engines.sizes.recipe import Recipe

    folder = tmp_path_factory.mktemp("plan") / "artifacts"
    shutil.copytree(tiny_bf16_artifacts, folder, copy_function=os.link)
    recipe = Recipe.from_toml(RECIPE, "tiny")
    build_artifacts(folder, recipe=recipe, graphs=BUILT, progress=False)
    return folder


def engines_of(folder: Path) -> EngineManifest:
    return EngineManifest.load(folder / "engines/rtx5090-bf16-tiny")


def one(artifacts: Path, **options: Any) -> EditPlan:
    chosen: dict[str, Any] = {"precisions": ("bf16",), **SHAPE, **options}
    (edit,) = plan_artifacts(artifacts, PlanOptions(**chosen)).edits
    return edit


# --- memory ---


def test_weights_are_the_tensors_of_the_files_each_once(
    tiny_checkpoint: Path, tiny_artifacts: Path, tiny_bf16_artifacts: Path
) -> None:
    expected = unique_bytes(tiny_checkpoint, 27)
    footprint = base_footprint(tiny_bf16_artifacts, Manifest.load(tiny_bf16_artifacts))
    assert footprint.weights == {part: nbytes // 2 for part, nbytes in expected.items()}
    # float32 exports are planned as a GPU would run them.
    wide = base_footprint(tiny_artifacts, Manifest.load(tiny_artifacts))
    assert (wide.weights, wide.graphs) == (footprint.weights, footprint.graphs)
    assert wide.graphs.dtype == "bfloat16"


def test_scratch_is_what_the_engines_report(built: Path) -> None:
    records = engines_of(built).engines
    for plan in (one(built).first, one(built).again, one(built, memory=680_000_000).first):
        assert plan is not None
        for stage in plan.stages:
            if stage.name in BUILT:
                assert stage.scratch_source == "rtx5090-bf16-tiny"
                assert stage.parts["scratch"] >= records[stage.name].scratch_bytes
                if not plan.all_fits:
                    assert stage.parts["scratch"] == records[stage.name].scratch_bytes
            else:
                assert stage.scratch_source == "estimated"
        if plan.all_fits:  # all engines share what the largest needs
            assert len({stage.parts["scratch"] for stage in plan.stages}) == 1


def test_what_engines_take_is_told_in_pixels(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    area, references = "an area of 0.05 million pixels", "0.03 million pixels together"
    takes = f"takes outputs of {area}; references of {references}"
    plans = plan_artifacts(built, PlanOptions(precisions=("bf16",), **SHAPE))
    assert plans.to_dict()["engines"] == (f"rtx5090-bf16-tiny {takes}",)
    text = " ".join(text_from_plans(plans).split())
    assert f"rtx5090-bf16-tiny {takes} not all in engines, scratch is estimated: bf16" in text
    assert main(["inspect", str(built / "engines/rtx5090-bf16-tiny")]) == 0
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
def test_engines_of_something_else_do_not_count(built: Path, change: dict[str, Any]) -> None:
    """The text encoder does not know of the image: its engine may still serve."""
    edit = one(built, **change)
    for name in ("first_step", "cached_step"):
        stage = edit.first.stage(name)
        assert stage is not None
        assert stage.scratch_source == "estimated"


def test_engines_of_another_export_do_not_count(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    shutil.copytree(built, folder)
    manifest = Manifest.load(folder)
    name = "transformer/cached_step.onnx"
    files = manifest.files | {name: replace(manifest.files[name], digest="other")}
    replace(manifest, files=files).save(folder)
    stages = {stage.name: stage.scratch_source for stage in one(folder).first.stages}
    assert set(stages.values()) == {"estimated"}  # the runtime refuses the whole folder


def test_embedded_weights_are_there_twice(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    shutil.copytree(built, folder)
    replace(engines_of(folder), weights="embedded").save(folder / "engines/rtx5090-bf16-tiny")
    shared, embedded = one(built).first, one(folder).first
    assert embedded.footprint.weights["transformer"] == 2 * shared.footprint.weights["transformer"]


@pytest.mark.slow
def test_klein_9b_on_a_32_gb_card(klein_export: KleinExport) -> None:
    """Weights to the byte; what fits is arithmetic on them, worked out beside each line."""
    artifacts = klein_export.artifacts
    weights = unique_bytes(klein_export.checkpoint, 27)
    assert base_footprint(artifacts, Manifest.load(artifacts)).weights == weights
    plans = plan_artifacts(artifacts, PlanOptions())
    edits = {
        (e.first.footprint.precisions["transformer"], len(e.first.request.references)): e
        for e in plans.edits
    }
    assert len(edits) == 15
    assert all(edit.first.fits for edit in edits.values())
    for (precision, count), edit in edits.items():
        kv = 2**31 * count  # 2 GiB each
        assert edit.first.kv_bytes == kv
        saved = {"bf16": 0, "fp8": 8_724_152_320, "nvfp4": 12_540_968_960}[precision]
        step = edit.first.stage("cached_step")
        assert step is not None
        known = weights["transformer"] - saved + kv + step.parts["scratch"] + RESERVED
        others = {"vae": weights["vae"], "text_encoder": weights["text_encoder"]}
        others["text_encoder"] -= 0 if precision == "bf16" else 5_209_325_568
        stays = sum(nbytes for part, nbytes in others.items() if part in step.resident)
        assert step.total == pytest.approx(known + stays, rel=0.02)
    # 18.2 + 11.7 + 0.2 GB of weights leave no room for keys and values
    assert edits["bf16", 1].first.loads == {"text_encoder": weights["text_encoder"]}
    assert edits["nvfp4", 4].first.loads == {}  # 5.6 + 6.5 + 0.2 + 8.6

    small = {"precisions": ("nvfp4",), "text_precision": "fp8", "references": (4,)}
    (edit,) = plan_artifacts(artifacts, PlanOptions(**small)).edits
    assert edit.first.loads == {}
    assert edit.again is not None
    assert edit.again.loads == {}
    assert edit.first.peak < 24e9  # 5.6 + 6.5 + 0.2 + 8.6, scratch 2.0
    (edit,) = plan_artifacts(
        artifacts, PlanOptions(**small, kv_dtype="fp8", memory=24 * 10**9)
    ).edits
    assert edit.first.fits
    assert edit.first.loads == {}
    assert edit.again is not None
    assert edit.again.loads == {}
    assert edit.again.fits


# --- quantized precisions ---


@pytest.fixture(scope="module")
def quantized(quantized_bf16_artifacts: Path) -> Path:
    """The tiny artifacts in bfloat16 and in nvfp4."""
    return quantized_bf16_artifacts


def test_quantized_weights_are_those_of_the_files(
    quantized: Path, tiny_bf16_artifacts: Path
) -> None:
    """What is planned from shapes before they are made is what they then take."""
    options = {"precisions": ("nvfp4",), "text_precision": None}
    planned = one(tiny_bf16_artifacts, **options).first.footprint
    made = one(quantized, **options).first.footprint
    assert made.precisions == planned.precisions == {"transformer": "nvfp4", "text_encoder": "fp8"}
    assert dict(made.weights) == dict(planned.weights)
    # Independent of the planner: numbers and block scales of the files, and what stays as it is.
    networks = {"transformer": "nvfp4", "text_encoder": "fp8"}
    full = base_footprint(quantized, Manifest.load(quantized)).weights
    for component, name in networks.items():
        held = read_header(quantized / component / f"{name}.safetensors", quantized=True)
        originals = sum(2 * prod(r.shape) for n, r in held.items() if not n.endswith(BLOCK_SCALES))
        stored = sum(ref.nbytes for ref in held.values())
        assert made.weights[component] == full[component] - originals + stored


NVFP4: dict[str, Any] = {"precision": "nvfp4"}
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
    built: Path,
    quantized: Path,
    tmp_path: Path,
    engine: str,
    kind: dict[str, Any],
    asked: dict[str, Any],
    counts: bool,
) -> None:
    """Attention in float8 falls back to engines that share its keys and values."""
    folder = tmp_path / "engines"
    folder.mkdir()
    digest = Manifest.load(quantized).files[f"transformer/{engine}.onnx"].digest
    engines = engines_of(built)
    record = engines.engines["cached_step"]
    profiles = tuple(replace(profile, scratch_bytes=12345) for profile in record.profiles)
    record = replace(record, onnx_digest=digest, profiles=profiles)
    replace(engines, engines={"cached_step": record}, **kind).save(folder)
    stage = one(quantized, precisions=("nvfp4",), engines=folder, **asked).first.stage(
        "cached_step"
    )
    assert stage is not None
    assert stage.scratch_source == ("engines" if counts else "estimated")


def test_plain_weights(plain_artifacts: Path) -> None:
    (edit,) = plan_artifacts(
        plain_artifacts, PlanOptions(references=(2,), precisions=("bf16",), size=(128, 128))
    ).edits
    assert edit.again is None
    assert edit.first.kv_bytes == 0
    names = [stage.name for stage in edit.first.stages]
    assert names == ["text_encoder", "vae_encoder", "plain_step", "vae_decoder"]


# --- the host ---


def test_what_comes_again_is_read_from_the_host(tiny_bf16_artifacts: Path) -> None:
    edit = one(tiny_bf16_artifacts)
    weights = edit.first.footprint.weights
    memory = edit.first.peak - weights["text_encoder"]
    options = PlanOptions(precisions=("bf16",), memory=memory, **SHAPE)
    plans = plan_artifacts(tiny_bf16_artifacts, options)
    loads = [sum(p.loads.values()) for e in plans.edits for p in (e.first, e.again) if p]
    assert plans.host["run: file cache for weights"] == max(loads)
    assert max(loads) >= weights["text_encoder"]


# --- the command ---


def test_bad_options(tiny_artifacts: Path, tmp_path: Path) -> None:
    for options, error, message in (
        ({"references": (-1,)}, RequestError, "references is -1"),
        ({"batch": 0}, RequestError, "batch is 0"),
        ({"kv_dtype": "int3"}, RequestError, "kv_dtype is 'int3'"),
        ({"precisions": ("int3",)}, RequestError, "precision is 'int3', expected one of bf16"),
        ({"attention": "int3"}, RequestError, "attention is 'int3'"),
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


def test_command_prints_a_line_per_request(tiny_artifacts: Path, capsys: Any) -> None:
    assert main(["plan", str(tiny_artifacts), "--size", "512x256", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    plans = value["plans"]
    assert len(plans) == 15
    assert {plan["references"] for plan in plans} == {0, 1, 2, 3, 4}
    assert all(plan["size"] == [512, 256] and plan["fits"] for plan in plans)
    last = plans[-1]
    assert (last["precision"], last["text_precision"], last["kv_dtype"]) == (
        "nvfp4",
        "fp8",
        "bfloat16",
    )
    for edit in ("first_edit", "repeated_edit"):
        for stage in last[edit]["stages"]:
            parts = [v for k, v in stage.items() if k not in ("total", "loads") and type(v) is int]
            assert sum(parts) == stage["total"]
    assert plans[0]["repeated_edit"] is None
    assert set(value["host"]) == {
        "export",
        "build, shared weights",
        "run: pinned buffers for uploads",
    }


def test_command_says_what_would_fit(tiny_artifacts: Path, capsys: Any) -> None:
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


@pytest.mark.parametrize("memory", [None, 10**9, 7 * 10**8])
def test_text_is_for_a_terminal_of_100_columns(tiny_artifacts: Path, memory: int | None) -> None:
    plans: Plans = plan_artifacts(tiny_artifacts, PlanOptions(memory=memory))
    lines = text_from_plans(plans).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith(("bf16/bf16 ", "fp8/fp8 ", "nvfp4/fp8 ")) for line in lines) == 15
