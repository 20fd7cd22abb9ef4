import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from klein_kv.artifacts.engines.trt_module import load_module
from klein_kv.engines.build_log import BuildLog, make_logger
from klein_kv.errors import BackendError


def _pretend(monkeypatch: pytest.MonkeyPatch, installed: dict[str, Any]) -> None:
    def find(name: str) -> ModuleType:
        if name not in installed:
            raise ImportError(f"No module named {name!r}")
        return installed[name]

    monkeypatch.setattr(importlib, "import_module", find)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", "pip install 'klein-kv[rtx]' or pip install 'klein-kv[tensorrt]'"),
        ("tensorrt", "pip install 'klein-kv[tensorrt]'"),
    ],
)
def test_absent_library_gives_the_install_line(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    _pretend(monkeypatch, {})
    with pytest.raises(BackendError) as caught:
        load_module(name)
    assert str(caught.value).endswith(f"install it: {expected}")


def test_auto_prefers_rtx_and_passes_over_a_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stub = SimpleNamespace(Builder=object), SimpleNamespace()
    _pretend(monkeypatch, {"tensorrt_rtx": whole, "tensorrt": SimpleNamespace(Builder=object)})
    assert load_module() is whole
    _pretend(monkeypatch, {"tensorrt_rtx": stub, "tensorrt": whole})
    assert load_module() is whole
    _pretend(monkeypatch, {"tensorrt": stub})
    with pytest.raises(BackendError, match="a stub package"):
        load_module("tensorrt")


def test_log_keeps_plans_scratch_and_the_first_errors() -> None:
    log = BuildLog()
    assert log.reason == "it gave no reason"
    log.add("Layers:\nName: a, LayerType: kgen\nName: b, LayerType: gemm\n\nI/O Tensors:\n Name: x")
    log.add("Total Activation Memory: 4096 bytes")
    log.add("Max Scratch Memory: 1 bytes")
    assert log.layers == [["Name: a, LayerType: kgen", "Name: b, LayerType: gemm"]]
    assert log.scratch_bytes == [4096]
    levels = {name: i for i, name in enumerate(("ERROR", "WARNING", "INFO", "VERBOSE"))}
    trt = SimpleNamespace(ILogger=type("ILogger", (), levels))
    logger = make_logger(trt, log)
    logger.log(trt.ILogger.WARNING, "slow")
    for message in (" message 0\n", " message 1\n", "another"):
        logger.log(trt.ILogger.ERROR, message)
    assert log.reason == "message 0 | message 1"
    log.errors[:] = [5000 * "x"]
    assert len(log.reason) == 600
