"""An edit from prompt to image, by stage: klein-kv on any backend, beside diffusers in turn.

    first            klein-kv, references never seen before
    repeated         klein-kv, references known
    diffusers_kv     diffusers' Flux2KleinKVPipeline
    diffusers_plain  diffusers' Flux2KleinPipeline, references in every step (--plain)

    python benchmarks/edit.py                                   # the "small" fixture on a CPU
    python benchmarks/edit.py --dtype bf16 --backend torch
    python benchmarks/edit.py --artifacts DIR --checkpoint DIR --backend tensorrt --device cuda
    python benchmarks/edit.py --size 9b-shapes --device cuda    # full size, random weights

Contenders are processes that take turns, so that whatever else the machine does hits all alike;
with random weights drawn on the device they share one. --artifacts alone runs klein-kv alone,
--checkpoint alone diffusers. Each round also measures how fast the machine multiplies matrices: the
share of it that a transformer reaches says what is left to gain. Last on stdout: a line of JSON.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any

import contenders
import numpy as np
from contenders import PIPELINES, TYPES, Worker
from limits import edit_operations, matrix_speed
from table import STAGES, markdown

from klein_kv.artifacts.manifest import Manifest

TEXT_TOKENS, TOKEN_SIDE = 512, 16  # a prompt's tokens; pixels of an image token
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
    args.pipelines = list(PIPELINES) if args.plain else ["diffusers_kv"]
    folders = args.artifacts or args.checkpoint
    args.drawn |= args.size == "9b-shapes" and not folders
    if args.drawn and (folders or args.backend not in ("auto", "torch")):
        parser.error("--drawn and --size 9b-shapes are for --backend torch without --artifacts")
    if args.rounds < 1 or args.references < 0:
        parser.error("expected at least 1 of --rounds and 0 of --references")
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
    work.mkdir(parents=True, exist_ok=True)
    if not args.checkpoint.exists():
        make_fixture(args.checkpoint, args.size, 0)
    if not args.artifacts.exists():
        export_checkpoint(args.checkpoint, args.artifacts, dtype=TYPES[args.dtype])


def open_all(args: argparse.Namespace) -> list[Any]:
    if args.drawn:
        return contenders.open_drawn(args)
    opened = [Worker(contenders.open_klein_kv, args)] if args.artifacts else []
    if args.checkpoint:
        opened += [Worker(contenders.open_diffusers, args, name) for name in args.pipelines]
    return opened


def take_turns(args: argparse.Namespace) -> tuple[dict[str, list[Any]], list[dict[str, float]]]:
    """Results by edit, and the matrix speeds, of every round but the one to warm up."""
    turns = [(contender, name) for contender in open_all(args) for name in contender.names]
    results: dict[str, list[Any]] = {name: [] for _, name in turns}
    speeds = []
    for i in range(args.rounds + 1):
        speeds.append(matrix_speed(args.device, args.threads))
        for contender, name in turns:
            result = contender.edit(name)
            results[name].append(result)
            label = f"round {i}" if i else "warm-up"
            print(f"{label:8} {name:16} {result['seconds']:8.3f} s", file=sys.stderr)
    for worker in {contender for contender, _ in turns if isinstance(contender, Worker)}:
        worker.close()
    return {name: values[1:] for name, values in results.items()}, speeds[1:]


def summary(
    args: argparse.Namespace, name: str, rounds: list[Any], speed: dict[str, float]
) -> dict[str, Any]:
    """One edit: medians over its rounds, the most memory, and the transformer's speed."""
    one, seconds = rounds[0], [result["seconds"] for result in rounds]
    by_round = []
    for stages in (result["stages"] for result in rounds):
        text, encode, decode = (sum(stages.get(x, ())) for x in contenders.ONCE)
        by_round.append((text, encode, stages["steps"][0], sum(stages["steps"][1:]), decode))
    medians = [statistics.median(values) for values in zip(*by_round, strict=True)]
    rest = max(0.0, statistics.median(seconds) - sum(medians))  # what no stage accounts for
    operations = edit_operations(
        one["net"],
        name,
        steps=args.steps,
        image=(args.output // TOKEN_SIDE) ** 2,
        text=TEXT_TOKENS,
        references=args.references * (args.reference_size // TOKEN_SIDE) ** 2,
    )
    rate = operations / (medians[2] + medians[3])
    limit = speed["float32" if one["dtype"] == "float32" else "bfloat16"]
    return {
        **{key: one[key] for key in ("backend", "dtype", "hit")},
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "stages": dict(zip(STAGES, (*medians, rest), strict=True)),
        "transformer_operations": operations,
        "operations_per_second": rate,
        "share_of_matrix_speed": rate / limit,
        "peak_host_bytes": max(result["host_bytes"] for result in rounds),
        "peak_device_bytes": max(result.get("device_bytes", 0) for result in rounds) or None,
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


def largest_difference(ours: list[Any], others: list[Any]) -> int:
    """Of any pixel in any round, of 255."""
    pairs = zip(ours, others, strict=True)
    return max(int(np.abs(np.int16(a["image"]) - np.int16(b["image"])).max()) for a, b in pairs)


def report(
    args: argparse.Namespace, results: dict[str, list[Any]], speeds: list[dict[str, float]]
) -> dict[str, Any]:
    speed = {dtype: statistics.median(x[dtype] for x in speeds) for dtype in speeds[0]}
    edits = {name: summary(args, name, rounds, speed) for name, rounds in results.items()}
    order = [name for name in (*reversed(PIPELINES), "first", "repeated") if name in edits]
    one, *more = results
    return {
        "edits": edits,
        "ratios": {f"{a} / {b}": ratio(edits[a], edits[b]) for a, b in combinations(order, 2)},
        "matrix_speed": speed,
        "largest_pixel_difference": {
            f"{one} to {name}": largest_difference(results[one], results[name]) for name in more
        },
    }


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What runs on what machine; "load" is that of the minute before."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    machine = {
        "name": cpu.partition("model name\t: ")[2].partition("\n")[0] or platform.machine(),
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if f" {name} " in cpu],
        "load": os.getloadavg()[0],
    }
    if args.device != "cpu":
        import torch

        machine["name"] = torch.cuda.get_device_properties(torch.device(args.device)).name
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
        prepare(args, args.work or Path(scratch))
        document = describe(args)
        document |= report(args, *take_turns(args))
    print(markdown([document]))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
