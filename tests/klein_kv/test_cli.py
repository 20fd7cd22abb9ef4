"""The command line, in the process of the test: exit codes, one line per failure, JSON."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from klein_kv.cli import main
from klein_kv.runtime.session import Session


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_generate_writes_an_image_with_its_parameters(capsys, short_artifacts, tmp_path):
    references = [picture(tmp_path / "a.png", 130, 170), picture(tmp_path / "b.png", 200, 128, 1)]
    out = tmp_path / "out.png"
    code, text, _ = run(
        capsys, "generate", short_artifacts, "-p", "a kite, 凧", "-r", references[0],
        "-r", references[1], "-o", out, "--steps", 2, "--seed", 5, "--json",
    )  # fmt: skip
    assert code == 0
    value = json.loads(text)
    assert value["images"] == [str(out)]
    with Image.open(out) as image:
        assert image.size == (128, 160)  # the first reference's, cropped to multiples of 16
        assert image.text["parameters"].startswith("a kite, 凧\nSteps: 2, Sampler: Euler, Seed: 5")
        facts = json.loads(image.text["klein_kv"])
    assert (facts["seed"], facts["steps"], facts["references"]) == (5, 2, 2)


def test_generate_repeats_itself_by_seed(capsys, short_artifacts, tmp_path):
    def pixels(name: str, seed: int, *more: object) -> tuple[str, bytes]:
        size = ("--height", 64, "--width", 80, "--steps", 1)
        argv = ("-p", "a kite", "-o", tmp_path / name, "--seed", seed, *size, *more)
        code, text, _ = run(capsys, "generate", short_artifacts, *argv)
        assert code == 0
        path = Path(text.split()[-1])
        with Image.open(path) as image:
            assert image.size == (80, 64)
            written = b"a kite" in image.info.get("xmp", b"") or "klein_kv" in image.info
            assert written == ("--no-metadata" not in more)
            return path.name, image.tobytes()

    first = pixels("a.png", 1)[1]
    assert pixels("b.png", 1, "--num-images", 2, "--no-metadata")[0] == "b-2.png"
    with Image.open(tmp_path / "b-1.png") as image:
        assert image.tobytes() == first
    assert pixels("c.webp", -7)[1] != first
    assert pixels("d.jpg", 1)[0] == "d.jpg"


def test_generate_to_standard_output(capfdbinary, short_artifacts):
    """`klein-kv generate ... -o - | another program`: the image and nothing else."""
    size = ("--height", "64", "--width", "64", "--steps", "1", "--seed", "18446744073709551615")
    assert main(["generate", str(short_artifacts), "-p", "x", "-o", "-", *size]) == 0
    data = capfdbinary.readouterr().out
    assert data.endswith(b"IEND\xaeB`\x82")
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (64, 64)
        assert json.loads(image.text["klein_kv"])["seed"] == 2**64 - 1


def test_an_image_is_not_written_to_a_terminal(capsys, monkeypatch, short_artifacts):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, _, errors = run(capsys, "generate", short_artifacts, "-p", "x", "-o", "-")
    assert code == 1
    assert "standard output is a terminal" in errors


def test_prompts_from_a_file(capsys, monkeypatch, short_artifacts, tmp_path):
    """One image each; the references' keys and values are made once, and used by all."""
    runs = []
    start = Session.run

    def note(self, graph, inputs):
        runs.append(graph)
        return start(self, graph, inputs)

    monkeypatch.setattr(Session, "run", note)
    prompts = ["a red kite", "a blue kite, 凧", "no kite"]
    (tmp_path / "prompts.txt").write_text("\ufeff" + "\n\n".join(prompts), encoding="utf-8")
    reference = picture(tmp_path / "a.png", 64, 64)
    size = ("-r", reference, "--steps", 2, "--seed", 3)
    code, text, errors = run(
        capsys, "generate", short_artifacts, "--prompts", tmp_path / "prompts.txt", *size,
        "-o", tmp_path / "k.png", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(text)["images"] == [str(tmp_path / f"k-{i}.png") for i in (1, 2, 3)]
    assert runs.count("first_step") == 1
    assert runs.count("text_encoder") == 3
    assert "3/3" in errors
    assert "2/2" not in errors
    for i, prompt in enumerate(prompts, 1):
        with Image.open(tmp_path / f"k-{i}.png") as image:
            assert json.loads(image.text["klein_kv"])["prompt"] == prompt
            pixels = image.tobytes()
    alone = tmp_path / "alone.png"
    assert run(capsys, "generate", short_artifacts, "-p", prompts[2], *size, "-o", alone)[0] == 0
    with Image.open(alone) as image:
        assert image.tobytes() == pixels


def test_matte_of_references(capsys, short_artifacts, tmp_path):
    Image.new("RGBA", (64, 64), (200, 30, 90, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    images = []
    for name, *options in (("clear.png",), ("white.png",), ("clear.png", "--matte", "none")):
        argv = ("-p", "x", "-r", tmp_path / name, "--steps", 1, "--seed", 1)
        argv += ("-o", tmp_path / "out.png", *options)
        assert run(capsys, "generate", short_artifacts, *argv)[0] == 0
        with Image.open(tmp_path / "out.png") as image:
            images.append(image.tobytes())
    assert images[0] == images[1] != images[2]


def test_a_larger_limit_for_photos(capsys, monkeypatch, short_artifacts, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    reference = picture(tmp_path / "a.png", 640, 480)
    argv = ("-p", "x", "-r", reference, "--steps", 1, "-o", tmp_path / "out.png")
    code, _, errors = run(capsys, "generate", short_artifacts, *argv)
    assert (code, "--max-megapixels" in errors) == (1, True)
    size = ("--height", 64, "--width", 64)
    assert run(capsys, "generate", short_artifacts, *argv, *size, "--max-megapixels", 1)[0] == 0


def test_consoles_that_are_not_utf8(short_artifacts, tmp_path, monkeypatch):
    """Here one that shows the first of three characters."""
    monkeypatch.setenv("PYTHONIOENCODING", "cp932")
    out = tmp_path / "凧 é 🚢.png"
    argv = ["generate", short_artifacts, "-p", "凧 é 🚢", "-o", out]
    argv += ["--height", "64", "--width", "64", "--steps", "1"]
    script = Path(sys.executable).with_name("klein-kv")  # as it was installed
    done = subprocess.run([script, *argv], capture_output=True, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert out.exists()
    assert done.stdout.strip() == str(out).encode("cp932", "backslashreplace")


def test_inspect_lists_every_graph(capsys, short_artifacts):
    code, text, _ = run(capsys, "inspect", short_artifacts, "--json")
    value = json.loads(text)
    assert code == 0
    assert set(value["graphs"]) == {
        "text_encoder", "vae_encoder", "vae_decoder",
        "encode_references", "first_step", "cached_step",
        "encode_references_fp8_kv", "first_step_fp8_kv", "cached_step_fp8_kv",
    }  # fmt: skip
    text = run(capsys, "inspect", short_artifacts)[1]
    assert text.count("k_ref.0 ... v_ref.") == 6
    assert text.count("k_ref_scale.0 ... v_ref_scale.") == 3


def test_doctor_tells_versions_and_readiness(capsys):
    code, text, _ = run(capsys, "doctor", "--json")
    value = json.loads(text)
    assert code == 0
    assert value["ready"]
    assert value["packages"]["onnxruntime"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-p", " "), "the prompt is empty"),
        (("-p", "x", "--height", "500"), "height is 500, expected a multiple of 16"),
        (("-p", "x", "--height", "4112"), "output is 1024x4112, 4.2 megapixels"),
        (("-p", "x", "--steps", "0"), "num_inference_steps is 0, expected 1 to 50"),
        (("-p", "x", "--backend", "abacus"), "backend is 'abacus'"),
        (("-p", "x", "-r", "{tmp}/none.png"), "does not exist"),
        (("-p", "x", "-r", "{tmp}/small.png"), "63x200"),
        (("-p", "x", "-r", "{tmp}/cut.png"), "cut short"),
        (("-p", "x", "-r", "{tmp}/bomb.png"), "too large"),
        (("-p", "x", "-o", "{tmp}/out.gif"), "ends in .png, .jpg, .jpeg or .webp"),
        (
            ("-p", "x", "-o", "{tmp}/out.jpg", "--quality", "100"),
            "quality is 100, expected 20 to 99",
        ),
        (("-p", "x", "-o", "-", "--num-images", "2"), "standard output takes one image, got 2"),
        (("-p", "x", "-o", "-", "--json"), "--json goes to standard output too"),
        (("-p", "x", "-r", "{tmp}/whole.png", "--matte", "mauvish"), "matte is 'mauvish'"),
        (("--prompts", "{tmp}/empty.txt"), "holds no text, expected one prompt per line"),
        (("--prompts", "{tmp}/whole.png"), "whole.png cannot be read"),
        (("-p", "x", "-o", "{tmp}/nowhere/out.png"), "does not exist"),
    ],
)
def test_bad_requests_are_one_line(capsys, short_artifacts, tmp_path, argv, message):
    picture(tmp_path / "small.png", 63, 200)
    whole = picture(tmp_path / "whole.png", 128, 128).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.txt").write_text("\n  \n", encoding="utf-8")
    if any("bomb" in arg for arg in argv):
        Image.new("1", (13400, 13400)).save(tmp_path / "bomb.png")
    out = () if "-o" in argv else ("-o", tmp_path / "out.png")
    argv = [arg.replace("{tmp}", str(tmp_path)) for arg in argv]
    code, text, errors = run(capsys, "generate", short_artifacts, *argv, *out)
    assert code == 1
    assert text == ""
    assert message in errors
    lines = [line for line in errors.splitlines() if line.startswith("klein-kv generate: error:")]
    assert len(lines) == 1
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("out*"))


def test_wrong_usage_exits_with_2():
    with pytest.raises(SystemExit) as caught:
        main(["export", "a", "b", "--text-layers", "nine"])
    assert caught.value.code == 2


def test_interrupt_is_no_traceback(capsys, monkeypatch, short_artifacts):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("klein_kv.artifacts.manifest.Manifest.load", interrupted)
    code, _, errors = run(capsys, "inspect", short_artifacts)
    assert (code, errors.strip()) == (130, "klein-kv inspect: interrupted")


def test_absent_library_names_its_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "klein_kv.export.exporter", None)
    code, _, errors = run(capsys, "export", tmp_path, tmp_path / "out")
    assert code == 1
    assert "pip install 'klein-kv[export]'" in errors


def test_folder_that_cannot_be_made_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, errors = run(capsys, "fixture", tmp_path / "file/checkpoint")
    assert code == 1
    assert errors.startswith("klein-kv fixture: error: ")
    assert len(errors.splitlines()) == 1


def test_closed_pipe_is_no_error(monkeypatch):
    """`klein-kv doctor | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["doctor"]) == 0
