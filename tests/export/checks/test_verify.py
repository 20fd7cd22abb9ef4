"""`klein-kv verify`: what it compares, with which backend, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from klein_kv.cli import main
from klein_kv.errors import CapacityError, CheckpointError
from klein_kv.export.checkpoints.fixture import make_fixture
from klein_kv.export.checks import verify

Run = Callable[..., tuple[int, str, str]]

IMAGES = [f"end to end, {n} references, {what}" for n in range(3) for what in ("latents", "pixels")]
KV_ROWS = [
    "text_encoder, encoder_hidden_states",
    "vae_encoder, ref_hidden_states",
    "encode_references, K/V",
    "first_step, noise_pred",
    "first_step, K/V",
    "cached_step, noise_pred",
    "blend, latents",
    *IMAGES,
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object) -> tuple[int, str, str]:
        code = main(["verify", *(str(arg) for arg in argv), "--threads", "1"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def names(rows: list[dict[str, Any]]) -> list[str]:
    """Of keys and values the worst tensor is told, whichever it is."""
    return [re.sub(r"[kv]_ref\.\d+", "K/V", row["name"]) for row in rows]


def test_float32_with_each_backend(
    backend: str, tiny_artifacts: Path, tiny_checkpoint: Path, run: Run
) -> None:
    options = ("--backend", backend, "--device", "cpu", "--json")
    code, text, _ = run(tiny_artifacts, tiny_checkpoint, *options)
    value = json.loads(text)
    assert code == 0
    assert value["ok"]
    assert names(value["rows"]) == KV_ROWS
    tensors = [row for row in value["rows"] if not row["name"].endswith("pixels")]
    assert max(row["relative"] for row in tensors) < 1e-5
    assert max(row["max_abs"] for row in tensors) < 1e-4
    assert max(row["relative"] for row in tensors) > 0


def test_bfloat16_through_torch(tiny_bf16_artifacts: Path, tiny_checkpoint: Path, run: Run) -> None:
    """Against diffusers in bfloat16: the same weights, rounded in other places."""
    options = ("--backend", "torch", "--device", "cpu", "--json")
    code, text, _ = run(tiny_bf16_artifacts, tiny_checkpoint, *options)
    rows = json.loads(text)["rows"]
    assert code == 0
    assert names(rows) == KV_ROWS
    # Held against float32, the end would be ten times as far: rounded timesteps.
    latents = [row["relative"] for row in rows if row["name"].endswith("latents")]
    assert 1e-4 < max(latents) < 2e-2
    code, _, err = run(tiny_bf16_artifacts, tiny_checkpoint, "--backend", "onnxruntime")
    assert code == 1
    assert "does not compute on a CPU" in err


def test_plain_weights(plain_artifacts: Path, plain_checkpoint: Path, run: Run) -> None:
    options = ("--backend", "torch", "--device", "cpu", "--json")
    code, text, _ = run(plain_artifacts, plain_checkpoint, *options)
    rows = json.loads(text)["rows"]
    assert code == 0
    assert names(rows) == [*KV_ROWS[:2], "plain_step, noise_pred", "blend, latents", *IMAGES]


def test_another_checkpoint(tiny_artifacts: Path, tmp_path: Path, run: Run) -> None:
    make_fixture(tmp_path / "other", "tiny", seed=99)
    code, text, _ = run(tiny_artifacts, tmp_path / "other", "--backend", "torch")
    assert code == 1
    assert "parity does NOT hold" in text
    lines = [line for line in text.splitlines() if ", " in line[:40]]
    assert len(lines) == len(KV_ROWS)
    *graphs, blend = lines[: -len(IMAGES)]  # which reads no weights
    assert all("FAILED, tolerance" in line for line in graphs)
    assert blend.startswith("blend")
    assert "FAILED" not in blend


def test_a_small_error_in_one_weight_shows(
    tiny_artifacts: Path, tiny_checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = verify.DiffusersRun.load_denoiser

    def changed(self: verify.DiffusersRun) -> None:
        load(self)
        with torch.no_grad():
            self._pipe.transformer.single_transformer_blocks[0].attn.norm_k.weight.mul_(1.01)

    monkeypatch.setattr(verify.DiffusersRun, "load_denoiser", changed)
    code, text, _ = run(tiny_artifacts, tiny_checkpoint, "--backend", "torch", "--json")
    failed = names([row for row in json.loads(text)["rows"] if not row["ok"]])
    assert code == 1
    assert {"encode_references, K/V", "first_step, K/V", "cached_step, noise_pred"} <= set(failed)
    assert "text_encoder, encoder_hidden_states" not in failed


def test_memory_is_checked_before_anything_runs(
    tiny_artifacts: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "available_memory", lambda: 100_000)

    def run(*_: Any) -> None:
        pytest.fail("a graph ran before the memory was checked")

    monkeypatch.setattr(verify, "GraphRuns", run)
    with pytest.raises(
        CapacityError,
        match=r"at least 0\.0 GB of host memory for this checkpoint in float32 \(text encoder "
        r"0\.0 GB, then transformer and VAE 0\.0 GB\), 0\.0 GB are free; verify on a larger",
    ):
        verify.verify_artifacts(tiny_artifacts, tiny_checkpoint)


def test_memory_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the headers alone; klein 9B in bfloat16 needs 18.3 GB, in float32 36.7."""
    make_fixture(tmp_path / "9b", "9b-shapes", seed=0)
    for dtype, needed, enough in ((torch.bfloat16, "18.3", 18.4e9), (torch.float32, "36.7", 37e9)):
        monkeypatch.setattr(verify, "available_memory", lambda n=enough: int(n))
        verify._check_memory(tmp_path / "9b", dtype, torch.device("cpu"))
        monkeypatch.setattr(verify, "available_memory", lambda: 17_000_000_000)
        with pytest.raises(CapacityError, match=rf"at least {needed} GB of host .* 17\.0 GB are"):
            verify._check_memory(tmp_path / "9b", dtype, torch.device("cpu"))


def test_checkpoint_that_diffusers_cannot_load(tiny_artifacts: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected one \.safetensors file"):
        verify.verify_artifacts(tiny_artifacts, tiny_checkpoint / "vae")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say what to compare with"),
        (("checkpoint", "--against", "fp32"), "expected one of them"),
        (("checkpoint", "--out", "report.json"), "only --against writes"),
    ],
)
def test_arguments_that_say_nothing_or_too_much(
    options: tuple[str, ...], message: str, tiny_artifacts: Path, run: Run
) -> None:
    code, _, err = run(tiny_artifacts, *options)
    assert code == 1
    assert message in err
