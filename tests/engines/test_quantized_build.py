"""Engines of the tiny model in fp8 and nvfp4: what TensorRT makes of the Q/DQ graphs."""

import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.engines.engine_record import EngineRecord
from klein_kv.artifacts.engines.targets import GPUS
from klein_kv.artifacts.signature import KVFormat
from klein_kv.cli import main
from klein_kv.engines import build
from klein_kv.engines.build import build_artifacts, engine_folder
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.plan.kernel_price import PlanPrice, price_plan
from klein_kv.engines.rewrite.graph_quantization import find_quantized
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.errors import ArtifactError, BuildError, RequestError
from tests.klein_configs import TINY_PROFILE

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'klein-kv[rtx]'")

RECIPE = Recipe.from_toml(TINY_PROFILE, "tiny")
DYNAMIC = Recipe.from_toml(TINY_PROFILE.replace("= 2", "= [0, 1, 4]"), "dynamic")

# One double and two single blocks: 14 products, and 5 ranges of rows and to_out each. The last
# block takes the text's keys and values by themselves. The reference stream has no text, and ends
# at the last block's keys and values.
CACHED, REFERENCES = 14 + 2 * 6 + 2, 7 + 6 + 2
PRODUCTS = {"cached_step": CACHED, "first_step": CACHED + REFERENCES}
ATTENTIONS = {"cached_step": 3, "first_step": 5}


@pytest.fixture(scope="module")
def artifacts(quantized_short_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short artifacts in bf16, and quantized in three ways."""
    folder = tmp_path_factory.mktemp("quantized") / "artifacts"
    shutil.copytree(quantized_short_artifacts, folder, copy_function=os.link)
    return folder


def built(artifacts: Path, graphs: list[str], **options: Any) -> list[EngineRecord]:
    return build_artifacts(artifacts, recipe=RECIPE, graphs=graphs, progress=False, **options)


def price(folder: Path, record: EngineRecord) -> PlanPrice:
    return price_plan(KernelPlan.load(folder / record.layers), GPUS["rtx5090"])


@pytest.mark.parametrize(
    ("precision", "attention", "graphs"),
    [
        ("fp8", None, ["cached_step"]),
        ("fp8", "fp8", ["first_step", "cached_step"]),
        ("nvfp4", "fp8", ["cached_step"]),
    ],
)
def test_every_product_is_native_and_no_weight_is_copied(
    artifacts: Path, precision: str, attention: str | None, graphs: list[str]
) -> None:
    records = built(artifacts, graphs, precision=precision, attention=attention)
    kv_dtype = None if attention is None else KVFormat.FP8_CONSTANT
    folder = engine_folder(artifacts, "rtx5090", precision, "tiny", kv_dtype, attention)
    end = "" if attention is None else "-fp8attention"
    assert folder.name == f"rtx5090-{precision}-tiny{end}"
    engines = EngineManifest.load(folder)
    held = (engines.precision, engines.kv_dtype, engines.attention)
    assert held == (precision, kv_dtype, attention)
    for record in records:
        cost, products = price(folder, record), PRODUCTS[record.graph]
        attentions = ATTENTIONS[record.graph]
        assert cost.native_products == {precision: products}
        assert (cost.weight_copies, cost.blended_modulations) == ((), ())
        assert cost.attention_kernels == attentions
        assert cost.float8_attentions == (0 if attention is None else attentions)
        assert cost.block_scale_moves == (products if precision == "nvfp4" else 0)
        kv = [x for x in (*record.inputs, *record.outputs) if "_ref." in x.name]
        assert len(kv) == 6
        assert {x.dtype for x in kv} == {"bfloat16" if attention is None else "float8_e4m3fn"}
        files = {Path(weight.file).name for weight in record.weights.values()}
        assert f"{precision}.safetensors" in files


def test_the_text_encoder_of_a_precision(artifacts: Path) -> None:
    """It is quantized with it, in fp8."""
    (text,) = built(artifacts, ["text_encoder"], precision="nvfp4")
    cost = price(engine_folder(artifacts, "rtx5090", "nvfp4", "tiny"), text)
    assert cost.native_products == {"fp8": 3 * 7}
    assert cost.weight_copies == ()
    assert cost.float8_attentions == 0


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_dynamic_shapes_stay_native(artifacts: Path, precision: str) -> None:
    (record,) = build_artifacts(
        artifacts,
        recipe=DYNAMIC,
        graphs=["cached_step"],
        precision=precision,
        kv_dtype=KVFormat.FP8_PER_HEAD,
        progress=False,
    )
    assert record.inputs[-1].shape == (1, -1, 2, 32)
    folder = engine_folder(artifacts, "rtx5090", precision, "dynamic", KVFormat.FP8_CONSTANT)
    assert folder.name == f"rtx5090-{precision}-dynamic-fp8kv"
    assert EngineManifest.load(folder).engines == {"cached_step": record}


def test_weights_alone_in_fp8(artifacts: Path) -> None:
    """Nothing is asked of the kernels, and nothing is promised: only memory is saved."""
    (record,) = built(artifacts, ["cached_step"], precision="fp8-weight-only")
    assert {weight.dtype for weight in record.weights.values()} == {"bfloat16", "float8_e4m3fn"}


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "fp8"}, BuildError, "attention in fp8 needs calibrated scales"),
        (
            {"recipe": DYNAMIC, "precision": "fp8", "attention": "fp8"},
            BuildError,
            r"fixed number of keys only; .* static-1024-4ref",
        ),
        ({"precision": "fp16"}, BuildError, "recipe tiny is for fp16, the artifacts are bf16"),
        ({"precision": "int8"}, BuildError, "is 'int8', expected one of fp32, fp16, bf16"),
        (
            {"precision": "fp8-weight-only", "attention": "fp8"},
            RequestError,
            "no graphs with keys and values in",
        ),
    ],
)
def test_combinations_that_do_not_exist_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, artifacts: Path
) -> None:
    with pytest.raises(error, match=message):
        build_artifacts(artifacts, **{"recipe": RECIPE, "graphs": ["cached_step"], **options})


def test_a_precision_that_is_not_there_is_refused(short_bf16_artifacts: Path) -> None:
    with pytest.raises(ArtifactError, match="klein-kv quantize ARTIFACTS --recipe fp8"):
        built(short_bf16_artifacts, ["cached_step"], precision="fp8")


def test_attention_that_falls_back_fails_the_build(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a rounded softmax the kernel stays in 16 bits."""
    monkeypatch.setattr("klein_kv.engines.builder._quantize_softmax", lambda *_: None)
    with pytest.raises(BuildError, match="quantization was not applied") as caught:
        built(artifacts, ["cached_step"], precision="fp8", attention="fp8", force=True)
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
