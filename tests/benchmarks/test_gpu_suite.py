"""The GPU suite on a CPU: the same code but for compilers, CUDA graphs and memory counters."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import torch
from gpu_record import Record

from tests.benchmarks.conftest import BENCHMARKS, SuiteRun, run_suite

EAGER = {"diffusers_kv_eager", "diffusers_plain_eager", "ours_eager", "ours_hit_eager"}
CPU = ("--device=cpu", "--size=tiny")


@pytest.fixture(scope="module")
def document(suite_run: SuiteRun) -> dict[str, Any]:
    return suite_run.document


def test_document_says_what_ran_where(suite_run: SuiteRun, document: dict[str, Any]) -> None:
    assert document["benchmark"] == "gpu_suite"
    assert document["finished"] is True
    assert document["device"]["kind"] == "cpu"
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["diffusers"]
    assert "--size=tiny" in document["command"]
    assert document["weights"]["bytes"] == 2 * document["weights"]["parameters"]
    assert document["matmul_peak"]["tflops_per_second"] > 0
    summary = json.loads(suite_run.stdout.splitlines()[-1])
    assert summary["out"] == str(suite_run.path)
    assert summary["targets"] == document["targets"]


def test_everyone_was_measured_in_every_cell(document: dict[str, Any]) -> None:
    with_references, without = document["cells"]
    assert (with_references["output"], with_references["references"]) == (128, 2)
    assert without["references"] == without["ref_tokens"] == 0
    assert set(with_references["runs"]) == EAGER
    assert set(without["runs"]) == EAGER - {"ours_hit_eager"}
    for cell in document["cells"]:
        for run in cell["runs"].values():
            assert len(run["samples"]) == 3
            for sample in run["samples"]:
                assert len(sample["steps"]) == document["settings"]["steps"]
                assert math.isclose(sum(sample["steps"]), sample["seconds"])
                assert 0 < sample["seconds"] <= sample["wall_seconds"]
            spread = run["seconds"]
            assert spread["min"] <= spread["q1"] <= spread["median"] <= spread["q3"]
            assert run["repeatable"]
            assert run["finite"]
            assert (run["encode_references_seconds"] is None) == (run["family"] != "hit")
            rate = cell["flops"][run["family"]] / spread["median"] / 1e12
            assert run["tflops_per_second"] == pytest.approx(rate)


def test_only_what_needs_a_gpu_is_missing(document: dict[str, Any]) -> None:
    missing = {entry["what"]: entry["reason"] for entry in document["missing"]}
    assert set(missing) == {"CUDA graphs", "device memory peaks", "compiled contenders"}
    assert all(missing.values())
    speed = [target for target in document["targets"] if "/ ours" in target["what"]][:3]
    assert [target["reached"] for target in speed] == [None, None, None]


def test_latents_are_as_close_to_float32_as_diffusers(document: dict[str, Any]) -> None:
    (parity,) = document["parity"]
    exact = parity["ours_float32_against_diffusers_float32"]
    assert exact["relative_distance"] < 1e-6
    assert exact["standard_deviation"] > 0.5
    judge = parity["contenders"]["diffusers_kv_eager"]
    # The timestep's rounding is most of the distance from a run in float32 throughout.
    assert 0 < judge["distance_from_kv_bf16_timesteps"] < judge["distance_from_kv"] < 0.3
    for name in ("ours_eager", "ours_hit_eager"):
        ours = parity["contenders"][name]
        assert 0.5 < ours["ratio_kv"] <= 1.2
        assert 0.5 < ours["ratio_kv_bf16_timesteps"] <= 1.2
    # Another function altogether: its distance is from its own float32 run.
    plain = parity["contenders"]["diffusers_plain_eager"]
    assert set(plain) == {"distance_from_plain"}
    assert 0 < plain["distance_from_plain"] < 0.3


def test_a_hit_gives_the_bits_of_a_miss(document: dict[str, Any]) -> None:
    assert document["cells"][0]["hit_equals_miss"] == {
        "ours_hit_eager": {"bitwise": True, "largest_difference": 0.0}
    }


def test_parts_stages_and_kernels(document: dict[str, Any]) -> None:
    assert [step["graph"] for step in document["parts"]] == ["cached_step", "encode_references"]
    assert all(step["attention_seconds"] > 0 for step in document["parts"])
    assert document["attention"][0]["seconds"] > 0
    assert len(document["stages"]) == 4
    for entry in document["profile"]["contenders"].values():
        assert entry["seconds"]["matmul"] > 0
        assert entry["seconds"]["attention"] > 0


def test_no_time_leaves_a_whole_file(tmp_path: Path) -> None:
    record = Record(tmp_path / "result.json", seconds=0.0)
    args = gpu_suite.parse_arguments([*CPU, f"--out={record.path}", "--references=1,0"])
    gpu_suite.run(args, torch.device("cpu"), record)
    document = json.loads(record.path.read_text())
    missing = {entry["what"]: entry["reason"] for entry in document["missing"]}
    assert missing["128x128, 0 references"] == "no time left"
    assert missing["profile"] == "no time left"
    assert document["finished"] is True
    assert all(target["reached"] is None for target in document["targets"])


@pytest.mark.slow
def test_compiled_contenders(tmp_path: Path) -> None:
    # Traced, not compiled: that a compiler's kernels are right is not the suite's to test.
    before = (
        "import functools, torch; torch.set_num_threads(1);"
        "torch.compile = functools.partial(torch.compile, backend='eager')"
    )
    cell = ("--outputs=128", "--references=1", "--rounds=2")
    document = run_suite(tmp_path, *CPU, "--compile", *cell, before=before).document
    (measured,) = document["cells"]
    compiled = {name.replace("eager", "compiled") for name in EAGER}
    assert set(measured["runs"]) == EAGER | compiled
    assert measured["hit_equals_miss"]["ours_hit_compiled"]["bitwise"]
    assert document["graph_breaks"] == {}
    assert {entry["what"] for entry in document["missing"]} == {
        "CUDA graphs",
        "device memory peaks",
    }
    pairs = {(ratio["slow"], ratio["fast"]) for ratio in measured["ratios"]}
    assert ("diffusers_plain_compiled", "ours_hit_compiled") in pairs


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    document = run_suite(tmp_path, "--size=tiny", "--outputs=128", "--references=2,0").document
    assert document["missing"] == []
    for cell in document["cells"]:
        assert {"ours_graphs", "ours_compiled", "diffusers_kv_compiled"} <= set(cell["runs"])
        assert all(run["memory"]["transient_bytes"] > 0 for run in cell["runs"].values())
        assert all(run["repeatable"] and run["finite"] for run in cell["runs"].values())
    (parity,) = document["parity"]
    assert parity["contenders"]["ours_graphs"]["ratio_kv_bf16_timesteps"] <= 1.2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device=cpu", "--size=9b"), "use --size tiny"),
        ((*CPU, "--outputs=100"), "multiples of 16"),
        ((*CPU, "--references=-1"), "expected 0 or more"),
        ((*CPU, "--rounds=1"), "at least 2 --rounds"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.parse_arguments(["--out=result.json", *options])
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.parse_arguments(["--out=result.json"])
    assert "--device cpu --size tiny" in capsys.readouterr().err


def test_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "assert importlib.util.find_spec('klein_kv') is None, 'still installed'\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from checkout import use_checkout; use_checkout()\n"
        "assert importlib.util.find_spec('klein_kv.export.random_model')\n"
        "import klein_kv.runtime.loop\n"
        "print(klein_kv.runtime.loop.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if "still installed" in done.stderr:
        pytest.skip("klein_kv is installed whole, not as an editable checkout")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == BENCHMARKS.parent / "runtime" / "loop.py"
