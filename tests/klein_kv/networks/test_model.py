"""The denoiser's description, computed by torch, against diffusers' `Flux2Transformer2DModel`."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2PosEmbed,
)

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.signature import MAX_POSITION
from klein_kv.networks.blocks import rope_tables, timestep_frequencies
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.networks.transformer import (
    StepInputs,
    denoise,
    encode_references,
    transformer_parameters,
)
from klein_kv.schedule import round_to_dtype
from tests.checkpoints import MODELS, randomize
from tests.klein_configs import KLEIN_4B, KLEIN_9B
from tests.tolerances import assert_close

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_module(name: str) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16, joint_attention_dim=24, guidance_embeds=False, **MODELS[name].transformer
    )


@pytest.fixture(scope="module", params=[(n, d) for n in MODELS for d in DTYPES], ids="-".join)
def subject(request: pytest.FixtureRequest) -> tuple[Flux2Transformer2DModel, str]:
    """A transformer with random weights and diffusers' K/V processors, in one precision."""
    name, dtype = request.param
    module = make_module(name)
    randomize(module, torch.Generator().manual_seed(0))
    for block in module.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in module.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return torch.nn.Module.to(module, dtype=DTYPES[dtype]).eval(), dtype


def config_of(module: Flux2Transformer2DModel) -> TransformerConfig:
    return TransformerConfig.from_dict(
        dict(module.config) | {"_class_name": "Flux2Transformer2DModel"}
    )


def random_inputs(dtype: str, batch: int = 2) -> tuple[StepInputs[Any], Any, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(DTYPES[dtype])

    def ids(count: int, high: int) -> Any:
        return torch.randint(0, high, (count, 4), generator=generator)

    # A time that the type holds: the pipeline rounds it, and so does `Schedule.model_timestep`.
    time = round_to_dtype(np.array([0.73], np.float32), dtype)
    time = round_to_dtype(time * np.float32(1000), dtype)
    step = StepInputs(
        hidden_states=normal(batch, 12, 16),
        encoder_hidden_states=normal(batch, 9, 24),
        timestep=torch.from_numpy(time),
        sigma_step=torch.tensor([-0.21]),
        img_ids=ids(12, 20),
        txt_ids=ids(9, 512),
    )
    return step, normal(1, 20, 16), ids(20, 60)


def their_call(module: Flux2Transformer2DModel, step: StepInputs[Any], **options: Any) -> Any:
    inputs: dict[str, Any] = {
        "hidden_states": step.hidden_states,
        "encoder_hidden_states": step.encoder_hidden_states,
        "timestep": (step.timestep / 1000)
        .to(step.hidden_states.dtype)
        .expand(len(step.hidden_states)),
        "img_ids": step.img_ids[None],
        "txt_ids": step.txt_ids[None],
        "return_dict": False,
    }
    with torch.no_grad():
        return module(**(inputs | options))


@torch.no_grad()
def test_both_functions(subject: tuple[Flux2Transformer2DModel, str]) -> None:
    """Extract, cached and plain calls of diffusers, and the keys and values between them."""
    module, dtype = subject
    config = config_of(module)
    ops = TorchOps(module.state_dict(), DTYPES[dtype])
    step, ref, ref_ids = random_inputs(dtype)
    tokens = torch.cat([ref.expand(2, -1, -1), step.hidden_states], dim=1)
    ids = torch.cat([ref_ids, step.img_ids])[None]
    noise_pred, cache = their_call(
        module,
        step,
        hidden_states=tokens,
        img_ids=ids,
        kv_cache_mode="extract",
        num_ref_tokens=20,
    )

    kv = encode_references(ops, config, ref, ref_ids)
    layers = [*cache.double_block_caches, *cache.single_block_caches]
    expected = [x for layer in layers for x in (layer.k_ref, layer.v_ref)]
    for mine, other in zip(kv, expected, strict=True):
        assert mine.dtype == DTYPES[dtype]
        assert_close("torch encode_references", dtype, mine, other[:1])

    ours, latents = denoise(ops, config, step, kv)
    assert_close("torch denoise", dtype, ours, noise_pred, "extract")
    change = (ours.float() * step.sigma_step).to(ours.dtype)
    expected_latents = (step.hidden_states.float() + change.float()).to(ours.dtype)
    assert torch.equal(latents, expected_latents)

    (cached,) = their_call(module, step, kv_cache=cache, kv_cache_mode="cached")
    assert_close("torch denoise", dtype, ours, cached, "cached")

    turned = encode_references(ops, config, ref.flip(1), ref_ids)
    assert any((a != b).any() for a, b in zip(kv, turned, strict=True)), "order matters"

    (plain,) = their_call(module, step)
    ours, _ = denoise(ops, config, step, [x[:, :0] for x in kv])
    assert_close("torch denoise", dtype, ours, plain, "R = 0")


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_rope_tables_are_the_modules(name: str) -> None:
    """Tables bit for bit: positions up to 4,095 leave no room for another rounding of the angle."""
    with torch.device("meta"):
        module = make_module(name)
    config = config_of(module)
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert transformer_parameters(config) == expected
    embed = Flux2PosEmbed(theta=config.rope_theta, axes_dim=list(config.axes_dims_rope))
    positions = torch.arange(MAX_POSITION)[:, None].expand(-1, 4)
    for tables, other in zip(rope_tables(config), embed(positions), strict=True):
        each = other.numpy()[:, ::2]  # each value stands twice
        np.testing.assert_array_equal(np.concatenate(tables, axis=1), each)


@pytest.mark.parametrize(("config", "billions"), [(KLEIN_9B, 9.08), (KLEIN_4B, 3.88)])
def test_released_models_have_their_size(config: Any, billions: float) -> None:
    shapes = transformer_parameters(config.transformer).values()
    assert sum(int(np.prod(shape)) for shape in shapes) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("channels", [64, 256])
def test_timestep_frequencies_are_diffusers(channels: int) -> None:
    from diffusers.models.embeddings import Timesteps

    embed = Timesteps(num_channels=channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    times = torch.tensor([0.0, 1.0, 250.0, 733.3, 1000.0])
    angles = times[:, None] * torch.from_numpy(timestep_frequencies(channels))
    ours = torch.cat([angles.cos(), angles.sin()], dim=-1)
    assert torch.equal(ours, embed(times))
