"""What klein-kv does, on one sheet: edits of the pocket checkpoint beside their right answers.

    python -m benchmarks.pocket.demo DEMO

DEMO holds `fp32` (artifacts) and `bf16` (quantized to fp8 and nvfp4); `make demo` makes them.
Writes DEMO/sheet.png, DEMO/index.html and the pictures that the page shows. Subjects are held
out of training. Times are this machine's, from call to picture; nvfp4 has no kernels on a CPU, so
that it is simulated in torch, and no time is given.
"""

import argparse
import html
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
from klein_kv import KleinKVPipeline
from klein_kv.runtime import ReferenceSet

SIZE = (192, 192)
_ROWS = (  # what is asked, of which of the scenes
    (Meaning("shape", "blue", "circle", "yellow"), ""),
    (Meaning("background", "green"), "a"),
    (Meaning("night"), "b"),
    (Meaning("gray"), "c"),
    (Meaning("negative"), "d"),
    (Meaning("mirrored"), "e"),
    (Meaning("swap"), "ba"),
    (Meaning("side", "white"), "ad"),
    (Meaning("row", "yellow"), "cde"),
    (Meaning("square", "pink"), "abcd"),
)


@dataclass(frozen=True)
class Row:
    """One line of the sheet."""

    instruction: str
    note: str
    references: Sequence[Image.Image]
    result: Image.Image
    answer: Image.Image
    milliseconds: float | None

    @property
    def caption(self) -> str:
        took = "" if self.milliseconds is None else f", {self.milliseconds:.0f} ms"
        return f"{psnr(self.result, self.answer):.1f} dB{took}"


def _scenes() -> dict[str, Scene]:
    random = np.random.default_rng(5)
    subjects = sample_subjects()
    chosen = random.permutation(len(subjects))
    return {
        name: draw_scene([subjects[index]], random)
        for name, index in zip("abcde", chosen, strict=False)
    }


def _make_row(
    pipe: KleinKVPipeline,
    meaning: Meaning,
    own: Sequence[Scene],
    note: str,
    seed: int,
    known: ReferenceSet | None = None,
    restyle: Callable[[Image.Image], Image.Image] = lambda picture: picture,
) -> Row:
    """An edit of scenes, timed; of `known` references nothing is encoded again."""
    pictures = [scene.picture(SIZE) for scene in own]
    given = {"image": pictures or None} if known is None else {"references": known}
    start = time.perf_counter()
    out = pipe(meaning.plain, height=192, width=192, seed=seed, **given)
    took = time.perf_counter() - start
    right = restyle(answer(meaning, own, SIZE))
    return Row(meaning.plain, note, pictures, out.images[0], right, took * 1000)


def make_rows(demo: Path) -> list[Row]:
    scenes = _scenes()
    rows = []
    with KleinKVPipeline.from_pretrained(demo / "fp32", backend="onnxruntime") as pipe:
        pipe("at night", image=[scenes["a"].picture(SIZE)], seed=0)  # loads everything
        for seed, (meaning, names) in enumerate(_ROWS):
            own = [scenes[name] for name in names]
            note = ("no reference", "one reference", f"{len(own)} references")[min(len(own), 2)]
            rows.append(_make_row(pipe, meaning, own, note, seed))
        own = [scenes[name] for name in "ecab"]
        # Before anybody has written a prompt.
        known = pipe.encode_references([scene.picture(SIZE) for scene in own])
        for meaning in (Meaning("square", "orange"), Meaning("square", "gray")):
            rows.append(_make_row(pipe, meaning, own, "references known before", 3, known))
        pipe.load_lora_weights(demo / "checkpoint" / "lora" / "cyanotype.safetensors")
        note, own = "with the cyanotype LoRA", [scenes[name] for name in "ac"]
        for meaning, used in ((Meaning("background", "white"), own[:1]), (Meaning("swap"), own)):
            rows.append(_make_row(pipe, meaning, used, note, 4, restyle=cyanotype))
    meaning, own = Meaning("background", "purple"), [scenes["d"]]
    edit = Edit(meaning, meaning.plain, (own[0].picture(SIZE),), answer(meaning, own, SIZE))
    for name in ("fp32", "fp8", "nvfp4"):
        editor = Editor(demo / ("fp32" if name == "fp32" else "bf16"), VARIANTS[name])
        note = f"{name}, in torch"
        rows.append(Row(meaning.plain, note, edit.references, editor(edit, 9), edit.answer, None))
    return rows


def draw_sheet(rows: Sequence[Row], cell: int = 92) -> Image.Image:
    """References, instruction, result and right answer; two rows side by side, 890 pixels wide."""
    font, small = (ImageFont.load_default(size) for size in (13, 11))
    gap, text_width, top_margin = 7, 140, 24
    result_at = cell + text_width + 3 * gap
    width, height = result_at + 2 * (cell + gap), cell + gap
    lines = (len(rows) + 1) // 2
    sheet = Image.new("RGB", (2 * width, lines * height + top_margin), "white")
    drawing = ImageDraw.Draw(sheet)
    heads = {
        "references": gap,
        "instruction": cell + 2 * gap,
        "result": result_at,
        "right answer": result_at + cell + gap,
    }
    for column in (0, 1):
        for head, x in heads.items():
            drawing.text((column * width + x, 6), head, "gray", small)
    for index, row in enumerate(rows):
        left, top = (index // lines) * width, top_margin + (index % lines) * height
        side = cell if len(row.references) == 1 else cell // 2 - 1
        for number, reference in enumerate(row.references):
            x, y = number % 2 * (side + 2), number // 2 * (side + 2)
            sheet.paste(reference.resize((side, side)), (left + gap + x, top + y))
        y = top - 2
        for line in textwrap.wrap(row.instruction, 21):
            drawing.text((left + cell + 2 * gap, y), line, "black", font)
            y += 14
        for line in (*textwrap.wrap(row.note, 25), row.caption):
            drawing.text((left + cell + 2 * gap, y), line, "gray", small)
            y += 12
        sheet.paste(row.result.resize((cell, cell)), (left + result_at, top))
        sheet.paste(row.answer.resize((cell, cell)), (left + result_at + cell + gap, top))
    return sheet


def write_page(rows: Sequence[Row], demo: Path) -> None:
    """DEMO/index.html, and DEMO/pictures that it shows."""
    folder = demo / "pictures"
    folder.mkdir(exist_ok=True)

    def shown(picture: Image.Image, name: str) -> str:
        picture.save(folder / name)
        return f'<img src="pictures/{name}" width="192" alt="">'

    lines = []
    for number, row in enumerate(rows):
        pictures = [
            shown(reference, f"{number}-reference-{index + 1}.png")
            for index, reference in enumerate(row.references)
        ]
        text = f"{html.escape(row.instruction)}<br><small>{row.note}<br>{row.caption}</small>"
        cells = (
            "".join(pictures),
            text,
            shown(row.result, f"{number}-result.png"),
            shown(row.answer, f"{number}-answer.png"),
        )
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(
        f"<th>{head}</th>" for head in ("references", "instruction", "result", "right answer")
    )
    (demo / "index.html").write_text(
        "<!doctype html><meta charset=utf-8><title>klein-kv</title>"
        "<style>body{font:16px sans-serif} td{padding:6px}</style>"
        f"<table><tr>{heads}</tr>{''.join(lines)}</table>\n",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    demo = parser.parse_args().demo
    rows = make_rows(demo)
    draw_sheet(rows).save(demo / "sheet.png")
    write_page(rows, demo)
    for row in rows:
        print(f"{row.caption:16} {row.instruction} ({row.note})")
    print(f"\n{demo / 'sheet.png'}, {demo / 'index.html'}")


if __name__ == "__main__":
    main()
