"""`klein.json`: what an artifact folder is, and the digest of every file that makes it.

The manifest is checked before anything else of the folder is opened. Paths in it are relative and
stay inside the folder.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from klein_kv.artifacts.config import DTYPES, ModelConfig, VaeConfig, read_json
from klein_kv.artifacts.digest import (
    combine_digests,
    file_digest,
    inside,
    stand_in,
    write_atomic,
)
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.artifacts.prompt_format import PromptFormat
from klein_kv.artifacts.quantized_weights import quantized_files
from klein_kv.artifacts.signature import (
    SMALL_GRAPH_FILES,
    VARIANTS,
    GraphSet,
    KVFormat,
    graph_sets,
    quantized_graph_sets,
)
from klein_kv.errors import MALFORMED, ArtifactError, CheckpointError, RequestError
from klein_kv.json_values import from_json, read_document

__all__ = ["FORMAT_VERSION", "MANIFEST", "FileRecord", "Manifest"]

MANIFEST = "klein.json"
FORMAT_VERSION = 1
_FORMAT = "klein-kv artifacts"
_QUANTIZED = ("transformer", "text_encoder")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size of one file, its `file_digest`, and the hub's own sha256 of it, "" if not known."""

    bytes: int
    digest: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of `klein.json`."""

    model_id: str  # name of the checkpoint, for people
    variant: str  # "kv" or "plain"; never guessed from the weights
    dtype: str  # floating point type of graphs and weights
    config: ModelConfig
    scheduler: dict[str, Any]  # diffusers' scheduler configuration, as found
    prompt: PromptFormat
    files: dict[str, FileRecord]  # records by path relative to the folder
    licence: str  # notice about the weights, for people
    distilled: bool = True  # False for weights that need classifier-free guidance
    # for each precision, the quantized files of each network (see `quantized_weights`); a network
    # that is not named stays as it is
    precisions: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def model_digest(self) -> str:
        """Hex digest of graphs and weights together; what a K/V cache or an image belongs to.

        Quantized files do not count, nor do the small graphs: what was made without them stays
        valid.
        """
        others = self.quantized_files | set(SMALL_GRAPH_FILES.values())
        names = [x for x in self.files if x.endswith((".onnx", ".safetensors"))]
        return combine_digests({x: self.files[x].digest for x in names if x not in others})

    @property
    def quantized_files(self) -> set[str]:
        """Files of all precisions that the folder holds beside its own."""
        return {file for name in self.precisions for file in self.precision_files(name)}

    def precision_digest(self, precision: str) -> str:
        """The same for a precision of the folder, which is another model."""
        parts = {name: self.files[name].digest for name in self.precision_files(precision)}
        return combine_digests(parts | {"": self.model_digest})

    def precision_files(self, precision: str) -> list[str]:
        """Quantized weights, scales and graphs of a precision; an `ArtifactError` without it."""
        if precision not in self.precisions:
            held = ", ".join(self.precisions) or "none"
            raise ArtifactError(
                f"the artifacts of {self.model_id} hold no precision {precision!r} (quantized: "
                f"{held}); make it with `klein-kv quantize ARTIFACTS --recipe {precision}`"
            )
        starts = tuple(f"{part}/{name}." for part, name in self.precisions[precision].items())
        return sorted(name for name in self.files if name.startswith(starts))

    @property
    def graphs(self) -> GraphSet:
        """The folder's graphs."""
        return GraphSet(self.variant, self.dtype)

    @property
    def graph_sets(self) -> list[GraphSet]:
        """All sets of graphs that the folder holds."""
        sets = graph_sets(self.variant, self.dtype)
        return [x for x in sets if all(file in self.files for file in x.files.values())]

    def held_graphs(self, graphs: GraphSet) -> dict[str, str]:
        """Path of each graph of a set, with the small ones that the folder holds."""
        small = {name: file for name, file in graphs.small_files.items() if file in self.files}
        return graphs.files | small

    def choose_graphs(
        self,
        kv_dtype: str | None = None,
        precision: str | None = None,
        attention: str | None = None,
    ) -> GraphSet:
        """The graphs to run or to build; None stands for what the folder has of its own.

        In a quantized precision the scales of float8 keys and values (a `KVFormat`) are constants
        in any case, and `attention` "fp8", which it alone has, reads such keys and values. An
        `ArtifactError` says that the folder lacks the graphs, a `RequestError` that none exist.
        """
        kv = None if kv_dtype == self.dtype else kv_dtype
        if precision is not None:
            remedy = f"run `klein-kv quantize ARTIFACTS --recipe {precision}` again"
            self.precision_files(precision)
            sets = quantized_graph_sets(self.variant, self.dtype, self.precisions[precision])
            if kv is not None or attention is not None:
                kv = KVFormat.FP8_CONSTANT
        else:
            remedy = "export the checkpoint again with this klein-kv"
            sets = graph_sets(self.variant, self.dtype)
            if attention is not None:
                raise RequestError(
                    f"attention is {attention!r} and no quantized precision is named; its scales "
                    "belong to one: name fp8 or nvfp4"
                )
        for graphs in sets:
            if (graphs.kv_dtype, graphs.attention) == (kv, attention):
                missing = [file for file in graphs.files.values() if file not in self.files]
                if missing:
                    raise ArtifactError(
                        f"{self.model_id}: {MANIFEST} lists no {missing[0]}; {remedy}"
                        + (" (nvfp4 takes bf16 and fp16 artifacts)" if precision else "")
                    )
                return graphs
        raise RequestError(
            f"{precision or self.dtype} of a {self.variant} model has no graphs with keys and "
            f"values in {kv or self.dtype} and attention in {attention or self.dtype}; it has "
            + "; ".join(f"{x.kv_dtype or x.dtype} and {x.attention or x.dtype}" for x in sets)
        )

    def graphs_digest(self, graphs: GraphSet) -> str:
        """Hex digest of what computes keys and values, embeddings and images with these graphs."""
        if graphs.precision is None:
            return self.model_digest
        return self.precision_digest(graphs.precision)

    def save(self, folder: Path) -> None:
        """Writes `klein.json` into the folder, in one move: never half of it is there."""
        value = {
            "format": _FORMAT,
            "format_version": FORMAT_VERSION,
            "graphs": self.graphs.files,
            **asdict(self),
            "files": {
                name: {key: item for key, item in asdict(record).items() if item != ""}
                for name, record in sorted(self.files.items())
            },
        }
        write_atomic(folder / MANIFEST, (json.dumps(value, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path, check_files: bool = True) -> Self:
        """Reads and checks an artifact folder's manifest, and unless told otherwise its files.

        An `ArtifactError` tells of another folder, a newer format, or a file that does not match.
        """
        value = _read_manifest(folder)
        try:
            if "num_levels" in value["config"]["vae"]:  # a folder from before the VAE was described
                vae = read_json(folder / "vae/config.json", "vae config")
                value["config"]["vae"] = asdict(VaeConfig.from_dict(vae))
            known = {field.name for field in fields(cls)}
            manifest: Self = from_json(cls, {x: value[x] for x in known & value.keys()})
        except (*MALFORMED, CheckpointError) as error:
            raise ArtifactError(
                f"{folder / MANIFEST} is incomplete ({error!r}); export the checkpoint again"
            ) from error
        if manifest.dtype not in DTYPES.values() or manifest.variant not in list(VARIANTS):
            raise ArtifactError(
                f"{folder / MANIFEST} says variant {manifest.variant!r} and dtype "
                f"{manifest.dtype!r}, expected {' or '.join(map(repr, VARIANTS))} and one of "
                f"{', '.join(DTYPES.values())}; export the checkpoint again"
            )
        for graph, name in manifest.graphs.files.items():
            if name not in manifest.files:
                raise ArtifactError(
                    f"{folder / MANIFEST} lists no {name} (graph {graph}); export again"
                )
        manifest.check_precisions(folder)
        if check_files:
            manifest.check_files(folder)
        return manifest

    def check_precisions(self, folder: Path) -> None:
        """Refuses precisions and networks of other names, and ones whose files are not listed."""
        for precision, networks in self.precisions.items():
            known = {precision, *networks.values()} <= set(PRECISION_FORMATS)
            files = [x for pair in networks.items() for x in quantized_files(*pair)]
            missing = [x for x in files if x not in self.files]
            wrong = None
            if not known or not set(networks) <= set(_QUANTIZED):
                wrong = f"has other names than expected ({networks})"
            elif "transformer" not in networks:
                wrong = "has no transformer"
            elif missing:
                wrong = f"lists no {missing[0]}"
            if wrong is not None:
                raise ArtifactError(
                    f"{folder / MANIFEST}: precision {precision!r} {wrong}; quantize again"
                )

    def check_files(self, folder: Path) -> None:
        """Refuses a folder where a file is missing, or has another size or digest."""
        for name in self.files:
            self.check_file(folder, name)

    def check_file(self, folder: Path, name: str) -> None:
        """The same for one file that is listed."""
        record = self.files[name]
        try:
            path = inside(folder, name)
            size = path.stat().st_size
            digest = file_digest(path) if size == record.bytes else ""
        except (OSError, ValueError, RuntimeError) as error:  # a circle of links is the last
            raise ArtifactError(
                f"{name!r} is listed in {folder / MANIFEST} but cannot be read ({error}); "
                "export the checkpoint again"
            ) from error
        if digest == record.digest:
            return
        got, expected = digest, record.digest
        if size != record.bytes:
            got, expected = f"{size} bytes", f"{record.bytes} bytes"
        if other := stand_in(path):
            raise ArtifactError(f"{path} {other}")
        raise ArtifactError(
            f"{path} is not the file that {MANIFEST} describes: got {got}, expected "
            f"{expected}; it was changed or damaged, export the checkpoint again"
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_document(folder / MANIFEST, _FORMAT, FORMAT_VERSION, "export again")
    except FileNotFoundError as error:
        hint = ""
        if (folder / "model_index.json").exists():
            hint = " (this is a checkpoint: export it first with `klein-kv export`)"
        raise ArtifactError(
            f"{folder} is not a klein-kv artifact folder: it has no {MANIFEST}{hint}"
        ) from error
