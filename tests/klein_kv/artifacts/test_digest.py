"""File digests: whole for small files, sampled for large ones, and stable."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from klein_kv.artifacts import digest
from klein_kv.artifacts.digest import combine_digests, file_digest

SIZE = 6 << 20


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "WHOLE_FILE_LIMIT", 4 << 20)


@pytest.fixture
def large(tmp_path: Path, small_limit: None) -> Callable[..., Path]:
    """A file over the limit with one byte changed: `large(position)`."""

    def make(position: int | None = None, size: int = SIZE) -> Path:
        content = bytearray(size)
        if position is not None:
            content[position] = 1
        path = tmp_path / "large.safetensors"
        path.write_bytes(content)
        return path

    return make


def test_small_file_is_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"klein"):
        path.write_bytes(content)
        assert file_digest(path) == "sha256:" + hashlib.sha256(content).hexdigest()


def test_the_limit_itself_is_whole(tmp_path: Path, small_limit: None) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    assert file_digest(path).startswith("sha256:")
    path.write_bytes(bytes((4 << 20) + 1))
    assert file_digest(path).startswith("sampled-sha256:")


@pytest.mark.parametrize(
    "position", [0, (1 << 20) - 1, (SIZE - (64 << 10)) * 31 // 63, SIZE - (1 << 20), SIZE - 1]
)
def test_samples_see_both_ends_and_the_middle(position: int, large: Callable[..., Path]) -> None:
    assert file_digest(large()) != file_digest(large(position))


def test_length_is_part_of_a_sampled_digest(large: Callable[..., Path]) -> None:
    assert file_digest(large()) != file_digest(large(size=SIZE + 1))


def test_samples_are_stable(large: Callable[..., Path]) -> None:
    """Manifests of earlier releases hold such digests."""
    assert file_digest(large(SIZE - 1)) == file_digest(large(SIZE - 1))
    assert file_digest(large()) == EMPTY


EMPTY = "sampled-sha256:796c9e75061e5334b5b22cf554894bb296b9d70a35130b8aad5dad8bb3c515b0"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "none")


def test_combined_digest() -> None:
    base = combine_digests({"a": "1", "b": "2"})
    assert base == combine_digests({"b": "2", "a": "1"})
    assert len(base) == 64
    for other in ({"a": "2", "b": "1"}, {"a": "1"}, {"a": "1", "c": "2"}, {}):
        assert combine_digests(other) != base
