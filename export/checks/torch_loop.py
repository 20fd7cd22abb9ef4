"""The whole way of a request in torch: prompt, references, first step, cached steps.

Written over `Ops`, so that the same loop calibrates (`calibration`), simulates quantized layers
(`quantized_torch_ops`) and gives the reference in float32. It is the runtime's loop on purpose:
ranges of layers are those of real requests.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.pixels import prepare_reference
from klein_kv.artifacts.positions import grid_ids, reference_ids, text_ids
from klein_kv.errors import RequestError
from klein_kv.export.checks.float_vae import FloatVae
from klein_kv.export.checks.samples import Sample
from klein_kv.networks.text_encoder import encode_text
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.networks.transformer import (
    StepInputs,
    denoise,
    denoise_with_references,
    encode_references,
)
from klein_kv.runtime.inputs.noise import initial_noise
from klein_kv.runtime.inputs.prompts import PromptTokenizer
from klein_kv.schedule import Schedule, make_schedule

__all__ = ["LoopRequest", "encode_prompt", "prepare_request", "reference_kv", "run_loop"]


@dataclass(frozen=True, slots=True)
class LoopRequest:
    """A sample as the transformer reads it, of batch 1 and in float32."""

    noise: torch.Tensor  # [1, S, C]
    grid: tuple[int, int]  # height and width of the output in tokens
    references: torch.Tensor  # tokens of the reference images [1, R, C]
    reference_ids: torch.Tensor  # their positions, int64 [R, 4]
    schedule: Schedule


def prepare_request(
    sample: Sample, manifest: Manifest, vae: FloatVae, steps: int = 4
) -> LoopRequest:
    """Encodes the images with the VAE and draws the noise.

    Both are rounded to the artifacts' type, as the runtime does: whatever type they are computed
    in, all runs of a request begin with the same numbers.

    Raises:
        RequestError: an output size that is no multiple of a token's.
    """
    unit = manifest.config.vae.multiple_of
    if sample.height % unit or sample.width % unit:
        raise RequestError(
            f"output size is {sample.width}x{sample.height}, expected multiples of {unit}"
        )
    grid = sample.height // unit, sample.width // unit
    channels = manifest.config.transformer.in_channels
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    noise = initial_noise((1, channels, *grid), seed=sample.seed)
    tokens, grids = [torch.zeros((1, 0, channels))], []
    for image in sample.images:
        encoded = vae.encode(prepare_reference(image, unit))
        grids.append((encoded.shape[1], encoded.shape[2]))
        tokens.append(_rounded(encoded.reshape(1, -1, encoded.shape[-1]), dtype))
    positions = reference_ids(grids) if grids else np.zeros((0, 4), np.int64)
    return LoopRequest(
        noise=_rounded(noise.reshape(1, channels, -1).transpose(0, 2, 1), dtype),
        grid=grid,
        references=torch.cat(tokens, dim=1),
        reference_ids=torch.from_numpy(positions),
        schedule=make_schedule(manifest.scheduler, steps, grid[0] * grid[1]),
    )


def _rounded(array: NDArray[np.float32], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(dtype).float()


def encode_prompt(
    ops: TorchOps, artifacts: Path, manifest: Manifest, prompt: str, text_tokens: int = 512
) -> torch.Tensor:
    """Text embeddings [1, T, D] in the type of `ops`."""
    tokenizer = PromptTokenizer(artifacts / "tokenizer", manifest.prompt)
    ids, mask = (torch.from_numpy(x).to(ops.device) for x in tokenizer([prompt], text_tokens))
    return encode_text(ops, manifest.config.text_encoder, ids, mask)


def reference_kv(ops: TorchOps, manifest: Manifest, request: LoopRequest) -> list[torch.Tensor]:
    """Keys and values of the references; an empty list where the weights are plain."""
    net = manifest.config.transformer
    if manifest.variant != "kv":
        return []
    tokens = request.references.to(ops.device, ops.dtype)
    if not tokens.shape[1]:
        empty = tokens.new_zeros((1, 0, net.num_attention_heads, net.attention_head_dim))
        return [empty] * (2 * net.num_blocks)
    return encode_references(ops, net, tokens, request.reference_ids.to(ops.device))


def run_loop(
    ops: TorchOps,
    manifest: Manifest,
    request: LoopRequest,
    text: torch.Tensor,
    kv: Sequence[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Latents [1, S, C] after each step, in the type of `ops`.

    The model's time is rounded as the artifacts' type has it, which belongs to the model: in
    bfloat16 it moves by up to 4 of 1000. `text` is from `encode_prompt`, `kv` from `reference_kv`.
    """
    device, dtype, net = ops.device, ops.dtype, manifest.config.transformer
    schedule, latents = request.schedule, request.noise
    for step in range(schedule.num_steps):
        inputs = StepInputs(
            hidden_states=latents.to(device, dtype),
            encoder_hidden_states=text.to(device, dtype),
            timestep=torch.tensor([schedule.model_timestep(step, manifest.dtype)], device=device),
            sigma_step=torch.from_numpy(schedule.sigma_steps[step : step + 1].copy()).to(device),
            img_ids=torch.from_numpy(grid_ids(*request.grid)).to(device),
            txt_ids=torch.from_numpy(text_ids(text.shape[1])).to(device),
        )
        if kv:
            _, latents = denoise(ops, net, inputs, [x.to(device, dtype) for x in kv])
        else:
            tokens, ids = request.references.to(device, dtype), request.reference_ids.to(device)
            _, latents = denoise_with_references(ops, net, inputs, tokens, ids)
        yield latents
