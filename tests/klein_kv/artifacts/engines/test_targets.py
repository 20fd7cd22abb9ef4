import importlib
from types import SimpleNamespace

import pytest

from klein_kv.artifacts.engines import targets
from klein_kv.artifacts.engines.targets import (
    GPUS,
    TARGETS,
    check_precision,
    compute_capability,
    find_target,
    local_sm,
)
from klein_kv.errors import BackendError, BuildError


@pytest.mark.parametrize(
    ("name", "sm", "gpu"),
    [
        ("rtx5090", 120, "rtx5090"),
        ("RTX4090", 89, "rtx4090"),
        ("sm120", 120, "rtx5090"),
        ("sm_86", 86, "rtx3090"),
        ("rtx-pro-6000", 120, None),
        ("sm121", 121, None),
        ("a100", 80, None),
    ],
)
def test_targets_by_name_and_number(name: str, sm: int, gpu: str | None) -> None:
    target = find_target(name)
    assert (target.sm, target.gpu) == (sm, GPUS[gpu] if gpu else None)


@pytest.mark.parametrize("name", ["rtx9999", "", "sm1", "sm1200"])
def test_unknown_target_lists_the_known(name: str) -> None:
    with pytest.raises(BuildError, match=r"expected one of rtx5090, .*such as sm120"):
        find_target(name)


def test_precisions_by_compute_capability() -> None:
    for precision, target in (("bf16", "rtx3090"), ("fp8", "sm89"), ("nvfp4", "sm100")):
        check_precision(precision, find_target(target))
    check_precision("fp8-weight-only", find_target("rtx3090"))  # nothing multiplies fp8
    with pytest.raises(BuildError, match=r"'nvfp4', .* 10\.0, and rtx3090 has 8\.6; choose bf16$"):
        check_precision("nvfp4", find_target("rtx3090"))
    with pytest.raises(BuildError, match=r"'bf16', .* 8\.0, and sm75 has 7\.5; choose fp16$"):
        check_precision("bf16", find_target("sm75"))


def test_every_target_is_one_that_tensorrt_rtx_builds_for() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    for name, sm in TARGETS.items():
        known = trt.ComputeCapability.__members__
        assert compute_capability(trt, find_target(name)) == known[f"SM{sm}"]
    sms = {int(x[2:]) for x in known if x.startswith("SM")}
    assert sms - set(TARGETS.values()) <= {75}  # Turing has no bf16


def test_library_without_the_capability_names_what_it_has() -> None:
    members = {"NONE": 0, "SM86": 86, "SM120": 120, "SM89": 89}
    trt = SimpleNamespace(
        __name__="lib", __version__="1.7", ComputeCapability=SimpleNamespace(__members__=members)
    )
    assert compute_capability(trt, find_target("rtx4090")) == 89
    with pytest.raises(BuildError, match=r"capability 9.0; it knows SM86, SM89, SM120"):
        compute_capability(trt, find_target("sm90"))


def test_library_that_builds_for_the_local_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = SimpleNamespace(__name__="tensorrt", __version__="11")
    monkeypatch.setattr(targets, "local_sm", lambda: 90)
    assert compute_capability(trt, find_target("sm90")) is None
    with pytest.raises(BuildError, match=r"this machine has 9\.0: tensorrt builds for"):
        compute_capability(trt, find_target("rtx5090"))


def _cuda(status: str) -> SimpleNamespace:
    error = SimpleNamespace(cudaSuccess="ok")
    answer = error.cudaSuccess if status == "ok" else SimpleNamespace(name=status)
    properties = SimpleNamespace(major=12, minor=0)
    return SimpleNamespace(
        cudaError_t=error, cudaGetDeviceProperties=lambda _: (answer, properties)
    )


def test_local_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda _: _cuda("ok"))
    assert local_sm() == 120
    monkeypatch.setattr(importlib, "import_module", lambda _: _cuda("cudaErrorNoDevice"))
    with pytest.raises(BackendError, match="CUDA says cudaErrorNoDevice"):
        local_sm()
