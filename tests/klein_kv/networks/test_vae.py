"""The VAE's description, computed by torch, against diffusers' `AutoencoderKLFlux2`."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

from klein_kv.artifacts.config import VaeConfig
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.networks.vae import vae_decoder, vae_encoder, vae_parameters, vae_scratch
from klein_kv.runtime.backends.pytorch import graphs
from tests.checkpoints import randomize
from tests.klein_configs import KLEIN_9B
from tests.tolerances import assert_close

NARROW: dict[str, Any] = {
    "block_out_channels": (8, 16, 64),
    "decoder_block_out_channels": (16, 8, 24),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 8,
    "latent_channels": 6,
}


def on_meta(**options: Any) -> AutoencoderKLFlux2:
    with torch.device("meta"):
        return AutoencoderKLFlux2(**options)


def config_of(vae: AutoencoderKLFlux2) -> VaeConfig:
    return VaeConfig.from_dict(json.loads(vae.to_json_string()))


def narrow_vae(dtype: str) -> tuple[AutoencoderKLFlux2, TorchOps, VaeConfig]:
    """diffusers' module with random weights in a type, and the same weights for the description."""
    vae = AutoencoderKLFlux2(**NARROW).eval().requires_grad_(False)
    randomize(vae, torch.Generator().manual_seed(0))
    torch.nn.Module.to(vae, getattr(torch, dtype))
    return vae, TorchOps(vae.state_dict(), getattr(torch, dtype)), config_of(vae)


@pytest.mark.parametrize("options", [{}, NARROW], ids=["klein", "narrow decoder"])
def test_parameters_are_those_of_the_module(options: dict[str, Any]) -> None:
    vae = on_meta(**options)
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    del shapes["bn.num_batches_tracked"]  # which nothing reads
    assert vae_parameters(config_of(vae)) == shapes


@pytest.mark.parametrize(
    ("graph", "reported"), [("vae_encoder", 813_839_872), ("vae_decoder", 1_350_514_176)]
)
def test_scratch_of_klein_is_what_engines_report(graph: str, reported: int) -> None:
    """TensorRT-RTX 1.7.1, one 1024x1024 image in bfloat16."""
    size = {"batch": 1, "height": 1024, "width": 1024}
    assert 2 * vae_scratch(KLEIN_9B.vae, graph, **size) == pytest.approx(reported, rel=0.02)


@pytest.mark.parametrize("graph", ["vae_encoder", "vae_decoder"])
def test_scratch_is_that_of_the_widest_residual_block(graph: str) -> None:
    """What torch holds at the first convolution of each: input, the same again, output."""
    vae = on_meta(**NARROW)
    held = []

    def count(_module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        held.append(2 * inputs[0].numel() + output.numel())

    for name, module in vae.named_modules():
        if name.endswith(".conv1"):
            module.register_forward_hook(count)
    with torch.no_grad():
        if graph == "vae_encoder":
            vae._encode(torch.zeros(2, 3, 64, 96, device="meta"))
        else:
            vae.decode(torch.zeros(2, vae.config.latent_channels, 16, 24, device="meta"))
    assert vae_scratch(config_of(vae), graph, batch=2, height=64, width=96) == max(held)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_as_the_module_computes_it_in_its_type(dtype: str) -> None:
    vae, ops, config = narrow_vae(dtype)
    image = torch.randint(256, (1, 48, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        pixels = (image.permute(0, 3, 1, 2) / 255 * 2 - 1).to(ops.dtype)
        mode = vae.encode(pixels).latent_dist.mode()
        tokens = ((Flux2KleinPipeline._patchify_latents(mode) - mean) / std).permute(0, 2, 3, 1)
        assert_close("vae_encoder", dtype, vae_encoder(ops, config, image), tokens)
        latents = Flux2KleinPipeline._unpatchify_latents(tokens.permute(0, 3, 1, 2) * std + mean)
        sample = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        assert_close("sample", dtype, vae_decoder(ops, config, tokens)[1], sample)


def test_decodes_one_image_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes the memory of one image."""
    _, ops, config = narrow_vae("float32")
    latents = torch.randn(3, 4, 5, config.token_channels)
    whole = vae_decoder(ops, config, latents)
    sizes, conv2d = set(), TorchOps.conv2d

    def count(self: TorchOps, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        sizes.add(len(x))
        return conv2d(self, x, *args, **options)

    monkeypatch.setattr(TorchOps, "conv2d", count)
    model = SimpleNamespace(vae=config)
    outputs = graphs.make_graph("vae_decoder", model, ops)({"latents": latents})
    assert sizes == {1}
    for name, expected in zip(("image", "sample"), whole, strict=True):
        assert outputs[name].shape == expected.shape
    assert_close("sample", "float32", outputs["sample"], whole[1])
    assert_close("pixels", "float32", outputs["image"], whole[0])
