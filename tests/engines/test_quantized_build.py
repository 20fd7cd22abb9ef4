"""Engines of the tiny model in fp8 and nvfp4: what TensorRT makes of the Q/DQ graphs."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from klein_kv.artifacts.digest import file_digest
from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.engines.engine_record import EngineRecord
from klein_kv.artifacts.engines.targets import GPUS
from klein_kv.artifacts.manifest import FileRecord, Manifest
from klein_kv.artifacts.signature import KVFormat
from klein_kv.cli import main
from klein_kv.engines import build
from klein_kv.engines.build import build_artifacts, engine_folder
from klein_kv.engines.plan.applied import check_applied
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.plan.kernel_price import PlanPrice, price_plan
from klein_kv.engines.rewrite.graph_quantization import QuantizedNodes, find_quantized
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.errors import ArtifactError, BuildError, RequestError
from tests.klein_configs import TINY_PROFILE

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'klein-kv[rtx]'")

RECIPE = Recipe.from_toml(TINY_PROFILE, "tiny")
DYNAMIC = Recipe.from_toml(TINY_PROFILE.replace("= 2", "= [0, 1, 4]"), "dynamic")
GRAPHS = ["encode_references", "first_step", "cached_step"]

# One double and two single blocks: 14 products, and 5 ranges of rows and to_out each. The last
# block takes the text's keys and values by themselves. The reference stream has no text, and ends
# at the last block's keys and values.
CACHED, REFERENCES = 14 + 2 * 6 + 2, 7 + 6 + 2
PRODUCTS = {
    "cached_step": CACHED,
    "encode_references": REFERENCES,
    "first_step": CACHED + REFERENCES,
}
ATTENTIONS = {"cached_step": 3, "encode_references": 2, "first_step": 5}


@pytest.fixture(scope="module")
def artifacts(quantized_bf16_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifacts in bf16, and quantized in three ways."""
    folder = tmp_path_factory.mktemp("quantized") / "artifacts"
    shutil.copytree(quantized_bf16_artifacts, folder, copy_function=os.link)
    return folder


def built(artifacts: Path, graphs: list[str], **options: str) -> list[EngineRecord]:
    return build_artifacts(artifacts, recipe=RECIPE, graphs=graphs, progress=False, **options)


def price(folder: Path, record: EngineRecord) -> PlanPrice:
    return price_plan(KernelPlan.load(folder / record.layers), GPUS["rtx5090"])


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
@pytest.mark.parametrize("kind", ["own K/V", "fp8 K/V", "fp8 attention"])
def test_every_product_is_native_and_no_weight_is_copied(
    artifacts: Path, precision: str, kind: str
) -> None:
    options = {"own K/V": {}, "fp8 K/V": {"kv_dtype": KVFormat.FP8_PER_HEAD}}.get(
        kind, {"attention": "fp8"}
    )
    graphs = GRAPHS if kind == "fp8 attention" else GRAPHS[2:]
    records = built(artifacts, graphs, precision=precision, **options)
    kv_dtype = None if kind == "own K/V" else KVFormat.FP8_CONSTANT
    folder = engine_folder(
        artifacts, "rtx5090", precision, "tiny", kv_dtype, options.get("attention")
    )
    end = {"own K/V": "", "fp8 K/V": "-fp8kv", "fp8 attention": "-fp8attention"}[kind]
    assert folder.name == f"rtx5090-{precision}-tiny{end}"
    engines = EngineManifest.load(folder)
    assert (engines.precision, engines.kv_dtype) == (precision, kv_dtype)
    assert engines.attention == options.get("attention")
    for record in records:
        cost = price(folder, record)
        assert cost.native_products == {precision: PRODUCTS[record.graph]}
        assert cost.weight_copies == ()
        assert cost.blended_modulations == ()
        assert cost.attention_kernels == ATTENTIONS[record.graph]
        expected = ATTENTIONS[record.graph] if kind == "fp8 attention" else 0
        assert cost.float8_attentions == expected
        moves = PRODUCTS[record.graph] if precision == "nvfp4" else 0
        assert cost.block_scale_moves == moves
        kv = [x for x in (*record.inputs, *record.outputs) if "_ref." in x.name]
        assert len(kv) == 6
        assert {x.dtype for x in kv} == {"bfloat16" if kind == "own K/V" else "float8_e4m3fn"}
        files = {Path(weight.file).name for weight in record.weights.values()}
        assert f"{precision}.safetensors" in files


def test_all_graphs_of_a_precision(artifacts: Path) -> None:
    """The text encoder is quantized with it; the VAE is the artifacts' own."""
    (text,) = built(artifacts, ["text_encoder"], precision="nvfp4")
    folder = engine_folder(artifacts, "rtx5090", "nvfp4", "tiny")
    cost = price(folder, text)
    assert cost.native_products == {"fp8": 27 * 7}
    assert cost.weight_copies == ()
    assert cost.float8_attentions == 0
    (encoder,) = built(artifacts, ["vae_encoder"], precision="nvfp4")
    assert encoder.onnx_digest == Manifest.load(artifacts).files["vae/encoder.onnx"].digest


def test_dynamic_shapes_stay_native(artifacts: Path) -> None:
    for precision in ("fp8", "nvfp4"):
        records = build_artifacts(
            artifacts,
            recipe=DYNAMIC,
            graphs=["cached_step"],
            precision=precision,
            kv_dtype=KVFormat.FP8_PER_HEAD,
            progress=False,
        )
        assert records[0].inputs[-1].shape == (1, -1, 2, 32)


def test_weights_alone_in_fp8(artifacts: Path) -> None:
    """Nothing is asked of the kernels, and nothing is promised: only memory is saved."""
    (record,) = built(artifacts, ["cached_step"], precision="fp8-weight-only")
    assert {weight.dtype for weight in record.weights.values()} == {"bfloat16", "float8_e4m3fn"}


def test_the_same_again_is_kept(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"precision": "fp8", "attention": "fp8"}
    before = built(artifacts, ["cached_step"], **options)
    monkeypatch.setattr(build, "build_engine", None)
    assert built(artifacts, ["cached_step"], **options) == before


def test_ada_has_fp8_and_ampere_has_not(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = built(artifacts, ["cached_step"], precision="fp8", attention="fp8", target="sm89")
    assert record.scratch_bytes > 0

    monkeypatch.setattr(build, "load_module", None)  # told before TensorRT is asked
    with pytest.raises(BuildError, match=r"takes .* 8\.9, and sm86 has 8\.6; choose bf16$"):
        built(artifacts, ["cached_step"], precision="fp8", target="sm86")
    options = ("build", str(artifacts), "--precision", "nvfp4", "--target", "rtx4090")
    assert main(options) == 1
    error = "takes compute capability 10.0, and rtx4090 has 8.9; choose bf16 or fp8"
    assert error in capsys.readouterr().err


def test_combinations_that_do_not_exist_are_refused(
    artifacts: Path, tiny_bf16_artifacts: Path
) -> None:
    with pytest.raises(BuildError, match=r"attention in fp8 needs calibrated scales"):
        built(artifacts, ["cached_step"], attention="fp8")
    with pytest.raises(BuildError, match=r"fixed number of keys only; .* static-1024-4ref"):
        build_artifacts(artifacts, recipe=DYNAMIC, precision="fp8", attention="fp8")
    with pytest.raises(BuildError, match="recipe tiny is for fp16, the artifacts are bf16"):
        built(artifacts, ["cached_step"], precision="fp16")
    with pytest.raises(BuildError, match="precision is 'int8', expected one of fp32, fp16, bf16"):
        built(artifacts, ["cached_step"], precision="int8")
    with pytest.raises(ArtifactError, match="klein-kv quantize ARTIFACTS --recipe fp8"):
        built(tiny_bf16_artifacts, ["cached_step"], precision="fp8")
    with pytest.raises(RequestError, match="no graphs with keys and values in"):
        built(artifacts, ["cached_step"], precision="fp8-weight-only", attention="fp8")


def change_graph(
    folder: Path, file: str, change: Callable[[onnx.ModelProto], str]
) -> tuple[str, Path]:
    """Changes one graph of a copy of the artifacts, and has the manifest know it."""
    path = folder / file
    model = onnx.ModelProto.FromString(path.read_bytes())
    node = change(model)
    path.unlink()  # it may be a hard link
    path.write_bytes(model.SerializeToString())
    manifest = Manifest.load(folder, check_files=False)
    record = FileRecord(path.stat().st_size, file_digest(path))
    replace(manifest, files=manifest.files | {file: record}).save(folder)
    return node, folder


def scale_from_file(model: onnx.ModelProto) -> str:
    """Takes one weight's scale out of the graph, into the file: then it becomes an input."""
    made = {output: node for node in model.graph.node for output in node.output}
    gemm = next(
        node
        for node in model.graph.node
        if node.op_type == "Gemm" and node.name.startswith("transformer_blocks.0/")
    )
    block_scales = made[made[gemm.input[1]].input[1]]
    scale = next(x for x in model.graph.initializer if x.name == block_scales.input[1])
    scale.ClearField("raw_data")
    scale.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "nvfp4.safetensors"), ("offset", "0"), ("length", "4")):
        scale.external_data.add(key=key, value=value)
    return gemm.name


def test_a_product_that_falls_back_fails_the_build(artifacts: Path, tmp_path: Path) -> None:
    """With a scale as an input TensorRT dequantizes, and multiplies in 16 bits: without a word."""
    folder = tmp_path / "artifacts"
    shutil.copytree(
        artifacts, folder, copy_function=os.link, ignore=shutil.ignore_patterns("engines")
    )
    node, folder = change_graph(folder, "transformer/nvfp4.cached_step.onnx", scale_from_file)
    with pytest.raises(BuildError, match="cached_step: quantization was not applied") as caught:
        built(folder, ["cached_step"], precision="nvfp4")
    assert node in str(caught.value)
    assert f"1 of {CACHED} quantized products" in str(caught.value)
    assert not (engine_folder(folder, "rtx5090", "nvfp4", "tiny") / "engine.json").exists()


def test_attention_that_falls_back_fails_the_build(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a rounded softmax the kernel stays in 16 bits."""
    monkeypatch.setattr("klein_kv.engines.builder._quantize_softmax", lambda *_: None)
    with pytest.raises(BuildError, match="quantization was not applied") as caught:
        build_artifacts(
            artifacts,
            recipe=RECIPE,
            graphs=["cached_step"],
            precision="fp8",
            attention="fp8",
            progress=False,
            force=True,
        )
    assert f"3 of {CACHED + 3}" in str(caught.value)
    assert "Attention" in str(caught.value)


def test_what_a_graph_asks_for(artifacts: Path) -> None:
    folder = artifacts / "transformer"
    counts = {
        "fp8.cached_step": ({"fp8"}, CACHED, 0),
        "nvfp4.cached_step_fp8_attention": ({"nvfp4"}, CACHED, 3),
        "fp8-weight-only.cached_step": (set(), 0, 0),
        "cached_step": (set(), 0, 0),
        "cached_step_fp8_kv": (set(), 0, 0),
    }
    for name, (kinds, products, attentions) in counts.items():
        nodes = find_quantized(onnx.ModelProto.FromString((folder / f"{name}.onnx").read_bytes()))
        assert set(nodes.products.values()) == kinds
        assert (len(nodes.products), len(nodes.attentions)) == (products, attentions)


def test_an_empty_plan_shows_nothing_applied() -> None:
    plan = KernelPlan("cached_step", "test", (), 0, ())
    check_applied("cached_step", "test", QuantizedNodes({}, ()), plan)
    with pytest.raises(BuildError, match=r"1 of 1 quantized products .*: a/Gemm_1\."):
        check_applied("cached_step", "test", QuantizedNodes({"a/Gemm_1": "fp8"}, ()), plan)
