"""How pocket is made: pictures with known answers, and the training code's own arithmetic."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from PIL import Image, ImageDraw

from benchmarks.pocket.denoiser import Positions, forward, make_transformer
from benchmarks.pocket.instructions import COLOURS, TASKS, Meaning, say
from benchmarks.pocket.muon import Muon
from benchmarks.pocket.scenes import Scene, answer, draw_edit, psnr, sample_subjects
from benchmarks.pocket.state import load_averaged, load_state, save_state
from klein_kv.artifacts.positions import grid_ids, reference_ids, text_ids

SIZE = (192, 128)


def disc(colour: tuple[int, int, int]) -> Image.Image:
    picture = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(picture).ellipse((0, 0, 63, 63), (*colour, 255))
    return picture


def scene(colour: tuple[int, int, int], centre: tuple[float, float] = (0.5, 0.5)) -> Scene:
    return Scene(disc(colour), centre, 0.5, lambda size: Image.new("RGB", size, (9, 99, 199)))


def at(picture: Image.Image, x: float, y: float) -> tuple[int, int, int]:
    width, height = picture.size
    return picture.getpixel((int(x * width), int(y * height)))


def test_single_reference_answers() -> None:
    own = scene((250, 0, 100), (0.25, 0.5))
    background = answer(Meaning("background", "green"), [own], SIZE)
    assert at(background, 0.25, 0.5) == (250, 0, 100)
    assert at(background, 0.9, 0.9) == COLOURS["green"]
    assert at(answer(Meaning("night"), [own], SIZE), 0.9, 0.9) == (2, 30, 109)
    assert at(answer(Meaning("gray"), [own], SIZE), 0.9, 0.9) == (83, 83, 83)
    assert at(answer(Meaning("negative"), [own], SIZE), 0.25, 0.5) == (5, 255, 155)
    mirrored = answer(Meaning("mirrored"), [own], SIZE)
    assert at(mirrored, 0.75, 0.5) == (250, 0, 100)
    assert at(mirrored, 0.25, 0.5) == (9, 99, 199)


@pytest.mark.parametrize(
    ("task", "centres"),
    [
        ("side", [(0.25, 0.5), (0.75, 0.5)]),
        ("row", [(1 / 6, 0.5), (0.5, 0.5), (5 / 6, 0.5)]),
        ("square", [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]),
    ],
)
def test_compositions_keep_the_order_of_images(
    task: str, centres: list[tuple[float, float]]
) -> None:
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10)][: len(centres)]
    picture = answer(Meaning(task, "black"), [scene(colour) for colour in colours], SIZE)
    assert [at(picture, *centre) for centre in centres] == colours
    assert at(picture, 0.5, 0.01) == COLOURS["black"]


def test_subject_on_the_background_of_another() -> None:
    other = Scene(disc((1, 2, 3)), (0.5, 0.5), 0.5, lambda size: Image.new("RGB", size, "white"))
    picture = answer(Meaning("swap"), [scene((7, 8, 9)), other], SIZE)
    assert at(picture, 0.5, 0.5) == (7, 8, 9)
    assert at(picture, 0.02, 0.02) == (255, 255, 255)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_shapes(shape: str) -> None:
    picture = answer(Meaning("shape", "blue", shape, "yellow"), (), SIZE)
    assert at(picture, 0.5, 0.5) == COLOURS["yellow"]
    assert at(picture, 0.05, 0.05) == COLOURS["blue"]
    corner = at(picture, 0.5 - 0.28 * 2 / 3, 0.5 - 0.28)  # inside the square alone
    assert (corner == COLOURS["yellow"]) == (shape == "square")


def test_the_same_seed_draws_the_same_edit() -> None:
    subjects = sample_subjects()
    assert len(subjects) == 40
    for task, count in TASKS.items():
        first, second = (
            draw_edit(task, subjects, np.random.default_rng(4), SIZE) for _ in range(2)
        )
        assert len(first.references) == count
        assert first.instruction == second.instruction
        assert psnr(first.answer, second.answer) > 90
        if count:
            assert psnr(first.answer, first.references[0]) < 40


def test_every_way_to_say_it_names_its_colours() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        sentence = say(Meaning("shape", "red", "circle", "blue"), random).lower()
        assert "red" in sentence
        assert "blue" in sentence
    assert Meaning("side", "gray").plain == "image 1 left of image 2 on a gray background"


def test_fast_forward_equals_diffusers() -> None:
    torch.manual_seed(0)
    model = make_transformer(24).eval()
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    for name, value in model.named_parameters():
        if value.ndim == 1 and "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    text, image = torch.randn(2, 7, 24), torch.randn(2, 12, 128)
    times, references = torch.tensor([0.9, 0.4]), torch.randn(2, 24, 128)
    places, own, lines = (
        torch.from_numpy(ids) for ids in (reference_ids([(3, 4)] * 2), grid_ids(3, 4), text_ids(7))
    )
    positions = Positions.of(lines[:, 3], torch.zeros(7), (3, 4), 2)
    with torch.no_grad():
        ours = forward(model, image, times, references, text, positions)
        theirs, _ = model(
            hidden_states=torch.cat([references, image], 1),
            encoder_hidden_states=text,
            timestep=times,
            img_ids=torch.cat([places, own]),
            txt_ids=lines,
            kv_cache_mode="extract",
            num_ref_tokens=24,
            return_dict=False,
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_token_stands_for_many() -> None:
    torch.manual_seed(0)
    model = make_transformer(24).eval()
    image = torch.randn(1, 4, 128)
    word = torch.randn(1, 1, 24)
    many = Positions.of(torch.zeros(5, dtype=torch.long), torch.zeros(5), (2, 2), 0)
    one = Positions.of(torch.zeros(1, dtype=torch.long), torch.tensor([5.0]).log(), (2, 2), 0)
    time, nothing = torch.tensor([0.7]), torch.zeros(1, 0, 128)
    with torch.no_grad():
        long = forward(model, image, time, nothing, word.expand(1, 5, 24), many)
        short = forward(model, image, time, nothing, word, one)
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)


@pytest.fixture
def alone(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_muon_takes_steps_of_one_size_in_every_direction() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 24))
    optimizer = Muon([weight], weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 1.0
    weight.grad = torch.randn(8, 24) * torch.logspace(-0.5, 0.5, 8)[:, None]
    optimizer.step()
    sizes = torch.linalg.svdvals(weight.detach()) / (0.2 * 24**0.5)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.4


def test_training_goes_on_from_its_file(tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        module = torch.nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    module, optimizer = made()
    averaged = {name: value * 2 for name, value in module.state_dict().items()}
    step(module, optimizer)
    path = tmp_path / "state.safetensors"
    save_state(path, module, averaged, [optimizer], 12.5, 1)
    step(module, optimizer)

    other, its = made()
    empty = {name: torch.zeros_like(value) for name, value in averaged.items()}
    assert load_state(tmp_path / "none", other, empty, [its]) == (0.0, 0)
    assert load_state(path, other, empty, [its]) == (12.5, 1)
    assert all(torch.equal(empty[name], averaged[name]) for name in averaged)
    assert all(torch.equal(load_averaged(path)[name], averaged[name]) for name in averaged)
    step(other, its)
    torch.testing.assert_close(other.weight, module.weight, rtol=0, atol=0)
