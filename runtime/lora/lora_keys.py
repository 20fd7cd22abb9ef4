"""What the keys of a LoRA file say: which module each is of, and which part of its change."""

import re
from collections.abc import Iterable, Sequence

from klein_kv.errors import RequestError
from klein_kv.runtime.lora.module_names import without_prefix

__all__ = ["file_format", "group_keys", "likely_model", "matrix_slots", "some", "why_unmatched"]

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
    "hada_...".

    Raises:
        RequestError: a part that no linear layer has, or two keys of one meaning.
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
        slots = modules.setdefault(without_prefix(key.removesuffix(end)), {})
        other = slots.setdefault(_SLOTS[end], key)
        if other != key:
            raise RequestError(f"{where}: {other} and {key} mean the same; expected one of them")
    return modules, others


def matrix_slots(slots: Iterable[str], where: str) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """The kind of a module's change (`TensorChange.kind`) and the slots of its matrices' factors.

    Raises:
        RequestError: a factor without its other half, or not one kind of change.
    """
    held = set(slots)
    groups: list[tuple[str, tuple[tuple[str, ...], ...]]] = []
    if held & {"down", "up"}:
        groups.append(("LoRA", (("up", "down"),)))
    if held.intersection(_LOKR):
        groups.append(("LoKr", tuple(_whole_or_pair(f"lokr_{x}", held) for x in ("w1", "w2"))))
    if held.intersection(_LOHA):
        groups.append(("LoHa", (_LOHA[:2], _LOHA[2:])))
    if "diff" in held:
        groups.append(("full", (("diff",),)))
    if "set_weight" in held:
        groups.append(("set", (("set_weight",),)))
    kind, matrices = groups[0]
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
