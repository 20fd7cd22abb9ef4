"""Reports of a real result of the suite, at tiny size, and of plans as `build.py` writes them."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import report
from report_plots import plots
from report_tables import in_order, measured_section

from tests.benchmarks.conftest import SuiteRun

PLAN = {"kernels": 568, "seconds": 0.5709, "ideal_seconds": 0.5494, "ratio": 1.0391}
PLAN |= {"scratch_bytes": 517767168}
BUILD = {"benchmark": "build", "build": {"static-1024-4ref": {"plans": {"cached_step": PLAN}}}}
# What an entry holds before its first sample.
PREPARED = {"family", "held_bytes", "warm_up_seconds", "encode_references_seconds", "samples"}
DOCS = """# Page

before
<!-- gpu: begin -->
old
<!-- gpu: end -->
between
<!-- plan model: begin -->
<!-- plan model: end -->
after
"""


@pytest.fixture
def files(tmp_path: Path, suite_run: SuiteRun) -> list[Path]:
    build, docs = tmp_path / "build.json", tmp_path / "page.md"
    build.write_text(json.dumps(BUILD))
    docs.write_text(DOCS)
    return [suite_run.path, build]


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, argv)])
    report.main()


def test_page_keeps_what_is_not_between_markers(
    files: list[Path],
    tmp_path: Path,
    suite_run: SuiteRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    docs = tmp_path / "page.md"
    for _ in range(2):  # a second time over its own output
        run(monkeypatch, *files, "--docs", docs)
        text = docs.read_text()
        head, _, rest = text.partition("<!-- gpu: begin -->")
        measured, _, rest = rest.partition("<!-- gpu: end -->")
        between, _, rest = rest.partition("<!-- plan model: begin -->")
        model, _, tail = rest.partition("<!-- plan model: end -->")
        assert (head, between, tail) == ("# Page\n\nbefore\n", "\nbetween\n", "\nafter\n")
    assert "570.9 | 549.4 | 1.039 | 568 | 0.52" in model
    assert "not a measurement" in model
    assert "570.9" not in measured
    assert "old" not in measured
    median = suite_run.document["cells"][0]["runs"]["ours_eager"]["seconds"]["median"]
    assert f"| {median:.3f} (" in measured or f"| {median:.5f} (" in measured
    assert "nothing about a GPU" in measured
    assert "- CUDA graphs: needs a CUDA device, this is cpu" in measured
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["written"] == [str(docs)]


def test_sections_without_results_stay(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, files[1], "--docs", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "<!-- gpu: begin -->\nold\n<!-- gpu: end -->" in text
    assert "570.9" in text


def test_html_page_needs_no_other_file(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, *files, "--html", tmp_path / "out" / "page.html")
    text = (tmp_path / "out" / "page.html").read_text()
    assert "http" not in text.replace("https://", "http://")
    assert text.count("<table>") == text.count("</table>") > 10
    assert "Seconds per request, 128x128" in text


def test_plots(suite_run: SuiteRun) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    images = plots([suite_run.document])
    assert set(images) == {"seconds", "ratios", "kernels"}  # a CPU has no device memory
    gpu = with_memory(suite_run.document)
    images = plots([gpu, gpu])
    assert {"memory-1", "memory-2"} < set(images)
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images.values())


def with_memory(document: dict[str, Any]) -> dict[str, Any]:
    """The document as a GPU would have given it."""
    document = copy.deepcopy(document)
    document["device"] |= {"kind": "cuda", "memory_bytes": 141 << 30, "driver": "580.1"}
    document["device"]["name"] = "NVIDIA H200"
    memory = {"weights_bytes": 18.2e9, "held_bytes": 8.6e9, "transient_bytes": 1.25e9}
    for cell in document["cells"]:
        for entry in cell["runs"].values():
            entry["memory"] = memory | {"total_bytes": sum(memory.values())}
    return document


def test_memory_table(suite_run: SuiteRun) -> None:
    section = measured_section(with_memory(suite_run.document))
    assert section.title == "NVIDIA H200, size tiny"
    assert "driver 580.1" in section.text[1]
    (table,) = [table for table in section.tables if table.title.startswith("Device memory")]
    assert table.rows[0][1] == "28.1 = 18.2 + 8.6 + 1.2"


def test_a_run_cut_short_has_a_report(suite_run: SuiteRun) -> None:
    document = copy.deepcopy(suite_run.document)
    for key in ("parity", "stages", "parts", "attention", "profile", "targets", "finished"):
        document.pop(key, None)
    cell = document["cells"][1]
    cell.pop("ratios")
    cell.pop("hit_equals_miss")
    for entry in cell["runs"].values():  # prepared, not yet measured
        for key in set(entry) - PREPARED:
            del entry[key]
    titles = [table.title for table in measured_section(document).tables]
    assert titles[0] == "Seconds per request, 128x128"
    del document["cells"], document["matmul_peak"]
    assert measured_section(document).tables == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no result file"),
        ("[]", "no result file"),
        ('{"benchmark": "loop"}', "is of 'loop', expected one of gpu_suite, build"),
        ('{"benchmark": "gpu_suite", "schema": 99}', "schema 99, expected 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        report.load_results([path])


def test_page_without_markers_is_left_alone(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "other.md"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="put them where the tables should be"):
        run(monkeypatch, *files, "--docs", page)
    assert page.read_text() == "no markers"


def test_order_of_contenders() -> None:
    names = ["ours_hit_graphs", "ours_eager", "diffusers_kv_eager", "ours_graphs"]
    names += ["diffusers_plain_compiled", "ours_hit_eager", "diffusers_plain_eager"]
    assert in_order(names) == [
        "diffusers_plain_eager",
        "diffusers_plain_compiled",
        "diffusers_kv_eager",
        "ours_eager",
        "ours_graphs",
        "ours_hit_eager",
        "ours_hit_graphs",
    ]


def test_docs_page_has_the_markers() -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for marker in report.MARKERS:
        assert report.insert(text, marker, "x") != text
