"""Plain klein weights through the same pipeline: diffusers' `Flux2KleinPipeline` is the judge."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import Flux2KleinPipeline
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.cli import main
from klein_kv.errors import CapacityError, RequestError
from tests.checkpoints import load_plain_diffusers
from tests.conftest import load_ours
from tests.runtime.conftest import Picture, SetFree, Watch
from tests.runtime.test_parity import run
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def ours(plain_artifacts: Path, backend: str) -> KleinKVPipeline:
    return load_ours(plain_artifacts, backend)


@pytest.fixture(scope="module")
def theirs(plain_checkpoint: Path) -> Flux2KleinPipeline:
    return load_plain_diffusers(plain_checkpoint)


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
        "max_sequence_length": 512 if steps == 1 else 64,
    }
    mine, my_images = run(ours, **request)
    other, their_images = run(theirs, **request, guidance_scale=1.0)
    np.testing.assert_array_equal(mine.pop(), other.pop(), "generators stand elsewhere")
    assert len(mine) == len(other) == steps
    for a, b in zip(mine, other, strict=True):
        assert_close("latents", "float32", a, b)
    assert_close("pixels", "float32", my_images, their_images)
    assert len(my_images) == batch


def test_graphs(ours: KleinKVPipeline, picture: Picture, watch: Watch) -> None:
    """Every step is the same graph, on the same tokens; nothing is kept."""
    runs = watch(ours)
    request = {"seed": 0, "num_inference_steps": 3, "max_sequence_length": 64}
    ours("a kite", image=picture(128, 128), **request)
    steps = 3 * ["plain_step"]
    assert [run.graph for run in runs] == ["text_encoder", "vae_encoder", *steps, "vae_decoder"]
    tokens = [run.inputs["ref_hidden_states"] for run in runs if run.graph == "plain_step"]
    assert len({buffer.data_ptr() for buffer in tokens}) == 1
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
    ours: KleinKVPipeline, picture: Picture, set_free: SetFree
) -> None:
    set_free(1000)
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
