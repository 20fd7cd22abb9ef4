"""`klein-kv comfyui install`: the nodes' pack in a ComfyUI."""

import argparse
import sys
from importlib.resources import files
from pathlib import Path

from klein_kv import __version__
from klein_kv.cli.arguments import AddVerb, Result
from klein_kv.errors import RequestError

__all__ = ["add_comfyui"]

_NAME = "klein-kv"
_PARTS = ("main.py", "custom_nodes", "comfy_api/latest")  # the last since V3 nodes, ComfyUI 0.3.48
_MODULE = '''\
"""Nodes of klein-kv: all of them are in the package klein_kv, of this Python's site-packages."""

from klein_kv.runtime.comfyui.nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
'''
# The registry's metadata: docs.comfy.org, "pyproject.toml". ComfyUI reads it too.
_PROJECT = f"""\
[project]
name = "{_NAME}"
version = "{__version__}"
description = "FLUX.2 [klein] 9B-KV with reference keys and values that are made once and kept"
license = {{ text = "Apache-2.0" }}
classifiers = ["Environment :: GPU :: NVIDIA CUDA"]
dependencies = ["klein-kv>={__version__}"]

[tool.comfy]
PublisherId = "klein-kv"
DisplayName = "klein-kv"
Icon = ""
requires-comfyui = ">=0.3.64"
"""


def add_comfyui(add: AddVerb) -> None:
    """Adds `klein-kv comfyui`."""
    sub = add("comfyui", _install, "Put the nodes for ComfyUI into it.")
    sub.add_argument("action", choices=("install",))
    sub.add_argument("comfyui", type=Path, metavar="PATH_TO_COMFYUI")


def _install(args: argparse.Namespace) -> Result:
    from klein_kv.export.staging import new_folder

    folder: Path = args.comfyui
    missing = [name for name in _PARTS if not (folder / name).exists()]
    if missing:
        raise RequestError(
            f"{folder} is no ComfyUI of 0.3.64 or newer: it has no {missing[0]}; name the folder "
            "with ComfyUI's main.py"
        )
    target = folder / "custom_nodes" / _NAME
    with new_folder(target) as pack:
        (pack / "__init__.py").write_text(_MODULE, encoding="utf-8")
        (pack / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
        (pack / "example_workflows").mkdir()
        for workflow in files("klein_kv.runtime.comfyui").joinpath("workflows").iterdir():
            content = workflow.read_text(encoding="utf-8")
            (pack / "example_workflows" / workflow.name).write_text(content, encoding="utf-8")
    text = (
        f"nodes: {target}; artifact folders belong into {folder / 'models/klein_kv'}\n"
        f"start ComfyUI with a Python that has klein-kv, such as {sys.executable}"
    )
    return {"pack": str(target)}, text, 0
