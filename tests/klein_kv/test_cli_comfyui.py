"""`klein-kv comfyui install`: the pack that it writes, and where it writes none."""

import ast
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klein_kv import __version__
from klein_kv.cli import main

Install = Callable[[], tuple[int, str, str]]


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """What tells a ComfyUI from another folder."""
    for folder in ("custom_nodes", "comfy_api/latest"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "main.py").touch()
    return tmp_path


@pytest.fixture
def install(comfyui: Path, capsys: Any) -> Install:
    def run() -> tuple[int, str, str]:
        code = main(["comfyui", "install", str(comfyui)])
        return code, *capsys.readouterr()

    return run


def test_a_pack_is_written(comfyui: Path, install: Install) -> None:
    code, out, _ = install()
    assert code == 0
    pack = comfyui / "custom_nodes" / "klein-kv"
    assert str(pack) in out
    assert list(pack.parent.iterdir()) == [pack]
    names = {
        x.name
        for x in ast.walk(ast.parse((pack / "__init__.py").read_text()))
        if isinstance(x, ast.alias)
    }
    assert names == {"comfy_entrypoint"}
    project = tomllib.loads((pack / "pyproject.toml").read_text())
    assert project["project"]["version"] == __version__
    assert project["project"]["name"] == "klein-kv"  # without "ComfyUI", says the registry
    assert project["tool"]["comfy"].keys() == {
        "PublisherId",
        "DisplayName",
        "Icon",
        "requires-comfyui",
    }
    workflows = sorted((pack / "example_workflows").iterdir())
    assert len(workflows) == 2
    assert all(json.loads(x.read_text())["nodes"] for x in workflows)


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("obstacle", "words"),
    [
        ("main.py", "is no ComfyUI of 0.3.64 or newer: it has no main.py"),
        ("comfy_api/latest", "it has no comfy_api/latest"),
        ("there already", "klein-kv already exists and is not an empty folder; remove it"),
        ("read only", "cannot write"),
    ],
)
def test_what_stands_in_the_way_is_told(
    obstacle: str, words: str, comfyui: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = comfyui / "custom_nodes" / "klein-kv"
    if obstacle == "there already":
        pack.mkdir()
        (pack / "mine.py").touch()
    elif obstacle == "read only":
        monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    else:
        (comfyui / obstacle).rename(comfyui / "elsewhere")
    before = sorted(comfyui.rglob("*"))
    code, out, err = install()
    assert (code, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(comfyui.rglob("*")) == before
