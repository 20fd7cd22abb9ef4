"""ComfyUI as a stand-in, and its nodes over it."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

STAND_INS = Path(__file__).parent / "stand_ins"
_OURS = "klein_kv.runtime.comfyui."
_THEIRS = ("comfy", "comfy_api", "folder_paths")


class ComfyUI(NamedTuple):
    """The stand-in's modules, and ours over them."""

    io: Any
    management: Any
    patcher: Any
    utils: Any
    nodes: ModuleType


@pytest.fixture(scope="module")
def comfyui(
    tmp_path_factory: pytest.TempPathFactory, pocket_checkpoint: Path, pocket_artifacts: Path
) -> Iterator[ComfyUI]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "klein_kv").mkdir()
    (folder / "klein_kv" / "pocket").symlink_to(pocket_artifacts)
    (folder / "loras").symlink_to(pocket_checkpoint / "lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STAND_INS)
        import_module("folder_paths").start_in(folder)
        management = import_module("comfy.model_management")
        yield ComfyUI(
            import_module("comfy_api.latest").io,
            management,
            import_module("comfy.model_patcher"),
            import_module("comfy.utils"),
            import_module(f"{_OURS}nodes"),
        )
        management.unload_all_models()
    for name in list(sys.modules):
        if name.startswith(_OURS) or name.split(".")[0] in _THEIRS:
            del sys.modules[name]
