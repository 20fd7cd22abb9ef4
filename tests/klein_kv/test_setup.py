"""`klein-kv setup`: each stage once, and on from where it stopped."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klein_kv.artifacts.manifest import MANIFEST, Manifest
from klein_kv.cli import main
from klein_kv.engines import build
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.export import exporter
from klein_kv.export.checks import samples
from klein_kv.export.quantization import quantize
from tests.klein_configs import TINY_PROFILE

STAGES = {
    "export": (exporter, "export_checkpoint"),
    "quantize": (quantize, "quantize_artifacts"),
    "build": (build, "build_artifacts"),
}


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    def setup(*options: str) -> tuple[int, str, str]:
        command = ["setup", str(tiny_checkpoint), str(tmp_path / "artifacts"), "--variant", "kv"]
        code = main([*command, *options])
        out, err = capsys.readouterr()
        return code, out, err

    return setup


@pytest.fixture
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage works, on less: small samples, two graphs in one shape."""
    make_samples = samples.make_samples

    def small_sample(count: int, **options: Any) -> Any:
        return make_samples(count, **options, size=(64, 64))

    monkeypatch.setattr(samples, "make_samples", small_sample)
    monkeypatch.setattr(build, "chosen_graphs", lambda *_: ["encode_references", "cached_step"])
    monkeypatch.setattr(Recipe, "load", lambda name: Recipe.from_toml(TINY_PROFILE, name))


@pytest.mark.slow
@pytest.mark.usefixtures("small_work")
def test_goes_on_where_it_was_interrupted(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = ("--precision", "fp8", "--gpu", "rtx5090", "--samples", "1", "--json")
    for module, name in STAGES.values():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            assert run(*options)[0] == 130
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    caplog.clear()
    with caplog.at_level(logging.INFO, "klein_kv"):
        code, out, _ = run(*options)
    assert code == 0
    told = [record.message for record in caplog.records if record.name.endswith("cli.setup")]
    assert [line.endswith("there already") for line in told[:3]] == [True, True, False]
    value = json.loads(out)
    assert set(value["seconds"]) == set(STAGES)
    assert value["precision"] == "fp8"
    assert 'precision="fp8"' in value["python"]
    assert value["plan"]["plans"][0]["fits"]
    folder = tmp_path / "artifacts"
    assert Manifest.load(folder).precisions
    engines = sorted(path.name for path in (folder / "engines" / "rtx5090-fp8").iterdir())
    assert "cached_step.engine.zlib" in engines

    caplog.clear()
    with caplog.at_level(logging.INFO, "klein_kv"):
        assert run(*options)[0] == 0
    assert caplog.text.count("unchanged") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "voodoo2"), "voodoo2"),
        (("--gpu", "rtx4090", "--precision", "nvfp4"), "choose bf16 or fp8"),
    ],
)
def test_refusals_come_before_any_work(
    options: tuple[str, ...],
    message: str,
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    code, _, err = run(*options)
    assert code == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_weights_of_zeros_are_taken_on_request(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object, allow_zeros: bool, **__: object) -> None:
        raise KeyboardInterrupt if allow_zeros else AssertionError

    monkeypatch.setattr(exporter, "export_checkpoint", check)
    assert run("--allow-zeros")[0] == 130


def test_artifacts_of_another_kind_are_refused(
    run: Callable[..., tuple[int, str, str]], short_bf16_artifacts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts"
    shutil.copytree(short_bf16_artifacts, folder, copy_function=os.link)
    code, _, err = run("--variant", "plain")
    assert code == 1
    assert "holds kv weights in bfloat16, expected plain in bfloat16" in err
    (folder / MANIFEST).unlink()
    replace(Manifest.load(short_bf16_artifacts), dtype="float16").save(folder)
    assert "holds kv weights in float16, expected kv in bfloat16" in run()[2]
