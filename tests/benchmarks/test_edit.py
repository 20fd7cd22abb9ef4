"""The benchmark of edits, run on a CPU at tiny size, and tables of its results."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.klein_configs import KLEIN_9B

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last: a script there is called like a package, `build`

import contenders  # noqa: E402
import edit  # noqa: E402
import limits  # noqa: E402
import table  # noqa: E402

SMALL = ("--output", "128", "--references", "2", "--reference-size", "128", "--threads", "1")


@pytest.fixture(scope="module")
def processes(
    tiny_artifacts: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the script prints: contenders in processes of their own, float32."""
    folders = ("--artifacts", str(tiny_artifacts), "--checkpoint", str(tiny_checkpoint))
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "edit.py"), *folders, *SMALL, "--rounds", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("edit") / "processes.txt"
    path.write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def drawn(
    tiny_bf16_artifacts: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The document of everyone in one process on weights drawn there, bfloat16."""
    work = tmp_path_factory.mktemp("drawn")
    (work / "tiny-checkpoint").symlink_to(tiny_checkpoint)
    (work / "tiny-bf16").symlink_to(tiny_bf16_artifacts)
    args = edit.parse_arguments(
        ["--size", "tiny", "--drawn", "--plain", "--work", str(work), "--rounds", "1", *SMALL]
    )
    edit.prepare(args, work)
    path = work / "drawn.json"
    path.write_text(json.dumps(edit.describe(args) | edit.report(args, *edit.take_turns(args))))
    return path


@pytest.fixture(params=["processes", "drawn"])
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    return table.load(request.getfixturevalue(request.param))


def test_every_edit_has_its_times_and_its_share(document: dict[str, Any]) -> None:
    assert {"date", "command", "machine", "versions", "options"} <= document.keys()
    assert set(document["edits"]) - {"diffusers_plain"} == {"first", "repeated", "diffusers_kv"}
    for result in document["edits"].values():
        assert len(result["seconds"]) == document["options"]["rounds"]
        assert result["stages"].keys() == table.STAGES.keys()
        assert 0 < sum(result["stages"].values()) < 1.05 * max(result["seconds"])
        assert 0 < result["share_of_matrix_speed"] < 1.2
        assert result["peak_host_bytes"] > 50e6
    assert document["matrix_speed"].keys() == {"float32", "bfloat16"}
    slow, fast = (document["edits"][name] for name in ("diffusers_kv", "repeated"))
    ratio = document["ratios"]["diffusers_kv / repeated"]
    assert ratio["median"] == slow["median_seconds"] / fast["median_seconds"]
    assert ratio["min"] <= ratio["max"]
    assert ratio["operations"] > 1.02


def test_a_repeated_edit_is_a_hit_and_a_first_one_is_not(document: dict[str, Any]) -> None:
    edits = document["edits"]
    assert {name for name, result in edits.items() if result["hit"]} == {"repeated"}
    assert edits["repeated"]["stages"]["vae_encode"] == 0
    assert edits["first"]["stages"]["vae_encode"] > 0
    assert document["largest_pixel_difference"]["first to repeated"] == 0


def test_images_are_those_of_diffusers(processes: Path, drawn: Path) -> None:
    exact, rounded = (table.load(path)["largest_pixel_difference"] for path in (processes, drawn))
    assert exact["first to diffusers_kv"] <= 1
    # bfloat16 rounds on both sides; the plain pipeline computes another function.
    assert rounded["first to diffusers_kv"] < rounded["first to diffusers_plain"] / 2


# Teraflops of one step at 1024x1024 with one, two and four references of that size:
# 13.96 GFLOP per token, 524,288 per pair of query and key.
@pytest.mark.parametrize(
    ("references", "first", "cached", "plain"),
    [(1, 151, 85, 161), (2, 245, 95, 265), (4, 484, 115, 524)],
)
def test_operations_of_klein_9b(references: int, first: int, cached: int, plain: int) -> None:
    expected = {"first": first, "repeated": cached, "diffusers_plain": plain}
    for kind, teraflops in expected.items():
        counted = limits.edit_operations(
            KLEIN_9B.transformer, kind, steps=1, image=4096, text=512, references=4096 * references
        )
        assert counted == pytest.approx(teraflops * 1e12, rel=0.03)


def test_tables_and_plot_of_results(
    processes: Path,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    build = BENCHMARKS / "results" / "build-9b-rtx5090.json"
    image = tmp_path / "plot.png"
    argv = ["table.py", str(processes), str(drawn), str(build), "--plot", str(image)]
    monkeypatch.setattr(sys, "argv", argv)
    table.main()
    text = capsys.readouterr().out
    lines = processes.read_text(encoding="utf-8").splitlines()
    assert "\n".join(lines[:-1]).strip() in text  # what the script itself printed
    assert "| diffusers_plain | diffusers bfloat16 |" in text
    assert "a model and no measurement" in text
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no JSON document"), ("{", "no JSON document"), ('{"benchmark": "loop"}', "expected")],
)
def test_other_files_are_no_results(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        table.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "9b-shapes", "--backend", "onnxruntime"), "for --backend torch"),
        (("--drawn", "--artifacts", "here"), "without --artifacts"),
        (("--rounds", "0"), "at least 1 of --rounds"),
    ],
)
def test_options_that_cannot_be(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        edit.parse_arguments([*options])
    assert message in capsys.readouterr().err


def test_a_contender_that_fails_tells_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = edit.parse_arguments(["--artifacts", str(tmp_path)])
    with pytest.raises(EOFError):
        contenders.Worker(contenders.open_klein_kv, args)
    assert "klein.json" in capfd.readouterr().err
