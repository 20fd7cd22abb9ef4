"""What training has made so far: autoencoder, text encoder and tokenizer of one folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from benchmarks.pocket.state import load_averaged
from benchmarks.pocket.text import TAPS, Prompts, make_text_encoder
from benchmarks.pocket.vae import make_vae

__all__ = ["Parts", "load_parts"]


@dataclass(frozen=True)
class Parts:
    vae: AutoencoderKLFlux2
    prompts: Prompts

    @property
    def text_width(self) -> int:
        return len(TAPS) * int(self.prompts.encoder.config.hidden_size)


def load_parts(folder: Path) -> Parts:
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    encoder = make_text_encoder(len(tokenizer))
    states = load_averaged(folder / "text.safetensors")
    _load(encoder, {k.removeprefix("encoder."): v for k, v in states.items() if "encoder." in k})
    vae = make_vae()
    _load(vae, load_averaged(folder / "vae.safetensors"))
    return Parts(vae, Prompts(tokenizer, encoder))


def _load(module: nn.Module, states: dict[str, Tensor]) -> None:
    module.load_state_dict(states)
    for value in module.parameters():
        value.requires_grad_(requires_grad=False)
    torch.nn.Module.eval(module)
