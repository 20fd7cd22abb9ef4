"""Our edit against diffusers' on the same CPU: prompt to pixels, and peak memory.

Two worker processes load the same checkpoint, one through klein-kv's artifacts, the other through
diffusers' Flux2KleinKVPipeline. The same edit (512x512 output, four 512x512 references, 4 steps)
is then asked of them in turn, so that whatever else the machine does hits both alike.

    python benchmarks/loop.py [--size small] [--rounds 5] [--threads 2] [--work DIR]

The last line on stdout is one JSON document.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROMPT = "the same scene at night, photograph"
SIDE = 512
REFERENCES = 4
STEPS = 4


def peak_rss_bytes() -> int:
    """Highest resident set of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def pictures() -> list[Any]:
    """Crops of a real photograph, 512x512 each, all different."""
    from PIL import Image
    from skimage import data

    photograph = Image.fromarray(data.astronaut()).resize((640, 640), Image.Resampling.LANCZOS)
    boxes = [(x, y, x + SIDE, y + SIDE) for x in (0, 128) for y in (0, 128)]
    return [photograph.crop(box) for box in boxes[:REFERENCES]]


def serve_ours(pipe_end: Connection, folder: Path, threads: int) -> None:
    from klein_kv import KleinKVPipeline

    # Every edit is a first edit here: benchmarks/references.py measures reuse.
    pipe = KleinKVPipeline.from_pretrained(
        folder, threads=threads, reference_cache_bytes=0, prompt_cache_bytes=0
    )
    pipe.set_progress_bar_config(disable=True)
    images = pictures()

    def edit() -> dict[str, Any]:
        out = pipe(prompt=PROMPT, image=images, height=SIDE, width=SIDE, seed=0)
        timings = pipe.timings
        return {"images": out.images, "steps": timings.steps, "gaps": timings.step_gaps}

    serve(pipe_end, edit)


def serve_diffusers(pipe_end: Connection, folder: Path, threads: int) -> None:
    import torch
    from diffusers import Flux2KleinKVPipeline

    torch.set_num_threads(threads)
    pipe = Flux2KleinKVPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pictures()

    def edit() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        out = pipe(prompt=PROMPT, image=images, height=SIDE, width=SIDE, generator=generator)
        return {"images": out.images, "steps": [], "gaps": []}

    serve(pipe_end, edit)


def serve(pipe_end: Connection, edit: Any) -> None:
    pipe_end.send("ready")
    while pipe_end.recv() == "edit":
        start = time.perf_counter()
        result = edit()
        result["seconds"] = time.perf_counter() - start
        result["peak_rss"] = peak_rss_bytes()
        pipe_end.send(result)


def start(target: Any, folder: Path, threads: int) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=target, args=(theirs, folder, threads), daemon=True).start()
    ours.recv()
    return ours


def largest_pixel_difference(a: list[Any], b: list[Any]) -> int:
    import numpy as np

    pairs = zip(a, b, strict=True)
    return max(int(np.abs(np.int16(x) - np.int16(y)).max()) for x, y in pairs)


def prepare(work: Path, size: str) -> tuple[Path, Path]:
    """Checkpoint and artifacts, made once per folder."""
    checkpoint, artifacts = work / f"{size}-checkpoint", work / f"{size}-fp32"
    # In processes of their own: what exporting imports must not count as anyone's memory.
    context = multiprocessing.get_context("spawn")
    for target, args in ((make, (checkpoint, size)), (export, (checkpoint, artifacts))):
        process = context.Process(target=target, args=args)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{target.__name__} failed")
    return checkpoint, artifacts


def make(checkpoint: Path, size: str) -> None:
    from klein_kv.export.fixture import make_fixture

    if not checkpoint.exists():
        make_fixture(checkpoint, size, 0)


def export(checkpoint: Path, artifacts: Path) -> None:
    from klein_kv.export.exporter import export_checkpoint

    if not artifacts.exists():
        export_checkpoint(checkpoint, artifacts, dtype="float32")


def parse_arguments(about: str, rounds: int) -> argparse.Namespace:
    """Options of a benchmark whose workers take turns."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments(__doc__, rounds=5)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        checkpoint, artifacts = prepare(work, args.size)
        workers = {
            "klein_kv": start(serve_ours, artifacts, args.threads),
            "diffusers": start(serve_diffusers, checkpoint, args.threads),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for i in range(args.rounds + 1):
            for name, worker in workers.items():
                worker.send("edit")
                result = worker.recv()
                label = "warm-up" if i == 0 else f"round {i}"
                print(f"{label:8} {name:10} {result['seconds']:7.2f} s", file=sys.stderr)
                if i > 0:
                    runs[name].append(result)
        for worker in workers.values():
            worker.send("stop")
    report(args, runs)


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    seconds = {name: [run["seconds"] for run in results] for name, results in runs.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rss = {name: max(run["peak_rss"] for run in results) for name, results in runs.items()}
    gaps = [value for run in runs["klein_kv"] for value in run["gaps"]]
    steps = list(zip(*(run["steps"] for run in runs["klein_kv"]), strict=True))
    document = {
        "benchmark": "loop",
        "size": args.size,
        "output": [SIDE, SIDE],
        "references": REFERENCES,
        "steps": STEPS,
        "threads": args.threads,
        "rounds": args.rounds,
        "seconds": seconds,
        "median_seconds": median,
        "ratio_diffusers_over_klein_kv": median["diffusers"] / median["klein_kv"],
        "step_median_seconds": [statistics.median(values) for values in steps],
        "step_gap_max_ms": 1e3 * max(gaps),
        "peak_rss_bytes": rss,
        "rss_ratio_diffusers_over_klein_kv": rss["diffusers"] / rss["klein_kv"],
        "largest_pixel_difference": largest_pixel_difference(
            runs["klein_kv"][0]["images"], runs["diffusers"][0]["images"]
        ),
        "machine": platform.processor() or platform.machine(),
        "versions": {p: version(p) for p in ("onnxruntime", "torch", "diffusers", "transformers")},
    }
    print(f"diffusers {median['diffusers']:.2f} s, klein-kv {median['klein_kv']:.2f} s per edit")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
