"""Whether a file is the one it was, and whether it lies in its folder.

Files up to 256 MiB are hashed whole. A larger one (weights of tens of gigabytes) is hashed through
its length, its first and last mebibyte and 64 blocks of 64 KiB spread evenly over it: enough to
tell two fine-tunes, or a truncated copy, apart without reading the file at every start. The prefix
of the digest says which of the two it is.
"""

import hashlib
from pathlib import Path, PurePosixPath

from klein_kv.errors import ArtifactError

__all__ = ["WHOLE_FILE_LIMIT", "combine_digests", "file_digest", "inside"]

WHOLE_FILE_LIMIT = 256 << 20
_EDGE = 1 << 20
_BLOCK = 64 << 10
_BLOCKS = 64


def file_digest(path: Path) -> str:
    """`sha256:HEX` of a whole file, or `sampled-sha256:HEX` of a file over 256 MiB.

    Raises:
        OSError: the file cannot be read.
    """
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
    """`folder / name`, refused where `name` would leave the folder.

    Raises:
        ArtifactError: an absolute path, one with `..`, or a link to a file elsewhere.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise ArtifactError(
            f"{folder}: path {name!r} leaves the folder; expected a relative path inside it"
        )
    path = folder / pure
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{path} is a link to {path.resolve()}, outside the folder; copy the file itself there "
            "(downloads from a hub: with a local folder, not through its cache)"
        )
    return path
