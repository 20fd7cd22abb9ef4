"""What keys and values in eight bits do to the result, beside rounding them or everything to 16.

Latents after 4 steps at 256x256, against float32 throughout, on random weights: 2 and 4 references
of noise, of smooth colours, and of photographs. What they do to the time: `edit.py --kv-dtype fp8`.

    float8     pipelines with kv_dtype="fp8": K/V are float8 between the graphs
    bf16_kv    float32 pipelines whose K/V were rounded to bfloat16
    bf16       diffusers' Flux2KleinKVPipeline in bfloat16: all arithmetic

    python benchmarks/kv_dtype.py [--size tiny] [--work DIR]

The last line on stdout is one JSON document.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import PROMPT, load_diffusers, pictures
from edit import parse_arguments, prepare
from PIL import Image
from skimage import data

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.weights import NUMPY_DTYPES

SIDE = 256
BF16 = NUMPY_DTYPES["bfloat16"]


def references(count: int) -> dict[str, list[Image.Image]]:
    """Pictures by kind."""
    noise = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    photographs = (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())[:count]
    return {
        "noise": [Image.fromarray(pixels) for pixels in noise],
        "smooth": pictures(count, SIDE),
        "photographs": [Image.fromarray(x).resize((SIDE, SIDE)) for x in photographs],
    }


def rounded(pipe: KleinKVPipeline, images: list[Image.Image]) -> Any:
    """References whose keys and values went through bfloat16."""
    exact = pipe.encode_references(images)
    arrays = {name: exact.array(name).astype(BF16).astype(np.float32) for name in exact.kv}
    return replace(exact, kv={name: pipe.backend.upload(x) for name, x in arrays.items()})


def measure(checkpoint: Path, artifacts: Path) -> list[dict[str, Any]]:
    """A row for every kind and number of references."""
    exact = KleinKVPipeline.from_pretrained(artifacts)
    packed = KleinKVPipeline.from_pretrained(artifacts, kv_dtype="fp8")
    theirs = load_diffusers("diffusers_kv", checkpoint, dtype=torch.bfloat16)
    shape = (1, exact.config.transformer.in_channels, SIDE // 16, SIDE // 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    size = {"prompt": PROMPT, "height": SIDE, "width": SIDE, "output_type": "latent"}
    ours = {"latents": noise.float().numpy(), **size}
    rows = []
    for count in (2, 4):
        for kind, images in references(count).items():
            truth = exact(image=images, **ours).images
            row: dict[str, Any] = {"references": kind, "count": count}
            for name, latents in (
                ("float8", packed(image=images, **ours).images),
                ("bf16_kv", exact(references=rounded(exact, images), **ours).images),
                ("bf16", theirs(image=images, latents=noise, **size).images.float().numpy()),
            ):
                relative = float(np.linalg.norm(latents - truth) / np.linalg.norm(truth))
                row[name] = {"relative": relative, "largest": float(np.abs(latents - truth).max())}
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ")
    return rows


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(args, args.work or Path(scratch))
        rows = measure(args.checkpoint, args.artifacts)
    print(json.dumps({"benchmark": "kv_dtype", "size": args.size, "results": rows}))


if __name__ == "__main__":
    main()
