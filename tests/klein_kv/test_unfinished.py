"""What a killed process leaves: recognised as nobody's, and nothing else is."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from klein_kv.artifacts.digest import write_atomic
from klein_kv.unfinished import held, partial_path, remove_leftovers

GONE = 999_999_999  # no process has such a number


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_nobody_writes_is_removed_with_a_line(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / f".model.partial-{GONE}-0123abcd"
    if kind == "folder":
        (left / "deep").mkdir(parents=True)
        left = left / "deep"
    (left / "weights" if kind == "folder" else left).write_bytes(b"x")
    with caplog.at_level(logging.INFO, "klein_kv"):
        write_atomic(tmp_path / "other.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
    assert "which a process that is gone left there" in caplog.text


def test_a_process_of_the_same_number_is_not_the_same(tmp_path: Path) -> None:
    """Numbers come again soon, and in a container at once."""
    left = partial_path(tmp_path, "model")
    left.write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert left.exists()  # this process might be at it
    os.utime(left, (1e9, 1e9))  # long before this process
    remove_leftovers(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize(
    "name", ["model.partial-1-0123abcd", ".partial-1", ".model.partial-x", ".model.part", ".a"]
)
def test_files_of_others_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name.replace("-1", f"-{GONE}")).write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_what_another_container_writes_stays(tmp_path: Path) -> None:
    """Its processes are not seen from here, its locks are."""
    path = tmp_path / f".model.partial-{GONE}-0123abcd"
    path.mkdir()
    code = "import sys; from klein_kv.unfinished import *; from pathlib import Path\n"
    code += "with held(Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        remove_leftovers(tmp_path)
        assert path.exists()
        other.communicate()
    remove_leftovers(tmp_path)
    assert not path.exists()


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / f".model.partial-{GONE}"
    path.write_bytes(b"x")
    with held(path):
        remove_leftovers(tmp_path)
        assert path.exists()
    remove_leftovers(tmp_path)
    assert not path.exists()
