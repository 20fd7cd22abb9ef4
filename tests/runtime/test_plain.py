"""Plain klein weights through the same pipeline: diffusers' `Flux2KleinPipeline` is the judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.cli import main
from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.planning import memory
from tests.checkpoints import load_plain_diffusers
from tests.conftest import load_ours
from tests.tolerances import assert_close

Picture = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def ours(plain_artifacts: Path, backend: str) -> KleinKVPipeline:
    return load_ours(plain_artifacts, backend)


@pytest.fixture(scope="module")
def theirs(plain_checkpoint: Path) -> Flux2KleinPipeline:
    return load_plain_diffusers(plain_checkpoint)


def run(pipeline: Any, **request: Any) -> tuple[list[Any], Any]:
    latents: list[Any] = []

    def after_step(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(np.array(torch.as_tensor(tensors["latents"]).numpy()))
        return {}

    generator = torch.Generator().manual_seed(5)
    out = pipeline(generator=generator, callback_on_step_end=after_step, **request)
    return latents, out.images


@pytest.mark.parametrize("references", [0, 1, 2, 4])
@pytest.mark.parametrize(("steps", "batch"), [(1, 2), (4, 1)])
def test_equals_diffusers(
    references: int,
    steps: int,
    batch: int,
    ours: KleinKVPipeline,
    theirs: Flux2KleinPipeline,
    picture: Picture,
) -> None:
    request: dict[str, Any] = {
        "prompt": "a kite",
        "image": [picture(96 + 32 * i, 128, i) for i in range(references)] or None,
        "height": 128,
        "width": 144,
        "num_inference_steps": steps,
        "num_images_per_prompt": batch,
    }
    mine, my_images = run(ours, **request)
    other, their_images = run(theirs, **request, guidance_scale=1.0)
    assert len(mine) == len(other) == steps
    for a, b in zip(mine, other, strict=True):
        assert_close("latents", "float32", a, b)
    assert_close("pixels", "float32", my_images, their_images)
    assert len(my_images) == batch


def test_graphs(ours: KleinKVPipeline, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is the same graph, on the same tokens; nothing is kept."""
    calls: list[tuple[str, dict[str, Buffer]]] = []
    inner = ours.backend.run

    def spy(graph: str, inputs: dict[str, Buffer]) -> dict[str, Buffer]:
        calls.append((graph, dict(inputs)))
        return inner(graph, inputs)

    monkeypatch.setattr(ours.backend, "run", spy)
    ours("a kite", image=picture(128, 128), seed=0, num_inference_steps=3)
    steps = [inputs for graph, inputs in calls if graph == "plain_step"]
    assert [graph for graph, _ in calls] == [
        "text_encoder",
        "vae_encoder",
        *3 * ["plain_step"],
        "vae_decoder",
    ]
    assert len({inputs["ref_hidden_states"].data_ptr() for inputs in steps}) == 1
    assert ours.reference_store.stats.misses == 0


def test_no_references_to_keep(ours: KleinKVPipeline, picture: Picture) -> None:
    with pytest.raises(RequestError, match="plain weights, whose references take part in every"):
        ours.encode_references(picture(128, 128))


def test_sets_of_other_weights_are_refused(
    ours: KleinKVPipeline, tiny_ours: KleinKVPipeline, picture: Picture
) -> None:
    references = tiny_ours.encode_references(picture(128, 128))
    with pytest.raises(RequestError, match="belong to other weights"):
        ours("a kite", references=references)


def test_memory_has_no_keys_and_values(
    ours: KleinKVPipeline, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    images = 20 * [picture(256, 256)]
    with pytest.raises(CapacityError, match=r"in plain_step \(scratch"):
        ours("a kite", image=images, height=512, width=512, output_type="latent")


def test_commands(plain_artifacts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "kite.png"
    request = ["-p", "a kite", "--height", "128", "--width", "128", "--steps", "1", "-o", str(out)]
    assert main(["generate", str(plain_artifacts), *request, "-q"]) == 0
    with Image.open(out) as image:
        assert image.size == (128, 128)
    assert main(["inspect", str(plain_artifacts)]) == 0
    shown = capsys.readouterr().out
    assert "variant plain" in shown
    assert "plain_step: transformer/plain_step.onnx" in shown
    assert "cached_step" not in shown
