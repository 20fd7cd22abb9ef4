"""The VAE's arithmetic against torch's own counter, over diffusers' modules without data."""

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from torch.utils.flop_counter import FlopCounterMode

from klein_kv.networks.vae_layers import vae_operations, vae_scratch

CONFIGS = {
    "klein": {},
    "narrow": {"block_out_channels": (16, 16, 24, 24), "norm_num_groups": 8, "layers_per_block": 1},
    "three levels": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
    },
}


def shapes_of(vae: AutoencoderKLFlux2, part: str) -> dict[str, tuple[int, ...]]:
    names = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
    return {
        name: tuple(value.shape)
        for name, value in vae.state_dict().items()
        if name.startswith(names[part])
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_operations_are_what_torch_counts(name: str, part: str) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**CONFIGS[name])
    levels = len(vae.config.block_out_channels)
    size = {"batch": 2, "height": 64, "width": 96}
    scale = 2 ** (levels - 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if part == "encoder":
            vae._encode(torch.zeros(2, 3, 64, 96, device="meta"))
        else:
            latents = (2, vae.config.latent_channels, 64 // scale, 96 // scale)
            vae.decode(torch.zeros(latents, device="meta"))
    ours = vae_operations(shapes_of(vae, part), levels, **size)
    assert ours.total == counter.get_total_flops()
    assert ours.attention > 0
    assert ours.linears == 0


def test_scratch_of_klein_is_what_engines_report() -> None:
    """TensorRT-RTX 1.7.1, one 1024x1024 image in bfloat16: 813,839,872 and 1,350,514,176 bytes."""
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
    size = {"batch": 1, "height": 1024, "width": 1024}
    for part, reported in (("encoder", 813_839_872), ("decoder", 1_350_514_176)):
        assert 2 * vae_scratch(shapes_of(vae, part), 4, **size) == pytest.approx(reported, rel=0.02)
