"""The tiny model's graphs to engines. A GPU is not needed, and nothing is deserialised."""

import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import helper

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.engines.engine_record import EngineRecord
from klein_kv.artifacts.engines.targets import GPUS, compute_capability, find_target
from klein_kv.artifacts.engines.trt_module import load_module
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.engines import build, builder, progress
from klein_kv.engines.build import build_artifacts, engine_folder
from klein_kv.engines.build_log import BuildLog, make_logger
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.plan.kernel_price import PlanPrice, price_plan
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.errors import ArtifactError, BuildError, CapacityError, RequestError
from klein_kv.export import exporter
from tests.klein_configs import TINY_PROFILE

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'klein-kv[rtx]'")

SMALL = ["encode_references", "cached_step"]
RECIPE = Recipe.from_toml(TINY_PROFILE, "tiny")


@pytest.fixture
def artifacts(short_bf16_artifacts: Path, tmp_path: Path) -> Path:
    """The tiny artifacts, hard-linked: engines and damage stay in this test."""
    folder = tmp_path / "artifacts"
    shutil.copytree(short_bf16_artifacts, folder, copy_function=os.link)
    return folder


@pytest.fixture(scope="module")
def built(short_bf16_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All engines of the tiny model, one shape."""
    folder = tmp_path_factory.mktemp("built") / "artifacts"
    shutil.copytree(short_bf16_artifacts, folder, copy_function=os.link)
    build_artifacts(folder, recipe=RECIPE, progress=False)
    return folder


def _folder(artifacts: Path) -> Path:
    return engine_folder(artifacts, "rtx5090", "bf16", "tiny")


def _damage(path: Path, data: bytes) -> None:
    path.unlink()  # it may be a hard link
    path.write_bytes(data)


def _cost(folder: Path, record: EngineRecord) -> PlanPrice:
    return price_plan(KernelPlan.load(folder / record.layers), GPUS["rtx5090"])


def test_engines_with_float8_keys_and_values(built: Path) -> None:
    """A folder of their own; what turns float8 into keys and values is no kernel of its own."""
    options: dict[str, Any] = {"graphs": ["cached_step"], "progress": False}
    (record,) = build_artifacts(built, recipe=RECIPE, kv_dtype="float8_e4m3fn", **options)
    folder = engine_folder(built, "rtx5090", "bf16", "tiny", "float8_e4m3fn")
    assert folder.name == "rtx5090-bf16-tiny-fp8kv"
    packed, whole = EngineManifest.load(folder), EngineManifest.load(_folder(built))
    assert (packed.kv_dtype, whole.kv_dtype) == ("float8_e4m3fn", None)
    assert "K/V float8_e4m3fn" in packed.title
    assert packed.engines == {"cached_step": record}
    held = {x.name: (x.dtype, x.shape) for x in record.inputs}
    assert held["k_ref.0"] == ("float8_e4m3fn", (1, -1, 2, 32))
    assert held["k_ref_scale.0"] == ("float32", (1, 1, 2, 1))
    few, many = _cost(folder, record), _cost(_folder(built), whole.record("cached_step"))
    assert few.kernels == many.kernels
    kv = Manifest.load(built).config.transformer.kv_bytes(128, "bfloat16")
    assert many.bytes - few.bytes == pytest.approx(kv / 2, rel=0.05)


def test_all_graphs_build(built: Path) -> None:
    folder, small = _folder(built), ("blend", "merge_lora")
    engines = EngineManifest.load(folder)
    assert set(engines.engines) == {*GRAPH_FILES, *small}
    assert (engines.module, engines.sm, engines.precision) == ("tensorrt_rtx", 120, "bf16")
    for graph, record in engines.engines.items():
        assert (folder / record.file).stat().st_size == record.bytes
        plan, embedded = engines.read_engine(folder, graph), graph.startswith("vae_")
        assert record.file == f"{graph}.engine{'' if embedded else '.zlib'}"
        assert (len(plan) == record.bytes) if embedded else (len(plan) > record.bytes)
        assert (record.weights == {}) == (embedded or graph in small)
        assert min(record.seconds, record.peak_rss) > 0
        assert (record.scratch_bytes > 0) == (graph != "blend")  # one kernel
    files = {name for x in engines.engines.values() for name in (x.file, x.layers)}
    assert {path.name for path in folder.iterdir()} == files | {"engine.json"}


def test_plain_weights_build(plain_checkpoint: Path, tmp_path: Path) -> None:
    """Their one step attends to everything in one fused kernel per block."""
    exporter.export_checkpoint(
        plain_checkpoint, tmp_path / "plain", dtype="bfloat16", text_layers=(1, 2, 3)
    )
    with pytest.raises(RequestError, match=r"graph 'cached_step', expected some of .*plain"):
        build_artifacts(tmp_path / "plain", recipe=RECIPE, graphs=["cached_step"])
    (record,) = build_artifacts(
        tmp_path / "plain", recipe=RECIPE, graphs=["plain_step"], progress=False
    )
    assert [tensor.name for tensor in record.outputs] == ["noise_pred", "latents"]
    cost = _cost(_folder(tmp_path / "plain"), record)
    net = Manifest.load(tmp_path / "plain", check_files=False).config.transformer
    assert cost.attention_kernels == net.num_blocks
    assert cost.weight_copies == ()


def test_transformer_engines_bind_the_same_weights(built: Path) -> None:
    records = EngineManifest.load(_folder(built)).engines
    first = records["first_step"].weights
    assert first == records["cached_step"].weights
    assert records["encode_references"].weights.items() <= first.items()
    refs = records["first_step"].weight_refs(built)
    assert {name: ref.shape for name, ref in refs.items()} == {x: first[x].shape for x in first}
    names = [tensor.name for tensor in records["first_step"].outputs]
    assert names[:2] == ["noise_pred", "latents"]


def test_every_attention_is_fused_and_no_weight_is_copied(built: Path) -> None:
    config = Manifest.load(built, check_files=False).config
    blocks, layers = config.transformer.num_blocks, config.text_encoder.num_exported_layers
    # The reference stream of the last block ends at its keys and values.
    expected = {
        "cached_step": blocks,
        "first_step": 2 * blocks - 1,
        "encode_references": blocks - 1,
        "text_encoder": layers,
    }
    engines = EngineManifest.load(_folder(built))
    for graph, attentions in expected.items():
        cost = _cost(_folder(built), engines.record(graph))
        assert cost.attention_kernels == attentions, graph
        assert (cost.weight_copies, cost.blended_modulations) == ((), ()), graph
        assert cost.scratch_bytes > 0


@pytest.mark.parametrize("head_dim", [8, 12])
def test_heads_without_a_fused_kernel(head_dim: int) -> None:
    """Too narrow for TensorRT-RTX, which refused the whole text encoder of a small model."""
    trt = load_module()
    trt_builder = trt.Builder(make_logger(trt, BuildLog()))
    shape = [1, 2, 64, head_dim]
    values = [helper.make_tensor_value_info(x, onnx.TensorProto.BFLOAT16, shape) for x in "qkvo"]
    graph = helper.make_graph(
        [helper.make_node("Attention", ["q", "k", "v"], ["o"])], "g", values[:3], values[3:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    network = trt_builder.create_network(0)
    assert trt.OnnxParser(network, trt_builder.logger).parse(model.SerializeToString())
    builder._allow_unfused(trt, network, everywhere=False)
    target = find_target("rtx5090")
    capability = compute_capability(trt, target)
    config = builder._configure(trt, trt_builder, (), capability, target)
    assert trt_builder.build_serialized_network(network, config) is not None


def test_unchanged_engines_are_kept(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = EngineManifest.load(_folder(built))
    _refuse_to_build(monkeypatch)
    records = build_artifacts(built, recipe=RECIPE)
    assert {record.graph: record for record in records} == before.engines


def _refuse_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(build, "build_engine", fail)


CHANGES: dict[str, dict[str, Any]] = {"force": {"force": True}, "weights": {"weights": "embedded"}}
DAMAGE = {
    "engine": "encode_references.engine.zlib",
    "layers": "encode_references.layers.json",
    "manifest": "engine.json",
}


@pytest.mark.parametrize("change", ["version", *CHANGES, *DAMAGE])
def test_changed_inputs_are_built_again(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    artifacts = shutil.copytree(built, tmp_path / "artifacts", copy_function=os.link)
    if change == "version":
        monkeypatch.setattr(build, "module_version", lambda _: "9.9")
    elif change == "layers":
        (_folder(artifacts) / DAMAGE[change]).unlink()
    elif change in DAMAGE:
        path = _folder(artifacts) / DAMAGE[change]
        _damage(path, path.read_bytes()[:-9])
    _refuse_to_build(monkeypatch)
    options = {"graphs": ["encode_references"], **CHANGES.get(change, {})}
    with pytest.raises(AssertionError, match="built"):
        build_artifacts(artifacts, recipe=RECIPE, **options)


def test_one_graph_more_keeps_the_others(built: Path, tmp_path: Path) -> None:
    artifacts = shutil.copytree(built, tmp_path / "artifacts", copy_function=os.link)
    whole = EngineManifest.load(_folder(artifacts))
    one = {"cached_step": whole.record("cached_step")}
    replace(whole, engines=one).save(_folder(artifacts))
    graphs = ["blend", "cached_step"]
    records = build_artifacts(artifacts, recipe=RECIPE, graphs=graphs, progress=False)
    assert one["cached_step"] in records
    assert set(EngineManifest.load(_folder(artifacts)).engines) == set(graphs)


@pytest.mark.parametrize(("target", "sm"), [("sm86", 86), ("rtx4090", 89)])
def test_other_targets_and_embedded_weights(artifacts: Path, target: str, sm: int) -> None:
    weights = "embedded" if sm == 86 else "shared"
    (record,) = build_artifacts(
        artifacts, target, RECIPE, weights, graphs=["encode_references"], progress=False
    )
    assert (record.weights == {}) == (weights == "embedded")
    engines = EngineManifest.load(engine_folder(artifacts, target, "bf16", "tiny"))
    assert (engines.sm, engines.weights) == (sm, weights)


def test_dynamic_shapes_and_several_profiles(artifacts: Path) -> None:
    recipe = Recipe.from_toml(
        """
        [[profiles]]
        name = "edit"
        text_tokens = 64
        output = ["128x128", "128x128", "256x128"]
        references = [0, 1, 4]
        reference_size = ["16x16", "32x32", "32x32"]
        [[profiles]]
        name = "text"
        text_tokens = 64
        output = "256x256"
        references = 0
        """,
        "two",
    )
    graphs = ["cached_step", "vae_encoder"]
    encoder, cached = build_artifacts(artifacts, recipe=recipe, graphs=graphs, progress=False)
    assert [profile.name for profile in cached.profiles] == ["edit", "text"]
    assert cached.profile_for({"img_ids": (256, 4)}) == 1
    assert cached.inputs[0].shape == (-1, -1, 128)
    assert len(encoder.profiles) == 4
    path = engine_folder(artifacts, "rtx5090", "bf16", "two") / cached.layers
    assert not KernelPlan.load(path).known


def test_too_little_memory_or_disk_is_said_before_building(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(available=1 << 20)
    monkeypatch.setattr(builder.psutil, "virtual_memory", lambda: small)
    with pytest.raises(CapacityError, match=r"needs about .* GB of memory .* shared weights"):
        build_artifacts(artifacts, recipe=RECIPE, weights="embedded", graphs=SMALL)
    full = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: full)
    with pytest.raises(CapacityError, match=r"needs up to 0.3 GB of disk, 0.0 GB are free"):
        build_artifacts(artifacts, recipe=RECIPE, graphs=SMALL)
    assert not (artifacts / "engines").exists()


def test_artifacts_that_no_engine_is_built_of(short_artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="export with --dtype bf16"):
        build_artifacts(short_artifacts, recipe=RECIPE)
    with pytest.raises(ArtifactError, match="is not a klein-kv artifact folder"):
        build_artifacts(tmp_path)


def test_a_graph_that_is_not_ours_is_refused(artifacts: Path) -> None:
    cached, other = (artifacts / GRAPH_FILES[name] for name in ("cached_step", "first_step"))
    _damage(cached, other.read_bytes())
    with pytest.raises(ArtifactError, match=r"is not the file that klein\.json describes"):
        build_artifacts(artifacts, recipe=RECIPE, graphs=["cached_step"])
    manifest = Manifest.load(artifacts, check_files=False)
    same = {GRAPH_FILES["cached_step"]: manifest.files[GRAPH_FILES["first_step"]]}
    replace(manifest, files=manifest.files | same).save(artifacts)
    with pytest.raises(ArtifactError, match="is not the graph 'cached_step' of this klein-kv"):
        build_artifacts(artifacts, recipe=RECIPE, graphs=["cached_step"])
    assert not (artifacts / "engines").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "rtx9999"}, BuildError, "unknown target"),
        ({"target": "sm90"}, BuildError, "cannot build for compute capability 9.0"),
        ({"recipe": "fast"}, BuildError, "unknown recipe"),
        ({"weights": "both"}, RequestError, "expected shared or embedded"),
        ({"graphs": ["unet"]}, RequestError, "unknown graph 'unet'"),
        ({"module": "openvino"}, RequestError, "module is 'openvino'"),
    ],
)
def test_bad_requests_are_one_clear_error(
    artifacts: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_artifacts(artifacts, **{"recipe": RECIPE, **options})
    assert not (artifacts / "engines").exists()


def test_ctrl_c_stops_the_build_and_leaves_nothing_half_written(
    artifacts: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pressed in the first stage, when nothing but the build's own handler hears it."""
    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # of a process in the background it is ignored
    monkeypatch.setattr(caplog.handler, "emit", lambda _: os.kill(os.getpid(), signal.SIGINT))
    with caplog.at_level(logging.INFO, progress.__name__), pytest.raises(KeyboardInterrupt):
        build_artifacts(artifacts, recipe=RECIPE, graphs=["text_encoder"], progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert not list((artifacts / "engines").glob("**/*.engine*"))
