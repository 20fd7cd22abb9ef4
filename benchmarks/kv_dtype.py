"""What keys and values in eight bits do to the result, beside rounding them or everything to 16.

Latents after 4 steps at 256x256, against float32 throughout, on random weights: 2 and 4 references
of noise, of smooth colours, and of photographs.

    float8     pipelines with kv_dtype="fp8": K/V are float8 between the graphs
    bf16_kv    float32 pipelines whose K/V were rounded to bfloat16
    bf16       diffusers' Flux2KleinKVPipeline in bfloat16: all arithmetic

Then the transformer's seconds per edit with float32 and with float8 K/V, in turn: 512x512 output,
four 512x512 references, new ones and known ones.

    python benchmarks/kv_dtype.py [--size tiny] [--rounds 3] [--threads 2] [--work DIR]

The last line on stdout is one JSON document.
"""

import argparse
import json
import sys
import tempfile
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinKVPipeline
from loop import PROMPT, prepare
from loop import pictures as edit_pictures
from PIL import Image
from skimage import data

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.weights import NUMPY_DTYPES

SIDE = 256
COUNTS = (2, 4)
KINDS = ("noise", "smooth", "photographs")
BF16 = NUMPY_DTYPES["bfloat16"]


def pictures(kind: str, count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    if kind == "noise":
        size = (SIDE, SIDE, 3)
        return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for _ in range(count)]
    if kind == "smooth":
        coarse = [rng.integers(0, 256, (6, 8, 3), np.uint8) for _ in range(count)]
        return [Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for x in coarse]
    photographs = (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
    return [
        Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for x in photographs[:count]
    ]


def open_ours(folder: Path, threads: int, kv_dtype: str | None = None) -> KleinKVPipeline:
    pipe = KleinKVPipeline.from_pretrained(folder, threads=threads, kv_dtype=kv_dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_theirs(folder: Path, threads: int) -> Any:
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = Flux2KleinKVPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rounded(pipe: KleinKVPipeline, images: list[Image.Image]) -> Any:
    """References whose keys and values went through bfloat16."""
    references = pipe.encode_references(images)
    kv = {
        name: pipe.backend.upload(references.array(name).astype(BF16).astype(np.float32))
        for name in references.kv
    }
    return replace(references, kv=kv)


def error(latents: Any, exact: Any) -> dict[str, float]:
    difference = np.asarray(latents, np.float32) - exact
    return {
        "relative": float(np.linalg.norm(difference) / np.linalg.norm(exact)),
        "largest": float(np.abs(difference).max()),
    }


def seconds(pipes: dict[str, KleinKVPipeline], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Transformer seconds by pipeline, of first and repeated edits."""
    images = edit_pictures()
    times: dict[str, dict[str, list[float]]] = {n: {"first": [], "repeated": []} for n in pipes}
    for i in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.reference_store.clear()
            for kind in ("first", "repeated"):
                pipe(PROMPT, image=images, height=2 * SIDE, width=2 * SIDE, output_type="latent")
                if i > 0:  # one to warm up
                    times[name][kind].append(sum(pipe.timings.steps))
                    print(f"{name:8} {kind:9} {times[name][kind][-1]:.2f} s", file=sys.stderr)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", help="tiny or small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep checkpoint and artifacts here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        checkpoint, artifacts = prepare(work, args.size)
        exact, packed = (open_ours(artifacts, args.threads, kv) for kv in (None, "fp8"))
        theirs = open_theirs(checkpoint, args.threads)
        shape = (1, exact.config.transformer.in_channels, SIDE // 16, SIDE // 16)
        noise = np.random.default_rng(1).standard_normal(shape, np.float32)
        noise = noise.astype(BF16).astype(np.float32)  # the same for all
        options = {"height": SIDE, "width": SIDE, "output_type": "latent"}
        results = []
        for kind in KINDS:
            for count in COUNTS:
                images = pictures(kind, count)
                request = {"prompt": PROMPT, "latents": noise, **options}
                whole = exact(image=images, **request).images
                bf16 = torch.from_numpy(noise).bfloat16()
                theirs_whole = theirs(image=images, prompt=PROMPT, latents=bf16, **options).images
                errors = {
                    "float8": error(packed(image=images, **request).images, whole),
                    "bf16_kv": error(
                        exact(references=rounded(exact, images), **request).images, whole
                    ),
                    "bf16": error(theirs_whole.float().numpy(), whole),
                }
                for name, value in errors.items():
                    print(
                        f"{count} {kind:12} {name:8} relative {value['relative']:.2g}, largest "
                        f"{value['largest']:.2g}",
                        file=sys.stderr,
                    )
                results.append({"references": kind, "count": count, **errors})
        del theirs
        times = seconds({"float32": exact, "float8": packed}, args.rounds)
    ranges = {
        name: {
            part: [f(row[name][part] for row in results) for f in (min, max)]
            for part in ("relative", "largest")
        }
        for name in ("float8", "bf16_kv", "bf16")
    }
    document = {
        "benchmark": "kv_dtype",
        "size": args.size,
        "output": [SIDE, SIDE],
        "results": results,
        "ranges": ranges,
        "transformer_seconds": times,
        "versions": {p: version(p) for p in ("onnxruntime", "torch", "diffusers")},
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
