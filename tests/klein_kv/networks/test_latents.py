"""Latents mixed with an image: diffusers' own words in torch are the judge."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.networks.latents import blend
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.runtime.backends.ort.backend import OrtBackend
from tests.tolerances import assert_close

BATCH, TOKENS, CHANNELS = 2, 12, 128


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = (BATCH, TOKENS, CHANNELS)
    values = {
        "hidden_states": torch.randn(latents, generator=generator),
        "image_latents": torch.randn((1, *latents[1:]), generator=generator),
        "noise": torch.randn(latents, generator=generator),
        "mask": torch.randint(0, 5, (*latents[:2], 1), generator=generator) / 4,
    }
    return {name: x.to(dtype) for name, x in values.items()} | {"sigma": torch.tensor([0.637])}


def theirs(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """`Flux2KleinInpaintPipeline.__call__`, part 7, with its scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.sigmas = scheduler.timesteps = x["sigma"]
    scheduler.set_begin_index(0)
    proper = scheduler.scale_noise(x["image_latents"], x["sigma"], x["noise"])
    return (1 - x["mask"]) * proper + x["mask"] * x["hidden_states"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_equals_diffusers_bit_for_bit(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    ours = blend(TorchOps({}, dtype, device=torch.device("cpu")), **x)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs(x))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_exported_graph(dtype: str, request: pytest.FixtureRequest) -> None:
    name = {"float32": "tiny_artifacts", "float16": "tiny_fp16_artifacts"}[dtype]
    folder: Path = request.getfixturevalue(name)
    backend, x = OrtBackend(folder, Manifest.load(folder), threads=1), inputs(getattr(torch, dtype))
    feeds = {name: backend.upload(tensor.numpy()) for name, tensor in x.items()}
    got = backend.download(backend.run("blend", feeds)["latents"])
    assert got.dtype == NUMPY_DTYPES[dtype]
    assert_close("blend", dtype, got, theirs(x))


@pytest.mark.parametrize(("mask", "kept"), [(0.0, "image_latents"), (1.0, "hidden_states")])
def test_ends_are_exact(mask: float, kept: str) -> None:
    """At the last step, of noise level 0, what is kept is the image itself."""
    x = inputs(torch.bfloat16)
    x |= {"mask": torch.full_like(x["mask"], mask), "sigma": torch.zeros(1)}
    ours = blend(TorchOps({}, torch.bfloat16, device=torch.device("cpu")), **x)
    assert torch.equal(ours, x[kept].expand_as(ours))
