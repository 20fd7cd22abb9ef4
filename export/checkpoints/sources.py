"""Where a checkpoint comes from: a folder, one file with a base, or a Hugging Face repository.

Only the files that an export reads are downloaded; the copy of the transformer as one file at the
top of the official repositories is not among them. `huggingface_hub` does the downloading, with its
own settings from the environment (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...).
"""

import errno
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from klein_kv.artifacts.config import read_json
from klein_kv.artifacts.weights import read_header
from klein_kv.errors import CapacityError, CheckpointError, KleinKVError, RequestError
from klein_kv.export.checkpoints.single_file import parts_beside

__all__ = ["OFFICIAL", "OfficialModel", "Source", "copy_licences", "find_source", "known_sha256"]

_log = logging.getLogger(__name__)


class OfficialModel(NamedTuple):
    """A repository of Black Forest Labs: "kv" or "plain", and for a single file its base."""

    variant: str
    file: str = ""
    base: str = ""


_ORG = "black-forest-labs/FLUX.2-klein"
OFFICIAL = {
    f"{_ORG}-9b-kv": OfficialModel("kv"),
    f"{_ORG}-9b-kv-fp8": OfficialModel("kv", "flux-2-klein-9b-kv-fp8.safetensors", f"{_ORG}-9b-kv"),
    f"{_ORG}-9B": OfficialModel("plain"),
    f"{_ORG}-9b-fp8": OfficialModel("plain", "flux-2-klein-9b-fp8.safetensors", f"{_ORG}-9B"),
    f"{_ORG}-9b-nvfp4": OfficialModel("plain", "flux-2-klein-9b-nvfp4.safetensors", f"{_ORG}-9B"),
    f"{_ORG}-4B": OfficialModel("plain"),
    f"{_ORG}-4b-fp8": OfficialModel("plain", "flux-2-klein-4b-fp8.safetensors", f"{_ORG}-4B"),
    f"{_ORG}-base-9B": OfficialModel("plain"),
    f"{_ORG}-base-4B": OfficialModel("plain"),
}
"""Repositories whose name says which kind of weights they hold."""

_BY_LOWER_NAME = {name.lower(): (name, model) for name, model in OFFICIAL.items()}
_CLASSES = {"Flux2KleinKVPipeline": "kv", "Flux2KleinPipeline": "plain"}
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+\.safetensors))?")
_OFFICIAL_9B = re.compile(r"black-forest-labs/flux\.2-klein-(base-)?9b")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_BASE_FILES = (
    "model_index.json",
    "LICENSE*",
    "NOTICE*",
    "scheduler/*.json",
    "tokenizer/*",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
    "transformer/*.json",
)
_PIPELINE_FILES = (*_BASE_FILES, "transformer/*.safetensors")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on the local disk."""

    name: str  # for people: repository, or name of the folder or file
    folder: Path  # the pipeline in diffusers layout
    transformer: Path | None  # single file with the transformer; None if `folder` has it
    licence_folders: tuple[Path, ...]  # where to look for licences, the weights' own first
    variant: str = ""  # "kv" or "plain" if the checkpoint says so itself
    declared_by: str = ""  # what says so
    official: bool = False  # it is a repository whose name says so
    is_distilled: bool = True  # False if `folder` says that its weights need guidance

    def settle_variant(self, wanted: str | None) -> str:
        """The variant to export: what the checkpoint says, or what the caller says.

        Raises:
            RequestError: nobody says it, or what says otherwise cannot be mistaken.
        """
        if wanted == "kv" and self.variant == "plain" and not self.official:
            # The plain pipeline's class name tells what saved the folder, not what the weights
            # were made for; that of the KV pipeline does.
            _log.warning("variant %s, although %s says %s", wanted, self.declared_by, self.variant)
        elif wanted is not None and self.variant and wanted != self.variant:
            raise RequestError(
                f"variant is {wanted!r}, but {self.declared_by} says {self.variant!r}; leave "
                "--variant out, or correct the one that is wrong"
            )
        if wanted or self.variant:
            return wanted or self.variant
        raise RequestError(
            f"{self.name} does not say whether its weights are KV weights; add --variant kv or "
            "--variant plain. It cannot be guessed: both have the same configuration, tensor "
            "names and shapes, and the wrong choice gives images that are wrong without an error"
        )


def find_source(
    checkpoint: Path | str, base: Path | str | None = None, revision: str | None = None
) -> Source:
    """Finds a checkpoint, downloading it if it is not on this machine.

    Arguments are those of `export_checkpoint`; a repository is `org/name`, one file of it
    `org/name/file.safetensors`.

    Raises:
        RequestError: arguments that contradict each other.
        CheckpointError: nothing there, no access, or not a checkpoint.
        CapacityError: no room for the download.
    """
    text = str(checkpoint)
    path = Path(text).expanduser()
    if path.exists() and revision is not None:
        raise RequestError(
            f"revision is {revision!r} but {text} is on this machine; a revision belongs to a "
            "Hugging Face repository"
        )
    if path.is_dir():
        return _folder(path, base, path.resolve().name)
    if path.exists():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"checkpoint {path} is a file but not .safetensors; only safetensors is read, "
                "never pickle"
            )
        if base is None:
            raise RequestError(
                f"{path.name} is no whole pipeline; add --base with the rest of the pipeline: a "
                "folder in diffusers layout (of parts that the file holds their configurations are "
                "enough), or black-forest-labs/FLUX.2-klein-9b-kv"
            )
        path, folder = path.absolute(), _base_folder(base, path)
        return Source(path.stem, folder, path, (path.parent, folder))
    match = _REPOSITORY.fullmatch(text)
    if match is None or Path(text.split("/", maxsplit=1)[0]).exists() or text[0] in "./~":
        raise CheckpointError(
            f"checkpoint {text} does not exist; expected a folder in diffusers layout, a "
            ".safetensors file, or a Hugging Face repository such as "
            "black-forest-labs/FLUX.2-klein-9b-kv"
        )
    return _repository(match[1], match[2] or "", base, revision)


def _folder(path: Path, base: Path | str | None, name: str) -> Source:
    if base is not None:
        raise RequestError(
            f"base is {base} but {path} is a folder, which has the whole pipeline; a base belongs "
            "to a single .safetensors file"
        )
    folder = path.resolve()
    index = _read_index(folder)
    kind = str(index.get("_class_name", ""))
    return Source(
        name=name,
        folder=folder,
        transformer=None,
        licence_folders=(folder,),
        variant=_CLASSES.get(kind, ""),
        declared_by=f"{folder / 'model_index.json'} (_class_name {kind})",
        is_distilled=index.get("is_distilled") is not False,
    )


def _read_index(folder: Path) -> dict[str, object]:
    index = folder / "model_index.json"
    if not index.exists() and any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has .safetensors files but no model_index.json: it is no checkpoint in "
            "diffusers layout; name the single file itself, and a pipeline with --base"
        )
    return read_json(index, "checkpoint")


def _base_folder(base: Path | str, file: Path) -> Path:
    """The folder of a base, downloaded but for the weights of parts that the file holds."""
    path = Path(base).expanduser()
    if path.is_dir():
        folder = path.resolve()
    else:
        match = _REPOSITORY.fullmatch(str(base))
        if path.exists() or match is None or match[2]:
            raise CheckpointError(
                f"base {base} is neither a folder in diffusers layout nor a Hugging Face repository"
            )
        held = {f"{part}/*.safetensors" for part in parts_beside(read_header(file, quantized=True))}
        folder = _download(match[1], tuple(x for x in _BASE_FILES if x not in held), None)
    _read_index(folder)
    return folder


def _repository(name: str, file: str, base: Path | str | None, revision: str | None) -> Source:
    name, official = _BY_LOWER_NAME.get(name.lower(), (name, OfficialModel("")))
    file = file or official.file
    if file:
        snapshot = _download(name, (file, "LICENSE*", "NOTICE*"), revision)
        path = snapshot / file
        if not path.exists():
            raise CheckpointError(f"Hugging Face repository {name} has no file {file}")
        # The official repositories hold the single file beside the pipeline.
        folder = _base_folder(base or official.base or name, path)
        licences = tuple(dict.fromkeys((path.parent, snapshot, folder)))
        source = Source(f"{name}/{file}", folder, path, licences)
    else:
        source = _folder(_download(name, _PIPELINE_FILES, revision), base, name)
    if not official.variant:
        return source
    # Which weights a repository holds is known by its name, whatever class its index names.
    by = f"the repository {name}"
    return replace(source, variant=official.variant, declared_by=by, official=True)


def _download(name: str, patterns: tuple[str, ...], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    _log.info("%s: looking for its files", name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of three libraries, by kind and by platform
        raise _download_error(name, revision, error) from error


def _download_error(name: str, revision: str | None, error: Exception) -> KleinKVError:
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    page = f"https://huggingface.co/{name}"
    if isinstance(error, errors.GatedRepoError):
        text = f"is gated: accept its licence at {page}, then {login}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"was not found: check the name; if it is private, {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"has no revision {revision!r}: see {page}/tree/main for what it has"
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        text = (
            "is not in the cache of this machine, or not whole, and cannot be downloaded: no "
            "connection, or HF_HUB_OFFLINE is set; download it where there is one (`hf download "
            f"{name} --local-dir FOLDER`) and export that folder"
        )
    elif isinstance(error, errors.HFValidationError):
        text = "is no name of a repository; expected org/name"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(
            f"no room to download {name}: {error}; HF_HOME says where downloads go"
        )
    else:
        text = f"could not be downloaded: {type(error).__name__}: {error}"
    return CheckpointError(f"Hugging Face repository {name} {text}")


def known_sha256(path: Path) -> str:
    """The sha256 of a file in the hub's cache, which names large files by it; "" elsewhere."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    return ""


def copy_licences(source: Source, folder: Path) -> str:
    """Copies LICENSE and NOTICE files, warns if they forbid commercial use; a notice for people.

    A second file of the same name but another content, from the base of a single file, is kept
    beside the first as NAME.base.
    """
    copied: dict[str, bytes] = {}
    for place in source.licence_folders:
        for path in sorted(place.iterdir()):
            if path.is_file() and path.name.upper().startswith(_LICENCES):
                content = path.read_bytes()
                same = copied.setdefault(path.name, content) == content
                copied.setdefault(path.name if same else f"{path.name}.base", content)
    for name, content in copied.items():
        (folder / name).write_bytes(content)
    text = b"\n".join(copied.values()).decode("utf-8", "replace").lower()
    limited = "non-commercial" in text or "noncommercial" in text
    if limited or (not copied and _OFFICIAL_9B.match(source.name.lower())):
        _log.warning(
            "%s is licensed for non-commercial use: graphs, engines and weights made from it are "
            "under the same terms",
            source.name,
        )
    if not copied:
        return "No licence file came with the checkpoint; its own terms apply to these artifacts."
    names = ", ".join(copied)
    use = " It is for non-commercial use." if limited else ""
    return f"The checkpoint's licence applies to these artifacts: see {names}.{use}"
