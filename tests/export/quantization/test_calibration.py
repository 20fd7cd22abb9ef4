"""Ranges of activations, against what diffusers' and transformers' own modules read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import is_block_linear
from klein_kv.errors import CheckpointError, RequestError
from klein_kv.export.checks.artifact_weights import (
    MappedWeights,
    component_parameters,
    component_weights,
)
from klein_kv.export.checks.float_vae import FloatVae
from klein_kv.export.checks.samples import Sample, make_samples
from klein_kv.export.checks.torch_loop import (
    encode_prompt,
    prepare_request,
    reference_kv,
    run_loop,
)
from klein_kv.export.quantization.calibration import Ranges, calibrate
from klein_kv.networks.torch_ops import TorchOps

TOKENS = 48
SAMPLES = make_samples(3, size=(160, 128))


def torch_ops(folder: Path, manifest: Manifest, component: str) -> TorchOps:
    return TorchOps(MappedWeights(component_weights(folder, manifest, component)), torch.float32)


def block_linears(manifest: Manifest) -> dict[str, list[str]]:
    return {
        component: [
            name
            for name, shape in component_parameters(manifest.config, component).items()
            if is_block_linear(name, shape)
        ]
        for component in ("transformer", "text_encoder")
    }


@pytest.fixture(scope="module")
def ranges(tiny_artifacts: Path) -> dict[str, Ranges]:
    manifest = Manifest.load(tiny_artifacts)
    return calibrate(
        tiny_artifacts,
        manifest,
        SAMPLES,
        block_linears(manifest),
        percentiles=True,
        device="cpu",
        text_tokens=TOKENS,
    )


@torch.no_grad()
def watch_diffusers(pipe: Any, samples: list[Sample]) -> dict[str, float]:
    """Largest magnitude that each linear module of diffusers' pipeline reads in these requests.

    Of the last block's output projection only the image's rows, which are the last: nobody reads
    the others, and they are not computed here.
    """
    largest: dict[str, float] = {}
    last = f"single_transformer_blocks.{pipe.transformer.config.num_single_layers - 1}.attn.to_out"
    image_tokens = 0
    hooks = []
    linears = {
        name: child
        for module in (pipe.transformer, pipe.text_encoder)
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear)
    }
    for name, child in linears.items():

        def hook(_: Any, arguments: tuple[Any, ...], name: str = name) -> None:
            rows = arguments[0][:, -image_tokens:] if name == last else arguments[0]
            key = f"{name}.weight"
            largest[key] = max(largest.get(key, 0.0), float(rows.abs().max()))

        hooks.append(child.register_forward_pre_hook(hook))
    try:
        for sample in samples:
            image_tokens = sample.height * sample.width // (2 * pipe.vae_scale_factor) ** 2
            pipe(
                prompt=sample.prompt,
                image=list(sample.images) or None,
                width=sample.width,
                height=sample.height,
                generator=torch.Generator().manual_seed(sample.seed),
                max_sequence_length=TOKENS,
                output_type="latent",
            )
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def test_ranges_are_those_of_diffusers(
    ranges: dict[str, Ranges], tiny_artifacts: Path, tiny_theirs: Any
) -> None:
    """Of all linear layers of the blocks, and of nothing else."""
    theirs = watch_diffusers(tiny_theirs, SAMPLES)
    names = block_linears(Manifest.load(tiny_artifacts))
    assert len(names["transformer"]) == 16
    for component, expected in names.items():
        assert set(ranges[component].inputs) == set(expected)
        for name, value in ranges[component].inputs.items():
            assert value == pytest.approx(theirs[name], rel=1e-3), name
    assert ranges["text_encoder"].attention == {}


def test_the_loop_is_the_pipelines(
    ranges: dict[str, Ranges], tiny_artifacts: Path, tiny_ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images; and the largest keys and values seen on the way are calibration's."""
    manifest = Manifest.load(tiny_artifacts)
    seen = {"k": 0.0, "v": 0.0}
    vae = FloatVae(tiny_artifacts, manifest)
    text_ops = torch_ops(tiny_artifacts, manifest, "text_encoder")
    ops = torch_ops(tiny_artifacts, manifest, "transformer")
    attention = ops.attention

    def watching(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        for name, x in (("k", k), ("v", v)):
            seen[name] = max(seen[name], float(x.abs().max()))
        return attention(q, k, v, mask)

    monkeypatch.setattr(ops, "attention", watching)
    for sample in SAMPLES:
        request = prepare_request(sample, manifest, vae)
        with torch.inference_mode():
            text = encode_prompt(text_ops, tiny_artifacts, manifest, sample.prompt, TOKENS)
            kv = reference_kv(ops, manifest, request)
            *_, latents = run_loop(ops, manifest, request, text, kv)
        image = tiny_ours(
            prompt=sample.prompt,
            image=list(sample.images) or None,
            width=sample.width,
            height=sample.height,
            seed=sample.seed,
            max_sequence_length=TOKENS,
            output_type="np",
        ).images
        decoded = vae.decode(latents.reshape(1, *request.grid, -1).numpy())
        assert np.abs(decoded.astype(float) - np.round(image * 255)).max() <= 1
    own = ranges["transformer"].attention
    assert len(own) == 3
    for part in "kv":
        assert max(block[part] for block in own.values()) == pytest.approx(seen[part], rel=1e-5)


def test_percentiles(ranges: dict[str, Ranges]) -> None:
    own = ranges["transformer"]
    for name, counts in own.histograms.items():
        whole = own.input_range(name)
        cut = [own.input_range(name, p) for p in (99.0, 99.9, 99.99, 100.0)]
        assert cut == sorted(cut)
        assert cut[-1] == whole == own.inputs[name]
        assert 0 < cut[0] < whole
        assert counts.sum() > 1000
    exact = Ranges(inputs={"w": 1000.0}, histograms={"w": np.zeros(1 << 15, np.int64)})
    bits = np.linspace(1, 1000, 1000, dtype=np.float32).view(np.int32) >> 16
    np.add.at(exact.histograms["w"], bits, 1)
    for percent in (91.0, 95.0, 99.0):
        assert 10 * percent <= exact.input_range("w", percent) <= 10 * percent * (1 + 1 / 64)


def test_the_text_encoder_alone(tiny_bf16_artifacts: Path) -> None:
    manifest = Manifest.load(tiny_bf16_artifacts)
    names = {"text_encoder": ["model.layers.3.mlp.up_proj.weight"]}
    text_ranges = calibrate(
        tiny_bf16_artifacts, manifest, SAMPLES[:1], names, device="cpu", text_tokens=16
    )
    assert list(text_ranges) == ["text_encoder"]
    assert list(text_ranges["text_encoder"].inputs) == names["text_encoder"]


def test_values_that_are_not_finite_are_named(
    tiny_bf16_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(tiny_bf16_artifacts)
    broken = torch.full((16, 32), torch.nan, dtype=torch.bfloat16)
    monkeypatch.setattr(TorchOps, "embedding", lambda *_: broken)
    names = {"text_encoder": ["model.layers.0.self_attn.q_proj.weight"]}
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj.*not finite"):
        calibrate(tiny_bf16_artifacts, manifest, SAMPLES[:1], names, text_tokens=16)


def test_sizes_that_are_no_whole_tokens(tiny_artifacts: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
    with pytest.raises(RequestError, match="expected multiples of 16"):
        prepare_request(Sample("x", (), 130, 128, 0), manifest, FloatVae(tiny_artifacts, manifest))


def test_the_vae_of_narrow_artifacts_in_float32(
    tiny_artifacts: Path, tiny_bf16_artifacts: Path
) -> None:
    folders = (tiny_artifacts, tiny_bf16_artifacts)
    vaes = [FloatVae(folder, Manifest.load(folder)) for folder in folders]
    (image,) = SAMPLES[0].images
    tokens = [vae.encode(np.asarray(image)[None]) for vae in vaes]
    assert tokens[0].shape == (1, 8, 10, 128)
    assert tokens[1].dtype == np.float32
    np.testing.assert_allclose(tokens[1], tokens[0], atol=0.06)  # its weights were rounded
    assert np.abs(tokens[1] - tokens[0]).max() > 0
    pixels = [vae.decode(tokens[0]).astype(float) for vae in vaes]
    assert np.abs(pixels[0] - pixels[1]).max() <= 4
