"""Files: whether one is what it was, whether it lies in its folder, written whole or not at all.

Files up to 256 MiB are hashed whole. A larger one (weights of tens of gigabytes) is hashed through
its length, its first and last mebibyte and 64 blocks of 64 KiB spread evenly over it: enough to
tell two fine-tunes, or a truncated copy, apart without reading the file at every start. The prefix
of the digest says which of the two it is.
"""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

from klein_kv.errors import ArtifactError
from klein_kv.unfinished import written_aside

__all__ = [
    "WHOLE_FILE_LIMIT",
    "combine_digests",
    "file_digest",
    "inside",
    "stand_in",
    "write_atomic",
]

WHOLE_FILE_LIMIT = 256 << 20
_EDGE = 1 << 20
_BLOCK = 64 << 10
_BLOCKS = 64


def file_digest(path: Path) -> str:
    """`sha256:HEX` of a whole file, or `sampled-sha256:HEX` of a file over 256 MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_LIMIT:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        state = hashlib.sha256(size.to_bytes(8, "little"))
        state.update(file.read(_EDGE))
        for i in range(_BLOCKS):
            file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            state.update(file.read(_BLOCK))
        file.seek(size - _EDGE)
        state.update(file.read(_EDGE))
    return "sampled-sha256:" + state.hexdigest()


def combine_digests(digests: dict[str, str]) -> str:
    """One hex digest over named digests; order does not matter."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def inside(folder: Path, name: str) -> Path:
    """`folder / name`; an `ArtifactError` where `name`, or a link there, leaves the folder.

    In the hub's cache files are links into the blobs beside the snapshots of their repository
    (huggingface_hub, "Understand caching"): those are fine.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise ArtifactError(
            f"{folder}: path {name!r} leaves the folder; expected a relative path inside it"
        )
    path = folder / pure
    real, root = path.resolve(), folder.resolve()
    blobs = [x.with_name("blobs") for x in root.parents if x.name == "snapshots"]
    if not real.is_relative_to(root) and real.parent not in blobs:
        raise ArtifactError(
            f"{path} is a link to {real}, outside the folder; copy the file itself there"
        )
    return path


def stand_in(path: Path) -> str:
    """What stands where another file was expected, and what to do; "" where nothing is known."""
    with path.open("rb") as file:
        head = file.read(400).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        sizes = [line.split()[-1].decode() for line in head.splitlines() if line[:5] == b"size "]
        return (
            f"is a Git LFS pointer, not the file of {sizes[0] if sizes else 'many'} bytes that it "
            f"stands for; fetch it: `git lfs pull` in {path.parent}, or `hf download`"
        )
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "is a web page, not the file: the address that it came from gave an error or asked "
            "for a login; download it with `hf download` after `hf auth login`"
        )
    return ""


def write_atomic(path: Path, data: Any) -> None:
    """Writes bytes, or anything with a buffer, aside and renames the file into place."""
    with written_aside(path) as file:
        file.write(data)
