"""`klein-kv inspect` of engines, on a folder that no TensorRT has to make."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.engines.targets import GPUS
from klein_kv.cli import main
from klein_kv.engines.plan.kernel_plan import Kernel, KernelPlan, Operand
from klein_kv.engines.plan.kernel_price import price_plan
from tests.klein_kv.artifacts.engines.test_engine_manifest import RECORD

LINES = (Path(__file__).parents[1] / "engines/plan/single_block_lines.txt").read_text()
BLOCK = LINES.splitlines()[1:15]
PLANS = {
    "cached_step": KernelPlan.from_lines("cached_step", "a build", BLOCK, 10**9),
    "first_step": KernelPlan.from_lines("first_step", "a build", [BLOCK[0].replace("4608", "-1")]),
}


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A priced engine, and one for a range of sizes."""
    records = {}
    for graph, plan in PLANS.items():
        (tmp_path / f"{graph}.engine").write_bytes(graph.encode())
        (tmp_path / f"{graph}.layers.json").write_text(plan.to_json())
        records[graph] = replace(
            RECORD,
            graph=graph,
            file=f"{graph}.engine",
            layers=f"{graph}.layers.json",
            bytes=len(graph),
            sha256=hashlib.sha256(graph.encode()).hexdigest(),
        )
    EngineManifest("tensorrt_rtx", "1.7", "rtx5090", 120, "bf16", "shared", "tiny", records).save(
        tmp_path
    )
    return tmp_path


@pytest.fixture
def inspect(engines: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*options: str) -> tuple[int, str]:
        code = main(["inspect", str(engines), *options])
        captured = capsys.readouterr()
        return code, captured.out or captured.err

    return run


def test_engines_are_listed_with_their_price(inspect: Callable[..., Any]) -> None:
    code, out = inspect("--json")
    value = json.loads(out)
    assert code == 0
    (plan,) = value["plans"]
    price = price_plan(PLANS["cached_step"], GPUS["rtx5090"])
    assert plan == json.loads(json.dumps(asdict(price)))
    assert set(plan) >= {  # what benchmarks/build.py reads
        "graph", "kernels", "attention_kernels", "seconds", "ideal_seconds", "ratio",
        "scratch_bytes", "weight_copies", "blended_modulations",
    }  # fmt: skip
    assert plan["ratio"] == pytest.approx(1.039, abs=0.005)
    assert set(value["engines"]) == set(PLANS)
    assert list(value["unpriced"]) == ["first_step"]
    text = inspect()[1]
    (row,) = (line.split() for line in text.splitlines() if line.startswith("cached_step "))
    assert row[-5:-2] == [f"{price.ideal_seconds * 1e3:.2f}", f"{price.ratio:.4f}", "14"]
    assert "not a measurement" in text
    assert "first_step: no price: its shapes are dynamic" in text


def test_another_gpu_has_another_price(inspect: Callable[..., Any]) -> None:
    (plan,) = json.loads(inspect("--gpu", "rtx3090", "--json")[1])["plans"]
    assert plan["ideal_seconds"] == pytest.approx(plan["flops"] / 71e12)
    code, error = inspect("--gpu", "a10")
    assert code == 1
    assert "no figures are known for a10" in error


def test_weights_that_are_copied_and_other_engines_are_named(
    engines: Path, inspect: Callable[..., Any]
) -> None:
    assert "copies a weight" not in inspect()[1]
    weight = Operand("to_out.weight", (4096, 16384), (1, 4096), "BFloat16")
    turned = Operand("turned", (16384, 4096), (4096, 1), "BFloat16")
    transpose = Kernel("__myl_Tran_1", "kgen", (weight,), (), (turned,), (), 0)
    plan = PLANS["cached_step"]
    plan = replace(plan, kernels=(*plan.kernels, transpose), weights=(weight.name,))
    (engines / "cached_step.layers.json").write_text(plan.to_json())
    assert "cached_step: __myl_Tran_1 copies a weight at every run" in inspect()[1]
    (engines / "cached_step.engine").write_bytes(b"other code")
    code, error = inspect()
    assert (code, "changed or damaged" in error) == (1, True)


def test_a_lora_is_matched(short_artifacts: Path, tmp_path: Path, capsys: Any) -> None:
    path, module = tmp_path / "style.safetensors", "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {"lora_down.weight": torch.ones(3, 64), "lora_up.weight": torch.ones(192, 3)}
    tensors |= {"alpha": torch.tensor(1.5)}
    save_file({f"{module}.{name}": value for name, value in tensors.items()}, path)
    assert main(["inspect", str(path), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value == {
        "lora": str(path),
        "bytes": path.stat().st_size,
        "format": "kohya",
        "keys": 3,
        "kinds": {"LoRA": 1},
        "ranks": [3],
        "alphas": [1.5],
    }
    tensors = load_file(path) | {"lora_te_x.alpha": torch.ones(())}
    save_file(tensors, path)
    assert main(["inspect", str(path), "--artifacts", str(short_artifacts), "-q", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    names = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "kqv"]
    assert (value["tensors"], value["unmatched"]) == (names, ["lora_te_x.alpha"])
    assert main(["inspect", str(path), "--artifacts", str(short_artifacts)]) == 0
    out = capsys.readouterr().out
    assert "format    kohya" in out
    assert "changes   3 of " in out
    assert "unmatched lora_te_x.alpha" in out
    path.write_bytes(b"PK\x03\x04")
    assert main(["inspect", str(path)]) == 1
    assert "is a pickle" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--artifacts", str(short_artifacts)]) == 1
    assert "is no file" in capsys.readouterr().err


def test_a_gpu_is_a_matter_of_engines(short_artifacts: Path, capsys: Any) -> None:
    assert main(["inspect", str(short_artifacts), "--gpu", "rtx5090"]) == 1
    assert "holds no engines" in capsys.readouterr().err
    assert main(["inspect", str(short_artifacts), "--polygraphy"]) == 0
    assert capsys.readouterr().out.count("polygraphy run ") == 9
