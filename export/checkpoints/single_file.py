"""A model out of one safetensors file, under diffusers' names, without copying it.

Files of Black Forest Labs name and lay out some of them differently (`networks.transformer_names`).
The last modulation, whose halves change places, is the one tensor that has to be written anew.
Files with diffusers' own names, or with q, k and v apart, are read too.

ComfyUI's files with a whole pipeline hold the text encoder under transformers' names as
`text_encoders.qwen3_8b.transformer.*` or qwen3_4b (ComfyUI, `supported_models.py`, `Flux2`), and
the VAE as `vae.*` under the names of Black Forest Labs, but that its two 1x1 convolutions
`quant_conv` and `post_quant_conv` lie at the root (`comfy/sd.py`, `VAE`).
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.weights import WeightRef, read_header, read_metadata
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.quantized_files import (
    BESIDE,
    FileWeight,
    read_weights,
    weights_from_refs,
)
from klein_kv.export.checkpoints.stored_weights import JoinedRows, StoredWeight
from klein_kv.export.checkpoints.weight_index import check_names
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.networks.transformer_names import Rows, bfl_rows

__all__ = ["parts_beside", "read_beside", "read_single_file"]

_log = logging.getLogger(__name__)

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")

_TEXT = re.compile(r"text_encoders\.(qwen3_\w+)\.transformer\.")
_VAE = "vae."
_LDM_NAMES = (  # of diffusers' VAE, and what Black Forest Labs call it
    (r"(en|de)coder\.conv_norm_out", r"\1coder.norm_out"),
    (r"(\d+)\.downsamplers\.0\.conv", r"\1.downsample.conv"),
    (r"down_blocks", "down"),
    (r"(\d+)\.upsamplers\.0\.conv", r"\1.upsample.conv"),
    (r"(\d+)\.resnets", r"\1.block"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
)

_MODELS = {3072: "klein 4B", 4096: "klein 9B"}
"""Released models by the width of their transformer."""


def read_single_file(path: Path, config: TransformerConfig) -> dict[str, StoredWeight]:
    """Finds every tensor of the transformer in one file, by diffusers' names; no weight is read.

    A `CheckpointError` tells of a file that is no whole safetensors file, and of missing,
    unexpected or misshapen tensors.
    """
    stored = read_weights(path, _PREFIXES)
    shapes = transformer_parameters(config)
    table: dict[str, tuple[Rows, ...]] = {name: ((name, 0, shapes[name][0]),) for name in shapes}
    if "x_embedder.weight" not in stored:
        table = bfl_rows(shapes, stored)
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        for source, _, stop in table[name]:
            rows = max(stop, expected.get(source, (0,))[0])
            expected[source] = (rows, *shape[1:])
    _check_tensors(path, stored, expected)
    weights: dict[str, StoredWeight] = {}
    for name in shapes:
        parts = tuple(
            stored[source]
            if stop - start == expected[source][0]
            else stored[source].rows(start, stop)
            for source, start, stop in table[name]
        )
        weights[name] = parts[0] if len(parts) == 1 else JoinedRows(parts)
    return weights


def parts_beside(names: Collection[str]) -> set[str]:
    """Which of "text_encoder" and "vae" a file holds in a layout that is known, by its names."""
    parts = set()
    if len({match[0] for name in names if (match := _TEXT.match(name))}) == 1:
        parts.add("text_encoder")
    if f"{_VAE}bn.running_mean" in names:
        parts.add("vae")
    return parts


def read_beside(
    path: Path, parameters: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, dict[str, FileWeight]]:
    """Text encoder and VAE of a file with a whole pipeline; it warns of what is not read.

    By part its tensors under the names of transformers and diffusers, not yet checked;
    `parameters` are names and shapes that each part should have. Errors as of `read_weights`.
    """
    refs = read_header(path, quantized=True)
    parts: dict[str, dict[str, FileWeight]] = {}
    held = parts_beside(refs)
    unread = {name.partition(".")[0] for name in refs if name.startswith(BESIDE)}
    if "text_encoder" in held:
        unread.discard("text_encoders")
        own = {_TEXT.sub("", name): ref for name, ref in refs.items() if _TEXT.match(name)}
        parts["text_encoder"] = weights_from_refs(path, own, read_metadata(path))
    if "vae" in held:
        unread.discard("vae")
        own = {name.removeprefix(_VAE): x for name, x in refs.items() if name.startswith(_VAE)}
        parts["vae"] = dict(_vae_from_ldm(own, parameters["vae"]))
    if unread:
        _log.warning(
            "%s holds a whole pipeline: its %s are not read, those of the base are",
            path.name,
            " and ".join(sorted(unread)),
        )
    return parts


def _vae_from_ldm(
    stored: Mapping[str, WeightRef], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, WeightRef]:
    """Tensors by diffusers' names; those that are missing or left over keep the file's."""
    levels = 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("decoder.up_blocks."))
    left, found = dict(stored), {}
    for name, shape in shapes.items():
        other = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        for pattern, new in _LDM_NAMES:
            other = re.sub(pattern, new, other)
        nested = re.sub(r"^post_quant_conv", "decoder.post_quant_conv", other)
        nested = re.sub(r"^quant_conv", "encoder.quant_conv", nested)
        source = next((x for x in (name, other, nested) if x in left), None)
        if source is not None:
            ref = left.pop(source)
            if ref.shape == (*shape, 1, 1):  # attention as convolutions of one pixel
                ref = replace(ref, shape=shape)
            found[name] = ref
    return left | found


def _check_tensors(
    path: Path,
    stored: Mapping[str, FileWeight],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    for name in ("img_in.weight", "x_embedder.weight"):
        if name in stored and name in expected and stored[name].shape[:1] != expected[name][:1]:
            raise CheckpointError(_shape_text(path, name, stored[name].shape, expected[name]))
    check_names(
        stored,
        expected,
        f"{path}: its tensors are not those of a FLUX.2 [klein] transformer of the base "
        "checkpoint's size",
    )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(_shape_text(path, name, stored[name].shape, shape))


def _shape_text(path: Path, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    models = (
        f"{x} ({_MODELS[x[0]]})" if x and x[0] in _MODELS else f"{x}" for x in (got, expected)
    )
    return (
        f"{path}: {name} has shape {next(models)}, expected {next(models)} from the base "
        "checkpoint's transformer/config.json; take the base of the same model size"
    )
