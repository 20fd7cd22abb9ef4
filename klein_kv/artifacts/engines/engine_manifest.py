"""`engine.json`: what the engines of one folder are, checked before any of them is opened.

An engine file is native code. So a digest that does not match is refused, never warned about, and
`EngineManifest.read_engine` returns what it read from the very bytes that it has checked.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from klein_kv.artifacts.digest import inside, write_atomic
from klein_kv.artifacts.engines.engine_record import EngineRecord
from klein_kv.errors import MALFORMED, ArtifactError
from klein_kv.json_values import from_json, read_document

__all__ = ["ENGINE_MANIFEST", "PACKED_SUFFIX", "EngineManifest", "find_engines"]

ENGINE_MANIFEST = "engine.json"
PACKED_SUFFIX = ".zlib"
"""Ends the name of an engine file that zlib packed."""
_FORMAT = "klein-kv engines"
_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class EngineManifest:
    """All engines of one folder."""

    module: str  # "tensorrt_rtx" or "tensorrt"
    version: str  # its version; engines load with this one only
    target: str
    sm: int  # compute capability without the dot
    precision: str  # "bf16", "fp16", ...
    weights: str  # "shared" or "embedded" (the VAE always embeds)
    recipe: str
    engines: dict[str, EngineRecord]
    # type that keys and values are handed on in; None for that of activations
    kv_dtype: str | None = None
    attention: str | None = None  # "fp8" where the transformer's attention is computed in float8

    @property
    def title(self) -> str:
        """For people: which engines these are."""
        kv = "" if self.kv_dtype is None else f", K/V {self.kv_dtype}"
        kv += "" if self.attention is None else f", attention {self.attention}"
        return f"{self.target} {self.precision} {self.recipe}{kv} ({self.module} {self.version})"

    def record(self, graph: str) -> EngineRecord:
        """The record of one graph; an `ArtifactError` if there is no engine of it."""
        if graph not in self.engines:
            raise ArtifactError(
                f"there is no engine of {graph}, only of {', '.join(self.engines) or 'nothing'}; "
                "build it with `klein-kv build`"
            )
        return self.engines[graph]

    def read_engine(self, folder: Path, graph: str) -> bytes:
        """One engine as TensorRT wants it, unpacked, and checked before it is interpreted.

        An `ArtifactError` tells of one that is missing, or not the file that was built.
        """
        record = self.record(graph)
        path = inside(folder, record.file)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"engine {path} cannot be read ({error.strerror}); build it again"
            ) from error
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != record.bytes or digest != record.sha256:
            raise ArtifactError(
                f"{path} is not the engine that {ENGINE_MANIFEST} describes: got sha256 {digest}, "
                f"expected {record.sha256}; it was changed or damaged, build it again"
            )
        return zlib.decompress(data) if record.file.endswith(PACKED_SUFFIX) else data

    def save(self, folder: Path) -> None:
        """Writes `engine.json`; a reader sees the old one or the new one, whole."""
        value = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(self)}
        value["digest"] = _self_digest(value)
        text = json.dumps(value, indent=1) + "\n"
        write_atomic(folder / ENGINE_MANIFEST, text.encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads and checks `engine.json`; the engines themselves are checked as they are read.

        An `ArtifactError` tells of none, of another format version, or of one that was changed.
        """
        path = folder / ENGINE_MANIFEST
        try:
            value = read_document(path, _FORMAT, _FORMAT_VERSION, "build again")
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{folder} holds no engines: it has no {ENGINE_MANIFEST}; build them with "
                "`klein-kv build`"
            ) from error
        if value.pop("digest", None) != _self_digest(value):
            raise ArtifactError(f"{path} was changed after it was written; build again")
        try:
            for record in value["engines"].values():
                for profile in record["profiles"]:  # earlier ones say the scratch of all together
                    profile.setdefault("scratch_bytes", record["scratch_bytes"])
            known = {field.name for field in fields(cls)}
            manifest: Self = from_json(cls, {x: value[x] for x in known & value.keys()})
            return manifest
        except MALFORMED as error:
            raise ArtifactError(f"{path} is incomplete ({error!r}); build again") from error


def find_engines(artifacts: Path) -> list[Path]:
    """Folders of an artifact folder that hold engines, sorted."""
    return sorted(path.parent for path in (artifacts / "engines").glob(f"*/{ENGINE_MANIFEST}"))


def _self_digest(value: Mapping[str, Any]) -> str:
    text = json.dumps({key: item for key, item in value.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
