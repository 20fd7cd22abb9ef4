"""A folder of "engines" for the stand-ins of `fake_gpu`: each file holds just a graph's name."""

import hashlib
from pathlib import Path

from klein_kv.config import DTYPES
from klein_kv.engines.manifest import (
    EngineManifest,
    EngineRecord,
    ProfileRecord,
    TensorInfo,
    WeightInput,
    write_atomic,
)
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.signature import GraphSet, TensorSpec
from tests.runtime.fake_gpu import SCRATCH

__all__ = ["make_engines"]

LOW, HIGH = 0, 1 << 20


def make_engines(artifacts: Path, folder: Path, graphs: GraphSet | None = None) -> Path:
    """Writes what a build would, of every graph of the artifacts.

    Args:
        artifacts: where the graphs lie.
        folder: for the engines.
        graphs: which graphs of the artifacts; None takes the manifest's.
    """
    manifest = Manifest.load(artifacts)
    graphs = graphs or manifest.graphs
    records = {graph: _record(artifacts, manifest, graphs, graph) for graph in graphs.files}
    names = {dtype: name for name, dtype in DTYPES.items()}
    for graph in records:
        write_atomic(folder / f"{graph}.engine", graph.encode())
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


def _record(artifacts: Path, manifest: Manifest, graphs: GraphSet, graph: str) -> EngineRecord:
    signature = graphs.signature(graph, manifest.config)
    weights = {} if graph.startswith("vae") else graph_weights(artifacts, graphs.files[graph])

    def info(spec: TensorSpec) -> TensorInfo:
        return TensorInfo(
            spec.name, spec.dtype, tuple(a if isinstance(a, int) else -1 for a in spec.shape)
        )

    shapes = {
        spec.name: tuple(
            tuple(axis if isinstance(axis, int) else end for axis in spec.shape)
            for end in (LOW, 64, HIGH)
        )
        for spec in signature.inputs
    }
    data = graph.encode()
    return EngineRecord(
        graph=graph,
        file=f"{graph}.engine",
        layers=f"{graph}.layers.json",
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        key="-",
        onnx_digest=manifest.files[graphs.files[graph]].digest,
        inputs=tuple(info(spec) for spec in signature.inputs),
        outputs=tuple(info(spec) for spec in signature.outputs),
        weights={
            name: WeightInput(
                ref.path.relative_to(artifacts).as_posix(),
                ref.offset,
                ref.nbytes,
                ref.dtype,
                ref.shape,
            )
            for name, ref in weights.items()
        },
        profiles=(ProfileRecord("any", {}, shapes),),
        scratch_bytes=SCRATCH,
        seconds=0.0,
        peak_rss=0,
    )
