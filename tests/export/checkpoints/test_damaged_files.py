"""Files that are not what they seem: pointers, web pages, holes, broken numbers."""

import codecs
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from klein_kv.artifacts.config import read_json
from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import ArtifactError, CheckpointError
from klein_kv.export.checkpoints import weight_values
from klein_kv.export.checkpoints.pocket import write_pocket
from klein_kv.export.checkpoints.tokenizer import save_tokenizer
from klein_kv.export.checkpoints.weight_index import read_folder
from klein_kv.export.checkpoints.weight_values import check_values
from klein_kv.export.exporter import export_checkpoint

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 9433010176\n"
)
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Access to model is restricted</title></head></html>"


@pytest.mark.parametrize("file", [TRANSFORMER, "vae/config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a Git LFS pointer, not the file of 9433010176 bytes .*`git lfs pull`"),
        (PAGE, "is a web page, not the file: .*`hf auth login`"),
    ],
)
def test_what_stands_where_a_file_should(
    file: str, content: bytes, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    """The advice was to download it again, which gave the same."""
    (checkpoint / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        export_checkpoint(checkpoint, tmp_path / "artifacts")
    assert str(checkpoint / file) in str(caught.value)


def test_artifacts_that_were_cloned_without_lfs(tiny_artifacts: Path, tmp_path: Path) -> None:
    artifacts = Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts"))
    (artifacts / "vae/decoder.onnx").write_bytes(POINTER)
    with pytest.raises(ArtifactError, match=r"vae/decoder.onnx is a Git LFS pointer"):
        Manifest.load(artifacts)


def test_byte_order_marks_are_read_over(
    tiny_checkpoint: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Editors of Windows write them."""
    for path in [*checkpoint.rglob("*.json"), *checkpoint.rglob("*.jinja")]:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    for part in ("transformer", "text_encoder", "vae"):
        name = f"{part}/config.json"
        assert read_json(checkpoint / name, part) == read_json(tiny_checkpoint / name, part)
    formats = []
    for source, name in ((tiny_checkpoint, "before"), (checkpoint, "after")):
        (tmp_path / name).mkdir()
        formats.append(save_tokenizer(source, tmp_path / name))
    assert formats[0] == formats[1]
    for path in (tmp_path / "before/tokenizer").iterdir():
        assert (tmp_path / "after/tokenizer" / path.name).read_bytes() == path.read_bytes()


# --- broken numbers ---


State = dict[str, torch.Tensor]


def save(path: Path, change: Callable[[State], object]) -> dict[str, object]:
    """A file of a small and a large matrix, an embedding and a norm, changed; its tensors."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(512, 512, generator=generator),
        "embed_tokens.weight": torch.randn(512, 64, generator=generator),
        "norm.bias": torch.zeros(64),
        "z.weight": torch.randn(64, 64, generator=generator),
    }
    state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    change(state)
    path.mkdir()
    save_file(state, path / "model.safetensors")
    return dict(read_folder(path, "transformer"))


@pytest.mark.parametrize("limit", [256 << 20, 1000])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["z.weight"].view(-1)[7].fill_(torch.nan), "z.weight .* are not finite"),
        (lambda s: s["norm.bias"][3].fill_(torch.inf), "norm.bias .* are not finite"),
        (lambda s: s["a.weight"].fill_(torch.nan), "a.weight .* are not finite"),
        (lambda s: s["z.weight"].zero_(), "model.safetensors ends in zeros: room was made"),
        (lambda s: s["a.weight"].zero_(), "a.weight .* holds zeros alone .*--allow-zeros"),
        (lambda s: s["a.weight"][448:].zero_(), "a.weight .* holds zeros alone"),
        (lambda s: s.update(b=s["a.weight"].to(torch.float16) * 1e9), "b of shape .* not finite"),
    ],
)
def test_numbers_that_no_network_has(
    limit: int,
    change: Callable[[State], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They gave a black image, and exit code 0; with and without reading all of a file."""
    monkeypatch.setattr(weight_values, "WHOLE_FILE_LIMIT", limit)
    weights = save(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=message):
        check_values(weights, weights)
    if "zeros" in message:
        check_values(weights, weights, allow_zeros=True)


def test_rows_of_unused_tokens_and_vectors_may_be_zero(tmp_path: Path) -> None:
    weights = save(tmp_path / "model", lambda s: s["embed_tokens.weight"].zero_())
    check_values(weights, weights)
    write_pocket(tmp_path / "pocket", torch.bfloat16)
    for part in ("transformer", "text_encoder", "vae"):
        index = read_folder(tmp_path / "pocket" / part, part)
        check_values(index, index)


def test_a_broken_checkpoint_is_refused_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path
) -> None:
    state = load_file(checkpoint / TRANSFORMER)
    state["proj_out.weight"][0, 0] = torch.nan
    (checkpoint / TRANSFORMER).unlink()
    save_file(state, checkpoint / TRANSFORMER)
    with pytest.raises(CheckpointError, match=r"proj_out.weight .*\(NaN"):
        export_checkpoint(checkpoint, tmp_path / "artifacts")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
