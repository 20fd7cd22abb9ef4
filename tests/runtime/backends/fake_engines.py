"""Stand-ins of `fake_trt` at work: a folder of "engines", a pipeline on them, inputs of graphs."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.config import DTYPES
from klein_kv.artifacts.digest import write_atomic
from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.engines.engine_record import EngineRecord, ProfileRecord
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet, Signature, TensorSpec
from klein_kv.artifacts.weights import NUMPY_DTYPES, graph_weights
from klein_kv.runtime.backends.trt.backend import TrtBackend
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_trt import SCRATCH, FakeTrt, engine_blob

__all__ = ["REQUEST", "Machine", "make_engines", "random_inputs", "save_no_engines"]

LOW, HIGH = 0, 1 << 20
REQUEST: dict[str, Any] = {
    "prompt": "a kite",
    "height": 128,
    "width": 160,
    "seed": 3,
    "output_type": "np",
    "max_sequence_length": 64,
}


class Machine:
    """A pipeline on a stand-in GPU of its own; called, it gives the images of `REQUEST`."""

    def __init__(
        self,
        artifacts: Path,
        engines: Path,
        cuda: FakeCuda | None = None,
        device: int = 0,
        graphs: GraphSet | None = None,
        scratch: Callable[..., int] | None = None,
        **options: Any,
    ) -> None:
        self.cuda = cuda or FakeCuda()
        self.trt = FakeTrt(artifacts, self.cuda, graphs=graphs, scratch=scratch)
        manifest = Manifest.load(artifacts, check_files=False)
        self.backend = TrtBackend(
            artifacts,
            manifest,
            engines=engines,
            device=device,
            cuda=self.cuda.cuda,
            trt=self.trt,
            graphs=graphs,
        )
        self.pipe = KleinKVPipeline(artifacts, manifest, self.backend, **options)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = self.cuda.used  # before any request

    def __call__(self, image: Any = None, **changes: Any) -> NDArray[Any]:
        return np.asarray(self.pipe(**(REQUEST | {"image": image} | changes)).images)  # type: ignore[union-attr]

    def quiet(self, image: Any = None, **changes: Any) -> tuple[NDArray[Any], dict[str, int]]:
        """An image, and what was waited for and allocated from the first engine call until then."""
        marks: list[tuple[int, int]] = []

        def watch(call: Callable[..., Any], most: int) -> Callable[..., Any]:
            def watched(*args: Any) -> Any:
                if len(marks) < most:
                    marks.append((self.cuda.waits, self.cuda.allocations))
                return call(*args)

            return watched

        with self.trt.counting() as counts, pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.backend, "run", watch(self.backend.run, 1))
            patch.setattr(self.backend, "download", watch(self.backend.download, 2))
            made = self(image, **changes)
        (waits, allocations), (last_waits, last_allocations) = marks
        counts |= {"waits": last_waits - waits, "allocations": last_allocations - allocations}
        return made, counts


def make_engines(artifacts, folder, graphs=None, sizes=None, scratch=None):
    """Writes what a build would, of every graph of the artifacts.

    Args:
        artifacts: where the graphs lie.
        folder: for the engines.
        graphs: which graphs of the artifacts; None takes the manifest's.
        sizes: sizes of the symbols by graph, for engines of one shape; None for any shape.
        scratch: bytes that each engine says it needs; else `SCRATCH`.
    """
    manifest = Manifest.load(artifacts, check_files=False)
    graphs = graphs or manifest.graphs
    folder.mkdir(parents=True, exist_ok=True)
    records = {}
    for graph in sizes or manifest.held_graphs(graphs):
        needs = (scratch or {}).get(graph, SCRATCH)
        own = None if sizes is None else sizes[graph]
        records[graph] = _write(artifacts, folder, manifest, graphs, graph, own, needs)
    names = {dtype: name for name, dtype in DTYPES.items()}
    EngineManifest(
        module="fake_trt",
        version="0.0.1",
        target="sm120",
        sm=120,
        precision=graphs.precision or names[graphs.dtype],
        weights="shared",
        recipe="default",
        engines=records,
        kv_dtype=graphs.kv_dtype,
        attention=graphs.attention,
    ).save(folder)
    return folder


def save_no_engines(folder: Path, **options: Any) -> Path:
    """A folder of RTX 5090 engines, of a precision and more, that holds none."""
    folder.mkdir(parents=True)
    own = {"recipe": "default", "weights": "shared", "engines": {}} | options
    EngineManifest(module="tensorrt_rtx", version="0", target="rtx5090", sm=120, **own).save(folder)
    return folder


def random_inputs(signature: Signature, **sizes: int) -> dict[str, NDArray[Any]]:
    """Inputs of a graph of the transformer, of the types that its signature names."""
    sizes = {"batch": 1, "image_tokens": 20, "text_tokens": 8, "ref_tokens": 24} | sizes
    rng, inputs = np.random.default_rng(1), {}
    for spec in signature.inputs:
        shape = spec.concrete(sizes)
        values = rng.integers(0, 9, shape) if spec.dtype == "int64" else rng.standard_normal(shape)
        inputs[spec.name] = values.astype(NUMPY_DTYPES[spec.dtype])
    return inputs


def _write(artifacts, folder, manifest, graphs, graph, sizes, scratch):
    signature = graphs.signature(graph, manifest.config)
    weights = {} if graph.startswith("vae") else graph_weights(artifacts, graphs.file(graph))

    def info(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(
            spec.name, spec.dtype, tuple(a if isinstance(a, int) else -1 for a in spec.shape)
        )

    def limits(spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
        if sizes is not None:
            return (spec.concrete(sizes),) * 3
        return tuple(
            tuple(axis if isinstance(axis, int) else end for axis in spec.shape)
            for end in (LOW, 64, HIGH)
        )

    shapes = {spec.name: limits(spec) for spec in signature.inputs}
    symbols = {axis for spec in signature.inputs for axis in spec.shape if isinstance(axis, str)}
    spans = {} if sizes is None else {axis: (sizes[axis],) * 3 for axis in sorted(symbols)}
    data = engine_blob(graph, [shapes])
    write_atomic(folder / f"{graph}.engine", data)
    return EngineRecord(
        graph=graph,
        file=f"{graph}.engine",
        layers=f"{graph}.layers.json",
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        key="-",
        onnx_digest=manifest.files[graphs.file(graph)].digest,
        inputs=tuple(info(spec) for spec in signature.inputs),
        outputs=tuple(info(spec) for spec in signature.outputs),
        weights={name: ref.place(artifacts) for name, ref in weights.items()},
        profiles=(ProfileRecord("any", spans, shapes, scratch),),  # type: ignore[arg-type]
        scratch_bytes=scratch,
        seconds=0.0,
        peak_rss=0,
    )
