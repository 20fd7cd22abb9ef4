"""The sizes that engines take, in the pixels that people ask for."""

import math
from collections.abc import Iterator, Mapping

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.engines.engine_record import ProfileRecord

__all__ = ["shapes_text", "sizes_text"]

_STEPS = ("cached_step", "first_step", "plain_step")
_USUAL_SIDE = 1024  # pixels of a reference


def sizes_text(engines: EngineManifest, unit: int) -> str:
    """Outputs and references, as far as a folder's manifest tells.

    `unit` is the pixels of a token's side. An example: "outputs of 512x512 to 1440x1440 pixels;
    references of none to 2048x2048 pixels together (4 of 1024x1024)". Several profiles are joined
    by "; or ".
    """
    records = engines.engines
    step = next((records[graph] for graph in _STEPS if graph in records), None)
    decoder = records.get("vae_decoder")
    texts = []
    for profile in () if step is None else step.profiles:
        same = () if decoder is None else decoder.profiles
        sides = next((x for x in same if x.name == profile.name), next(iter(same), None))
        texts.append("; ".join(_parts(profile, sides, unit)))
    return "; or ".join(dict.fromkeys(filter(None, texts))) or "sizes that are not told"


def _parts(step: ProfileRecord, decoder: ProfileRecord | None, unit: int) -> Iterator[str]:
    grids = {} if decoder is None else decoder.symbols
    area = ""
    if "image_tokens" in step.symbols:
        low, _, high = step.symbols["image_tokens"]
        area = _span(_area(low, unit), _area(high, unit))
    if {"grid_width", "grid_height"} <= grids.keys():
        ends = zip(grids["grid_width"], grids["grid_height"], strict=True)
        least, _, most = (f"{width * unit}x{height * unit}" for width, height in ends)
        sides = _span(least, most)
        yield f"outputs of {sides} pixels" + (f", area {area}" if area not in ("", sides) else "")
    elif area:
        yield f"outputs of an area of {area} pixels"
    if "ref_tokens" in step.symbols:
        low, _, high = step.symbols["ref_tokens"]
        usual = high * unit * unit // _USUAL_SIDE**2
        text = f"references of {_span(_area(low, unit), _area(high, unit))} pixels together"
        yield text + (f" ({usual} of {_USUAL_SIDE}x{_USUAL_SIDE})" if usual else "")
    if step.symbols.get("batch", (1, 1, 1)) != (1, 1, 1):
        yield f"{_span(*map(str, step.symbols['batch'][::2]))} images at once"


def shapes_text(shapes: Mapping[str, tuple[int, ...]], unit: int) -> str:
    """What inputs of these shapes are for, likewise."""
    texts = []
    for name, shape in shapes.items():
        if name == "hidden_states":
            texts.append(f"an output of an area of {_area(shape[1], unit)} pixels")
        elif name == "latents":
            texts.append(f"an output of {shape[2] * unit}x{shape[1] * unit} pixels")
        elif name == "image":
            texts.append(f"a reference of {shape[2]}x{shape[1]} pixels")
        elif name in ("ref_hidden_states", "k_ref.0"):
            texts.append(f"references of {_area(shape[1], unit)} pixels together")
        elif name in ("input_ids", "encoder_hidden_states"):
            texts.append(f"{shape[1]} prompt tokens")
        if name in ("hidden_states", "latents", "input_ids") and shape[0] > 1:
            texts.append(f"{shape[0]} at once")
    return ", ".join(texts) or "these inputs"


def _area(tokens: int, unit: int) -> str:
    """Pixels of so many tokens, as the square of that area if it is one: "1024x1024"."""
    side = math.isqrt(tokens)
    if side * side == tokens:
        return f"{side * unit}x{side * unit}" if tokens else "none"
    return f"{tokens * unit * unit / 1e6:.2f} million"


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"
