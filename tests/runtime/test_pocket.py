"""Pictures that mean something: edits of the trained checkpoint against their right answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from numpy.typing import NDArray
from PIL import Image

from benchmarks.pocket.instructions import Meaning
from benchmarks.pocket.scenes import (
    Edit,
    Scene,
    answer,
    cyanotype,
    draw_scene,
    psnr,
    sample_subjects,
)
from benchmarks.quality import VARIANTS, Editor
from klein_kv import KleinKVInpaintPipeline, KleinKVPipeline
from klein_kv.export.checks.torch_loop import LoopRequest, reference_kv
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.schedule import Schedule

SIZE = (192, 192)
HALVES = (0, 0, 96, 192), (96, 0, 192, 192)
HALF = Image.new("L", SIZE)
HALF.paste(255, HALVES[1])


@pytest.fixture(scope="module")
def pipe(pocket_artifacts: Path) -> KleinKVPipeline:
    with KleinKVPipeline.from_pretrained(pocket_artifacts, backend="onnxruntime") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    random, subjects = np.random.default_rng(8), sample_subjects()
    return [draw_scene([subjects[index]], random) for index in (7, 29, 16, 23)]


def edit_of(meaning: Meaning, scenes: list[Scene]) -> Edit:
    references = tuple(scene.picture(SIZE) for scene in scenes)
    return Edit(meaning, meaning.plain, references, answer(meaning, scenes, SIZE))


def test_edits_follow_their_instructions(pipe: KleinKVPipeline, scenes: list[Scene]) -> None:
    night, green = Meaning("night"), Meaning("background", "green")
    picture = scenes[0].picture(SIZE)
    known = pipe.encode_references([picture])
    answers = {meaning: answer(meaning, scenes[:1], SIZE) for meaning in (night, green)}
    given: list[dict[str, Any]] = [{"image": [picture]}, {"references": known}]
    for (meaning, right), references in zip(answers.items(), given, strict=True):
        made = pipe(meaning.plain, height=192, width=192, seed=0, **references).images[0]
        assert psnr(made, right) > 20
        others = [other for other in answers.values() if other is not right]
        assert psnr(made, right) > max(psnr(made, other) for other in (*others, picture)) + 5


def test_references_and_their_order_are_seen(pipe: KleinKVPipeline, scenes: list[Scene]) -> None:
    swap, pair = Meaning("swap"), scenes[:2]
    a, b, c, d = (scene.picture(SIZE) for scene in scenes)
    right, swapped = answer(swap, pair, SIZE), answer(swap, pair[::-1], SIZE)
    result = pipe(swap.plain, image=[a, b], seed=0).images[0]
    other = pipe(swap.plain, image=[b, a], seed=0).images[0]
    assert psnr(result, right) > psnr(result, swapped) + 5
    assert psnr(other, swapped) > psnr(other, right) + 5
    for changed in ([c, b], [a, d]):
        stale = pipe.encode_references(changed)
        wrong = pipe(swap.plain, references=stale, height=192, width=192, seed=0).images[0]
        assert psnr(result, right) > psnr(wrong, right) + 3


def test_an_edit_inside_a_mask_changes_the_inside(
    pipe: KleinKVPipeline, scenes: list[Scene]
) -> None:
    """A red background for the right half. Figures: docs/inpainting.md."""
    red, picture = Meaning("background", "red"), scenes[1].picture(SIZE)
    right, (left_half, right_half) = answer(red, scenes[1:2], SIZE), HALVES
    masked = KleinKVInpaintPipeline.from_pipe(pipe)
    request = {"image": picture, "mask_image": HALF, "seed": 0}
    result = masked(red.plain, **request).images[0]
    laid_back = [
        masked(red.plain, **request, **how).images[0]
        for how in ({"padding_mask_crop": 192}, {"overlay": True})
    ]
    request["mask_image"] = Image.new("L", SIZE)
    round_trip = masked(red.plain, **request).images[0]
    whole = pipe(red.plain, image=[picture], seed=0).images[0]

    def score(one: Image.Image, other: Image.Image, box: tuple[int, ...]) -> float:
        return psnr(one.crop(box), other.crop(box))

    assert score(result, right, right_half) > score(picture, right, right_half) + 9  # 25.0, 13.5
    assert (
        score(result, picture, left_half) > score(round_trip, picture, left_half) - 3
    )  # 29.6, 31.7
    assert score(result, picture, left_half) > score(whole, picture, left_half) + 15  # 29.6, 10.2
    for box, same in ((left_half, picture), (right_half, result)):
        for image in laid_back:
            assert image.crop(box).tobytes() == same.crop(box).tobytes()


def test_diffusers_makes_the_same_picture(
    pipe: KleinKVPipeline, pocket_checkpoint: Path, scenes: list[Scene]
) -> None:
    judge = Flux2KleinKVPipeline.from_pretrained(pocket_checkpoint)
    judge.set_progress_bar_config(disable=True)
    edit = edit_of(Meaning("swap"), scenes[:2])
    noise = np.random.default_rng(1).standard_normal((1, 128, 12, 12)).astype(np.float32)
    images = list(edit.references)
    theirs = judge(images, edit.instruction, latents=torch.from_numpy(noise)).images[0]
    ours = pipe(edit.instruction, image=images, latents=noise).images[0]
    assert psnr(ours, theirs) > 60


class Swap(NamedTuple):
    """Two objects that change places, and what a faultless run makes of that."""

    edit: Edit
    request: LoopRequest
    right: Image.Image


@pytest.fixture(scope="module")
def editor(pocket_artifacts: Path) -> Editor:
    return Editor(pocket_artifacts, VARIANTS["fp32"])


@pytest.fixture(scope="module")
def swap(editor: Editor, scenes: list[Scene]) -> Swap:
    edit = edit_of(Meaning("swap"), scenes[2:])
    request = editor.request(edit, seed=0)
    return Swap(edit, request, editor.picture(edit.instruction, request, editor.keys(request)))


# Faults that random weights could not show: each makes request and keys, wrongly.
Faulty = tuple[LoopRequest, list[torch.Tensor]]


def references_at_another_time(editor: Editor, request: LoopRequest) -> Faulty:
    class Late(TorchOps):
        def constant(self, value: NDArray[Any]) -> torch.Tensor:
            return super().constant(value + 0.8 if value.shape == (1,) else value)

    ops = editor.transformer
    with torch.inference_mode():
        return request, reference_kv(Late(ops.weights, ops.dtype), editor.manifest, request)


def keys_of_another_block(editor: Editor, request: LoopRequest) -> Faulty:
    keys = editor.keys(request)
    return request, [*keys[2:], *keys[:2]]


def references_in_another_order(editor: Editor, request: LoopRequest) -> Faulty:
    tokens = torch.cat(request.references.chunk(2, dim=1)[::-1], dim=1)
    return request, editor.keys(replace(request, references=tokens))


def one_t_for_all_references(editor: Editor, request: LoopRequest) -> Faulty:
    ids = request.reference_ids.clone()
    ids[:, 0] = ids[0, 0]
    return request, editor.keys(replace(request, reference_ids=ids))


def other_batch_norm_statistics(editor: Editor, request: LoopRequest) -> Faulty:
    return request, editor.keys(replace(request, references=request.references * 0.6 + 0.3))


def schedule_without_its_end(editor: Editor, request: LoopRequest) -> Faulty:
    sigmas = request.schedule.sigmas.copy()
    sigmas[-1] = sigmas[-2]  # where 0 should be
    return replace(request, schedule=Schedule(sigmas)), editor.keys(request)


@pytest.mark.parametrize(
    "fault",
    [
        schedule_without_its_end,
        references_at_another_time,
        keys_of_another_block,
        references_in_another_order,
        one_t_for_all_references,
        other_batch_norm_statistics,
    ],
)
def test_a_planted_fault_drops_the_score(
    fault: Callable[[Editor, LoopRequest], Faulty], editor: Editor, swap: Swap
) -> None:
    edit, request, right = swap
    wrong = editor.picture(edit.instruction, *fault(editor, request))
    assert psnr(right, edit.answer) - psnr(wrong, edit.answer) > 1


def test_the_adapter_gives_its_style(
    pipe: KleinKVPipeline, pocket_checkpoint: Path, scenes: list[Scene]
) -> None:
    meaning = Meaning("background", "white")
    picture, right = scenes[0].picture(SIZE), answer(meaning, scenes[:1], SIZE)
    plain = pipe(meaning.plain, image=[picture], seed=0).images[0]
    pipe.load_lora_weights(pocket_checkpoint / "lora" / "cyanotype.safetensors")
    styled = pipe(meaning.plain, image=[picture], seed=0).images[0]
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    half = pipe(meaning.plain, image=[picture], seed=0).images[0]
    pipe.unload_lora_weights()
    assert psnr(styled, cyanotype(right)) > 18
    assert psnr(styled, cyanotype(right)) > psnr(half, cyanotype(right)) + 1
    assert psnr(half, cyanotype(right)) > psnr(plain, cyanotype(right)) + 1


def test_previews_come_to_resemble_the_image(pipe: KleinKVPipeline, scenes: list[Scene]) -> None:
    previews: list[Image.Image] = []
    noisy: list[Image.Image] = []

    def look(_pipe: Any, _i: int, _t: float, tensors: dict[str, Any]) -> None:
        previews.extend(pipe.preview(tensors["denoised"]))
        grid = tensors["latents"].transpose(0, 2, 1).reshape(tensors["denoised"].shape)
        noisy.extend(pipe.preview(grid))

    image = pipe(
        Meaning("night").plain,
        image=[scenes[0].picture(SIZE)],
        seed=0,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["denoised", "latents"],
    ).images[0]
    assert [preview.size for preview in previews] == 4 * [SIZE]
    assert all(psnr(preview, image) > 25 for preview in previews)
    assert all(psnr(preview, image) < 15 for preview in noisy[:-1])
    to_the_last = [psnr(preview, previews[-1]) for preview in previews[:-1]]
    assert to_the_last == sorted(to_the_last)
    assert to_the_last[0] > 35
    assert np.array_equal(np.asarray(noisy[-1]), np.asarray(previews[-1]))
