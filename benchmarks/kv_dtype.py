"""What keys and values in eight bits do to the result, beside rounding them or everything to 16.

Latents after 4 steps at 256x256, against float32 throughout, on random weights: 2 and 4 references
of noise, of smooth colours, and of photographs.

    float8     pipelines with kv_dtype="fp8": K/V are float8 between the graphs
    bf16_kv    float32 pipelines whose K/V were rounded to bfloat16
    bf16       diffusers' Flux2KleinKVPipeline in bfloat16: all arithmetic

    python benchmarks/kv_dtype.py [--size tiny] [--work DIR]

The last line on stdout is one JSON document. What it does to the time: `edit.py --kv-dtype fp8`.
"""

import argparse
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
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(count)]
    photographs = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    return {
        "noise": [Image.fromarray(pixels) for pixels in noise],
        "smooth": pictures(count, SIDE),
        "photographs": [
            Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            for pixels in photographs[:count]
        ],
    }


def rounded(pipe: KleinKVPipeline, images: list[Image.Image]) -> Any:
    """References whose keys and values went through bfloat16."""
    encoded = pipe.encode_references(images)
    kv = {
        name: pipe.backend.upload(encoded.array(name).astype(BF16).astype(np.float32))
        for name in encoded.kv
    }
    return replace(encoded, kv=kv)


def error(latents: Any, exact: Any) -> dict[str, float]:
    difference = np.asarray(latents, np.float32) - exact
    return {
        "relative": float(np.linalg.norm(difference) / np.linalg.norm(exact)),
        "largest": float(np.abs(difference).max()),
    }


def measure(checkpoint: Path, artifacts: Path) -> list[dict[str, Any]]:
    exact, packed = (
        KleinKVPipeline.from_pretrained(artifacts, kv_dtype=kv_dtype) for kv_dtype in (None, "fp8")
    )
    theirs = load_diffusers("diffusers_kv", checkpoint, dtype=torch.bfloat16)
    for pipe in (exact, packed, theirs):
        pipe.set_progress_bar_config(disable=True)
    shape = (1, exact.config.transformer.in_channels, SIDE // 16, SIDE // 16)
    noise = np.random.default_rng(1).standard_normal(shape, np.float32).astype(BF16)
    bf16 = torch.from_numpy(noise.astype(np.float32)).bfloat16()
    size = {"height": SIDE, "width": SIDE, "output_type": "latent"}
    request = {"prompt": PROMPT, "latents": noise.astype(np.float32), **size}
    rows = []
    for count in (2, 4):
        for kind, images in references(count).items():
            whole = exact(image=images, **request).images
            latents = {
                "float8": packed(image=images, **request).images,
                "bf16_kv": exact(references=rounded(exact, images), **request).images,
                "bf16": theirs(image=images, prompt=PROMPT, latents=bf16, **size).images.float(),
            }
            errors = {name: error(value, whole) for name, value in latents.items()}
            rows.append({"references": kind, "count": count, **errors})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", help="tiny or small")
    parser.add_argument("--work", type=Path, help="keep checkpoint and artifacts here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options = parse_arguments(["--size", args.size, "--dtype", "fp32"])
        prepare(options, args.work or Path(scratch))
        rows = measure(options.checkpoint, options.artifacts)
    for row in rows:
        for name in ("float8", "bf16_kv", "bf16"):
            relative, largest = row[name]["relative"], row[name]["largest"]
            where = f"{row['count']} {row['references']:12} {name:8}"
            print(f"{where} relative {relative:.2g}, largest {largest:.2g}")
    print(json.dumps({"benchmark": "kv_dtype", "size": args.size, "results": rows}))


if __name__ == "__main__":
    main()
