"""The tensors of a component's folder, and whether they are those that a network has."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from klein_kv.artifacts.config import read_json
from klein_kv.artifacts.weights import WeightRef, read_header, read_metadata
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.quantized_files import (
    FileWeight,
    read_weights,
    weights_from_refs,
)

__all__ = ["UNREAD_TEXT", "check_names", "check_weights", "read_folder"]

_LORA = re.compile(r"(^|[._])(lora|lokr|loha|hada|dora)(_|\.|$)")
UNREAD_TEXT = ("model.layers.", "model.norm.", "lm_head.")
"""Beginnings of a text encoder's tensors that graphs may leave out: those after the last block
whose output they read."""

_FILE_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""What diffusers and transformers save a component as."""


def read_folder(folder: Path, component: str) -> dict[str, FileWeight]:
    """Finds a component's safetensors: one file, or the shards that an index names.

    Files of a variant ("model.fp16.safetensors") count where there are none without, as long as
    they leave no choice; else a `CheckpointError`.
    """
    for name in _FILE_NAMES:
        if (index := folder / f"{name}.index.json").exists():
            return _read_shards(index, component)
        if (file := folder / name).exists():
            return read_weights(file)
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    if len(indices) == 1:
        return _read_shards(indices[0], component)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"{component}: expected one .safetensors file or an index of shards in {folder}, "
            f"found {names} (pickle formats such as .bin and .pt are not read)"
        )
    return read_weights(files[0])


def check_weights(
    component: str,
    weights: Mapping[str, FileWeight],
    shapes: Mapping[str, tuple[int, ...]],
    ignore: tuple[str, ...] = (),
) -> None:
    """Checks names and shapes strictly, but for names with a prefix of `ignore`.

    A `CheckpointError` tells of missing, unexpected or misshapen tensors.
    """
    what = f"{component}: the checkpoint's tensors do not match its config.json"
    check_names(weights, shapes, what, ignore)
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise CheckpointError(
                f"{component}: {name} has shape {weights[name].shape}, expected {shape} from "
                "config.json"
            )


def check_names(
    stored: Collection[str], expected: Collection[str], what: str, ignore: tuple[str, ...] = ()
) -> None:
    """Refuses tensors that are missing or left over, but for those with a prefix of `ignore`.

    A `CheckpointError`, which begins with `what`, counts them, and knows LoRA layers.
    """
    missing = [name for name in expected if name not in stored]
    extra = [n for n in stored if n not in expected and not n.startswith(ignore or ("\0",))]
    if not missing and not extra:
        return
    counts = f"{len(missing)} missing{_some(missing)}, {len(extra)} unexpected{_some(extra)}"
    raise CheckpointError(f"{what}: {counts}{_lora_advice(stored)}")


def _some(names: list[str]) -> str:
    if not names:
        return ""
    return " (" + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") + ")"


def _lora_advice(names: Collection[str]) -> str:
    """What to do about LoRA layers; PEFT renames the layer that it wraps to NAME.base_layer."""
    wrapped = [name for name in names if ".base_layer." in name]
    lora = [name for name in names if _LORA.search(name)]
    if wrapped:
        return (
            f"; LoRA layers were left in it ({wrapped[0]}): load it where it was made, call "
            "fuse_lora() and then unload_lora_weights(), and save it again with save_pretrained()"
        )
    if lora and 2 * len(lora) > len(names):
        return (
            f"; it is a LoRA ({lora[0]}), not a checkpoint: export the model that it was trained "
            "on, and give the LoRA to load_lora_weights()"
        )
    if lora:
        return f"; it holds LoRA layers ({lora[0]}) beside its own: take a file without them"
    return ""


def _read_shards(index: Path, component: str) -> dict[str, FileWeight]:
    weight_map = read_json(index, f"{component} shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{component}: {index} has no weight_map")
    shards: dict[str, dict[str, WeightRef]] = {}
    metadata: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{component}: {index.name} names {shard!r}, expected a file in the same folder"
            )
        if shard not in shards:
            shards[shard] = read_header(index.parent / shard, quantized=True)
            metadata |= read_metadata(index.parent / shard)
        if name not in shards[shard]:
            raise CheckpointError(
                f"{component}: {index.name} says {name} is in {shard}, but that file lacks it"
            )
    for shard, held in shards.items():
        stray = [name for name in held if weight_map.get(name) != shard]
        if stray:
            raise CheckpointError(
                f"{component}: {shard} holds {stray[0]}, which {index.name} does not place there"
            )
    refs = {name: shards[shard][name] for name, shard in weight_map.items()}
    return weights_from_refs(index, refs, metadata)
