"""The quality report: its parts against other ways to the same numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from klein_kv.artifacts.numbers import QuantizedLinear, fp8_scale, is_block_linear, nvfp4_scale
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES
from klein_kv.artifacts.weights import read_header
from klein_kv.cli import main
from klein_kv.errors import CheckpointError
from klein_kv.export.checks.block_ops import ComparingOps
from klein_kv.export.checks.compare import Difference, compare
from klein_kv.export.checks.quality import (
    QualityReport,
    dict_from_report,
    measure_quality,
    text_from_report,
)
from klein_kv.export.checks.samples import make_samples
from klein_kv.export.quantization.quantized_writer import write_layers
from klein_kv.networks.quantized_torch_ops import QuantizedOps, round_to_fp8, round_to_nvfp4
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.networks.transformer import StepInputs, denoise, encode_references
from tests.checkpoints import MODELS, randomize
from tests.klein_kv.networks.test_model import config_of, random_inputs, their_call

PRECISIONS = ("fp8", "nvfp4", "fp8-weight-only")
SAMPLES = make_samples(1, size=(128, 128), seed=1000)


@pytest.fixture(scope="module")
def reports(quantized_bf16_artifacts: Path, tiny_checkpoint: Path) -> dict[str, QualityReport]:
    folder, options = quantized_bf16_artifacts, {"checkpoint": tiny_checkpoint, "text_tokens": 32}
    return {name: measure_quality(folder, name, SAMPLES, **options) for name in PRECISIONS}


# --- the simulation against diffusers' own modules ---


def module_of(name: str) -> Flux2Transformer2DModel:
    module = Flux2Transformer2DModel(
        in_channels=16, joint_attention_dim=32, guidance_embeds=False, **MODELS[name].transformer
    )
    randomize(module, torch.Generator().manual_seed(0))
    return module.eval()


def quantized_layers(
    module: Flux2Transformer2DModel, folder: Path, kind: str, activations: bool
) -> dict[str, QuantizedLinear]:
    from safetensors.torch import save_file

    save_file(module.state_dict(), folder / "weights.safetensors")
    sources = {
        name: (kind, ref)
        for name, ref in read_header(folder / "weights.safetensors").items()
        if is_block_linear(name, ref.shape) and ref.shape[1] % 16 == 0
    }
    scales = write_layers(folder / "quantized.safetensors", sources)
    refs = read_header(folder / "quantized.safetensors", quantized=True)
    scale_of = fp8_scale if kind == "fp8" else nvfp4_scale
    return {
        name: QuantizedLinear(
            kind,
            refs[name],
            scales[name],
            refs.get(name + BLOCK_SCALES),
            scale_of(4.0 + 0.1 * i) if activations else None,  # some values saturate
        )
        for i, name in enumerate(sources)
    }


def step_inputs(batch: int = 2) -> tuple[StepInputs[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random inputs whose text is 32 wide, and references."""
    step, ref, ref_ids = random_inputs("float32", batch=batch)
    text = torch.cat([step.encoder_hidden_states] * 2, -1)[..., :32]
    return replace(step, encoder_hidden_states=text), ref, ref_ids


@pytest.mark.parametrize(
    ("model", "kind", "activations"),
    [
        ("sharded", "fp8", True),
        ("sharded", "nvfp4", False),
        ("short", "nvfp4", True),
        ("short", "fp8", False),
    ],
)
@torch.no_grad()
def test_the_simulation_is_diffusers_with_rounded_layers(
    tmp_path: Path, model: str, kind: str, activations: bool
) -> None:
    """diffusers' transformer whose modules got the rounded weights and round their input."""
    module = module_of(model)
    layers = quantized_layers(module, tmp_path, kind, activations)
    assert len(layers) >= 6
    config = config_of(module)
    step, ref, ref_ids = step_inputs()
    plain = TorchOps({name: x.clone() for name, x in module.state_dict().items()}, torch.float32)
    ops = QuantizedOps(plain.weights, torch.float32, layers)
    ours, _ = denoise(
        ops, config, step, [x[:, :0] for x in encode_references(ops, config, ref, ref_ids)]
    )
    unquantized, _ = denoise(
        plain, config, step, [x[:, :0] for x in encode_references(plain, config, ref, ref_ids)]
    )
    for name, layer in layers.items():
        child = module.get_submodule(name.removesuffix(".weight"))
        child.weight.copy_(torch.from_numpy(layer.dequantize()))
        scale = layer.input_scale
        if scale is not None:
            rounding = round_to_fp8 if kind == "fp8" else round_to_nvfp4

            def hook(_: Any, arguments: Any, rounding: Any = rounding, scale: float = scale) -> Any:
                return (rounding(arguments[0], scale),)

            child.register_forward_pre_hook(hook)
    (theirs,) = their_call(module, step)
    assert compare(ours, theirs).snr > 100  # 133 measured: float32 itself
    assert compare(ours, unquantized).snr < 50


@pytest.mark.parametrize("model", list(MODELS))
@torch.no_grad()
def test_blocks_are_those_of_diffusers(model: str) -> None:
    module = module_of(model)
    step, _, _ = step_inputs(1)
    outputs: dict[str, Any] = {}
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        for i, block in enumerate(getattr(module, kind)):
            name = f"{kind}.{i}"
            block.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    their_call(module, step)
    config = config_of(module)
    empty = torch.zeros(1, 0, config.num_attention_heads, config.attention_head_dim)
    blocks: dict[str, torch.Tensor] = {}
    same = QuantizedOps(module.state_dict(), torch.float32, {})
    ops = ComparingOps(
        module.state_dict(), same, same, {}, lambda block, rows, *_: blocks.update({block: rows})
    )
    denoise(ops, config, step, [empty] * (2 * config.num_blocks))
    assert list(blocks) == list(outputs)
    for name, ours in blocks.items():
        theirs = outputs[name]
        if name.startswith("transformer_blocks"):
            expected = torch.cat([theirs[1], theirs[0]], dim=1)[0]  # image, then text
        else:
            expected = theirs[0]
            if name == list(blocks)[-1]:
                expected = expected[step.encoder_hidden_states.shape[1] :]  # only the image goes on
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_fault_shows_in_its_own_block_alone() -> None:
    module = module_of("plain")
    config = config_of(module)
    step, ref, ref_ids = step_inputs(1)
    weights = dict(module.state_dict())
    kv = encode_references(TorchOps(weights, torch.float32), config, ref, ref_ids)
    floor = TorchOps({name: x.bfloat16() for name, x in weights.items()}, torch.bfloat16)
    for faulty in ("transformer_blocks.1", "single_transformer_blocks.1"):
        wrong = {
            name: 2 * x if name.startswith(faulty) and "to_out" in name else x
            for name, x in weights.items()
        }
        errors: dict[str, tuple[float, float]] = {}

        def note(
            block: str, judge: Any, floor: Any, subject: Any, errors: dict[str, Any] = errors
        ) -> None:
            errors[block] = compare(subject, judge).snr, compare(floor, judge).snr

        subject = QuantizedOps(wrong, torch.float32, {})
        denoise(ComparingOps(weights, floor, subject, {}, note), config, step, kv)
        assert len(errors) == 5
        assert [name for name, (snr, _) in errors.items() if snr < 60] == [faulty]
        assert errors[faulty][0] < 30
        assert all(30 < bf16 < 60 for _, bf16 in errors.values())


def test_layers_are_compared_with_their_own_weights(tmp_path: Path) -> None:
    module = module_of("sharded")
    layers = quantized_layers(module, tmp_path, "fp8", activations=False)
    name = "transformer_blocks.0.attn.to_q.weight"
    errors: dict[str, Difference] = {}
    weights = dict(module.state_dict())
    subject = QuantizedOps(weights, torch.float32, {name: layers[name]})
    twice = {name: 2 * x for name, x in weights.items()}
    ops = ComparingOps(twice, subject, subject, errors, lambda *_: None)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    out = torch.cat([ops.linear(x, name, (0, 30)), ops.linear(x, name, (30, 64))], dim=1)
    torch.testing.assert_close(out, 2 * x @ weights[name].T)  # the judge's weights are others
    expected = compare(subject.linear(x, name), x @ weights[name].T)
    assert errors[name].snr == pytest.approx(expected.snr, abs=1e-3)
    ops.linear(x, "transformer_blocks.0.attn.to_k.weight")
    assert list(errors) == [name]


# --- the report ---


def test_layers_lose_what_rounding_explains(reports: dict[str, QualityReport]) -> None:
    """Bounds around what was measured; the middle of them is what theory gives for a Gaussian."""
    expected = {"fp8": (26, 31), "nvfp4": (15, 20), "fp8-weight-only": (29, 34)}
    for precision, report in reports.items():
        assert not report.failed
        low, high = expected[precision]
        transformer = [x for name, x in report.layers.items() if "transformer_blocks" in name]
        assert len(transformer) == 16
        assert all(low < error.snr < high for error in transformer), precision
        assert len(report.layers) == 16 + 27 * 7


def test_precisions_are_ranked_and_above_them_is_bf16(reports: dict[str, QualityReport]) -> None:
    assert (len(reports["fp8"].blocks), len(reports["fp8"].ends)) == (3, 6)
    rows = [reports[name].blocks | reports[name].ends for name in PRECISIONS]
    for name in rows[0]:
        fp8, nvfp4, only = (x[name] for x in rows)
        assert fp8.subject.snr < only.subject.snr < only.floor.snr, name
        if name != "text embeddings":  # fp8 in both
            assert nvfp4.subject.snr < fp8.subject.snr, name
        assert fp8.floor.snr == nvfp4.floor.snr == only.floor.snr


def test_images(reports: dict[str, QualityReport]) -> None:
    for report in reports.values():
        ((subject, floor),) = report.images.values()
        assert floor.psnr > max(45, subject.psnr)
        assert subject.psnr > 25
        assert 0.9 < subject.ssim < floor.ssim <= 1
        assert floor.ssim > 0.99


def test_float8_keys_and_attention_cost_a_little_more(quantized_bf16_artifacts: Path) -> None:
    options: list[dict[str, bool]] = [{}, {"kv": True}, {"attention": True}]
    reports = [
        measure_quality(quantized_bf16_artifacts, "fp8", SAMPLES, text_tokens=32, **x)
        for x in options
    ]
    assert (reports[0].reference, reports[0].samples) == ("the artifacts' own weights", 1)
    plain, *others = (
        {name: errors.subject.snr for name, errors in report.ends.items()} for report in reports
    )
    keys, latents = "reference keys and values", "latents after step 4"
    for other in others:
        assert other["text embeddings"] == plain["text embeddings"]
        assert other[keys] < plain[keys] - 0.3
        assert other[latents] != plain[latents]
        assert other[latents] > plain[latents] - 6


def test_text_and_json(reports: dict[str, QualityReport]) -> None:
    report = reports["nvfp4"]
    value = json.loads(json.dumps(dict_from_report(report), allow_nan=False))
    assert value["ok"] is True
    assert len(value["layers"]) == len(report.layers)
    assert [row["name"] for row in value["blocks"]] == list(report.blocks)
    assert set(value["blocks"][0]) == set(value["end_to_end"][0])
    assert set(value["end_to_end"][0]) == {"name", "nvfp4 to fp32", "bf16 to fp32"}
    assert value["layers"][0]["least_snr"] == pytest.approx(8, abs=0.01)
    assert {image["pair"] for image in value["images"]} == {"nvfp4 to fp32", "bf16 to fp32"}
    text = text_from_report(report)
    worst = min(report.layers, key=lambda name: report.layers[name].snr)
    for name in (*report.blocks, *report.ends, *report.images, worst):
        assert f"\n{name} " in text
    assert "FAILED" not in text


def test_command_line(
    quantized_bf16_artifacts: Path,
    tiny_bf16_artifacts: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, size = quantized_bf16_artifacts, ("--size", "128x128", "--samples", "1", "--json")
    assert call("verify", folder, tiny_checkpoint, "--precision", "fp8", *size) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["ok"]
    assert value["reference"] == str(tiny_checkpoint)
    assert call("verify", folder, "--precision", "int8") == 1
    assert "hold no precision 'int8'" in capsys.readouterr().err
    assert call("quantize", folder) == 1
    assert "--recipe fp8" in capsys.readouterr().err
    copy = shutil.copytree(tiny_bf16_artifacts, tmp_path / "copy")
    assert call("quantize", copy, "--recipe", "fp8-weight-only", *size) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["precision"] == "fp8-weight-only"
    assert value["components"]["transformer"]["layers"] == 16


def call(*argv: object) -> int:
    return main([str(x) for x in argv])


def test_refuses_a_checkpoint_that_is_none(quantized_bf16_artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected one \.safetensors file"):
        measure_quality(quantized_bf16_artifacts, "fp8", SAMPLES, checkpoint=tmp_path)
