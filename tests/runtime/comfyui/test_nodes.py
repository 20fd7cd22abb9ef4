"""The nodes over a stand-in for ComfyUI, on pocket: what they make, show, keep and give up."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.pocket.instructions import Meaning
from benchmarks.pocket.scenes import answer, cyanotype, draw_scene, psnr, sample_subjects
from klein_kv import KleinKVPipeline
from klein_kv.errors import ArtifactError, BackendError, RequestError
from tests.runtime.comfyui.conftest import WORKFLOWS, ComfyUI, prompt_from_workflow

SIZE = (192, 192)
NIGHT, SWAP = Meaning("night"), Meaning("swap")
RANDOM = np.random.default_rng(8)
SCENES = [draw_scene([sample_subjects()[i]], RANDOM) for i in (7, 29)]
PICTURES = [scene.picture(SIZE) for scene in SCENES]

Edit = Callable[..., tuple[Image.Image, str]]


def tensor(*pictures: Image.Image) -> torch.Tensor:
    """An IMAGE, as LoadImage makes it."""
    return torch.from_numpy(np.stack([np.asarray(x).astype(np.float32) / 255 for x in pictures]))


@pytest.fixture(scope="module")
def node(comfyui: ComfyUI) -> Callable[..., Any]:
    """Runs a node by its id."""
    extension = asyncio.run(comfyui.nodes.comfy_entrypoint())
    nodes = {x.define_schema().node_id: x for x in asyncio.run(extension.get_node_list())}
    return lambda name, **inputs: comfyui.io.call(nodes[f"KleinKV{name}"], **inputs)


@pytest.fixture
def edit(comfyui: ComfyUI, node: Callable[..., Any]) -> Edit:
    """Runs a workflow; gives the picture and what the info node says."""
    comfyui.utils.shown.clear()

    def run(
        meaning: Meaning,
        *pictures: Image.Image,
        backend: str = "onnxruntime",
        lora: float = 0,
        **more: Any,
    ) -> Any:
        (model,) = node("Model", artifacts="pocket", backend=backend, precision="own")
        if lora:
            adapter = {"lora_name": "cyanotype.safetensors", "strength": float(lora)}
            (model,) = node("Lora", model=model, **adapter)
        if pictures:
            images = {f"image_{n}": tensor(x) for n, x in enumerate(pictures, 1)}
            (more["references"],) = node("References", **images)
        request = {"width": 0, "height": 0, "seed": 0, "steps": 4, **more}
        image, facts = node("Edit", model=model, prompt=meaning.plain, **request)
        (text,) = node("Info", run=facts)
        return Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)), text

    return run


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_edits_are_right_and_the_second_one_is_a_hit(comfyui: ComfyUI, edit: Edit) -> None:
    first, text = edit(SWAP, *PICTURES)
    assert psnr(first, answer(SWAP, SCENES, SIZE)) > 20
    assert "references: miss" in text
    assert "first step" in text
    second, text = edit(NIGHT, *PICTURES, seed=2**64 - 1, steps=2)
    assert "references: hit" in text
    assert "2 cached steps" in text
    assert "first step" not in text
    assert "reference sets kept: 1" in text
    assert not same(first, second)
    shown = [x[:2] for x in comfyui.utils.shown]
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2)]
    assert psnr(comfyui.utils.shown[3][2], first) > 20
    alone, text = edit(NIGHT, width=64, height=48, steps=1)
    assert alone.size == (64, 48)
    assert "references: none" in text


def test_the_picture_is_the_pipelines_own(backend: str, edit: Edit, pocket_artifacts: Path) -> None:
    ours, text = edit(NIGHT, PICTURES[0], backend=backend, seed=5, steps=2)
    assert f"pocket, {backend}" in text
    with KleinKVPipeline.from_pretrained(pocket_artifacts, backend=backend) as pipe:
        request = {"seed": 5, "num_inference_steps": 2}
        direct = pipe(NIGHT.plain, image=PICTURES[0], **request).images[0]
    assert psnr(ours, direct) > 50


def test_a_mask_keeps_what_is_black(edit: Edit) -> None:
    mask = torch.zeros(1, *SIZE)
    mask[:, :, 96:] = 1
    picture, _ = edit(NIGHT, PICTURES[0], mask=mask, steps=2)
    left, right = (0, 0, 96, 192), (112, 0, 192, 192)
    night = answer(NIGHT, SCENES[:1], SIZE)
    assert same(picture.crop(left), PICTURES[0].crop(left))
    assert psnr(picture.crop(right), night.crop(right)) > 18
    assert psnr(picture.crop(right), PICTURES[0].crop(right)) < 15
    # LoadImage's mask of an opaque picture.
    whole, _ = edit(NIGHT, PICTURES[0], steps=1)
    again, _ = edit(NIGHT, PICTURES[0], steps=1, mask=torch.zeros(1, 64, 64))
    assert same(whole, again)
    with pytest.raises(RequestError, match="no references, expected the image"):
        edit(NIGHT, mask=mask)


def test_a_strength_below_1_shortens_the_run(comfyui: ComfyUI, edit: Edit) -> None:
    edit(NIGHT, PICTURES[0], strength=0.5)
    assert [x[:2] for x in comfyui.utils.shown] == [(1, 2), (2, 2)]


def test_adapters_are_those_of_the_chain(edit: Edit) -> None:
    right = cyanotype(answer(NIGHT, SCENES[:1], SIZE))
    plain, _ = edit(NIGHT, PICTURES[0], steps=1)
    styled, text = edit(NIGHT, PICTURES[0], steps=1, lora=1)
    assert "references: miss" in text  # they belong to the adapters
    again, text = edit(NIGHT, PICTURES[0], steps=1)
    assert "references: hit" in text
    assert same(plain, again)
    assert psnr(styled, right) > psnr(plain, right) + 3


def test_interrupted_after_any_step(comfyui: ComfyUI, edit: Edit) -> None:
    class Stop(list[Any]):
        def append(self, item: Any) -> None:
            super().append(item)
            comfyui.management.interrupt_current_processing()

    whole, _ = edit(NIGHT, PICTURES[0], seed=1, steps=1)
    shown, comfyui.utils.shown = comfyui.utils.shown, Stop()
    with pytest.raises(comfyui.management.InterruptProcessingException):
        edit(NIGHT, PICTURES[0], seed=1, steps=1)
    stopped, comfyui.utils.shown = comfyui.utils.shown, shown
    assert len(stopped) == 1
    again, _ = edit(NIGHT, PICTURES[0], seed=1, steps=1)
    assert same(again, whole)


def test_models_leave_for_each_other(comfyui: ComfyUI, edit: Edit) -> None:
    management, device = comfyui.management, torch.device("cpu")
    management.unload_all_models()
    other = comfyui.patcher.ModelPatcher(torch.nn.Linear(1, 1), device, device, size=10**9)
    management.load_models_gpu([other])
    edit(NIGHT, PICTURES[0], steps=1)
    assert other.loaded == 0
    (held,) = [x.model for x in management.current_loaded_models]
    stored = held.pipe.reference_store.nbytes
    assert held.loaded_size() >= stored > 0

    # What an edit lacks, ComfyUI's models give, and ours stays.
    management.load_models_gpu([other])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(held.pipe.backend), "available_memory", lambda _: 1 + 10**9 - other.loaded
        )
        edit(NIGHT, PICTURES[0], width=256, height=256, steps=1)
    assert other.loaded == 0
    assert held.pipe is not None

    # Another model needs a little: reference sets go. It needs all: the pipeline closes.
    management.free_memory(management.get_free_memory(device) + stored // 2, device)
    assert held.pipe is not None
    assert len(held.pipe.reference_store) == 0
    pipe = held.pipe
    management.unload_all_models()
    assert management.current_loaded_models == []
    assert held.pipe is None
    assert held.loaded_size() == 0
    with pytest.raises(RequestError, match="closed"):
        pipe.encode_prompt("")
    _, text = edit(NIGHT, PICTURES[0], steps=1)
    assert "references: miss" in text


@pytest.mark.parametrize(
    ("name", "inputs", "error", "words"),
    [
        ("Model", {"artifacts": "gone"}, RequestError, "no artifact folder 'gone'"),
        ("Lora", {"lora_name": "gone.safetensors"}, FileNotFoundError, "gone.safetensors"),
        ("Edit", {"width": 100}, RequestError, "width is 100, expected a multiple of 16"),
        ("Edit", {"steps": 0}, ValueError, "wrong"),
        ("Edit", {"model": {"precision": "fp8"}}, ArtifactError, "quantize ARTIFACTS --recipe fp8"),
        ("Edit", {"model": {"backend": "x"}}, BackendError, "backend is 'x', expected one of auto"),
        ("References", {"image_1": torch.zeros(5, 8, 8, 3)}, RequestError, "5 reference images"),
        ("References", {"image_1": torch.zeros(8, 8, 3)}, RequestError, r"shape \(8, 8, 3\)"),
        ("References", {}, ValueError, "missing"),
    ],
)
def test_bad_inputs_are_told(
    node: Callable[..., Any], name: str, inputs: dict[str, Any], error: type, words: str
) -> None:
    choice = {"artifacts": "pocket", "backend": "auto", "precision": "own"}
    usual: dict[str, dict[str, Any]] = {
        "Model": choice,
        "Lora": {"model": {}, "lora_name": "cyanotype.safetensors", "strength": 1.0},
        "Edit": {"model": {}, "prompt": "", "width": 0, "height": 0, "seed": 0, "steps": 4},
        "References": {},
    }
    request = usual[name] | inputs
    if "model" in request:
        (request["model"],) = node("Model", **choice | request["model"])
    with pytest.raises(error, match=words):
        node(name, **request)


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.json")), ids=lambda x: x.stem)
def test_workflows_fit_the_nodes(comfyui: ComfyUI, file: Path) -> None:
    workflow = json.loads(file.read_text(encoding="utf-8"))
    ours = [x for x in workflow["nodes"] if x["type"].startswith("KleinKV")]
    nodes = {x["type"]: getattr(comfyui.nodes, x["type"]).define_schema() for x in ours}
    info = {name: {"input": {"required": widgets_of(x)}} for name, x in nodes.items()}
    for node in prompt_from_workflow({**workflow, "nodes": ours}, info).values():
        inputs = {x.id: x for x in nodes[node["class_type"]].inputs}
        assert node["inputs"].keys() <= inputs.keys()
        assert {x.id for x in inputs.values() if not x.optional} <= node["inputs"].keys()
        for name, value in node["inputs"].items():  # a list is a link
            assert isinstance(value, list) or not inputs[name].refused(value)


def widgets_of(schema: Any) -> dict[str, Any]:
    """Inputs as `/object_info` has them."""
    return {
        x.id: (x.Parent.io_type, {"control_after_generate": x.id == "seed"}) for x in schema.inputs
    }
