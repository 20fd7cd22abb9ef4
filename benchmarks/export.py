"""Export of the full 9B shapes: what is read, what is written, and the memory it takes.

The checkpoint is sparse: it takes no disk and holds no real weights. Each export runs in a process
of its own, whose I/O counters (/proc/PID/io) and peak memory are taken when it is done. What an
export links it does not read; what it converts it reads and writes in full.

    python benchmarks/export.py [--size 9b-shapes] [--dtype bf16 --dtype fp16] [--work DIR]

fp16 of the 9B shapes writes 34 GB to DIR, fp32 68 GB. The last line on stdout is one JSON document.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from klein_kv.config import DTYPES
from klein_kv.export.exporter import export_checkpoint
from klein_kv.export.fixture import make_fixture


def counters() -> dict[str, int]:
    """Bytes that this process has read and written so far, through any cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def measure(checkpoint: Path, artifacts: Path, dtype: str) -> dict[str, Any]:
    """Exports in this process, which does nothing else."""
    before = counters()
    done = export_checkpoint(checkpoint, artifacts, variant="kv", dtype=DTYPES[dtype])
    after = counters()
    # Pages of mapped files are not read() but resident: they are part of the peak.
    return {
        "dtype": dtype,
        "seconds": round(done.seconds, 1),
        "bytes_written": done.bytes_written,
        "bytes_read": after["rchar"] - before["rchar"],
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="9b-shapes")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: bf16")
    parser.add_argument("--work", type=Path, help="folder with room; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        work = Path(scratch)
        make_fixture(work / "checkpoint", args.size, 0, None)
        weights = sum(path.stat().st_size for path in (work / "checkpoint").rglob("*.safetensors"))
        results = []
        for dtype in args.dtype or ["bf16"]:
            artifacts = work / dtype
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                job = pool.submit(measure, work / "checkpoint", artifacts, dtype)
                results.append(job.result())
            shutil.rmtree(artifacts)
            print(results[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "export", "weight_bytes": weights, "exports": results}))


if __name__ == "__main__":
    main()
