"""Folders of "engines" for the stand-in of TensorRT: each file holds the name of its graph."""

import hashlib
from pathlib import Path

from klein_kv.engines.manifest import (
    EngineManifest,
    EngineRecord,
    ProfileRecord,
    TensorInfo,
    WeightInput,
    write_atomic,
)
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.signature import GRAPH_FILES, make_signature

__all__ = ["fake_engines"]

LOW, HIGH = 0, 1 << 20


def fake_record(artifacts: Path, manifest: Manifest, graph: str) -> EngineRecord:
    """What the builder would record of an engine whose file holds just the graph's name."""
    signature = make_signature(graph, manifest.config, manifest.dtype)
    weights = {} if graph.startswith("vae") else graph_weights(artifacts, GRAPH_FILES[graph])

    def info(spec) -> TensorInfo:
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
        onnx_digest=manifest.files[GRAPH_FILES[graph]].digest,
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
        scratch_bytes=0,
        seconds=0.0,
        peak_rss=0,
    )


def fake_engines(artifacts: Path, folder: Path) -> Path:
    """Writes engines of all graphs of an artifact folder."""
    manifest = Manifest.load(artifacts)
    records = {graph: fake_record(artifacts, manifest, graph) for graph in GRAPH_FILES}
    for graph in records:
        write_atomic(folder / f"{graph}.engine", graph.encode())
    EngineManifest("fake_trt", "0.0.1", "sm120", 120, "fp32", "shared", "default", records).save(
        folder
    )
    return folder
