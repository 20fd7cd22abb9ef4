"""The page in a real browser, on a server that really edits: pocket, on a CPU."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.pocket.instructions import Meaning
from benchmarks.pocket.scenes import Scene, answer, draw_scene, psnr, sample_subjects
from klein_kv.runtime.serving.settings import ServeSettings
from tests.runtime.serving.conftest import Served, serve_in_thread

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome")

SIZE = (128, 128)
REFUSED = "Failed to load resource"


@pytest.fixture(scope="module")
def service(pocket_service: Served) -> Iterator[Served]:
    """The same engine, for everybody."""
    yield from serve_in_thread(pocket_service.engine, ServeSettings())


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    random, subjects = np.random.default_rng(8), sample_subjects()
    return [draw_scene([subjects[index]], random) for index in (7, 29, 16)]


@pytest.fixture(scope="module")
def files(scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("references")
    paths = [folder / f"{index}.png" for index in range(len(scenes))]
    for scene, path in zip(scenes, paths, strict=True):
        scene.picture(SIZE).save(path)
    return paths


@dataclass
class Visit:
    """A page, and what it asked for and complained of."""

    page: "Page"
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, address: str) -> None:
        page = self.page
        page.set_default_timeout(15_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(address)

    def at(self, identifier: str) -> "Locator":
        return self.page.locator(f"#{identifier}")

    def add(self, *files: Path) -> None:
        self.at("files").set_input_files(files)
        self.at("tray-status").filter(has_text="Known").wait_for()

    def make(self, prompt: str, seed: str = "0") -> None:
        """Makes an image, and waits for it; the seed "" takes a new one."""
        self.at("seed").fill(seed)
        entries = self.page.locator("#strip li").count()
        self.at("prompt").fill(prompt)
        self.page.keyboard.press("Control+Enter")
        self.page.locator("#strip li").nth(entries).wait_for()

    def result(self) -> Image.Image:
        with self.page.expect_download() as download:
            self.at("save").click()
        with Image.open(download.value.path()) as image:
            image.load()
        return image

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < end
            self.page.wait_for_timeout(20)

    def order(self) -> list[Any]:
        """Of the references: their object URLs, by which each is known."""
        return self.page.locator("#tray img").evaluate_all("images => images.map(x => x.src)")


@pytest.fixture
def visit(
    service: Served, pocket_service: Served, browser: "Browser", request: pytest.FixtureRequest
) -> Iterator[Visit]:
    """The page as it is after loading; a parameter says what the browser's context is like."""
    context = browser.new_context(**getattr(request, "param", {}))
    visited = Visit(context.new_page())
    visited.open(service.url)
    yield visited
    context.close()
    assert visited.complaints == []
    allowed = (service.url, pocket_service.url, "blob:", "data:")
    assert all(url.startswith(allowed) for url in visited.requests)


def test_edits_of_known_references(visit: Visit, scenes: list[Scene], files: list[Path]) -> None:
    visit.add(files[0])
    visit.page.evaluate(
        """() => {
          const image = document.getElementById("image");
          window.previews = 0;
          new MutationObserver(() => (window.previews += image.className === "soft"))
            .observe(image, { attributeFilter: ["src"] });
        }"""
    )
    for meaning in (Meaning("night"), Meaning("background", "green")):
        visit.make(meaning.plain)
        result = visit.result()
        assert psnr(result.convert("RGB"), answer(meaning, scenes[:1], SIZE)) > 20
        assert visit.at("headline").locator(".badge").text_content() == "references known"
        stages = visit.at("stages").text_content() or ""
        assert "4 cached steps" in stages
        assert "first step" not in stages
        assert visit.at("divider").is_visible()
        assert f"Seed: {visit.at('seed').input_value()}" in result.info["parameters"]
    assert visit.page.locator("#strip li").count() == 2
    assert visit.page.evaluate("previews") == 6


def test_references_are_moved_by_keys_and_by_mouse(visit: Visit, files: list[Path]) -> None:
    visit.add(*files)
    a, b, c = visit.order()
    tiles, keyboard, mouse = visit.page.locator(".tile"), visit.page.keyboard, visit.page.mouse
    tiles.nth(0).focus()
    keyboard.press("ArrowRight")
    assert visit.order() == [b, a, c]
    assert tiles.nth(1).evaluate("tile => tile === document.activeElement")
    tiles.nth(2).hover()
    mouse.down()
    box = tiles.nth(0).bounding_box()
    mouse.move(box["x"] + 9, box["y"] + 9, steps=8)
    mouse.up()
    assert visit.order() == [c, b, a]
    keyboard.press("Delete")
    assert visit.order() == [b, a]
    visit.page.get_by_label("Remove reference 2").click()
    assert visit.order() == [b]
    assert visit.at("count").text_content() == "1 of 4"


def test_a_painted_mask_keeps_the_rest(
    visit: Visit, scenes: list[Scene], files: list[Path]
) -> None:
    visit.add(files[0])
    visit.at("paint").click()
    visit.at("brush").fill("160")
    mouse, box = visit.page.mouse, visit.at("mask").bounding_box()
    mouse.move(box["x"], box["y"])
    mouse.down()
    mouse.move(box["x"], box["y"] + box["height"], steps=9)
    mouse.up()
    visit.make(Meaning("night").plain)
    reference = scenes[0].picture(SIZE)
    left, right = (0, 0, 24, SIZE[1]), (SIZE[0] // 2, 0, *SIZE)
    for again in (False, True):  # the second one with the mask of the history
        result = visit.result().convert("RGB")
        night = answer(Meaning("night"), scenes[:1], SIZE)
        assert psnr(result.crop(right), reference.crop(right)) > 20
        changed = result.crop(left)
        assert psnr(changed, night.crop(left)) > psnr(changed, reference.crop(left)) + 5
        if not again:
            visit.page.reload()
            visit.page.locator("#strip button").click()
            visit.at("unmask").wait_for()
            visit.make(Meaning("night").plain)


def test_history_brings_everything_back(visit: Visit, files: list[Path]) -> None:
    visit.add(*files[:2])
    visit.at("loras").locator("input").fill("1.5")
    visit.make("the subject of image 1 on the background of image 2", seed="")
    before, seed = visit.result(), visit.at("seed").input_value()
    assert seed
    visit.page.reload()
    visit.page.locator("#strip button").click()
    assert len(visit.order()) == 2
    assert visit.at("prompt").input_value() == "the subject of image 1 on the background of image 2"
    assert visit.at("seed").input_value() == seed
    visit.at("run").click()
    visit.page.locator("#strip li").nth(1).wait_for()
    assert np.array_equal(np.asarray(visit.result()), np.asarray(before))
    visit.page.on("dialog", lambda dialog: dialog.accept())
    visit.at("forget").click()
    visit.at("history").wait_for(state="hidden")


def test_refusals_are_shown(visit: Visit, files: list[Path], tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    Image.new("RGB", (16, 16)).save(small)
    visit.at("files").set_input_files(small)
    visit.page.get_by_role("alert").filter(has_text="16").wait_for()
    text = tmp_path / "picture.png"
    text.write_text("no picture", "utf-8")
    visit.at("files").set_input_files(text)
    visit.page.get_by_role("alert").filter(has_text="cannot read picture.png").wait_for()
    visit.at("files").set_input_files([*files, *files])
    visit.page.get_by_role("alert").filter(has_text="room for 4").wait_for()
    (refused,) = set(visit.complaints)
    assert refused.startswith(REFUSED)
    visit.complaints.clear()


def test_escape_cancels_on_the_server(visit: Visit, service: Served, files: list[Path]) -> None:
    cancelled = service.engine.gauges()["cancelled_total"]
    visit.add(files[0])
    visit.at("steps").fill("50")
    visit.at("prompt").fill("at night")
    visit.page.keyboard.press("Control+Enter")
    visit.at("run").filter(has_text="Cancel").wait_for()
    visit.wait_until(lambda: service.engine.gauges()["in_flight"] == 1)
    visit.page.keyboard.press("Escape")
    visit.at("run").filter(has_text="Make image").wait_for()
    visit.wait_until(lambda: service.engine.gauges()["in_flight"] == 0)
    assert service.engine.gauges()["cancelled_total"] == cancelled + 1
    assert visit.at("fault").is_hidden()
    assert visit.at("history").is_hidden()


PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("visit", [PHONE], indirect=True, ids=["phone"])
def test_telephone(visit: Visit, files: list[Path]) -> None:
    visit.at("settings").locator("summary").click()
    visit.page.get_by_text("Custom").click()
    visit.at("width").fill("128")
    visit.at("height").fill("160")
    circle = Meaning("shape", "blue", "circle", "yellow")
    visit.make(circle.plain)  # of a prompt alone
    assert psnr(visit.result().convert("RGB"), answer(circle, [], (128, 160))) > 20
    visit.add(*files)
    visit.make("image 1, image 2 and image 3 in a row on a yellow background")
    assert visit.result().size == (128, 160)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    wide = visit.page.locator("main *:visible").evaluate_all(
        "all => all.filter(x => x.getBoundingClientRect().right > 361 && !x.closest('#strip'))"
    )
    assert wide == []


def test_a_server_with_keys_asks_for_one(
    visit: Visit, pocket_service: Served, files: list[Path]
) -> None:
    visit.page.goto(pocket_service.url)
    for key in ("not the key of the tests", pocket_service.key):
        visit.at("key").wait_for()
        visit.at("key").fill(key)
        visit.page.keyboard.press("Enter")
    visit.add(files[0])
    assert visit.at("key-form").is_hidden()
    visit.page.reload()
    visit.add(files[0])
    assert visit.page.evaluate("JSON.stringify(localStorage)") == "{}"
    assert all(text.startswith(REFUSED) for text in visit.complaints)
    visit.complaints.clear()


@pytest.mark.parametrize("visit", [{"color_scheme": "dark"}], indirect=True, ids=["dark"])
def test_controls_have_names_and_both_themes(visit: Visit) -> None:
    nameless = visit.page.locator("input, button, textarea").evaluate_all(
        "all => all.filter(x => !(x.labels?.length || x.ariaLabel || x.textContent.trim()))"
        ".map(x => x.id)"
    )
    assert nameless == []
    colours = []
    for _ in range(2):
        colours.append(visit.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        visit.at("theme").click()
    dark, light = (int(re.findall(r"\d+", colour)[0]) for colour in colours)
    assert dark < 64 < 192 < light
