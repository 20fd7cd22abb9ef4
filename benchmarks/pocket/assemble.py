"""Puts what training made together as a checkpoint in diffusers layout, in float16.

python -m benchmarks.pocket.assemble OUT CHECKPOINT
"""

import argparse
from pathlib import Path

import torch
from diffusers import Flux2KleinKVPipeline
from safetensors.torch import load_file

from benchmarks.pocket.denoiser import make_transformer
from benchmarks.pocket.parts import load_parts
from benchmarks.pocket.state import load_averaged
from klein_kv.export.checkpoints.random_model import make_scheduler


def assemble(out: Path, checkpoint: Path) -> None:
    parts = load_parts(out)
    transformer = make_transformer(parts.text_width)
    transformer.load_state_dict(load_averaged(out / "denoiser.safetensors"))
    statistics = load_file(out / "statistics.safetensors")
    parts.vae.bn.running_mean.copy_(statistics["mean"])
    parts.vae.bn.running_var.copy_(statistics["std"] ** 2 - parts.vae.config.batch_norm_eps)
    pipeline = Flux2KleinKVPipeline(
        scheduler=make_scheduler(),
        vae=parts.vae,
        text_encoder=parts.prompts.encoder,
        tokenizer=parts.prompts.tokenizer,
        transformer=transformer,
    )
    for module in (parts.vae, parts.prompts.encoder, transformer):
        torch.nn.Module.to(module, dtype=torch.float16)
    pipeline.save_pretrained(checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    assemble(arguments.out, arguments.checkpoint)
