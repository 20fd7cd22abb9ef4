"""The real ComfyUI, where COMFYUI_PATH names a checkout: stand-ins against it, workflows in it.

COMFYUI_PYTHON is a Python with ComfyUI's requirements and klein-kv; default the one that runs this.
"""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from benchmarks.pocket.instructions import Meaning
from benchmarks.pocket.scenes import answer, cyanotype, draw_scene, psnr, sample_subjects
from klein_kv.cli import main
from tests.runtime.comfyui.conftest import STAND_INS, WORKFLOWS, prompt_from_workflow

COMFYUI = Path(os.environ.get("COMFYUI_PATH", ""))  # noqa: TID251 - tests alone
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)  # noqa: TID251
pytestmark = pytest.mark.skipif(
    not (COMFYUI / "main.py").is_file(), reason="COMFYUI_PATH names no checkout of ComfyUI"
)
OF_THE_STAND_IN = {"start_in", "call", "_typed", "_Within", "refused"}
OF_THE_STAND_IN |= {"__init_subclass__", "__hash__"}


def signatures(tree: ast.Module) -> dict[str, list[str]]:
    """Arguments of every function, by its name with that of its classes."""
    found: dict[str, list[str]] = {}

    def walk(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                fields = [x.target.id for x in child.body if isinstance(x, ast.AnnAssign)]
                if child.decorator_list and fields:  # a dataclass
                    found[f"{child.name}.__init__"] = ["self", *fields]
                walk(child, (*names, child.name))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                names_of = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
                found[".".join((*names, child.name))] = [x.arg for x in names_of]

    walk(tree, ())
    return found


@pytest.mark.parametrize(
    "file",
    [x.relative_to(STAND_INS).as_posix() for x in STAND_INS.rglob("*.py") if x.stat().st_size],
)
def test_a_stand_in_takes_what_the_real_one_takes(file: str) -> None:
    ours, theirs = (
        signatures(ast.parse((root / file).read_text(encoding="utf-8")))
        for root in (STAND_INS, COMFYUI)
    )
    for name, arguments in ours.items():
        if OF_THE_STAND_IN.intersection(name.split(".")):
            continue
        assert name in theirs, f"{file}: ComfyUI has no {name}"
        assert arguments == [x for x in theirs[name] if x in arguments], name


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, pocket_checkpoint: Path, pocket_artifacts: Path
) -> Iterator[str]:
    """Address of a ComfyUI on a CPU with our pack, pocket and its adapter, and two pictures."""
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "input", "models/klein_kv", "comfy_api/latest"):
        (base / folder).mkdir(parents=True)
    (base / "main.py").touch()  # else it would be no ComfyUI
    assert main(["comfyui", "install", str(base)]) == 0
    (base / "models/klein_kv/pocket").symlink_to(pocket_artifacts)
    (base / "models/loras").symlink_to(pocket_checkpoint / "lora")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--cpu --disable-api-nodes --database-url sqlite:///:memory: --disable-metadata"
    command = [PYTHON, "main.py", *options.split(), "--base-directory", str(base)]
    log = base / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1", "--port", str(port)],
            cwd=COMFYUI,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                get(f"{address}/system_stats")
                break
            except urllib.error.URLError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)
    assert "Cannot import" not in log.read_text().split("Import times for custom nodes")[1]


def get(address: str, body: Any = None) -> Any:
    """Answer of the server: JSON, or None."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data)) as answer:
        content = answer.read()
    return json.loads(content) if content else None


Run = Callable[..., tuple[Image.Image, str]]


@pytest.fixture(scope="module")
def run(server: str) -> Run:
    """Runs a workflow by name with some inputs changed; gives the picture and the info."""
    nodes = get(f"{server}/object_info")

    def upload(name: str, picture: Image.Image) -> None:
        file = BytesIO()
        picture.save(file, "PNG")
        part = "--x\r\nContent-Disposition: form-data; name="
        head = f'{part}"overwrite"\r\n\r\ntrue\r\n{part}"image"; filename="{name}"\r\n\r\n'
        body = head.encode() + file.getvalue() + b"\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(f"{server}/upload/image", body, kind)
        urllib.request.urlopen(request).close()

    def once(name: str, pictures: dict[str, Image.Image], **changes: Any) -> Any:
        workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        for file, picture in pictures.items():
            upload(file, picture)
        prompt = prompt_from_workflow(workflow, nodes)
        for node in prompt.values():
            node["inputs"] |= {k: v for k, v in changes.items() if k in node["inputs"]}
        identity = get(f"{server}/prompt", {"prompt": prompt})["prompt_id"]
        while not (history := get(f"{server}/history/{identity}")):
            time.sleep(0.2)
        done = history[identity]
        assert done["status"]["status_str"] == "success", str(done["status"])
        outputs = {prompt[key]["class_type"]: x for key, x in done["outputs"].items()}
        place = urlencode(outputs["SaveImage"]["images"][0])
        with urllib.request.urlopen(f"{server}/view?{place}") as file:
            picture = Image.open(BytesIO(file.read())).convert("RGB")
        return picture, outputs["KleinKVInfo"]["text"][0]

    return once


def test_workflows(server: str, run: Run) -> None:
    size, random, subjects = (192, 192), np.random.default_rng(8), sample_subjects()
    scenes = [draw_scene([subjects[i]], random) for i in (7, 29)]
    photo, second = (scene.picture(size) for scene in scenes)
    night, swap = Meaning("night"), Meaning("swap")
    pictures = {"photo.png": photo, "second.png": second}

    made, text = run("klein_kv_edit", pictures, artifacts="pocket", prompt=swap.plain)
    assert psnr(made, answer(swap, scenes, size)) > 20
    assert "references: miss" in text
    made, text = run("klein_kv_edit", pictures, artifacts="pocket", prompt="other words")
    assert "references: hit" in text
    assert re.search(r"4 cached steps, each", text)

    get(f"{server}/free", {"unload_models": True})
    time.sleep(2)  # it is done by the queue's thread
    made, text = run("klein_kv_edit", pictures, artifacts="pocket", prompt="and others")
    assert "references: miss" in text

    masked = photo.copy()
    hole = Image.new("L", size, 255)
    hole.paste(0, (96, 0, 192, 192))  # where it is transparent, it changes
    masked.putalpha(hole)
    changes = {"artifacts": "pocket", "lora_name": "cyanotype.safetensors", "prompt": night.plain}
    made, _ = run("klein_kv_mask_and_lora", {"photo.png": masked}, **changes)
    left, right = (0, 0, 80, 192), (112, 0, 192, 192)
    assert psnr(made.crop(left), photo.crop(left)) > 25
    styled = cyanotype(answer(night, scenes[:1], size))
    assert psnr(made.crop(right), styled.crop(right)) > 15

    with pytest.raises(AssertionError, match="there is no artifact folder 'klein-9b-kv'"):
        run("klein_kv_edit", pictures)
