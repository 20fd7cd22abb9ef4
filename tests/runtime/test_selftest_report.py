"""The report of a self-test: every check counts, the file is always whole, no one is named."""

import json
from pathlib import Path

import pytest

from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.selftest_report import CheckError, Report


def fail() -> None:
    raise CheckError("1 is not 2", {"got": 1})


def test_one_failure_hides_no_other(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    assert report.run("adds", lambda: {"sum": 2})
    assert not report.run("equals", fail)
    assert not report.run("reads", lambda: {}["nothing"])
    report.skip("flies", "it has no wings")
    assert report.run("nothing to tell", lambda: None)
    statuses = {check.name: check.status for check in report.checks}
    assert statuses == {
        "adds": "passed",
        "equals": "failed",
        "reads": "failed",
        "flies": "skipped",
        "nothing to tell": "passed",
    }
    assert not report.ok
    value = json.loads((tmp_path / "report.json").read_text())
    assert value == report.to_dict() | {"date": value["date"]}
    assert value["failed"] == ["equals", "reads"]
    assert value["checks"][0]["measured"] == {"sum": 2}
    assert value["checks"][1]["measured"] == {"got": 1}
    assert value["checks"][1]["message"] == "1 is not 2"
    assert value["checks"][2]["message"].startswith("KeyError: 'nothing' (in ")
    assert "test_selftest_report.py" in value["checks"][2]["message"]
    assert report.to_text().splitlines()[-1] == "2 passed, 2 failed, 1 skipped"


def test_what_is_no_check_is_noted_only_if_it_fails(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    assert report.attempt("tidy up", lambda: None)
    assert not report.checks

    def crash() -> None:
        raise RuntimeError("CUDA error 700")

    assert not report.attempt("tidy up", crash)
    value = json.loads((tmp_path / "report.json").read_text())
    assert value["failed"] == ["tidy up"]
    assert value["checks"][0]["message"].startswith("RuntimeError: CUDA error 700 (in ")


def test_our_errors_are_their_message() -> None:
    def refuse() -> None:
        raise ArtifactError("export again")

    report = Report()
    report.run("x", refuse)
    assert report.checks[0].message == "export again"


def test_nothing_passed_is_not_ok() -> None:
    report = Report()
    assert not report.ok
    report.skip("all of it", "no GPU")
    assert not report.ok
    report.run("one", lambda: None)
    assert report.ok


def test_what_ends_the_process_leaves_what_was_found(tmp_path: Path) -> None:
    """A driver that crashes takes the process along: the file must already tell how far it got."""
    out = tmp_path / "report.json"
    report = Report(out)
    report.run("first", lambda: None)
    seen: list[object] = []

    def crash() -> None:
        seen.append(json.loads(out.read_text()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.run("second", crash)
    (during,) = seen
    assert isinstance(during, dict)
    assert [(check["name"], check["status"]) for check in during["checks"]] == [
        ("first", "passed"),
        ("second", "running"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_private_names_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "homes" / "alice"
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr("platform.node", lambda: "alices-laptop")
    report = Report()
    report.hide(home / "secret film" / "artifacts", "ARTIFACTS")

    def tell() -> None:
        places = (home / "secret film/artifacts/x.onnx", home / "y", "/home/bob/z", "/Users/eve/w")
        raise OSError(f"{places} on alices-laptop, and C:\\Users\\carol\\v")

    report.run("tells", tell)
    report.facts["paths"] = {str(home / "a"): [str(home / "b")]}
    text = json.dumps(report.to_dict()) + report.to_text()
    for name in ("alice", "secret", "bob", "eve", "carol"):
        assert name not in text
    assert "ARTIFACTS/x.onnx" in text
    assert "HOST" in text


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = Report(tmp_path / "file" / "report.json")
    with pytest.raises(RequestError, match="name another file with --out"):
        report.save()
