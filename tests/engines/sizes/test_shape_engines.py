"""Engines of single shapes: their recipe, and which of them stay."""

import os
from pathlib import Path
from typing import Any

import pytest

from klein_kv.artifacts.engines.engine_manifest import ENGINE_MANIFEST, find_engines
from klein_kv.engines.sizes import shape_engines
from klein_kv.engines.sizes.recipe import Size
from klein_kv.engines.sizes.shape_engines import build_shape, prune_shapes, shape_recipe
from klein_kv.errors import BuildError, RequestError
from tests.runtime.backends.fake_engines import save_no_engines


def save_folder(artifacts: Path, recipe: str, used: int, size: int = 1000) -> Path:
    folder = artifacts / "engines" / f"rtx5090-fp8-{recipe}"
    save_no_engines(folder, precision="fp8", recipe=recipe)
    (folder / "x.engine").write_bytes(b"-" * size)
    os.utime(folder / ENGINE_MANIFEST, (used, used))
    return folder


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    names = [
        "1024x1024-4ref",
        "512x512-0ref",
        "768x768-1ref-512x512",
        "default",
        "static-1024-4ref",
    ]
    return {name: save_folder(tmp_path, name, used) for used, name in enumerate(names, 1000)}


def test_recipe_of_a_shape() -> None:
    recipe = shape_recipe(Size(1024, 768), 4)
    assert (recipe.name, recipe.fixed) == ("1024x768-4ref", True)
    assert shape_recipe(Size(512, 512), 1, Size(512, 768)).name == "512x512-1ref-512x768"
    assert shape_recipe(Size(512, 512), 0, Size(512, 768)).name == "512x512-0ref"
    with pytest.raises(BuildError, match="expected at most the area of 2048x2048"):
        shape_recipe(Size(4096, 1040), 0)


def test_those_used_least_recently_go_first(folders: dict[str, Path], tmp_path: Path) -> None:
    one = folder_bytes(folders["1024x1024-4ref"])
    assert prune_shapes(tmp_path, 4 * one) == []
    os.utime(folders["1024x1024-4ref"] / ENGINE_MANIFEST)  # as the runtime does
    assert prune_shapes(tmp_path, 2 * one + 20) == [folders["512x512-0ref"]]
    assert prune_shapes(tmp_path, 0, [folders["768x768-1ref-512x512"]]) == [
        folders["1024x1024-4ref"]
    ]
    # Engines for ranges of sizes, and recipes with a name of their own, are not ours to remove.
    left = {folders[name] for name in ("768x768-1ref-512x512", "default", "static-1024-4ref")}
    assert set(find_engines(tmp_path)) == left


def test_what_is_built_stays(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def build_artifacts(artifacts: Path, **options: Any) -> list[Any]:
        calls.append(options)
        save_folder(artifacts, options["recipe"].name, 1)  # long ago
        return []

    monkeypatch.setattr(shape_engines, "build_artifacts", build_artifacts)
    recipe = shape_recipe(Size(256, 256), 2)
    assert build_shape(tmp_path, recipe, limit=0, precision="fp8", attention="fp8") == []
    assert (calls[0]["recipe"], calls[0]["precision"]) == (recipe, "fp8")
    assert {path.name for path in find_engines(tmp_path)} == {
        "rtx5090-fp8-256x256-2ref",
        "rtx5090-fp8-default",
        "rtx5090-fp8-static-1024-4ref",
    }
    assert (folders["default"] / "x.engine").exists()
    with pytest.raises(RequestError, match="expected 0 or more"):
        build_shape(tmp_path, recipe, limit=-1)
