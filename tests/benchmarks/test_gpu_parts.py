"""Pieces of the GPU suite: clock, cells, parts of a step, targets."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_suite
import pytest
import torch
from gpu_cells import CellRunner, family_flops
from gpu_contenders import Contender, all_contenders
from gpu_kernels import kernel_class, parts_of_step
from gpu_models import SUITE_SIZES, Networks, fixture_shapes, make_scene
from gpu_record import Record
from gpu_targets import targets
from gpu_timing import Clock, Sample, held_bytes, with_spread
from torch.utils.flop_counter import FlopCounterMode

from klein_kv.config import TransformerConfig
from klein_kv.flops import reference_flops, step_flops
from tests.klein_configs import KLEIN_9B

NET = KLEIN_9B.transformer
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks(fixture_shapes(SUITE_SIZES["tiny"]), CPU, 0)


# --- what a step consists of ---


@pytest.mark.parametrize("ref_tokens", [0, 16384])
def test_parts_add_up_to_the_operations(ref_tokens: int) -> None:
    sizes = {"batch": 1, "image_tokens": 4096, "text_tokens": 512, "ref_tokens": ref_tokens}
    parts = parts_of_step("cached_step", NET, **sizes)
    assert sum(part.flops * count for part, count in parts.items()) == step_flops(NET, **sizes)
    attention = {part.shape: count for part, count in parts.items() if part.kind == "attention"}
    keys = 4608 + ref_tokens
    assert attention == {
        (1, 32, 4608, keys, 128): NET.num_blocks - 1,
        (1, 32, 4096, keys, 128): 1,  # of the last block only the image is read
    }


def test_parts_of_the_references() -> None:
    parts = parts_of_step(
        "encode_references", NET, batch=1, image_tokens=0, text_tokens=0, ref_tokens=4096
    )
    total = sum(part.flops * count for part, count in parts.items())
    assert total == reference_flops(NET, 4096)


def attention_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """Of torch's kernel for CPUs, which its counter does not know; q and k are shapes."""
    return int(4 * q[0] * q[1] * q[2] * k[2] * q[3])


@pytest.mark.parametrize("references", [0, 1, 3])
def test_operations_are_those_that_torch_counts(networks: Networks, references: int) -> None:
    scene = make_scene(networks, SUITE_SIZES["tiny"], 128, references)
    expected = family_flops(networks.config.transformer, scene.sizes, 4)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for contender in all_contenders(networks, Clock(CPU), None, graphs=False):
        if contender.family == "hit" and references == 0:
            continue
        contender.prepare(scene)
        with FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter:
            contender.run(scene, 4)
        assert counter.get_total_flops() == expected[contender.family], contender.name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_red_fused__scaled_dot_product_flash_attention_add_3", "compiled"),
        ("triton_tem_fused_mm_4", "matmul"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copy"),
        ("void at::native::CatArrayBatchedCopy<float>", "copy"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "other"),
    ],
)
def test_kernel_class(name: str, kind: str) -> None:
    assert kernel_class(name) == kind


# --- time ---


class FakeGpu:
    """torch.cuda as far as the clock uses it: work takes seconds only where it says so."""

    def __init__(self) -> None:
        self.milliseconds, self.waited, self.allocated, self.peak = 0.0, 0, 1000, 0

    def work(self, milliseconds: float, takes: int) -> None:
        self.milliseconds += milliseconds
        self.peak = max(self.peak, self.allocated + takes)

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda _stream: setattr(event, "at", self.milliseconds)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def install(self, patch: pytest.MonkeyPatch) -> None:
        cuda = torch.cuda
        patch.setattr(cuda, "Event", self.event)
        patch.setattr(cuda, "current_stream", lambda _device: None)
        patch.setattr(cuda, "synchronize", lambda _device: setattr(self, "waited", self.waited + 1))
        patch.setattr(cuda, "reset_peak_memory_stats", lambda _device: setattr(self, "peak", 0))
        patch.setattr(cuda, "memory_allocated", lambda _device: self.allocated)
        patch.setattr(cuda, "max_memory_allocated", lambda _device: self.peak)


def test_clock_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    clock = Clock(torch.device("cuda", 0))
    for _ in range(2):
        gpu.work(70, takes=10**6)  # before the start: of no account
        clock.start()
        for milliseconds, takes in ((30, 50), (10, 7)):
            gpu.work(milliseconds, takes)
            clock.mark()
        gpu.work(5, takes=0)  # after the last mark: alike
        sample = clock.stop()
        assert sample.steps == pytest.approx([0.030, 0.010])
        assert sample.seconds == pytest.approx(0.040)
        assert sample.peak_bytes == 50
    assert gpu.waited == 4  # at the ends, never between


def test_held_memory_counts_pools_of_graphs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 300},
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 50, "allocated_size": 7},
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 1, "allocated_size": 1},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert held_bytes(torch.device("cuda", 0)) == 350
    assert held_bytes(CPU) == 0


def test_spread() -> None:
    values = with_spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert values == {"median": 3.0, "min": 1.0, "q1": 2.0, "q3": 4.0, "max": 5.0}
    assert set(with_spread([2.0]).values()) == {2.0}


# --- cells ---


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "result.json", 600)


class Failing(Contender):
    """Runs so many times, then memory is full."""

    runs_left = 0

    def run(self, scene: Any, steps: int) -> Sample:
        if self.runs_left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")
        self.runs_left -= 1
        self.latents = torch.zeros(1, 4, 128)
        return Sample([0.1] * steps, 0.1 * steps, 7)


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_who_fails_is_missing_and_the_others_go_on(
    networks: Networks, record: Record, runs: int
) -> None:
    failing = Failing("ours_graphs", "kv", Clock(CPU))
    failing.runs_left = runs  # warm-up takes one
    eager = all_contenders(networks, Clock(CPU), None, graphs=False)
    cells = CellRunner(record, networks, SUITE_SIZES["tiny"], [failing, *eager], 4, rounds=2)
    cells.measure(64, 1, seconds=60)
    (missing,) = record.document["missing"]
    assert missing["what"] == "64x64, 1 references: ours_graphs"
    assert "Tried to allocate 8.00 GiB" in missing["reason"]
    found = record.document["cells"][0]["runs"]
    assert all(len(found[contender.name]["samples"]) == 2 for contender in eager)
    assert len(found.get("ours_graphs", {"samples": []})["samples"]) == max(0, runs - 1)
    assert "ours_graphs" not in cells.latents[64, 1]


def test_memory_is_as_if_alone(networks: Networks, record: Record) -> None:
    fake = Failing("ours_eager", "kv", Clock(CPU))
    fake.runs_left = 3
    cells = CellRunner(record, networks, SUITE_SIZES["tiny"], [fake], 4, rounds=2)
    cells.measure(64, 1, seconds=60)
    run = record.document["cells"][0]["runs"]["ours_eager"]
    weights = networks.weight_bytes
    assert run["memory"] == {
        "weights_bytes": weights,
        "held_bytes": 0,
        "transient_bytes": 7,
        "total_bytes": weights + 7,
    }


def test_weights_are_shared(networks: Networks) -> None:
    contenders = all_contenders(networks, Clock(CPU), {"backend": "eager"}, graphs=False)
    assert len(contenders) == 8
    pointers = {tensor.data_ptr() for tensor in networks.state.values()}
    for contender in contenders:
        if hasattr(contender, "pipe"):
            parameters = list(contender.pipe.transformer.parameters())
            assert {parameter.data_ptr() for parameter in parameters} <= pointers
            assert not any(parameter.requires_grad for parameter in parameters)


def test_config_is_that_of_the_fixture(networks: Networks) -> None:
    shapes = networks.shapes
    net: TransformerConfig = networks.config.transformer
    assert (net.num_layers, net.num_single_layers) == (shapes.double_blocks, shapes.single_blocks)
    assert networks.config.text_encoder.output_dim == net.joint_attention_dim


# --- order and targets ---


def test_order_of_cells() -> None:
    order = gpu_suite.cell_order((1024, 512), (4, 1, 2, 0))
    assert order[:3] == [(1024, 4), (512, 1), (512, 4)]
    assert sorted(order) == sorted({(o, r) for o in (1024, 512) for r in (4, 1, 2, 0)})
    assert gpu_suite.cell_order((512,), (0,)) == [(512, 0)]


def test_nothing_measured_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "result.json"
    options = ["--device=cpu", "--size=tiny", "--references=0", f"--out={path}"]
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", *options])
    monkeypatch.setattr(gpu_suite, "all_contenders", lambda *_, **__: [])
    monkeypatch.setattr(gpu_suite.gc, "freeze", lambda: None)
    with pytest.raises(SystemExit, match="1"):
        gpu_suite.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(path)


def cell(ratio: float) -> dict[str, Any]:
    entry = {"slow": "diffusers_kv_eager", "fast": "ours_graphs", "expected_by_flops": 1.0}
    entry["measured"] = with_spread([ratio])
    return {"output": 1024, "references": 4, "ratios": [entry]}


@pytest.mark.parametrize(("ratio", "reached"), [(1.31, True), (1.29, False)])
def test_targets(ratio: float, reached: bool) -> None:
    found = targets({"cells": [cell(ratio)]})
    assert [target["reached"] for target in found] == [reached, None, None]
    assert found[0]["measured"] == ratio
    other = targets({"cells": [cell(ratio) | {"output": 512}]})
    assert [target["reached"] for target in other] == [None, None, None]


@pytest.mark.parametrize(("ratio", "reached"), [(1.19, True), (1.21, False)])
def test_parity_target(ratio: float, reached: bool) -> None:
    parity = {"output": 512, "references": 1, "judge": "diffusers_kv_eager"}
    parity["contenders"] = {"ours_graphs": {"ratio_kv": ratio}, "diffusers_kv_eager": {}}
    found = targets({"parity": [parity]})[3:]
    assert [target["reached"] for target in found] == [reached]


def test_cut_short_the_file_stays_whole(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    record.document["cells"] = [1]
    record.save()
    before = record.path.read_text()
    record.document["cells"] = [2]

    def fail(*_: object, **__: object) -> Callable[..., None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        record.save()
    assert record.path.read_text() == before
