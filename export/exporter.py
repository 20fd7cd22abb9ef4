"""Checkpoint in, artifact folder out.

The folder is written aside (`.NAME.partial-PID` next to it) and renamed when it is whole; an
interrupted export leaves nothing that could be taken for a result.
"""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from klein_kv.config import (
    DEFAULT_TEXT_LAYERS,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    read_json,
)
from klein_kv.digest import file_digest
from klein_kv.errors import CapacityError, CheckpointError, RequestError
from klein_kv.export.graphs import text_encoder_graph, transformer_graph
from klein_kv.export.vae import vae_graph, vae_parameters
from klein_kv.export.weight_files import place_weights
from klein_kv.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    save_graph_weights,
    weights_file,
)
from klein_kv.model import transformer_parameters
from klein_kv.signature import GRAPH_FILES
from klein_kv.text_model import text_encoder_parameters
from klein_kv.weights import WeightIndex, WeightRef

__all__ = ["ExportResult", "export_checkpoint"]

_log = logging.getLogger(__name__)
_TRANSFORMER_GRAPHS = ("encode_references", "first_step", "cached_step")
_FLOATS = ("float32", "float16", "bfloat16")
# Tensors that checkpoints hold and the graphs do not read.
_UNREAD_TEXT = ("model.layers.", "model.norm.", "lm_head.")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export did.

    Attributes:
        artifacts: the finished folder.
        dtype: floating point type of graphs and weights.
        nodes: number of ONNX nodes per graph.
        seconds: wall time.
        bytes_written: bytes of the folder that are not links to the checkpoint's files.
    """

    artifacts: Path
    dtype: str
    nodes: dict[str, int]
    seconds: float
    bytes_written: int


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint in diffusers layout, its configuration and tensors checked."""

    folder: Path
    config: ModelConfig
    vae_config: dict[str, Any]
    scheduler: dict[str, Any]
    indices: dict[str, WeightIndex]
    parameters: dict[str, dict[str, tuple[int, ...]]]

    @property
    def dtype(self) -> str:
        """Type of the transformer's weights."""
        return self.indices["transformer"]["proj_out.weight"].dtype


def export_checkpoint(
    checkpoint: Path,
    artifacts: Path,
    *,
    variant: str = "kv",
    dtype: str | None = None,
    text_layers: tuple[int, ...] = DEFAULT_TEXT_LAYERS,
) -> ExportResult:
    """Exports a checkpoint in diffusers layout.

    Args:
        checkpoint: folder with model_index.json, transformer/, text_encoder/, tokenizer/, vae/
            and scheduler/, weights as safetensors.
        artifacts: folder to create; must not exist, or be empty.
        variant: "kv": the only kind of weights whose reference keys and values may be cached.
            Plain klein looks the same on disk, so this is the caller's word.
        dtype: "float32", "float16" or "bfloat16"; default the transformer's own.
        text_layers: hidden states of the text encoder to read (diffusers:
            `text_encoder_out_layers`).

    Raises:
        RequestError: an unknown variant or dtype, or `artifacts` already holds something.
        CheckpointError: the checkpoint is not whole or is not klein.
        CapacityError: not enough disk.
    """
    start = time.perf_counter()
    if variant != "kv":
        raise RequestError(
            f"variant is {variant!r}, expected 'kv' (FLUX.2 [klein] 9B-KV weights): the reference "
            "keys and values of other variants change from step to step and cannot be cached"
        )
    if dtype is not None and dtype not in _FLOATS:
        raise RequestError(f"dtype is {dtype!r}, expected one of {', '.join(_FLOATS)}")
    source = _read_checkpoint(checkpoint, text_layers)
    dtype = dtype or source.dtype
    if dtype not in _FLOATS:
        raise CheckpointError(f"transformer weights are {dtype}, expected {', '.join(_FLOATS)}")
    if dtype == "float16":
        _log.warning("float16 overflows on real klein weights; prefer bf16, or fp32 on a CPU")
    with _staging(artifacts) as folder:
        nodes = _write_graphs(source, folder, dtype)
        _write_tokenizer(source.folder, folder)
        licence = _copy_licences(source.folder, folder)
        links = _linked_files(source, folder)
        files = {
            path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, file_digest(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        Manifest(
            model_id=source.folder.name,
            variant=variant,
            dtype=dtype,
            config=source.config,
            scheduler=source.scheduler,
            files=files,
            licence=licence,
        ).save(folder)
        written = sum(record.bytes for name, record in files.items() if name not in links)
        written += (folder / MANIFEST).stat().st_size
    return ExportResult(artifacts, dtype, nodes, time.perf_counter() - start, written)


def _read_checkpoint(folder: Path, text_layers: tuple[int, ...]) -> _Checkpoint:
    folder = folder.resolve()
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {folder} is not a folder; expected a checkpoint in diffusers layout"
        )
    read_json(folder / "model_index.json", "checkpoint")
    transformer = TransformerConfig.from_dict(
        read_json(folder / "transformer/config.json", "transformer config")
    )
    text = TextEncoderConfig.from_dict(
        read_json(folder / "text_encoder/config.json", "text_encoder config"), text_layers
    )
    vae_config = read_json(folder / "vae/config.json", "vae config")
    config = ModelConfig(transformer, text, VaeConfig.from_dict(vae_config))
    scheduler = read_json(folder / "scheduler/scheduler_config.json", "scheduler config")
    parts = ("transformer", "text_encoder", "vae")
    indices = {part: WeightIndex.from_folder(folder / part, part) for part in parts}
    parameters = {
        "transformer": transformer_parameters(transformer),
        "text_encoder": text_encoder_parameters(text),
        "vae": vae_parameters(vae_config),
    }
    indices["transformer"].expect(parameters["transformer"])
    indices["text_encoder"].expect(parameters["text_encoder"], ignore=_UNREAD_TEXT)
    # The batch counter of BatchNorm is not used at inference, and not always saved.
    counters = [name for name in parameters["vae"] if name.endswith("num_batches_tracked")]
    for name in counters:
        del parameters["vae"][name]
    indices["vae"].expect(parameters["vae"], ignore=tuple(counters))
    return _Checkpoint(folder, config, vae_config, scheduler, indices, parameters)


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` on success and is removed otherwise."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(
            f"{target} already exists and is not an empty folder; remove it or choose another name"
        )
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise CapacityError(
            f"cannot write {target}: {error.strerror or error}; choose a folder that is writable "
            "and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_graphs(source: _Checkpoint, folder: Path, dtype: str) -> dict[str, int]:
    placed: dict[str, dict[str, WeightRef]] = {}
    for part, names in source.parameters.items():
        (folder / part).mkdir()
        placed[part] = place_weights(source.indices[part], names, dtype, folder / part)
    config, nodes = source.config, {}
    for graph, file in GRAPH_FILES.items():
        start = time.perf_counter()
        if graph in _TRANSFORMER_GRAPHS:
            model = transformer_graph(graph, config, dtype, placed["transformer"])
        elif graph == "text_encoder":
            model = text_encoder_graph(config, dtype, placed["text_encoder"])
        else:
            model = vae_graph(graph, config, source.vae_config, dtype, placed["vae"])
        nodes[graph] = len(model.graph)
        _save_graph(model, folder / file)
        _log.info("%s: %d nodes, %.1f s", file, nodes[graph], time.perf_counter() - start)
    return nodes


def _save_graph(model: ir.Model, path: Path) -> None:
    table = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            table[name] = WeightRef(
                path.parent / str(tensor.location),
                tensor.offset or 0,
                tensor.length or tensor.nbytes,
                _NAMES[tensor.dtype],
                tuple(tensor.shape.numpy()),
            )
    ir.save(model, path)
    save_graph_weights(path.parent / weights_file(path.name), table)


_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
}


def _write_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Saves the tokenizer in its fast form: whatever files it came in, one tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint / "tokenizer", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"tokenizer: {checkpoint / 'tokenizer'} cannot be loaded: {error}"
        ) from error
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"tokenizer: {checkpoint / 'tokenizer'} has no chat template; klein prompts need one"
        )
    tokenizer.save_pretrained(folder / "tokenizer")


def _copy_licences(checkpoint: Path, folder: Path) -> str:
    found = [
        path
        for path in sorted(checkpoint.iterdir())
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    ]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if not found:
        return "No licence file came with the checkpoint; its own terms apply to these artifacts."
    names = ", ".join(path.name for path in found)
    return f"The checkpoint's licence applies to these artifacts: see {names}."


def _linked_files(source: _Checkpoint, folder: Path) -> set[str]:
    """Files of the folder that are hard links to the checkpoint's own."""
    linked = set()
    for part, index in source.indices.items():
        for path in index.files:
            target = folder / part / path.name
            if target.exists() and target.samefile(path):
                linked.add(target.relative_to(folder).as_posix())
    return linked
