"""Checkpoint in, artifact folder out.

The folder is written aside and renamed when it is whole; an interrupted export leaves nothing that
could be taken for a result.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.config import (
    DEFAULT_TEXT_LAYERS,
    DTYPES,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    check_text_width,
    read_json,
)
from klein_kv.artifacts.digest import file_digest
from klein_kv.artifacts.manifest import MANIFEST, FileRecord, Manifest
from klein_kv.artifacts.signature import (
    SMALL_GRAPH_FILES,
    VARIANTS,
    distinct_graphs,
    graph_sets,
)
from klein_kv.errors import ArtifactError, CheckpointError, RequestError
from klein_kv.export.checkpoints.quantized_files import PublishedWeight
from klein_kv.export.checkpoints.single_file import read_beside, read_single_file
from klein_kv.export.checkpoints.sources import Source, copy_licences, find_source, known_sha256
from klein_kv.export.checkpoints.stored_weights import MergedWeight, StoredWeight
from klein_kv.export.checkpoints.tokenizer import save_tokenizer
from klein_kv.export.checkpoints.weight_files import Placement, place_weights
from klein_kv.export.checkpoints.weight_index import UNREAD_TEXT, check_weights, read_folder
from klein_kv.export.checkpoints.weight_values import check_values
from klein_kv.export.graphs.graph_files import save_graph
from klein_kv.export.graphs.small_graphs import small_graph
from klein_kv.export.graphs.transformer_graphs import text_encoder_graph, transformer_graph
from klein_kv.export.graphs.vae_graphs import vae_graph
from klein_kv.export.preview import save_preview_matrix
from klein_kv.export.staging import new_folder
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.networks.vae import vae_parameters
from klein_kv.runtime.lora.lora_file import changes_by_tensor, read_adapter
from klein_kv.schedule import make_schedule

__all__ = ["ExportResult", "export_checkpoint"]

_log = logging.getLogger(__name__)
_FLOATS = tuple(DTYPES.values())
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")  # vectors of files that were cast


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export did."""

    artifacts: Path
    dtype: str  # floating point type of graphs and weights
    nodes: dict[str, int]  # number of ONNX nodes by label (`signature.distinct_graphs`)
    seconds: float  # wall time
    bytes_written: int  # bytes of the folder that are not links to the checkpoint's files


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint, its configuration and tensors checked; tensors by diffusers' names."""

    folder: Path
    config: ModelConfig
    scheduler: dict[str, Any]
    weights: dict[str, Mapping[str, StoredWeight]]
    parameters: dict[str, dict[str, tuple[int, ...]]]

    def transformer_dtype(self) -> str:
        """Type of the transformer's weights.

        Raises:
            RequestError: they are quantized.
        """
        for name, weight in self.weights["transformer"].items():
            kind = weight.format if isinstance(weight, PublishedWeight) else weight.dtype
            if kind not in _FLOATS:
                raise RequestError(
                    f"the checkpoint is quantized ({name} is {kind}): add --dtype bf16 "
                    "(for GPUs) or --dtype fp32 (for CPUs) to export what its numbers stand for"
                )
        return self.weights["transformer"]["proj_out.weight"].dtype


def export_checkpoint(
    checkpoint: Path | str,
    artifacts: Path,
    *,
    base: Path | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    text_layers: tuple[int, ...] = DEFAULT_TEXT_LAYERS,
    adapters: Sequence[tuple[Path, float]] = (),
    allow_zeros: bool = False,
) -> ExportResult:
    """Exports a checkpoint.

    Args:
        checkpoint: a folder in diffusers layout (model_index.json, transformer/, text_encoder/,
            tokenizer/, vae/, scheduler/, weights as safetensors), a single .safetensors file with
            the transformer, or a Hugging Face repository.
        artifacts: folder to create; must not exist, or be empty.
        base: the rest of the pipeline, for a single file; of parts that the file holds the
            configuration alone.
        revision: branch, tag or commit of a Hugging Face repository.
        variant: "kv", the only kind of weights whose reference keys and values may be cached, or
            "plain". Needed where the checkpoint does not say it itself: the two look the same on
            disk.
        dtype: "float32", "float16" or "bfloat16"; default the transformer's own. Quantized weights
            are dequantized to it.
        text_layers: hidden states of the text encoder to read (diffusers:
            `text_encoder_out_layers`).
        adapters: LoRA files and their weights, merged into the transformer for good, in order.
        allow_zeros: take matrices that are zero, which a download that did not end leaves.

    Raises:
        RequestError: an unknown variant or dtype, an adapter of another model, or `artifacts`
            already holds something.
        CheckpointError: the checkpoint is not whole or is not klein.
        CapacityError: not enough disk.
    """
    start = time.perf_counter()
    if variant is not None and variant not in VARIANTS:
        raise RequestError(
            f"variant is {variant!r}, expected 'kv' (FLUX.2 [klein] 9B-KV weights) or 'plain' (any "
            "other, whose reference keys and values change from step to step and cannot be cached)"
        )
    if dtype is not None and dtype not in _FLOATS:
        raise RequestError(f"dtype is {dtype!r}, expected one of {', '.join(_FLOATS)}")
    source = find_source(checkpoint, base, revision)
    variant = source.settle_variant(variant)
    if variant == "plain" and not source.is_distilled:
        _log.warning(
            "%s is not distilled: it needs classifier-free guidance, which neither the exported "
            "step nor the pipeline does; run the step twice, with and without the prompt, and "
            "combine the predictions",
            source.name,
        )
    whole = _read_checkpoint(source, text_layers)
    if adapters:
        whole.weights["transformer"] = _with_adapters(whole, adapters)
    dtype = dtype or whole.transformer_dtype()
    if dtype == "float16":
        _log.warning("float16 overflows on real klein weights; prefer bf16, or fp32 on a CPU")
    with new_folder(artifacts) as folder:
        # First: what it finds wrong costs no conversion.
        prompt = save_tokenizer(whole.folder, folder)
        for part, names in whole.parameters.items():
            check_values(whole.weights[part], names, allow_zeros)
        placed = {}
        for part, names in whole.parameters.items():
            (folder / part).mkdir()
            placed[part] = place_weights(whole.weights[part], names, dtype, folder / part, part)
        nodes = _write_graphs(whole, placed, folder, variant, dtype)
        licence = copy_licences(source, folder)
        manifest = Manifest(
            model_id=" + ".join([source.name, *(f"{x.name}:{weight:g}" for x, weight in adapters)]),
            variant=variant,
            dtype=dtype,
            config=whole.config,
            scheduler=whole.scheduler,
            prompt=prompt,
            files={},
            licence=licence,
            distilled=source.is_distilled,
        )
        save_preview_matrix(folder, manifest)
        files = _file_records(folder, placed)
        replace(manifest, files=files).save(folder)
        shared = {path for part in placed.values() for path in part.shared}
        written = sum(r.bytes for name, r in files.items() if folder / name not in shared)
        written += (folder / MANIFEST).stat().st_size
    return ExportResult(artifacts, dtype, nodes, time.perf_counter() - start, written)


def _read_checkpoint(source: Source, text_layers: tuple[int, ...]) -> _Checkpoint:
    folder = source.folder
    configs = {
        part: read_json(folder / part / "config.json", f"{part} config")
        for part in ("transformer", "text_encoder", "vae")
    }
    transformer = TransformerConfig.from_dict(configs["transformer"])
    check_text_width(transformer, configs["text_encoder"])
    text = TextEncoderConfig.from_dict(configs["text_encoder"], text_layers)
    config = ModelConfig(transformer, text, VaeConfig.from_dict(configs["vae"]))
    scheduler = read_json(folder / "scheduler/scheduler_config.json", "scheduler config")
    try:
        make_schedule(scheduler, num_inference_steps=4, image_seq_len=4096)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    parameters = {
        "transformer": transformer_parameters(transformer),
        "text_encoder": text_encoder_parameters(text),
        "vae": vae_parameters(config.vae),
    }
    unread = {"transformer": (), "text_encoder": UNREAD_TEXT, "vae": ("bn.num_batches_tracked",)}
    weights: dict[str, Mapping[str, StoredWeight]] = {}
    beside = {} if source.transformer is None else read_beside(source.transformer, parameters)
    for part, shapes in parameters.items():
        if part == "transformer" and source.transformer is not None:
            weights[part] = read_single_file(source.transformer, transformer)
        else:
            stored = beside.get(part) or read_folder(folder / part, part)
            check_weights(part, stored, shapes, unread[part])
            weights[part] = stored
        for name in shapes:
            dtype = weights[part][name].dtype
            if dtype not in (*_FLOATS, *_FLOAT8):
                raise CheckpointError(
                    f"{part}: {name} is {dtype}, expected one of {', '.join(_FLOATS)}"
                )
    return _Checkpoint(folder, config, scheduler, weights, parameters)


def _with_adapters(
    checkpoint: _Checkpoint, adapters: Sequence[tuple[Path, float]]
) -> dict[str, StoredWeight]:
    """The transformer's tensors, those that adapters change as `MergedWeight`."""
    shapes = checkpoint.parameters["transformer"]
    weights = dict(checkpoint.weights["transformer"])
    read = [(read_adapter(path, shapes), strength) for path, strength in adapters]
    merged = changes_by_tensor(read)
    return weights | {name: MergedWeight(weights[name], merged[name]) for name in merged}


def _file_records(folder: Path, placed: Mapping[str, Placement]) -> dict[str, FileRecord]:
    origins = {file: origin for part in placed.values() for file, origin in part.sources.items()}
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sha256 = known_sha256(origins[path]) if path in origins else ""
            name = path.relative_to(folder).as_posix()
            records[name] = FileRecord(path.stat().st_size, file_digest(path), sha256)
    return records


def _write_graphs(
    source: _Checkpoint, placed: Mapping[str, Placement], folder: Path, variant: str, dtype: str
) -> dict[str, int]:
    config, nodes = source.config, {}
    for label, graph, graphs in distinct_graphs(graph_sets(variant, dtype)):
        start, file = time.perf_counter(), graphs.files[graph]
        if file.startswith("transformer/"):
            refs = placed["transformer"].refs
            model = transformer_graph(graph, config, graphs, refs)
        elif graph == "text_encoder":
            model = text_encoder_graph(config, dtype, placed["text_encoder"].refs)
        else:
            model = vae_graph(graph, config, dtype, placed["vae"].refs)
        nodes[label] = len(model.graph)
        save_graph(model, folder / file)
        _log.info("%s: %d nodes, %.1f s", file, nodes[label], time.perf_counter() - start)
    (folder / "latents").mkdir()
    for graph, file in SMALL_GRAPH_FILES.items():
        save_graph(small_graph(graph, config, dtype), folder / file)
    return nodes
