"""Checkpoint in, artifact folder out: what is written, what is refused, and what stays behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import MANIFEST, Manifest
from klein_kv.artifacts.preview_matrix import PREVIEW
from klein_kv.artifacts.signature import (
    FLOAT8_KV_FILES,
    GRAPH_FILES,
    PLAIN_GRAPH_FILES,
    SMALL_GRAPH_FILES,
)
from klein_kv.errors import ArtifactError, CapacityError, CheckpointError, RequestError
from klein_kv.export import exporter
from klein_kv.export.checkpoints.fixture import make_fixture
from klein_kv.export.exporter import export_checkpoint
from tests.conftest import KleinExport

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
COMPONENTS = [TRANSFORMER, TEXT, VAE]


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports write weights alone."""
    monkeypatch.setattr(exporter, "_write_graphs", lambda *_: {})
    monkeypatch.setattr(exporter, "save_preview_matrix", lambda *_: None)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(value), encoding="utf-8")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_refused(checkpoint: Path, error: type[Exception], message: str, **options: Any) -> None:
    """The export fails with one clear error, and leaves nothing behind."""
    target = checkpoint.parent / "artifacts"
    before = sorted(path.name for path in checkpoint.parent.iterdir())
    with pytest.raises(error, match=message):
        export_checkpoint(checkpoint, target, **options)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == before


# --- what is written ---


def test_folder(tiny_artifacts: Path, tiny_checkpoint: Path) -> None:
    files = (GRAPH_FILES, FLOAT8_KV_FILES, SMALL_GRAPH_FILES)
    graphs = {file for table in files for file in table.values()}
    expected = {MANIFEST, PREVIEW, "LICENSE.md", *COMPONENTS, *graphs}
    expected |= {name.replace(".onnx", ".weights.json") for name in graphs}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    expected |= {f"tokenizer/{name}" for name in tokenizer}
    assert files_below(tiny_artifacts) == expected
    for component in COMPONENTS:  # of the same type: links
        assert (tiny_artifacts / component).samefile(tiny_checkpoint / component)
        assert not (tiny_artifacts / component).is_symlink()


def test_plain_weights(plain_artifacts: Path) -> None:
    assert Manifest.load(plain_artifacts).variant == "plain"
    graphs = {name for name in files_below(plain_artifacts) if name.endswith(".onnx")}
    assert graphs == {*PLAIN_GRAPH_FILES.values(), *SMALL_GRAPH_FILES.values()}


def test_base_weights_need_guidance(
    plain_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Undistilled weights are exported, but not without a word."""
    folder = Path(shutil.copytree(plain_checkpoint, tmp_path / "base"))
    edit_json(folder / "model_index.json", is_distilled=False)
    export_checkpoint(folder, tmp_path / "out")
    assert "is not distilled: it needs classifier-free guidance" in caplog.text
    with pytest.raises(RequestError, match="not distilled: they need classifier-free guidance"):
        KleinKVPipeline.from_pretrained(tmp_path / "out", threads=1)


def test_result(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "artifacts"
    target.mkdir(parents=True)  # an empty folder is filled
    edit_json(checkpoint / "scheduler/scheduler_config.json", shift_terminal=0.0)
    result = export_checkpoint(checkpoint, target)
    assert result.artifacts == target
    manifest = Manifest.load(target)
    assert manifest.licence.endswith("see LICENSE.md.")
    assert manifest.scheduler["shift_terminal"] == 0  # as found
    assert result.dtype == "float32"
    packed = {f"{graph}_fp8_kv" for graph in ("first_step", "cached_step", "encode_references")}
    assert set(result.nodes) == {*GRAPH_FILES, *packed}
    assert result.nodes["first_step"] > result.nodes["cached_step"] > 100
    assert 0 < result.seconds < 60
    assert sorted(path.name for path in target.parent.iterdir()) == ["artifacts"]
    weights = sum((checkpoint / name).stat().st_size for name in COMPONENTS)
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    assert result.bytes_written == total - weights
    assert result.bytes_written < 2e6


@pytest.mark.slow
def test_export_of_the_9b_shapes(klein_export: KleinExport) -> None:
    """35 GB of weights, 18.2 of them the transformer's: linked, never read, never copied."""
    assert klein_export.dtype == "bfloat16"
    assert klein_export.bytes_written < 50e6
    allocated = sum(512 * path.stat().st_blocks for path in klein_export.artifacts.rglob("*"))
    assert allocated < 50e6
    assert klein_export.nodes["cached_step"] <= 80 * 32
    assert Manifest.load(klein_export.artifacts).config.transformer.num_blocks == 32


def test_same_checkpoint_gives_the_same_files_and_stays_as_it_was(
    checkpoint: Path, tiny_bf16_artifacts: Path, tmp_path: Path
) -> None:
    before = {name: (checkpoint / name).read_bytes() for name in files_below(checkpoint)}
    again = export_checkpoint(checkpoint, tmp_path / "again", dtype="bfloat16").artifacts
    assert files_below(again) == files_below(tiny_bf16_artifacts)
    for name in files_below(again):
        assert (again / name).read_bytes() == (tiny_bf16_artifacts / name).read_bytes(), name
    assert {name: (checkpoint / name).read_bytes() for name in files_below(checkpoint)} == before


# --- conversion ---


SPECIAL = torch.tensor(
    [
        *(0.0, -0.0, 1.0, -2.5, 3.0e38, -1e-38, 1e-42, -7.5e-46),
        # Half-way between two bfloat16 values, with an even and an odd lower neighbour, and nearby.
        *(1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20),
    ]
)
HALF_SPECIAL = torch.tensor(
    [
        *(0.0, -0.0, 1.0, 65504.0, -65519.0, 6e-8, 2.9e-8, 3e-8, 1e-10),
        *(1 + 2**-11, 1 + 3 * 2**-11, 2**-24 * 1.5),
    ]
)


@pytest.mark.parametrize(("dtype", "special"), [("bfloat16", SPECIAL), ("float16", HALF_SPECIAL)])
def test_narrowing_rounds_to_nearest_even(
    dtype: str,
    special: torch.Tensor,
    checkpoint: Path,
    tmp_path: Path,
    no_graphs: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["x_embedder.weight"].view(-1)[: len(special)] = special

    rewrite(checkpoint / TRANSFORMER, plant)
    artifacts = export_checkpoint(checkpoint, tmp_path / "artifacts", dtype=dtype).artifacts
    for component in ("transformer", "text_encoder", "vae"):
        before, after = tensors_of(checkpoint / component), tensors_of(artifacts / component)
        assert after.keys() <= before.keys()
        for name, tensor in after.items():
            assert torch.equal(bits(tensor), bits(before[name].to(getattr(torch, dtype)))), name
    assert ("float16 overflows on real klein weights" in caplog.text) == (dtype == "float16")
    assert len(caplog.records) == (dtype == "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_widening_is_exact_and_the_transformers_type_the_default(
    dtype: str, tmp_path: Path, no_graphs: None
) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_fixture(checkpoint, "tiny", dtype=dtype)
    wide = export_checkpoint(checkpoint, tmp_path / "wide", dtype="float32").artifacts
    for component in ("transformer", "text_encoder", "vae"):
        before = tensors_of(checkpoint / component)
        for name, tensor in tensors_of(wide / component).items():
            assert torch.equal(bits(tensor), bits(before[name].float())), name
    result = export_checkpoint(checkpoint, tmp_path / "same")
    assert result.dtype == json.loads((result.artifacts / MANIFEST).read_text())["dtype"] == dtype
    assert (result.artifacts / TRANSFORMER).samefile(checkpoint / TRANSFORMER)


def test_only_what_has_another_type_is_converted(
    checkpoint: Path, tmp_path: Path, no_graphs: None
) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {k: v.bfloat16() for k, v in tensors.items() if v.is_floating_point()}

    rewrite(checkpoint / TEXT, narrow)
    artifacts = export_checkpoint(checkpoint, tmp_path / "artifacts").artifacts
    assert (artifacts / TRANSFORMER).samefile(checkpoint / TRANSFORMER)
    assert files_below(artifacts / "text_encoder") >= {"text_encoder.float32.safetensors"}
    converted = tensors_of(artifacts / "text_encoder")
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    # The blocks that are never read are not written.
    assert not any(name.startswith(("model.layers.27.", "lm_head")) for name in converted)


@pytest.mark.parametrize(("value", "dtype"), [(-65520.0, "float16"), (3.4e38, "bfloat16")])
def test_values_that_a_type_cannot_hold(value: float, dtype: str, checkpoint: Path) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.conv_in.weight"].view(-1)[5] = value

    rewrite(checkpoint / VAE, plant)
    message = f"decoder.conv_in.weight: values that {dtype} cannot hold .*another --dtype"
    assert_refused(checkpoint, CheckpointError, message, dtype=dtype)


# --- interrupted ---


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("vae_graph", KeyboardInterrupt),
        ("copy_licences", RuntimeError),
        ("file_digest", KeyboardInterrupt),
    ],
)
def test_interrupted_export_leaves_nothing(
    where: str,
    error: type[BaseException],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        assert list(tmp_path.glob(".artifacts.partial-*/transformer/*.safetensors"))
        raise error("stopped")

    monkeypatch.setattr(exporter, where, fail)
    with pytest.raises(error, match="stopped"):
        export_checkpoint(checkpoint, tmp_path / "artifacts", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_disk_is_measured_before_writing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = "not enough disk .*0.00 GB are free; free some space"
    assert_refused(checkpoint, CapacityError, message, dtype="bfloat16")


def test_remains_of_a_killed_export_are_not_artifacts(
    tiny_artifacts: Path, checkpoint: Path, tmp_path: Path, no_graphs: None
) -> None:
    partial = tmp_path / ".artifacts.partial-999999999"
    shutil.copytree(tiny_artifacts, partial)
    (partial / MANIFEST).unlink()  # written last
    with pytest.raises(ArtifactError, match="is not a klein-kv artifact folder"):
        KleinKVPipeline.from_pretrained(partial)
    export_checkpoint(checkpoint, tmp_path / "artifacts")
    assert not partial.exists()


# --- the target ---


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_existing_target_is_refused(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "artifacts"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "note.txt").write_text("mine")
    before = files_below(tmp_path)
    message = "already exists and is not an empty folder; remove it or choose another name"
    assert_refused(checkpoint, RequestError, message)
    assert files_below(tmp_path) == before


def test_target_that_cannot_be_made(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CapacityError, match="choose a folder that is writable"):
        export_checkpoint(checkpoint, tmp_path / "file" / "artifacts")


# --- the arguments ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "9b"}, RequestError, "variant is '9b', expected 'kv' .* or 'plain'"),
        ({"variant": ""}, RequestError, "variant is ''"),
        ({"variant": "plain"}, RequestError, "variant is 'plain', but .*Flux2KleinKVPipeline"),
        ({"dtype": "fp32"}, RequestError, "dtype is 'fp32', expected one of float32, float16, bf"),
        ({"dtype": ""}, RequestError, "dtype is ''"),
        ({"text_layers": (9, 18, 29)}, CheckpointError, "has 28 layers; .*--text-layers"),
        (
            {"text_layers": (9, 18)},
            CheckpointError,
            r"make 64, the transformer's joint_attention_dim is 96; .*--text-layers",
        ),
        ({"text_layers": ()}, CheckpointError, "--text-layers"),
    ],
)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], message: str, checkpoint: Path
) -> None:
    assert_refused(checkpoint, error, message, **options)


# --- the checkpoint ---


Damage = Callable[[Path], Any]


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def config(part: str, **changes: Any) -> Damage:
    return lambda folder: edit_json(folder / part / "config.json", **changes)


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return lambda folder: rewrite(folder / file, change)


NORM, UP = "transformer_blocks.0.attn.norm_q.weight", "model.layers.26.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("model_index.json"), "checkpoint is missing: .*diffusers layout"),
        (without("transformer/config.json"), "transformer config is missing"),
        (without("text_encoder/config.json"), "text_encoder config is missing"),
        (without("vae/config.json"), "vae config is missing"),
        (without("scheduler/scheduler_config.json"), "scheduler config is missing"),
        (without(TRANSFORMER), "transformer: expected one .safetensors file .* found none"),
        (without(TEXT), "text_encoder: expected one .safetensors file"),
        (without(VAE), "vae: expected one .safetensors file"),
        (without("tokenizer/tokenizer.json"), "has no tokenizer.json"),
        (without("tokenizer/chat_template.jinja"), "has no chat template"),
        (config("transformer", _class_name="FluxTransformer2DModel"), "_class_name"),
        (config("transformer", num_layers=2), r"\d+ missing \(transformer_blocks\.1\..*, \.\.\.\)"),
        (config("transformer", num_single_layers=1), r"unexpected \(single_transformer_blocks\.1"),
        (config("transformer", num_attention_heads=3), "has shape .* expected .* from config.json"),
        (config("text_encoder", hidden_size=48), "do not fit"),
        (config("text_encoder", intermediate_size=81), "gate_proj.* has shape"),
        (config("vae", latent_channels=16), "do not fit"),
        (config("vae", layers_per_block=2), r"\d+ missing"),
        (config("vae", block_out_channels=[16, 16, 24, 25]), "multiples of norm_num_groups 8"),
        (tensors(TRANSFORMER, lambda x: x.pop(NORM)), rf"1 missing \({NORM}\), 0 unexpected"),
        (tensors(TEXT, lambda x: x.update(a=torch.ones(2))), r"0 missing, 1 unexpected \(a\)"),
        (
            tensors(VAE, lambda x: x.update({"bn.running_var": torch.ones(7, 3)})),
            r"bn.running_var has shape \(7, 3\), expected",
        ),
        (tensors(TEXT, lambda x: x.update({UP: x[UP].long()})), f"{UP}.*int64"),
        (  # it was found out by the first request only
            lambda folder: edit_json(
                folder / "scheduler/scheduler_config.json", _class_name="EulerDiscreteScheduler"
            ),
            "scheduler config: _class_name is 'EulerDiscrete",
        ),
    ],
)
def test_checkpoint_that_is_not_whole_or_not_klein(
    damage: Damage, message: str, checkpoint: Path
) -> None:
    damage(checkpoint)
    assert_refused(checkpoint, CheckpointError, message)


@pytest.mark.parametrize(
    ("joint", "text", "message"),
    [
        (12288, {"hidden_size": 2560}, r"width 4096 \(klein 9B.*Qwen3-8B\).*2560 \(klein 4B"),
        (7680, {"hidden_size": 4096}, r"width 2560 \(klein 4B.*Qwen3-4B\).*4096 \(klein 9B"),
        # Six of its hidden states would add up, and make another model.
        (12288, {"hidden_size": 2048}, r"width 4096 \(klein 9B.*\), the text .* width 2048;"),
        # Its few layers are not what is wrong with it.
        (96, {"hidden_size": 48, "num_hidden_layers": 12}, "width 32, the text .* width 48;"),
    ],
)
def test_text_encoder_of_another_model(
    joint: int, text: dict[str, Any], message: str, checkpoint: Path
) -> None:
    """The advice was to choose other --text-layers, which cannot help, or made another model."""
    edit_json(checkpoint / "transformer/config.json", joint_attention_dim=joint)
    edit_json(checkpoint / "text_encoder/config.json", **text)
    for layers in ((9, 18, 27), (1, 2, 3, 4, 5, 6)):
        assert_refused(checkpoint, CheckpointError, message, text_layers=layers)


def test_weights_that_are_no_safetensors(checkpoint: Path) -> None:
    path, trap = checkpoint / TRANSFORMER, checkpoint / "opened"
    whole = path.read_bytes()
    pickled = b"cbuiltins\nopen\n(V" + str(trap).encode() + b"\nVw\ntR."  # makes a file when loaded
    for content in (whole[:-1], whole[:100], b"", b"<html>404 Not Found</html>", pickled):
        path.write_bytes(content)
        message = "truncated|not a whole safetensors file|only safetensors is read|is a web page"
        assert_refused(checkpoint, CheckpointError, message)
    assert not trap.exists()


def test_tensors_that_nobody_reads_may_be_missing(
    checkpoint: Path, tmp_path: Path, no_graphs: None
) -> None:
    """The language-model head, the blocks after the last hidden state, BatchNorm's counter."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith(("lm_head", "model.layers.27.", "model.norm")):
                del tensors[name]
        tensors["lm_head.weight"] = torch.zeros(1)  # or be of any shape

    rewrite(checkpoint / TEXT, strip)
    rewrite(checkpoint / VAE, lambda tensors: tensors.pop("bn.num_batches_tracked", None))
    export_checkpoint(checkpoint, tmp_path / "artifacts")


def test_damaged_tokenizer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any weight is converted, which takes minutes."""
    monkeypatch.setattr(exporter, "place_weights", None)
    (checkpoint / "tokenizer/tokenizer.json").write_text("{")
    assert_refused(checkpoint, CheckpointError, "tokenizer: .* cannot be loaded")


def test_code_of_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    """A tokenizer may name a class of its own, in a file beside it."""
    trap = checkpoint / "opened"
    (checkpoint / "tokenizer/mine.py").write_text(
        f"open({str(trap)!r}, 'w')\nclass Mine:\n    pass\n"
    )
    edit_json(
        checkpoint / "tokenizer/tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["mine.Mine", None]},
    )
    try:
        export_checkpoint(checkpoint, checkpoint.parent / "artifacts")
    except CheckpointError as error:
        assert "tokenizer" in str(error)  # noqa: PT017 - either is fine, running it is not
    assert not trap.exists()
