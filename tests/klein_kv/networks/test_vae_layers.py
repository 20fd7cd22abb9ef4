"""The VAE's memory, from the shapes of diffusers' modules without data."""

import pytest
import torch
from diffusers import AutoencoderKLFlux2

from klein_kv.networks.vae_layers import vae_scratch


def shapes_of(vae: AutoencoderKLFlux2, part: str) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape)
        for name, value in vae.state_dict().items()
        if name.startswith(f"{part}.")
    }


@pytest.mark.parametrize(
    ("part", "reported"), [("encoder", 813_839_872), ("decoder", 1_350_514_176)]
)
def test_scratch_of_klein_is_what_engines_report(part: str, reported: int) -> None:
    """TensorRT-RTX 1.7.1, one 1024x1024 image in bfloat16."""
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
    size = {"batch": 1, "height": 1024, "width": 1024}
    assert 2 * vae_scratch(shapes_of(vae, part), 4, **size) == pytest.approx(reported, rel=0.02)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_scratch_is_that_of_the_widest_residual_block(part: str) -> None:
    """What torch holds at the first convolution of each: input, the same again, output."""
    config = {
        "block_out_channels": (8, 16, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
    }
    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**config)
    held = []

    def count(_module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        held.append(2 * inputs[0].numel() + output.numel())

    for name, module in vae.named_modules():
        if name.endswith(".conv1"):
            module.register_forward_hook(count)
    with torch.no_grad():
        if part == "encoder":
            vae._encode(torch.zeros(2, 3, 64, 96, device="meta"))
        else:
            vae.decode(torch.zeros(2, vae.config.latent_channels, 16, 24, device="meta"))
    assert vae_scratch(shapes_of(vae, part), 3, batch=2, height=64, width=96) == max(held)
