"""Where checkpoints come from: folders, single files, and a Hugging Face cache made by hand."""

import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.config import DEFAULT_TEXT_LAYERS
from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import CapacityError, CheckpointError, RequestError
from klein_kv.export import exporter
from klein_kv.export.checkpoints.sources import (
    OFFICIAL,
    Source,
    copy_licences,
    find_source,
)
from klein_kv.export.checkpoints.weight_files import place_weights
from klein_kv.export.checkpoints.weight_index import read_folder
from klein_kv.export.exporter import export_checkpoint
from tests.bfl_files import quantize, save_single_file

KV, KV_FP8 = "black-forest-labs/FLUX.2-klein-9b-kv", "black-forest-labs/FLUX.2-klein-9b-kv-fp8"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LICENCE = "FLUX Non-Commercial License v2.1\n"


def write_index(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))


@pytest.fixture
def tiny_file(bfl_tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """The tiny transformer as one bf16 file."""
    bfl = {name: tensor.to(torch.bfloat16) for name, tensor in bfl_tensors.items()}
    return save_single_file(tmp_path / "flux-2-klein-9b-kv.safetensors", bfl)


class Hub:
    """A hub's cache on disk, and a `snapshot_download` that finds things in it alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str | None, tuple[str, ...]]] = []

    def snapshot(self, name: str) -> Path:
        return self.root / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT

    def add(self, name: str, files: dict[str, bytes]) -> None:
        """Large files lie under their sha256, small ones under a git hash, as in the real cache."""
        snapshot = self.snapshot(name)
        blobs = snapshot.parents[1] / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            large = file.endswith(".safetensors")
            kind = hashlib.sha256 if large else hashlib.sha1
            blob = blobs / kind(content).hexdigest()
            blob.write_bytes(content)
            link = snapshot / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))

    def add_folder(self, name: str, folder: Path) -> None:
        self.add(
            name,
            {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in folder.rglob("*")
                if path.is_file()
            },
        )

    def download(self, name: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, tuple(allow_patterns)))
        if not self.snapshot(name).exists():
            raise errors.LocalEntryNotFoundError(f"no {name}")
        return str(self.snapshot(name))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    return made


# --- folders and files on this machine ---


def test_a_folder_says_which_variant_it_is(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = find_source(tiny_checkpoint)
    assert (source.name, source.variant) == (tiny_checkpoint.name, "kv")
    assert source.folder == tiny_checkpoint.resolve()
    assert source.transformer is None
    assert source.settle_variant(None) == source.settle_variant("kv") == "kv"
    write_index(tmp_path / "plain", "Flux2KleinPipeline")
    source = find_source(tmp_path / "plain")
    assert source.settle_variant(None) == "plain"
    assert not caplog.records
    assert source.settle_variant("kv") == "kv"  # the caller's word wins, with a warning
    assert "variant kv, although" in caplog.text
    assert "model_index.json (_class_name Flux2KleinPipeline) says plain" in caplog.text


@pytest.mark.parametrize("kind", ["Flux2Pipeline", ""])
def test_a_variant_is_never_guessed(tmp_path: Path, kind: str) -> None:
    write_index(tmp_path / "klein-9b-kv", kind)  # a name is no proof
    source = find_source(tmp_path / "klein-9b-kv")
    with pytest.raises(RequestError, match="cannot be guessed: both have the same configuration"):
        source.settle_variant(None)
    assert source.settle_variant("kv") == "kv"
    assert source.settle_variant("plain") == "plain"


def test_a_single_file_with_its_base(tiny_file: Path, tiny_checkpoint: Path) -> None:
    source = find_source(tiny_file, tiny_checkpoint)
    assert (source.name, source.variant) == ("flux-2-klein-9b-kv", "")
    assert (source.folder, source.transformer) == (tiny_checkpoint.resolve(), tiny_file)
    # The base's weights are others: what it says of them says nothing of the file.
    with pytest.raises(RequestError, match="cannot be guessed"):
        source.settle_variant(None)


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("{tmp}/none", {}, "none does not exist; expected a folder in diffusers layout"),
        ("none", {}, "checkpoint none does not exist"),
        ("./a/b", {}, "does not exist"),
        ("a/b/c", {}, "does not exist"),
        ("{tmp}/empty", {}, "checkpoint is missing: .*model_index.json does not exist"),
        ("{tmp}/loose", {}, "name the single file itself, and a pipeline with --base"),
        ("{tmp}/text.bin", {}, "only safetensors is read, never pickle"),
        ("{tmp}/loose/a.safetensors", {}, "add --base with the rest of the pipeline"),
        ("{tmp}/loose/a.safetensors", {"base": "{tmp}/none"}, "is neither a folder"),
        ("{tmp}/loose/a.safetensors", {"base": "{tmp}/text.bin"}, "is neither a folder"),
        ("{tmp}/loose/a.safetensors", {"base": "{tmp}/empty"}, "checkpoint is missing"),
        ("{tmp}/whole", {"base": "{tmp}/whole"}, "a base belongs to a single .safetensors file"),
        ("{tmp}/whole", {"revision": "main"}, "a revision belongs to a Hugging Face repository"),
    ],
)
def test_bad_places(tmp_path: Path, checkpoint: str, options: dict[str, str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_index(tmp_path / "whole", "Flux2KleinKVPipeline")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/a.safetensors").write_bytes(b"")
    (tmp_path / "text.bin").write_bytes(b"")
    options = {key: value.format(tmp=tmp_path) for key, value in options.items()}
    with pytest.raises((CheckpointError, RequestError), match=message):
        find_source(checkpoint.format(tmp=tmp_path), **options)


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="does not exist"):
        find_source("checkpoints/klein")
    assert not hub.asked


# --- Hugging Face ---


def test_of_a_base_only_what_the_file_lacks_is_downloaded(tiny_checkpoint, hub, tmp_path):
    """The text encoder is 16 GB."""
    hub.add_folder("org/base", tiny_checkpoint)
    text = "text_encoders.qwen3_8b.transformer.model.embed_tokens.weight"
    names = {"model.diffusion_model.x", text}
    for more, wanted in ((set(), {"vae"}), ({"vae.bn.running_mean"}, set())):
        path = tmp_path / "whole.safetensors"
        save_file({name: torch.ones(1) for name in names | more}, path)
        find_source(path, "org/base")
        patterns = hub.asked[-1][2]
        weights = {x.partition("/")[0] for x in patterns if x.endswith(".safetensors")}
        assert weights == wanted
        assert "text_encoder/*.json" in patterns


def test_a_repository_is_downloaded_without_its_single_file(tiny_checkpoint, hub):
    hub.add_folder(KV, tiny_checkpoint)
    source = find_source(KV.lower(), revision="refs/pr/1")
    ((name, revision, patterns),) = hub.asked
    assert (name, revision) == (KV, "refs/pr/1")
    assert (source.name, source.variant) == (KV, "kv")
    assert source.folder == hub.snapshot(KV)
    from huggingface_hub.utils import filter_repo_objects

    listed = [path.relative_to(tiny_checkpoint).as_posix() for path in tiny_checkpoint.rglob("*.*")]
    extra = ["flux-2-klein-9b-kv.safetensors", "README.md", "teaser.png", "text_encoder/model.bin"]
    wanted = set(filter_repo_objects([*listed, *extra], allow_patterns=list(patterns)))
    assert wanted == set(listed)


def test_official_names_say_the_variant_and_others_their_index(tiny_checkpoint, hub):
    for name, model in OFFICIAL.items():
        assert ("kv" in name) == (model.variant == "kv")
        assert bool(model.file) == bool(model.base)
        if model.file:
            assert OFFICIAL[model.base] == (model.variant, "", "")
        else:
            hub.add(name, {"model_index.json": b"{}"})
            assert find_source(name).settle_variant(None) == model.variant
    with pytest.raises(RequestError, match=f"variant is 'plain', but the repository {KV} says"):
        find_source(KV).settle_variant("plain")
    hub.add("someone/finetune", {"model_index.json": b'{"_class_name": "Flux2KleinKVPipeline"}'})
    assert find_source("someone/finetune").variant == "kv"
    hub.add("someone/other", {"model_index.json": b'{"_class_name": "Flux2Pipeline"}'})
    with pytest.raises(RequestError, match="someone/other does not say whether"):
        find_source("someone/other").settle_variant(None)


def test_official_fp8_finds_its_base(tiny_checkpoint, tiny_file, hub):
    file = OFFICIAL[KV_FP8].file
    hub.add(KV_FP8, {file: tiny_file.read_bytes(), "LICENSE.md": LICENCE.encode()})
    hub.add_folder(KV, tiny_checkpoint)
    source = find_source(KV_FP8)
    assert source.settle_variant(None) == "kv"
    assert source.transformer == hub.snapshot(KV_FP8) / file
    assert source.folder == hub.snapshot(KV)
    (asked, _, patterns), (base, _, base_patterns) = hub.asked
    assert (asked, base) == (KV_FP8, KV)
    assert patterns[0] == file
    assert "transformer/*.json" in base_patterns
    assert "transformer/*.safetensors" not in base_patterns
    assert find_source(KV_FP8, base=tiny_checkpoint).folder == tiny_checkpoint.resolve()


def test_one_file_of_a_repository(tiny_checkpoint, tiny_file, hub):
    hub.add_folder(KV, tiny_checkpoint)
    hub.add(KV, {"flux-2-klein-9b-kv.safetensors": tiny_file.read_bytes()})
    source = find_source(f"{KV}/flux-2-klein-9b-kv.safetensors")
    assert source.settle_variant(None) == "kv"
    assert source.folder == hub.snapshot(KV)
    with pytest.raises(CheckpointError, match=f"{KV} has no file other.safetensors"):
        find_source(f"{KV}/other.safetensors")


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # its constructor wants a response
    error.args = ("403 Client Error",)
    return error


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            http_error(errors.GatedRepoError),
            CheckpointError,
            rf"is gated: accept its licence at https://huggingface.co/{KV}, then log in with `hf",
        ),
        (
            http_error(errors.RepositoryNotFoundError),
            CheckpointError,
            "was not found: check the name; if it is private, log in",
        ),
        (http_error(errors.RevisionNotFoundError), CheckpointError, "has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("x"), CheckpointError, "HF_HUB_OFFLINE is set; download"),
        (errors.OfflineModeIsEnabled("x"), CheckpointError, "HF_HUB_OFFLINE is set"),
        (errors.HFValidationError("x"), CheckpointError, "is no name of a repository"),
        (OSError(errno.ENOSPC, "full"), CapacityError, "no room to download .*HF_HOME"),
        (TimeoutError("slow"), CheckpointError, "could not be downloaded: TimeoutError: slow"),
        (http_error(errors.HfHubHTTPError), CheckpointError, "could not be downloaded: HfHubHTTP"),
    ],
)
def test_download_errors(monkeypatch, error, expected, message):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected, match=message) as caught:
        find_source(KV, revision="v9")
    assert KV in str(caught.value)


def test_the_real_library_offline(tmp_path, monkeypatch, tiny_checkpoint):
    """No network: what is in the cache is found, what is not is an error that says so."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="is not in the cache of this machine"):
        find_source(KV)
    cache = Hub(tmp_path / "hub")
    cache.add_folder(KV, tiny_checkpoint)
    refs = cache.snapshot(KV).parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    source = find_source(KV)
    assert source.folder == cache.snapshot(KV)
    assert (source.folder / "transformer/config.json").is_symlink()


# --- licences ---


def licensed(name: str, *folders: Path) -> Source:
    return Source(name, folders[0], None, folders, "kv")


def test_licences_are_copied_and_said_once(tmp_path, caplog):
    own, base, out = (tmp_path / name for name in ("own", "base", "out"))
    for folder in (own, base, out):
        folder.mkdir()
    (own / "LICENSE.md").write_text(LICENCE)
    (base / "LICENSE.md").write_text("Apache License\n")
    (base / "NOTICE").write_text("notice")
    (base / "README.md").write_text("no licence")
    with caplog.at_level(logging.WARNING):
        text = copy_licences(licensed("x", own, base), out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "LICENSE.md": LICENCE,
        "LICENSE.md.base": "Apache License\n",
        "NOTICE": "notice",
    }
    assert text.endswith("see LICENSE.md, LICENSE.md.base, NOTICE. It is for non-commercial use.")
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "x is licensed for non-commercial use"
    ]


def test_free_licences_and_official_9b_weights_without_theirs(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    text = copy_licences(licensed(KV, tmp_path), tmp_path / "out")
    assert text.startswith("No licence file came with the checkpoint")
    assert len(caplog.records) == 1
    caplog.clear()
    (tmp_path / "LICENSE.md").write_text("Apache License\n")
    text = copy_licences(licensed("black-forest-labs/FLUX.2-klein-4B", tmp_path), tmp_path / "out")
    assert "non-commercial" not in text
    assert not caplog.records


# --- linking ---


@pytest.mark.parametrize("way", ["reflink", "copy", "no room"])
def test_files_that_cannot_be_linked(way, tmp_path, monkeypatch, caplog):
    """A file system boundary: a reflink comes before a copy."""

    def clone(new: int, request: int, old: int) -> None:
        assert request == 0x40049409
        if way != "reflink":
            raise OSError(errno.EOPNOTSUPP, "not supported")
        os.write(new, os.pread(old, 1 << 20, 0))

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.ioctl", clone)
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    source, target = (tmp_path / name / "w.safetensors" for name in ("in", "out"))
    save_file({"a": torch.arange(5.0)}, source)
    weights = read_folder(source.parent, "vae")
    if way == "no room":
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CapacityError, match=r"not enough disk in .*are needed"):
            place_weights(weights, weights, "float32", target.parent, "vae")
        assert not target.exists()
        return
    placed = place_weights(weights, weights, "float32", target.parent, "vae")
    assert target.read_bytes() == source.read_bytes()
    assert placed.shared == ({target} if way == "reflink" else set())
    copied = "copying w.safetensors (0.00 GB): the file system does not link it"
    assert (copied in caplog.text) == (way == "copy")


# --- whole checkpoints ---


def read(checkpoint: Path) -> Any:
    return exporter._read_checkpoint(find_source(checkpoint), DEFAULT_TEXT_LAYERS)


def test_text_encoder_shards_that_nobody_reads_are_not_linked(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = checkpoint / "text_encoder"
    state = load_file(folder / "model.safetensors")
    late = {n: t for n, t in state.items() if n.startswith(("lm_head.", "model.layers.27."))}
    early = {n: t for n, t in state.items() if n not in late}
    save_file(early, folder / "early.safetensors")
    save_file(late, folder / "late.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(early, "early.safetensors") | dict.fromkeys(late, "late.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole = read(checkpoint)
    target = tmp_path / "out"
    target.mkdir()
    names = whole.parameters["text_encoder"]
    place_weights(whole.weights["text_encoder"], names, "float32", target, "text_encoder")
    assert [path.name for path in target.iterdir()] == ["early.safetensors"]


def test_small_decoder(checkpoint: Path) -> None:
    """`AutoencoderKLFlux2` with a narrower decoder, as its configuration describes it."""
    from diffusers import AutoencoderKLFlux2

    config = json.loads((checkpoint / "vae/config.json").read_text())
    vae = AutoencoderKLFlux2.from_config(config | {"decoder_block_out_channels": [8, 8, 16, 16]})
    shutil.rmtree(checkpoint / "vae")
    vae.save_pretrained(checkpoint / "vae")
    shapes = read(checkpoint).parameters["vae"]
    assert shapes["decoder.conv_in.weight"][0] == 16
    assert shapes["encoder.conv_out.weight"][1] == config["block_out_channels"][-1]


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_quantized_weights_need_a_type_to_become(tiny_checkpoint, tmp_path, bfl_tensors, kind):
    path = save_single_file(tmp_path / "k.safetensors", quantize(bfl_tensors, kind))
    with pytest.raises(RequestError, match=rf"is quantized \(.* is {kind}\): add --dtype bf16"):
        export_checkpoint(path, tmp_path / "out", base=tiny_checkpoint, variant="kv")
    assert not (tmp_path / "out").exists()


def test_export_from_the_hub(
    tiny_checkpoint, tmp_path, hub, caplog, tiny_theirs, picture, bfl_tensors
):
    """An official fp8 file with its base, out of a cache of links, to an image's latents."""
    path = save_single_file(tmp_path / "k.safetensors", quantize(bfl_tensors, "fp8"))
    file = OFFICIAL[KV_FP8].file
    hub.add(KV_FP8, {file: path.read_bytes(), "LICENSE.md": LICENCE.encode()})
    hub.add_folder(KV, tiny_checkpoint)
    done = export_checkpoint(KV_FP8, tmp_path / "out", dtype="float32")
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.variant, manifest.dtype) == ("kv", "float32")
    assert manifest.model_id == f"{KV_FP8}/{file}"
    vae = "vae/diffusion_pytorch_model.safetensors"
    content = (tiny_checkpoint / vae).read_bytes()
    assert manifest.files[vae].sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.files["transformer/transformer.float32.safetensors"].sha256 == ""
    total = sum(record.bytes for record in manifest.files.values())
    assert done.bytes_written < total - len(content)
    assert (tmp_path / "out/LICENSE.md").read_text() == LICENCE
    assert caplog.text.count("is licensed for non-commercial use") == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert (tmp_path / "out" / vae).samefile(hub.snapshot(KV) / vae)

    ours = KleinKVPipeline.from_pretrained(tmp_path / "out", threads=1)
    options = {
        "prompt": "a kite",
        "image": [picture(128, 128)],
        "height": 128,
        "width": 128,
        "num_inference_steps": 2,
        "max_sequence_length": 64,
        "output_type": "latent",
    }
    got = np.asarray(ours(**options, seed=1).images)
    exact = tiny_theirs(**options, generator=torch.Generator().manual_seed(1)).images.numpy()
    difference = np.abs(got.reshape(exact.shape) - exact)
    assert 1e-4 < difference.mean() < 0.2  # fp8's own error, and no more
