"""`klein.json`: what an artifact folder is, and the digest of every file that makes it.

The manifest is checked before anything else of the folder is opened. Paths in it are relative and
stay inside the folder.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path, PurePosixPath
from typing import Any, Self

from klein_kv.config import DTYPES, ITEM_SIZE, ModelConfig
from klein_kv.digest import combine_digests, file_digest
from klein_kv.errors import ArtifactError, CheckpointError
from klein_kv.signature import VARIANTS, GraphSet
from klein_kv.weights import WeightRef

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "graph_weights",
    "inside",
    "save_graph_weights",
    "weights_file",
]

MANIFEST = "klein.json"
FORMAT_VERSION = 1
_FORMAT = "klein-kv artifacts"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and digest of one file.

    Attributes:
        bytes: its size.
        digest: what `digest.file_digest` makes of it; checked whenever the folder is opened.
        sha256: the hub's own digest of the whole file, "" if it is not known.
    """

    bytes: int
    digest: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of `klein.json`.

    Attributes:
        model_id: name of the checkpoint, for people.
        variant: "kv" or "plain"; never guessed from the weights.
        dtype: floating point type of graphs and weights.
        config: the three networks.
        scheduler: diffusers' scheduler configuration, as found.
        files: records by path relative to the folder.
        licence: notice about the weights, for people.
        distilled: False for weights that need classifier-free guidance.
    """

    model_id: str
    variant: str
    dtype: str
    config: ModelConfig
    scheduler: dict[str, Any]
    files: dict[str, FileRecord]
    licence: str
    distilled: bool = True

    @property
    def model_digest(self) -> str:
        """Hex digest of graphs and weights together; what a K/V cache or an image belongs to."""
        parts = {
            name: record.digest
            for name, record in self.files.items()
            if name.endswith((".onnx", ".safetensors"))
        }
        return combine_digests(parts)

    @property
    def graphs(self) -> GraphSet:
        """The folder's graphs."""
        return GraphSet(self.variant, self.dtype)

    def save(self, folder: Path) -> None:
        """Writes `klein.json` into the folder."""
        value = {
            "format": _FORMAT,
            "format_version": FORMAT_VERSION,
            "model_id": self.model_id,
            "variant": self.variant,
            "dtype": self.dtype,
            "licence": self.licence,
            "distilled": self.distilled,
            "graphs": self.graphs.files,
            "config": self.config.to_dict(),
            "scheduler": self.scheduler,
            "files": {
                name: {"bytes": record.bytes, "digest": record.digest}
                | ({"sha256": record.sha256} if record.sha256 else {})
                for name, record in sorted(self.files.items())
            },
        }
        (folder / MANIFEST).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, check_files: bool = True) -> Self:
        """Reads and checks an artifact folder's manifest.

        Args:
            folder: the artifact folder.
            check_files: also check size and digest of every file.

        Raises:
            ArtifactError: not an artifact folder, a newer format, or a file that does not match.
        """
        value = _read_manifest(folder)
        try:
            manifest = cls(
                model_id=value["model_id"],
                variant=value["variant"],
                dtype=value["dtype"],
                config=ModelConfig.from_saved(value["config"]),
                scheduler=value["scheduler"],
                files={
                    name: FileRecord(record["bytes"], record["digest"], record.get("sha256", ""))
                    for name, record in value["files"].items()
                },
                licence=value["licence"],
                distilled=bool(value.get("distilled", True)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as error:
            raise ArtifactError(
                f"{folder / MANIFEST} is incomplete ({error!r}); export the checkpoint again"
            ) from error
        if manifest.dtype not in DTYPES.values() or manifest.variant not in VARIANTS:
            raise ArtifactError(
                f"{folder / MANIFEST} says variant {manifest.variant!r} and dtype "
                f"{manifest.dtype!r}, expected {' or '.join(map(repr, VARIANTS))} and one of "
                f"{', '.join(DTYPES.values())}; "
                "export the checkpoint again"
            )
        if check_files:
            manifest.check_files(folder)
        return manifest

    def check_files(self, folder: Path) -> None:
        """Compares every recorded file with the folder.

        Raises:
            ArtifactError: a file is missing, has another size or another digest.
        """
        for graph, name in self.graphs.files.items():
            if name not in self.files:
                raise ArtifactError(
                    f"{folder / MANIFEST} lists no {name} (graph {graph}); export again"
                )
        for name, record in self.files.items():
            try:
                path = inside(folder, name)
                size = path.stat().st_size
                digest = file_digest(path) if size == record.bytes else ""
            except (OSError, ValueError, RuntimeError) as error:  # a circle of links is the last
                raise ArtifactError(
                    f"{name!r} is listed in {folder / MANIFEST} but cannot be read ({error}); "
                    "export the checkpoint again"
                ) from error
            if digest != record.digest:
                got = f"{size} bytes" if size != record.bytes else digest
                expected = f"{record.bytes} bytes" if size != record.bytes else record.digest
                raise ArtifactError(
                    f"{path} is not the file that {MANIFEST} describes: got {got}, expected "
                    f"{expected}; it was changed or damaged, export the checkpoint again"
                )


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused where `name` would leave the folder.

    Raises:
        ArtifactError: an absolute path, one with `..`, or a link to a file elsewhere.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise ArtifactError(
            f"{folder}: path {name!r} leaves the folder; expected a relative path inside it"
        )
    path = folder / pure
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{path} is a link to {path.resolve()}, outside the folder; copy the file itself there "
            "(downloads from a hub: with a local folder, not through its cache)"
        )
    return path


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = (
            " (this is a checkpoint: export it first with `klein-kv export`)"
            if (folder / "model_index.json").exists()
            else ""
        )
        raise ArtifactError(
            f"{folder} is not a klein-kv artifact folder: it has no {MANIFEST}{hint}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; export again") from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ArtifactError(f"{path} is not a klein-kv manifest; expected format {_FORMAT!r}")
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, this klein-kv reads {FORMAT_VERSION}; "
            "upgrade klein-kv or export again"
        )
    return value


def weights_file(graph_file: str) -> str:
    """Path of the weight table beside a graph: `x/y.onnx` -> `x/y.weights.json`."""
    return graph_file.removesuffix(".onnx") + ".weights.json"


def save_graph_weights(path: Path, weights: Mapping[str, WeightRef]) -> None:
    """Writes the weight table of one graph: initializer -> file, offset, nbytes, dtype, shape."""
    table = {
        name: [ref.path.name, ref.offset, ref.nbytes, ref.dtype, list(ref.shape)]
        for name, ref in weights.items()
    }
    path.write_text(json.dumps(table) + "\n", encoding="utf-8")


def graph_weights(folder: Path, file: str) -> dict[str, WeightRef]:
    """Where the initializers of one graph lie, by initializer name.

    Args:
        folder: the artifact folder.
        file: the graph's path in it (`GraphSet.files`).

    Raises:
        ArtifactError: the table is unreadable or points outside its folder or file.
    """
    path = folder / weights_file(file)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        refs = {
            name: WeightRef(
                inside(path.parent, file),
                index(offset),
                index(nbytes),
                dtype,
                tuple(map(index, shape)),
            )
            for name, (file, offset, nbytes, dtype, shape) in table.items()
        }
        sizes = {file: file.stat().st_size for file in {ref.path for ref in refs.values()}}
        expected = {
            name: math.prod(ref.shape, start=ITEM_SIZE[ref.dtype]) for name, ref in refs.items()
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        kind = type(error).__name__  # the text of some, a KeyError for one, is the key alone
        raise ArtifactError(f"{path} cannot be read: {kind}: {error}; export again") from error
    for name, ref in refs.items():
        if (
            not 0 <= ref.offset <= sizes[ref.path] - ref.nbytes
            or ref.nbytes != expected[name]
            or min((0, *ref.shape)) < 0
        ):
            raise ArtifactError(
                f"{path}: {name} of shape {ref.shape} and dtype {ref.dtype} is said to take bytes "
                f"{ref.offset} to {ref.offset + ref.nbytes} of {ref.path.name}, which has "
                f"{sizes[ref.path]}; export again"
            )
    return refs
