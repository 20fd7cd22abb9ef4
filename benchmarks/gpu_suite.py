"""What KV caching and known references are worth on a GPU, at full 9B size, against diffusers.

Random weights of the real shapes are drawn on the device. In one process, in turn: diffusers'
Flux2KleinKVPipeline and Flux2KleinPipeline, eager and compiled; this project's torch backend,
eager, compiled, and with CUDA graphs, and each of these once more with references seen before.
Timed are all denoising steps of a request on the device, without text encoder and VAE.

    python benchmarks/gpu_suite.py --out result.json                              # under 10 minutes
    python benchmarks/gpu_suite.py --device cpu --size tiny --out result.json     # seconds; a check

Needs torch, diffusers (which wants transformers for these pipelines) and this checkout, installed
or not. The most important cells come first; what there was no time for, or what failed, is listed
under "missing". The file is whole after every cell. `benchmarks/report.py` makes tables of it.

The last line on stdout is one JSON document: a summary, with the file's path.
"""

import time

START = time.monotonic()

import argparse  # noqa: E402 - the clock runs before anything is imported
import gc  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from checkout import use_checkout  # noqa: E402

use_checkout()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from gpu_cells import WARM_UP_STEPS, CellRunner, attempt, empty_cache, family_flops  # noqa: E402
from gpu_contenders import all_contenders  # noqa: E402
from gpu_kernels import attention_backends, kernel_classes, matmul_peak, step_parts  # noqa: E402
from gpu_models import SUITE_SIZES, Networks, fixture_shapes  # noqa: E402
from gpu_parity import PARITY_RUNS, measure_parity  # noqa: E402
from gpu_record import SCHEMA, Record, describe_device, describe_software  # noqa: E402
from gpu_stages import measure_stages  # noqa: E402
from gpu_targets import targets  # noqa: E402
from gpu_timing import Clock, synchronize  # noqa: E402

# The first cell is the one with targets: it may take this share of all time, for it compiles too.
FIRST_CELL_SHARE = 0.36
# Kept for what is not a cell: float32 runs after the second cell, and the profile at the end.
PARITY_SECONDS = {"cuda": 70.0, "cpu": 1.0}
PROFILE_SECONDS = {"cuda": 30.0, "cpu": 2.0}
# What preparing a cell costs beside its arithmetic, as so much arithmetic.
CELL_OVERHEAD_FLOPS = 4e15
# Whose kernels are listed: the first of each that takes part.
PROFILED = (
    ("ours_graphs", "ours_compiled", "ours_eager"),
    ("diffusers_kv_compiled", "diffusers_kv_eager"),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--size", choices=sorted(SUITE_SIZES), default="9b")
    parser.add_argument("--minutes", type=float, default=9.0, help="all of it, imports included")
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--outputs", type=_numbers, help="sides in pixels, the first matters most")
    parser.add_argument("--references", type=_numbers, help="counts, the first matters most")
    parser.add_argument("--rounds", type=int, default=5, help="at most, per cell")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only"
    )
    parser.add_argument("--compile-mode", help="torch.compile's mode for diffusers' blocks")
    parser.add_argument("--commit", help="of this checkout, where it came without its history")
    args = parser.parse_args(argv)
    if any(side < 64 or side % 16 for side in args.outputs or ()):
        parser.error(f"--outputs {args.outputs}: expected multiples of 16 from 64 on")
    if any(count < 0 for count in args.references or ()):
        parser.error(f"--references {args.references}: expected 0 or more")
    if args.rounds < 2 or args.steps < 2 or args.minutes <= 0:
        parser.error("expected at least 2 --rounds, 2 --steps, and --minutes above 0")
    if args.device == "cpu" and args.size == "9b":
        parser.error("--size 9b is for a GPU: on a CPU it takes hours; use --size tiny")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(
            f"--device {args.device}, but torch {torch.__version__} sees no CUDA device; a check "
            "without one: --device cpu --size tiny"
        )
    return args


def _numbers(text: str) -> tuple[int, ...]:
    """The integers of a list like "1024,512"."""
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    args = parse_arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    record = Record(args.out, 60 * args.minutes, START)
    gc.freeze()  # the collector need not look at what was imported; see `empty_cache`
    run(args, device, record)
    result = summary(record)
    print(json.dumps(result))
    if not any(result["median_seconds"].values()):
        sys.exit(1)  # the reasons are under "missing"


def run(args: argparse.Namespace, device: torch.device, record: Record) -> None:
    """Everything, the most important first."""
    size = SUITE_SIZES[args.size]
    cuda = device.type == "cuda"
    compiles = cuda if args.compile is None else args.compile
    allow_shapes()
    document = record.document
    document |= {"benchmark": "gpu_suite", "schema": SCHEMA, "size": args.size}
    document |= describe_software(args.commit)
    document["device"] = describe_device(device)
    document["settings"] = settings(args, compiles)
    if not cuda:
        record.miss("device memory peaks", f"needs a CUDA device, this is {device.type}")
        record.miss("CUDA graphs", f"needs a CUDA device, this is {device.type}")
    elif not compiles:
        record.miss("CUDA graphs", "measured with compiled blocks only; see --compile")
    if not compiles:
        record.miss("compiled contenders", "left out; --compile takes them in")
    record.save()

    start = record.elapsed
    networks = Networks(fixture_shapes(size), device, args.seed)
    synchronize(device)
    document["weights"] = {
        "parameters": networks.parameters,
        "bytes": networks.weight_bytes,
        "seconds": record.elapsed - start,
    }
    record.say(f"{networks.parameters:,} random parameters on {device}")
    document["matmul_peak"] = matmul_peak(size.matmul, device)
    record.say(f"matmul peak {document['matmul_peak']['tflops_per_second']:.4g} TFLOP/s")

    options = {"mode": args.compile_mode} if args.compile_mode else {}
    contenders = all_contenders(networks, Clock(device), options if compiles else None, cuda)
    cells = CellRunner(record, networks, size, contenders, args.steps, args.rounds)
    plan = cell_order(args.outputs or size.outputs, args.references or size.references)
    headline = plan[0]
    second = next((cell for cell in plan[1:2] if cell[1] > 0), headline)
    for i, cell in enumerate(plan):
        fix_shapes(i == 0)
        reserve = PROFILE_SECONDS[device.type]
        reserve += PARITY_SECONDS[device.type] if "parity" not in document else 0
        run_cell(cells, cell, plan[i:], reserve, args.minutes)
        document["targets"] = targets(document)
        record.save()
        if i == 0:
            attempt(
                record, "stages of the VAE", lambda: measure_stages(record, networks, size, plan)
            )
            attempt(record, "parts of a step", lambda: measure_parts(cells, *headline))
        if cell == second:
            attempt(record, "parity", lambda: run_parity(cells, headline, second))
    document["targets"] = targets(document)
    # None is expected: a break would cost whoever it happens to.
    document["graph_breaks"] = dict(torch._dynamo.utils.counters["graph_break"])
    if record.left > PROFILE_SECONDS[device.type] / 2:
        attempt(record, "profile", lambda: measure_profile(cells, *headline))
        document["matmul_peak_afterwards"] = matmul_peak(size.matmul, device)
    else:
        record.miss("profile", "no time left")
    document["finished"] = True
    record.save()


def run_cell(
    cells: CellRunner,
    cell: tuple[int, int],
    rest: list[tuple[int, int]],
    reserve: float,
    minutes: float,
) -> None:
    """Measures one cell in its share of the time that is left.

    Args:
        cells: what measures it.
        cell: output and references.
        rest: this cell and those that come after it.
        reserve: seconds that cells must leave.
        minutes: that the whole suite may take.
    """
    record = cells.record
    what = f"{cell[0]}x{cell[0]}, {cell[1]} references"
    costs = [cell_cost(cells, *other) for other in rest]
    seconds = (record.left - reserve) * costs[0] / sum(costs)
    if "cells" not in record.document:
        seconds = max(seconds, FIRST_CELL_SHARE * 60 * minutes)
    if seconds <= 0:
        record.miss(what, "no time left")
        return
    attempt(record, what, lambda: cells.measure(*cell, seconds, reserve))


def cell_order(outputs: tuple[int, ...], references: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cells as (output, references), the most important first, the cheapest with references next.

    The second is where parity is measured in full.
    """
    cells = [(output, count) for count in references for output in outputs]
    used = [cell for cell in cells[1:] if cell[1] > 0]
    second = min(used, key=lambda cell: (cell[0], cell[1]), default=None)
    return list(dict.fromkeys([cells[0], *([second] if second else []), *cells]))


def cell_cost(cells: CellRunner, output: int, references: int) -> float:
    """Arithmetic of one round of a cell, and what preparing it costs in the same unit."""
    unit = cells.networks.config.vae.multiple_of
    sizes = {
        "batch": 1,
        "image_tokens": (output // unit) ** 2,
        "text_tokens": cells.size.text_tokens,
        "ref_tokens": references * (cells.size.reference // unit) ** 2,
    }
    flops = family_flops(cells.networks.config.transformer, sizes, cells.steps)
    taking_part = [c for c in cells.contenders if references or c.family != "hit"]
    return sum(flops[contender.family] for contender in taking_part) + CELL_OVERHEAD_FLOPS


def run_parity(cells: CellRunner, headline: tuple[int, int], second: tuple[int, int]) -> None:
    """In full on the second cell; on the first, where float32 takes long, of the KV pipeline."""
    state = cells.networks.float32_state()
    measure_parity(cells, state, *second, PARITY_RUNS)
    if headline != second:
        measure_parity(cells, state, *headline, PARITY_RUNS[:2])
    del state
    empty_cache(cells.networks.device, collect=True)


def measure_parts(cells: CellRunner, output: int, references: int) -> None:
    """What the headline's steps consist of, and torch's kernels for its attention."""
    networks = cells.networks
    sizes = cells.scene(output, references).sizes
    net, device = networks.config.transformer, networks.device
    graphs = ["cached_step"] + (["encode_references"] if references else [])
    cells.record.document["parts"] = [step_parts(graph, net, sizes, device) for graph in graphs]
    cells.record.document["attention"] = attention_backends(net, sizes, device)
    cells.record.say("parts of a step")


def measure_profile(cells: CellRunner, output: int, references: int) -> None:
    """Kernels of a whole request, of our best and of diffusers' best contender.

    Last of all, for the profiler's hooks stay; with code compiled for this cell's shapes again.
    """
    torch._dynamo.reset()
    fix_shapes(True)
    profiles: dict[str, Any] = {}
    by_name = {contender.name: contender for contender in cells.contenders}
    scene = cells.scene(output, references)
    for names in PROFILED:
        contender = next(by_name[name] for name in names if name in by_name)
        for _ in range(contender.warm_up_runs):
            contender.run(scene, WARM_UP_STEPS)
        profiles[contender.name] = kernel_classes(
            lambda c=contender: c.run(scene, cells.steps), cells.networks.device
        )
        contender.release()
        cells.record.say(f"profile of {contender.name}")
    cells.record.document["profile"] = {
        "output": output, "references": references, "contenders": profiles,
    }  # fmt: skip


def allow_shapes() -> None:
    """Lets torch.compile keep every shape of the suite: it gives up on a function after eight."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024


def fix_shapes(fixed: bool) -> None:
    """Code for the very shapes (True), or, from a function's second shape on, for any (False).

    By default torch.compile takes a KV pipeline's first and later steps for two shapes of one
    function, and gives the later ones code for any shape. In the cell that has targets everyone
    gets the best; elsewhere there is no time to compile anew for each cell.
    """
    torch._dynamo.config.automatic_dynamic_shapes = not fixed


def settings(args: argparse.Namespace, compiles: bool) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    cuda = torch.backends.cuda
    return {
        "minutes": args.minutes,
        "seed": args.seed,
        "steps": args.steps,
        "dtype": "bfloat16",
        "compiled": compiles,
        "compile_mode": args.compile_mode or "default",
        "compile_shapes": "fixed in the first cell, dynamic afterwards",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "bf16_reduced_precision_reduction": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "grad_mode": "inference_mode",
        "threads": torch.get_num_threads(),
    }


def summary(record: Record) -> dict[str, Any]:
    """What goes to stdout: one line, the details are in the file."""
    document = record.document
    return {
        "benchmark": document["benchmark"],
        "out": str(record.path),
        "device": document["device"]["name"],
        "matmul_peak_tflops_per_second": document["matmul_peak"]["tflops_per_second"],
        "median_seconds": {
            f"{cell['output']}x{cell['references']}": {
                name: round(entry["seconds"]["median"], 5)
                for name, entry in cell["runs"].items()
                if "seconds" in entry
            }
            for cell in document.get("cells", [])
        },
        "targets": document.get("targets", []),
        "missing": [entry["what"] for entry in document.get("missing", [])],
        "elapsed_seconds": document["elapsed_seconds"],
    }


if __name__ == "__main__":
    main()
