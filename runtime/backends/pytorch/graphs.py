"""The graphs of `artifacts.signature` as functions of torch tensors: no files, no device policy.

The networks are those of `klein_kv.networks`, computed by `TorchOps`.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial

import torch

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import KVFormat, kv_names
from klein_kv.networks.kv_float8 import dequantize_references, quantize_references
from klein_kv.networks.latents import blend
from klein_kv.networks.merge import merge_lora
from klein_kv.networks.text_encoder import encode_text
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.networks.transformer import (
    StepInputs,
    denoise,
    denoise_with_references,
    encode_references,
)
from klein_kv.networks.vae import vae_decoder, vae_encoder

__all__ = ["Graph", "make_graph"]

Inputs = Mapping[str, torch.Tensor]
Outputs = dict[str, torch.Tensor]

Graph = Callable[[Inputs], Outputs]
"""Inputs of a graph's signature by name -> its outputs by name, on the same device."""


def make_graph(
    graph: str, config: ModelConfig, ops: TorchOps, kv_dtype: str | None = None
) -> Graph:
    """One of `GraphSet.files`, on the weights of its component that `ops` holds.

    Keys and values are handed on in `kv_dtype`: `KVFormat.FP8_PER_HEAD`, or None for the graph's.
    """
    other = _OTHERS.get(graph)
    if other is not None:
        return partial(other, config, ops)
    return partial(_transformer, graph, config, ops, kv_dtype)


def _transformer(
    graph: str, config: ModelConfig, ops: TorchOps, kv_dtype: str | None, x: Inputs
) -> Outputs:
    """`first_step`, `cached_step`, `encode_references` or `plain_step`."""
    net = config.transformer
    names = kv_names(net.num_blocks, kv_dtype)
    packed = kv_dtype == KVFormat.FP8_PER_HEAD

    def encode() -> Outputs:
        kv = encode_references(ops, net, x["ref_hidden_states"], x["ref_ids"])
        return dict(zip(names, quantize_references(ops, kv) if packed else kv, strict=True))

    if graph == "encode_references":
        return encode()
    step = StepInputs(**{field.name: x[field.name] for field in fields(StepInputs)})
    made: Outputs = {}
    if graph == "plain_step":
        references = x["ref_hidden_states"], x["ref_ids"]
        noise_pred, latents = denoise_with_references(ops, net, step, *references)
    else:
        made = encode() if graph == "first_step" else {}
        held = made or x
        # Without references blocks do without, rather than join an empty tensor to each.
        kv = [held[name] for name in names] if held[names[0]].shape[1] else []
        kv = dequantize_references(ops, kv) if packed else kv
        noise_pred, latents = denoise(ops, net, step, kv)
    return {"noise_pred": noise_pred, "latents": latents, **made}


def _text_encoder(config: ModelConfig, ops: TorchOps, x: Inputs) -> Outputs:
    states = encode_text(ops, config.text_encoder, x["input_ids"], x["attention_mask"])
    return {"encoder_hidden_states": states}


def _vae_encoder(config: ModelConfig, ops: TorchOps, x: Inputs) -> Outputs:
    return {"ref_hidden_states": vae_encoder(ops, config.vae, x["image"]).contiguous()}


def _vae_decoder(config: ModelConfig, ops: TorchOps, x: Inputs) -> Outputs:
    # One image of a batch at a time: memory of one.
    results = [vae_decoder(ops, config.vae, one) for one in torch.split(x["latents"], 1)]
    images, samples = zip(*results, strict=True)
    return {"image": torch.cat(images).contiguous(), "sample": torch.cat(samples)}


def _merge_lora(_config: ModelConfig, ops: TorchOps, x: Inputs) -> Outputs:
    merged, largest = merge_lora(ops, **x)
    return {"merged": merged, "largest": largest}


def _blend(_config: ModelConfig, ops: TorchOps, x: Inputs) -> Outputs:
    return {"latents": blend(ops, **x)}


_OTHERS: dict[str, Callable[[ModelConfig, TorchOps, Inputs], Outputs]] = {
    "text_encoder": _text_encoder,
    "vae_encoder": _vae_encoder,
    "vae_decoder": _vae_decoder,
    "merge_lora": _merge_lora,
    "blend": _blend,
}
