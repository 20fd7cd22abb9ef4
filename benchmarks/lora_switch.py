"""What a switch of a LoRA costs on engines: bytes at the 9B's shapes, and the host's share.

    python benchmarks/lora_switch.py [--rank 32] [--rounds 3]

A LoRA of all linear layers of klein 9B's blocks is merged on stand-ins for CUDA and TensorRT, which
count what is copied and run, and compute nothing; weights are not read. The price is bytes over the
bandwidths of PCIe 5.0 x16 and of an RTX 5090's memory, as if no cache held anything; no GPU has
confirmed it. The host's seconds are measured, in CPU time of one core: those of the stand-ins are
in it, about half, reading the weights is not (`benchmarks/executor.py`). The last line on stdout is
one JSON document.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stand-ins are the tests'

from klein_kv.artifacts.engines.targets import GPUS
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import is_block_linear
from klein_kv.artifacts.weights import WeightRef
from klein_kv.export.checkpoints.fixture import make_fixture
from klein_kv.export.exporter import export_checkpoint
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.lora.lora_file import Adapter, read_adapter
from klein_kv.runtime.lora.merge import WeightMerger
from klein_kv.runtime.planning.request import flagship_request
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines
from tests.runtime.backends.fake_trt import FakeTrt

PCIE = 64e9  # B/s
KERNELS = 24
"""Bytes that the kernels of `merge_lora` read and write for a number of a bfloat16 weight: its plan
(SM120, TensorRT-RTX 1.7) casts up, adds, casts down, and takes the largest."""
HOST_TO_DEVICE, DEVICE_TO_DEVICE = 1, 3


def block_linears(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [name for name, shape in shapes.items() if is_block_linear(name, shape)]


def make_adapter(shapes: dict[str, tuple[int, ...]], rank: int) -> Adapter:
    """A LoRA of zeros, of all linear layers of the blocks."""
    tensors = {}
    for name in block_linears(shapes):
        rows, columns = shapes[name]
        module = f"transformer.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = np.zeros((rank, columns), np.float32)
        tensors[f"{module}.lora_B.weight"] = np.zeros((rows, rank), np.float32)
    return read_adapter(tensors, shapes)


def switch(artifacts: Path, engines: Path, rank: int, rounds: int) -> dict[str, Any]:
    """Counts, bytes and the host's seconds of one switch; `engines` is an empty folder."""
    make_engines(artifacts, engines)
    manifest = Manifest.load(artifacts, check_files=False)
    cuda, read = FakeCuda(32 * 10**9, backed=False), list[WeightRef]()
    trt = FakeTrt(artifacts, cuda)
    backend = TrtBackend(artifacts, manifest, engines=engines, cuda=cuda.cuda, trt=trt)
    backend._memory.staging.upload_weights = read.extend  # type: ignore[method-assign]
    request = flagship_request("kv", manifest.config)
    steps = request.shapes("cached_step", manifest.config, manifest.graphs)
    backend.prepare("cached_step", steps[0])
    shapes = transformer_parameters(manifest.config.transformer)
    adapter = make_adapter(shapes, rank)
    merger = WeightMerger(artifacts, manifest, manifest.graphs, backend)
    seconds: list[float] = []
    for i in range(rounds + 1):
        cuda.copies.clear()
        trt.runs.clear()
        read.clear()
        start = time.thread_time()
        with trt.counting() as counts:
            backend.replace_weights(merger.contents([(adapter, 1.0 + i)]))
        seconds.append(time.thread_time() - start)
    backend.close()
    base = sum(ref.nbytes for ref in read)
    moved = {
        kind: sum(nbytes for its, nbytes in cuda.copies if its == kind)
        for kind in (HOST_TO_DEVICE, DEVICE_TO_DEVICE)
    }
    passing = 2 * moved[DEVICE_TO_DEVICE] + KERNELS * base // 2
    return {
        "touched_bytes": sum(2 * math.prod(shapes[name]) for name in block_linears(shapes)),
        "weight_bytes": base,
        "factor_bytes": moved[HOST_TO_DEVICE],
        "device_bytes": passing,
        "runs": len(trt.runs),
        "loads": counts["loads"],
        "captures": counts["captures"],
        "host_seconds": statistics.median(seconds[1:]),
        "pcie_seconds": (base + moved[HOST_TO_DEVICE]) / PCIE,
        "memory_seconds": passing / (GPUS["rtx5090"].bandwidth * 1e9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_fixture(work / "checkpoint", "9b-shapes")
        artifacts, engines = work / "artifacts", work / "engines"
        export_checkpoint(work / "checkpoint", artifacts, dtype="bfloat16", allow_zeros=True)
        engines.mkdir()
        result = switch(artifacts, engines, args.rank, args.rounds)
    for name in ("pcie_seconds", "memory_seconds", "host_seconds"):
        print(f"{name}: {result[name]:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
