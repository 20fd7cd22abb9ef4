"""What the keys of a LoRA file say: which module each is of, and which part of its change.

Files name modules as diffusers' `Flux2Transformer2DModel` or as Black Forest Labs do, with dots or
with underscores in their place. Every such name is in a table; none is taken apart.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from klein_kv.errors import RequestError
from klein_kv.networks.transformer_names import bfl_rows

__all__ = [
    "Piece",
    "file_format",
    "group_keys",
    "likely_model",
    "matrix_slots",
    "module_table",
    "some",
    "why_unmatched",
]

_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_ENDS = ("", ".weight", ".default", ".default.weight")
_STEMS = {
    "down": (".lora_A", ".lora_down", ".lora.down", "_lora.down", ".lora_linear_layer.down"),
    "up": (".lora_B", ".lora_up", ".lora.up", "_lora.up", ".lora_linear_layer.up"),
    "magnitude": (".lora_magnitude_vector", ".dora_scale"),
}
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_SLOTS = {f"{x}{end}": slot for slot, stems in _STEMS.items() for x in stems for end in _ENDS}
_SLOTS |= {f".{name}": name for name in (*_LOKR, *_LOHA, "alpha", "diff", "set_weight")}
_SLOTS |= {".w_norm": "diff"}  # LyCORIS' name for that of a norm
_TUCKER = (".lora_mid", ".lora_mid.weight", ".lokr_t1", ".lokr_t2", ".hada_t1", ".hada_t2")
_WRITERS = (  # how keys start, what one of them contains, who writes such
    ("lora_unet_", "", "kohya"),
    ("lycoris_", "", "LyCORIS"),
    ("lora_transformer_", "", "OneTrainer"),
    ("transformer.", ".lora_A", "PEFT (diffusers)"),
    ("transformer.", ".lora_down", "OneTrainer"),
    ("base_model.model.", "", "PEFT (fal, BFL)"),
    ("diffusion_model.", ".lora_down", "ComfyUI"),
    ("diffusion_model.", "", "ai-toolkit"),
    ("", ".default", "DiffSynth"),
    ("", "", "plain names"),
)
_ALGORITHMS = {"lokr": " LoKr", "hada": " LoHa", "diff": " full", "set": " full"}
_TEXT_ENCODER = ("lora_te", "text_encoder", "lora_text_encoder", "te1.", "te2.", "clip_")
_BIASES = (".diff_b", ".b_norm", ".bias")
_MODELS = (
    (r"img_mod|txt_mod|_blocks[._]\d+[._](modulation|norm1?[._])|proj_mlp", "FLUX.1"),
    (r"(down|up|input|output)_blocks|mid(dle)?_block", "Stable Diffusion"),
)
_WIDTHS = {3072: "FLUX.2 [klein] 4B or FLUX.1", 4096: "FLUX.2 [klein] 9B", 6144: "FLUX.2 [dev]"}


def some(keys: Sequence[str]) -> str:
    """Up to three of the keys, for a message."""
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def group_keys(keys: Iterable[str], where: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """For each module, without prefixes, its keys by slot; and the keys that are no such thing.

    Slots are "down", "up", "magnitude", "alpha", "diff", "set_weight" and LyCORIS' "lokr_..." and
    "hada_...". A part that no linear layer has, or two keys of one meaning, is a `RequestError`.
    """
    modules: dict[str, dict[str, str]] = {}
    others = []
    for key in keys:
        if key.endswith((*_TUCKER, ".reshape_weight")):
            what = "is of a Tucker decomposition, which only convolutions have"
            what = "gives a weight another shape" if key.endswith("_weight") else what
            raise RequestError(f"{where}: {key} {what}; expected changes of linear layers")
        end = next((end for end in _SLOTS if key.endswith(end)), None)
        if end is None:
            others.append(key)
            continue
        module = key.removesuffix(end)
        while prefix := next((prefix for prefix in _PREFIXES if module.startswith(prefix)), ""):
            module = module.removeprefix(prefix)
        slots = modules.setdefault(module, {})
        other = slots.setdefault(_SLOTS[end], key)
        if other != key:
            raise RequestError(f"{where}: {other} and {key} mean the same; expected one of them")
    return modules, others


def matrix_slots(slots: Iterable[str], where: str) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """The kind of a module's change (`TensorChange.kind`) and the slots of its matrices' factors.

    A factor without its other half, or not one kind of change, is a `RequestError`.
    """
    held = set(slots)
    matrices: tuple[tuple[str, ...], ...]
    if held & {"down", "up"}:
        kind, matrices = "LoRA", (("up", "down"),)
    elif held.intersection(_LOKR):
        kind, matrices = "LoKr", tuple(_whole_or_pair(f"lokr_{x}", held) for x in ("w1", "w2"))
    elif held.intersection(_LOHA):
        kind, matrices = "LoHa", (_LOHA[:2], _LOHA[2:])
    elif "diff" in held:
        kind, matrices = "full", (("diff",),)
    else:
        kind, matrices = "set", (("set_weight",),)
    needed = {slot for matrix in matrices for slot in matrix}
    allowed = needed | ({"alpha"} if kind in ("full", "set") else {"alpha", "magnitude"})
    if missing := sorted(needed - held):
        raise RequestError(f"{where} lacks {' and '.join(missing)}; the file is not whole")
    if extra := sorted(held - allowed):
        raise RequestError(f"{where} has {' and '.join(extra)} beside {kind}; expected one change")
    return kind, matrices


def _whole_or_pair(slot: str, held: set[str]) -> tuple[str, ...]:
    return (slot,) if slot in held else (f"{slot}_a", f"{slot}_b")


def file_format(keys: Sequence[str]) -> str:
    """Who writes such keys, and what kind of change; for people."""
    writer = next(
        name
        for start, part, name in _WRITERS
        if any(key.startswith(start) and part in key for key in keys)
    )
    kinds = {
        text for stem, text in _ALGORITHMS.items() if any(f".{stem}_" in f"{k}_" for k in keys)
    }
    dora = " DoRA" if any("dora_scale" in k or "magnitude_vector" in k for k in keys) else ""
    return writer + "".join(sorted(kinds)) + dora


def likely_model(keys: Iterable[str], width: int | None = None) -> str:
    """What the file seems to be for, as half a sentence; "" if nothing tells."""
    text = "\n".join(keys)
    model = next((name for pattern, name in _MODELS if re.search(pattern, text)), None)
    model = model or _WIDTHS.get(width or 0)
    return f"; the file seems to be for {model}" if model else ""


def why_unmatched(keys: Iterable[str]) -> str:
    """What keys that match nothing are, as half a sentence; "" if nothing tells."""
    keys = list(keys)
    if any(key.startswith(_TEXT_ENCODER) for key in keys):
        return " (a text encoder's; klein-kv takes changes of the transformer alone)"
    if any(key.endswith(_BIASES) for key in keys):
        return " (biases; klein's layers have none)"
    return likely_model(keys)


class Piece(NamedTuple):
    """Rows `source` (start, stop) of a module's change are for rows `target` of a tensor."""

    tensor: str
    source: tuple[int, int]
    target: tuple[int, int]


def module_table(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Piece, ...]]:
    """For each name that a file may give a module, the rows of our tensors that it changes.

    Args:
        shapes: names and shapes of `transformer_parameters`.
    """
    table: dict[str, tuple[Piece, ...]] = {}
    for name, (rows, *_) in shapes.items():
        table[name.removesuffix(".weight")] = (Piece(name, (0, rows), (0, rows)),)
    for name, parts in bfl_rows(shapes).items():
        end = 0
        for source, start, stop in parts:
            piece = Piece(name, (start, stop), (end, end + stop - start))
            end = piece.target[1]
            module = source.removesuffix(".weight").removesuffix(".scale")
            table[module] = (*table.get(module, ()), piece)
            if source.endswith(".scale"):
                table[source] = (piece,)
            elif source.endswith("qkv.weight"):  # OneTrainer: q, k and v apart
                number = start // (stop - start)
                table[f"{module}.{number}"] = (Piece(name, piece.target, piece.target),)
            elif source.endswith("linear1.weight"):  # OneTrainer: q, k, v and the MLP apart
                dim = shapes[name][1]
                bounds = (0, dim, 2 * dim, 3 * dim, stop)
                for number, (low, high) in enumerate(pairwise(bounds)):
                    table[f"{module}.{number}"] = (Piece(name, (0, high - low), (low, high)),)
    return {name.replace(".", "_"): pieces for name, pieces in table.items()} | table
