"""An edit from prompt to image, by stage: klein-kv on any backend, beside diffusers in turn.

    first            klein-kv, references never seen before
    repeated         klein-kv, references known
    diffusers_kv     diffusers' Flux2KleinKVPipeline
    diffusers_plain  diffusers' Flux2KleinPipeline, references in every step (--plain)

    python benchmarks/edit.py                                   # the "small" fixture on a CPU
    python benchmarks/edit.py --dtype bf16 --backend torch
    python benchmarks/edit.py --artifacts DIR --checkpoint DIR --backend tensorrt --device cuda
    python benchmarks/edit.py --size 9b-shapes --device cuda    # full size, random weights

Contenders are processes of their own that take turns, so that whatever else the machine does hits
all alike. With `--drawn`, and at 9b-shapes, they share one process and the same random weights,
drawn on the device, on the torch backend. Given --artifacts alone only klein-kv runs, given
--checkpoint alone only diffusers. Every round also measures how fast the machine multiplies
matrices: the share of that speed which a transformer reaches says what is left to gain.

The last line on stdout is one JSON document; `table.py` makes tables and plots of them.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from contenders import PIPELINES, TYPES, Worker, open_diffusers, open_drawn, open_klein_kv
from limits import edit_operations, matrix_speed
from table import markdown

from klein_kv.artifacts.config import TransformerConfig, read_json
from klein_kv.artifacts.manifest import Manifest

TEXT_TOKENS, TOKEN_SIDE = 512, 16  # a prompt's tokens; pixels of an image token
STAGES = ("text", "vae_encode", "first_step", "later_steps", "vae_decode")
PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "tensorrt-rtx-cu13", "tensorrt")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", default="small", help="fixture: tiny, small (default) or 9b-shapes")
    add("--work", type=Path, help="keep the fixture and its artifacts here")
    add("--artifacts", type=Path, help="klein-kv's folder, in place of a fixture")
    add("--checkpoint", type=Path, help="diffusers' folder, in place of a fixture")
    add("--backend", default="auto", help="onnxruntime, torch or tensorrt")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", choices=TYPES, help="default: the artifacts' type, bf16 if drawn, else fp32")
    add("--precision", help="fp8, nvfp4 or fp8-weight-only, where the artifacts have it")
    add("--kv-dtype", help="fp8: keys and values in eight bits")
    add("--output", type=int, default=512, help="side of the output in pixels")
    add("--references", type=int, default=4)
    add("--reference-size", type=int, default=512, help="side of each in pixels")
    add("--steps", type=int, default=4)
    add("--rounds", type=int, default=3, help="after one to warm up")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU")
    add("--plain", action="store_true", help="diffusers' plain pipeline too")
    add("--drawn", action="store_true", help="random weights drawn on the device, shared by all")
    add("--compile", action="store_true", help="torch.compile on both sides, CUDA graphs on ours")
    add("--offload", action="store_true", help="diffusers keeps idle networks in host memory")
    args = parser.parse_args(argv)
    args.drawn |= args.size == "9b-shapes" and not (args.artifacts or args.checkpoint)
    if args.drawn and (args.artifacts or args.checkpoint or args.backend not in ("auto", "torch")):
        parser.error(
            "weights drawn on the device run on --backend torch; for --artifacts, --checkpoint or "
            f"--backend {args.backend} leave out --drawn and --size 9b-shapes"
        )
    if args.rounds < 1 or args.references < 0:
        parser.error("expected at least 1 of --rounds and 0 of --references")
    args.others = list(PIPELINES) if args.plain else ["diffusers_kv"]
    return args


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Fills in the type, and the folders of a fixture, which are made once."""
    if args.artifacts:
        dtype = Manifest.load(args.artifacts).dtype
        args.dtype = args.dtype or next(name for name in TYPES if TYPES[name] == dtype)
    args.dtype = args.dtype or ("bf16" if args.drawn else "fp32")
    if args.artifacts or args.checkpoint:
        return
    from klein_kv.export.checkpoints.fixture import make_fixture
    from klein_kv.export.exporter import export_checkpoint

    args.checkpoint = work / f"{args.size}-checkpoint"
    args.artifacts = work / f"{args.size}-{args.dtype}"
    if not args.checkpoint.exists():
        make_fixture(args.checkpoint, args.size, 0)
    if not args.artifacts.exists():
        export_checkpoint(args.checkpoint, args.artifacts, dtype=TYPES[args.dtype])


def open_contenders(args: argparse.Namespace) -> list[Any]:
    if args.drawn:
        return open_drawn(args)
    contenders = [Worker(open_klein_kv, args)] if args.artifacts else []
    if args.checkpoint and importlib.util.find_spec("diffusers"):
        contenders += [Worker(open_diffusers, args, name) for name in args.others]
    return contenders


def take_turns(args: argparse.Namespace) -> tuple[dict[str, list[Any]], list[dict[str, float]]]:
    """Results by edit, and the matrix speeds, of every round but the one to warm up."""
    contenders = open_contenders(args)
    results: dict[str, list[Any]] = {name: [] for x in contenders for name in x.names}
    speeds = []
    for i in range(args.rounds + 1):
        speeds.append(matrix_speed(args.device, args.threads))
        for contender, name in ((x, name) for x in contenders for name in x.names):
            results[name].append(contender.edit(name))
            label = f"round {i}" if i else "warm-up"
            seconds = results[name][-1]["seconds"]
            print(f"{label:8} {name:16} {seconds:8.3f} s", file=sys.stderr)
    for worker in () if args.drawn else contenders:
        worker.close()
    return {name: values[1:] for name, values in results.items()}, speeds[1:]


def summary(results: list[Any], dtype: str, operations: int, speed: float) -> dict[str, Any]:
    """One edit over the rounds: medians, the most memory, and the transformer's speed."""
    stages = {
        stage: statistics.median(result["stages"].get(stage, 0.0) for result in results)
        for stage in STAGES
    }
    seconds = [result["seconds"] for result in results]
    rate = operations / (stages["first_step"] + stages["later_steps"])
    return {
        "backend": results[0].get("backend", "diffusers"),
        "dtype": dtype,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "stages": stages,
        "hit": all(result.get("hit", False) for result in results),
        "transformer_operations": operations,
        "operations_per_second": rate,
        "share_of_matrix_speed": rate / speed,
        "peak_host_bytes": max(result["host_bytes"] for result in results),
        "peak_device_bytes": max(result.get("device_bytes", 0) for result in results) or None,
    }


def ratio(slow: dict[str, Any], fast: dict[str, Any]) -> dict[str, float]:
    """Seconds over seconds: of the medians, the range over the rounds, and by operations alone."""
    rounds = [a / b for a, b in zip(slow["seconds"], fast["seconds"], strict=True)]
    return {
        "median": slow["median_seconds"] / fast["median_seconds"],
        "min": min(rounds),
        "max": max(rounds),
        "operations": slow["transformer_operations"] / fast["transformer_operations"],
    }


def report(
    args: argparse.Namespace, results: dict[str, list[Any]], speeds: list[dict[str, float]]
) -> dict[str, Any]:
    if args.artifacts:
        manifest = Manifest.load(args.artifacts)
        net, ours = manifest.config.transformer, manifest.dtype
    else:
        config = read_json(args.checkpoint / "transformer" / "config.json", "transformer config")
        net, ours = TransformerConfig.from_dict(config), ""
    speed = {dtype: statistics.median(x[dtype] for x in speeds) for dtype in speeds[0]}
    edits = {}
    for name, rounds in results.items():
        dtype = TYPES[args.dtype] if name in PIPELINES else ours
        operations = edit_operations(
            net,
            name,
            steps=args.steps,
            image=(args.output // TOKEN_SIDE) ** 2,
            text=TEXT_TOKENS,
            references=args.references * (args.reference_size // TOKEN_SIDE) ** 2,
        )
        limit = speed["float32" if dtype == "float32" else "bfloat16"]
        edits[name] = summary(rounds, dtype, operations, limit)
    one, *more = results
    differences = {
        f"{one} to {name}": max(
            int(np.abs(np.int16(a["image"]) - np.int16(b["image"])).max())
            for a, b in zip(results[one], results[name], strict=True)
        )
        for name in more
    }
    order = [*(name for name in PIPELINES if name in edits), "first", "repeated"]
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :] if {a, b} <= set(edits)]
    return {
        "edits": edits,
        "ratios": {f"{a} / {b}": ratio(edits[a], edits[b]) for a, b in pairs},
        "matrix_speed": speed,
        "largest_pixel_difference": differences,
    }


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What runs on what machine; "load" is that of the minute before."""
    cpu = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    machine: dict[str, Any] = {
        "cpu": cpu.get("model name", platform.machine()),
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(cpu.get("flags", "").split())),
        "load": os.getloadavg()[0],
    }
    if args.device != "cpu":
        import torch

        properties = torch.cuda.get_device_properties(torch.device(args.device))
        machine |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "benchmark": "edit",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine,
        "versions": versions,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
    }


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        prepare(args, work)
        document = describe(args)
        document |= report(args, *take_turns(args))
    print(markdown([document]))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
