"""ComfyUI as a stand-in, its nodes over it, and the example workflows."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

STAND_INS = Path(__file__).parent / "stand_ins"
WORKFLOWS = Path(__file__).parents[3] / "runtime" / "comfyui" / "workflows"
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


def prompt_from_workflow(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """What the page makes of a workflow: inputs by name, from links and widgets."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        info = nodes[node["type"]]["input"]
        linked = {x["name"]: links[x["link"]] for x in node["inputs"] if x["link"]}
        sockets = {x["name"] for x in node["inputs"]}
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for name, (_kind, *more) in (info["required"] | info.get("optional", {})).items():
            if name in linked:
                inputs[name] = linked[name]
            elif name not in sockets:
                inputs[name] = next(values)
                options = more[0] if more else {}
                if options.get("control_after_generate") or options.get("image_upload"):
                    next(values)
        assert list(values) == [], f"{node['type']} has widgets that the node does not"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
