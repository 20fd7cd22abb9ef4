"""What the TensorRT executor itself costs, on any machine: it drives stand-ins for the GPU.

Two questions. How much Python runs per denoising step: the steps of whole edits, less the time that
the stand-ins themselves take (they compute nothing here). And how fast weights go from their files
to the device, through pinned memory; a "device copy" is a memcpy that lets other threads run, as a
DMA does.

    python benchmarks/executor.py [--edits 20] [--rounds 5] [--gigabytes 1]

The last line on stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stand-ins are the tests'

from klein_kv.artifacts.weights import WeightRef
from klein_kv.runtime.backends.trt.memory import CudaMemory
from tests.runtime.backends.fake_cuda import FakeCuda


class Timed:
    """A library of stand-ins, with the seconds that its own functions took."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._library, name)
        if not callable(value) or isinstance(value, type):
            return value

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return getattr(self._library, name)(*args)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(self, name, timed)  # from now on without a search
        return timed


def steps(edits: int) -> dict[str, Any]:
    """Seconds of Python per cached step, and per gap between steps."""
    from PIL import Image

    from klein_kv.export.checkpoints.fixture import make_fixture
    from klein_kv.export.exporter import export_checkpoint
    from tests.runtime.backends.fake_engines import Machine, make_engines
    from tests.runtime.backends.test_trt_loop import sizes_of

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_fixture(work / "checkpoint", "tiny", 0)
        export_checkpoint(work / "checkpoint", work / "artifacts", dtype="float32")
        folder = make_engines(work / "artifacts", work / "engines", sizes=sizes_of(2))
        fake = FakeCuda(backed=False)
        timed = Timed(fake)
        machine = Machine(work / "artifacts", folder, fake)
        object.__setattr__(machine.backend._memory.cuda, "runtime", timed)
        pictures = [Image.new("RGB", (128, 96), (i, 2 * i, 3 * i)) for i in range(2 * edits)]
        own: list[float] = []
        marks: list[tuple[str, float, float]] = []
        run = machine.backend.run

        def watch(graph: str, inputs: Any) -> Any:
            taken = timed.seconds + fake.own_seconds
            marks.append((graph, time.perf_counter(), taken))
            return run(graph, inputs)

        machine.backend.run = watch  # type: ignore[method-assign]
        for i in range(edits):
            marks.clear()
            machine(pictures[2 * i : 2 * i + 2], seed=i, output_type="pil")
            for (graph, start, before), (_, end, after) in pairwise(marks):
                if graph == "cached_step" and i:  # the first edit loads and captures
                    own.append(end - start - (after - before))
        return {"cached_steps": len(own), "median": statistics.median(own), "most": max(own)}


def upload(rounds: int, nbytes: int) -> dict[str, Any]:
    """Bytes per second from the page cache to the device."""
    each = 32 << 20
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(nbytes // each):
            file.write(os.urandom(each))
        file.flush()
        path = Path(file.name)
        refs = [WeightRef(path, i * each, each, "uint8", (each,)) for i in range(nbytes // each)]
        memory = CudaMemory(FakeCuda().cuda)
        slab = memory.allocate((nbytes,), "uint8")
        targets = {ref: slab.pointer + i * each for i, ref in enumerate(refs)}
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            memory.staging.upload_weights(targets)
            seconds.append(time.perf_counter() - start)
    return {"bytes": nbytes, "bytes_per_second": nbytes / statistics.median(seconds[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    args = parser.parse_args()
    document: dict[str, Any] = {
        "step": steps(args.edits),
        "upload": upload(args.rounds, int(args.gigabytes * 1e9)),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
    }
    print(f"Python per cached step: median {1e3 * document['step']['median']:.3f} ms")
    print(f"weights: {document['upload']['bytes_per_second'] / 1e9:.2f} GB/s")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
