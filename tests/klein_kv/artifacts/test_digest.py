"""File digests: whole for small files, sampled for large ones, and stable."""

import hashlib
from pathlib import Path

import pytest

from klein_kv.artifacts import digest
from klein_kv.artifacts.digest import combine_digests, file_digest

LIMIT, SIZE = 4 << 20, 6 << 20
EMPTY = "sampled-sha256:796c9e75061e5334b5b22cf554894bb296b9d70a35130b8aad5dad8bb3c515b0"
"""Of `SIZE` zeros: manifests of earlier releases hold such digests."""


@pytest.mark.parametrize("content", [b"", b"klein", bytes(LIMIT)], ids=["none", "few", "limit"])
def test_small_file_is_hashed_whole(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "WHOLE_FILE_LIMIT", LIMIT)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == "sha256:" + hashlib.sha256(content).hexdigest()


def test_samples_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They see both ends, the middle and the length."""
    monkeypatch.setattr(digest, "WHOLE_FILE_LIMIT", LIMIT)
    path = tmp_path / "large.safetensors"

    def of(content: bytes) -> str:
        path.write_bytes(content)
        return file_digest(path)

    assert of(bytes(SIZE)) == EMPTY
    assert of(bytes(LIMIT + 1)).startswith("sampled-sha256:")
    middle = (SIZE - (64 << 10)) * 31 // 63
    seen = {EMPTY, of(bytes(SIZE + 1))}
    for place in (0, (1 << 20) - 1, middle, SIZE - (1 << 20), SIZE - 1):
        content = bytearray(SIZE)
        content[place] = 1
        seen.add(of(content))
    assert len(seen) == 7


def test_combined_digest() -> None:
    base = combine_digests({"a": "1", "b": "2"})
    assert base == combine_digests({"b": "2", "a": "1"})
    assert len(base) == 64
    for other in ({"a": "2", "b": "1"}, {"a": "1"}, {"a": "1", "c": "2"}, {}):
        assert combine_digests(other) != base
