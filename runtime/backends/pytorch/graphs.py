"""The graphs of `artifacts.signature` as functions of torch tensors: no files, no device policy.

The networks are those of `klein_kv.networks`, computed by `TorchOps`.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields

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

__all__ = ["Graph", "small_graph", "text_encoder_graph", "transformer_graph", "vae_graph"]

Inputs = Mapping[str, torch.Tensor]
Outputs = dict[str, torch.Tensor]

Graph = Callable[[Inputs], Outputs]
"""Inputs of a graph's signature by name -> its outputs by name, on the same device."""


def transformer_graph(
    graph: str, config: ModelConfig, ops: TorchOps, kv_dtype: str | None = None
) -> Graph:
    """`first_step`, `cached_step`, `encode_references` or `plain_step`.

    Keys and values are handed on in `kv_dtype`: `KVFormat.FP8_PER_HEAD`, or None for the graph's.
    """
    net = config.transformer
    names = kv_names(net.num_blocks, kv_dtype)
    packed = kv_dtype == KVFormat.FP8_PER_HEAD

    def encode(x: Inputs) -> list[torch.Tensor]:
        kv = encode_references(ops, net, x["ref_hidden_states"], x["ref_ids"])
        return quantize_references(ops, kv) if packed else kv

    def run(x: Inputs) -> Outputs:
        if graph == "encode_references":
            return dict(zip(names, encode(x), strict=True))
        step = StepInputs(**{field.name: x[field.name] for field in fields(StepInputs)})
        if graph == "plain_step":
            noise_pred, latents = denoise_with_references(
                ops, net, step, x["ref_hidden_states"], x["ref_ids"]
            )
            return {"noise_pred": noise_pred, "latents": latents}
        if graph == "first_step":
            kv = encode(x)
        else:
            # Without references blocks do without, rather than join an empty tensor to each.
            kv = [x[name] for name in names] if x[names[0]].shape[1] else []
        unpacked = dequantize_references(ops, kv) if packed else kv
        noise_pred, latents = denoise(ops, net, step, unpacked)
        outputs = {"noise_pred": noise_pred, "latents": latents}
        return outputs | dict(zip(names, kv, strict=True)) if graph == "first_step" else outputs

    return run


def text_encoder_graph(config: ModelConfig, ops: TorchOps) -> Graph:
    """`text_encoder`, up to its last tapped block."""

    def run(x: Inputs) -> Outputs:
        states = encode_text(ops, config.text_encoder, x["input_ids"], x["attention_mask"])
        return {"encoder_hidden_states": states}

    return run


def vae_graph(graph: str, config: ModelConfig, ops: TorchOps) -> Graph:
    """`vae_encoder` or `vae_decoder`."""

    def encode(x: Inputs) -> Outputs:
        return {"ref_hidden_states": vae_encoder(ops, config.vae, x["image"]).contiguous()}

    def decode(x: Inputs) -> Outputs:
        # One image of a batch at a time: memory of one.
        results = [vae_decoder(ops, config.vae, one) for one in torch.split(x["latents"], 1)]
        images, samples = zip(*results, strict=True)
        return {"image": torch.cat(images).contiguous(), "sample": torch.cat(samples)}

    return encode if graph == "vae_encoder" else decode


def small_graph(graph: str, ops: TorchOps) -> Graph:
    """One of `SMALL_GRAPH_FILES`, which read no weights."""

    def merge(x: Inputs) -> Outputs:
        merged, largest = merge_lora(ops, **x)
        return {"merged": merged, "largest": largest}

    def mix(x: Inputs) -> Outputs:
        return {"latents": blend(ops, **x)}

    return {"blend": mix, "merge_lora": merge}[graph]
