"""`quantize_artifacts`: what it writes, what it leaves alone, and how a damaged result shows."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from klein_kv.artifacts.digest import file_digest
from klein_kv.artifacts.manifest import MANIFEST, FileRecord, Manifest
from klein_kv.artifacts.numbers import nvfp4_scale, quantize_fp8, quantize_nvfp4
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.artifacts.weights import map_weight
from klein_kv.errors import ArtifactError, CapacityError, CheckpointError, RequestError
from klein_kv.export.checks.artifact_weights import component_weights
from klein_kv.export.checks.quality import QualityReport, measure_quality
from klein_kv.export.checks.samples import make_samples
from klein_kv.export.quantization import quantize as module
from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
from klein_kv.export.quantization.quantize import QuantizeResult, quantize_artifacts
from tests.bfl_files import bfl_state, save_single_file, tiled, untiled
from tests.bfl_files import quantize as bfl_quantize

SAMPLES = make_samples(2, size=(128, 128))
TOKENS = 32
Q = "transformer_blocks.0.attn.to_q.weight"
FUSED = "single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"


def quantized(folder: Path, recipe: str | QuantizationRecipe, **options: Any) -> QuantizeResult:
    if isinstance(recipe, str):
        recipe = QuantizationRecipe.load(recipe)
    return quantize_artifacts(folder, recipe, SAMPLES, text_tokens=TOKENS, **options)


def quality(folder: Path, precision: str, **options: Any) -> QualityReport:
    samples = make_samples(1, size=(128, 128), seed=1000)
    return measure_quality(folder, precision, samples, text_tokens=TOKENS, **options)


@pytest.fixture
def folder(tiny_bf16_artifacts: Path, tmp_path: Path) -> Path:
    """A copy to quantize."""
    return Path(shutil.copytree(tiny_bf16_artifacts, tmp_path / "artifacts"))


@pytest.fixture(scope="module")
def all_precisions(
    tiny_bf16_artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, QuantizeResult]]:
    """The tiny artifacts in every precision; read only."""
    copy = tmp_path_factory.mktemp("quantized") / "artifacts"
    shutil.copytree(tiny_bf16_artifacts, copy)
    return copy, {name: quantized(copy, name) for name in ("fp8", "nvfp4", "fp8-weight-only")}


def accept_files(folder: Path) -> None:
    """Makes the manifest agree with what was changed in the folder."""
    manifest = Manifest.load(folder, check_files=False)
    files = {
        name: FileRecord((folder / name).stat().st_size, file_digest(folder / name))
        for name in manifest.files
    }
    replace(manifest, files=files).save(folder)


def snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def test_sizes_and_layers(all_precisions: tuple[Path, dict[str, QuantizeResult]]) -> None:
    results = all_precisions[1]
    for name, result in results.items():
        assert result.precision == name
        transformer, text = result.parts["transformer"], result.parts["text_encoder"]
        assert (transformer.layers, text.layers) == (12 + 2 * 2, 27 * 7)
        share = {"fp8": 0.5, "nvfp4": 0.28125, "fp8-weight-only": 0.5}[name]
        assert transformer.bytes == share * transformer.bytes_before
        assert text.bytes == 0.5 * text.bytes_before
        assert result.parts["text_encoder"].precision == name.replace("nvfp4", "fp8")
    assert results["nvfp4"].parts["text_encoder"].reused  # fp8 had made it
    assert not results["nvfp4"].parts["transformer"].reused


def test_the_manifest_knows_them_and_the_model_stays_the_same(
    all_precisions: tuple[Path, dict[str, QuantizeResult]], tiny_bf16_artifacts: Path
) -> None:
    folder, results = all_precisions
    before, after = Manifest.load(tiny_bf16_artifacts), Manifest.load(folder)
    assert after.precisions == {
        "fp8": {"transformer": "fp8", "text_encoder": "fp8"},
        "nvfp4": {"transformer": "nvfp4", "text_encoder": "fp8"},
        "fp8-weight-only": {
            "transformer": "fp8-weight-only",
            "text_encoder": "fp8-weight-only",
        },
    }
    assert after.model_digest == before.model_digest
    digests = {after.precision_digest(name) for name in results} | {after.model_digest}
    assert len(digests) == 4
    files = set(after.precision_files("nvfp4"))
    assert {
        "transformer/nvfp4.safetensors",
        "transformer/nvfp4.json",
        "text_encoder/fp8.safetensors",
        "text_encoder/fp8.json",
    } <= files
    assert not any("fp8-weight-only" in name for name in files)
    assert not list(folder.glob(".*"))  # nothing is left lying about
    with pytest.raises(ArtifactError, match=r"no precision 'int8' \(quantized: fp8, nvfp4"):
        after.precision_files("int8")


@pytest.mark.parametrize("name", [Q, FUSED])
def test_numbers_are_those_of_the_formats(
    all_precisions: tuple[Path, dict[str, QuantizeResult]], name: str
) -> None:
    folder, _ = all_precisions
    weights = component_weights(folder, Manifest.load(folder, check_files=False), "transformer")
    own = map_weight(weights[name]).astype(np.float32)
    amax = float(np.abs(own).max())
    fp8 = load_quantized(folder, "transformer", "fp8").linears[name]
    # A weight may become twice as large as it is, by an adapter.
    assert fp8.weight_scale == np.float32(2 * amax) / np.float32(448)
    np.testing.assert_array_equal(
        map_weight(fp8.weight).view(np.uint8), quantize_fp8(own, fp8.weight_scale).view(np.uint8)
    )
    nvfp4 = load_quantized(folder, "transformer", "nvfp4").linears[name]
    assert nvfp4.weight_scale == nvfp4_scale(2 * amax)
    packed, scales = quantize_nvfp4(own, nvfp4.weight_scale)
    np.testing.assert_array_equal(map_weight(nvfp4.weight), packed)
    assert nvfp4.block_scales is not None
    stored = map_weight(nvfp4.block_scales)
    np.testing.assert_array_equal(stored.view(np.uint8), scales.view(np.uint8))
    # The same range of activations, in the units of each format.
    assert fp8.input_scale is not None
    assert nvfp4.input_scale is not None
    assert fp8.input_scale == pytest.approx(6 * nvfp4.input_scale, rel=1e-6)
    only = load_quantized(folder, "transformer", "fp8-weight-only").linears[name]
    assert only.input_scale is None


def test_ranges_of_queries_keys_and_values_are_kept(
    all_precisions: tuple[Path, dict[str, QuantizeResult]],
) -> None:
    folder, _ = all_precisions
    attention = load_quantized(folder, "transformer", "fp8").attention
    blocks = ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"]
    assert list(attention) == blocks
    for ranges in attention.values():
        assert set(ranges) == {"q", "k", "v"}
        assert all(0.5 < value < 50 for value in ranges.values())
    assert load_quantized(folder, "text_encoder", "fp8").attention == {}
    assert load_quantized(folder, "transformer", "fp8-weight-only").attention == {}


def test_pieces_of_a_weight_make_the_same_file(
    folder: Path,
    all_precisions: tuple[Path, dict[str, QuantizeResult]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from klein_kv.export.quantization import quantized_writer

    monkeypatch.setattr(quantized_writer, "_CHUNK", 700)  # ten rows of 64, not a divisor of 576
    quantized(folder, "nvfp4")
    whole = snapshot(all_precisions[0])
    names = ("transformer/nvfp4.safetensors", "transformer/nvfp4.json")
    assert {name: snapshot(folder)[name] for name in names} == {name: whole[name] for name in names}


def test_the_same_again_does_nothing_and_another_recipe_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(folder, "fp8")
    before = snapshot(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "calibrate", None)  # is not called
        result = quantized(folder, "fp8")
    assert all(part.reused for part in result.parts.values())
    assert snapshot(folder) == before

    recipe = replace(
        QuantizationRecipe.load("fp8"), overrides=(("transformer_blocks.0.*", "bf16"),)
    )
    result = quantized(folder, recipe)
    assert result.parts["transformer"].layers == 4
    assert Q not in load_quantized(folder, "transformer", "fp8").linears
    assert FUSED in load_quantized(folder, "transformer", "fp8").linears
    Manifest.load(folder)  # every digest is right
    after = snapshot(folder)
    own = [name for name in before if "fp8" not in name and name != MANIFEST]
    assert {name: after[name] for name in own} == {name: before[name] for name in own}


def test_percentiles_cut_ranges(
    folder: Path, all_precisions: tuple[Path, dict[str, QuantizeResult]]
) -> None:
    whole = load_quantized(all_precisions[0], "transformer", "fp8").linears
    quantized(folder, replace(QuantizationRecipe.load("fp8"), percentile=99.0))
    cut = load_quantized(folder, "transformer", "fp8").linears
    shares = [(cut[name].input_scale or 0) / (x.input_scale or 0) for name, x in whole.items()]
    assert 0.1 < min(shares) <= max(shares) < 1


@pytest.mark.parametrize("at", ["calibrate", "write_layers", "_install"])
def test_an_interrupted_run_leaves_everything_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    quantized(folder, "fp8")
    before = snapshot(folder)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantized(folder, "nvfp4")
    assert snapshot(folder) == before
    Manifest.load(folder)


def test_the_manifest_is_never_wrong_while_files_are_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between two moves: the folder opens, without what was half replaced."""
    quantized(folder, "fp8")
    real = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if str(target).endswith("transformer/fp8.safetensors"):
            real(self, target)
            raise KeyboardInterrupt
        return real(self, target)

    old = folder / ".quantize.partial-999999999"  # of a run that was killed before
    old.mkdir()
    (old / "junk").write_text("x")
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(folder, replace(QuantizationRecipe.load("fp8"), percentile=99.0))
    monkeypatch.undo()
    assert Manifest.load(folder).precisions == {}
    assert not old.exists()
    quantized(folder, "fp8")
    assert list(Manifest.load(folder).precisions) == ["fp8"]


def test_refuses_before_it_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(folder)
    monkeypatch.setattr(
        "klein_kv.export.checkpoints.weight_files.shutil.disk_usage",
        lambda _: type("usage", (), {"free": 1000})(),
    )
    with pytest.raises(CapacityError, match="not enough disk"):
        quantized(folder, "fp8-weight-only")
    monkeypatch.undo()
    everything = QuantizationRecipe("none", "fp8", overrides=(("*", "bf16"),))
    with pytest.raises(RequestError, match="leaves every layer"):
        quantized(folder, everything)
    misspelt = QuantizationRecipe("r", "fp8", overrides=(("transformer_block.*", "bf16"),))
    with pytest.raises(RequestError, match="matches no block linear"):
        quantized(folder, misspelt)
    assert snapshot(folder) == before


def test_refuses_to_take_the_name_of_a_file_of_the_artifacts(folder: Path) -> None:
    (folder / "transformer/fp8.safetensors").write_bytes(b"mine")
    manifest = Manifest.load(folder)
    record = FileRecord(4, file_digest(folder / "transformer/fp8.safetensors"))
    files = manifest.files | {"transformer/fp8.safetensors": record}
    replace(manifest, files=files).save(folder)
    with pytest.raises(RequestError, match="belongs to the artifacts themselves"):
        quantized(folder, "fp8")


def test_refuses_weights_that_are_not_finite(folder: Path) -> None:
    ref = component_weights(folder, Manifest.load(folder), "transformer")[FUSED]
    with ref.path.open("r+b") as file:
        file.seek(ref.offset)
        file.write(b"\x80\x7f")  # infinity in bfloat16
    accept_files(folder)
    with pytest.raises(CheckpointError, match=r"holds inf|not finite"):
        quantized(folder, "fp8-weight-only")
    with pytest.raises(CheckpointError, match="not finite"):
        quantized(folder, "fp8")


# --- files of Black Forest Labs, as they are ---


@pytest.fixture(scope="module")
def state(tiny_checkpoint: Path) -> dict[str, Tensor]:
    return load_file(tiny_checkpoint / "transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_published_file_is_stored_bit_for_bit(
    folder: Path, tmp_path: Path, state: dict[str, Tensor], kind: str
) -> None:
    published = bfl_quantize(bfl_state(state), kind)
    path = save_single_file(tmp_path / "bfl.safetensors", published)
    result = quantized(folder, "fp8", source=path)
    assert result.precision == kind
    layers = load_quantized(folder, "transformer", kind).linears
    names = [n for n in published if n.endswith((".weight", "_norm.scale"))]
    numbers, scales = ({name: published[name] for name in names} for _ in range(2))
    for name in [name for name in names if f"{name}_scale" in published]:
        numbers[name] = published[name].view(torch.uint8)
        if kind == "nvfp4":
            rows, half = published[name].shape
            tiles = published[f"{name}_scale"].view(torch.uint8)
            scales[name] = untiled(tiles, rows, half // 8)
    numbers, scales = (
        convert_flux2_transformer_checkpoint_to_diffusers(x) for x in (numbers, scales)
    )
    assert set(layers) == {name for name, x in numbers.items() if x.dtype == torch.uint8}
    for name, layer in layers.items():
        stored = map_weight(layer.weight).view(np.uint8)
        if layer.block_scales is not None:
            stored = (
                stored >> 4 | stored << 4
            )  # the published files' first number is in the high half
            steps = map_weight(layer.block_scales).view(np.uint8)
            np.testing.assert_array_equal(steps, scales[name].numpy(), err_msg=name)
        np.testing.assert_array_equal(stored, numbers[name].numpy(), err_msg=name)
    scale = "weight_scale" if kind == "fp8" else "weight_scale_2"
    rows = published[f"double_blocks.0.img_attn.qkv.{scale}"]
    for part in "qkv":
        layer = layers[f"transformer_blocks.0.attn.to_{part}.weight"]
        assert layer.weight_scale == float(rows)
        assert layer.input_scale == (0.5 if kind == "fp8" else 0.25)


def test_a_published_file_is_not_calibrated(
    folder: Path, tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_single_file(tmp_path / "bfl.safetensors", bfl_quantize(bfl_state(state), "fp8"))
    watched = []
    real = module.calibrate

    def calibrate(*arguments: Any, **options: Any) -> Any:
        watched.append(arguments[3])
        return real(*arguments, **options)

    monkeypatch.setattr(module, "calibrate", calibrate)
    quantized(folder, "fp8", source=path)
    assert [list(names) for names in watched] == [["text_encoder"]]
    assert load_quantized(folder, "transformer", "fp8").attention == {}
    assert load_quantized(folder, "transformer", "fp8").origin["file"] == "bfl.safetensors"


def test_input_scales_that_a_file_lacks_are_calibrated(
    folder: Path, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    published = bfl_quantize(bfl_state(state), "fp8")
    del published["double_blocks.0.img_mlp.0.input_scale"]
    path = save_single_file(tmp_path / "bfl.safetensors", published)
    quantized(folder, "fp8", source=path)
    layers = load_quantized(folder, "transformer", "fp8").linears
    scale = layers["transformer_blocks.0.ff.linear_in.weight"].input_scale
    assert scale is not None
    assert 0.005 < scale < 0.1
    assert layers[Q].input_scale == 0.5


def test_refuses_a_file_of_other_weights(
    folder: Path, tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    published = bfl_quantize(bfl_state(state), "fp8")
    path = save_single_file(
        tmp_path / "bfl.safetensors",
        published | {"img_in.weight": published["img_in.weight"] * 1.01},
    )
    with pytest.raises(RequestError, match=r"x_embedder.weight is not that of the artifacts"):
        quantized(folder, "fp8", source=path)
    other = {name: x.flip(0) if "linear1" in name else x for name, x in state.items()}
    other |= {FUSED: state[FUSED].flip(0).contiguous()}
    path = save_single_file(tmp_path / "flipped.safetensors", bfl_quantize(bfl_state(other), "fp8"))
    quantized(folder, "fp8", source=path)
    assert "are the artifacts of the same model?" in caplog.text
    path = tmp_path / "bf16.safetensors"
    save_file({name: x.to(torch.bfloat16) for name, x in bfl_state(state).items()}, path)
    with pytest.raises(RequestError, match="holds no fp8 or nvfp4 weight"):
        quantized(folder, "fp8", source=path)
    cast = {n: x.to(torch.float8_e5m2) if "linear" in n else x for n, x in bfl_state(state).items()}
    save_file({n: x.bfloat16() if "linear" not in n else x for n, x in cast.items()}, path)
    with pytest.raises(RequestError, match="is fp8 of e5m2, expected float8_e4m3fn with one scale"):
        quantized(folder, "fp8", source=path)


# --- what goes wrong shows ---


def damage(folder: Path, precision: str, name: str, fault: str) -> None:
    """Plants a fault in one layer and makes the manifest agree with it."""
    layer = load_quantized(folder, "transformer", precision).linears[name]
    scales_path = folder / f"transformer/{precision}.json"
    if fault in ("weight_scale", "input_scale"):
        value = json.loads(scales_path.read_text())
        factor = 2 if fault == "weight_scale" else 0.5  # a range too small saturates
        value["linears"][name][fault] *= factor
        scales_path.write_text(json.dumps(value))
    else:
        ref = layer.weight if fault == "nibbles" else layer.block_scales
        assert ref is not None
        data = bytearray(ref.path.read_bytes())
        end = ref.offset + ref.nbytes
        if fault == "nibbles":
            data[ref.offset : end] = bytes(x >> 4 | (x & 15) << 4 for x in data[ref.offset : end])
        else:  # as cuBLAS's tiles have them
            scales = torch.from_numpy(np.array(map_weight(ref).view(np.uint8)))
            data[ref.offset : end] = tiled(scales).flatten()[: ref.nbytes].numpy().tobytes()
        ref.path.write_bytes(data)
    accept_files(folder)


@pytest.mark.parametrize(
    ("precision", "fault"),
    [
        ("fp8", "weight_scale"),
        ("nvfp4", "weight_scale"),
        ("nvfp4", "nibbles"),
        ("nvfp4", "block scales in tiles"),
    ],
)
def test_planted_faults_are_caught(
    all_precisions: tuple[Path, dict[str, QuantizeResult]],
    tmp_path: Path,
    precision: str,
    fault: str,
) -> None:
    copy = Path(shutil.copytree(all_precisions[0], tmp_path / "damaged"))
    damage(copy, precision, FUSED, fault)
    failed = quality(copy, precision).failed
    assert failed[0] == FUSED
    # What the layer gives out may saturate the input of the one after it, and of no other.
    assert set(failed) <= {FUSED, FUSED.replace("to_qkv_mlp_proj", "to_out")}


def test_a_saturated_input_shows(
    all_precisions: tuple[Path, dict[str, QuantizeResult]], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(all_precisions[0], tmp_path / "damaged"))
    before = quality(copy, "fp8").layers[FUSED].snr
    for _ in range(4):
        damage(copy, "fp8", FUSED, "input_scale")
    report = quality(copy, "fp8")
    assert report.layers[FUSED].snr < before - 10
    assert report.failed == [FUSED]


Mutate = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda v: v.update(format_version=2), "version 2"),
        (lambda v: v.update(format="x"), "is 'x'"),
        (lambda v: v["linears"].pop(Q), "says nothing"),
        (lambda v: v["linears"].update(x=v["linears"][Q]), "cannot be read together"),
        (lambda v: v["linears"][Q].update(weight_scale=-1), "weight_scale is -1"),
        (lambda v: v["linears"][Q].update(format="nvfp4"), "dtype float8_e4m3fn"),
        (lambda v: v.pop("linears"), "cannot be read together"),
        (lambda v: v["linears"][Q].update(weight_scale=10**400), "cannot be read together"),
        (lambda v: v["attention"]["transformer_blocks.0"].pop("k"), "cannot be read together"),
        (lambda v: v.update(attention=None), "cannot be read together"),
    ],
)
def test_scales_that_do_not_fit_the_weights_are_refused(
    all_precisions: tuple[Path, dict[str, QuantizeResult]],
    tmp_path: Path,
    mutate: Mutate,
    message: str,
) -> None:
    (tmp_path / "transformer").mkdir()
    for name in ("fp8.json", "fp8.safetensors"):
        shutil.copy(all_precisions[0] / "transformer" / name, tmp_path / "transformer" / name)
    path = tmp_path / "transformer/fp8.json"
    value = json.loads(path.read_text())
    mutate(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=message):
        load_quantized(tmp_path, "transformer", "fp8")


def test_missing_precisions_are_named(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="klein-kv quantize"):
        load_quantized(folder, "transformer", "nvfp4")
    with pytest.raises(ArtifactError, match="expected one of fp8"):
        load_quantized(folder, "transformer", "../fp8")


def test_plain_weights(plain_artifacts: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain_artifacts, tmp_path / "artifacts"))
    result = quantized(copy, "fp8")
    assert result.parts["transformer"].layers == 16
    assert (
        Manifest.load(copy)
        .choose_graphs(precision="fp8")
        .files["plain_step"]
        .startswith("transformer/fp8.")
    )
    report = quality(copy, "fp8")
    assert not report.failed
    assert list(report.ends) == [
        "text embeddings",
        *(f"latents after step {i}" for i in range(1, 5)),
    ]


def test_tables_that_lack_a_weight_are_refused(folder: Path) -> None:
    manifest = Manifest.load(folder)
    path = folder / "transformer/first_step.weights.json"
    table = json.loads(path.read_text())
    key = next(name for name in table if name.startswith(FUSED))
    for change, message in (
        ({key: [*table[key][:4], [table[key][4][0], 32]]}, "shape"),
        ({"norm_out.linear.weight": None}, "cannot be read"),
    ):
        path.write_text(json.dumps(table | change))
        with pytest.raises(ArtifactError, match=message):
            component_weights(folder, manifest, "transformer")
    del table["proj_out.weight"]
    path.write_text(json.dumps(table))
    with pytest.raises(ArtifactError, match=r"proj_out\.weight is missing"):
        component_weights(folder, manifest, "transformer")


def test_graphs_that_are_missing_are_written(folder: Path) -> None:
    quantized(folder, "fp8")
    manifest = Manifest.load(folder)
    gone = "text_encoder/fp8.model.onnx"
    (folder / gone).unlink()
    files = {name: record for name, record in manifest.files.items() if name != gone}
    replace(manifest, files=files).save(folder)
    result = quantized(folder, "fp8")
    assert not result.parts["text_encoder"].reused
    assert result.parts["transformer"].reused
    assert (folder / gone).is_file()
    Manifest.load(folder).choose_graphs(precision="fp8")
