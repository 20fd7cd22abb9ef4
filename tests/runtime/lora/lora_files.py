"""LoRA files as their writers write them, and what they do to dense weights: float64, by hand.

Nothing is shared with the reader under test but the names of diffusers' tensors: each layout names
modules by itself (Black Forest Labs' through `tests.bfl_files`), and each algorithm is a formula.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.networks.transformer import transformer_parameters
from tests.bfl_files import bfl_state

Array = NDArray[Any]
State = dict[str, Array]

CONFIG = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 4, 4),
    "timestep_guidance_channels": 20,
    "guidance_embeds": False,
}
SHAPES = transformer_parameters(TransformerConfig.from_dict(CONFIG))
RANK, ALPHA = 4, 6.0


def weights(seed: int = 0) -> State:
    """float32 weights of the tiny transformer."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


# Layouts: a state under diffusers' names -> its modules under a writer's names.


def diffusers_modules(state: State) -> State:
    return {name.removesuffix(".weight"): value for name, value in state.items()}


def bfl_modules(state: State) -> State:
    tensors = bfl_state({name: torch.from_numpy(value) for name, value in state.items()})
    return {name.removesuffix(".weight"): value.numpy() for name, value in tensors.items()}


def part_modules(state: State) -> State:
    """OneTrainer's: q, k, v of double blocks apart; q, k, v and the MLP of single blocks."""
    modules: State = {}
    for name, value in bfl_modules(state).items():
        dim = value.shape[-1]
        if name.endswith("qkv"):
            cuts = [dim, 2 * dim]
        elif name.endswith("linear1"):
            cuts = [dim, 2 * dim, 3 * dim]
        else:
            modules[name] = value
            continue
        modules |= {f"{name}.{i}": part for i, part in enumerate(np.split(value, cuts))}
    return modules


# Algorithms: numbers by part of a module's change, and the new weight at a strength.

Change = tuple[State, Callable[[Array, float], Array]]


def _factors(rng: np.random.Generator, *shapes: tuple[int, int]) -> list[Array]:
    """Numbers that bfloat16 holds exactly."""
    values = [torch.from_numpy(rng.normal(size=shape)).bfloat16() for shape in shapes]
    return [value.double().numpy() for value in values]


def _added(parts: State, delta: Array) -> Change:
    return parts, lambda weight, strength: weight + strength * delta


def lora(rng: np.random.Generator, weight: Array, alpha: float | None = ALPHA) -> Change:
    up, down = _factors(rng, (len(weight), RANK), (RANK, weight.shape[1]))
    parts = {"up": up, "down": down}
    if alpha is not None:
        parts["alpha"] = np.array(alpha)
    return _added(parts, up @ down * (1 if alpha is None else alpha / RANK))


def lokr(rng: np.random.Generator, weight: Array, pairs: str = "") -> Change:
    """`pairs` names the factors that are products themselves: "", "2" or "12"."""
    rows, columns = weight.shape
    shapes = {"1": (4, 2), "2": (rows // 4, columns // 2)}
    parts: State = {"alpha": np.array(ALPHA if pairs else np.inf)}
    whole = {}
    for which, (high, wide) in shapes.items():
        if which in pairs:
            a, b = _factors(rng, (high, RANK), (RANK, wide))
            parts |= {f"lokr_w{which}_a": a, f"lokr_w{which}_b": b}
            whole[which] = a @ b
        else:
            (whole[which],) = _factors(rng, (high, wide))
            parts[f"lokr_w{which}"] = whole[which]
    return _added(parts, np.kron(whole["1"], whole["2"]) * (ALPHA / RANK if pairs else 1))


def loha(rng: np.random.Generator, weight: Array) -> Change:
    high, wide = (len(weight), RANK), (RANK, weight.shape[1])
    a1, b1, a2, b2 = _factors(rng, high, wide, high, wide)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    parts["alpha"] = np.array(ALPHA)
    return _added(parts, (a1 @ b1) * (a2 @ b2) * ALPHA / RANK)


def dora(
    rng: np.random.Generator,
    weight: Array,
    inner: Callable[..., Change] = lora,
    columns: bool = False,
) -> Change:
    parts, add = inner(rng, weight)
    shape = (1, weight.shape[1]) if columns else (len(weight), 1)
    (magnitude,) = _factors(rng, shape)

    def apply(weight: Array, strength: float) -> Array:
        new = add(weight, 1)
        new = new * magnitude / np.sqrt((new**2).sum(0 if columns else 1, keepdims=True))
        return (1 - strength) * weight + strength * new

    return parts | {"dora_scale": magnitude}, apply


def full(rng: np.random.Generator, weight: Array) -> Change:
    diff = _factors(rng, weight.shape)[0]
    return _added({"diff": diff}, diff)


def replaced(rng: np.random.Generator, weight: Array) -> Change:
    new = _factors(rng, weight.shape)[0]
    return {"set_weight": new}, lambda old, strength: (1 - strength) * old + strength * new


@dataclass(frozen=True)
class Writer:
    """One program's way to write one kind of change.

    Attributes:
        format: what the reader calls it.
        layout: gives the modules of a state.
        algorithm: makes the change of a module.
        key: full key of a module's part.
        only: which modules are changed.
    """

    format: str
    layout: Callable[[State], State]
    algorithm: Callable[..., Change]
    key: Callable[[str, str], str]
    only: Callable[[str, Array], bool] = lambda name, weight: weight.ndim == 2


# Keys: what is written before a module's name, and its parts' names behind that.


def _dotted(prefix: str, up: str = "", down: str = "") -> Callable[[str, str], str]:
    ends = {"up": up, "down": down}
    return lambda module, part: f"{prefix}{module}{ends.get(part, '.' + part)}"


def _flat(prefix: str) -> Callable[[str, str], str]:
    dotted = _dotted("", *_UP_DOWN)
    return lambda module, part: prefix + dotted(module.replace(".", "_"), part)


_AB = (".lora_B.weight", ".lora_A.weight")
_AB_DEFAULT = (".lora_B.default.weight", ".lora_A.default.weight")
_AB_BARE = (".lora_B", ".lora_A")
_UP_DOWN = (".lora_up.weight", ".lora_down.weight")
_OLD = (".lora.up.weight", ".lora.down.weight")
_OLDER = ("_lora.up.weight", "_lora.down.weight")
_LINEAR_LAYER = (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")

_PLAIN = partial(lora, alpha=None)
_COLUMNS = partial(dora, columns=True)
_PAIR, _PAIRS = (partial(lokr, pairs=pairs) for pairs in ("2", "12"))
_DOKR = partial(dora, inner=lokr)


def _whole(name: str, weight: Array) -> bool:
    """Modules that are one tensor of diffusers' layout, in its order of rows."""
    return weight.ndim == 2 and not name.endswith(("qkv", "adaLN_modulation.1"))


def _all(_name: str, _weight: Array) -> bool:
    return True


_DIFFUSERS, _BFL, _PARTS = diffusers_modules, bfl_modules, part_modules
_KOHYA, _LYCORIS, _AI = _flat("lora_unet_"), _flat("lycoris_"), _dotted("diffusion_model.")
_ONE_TRAINER = _dotted("transformer.", *_UP_DOWN)
WRITERS = {
    "diffusers": Writer("PEFT (diffusers)", _DIFFUSERS, _PLAIN, _dotted("transformer.", *_AB)),
    "diffsynth": Writer("DiffSynth", _DIFFUSERS, _PLAIN, _dotted("", *_AB_DEFAULT)),
    "ai-toolkit": Writer("ai-toolkit", _BFL, _PLAIN, _dotted("diffusion_model.", *_AB)),
    "ai-toolkit-lokr": Writer("ai-toolkit LoKr", _BFL, lokr, _AI),
    "kohya": Writer("kohya", _BFL, lora, _KOHYA),
    "fal": Writer("PEFT (fal, BFL)", _BFL, _PLAIN, _dotted("base_model.model.", *_AB)),
    "onetrainer": Writer("OneTrainer", _PARTS, lora, _ONE_TRAINER),
    "onetrainer-dora": Writer("OneTrainer DoRA", _PARTS, _COLUMNS, _ONE_TRAINER, _whole),
    "lycoris-lokr": Writer("LyCORIS LoKr", _BFL, _PAIR, _LYCORIS),
    "lycoris-lokr-pairs": Writer("LyCORIS LoKr", _DIFFUSERS, _PAIRS, _LYCORIS),
    "lycoris-loha": Writer("LyCORIS LoHa", _BFL, loha, _LYCORIS),
    "lycoris-dora": Writer("LyCORIS DoRA", _BFL, dora, _LYCORIS),
    "lycoris-dokr": Writer("LyCORIS LoKr DoRA", _BFL, _DOKR, _LYCORIS),
    "comfyui": Writer("ComfyUI", _BFL, lora, _dotted("diffusion_model.", *_UP_DOWN)),
    "mixed-dora": Writer("kohya DoRA", _DIFFUSERS, dora, _KOHYA),
    "column-dora": Writer("kohya DoRA", _BFL, _COLUMNS, _KOHYA, _whole),
    "full": Writer("ai-toolkit full", _BFL, full, _AI, _all),
    "set": Writer("ai-toolkit full", _BFL, replaced, _AI, _all),
    "old-diffusers": Writer("plain names", _DIFFUSERS, lora, _dotted("", *_OLD)),
    "older-diffusers": Writer("plain names", _DIFFUSERS, lora, _dotted("unet.", *_OLDER)),
    "linear-layer": Writer("plain names", _DIFFUSERS, lora, _dotted("", *_LINEAR_LAYER)),
    "bare-ab": Writer("plain names", _BFL, _PLAIN, _dotted("model.diffusion_model.", *_AB_BARE)),
}


def make(
    writer: Writer, seed: int = 1
) -> tuple[State, Mapping[str, Callable[[Array, float], Array]]]:
    """Tensors of a file that changes all modules, and for each module the new weight."""
    rng = np.random.default_rng(seed)
    tensors, apply = {}, {}
    for module, weight in writer.layout(weights()).items():
        if writer.only(module, weight):
            parts, apply[module] = writer.algorithm(rng, weight)
            tensors |= {writer.key(module, part): value for part, value in parts.items()}
    return tensors, apply


def save(path: Path, tensors: State, dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
    """A safetensors file of the tensors."""
    values = {name: torch.from_numpy(np.array(value)).to(dtype) for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in values.items()}, path, metadata or None)
    return path
