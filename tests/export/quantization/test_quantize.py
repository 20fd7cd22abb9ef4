"""`quantize_artifacts`: what it writes, what it leaves alone, and how a damaged result shows."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from torch import Tensor

from klein_kv.artifacts.digest import file_digest
from klein_kv.artifacts.manifest import MANIFEST, FileRecord, Manifest
from klein_kv.artifacts.numbers import nvfp4_scale, quantize_fp8, quantize_nvfp4
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.artifacts.weights import map_weight
from klein_kv.errors import ArtifactError, CapacityError, CheckpointError, RequestError
from klein_kv.export.checks.artifact_weights import component_weights
from klein_kv.export.checks.quality import measure_quality
from klein_kv.export.checks.samples import make_samples
from klein_kv.export.quantization import quantize as module
from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
from klein_kv.export.quantization.quantize import QuantizeResult, quantize_artifacts
from tests.bfl_files import quantize as bfl_quantize
from tests.bfl_files import save_single_file, tiled, untiled

SAMPLES = make_samples(1, size=(128, 128))  # as `quantized_bf16_artifacts` was made with
TOKENS = 32
Q = "transformer_blocks.0.attn.to_q.weight"
FIRST_FUSED, FUSED = (
    f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj.weight" for i in range(2)
)
NOT_CALIBRATED = QuantizationRecipe(
    "r", "fp8", activations="kept", overrides=(("transformer_blocks.0.*", "bf16"),)
)


def quantized(folder: Path, recipe: str | QuantizationRecipe, **options: Any) -> QuantizeResult:
    if isinstance(recipe, str):
        recipe = QuantizationRecipe.load(recipe)
    return quantize_artifacts(folder, recipe, SAMPLES, text_tokens=TOKENS, **options)


@pytest.fixture
def folder(tiny_bf16_artifacts: Path, tmp_path: Path) -> Path:
    """A copy to quantize."""
    return Path(shutil.copytree(tiny_bf16_artifacts, tmp_path / "artifacts"))


@pytest.fixture
def made(quantized_bf16_artifacts: Path, tmp_path: Path) -> Path:
    """A copy of a quantized folder to change."""
    return Path(shutil.copytree(quantized_bf16_artifacts, tmp_path / "made"))


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


def test_sizes_and_that_the_same_again_does_nothing(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(made)
    monkeypatch.setattr(module, "calibrate", None)  # is not called
    for name, share in {"fp8": 0.5, "nvfp4": 0.28125, "fp8-weight-only": 0.5}.items():
        result = quantized(made, name)
        assert result.precision == name
        transformer, text = result.parts["transformer"], result.parts["text_encoder"]
        assert (transformer.layers, text.layers) == (12 + 2 * 2, 27 * 7)
        assert transformer.bytes == share * transformer.bytes_before
        assert text.bytes == 0.5 * text.bytes_before
        assert text.precision == name.replace("nvfp4", "fp8")
        assert transformer.reused
        assert text.reused
    assert snapshot(made) == before


def test_the_manifest_knows_them_and_the_model_stays_the_same(
    quantized_bf16_artifacts: Path, tiny_bf16_artifacts: Path
) -> None:
    before, after = Manifest.load(tiny_bf16_artifacts), Manifest.load(quantized_bf16_artifacts)
    assert after.precisions == {
        "fp8": {"transformer": "fp8", "text_encoder": "fp8"},
        "nvfp4": {"transformer": "nvfp4", "text_encoder": "fp8"},
        "fp8-weight-only": dict.fromkeys(("transformer", "text_encoder"), "fp8-weight-only"),
    }
    assert after.model_digest == before.model_digest
    assert len({after.model_digest, *map(after.precision_digest, after.precisions)}) == 4
    files = set(after.precision_files("nvfp4"))
    numbers = ("transformer/nvfp4.", "text_encoder/fp8.")
    assert {f"{name}{end}" for name in numbers for end in ("safetensors", "json")} <= files
    assert not any("fp8-weight-only" in name for name in files)
    assert not list(quantized_bf16_artifacts.glob(".*"))  # nothing is left lying about
    with pytest.raises(ArtifactError, match=r"no precision 'int8' \(quantized: fp8, nvfp4"):
        after.precision_files("int8")


@pytest.mark.parametrize("name", [Q, FUSED])
def test_numbers_are_those_of_the_formats(quantized_bf16_artifacts: Path, name: str) -> None:
    fp8, nvfp4, only = (
        load_quantized(quantized_bf16_artifacts, "transformer", kind).linears[name]
        for kind in ("fp8", "nvfp4", "fp8-weight-only")
    )
    manifest = Manifest.load(quantized_bf16_artifacts, check_files=False)
    weights = component_weights(quantized_bf16_artifacts, manifest, "transformer")
    own = map_weight(weights[name]).astype(np.float32)
    amax = float(np.abs(own).max())
    # A weight may become twice as large as it is, by an adapter.
    assert fp8.weight_scale == np.float32(2 * amax) / np.float32(448)
    assert nvfp4.weight_scale == nvfp4_scale(2 * amax)
    assert nvfp4.block_scales is not None
    numbers = quantize_fp8(own, fp8.weight_scale)
    for stored, expected in zip(
        (fp8.weight, nvfp4.weight, nvfp4.block_scales),
        (numbers, *quantize_nvfp4(own, nvfp4.weight_scale)),
        strict=True,
    ):
        np.testing.assert_array_equal(map_weight(stored).view(np.uint8), expected.view(np.uint8))
    # The same range of activations, in the units of each format.
    assert fp8.input_scale is not None
    assert nvfp4.input_scale is not None
    assert fp8.input_scale == pytest.approx(6 * nvfp4.input_scale, rel=1e-6)
    assert only.input_scale is None


def test_ranges_of_queries_keys_and_values_are_kept(quantized_bf16_artifacts: Path) -> None:
    attention = load_quantized(quantized_bf16_artifacts, "transformer", "fp8").attention
    blocks = ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"]
    assert list(attention) == blocks
    for ranges in attention.values():
        assert set(ranges) == {"q", "k", "v"}
        assert all(0.5 < value < 50 for value in ranges.values())
    for part in (("text_encoder", "fp8"), ("transformer", "fp8-weight-only")):
        assert load_quantized(quantized_bf16_artifacts, *part).attention == {}


def test_pieces_of_a_weight_make_the_same_file(
    folder: Path, quantized_bf16_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from klein_kv.export.quantization import quantized_writer

    monkeypatch.setattr(quantized_writer, "_CHUNK", 700)  # ten rows of 64, not a divisor of 576
    quantized(folder, QuantizationRecipe("transformer alone", "nvfp4"))
    for name in ("transformer/nvfp4.safetensors", "transformer/nvfp4.json"):
        assert (folder / name).read_bytes() == (quantized_bf16_artifacts / name).read_bytes()


def test_another_recipe_replaces_what_was_there(made: Path) -> None:
    before = snapshot(made)
    whole = load_quantized(made, "transformer", "fp8").linears
    overrides = (("transformer_blocks.0.*", "bf16"),)
    result = quantized(made, QuantizationRecipe("r", "fp8", percentile=99.0, overrides=overrides))
    assert result.parts["transformer"].layers == 4
    cut = load_quantized(made, "transformer", "fp8").linears
    assert Q not in cut
    assert FUSED in cut
    shares = [
        (layer.input_scale or 0) / (whole[name].input_scale or 0) for name, layer in cut.items()
    ]
    assert 0.1 < min(shares) <= max(shares) < 1
    Manifest.load(made)  # every digest is right
    after = snapshot(made)
    own = [name for name in before if "transformer/fp8." not in name and name != MANIFEST]
    assert {name: after[name] for name in own} == {name: before[name] for name in own}


@pytest.mark.parametrize("at", ["calibrate", "write_layers", "_install"])
def test_an_interrupted_run_leaves_everything_as_it_was(
    made: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    before = snapshot(made)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, at, interrupt)
    activations = "quantized" if at == "calibrate" else "kept"
    with pytest.raises(KeyboardInterrupt):
        quantized(made, replace(NOT_CALIBRATED, activations=activations))
    assert snapshot(made) == before
    Manifest.load(made)


def test_the_manifest_is_never_wrong_while_files_are_replaced(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between two moves: the folder opens, without what was half replaced."""
    real = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if str(target).endswith("transformer/fp8-weight-only.safetensors"):
            real(self, target)
            raise KeyboardInterrupt
        return real(self, target)

    old = made / ".quantize.partial-999999999"  # of a run that was killed before
    old.mkdir()
    (old / "junk").write_text("x")
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(made, NOT_CALIBRATED)
    monkeypatch.undo()
    assert list(Manifest.load(made).precisions) == ["fp8", "nvfp4"]
    assert not old.exists()
    quantized(made, NOT_CALIBRATED)
    assert Manifest.load(made).precisions["fp8-weight-only"] == {"transformer": "fp8-weight-only"}


def test_graphs_that_are_missing_are_written(made: Path) -> None:
    manifest = Manifest.load(made)
    gone = "text_encoder/fp8-weight-only.model.onnx"
    (made / gone).unlink()
    files = {name: record for name, record in manifest.files.items() if name != gone}
    replace(manifest, files=files).save(made)
    result = quantized(made, "fp8-weight-only")
    assert not result.parts["text_encoder"].reused
    assert result.parts["transformer"].reused
    assert (made / gone).is_file()
    Manifest.load(made).choose_graphs(precision="fp8-weight-only")


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("fp8-weight-only", CapacityError, "not enough disk"),
        (
            QuantizationRecipe("none", "fp8", overrides=(("*", "bf16"),)),
            RequestError,
            "leaves every layer",
        ),
        (
            QuantizationRecipe("r", "fp8", overrides=(("transformer_block.*", "bf16"),)),
            RequestError,
            "matches no block linear",
        ),
    ],
)
def test_refuses_before_it_writes(
    recipe: Any, error: type[Exception], message: str, folder: Path, monkeypatch: Any
) -> None:
    before = snapshot(folder)
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(error, match=message):
        quantized(folder, recipe)
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
    for recipe, message in (("fp8-weight-only", r"holds inf|not finite"), ("fp8", "not finite")):
        with pytest.raises(CheckpointError, match=message):
            quantized(folder, recipe)


# --- files of Black Forest Labs, as they are ---


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_published_file_is_stored_bit_for_bit(
    folder: Path,
    tmp_path: Path,
    bfl_tensors: dict[str, Tensor],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published = bfl_quantize(bfl_tensors, kind)
    path = save_single_file(tmp_path / "bfl.safetensors", published)
    monkeypatch.setattr(module, "calibrate", None)  # is not called
    result = quantized(folder, QuantizationRecipe("r", "fp8"), source=path)
    assert result.precision == kind
    done = load_quantized(folder, "transformer", kind)
    assert (done.attention, done.origin["file"]) == ({}, "bfl.safetensors")
    layers = done.linears
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
            # The published files' first number is in the high half.
            stored = stored >> 4 | stored << 4
            steps = map_weight(layer.block_scales).view(np.uint8)
            np.testing.assert_array_equal(steps, scales[name].numpy(), err_msg=name)
        np.testing.assert_array_equal(stored, numbers[name].numpy(), err_msg=name)
    scale = "weight_scale" if kind == "fp8" else "weight_scale_2"
    rows = published[f"double_blocks.0.img_attn.qkv.{scale}"]
    for part in "qkv":
        layer = layers[f"transformer_blocks.0.attn.to_{part}.weight"]
        assert layer.weight_scale == float(rows)
        assert layer.input_scale == (0.5 if kind == "fp8" else 0.25)


def test_what_a_file_lacks_is_calibrated(
    folder: Path, tmp_path: Path, bfl_tensors: dict[str, Tensor]
) -> None:
    """An input scale, and all of the text encoder."""
    published = bfl_quantize(bfl_tensors, "fp8")
    del published["double_blocks.0.img_mlp.0.input_scale"]
    path = save_single_file(tmp_path / "bfl.safetensors", published)
    result = quantized(folder, "fp8", source=path)
    assert result.parts["text_encoder"].layers == 27 * 7
    layers = load_quantized(folder, "transformer", "fp8").linears
    scale = layers["transformer_blocks.0.ff.linear_in.weight"].input_scale
    assert scale is not None
    assert 0.005 < scale < 0.1
    assert layers[Q].input_scale == 0.5


def without_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of the blocks cast to float8, another kind of it."""
    return {
        n: x.to(torch.float8_e5m2 if "linear" in n else torch.bfloat16) for n, x in state.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: (
                bfl_quantize(s, "fp8") | {"img_in.weight": s["img_in.weight"].bfloat16() * 1.01}
            ),
            "x_embedder.weight is not that of the artifacts",
        ),
        (
            lambda s: {name: x.to(torch.bfloat16) for name, x in s.items()},
            "holds no fp8 or nvfp4 weight",
        ),
        (without_blocks, "is fp8 of e5m2, expected float8_e4m3fn with one scale"),
    ],
)
def test_refuses_a_file_of_other_weights(
    folder: Path, tmp_path: Path, bfl_tensors: dict[str, Tensor], change: Any, message: str
) -> None:
    path = save_single_file(tmp_path / "bfl.safetensors", change(bfl_tensors))
    with pytest.raises(RequestError, match=message):
        quantized(folder, "fp8", source=path)


def test_layers_far_from_the_artifacts_come_with_a_warning(
    folder: Path, tmp_path: Path, bfl_tensors: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    name = "single_blocks.1.linear1.weight"
    other = bfl_quantize(bfl_tensors | {name: bfl_tensors[name].flip(0).contiguous()}, "fp8")
    path = save_single_file(tmp_path / "flipped.safetensors", other)
    quantized(folder, QuantizationRecipe("r", "fp8"), source=path)
    assert "are the artifacts of the same model?" in caplog.text


# --- what goes wrong shows ---


def damage(folder: Path, precision: str, name: str, fault: str) -> None:
    """Plants a fault in one layer and makes the manifest agree with it."""
    layer = load_quantized(folder, "transformer", precision).linears[name]
    scales_path = folder / f"transformer/{precision}.json"
    if fault in ("weight_scale", "input_scale"):
        value = json.loads(scales_path.read_text())
        factor = 2 if fault == "weight_scale" else 1 / 16  # a range too small saturates
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
    ("precision", "faults"),
    [
        ("fp8", {Q: "weight_scale", FUSED: "input_scale"}),
        ("nvfp4", {Q: "weight_scale", FIRST_FUSED: "nibbles", FUSED: "block scales in tiles"}),
    ],
)
def test_planted_faults_are_caught(made: Path, precision: str, faults: dict[str, str]) -> None:
    for name, fault in faults.items():
        damage(made, precision, name, fault)
    samples = make_samples(1, size=(128, 128), seed=1000)
    report = measure_quality(made, precision, samples, text_tokens=TOKENS)
    assert set(report.failed) == set(faults)


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
    quantized_bf16_artifacts: Path, tmp_path: Path, mutate: Mutate, message: str
) -> None:
    (tmp_path / "transformer").mkdir()
    for name in ("transformer/fp8.json", "transformer/fp8.safetensors"):
        shutil.copy(quantized_bf16_artifacts / name, tmp_path / name)
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
