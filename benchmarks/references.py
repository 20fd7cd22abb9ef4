"""What knowing the references saves: our first and repeated edit, and diffusers' two pipelines.

Four worker processes on the same random weights make the same kind of edit in turn (512x512 output,
four 512x512 references, 4 steps, a new prompt every round):

    first           klein-kv, references never seen before
    repeated        klein-kv, references seen before
    diffusers_kv    diffusers' Flux2KleinKVPipeline
    diffusers_plain diffusers' Flux2KleinPipeline, references in every step, no guidance

Then memory: how much more a request takes for its references, for one image and for four.

    python benchmarks/references.py [--size small] [--rounds 3] [--threads 2] [--work DIR]

The last line on stdout is one JSON document.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loop import (
    PROMPT,
    REFERENCES,
    SIDE,
    STEPS,
    largest_pixel_difference,
    parse_arguments,
    pictures,
    prepare,
    serve,
    start,
)

TEXT_TOKENS = 512
MEMORY_BATCH = 4


def prompts() -> Any:
    """A new prompt for every call, so that no text is encoded from a cache."""
    i = 0
    while True:
        yield f"{PROMPT}, take {i}"
        i += 1


def open_ours(folder: Path, threads: int) -> Any:
    from klein_kv import KleinKVPipeline

    pipe = KleinKVPipeline.from_pretrained(folder, threads=threads)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def serve_first(pipe_end: Connection, folder: Path, threads: int) -> None:
    serve_ours(pipe_end, folder, threads, forget=True)


def serve_repeated(pipe_end: Connection, folder: Path, threads: int) -> None:
    serve_ours(pipe_end, folder, threads, forget=False)


def serve_ours(pipe_end: Connection, folder: Path, threads: int, forget: bool) -> None:
    pipe, texts, images = open_ours(folder, threads), prompts(), pictures()

    def edit() -> dict[str, Any]:
        if forget:
            pipe.reference_store.clear()
        before = pipe.reference_store.stats.hits
        out = pipe(prompt=next(texts), image=images, height=SIDE, width=SIDE, seed=0)
        hit = pipe.reference_store.stats.hits > before
        return {"images": out.images, "steps": pipe.timings.steps, "hit": hit}

    serve(pipe_end, edit)


def serve_diffusers_kv(pipe_end: Connection, folder: Path, threads: int) -> None:
    serve_diffusers(pipe_end, folder, threads, "Flux2KleinKVPipeline", {})


def serve_diffusers_plain(pipe_end: Connection, folder: Path, threads: int) -> None:
    options = {"guidance_scale": 1.0, "num_inference_steps": STEPS}
    serve_diffusers(pipe_end, folder, threads, "Flux2KleinPipeline", options)


def serve_diffusers(
    pipe_end: Connection, folder: Path, threads: int, kind: str, options: dict[str, Any]
) -> None:
    import diffusers
    import torch

    torch.set_num_threads(threads)
    pipe = getattr(diffusers, kind).from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    texts, images = prompts(), pictures()

    def edit() -> dict[str, Any]:
        request = {"prompt": next(texts), "image": images, "height": SIDE, "width": SIDE}
        request["generator"] = torch.Generator().manual_seed(0)
        return {"images": pipe(**request, **options).images, "steps": [], "hit": False}

    serve(pipe_end, edit)


def serve_memory(pipe_end: Connection, folder: Path, threads: int) -> None:
    """One image, then four, with the set in `references.safetensors` beside the artifacts."""
    measure_memory(pipe_end, folder, threads, folder.parent / "references.safetensors")


def serve_memory_without(pipe_end: Connection, folder: Path, threads: int) -> None:
    measure_memory(pipe_end, folder, threads, None)


def measure_memory(pipe_end: Connection, folder: Path, threads: int, saved: Path | None) -> None:
    import numpy as np

    pipe = open_ours(folder, threads)
    references = None if saved is None else pipe.load_references(saved)
    width = pipe.config.transformer.joint_attention_dim
    embeds = np.random.default_rng(0).standard_normal((1, TEXT_TOKENS, width), np.float32)
    batches = iter((1, MEMORY_BATCH))

    def edit() -> dict[str, Any]:
        batch = next(batches)
        request = {"height": SIDE, "width": SIDE, "seed": 0, "output_type": "latent"}
        request |= {"num_inference_steps": 2, "num_images_per_prompt": batch}
        pipe(prompt_embeds=embeds, references=references, **request)
        return {"batch": batch, "kv_bytes": references.nbytes if references else 0}

    serve(pipe_end, edit)


def serve_save(pipe_end: Connection, folder: Path, threads: int) -> None:
    pipe = open_ours(folder, threads)

    def edit() -> dict[str, Any]:
        pipe.encode_references(pictures()).save(folder.parent / "references.safetensors")
        return {}

    serve(pipe_end, edit)


def ask(worker: Connection, label: str) -> dict[str, Any]:
    worker.send("edit")
    result: dict[str, Any] = worker.recv()
    megabytes = result["peak_rss"] / 1e6
    print(f"{label:28} {result['seconds']:7.2f} s  {megabytes:6.0f} MB", file=sys.stderr)
    return result


def memory_document(artifacts: Path, threads: int) -> dict[str, Any]:
    saver = start(serve_save, artifacts, threads)
    ask(saver, "encode and save")
    saver.send("stop")
    peaks: dict[str, list[int]] = {}
    kv_bytes = 0
    for name, target in (("with", serve_memory), ("without", serve_memory_without)):
        worker = start(target, artifacts, threads)
        results = [ask(worker, f"memory, {name}, {n} image(s)") for n in (1, MEMORY_BATCH)]
        worker.send("stop")
        peaks[name] = [result["peak_rss"] for result in results]
        kv_bytes = max(kv_bytes, results[0]["kv_bytes"])
    one, four = (a - b for a, b in zip(peaks["with"], peaks["without"], strict=True))
    return {
        "kv_bytes": kv_bytes,
        "peak_rss_with_references": peaks["with"],
        "peak_rss_without": peaks["without"],
        "references_cost_bytes": [one, four],
        "kv_copies_one_image": one / kv_bytes,
        # What one block expands for its attention and frees again; 1 or more if K/V were repeated.
        "kv_copies_per_additional_image": (four - one) / (MEMORY_BATCH - 1) / kv_bytes,
    }


def main() -> None:
    args = parse_arguments(__doc__, rounds=3)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        checkpoint, artifacts = prepare(work, args.size)
        workers = {
            "first": start(serve_first, artifacts, args.threads),
            "repeated": start(serve_repeated, artifacts, args.threads),
            "diffusers_kv": start(serve_diffusers_kv, checkpoint, args.threads),
            "diffusers_plain": start(serve_diffusers_plain, checkpoint, args.threads),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for i in range(args.rounds + 1):
            for name, worker in workers.items():
                result = ask(worker, f"{'warm-up' if i == 0 else f'round {i}'} {name}")
                if i > 0:
                    runs[name].append(result)
        for worker in workers.values():
            worker.send("stop")
        memory = memory_document(artifacts, args.threads)
        report(args, artifacts, runs, memory)


def report(
    args: argparse.Namespace,
    artifacts: Path,
    runs: dict[str, list[dict[str, Any]]],
    memory: dict[str, Any],
) -> None:
    from klein_kv.flops import diffusers_kv_edit_flops, edit_flops, plain_edit_flops
    from klein_kv.manifest import Manifest

    assert all(run["hit"] for run in runs["repeated"])
    assert not any(run["hit"] for run in runs["first"])
    config = Manifest.load(artifacts).config
    tokens = (SIDE // config.vae.multiple_of) ** 2
    sizes = {"batch": 1, "image_tokens": tokens, "text_tokens": TEXT_TOKENS}
    sizes |= {"steps": STEPS, "ref_tokens": REFERENCES * tokens}
    net = config.transformer
    flops = {
        "first": edit_flops(net, references_known=False, **sizes),
        "repeated": edit_flops(net, references_known=True, **sizes),
        "diffusers_plain": plain_edit_flops(net, **sizes),
        "diffusers_kv": diffusers_kv_edit_flops(net, **sizes),
    }
    median = {
        name: statistics.median(run["seconds"] for run in results) for name, results in runs.items()
    }
    steps = {
        name: statistics.median(sum(run["steps"]) for run in runs[name])
        for name in ("first", "repeated")
    }
    rest = {name: median[name] - steps[name] for name in steps}
    # The transformer as fast per operation as in the first edit; text encoder and VAE as measured.
    predicted = rest["repeated"] + steps["first"] * flops["repeated"] / flops["first"]
    document = {
        "benchmark": "references",
        "size": args.size,
        "output": [SIDE, SIDE],
        "references": REFERENCES,
        "steps": STEPS,
        "threads": args.threads,
        "rounds": args.rounds,
        "seconds": {name: [run["seconds"] for run in results] for name, results in runs.items()},
        "median_seconds": median,
        "transformer_seconds": steps,
        "text_and_vae_seconds": rest,
        "transformer_flops": flops,
        "transformer_gflops_per_second": {
            name: flops[name] / seconds / 1e9 for name, seconds in steps.items()
        },
        "transformer_ratio_predicted": flops["first"] / flops["repeated"],
        "transformer_ratio_measured": steps["first"] / steps["repeated"],
        "ratio_first_over_repeated_predicted": median["first"] / predicted,
        "ratio_first_over_repeated": median["first"] / median["repeated"],
        "measured_over_predicted": predicted / median["repeated"],
        "ratio_diffusers_kv_over_repeated": median["diffusers_kv"] / median["repeated"],
        "ratio_diffusers_plain_over_repeated": median["diffusers_plain"] / median["repeated"],
        "flops_ratio_diffusers_kv_over_repeated": flops["diffusers_kv"] / flops["repeated"],
        "flops_ratio_diffusers_plain_over_repeated": flops["diffusers_plain"] / flops["repeated"],
        "largest_pixel_difference_first_repeated": largest_pixel_difference(
            runs["first"][0]["images"], runs["repeated"][0]["images"]
        ),
        "largest_pixel_difference_diffusers_kv": largest_pixel_difference(
            runs["first"][0]["images"], runs["diffusers_kv"][0]["images"]
        ),
        "memory": memory,
        "machine": platform.processor() or platform.machine(),
        "versions": {p: version(p) for p in ("onnxruntime", "torch", "diffusers", "transformers")},
    }
    for name, seconds in median.items():
        print(f"{name:16} {seconds:7.2f} s  {seconds / median['repeated']:5.2f}x repeated")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
