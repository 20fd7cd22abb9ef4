"""Single files as Black Forest Labs publishes them, made and read without klein-kv.

What is written here follows the names in black-forest-labs/flux2 and the layouts of ComfyUI's
comfy-kitchen, by hand: nothing is shared with the readers under test. `dequantized` is the
independent reader: ComfyUI's formula in float32, over torch's float8 and an explicit position for
every block scale.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "bfl_state",
    "dequantized",
    "ldm_vae_state",
    "quantize",
    "save_single_file",
    "tiled",
    "untiled",
    "write_sparse",
]

# e2m1: one sign bit, two of exponent with bias 1, one of mantissa.
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def bfl_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers transformer's state under the names, and in the layout, of the single files."""
    out: dict[str, Tensor] = {}
    renames = {
        "x_embedder.weight": "img_in.weight",
        "context_embedder.weight": "txt_in.weight",
        "time_guidance_embed.timestep_embedder.linear_1.weight": "time_in.in_layer.weight",
        "time_guidance_embed.timestep_embedder.linear_2.weight": "time_in.out_layer.weight",
        "double_stream_modulation_img.linear.weight": "double_stream_modulation_img.lin.weight",
        "double_stream_modulation_txt.linear.weight": "double_stream_modulation_txt.lin.weight",
        "single_stream_modulation.linear.weight": "single_stream_modulation.lin.weight",
        "proj_out.weight": "final_layer.linear.weight",
    }
    for name, new in renames.items():
        out[new] = state[name]
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    blocks = {tuple(name.split(".")[:2]) for name in state if "transformer_blocks" in name}
    for kind, number in sorted(blocks):
        at = f"{kind}.{number}"
        if kind == "transformer_blocks":
            new = f"double_blocks.{number}"
            for stream, names, norms, proj, ff in (
                ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
                (
                    "txt",
                    ("add_q_proj", "add_k_proj", "add_v_proj"),
                    ("norm_added_q", "norm_added_k"),
                    "to_add_out",
                    "ff_context",
                ),
            ):
                qkv = [state[f"{at}.attn.{name}.weight"] for name in names]
                out[f"{new}.{stream}_attn.qkv.weight"] = torch.cat(qkv)
                out[f"{new}.{stream}_attn.proj.weight"] = state[f"{at}.attn.{proj}.weight"]
                for norm, what in zip(norms, ("query_norm", "key_norm"), strict=True):
                    out[f"{new}.{stream}_attn.norm.{what}.scale"] = state[
                        f"{at}.attn.{norm}.weight"
                    ]
                out[f"{new}.{stream}_mlp.0.weight"] = state[f"{at}.{ff}.linear_in.weight"]
                out[f"{new}.{stream}_mlp.2.weight"] = state[f"{at}.{ff}.linear_out.weight"]
        else:
            new = f"single_blocks.{number}"
            out[f"{new}.linear1.weight"] = state[f"{at}.attn.to_qkv_mlp_proj.weight"]
            out[f"{new}.linear2.weight"] = state[f"{at}.attn.to_out.weight"]
            out[f"{new}.norm.query_norm.scale"] = state[f"{at}.attn.norm_q.weight"]
            out[f"{new}.norm.key_norm.scale"] = state[f"{at}.attn.norm_k.weight"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def ldm_vae_state(state: dict[str, Tensor], *, nested: bool = False) -> dict[str, Tensor]:
    """A diffusers VAE's state as ComfyUI names it; `nested` as Black Forest Labs do."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if "decoder.up_blocks" in name)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        words = name.split(".")
        if words[1] == "mid_block" and words[2] == "resnets":
            words[1:4] = ["mid", f"block_{int(words[3]) + 1}"]
        elif words[1] == "mid_block":
            part = {"group_norm": "norm", "to_out": "proj_out"}.get(words[4], words[4][-1])
            words[1:-1] = ["mid", "attn_1", part]
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        elif words[1] == "down_blocks":
            kind = ["block", words[4]] if words[3] == "resnets" else ["downsample"]
            words[1:5] = ["down", words[2], *kind]
        elif words[1] == "up_blocks":
            kind = ["block", words[4]] if words[3] == "resnets" else ["upsample"]
            words[1:5] = ["up", str(levels - 1 - int(words[2])), *kind]
        elif words[1] == "conv_norm_out":
            words[1] = "norm_out"
        elif nested and words[0].endswith("quant_conv"):
            words[:0] = ["decoder" if words[0].startswith("post") else "encoder"]
        words = ["nin_shortcut" if word == "conv_shortcut" else word for word in words]
        out[".".join(words)] = tensor.contiguous()
    return out


def quantize(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Quantizes the matrices of the blocks: "fp8" or "nvfp4"."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if "blocks." not in name or tensor.ndim != 2:
            out[name] = tensor.to(torch.bfloat16)
        elif kind == "fp8":
            scale = tensor.abs().max().float() / 448
            out[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            out[f"{layer}.weight_scale"] = scale
            out[f"{layer}.input_scale"] = torch.tensor(0.5)
        else:
            out |= _nvfp4(layer, tensor.float())
    return out


def _nvfp4(layer: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    scale = weight.abs().max() / (448 * 6)
    blocks = weight.reshape(rows, columns // 16, 16)
    block_scales = (blocks.abs().amax(-1) / 6 / scale).clamp(max=448).to(torch.float8_e4m3fn)
    steps = (block_scales.float() * scale).clamp(min=1e-30)
    codes = (blocks / steps[..., None]).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    codes = codes.reshape(rows, columns).to(torch.uint8)
    return {
        f"{layer}.weight": codes[:, ::2] << 4 | codes[:, 1::2],
        f"{layer}.weight_scale": tiled(block_scales.view(torch.uint8)).view(torch.float8_e4m3fn),
        f"{layer}.weight_scale_2": scale,
        f"{layer}.input_scale": torch.tensor(0.25),
    }


def tiled(scales: Tensor) -> Tensor:
    """uint8 [rows, columns] in whole tiles."""
    rows, columns = scales.shape
    tiles = torch.zeros(math.ceil(rows / 128) * 128, math.ceil(columns / 4) * 4, dtype=torch.uint8)
    tiles.view(-1)[_positions(rows, columns)] = scales
    return tiles


def untiled(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] of what `tiled` gave."""
    return tiles.reshape(-1)[_positions(rows, columns)]


def _positions(rows: int, columns: int) -> Tensor:
    """Where each block scale lies (cuBLAS manual, 1D block scaling factors layout)."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    tile = row // 128 * math.ceil(columns / 4) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def dequantized(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a single file stands for, float32: the independent reader."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if tensor.dtype == torch.uint8:
            rows, columns = tensor.shape[0], 2 * tensor.shape[1]
            codes = torch.stack([tensor >> 4, tensor & 15], -1).reshape(rows, columns)
            scales = untiled(state[f"{layer}.weight_scale"].float(), rows, columns // 16)
            scales = scales * state[f"{layer}.weight_scale_2"]
            values = E2M1[codes.long()].reshape(rows, -1, 16) * scales[..., None]
            out[name] = values.reshape(rows, columns)
        elif name.endswith(".weight") and tensor.dtype == torch.float8_e4m3fn:
            out[name] = tensor.float() * state[f"{layer}.weight_scale"]
        elif name.endswith((".weight", "_norm.scale")):
            out[name] = tensor.float()
    return out


def save_single_file(
    path: Path, state: dict[str, Tensor], prefix: str = "", metadata: dict[str, str] | None = None
) -> Path:
    """Writes the file; names get the prefix."""
    save_file({prefix + name: tensor for name, tensor in state.items()}, path, metadata)
    return path


def write_sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A file of these (dtype, shape) whose one-element float32 tensors are 1 and the rest holes."""
    sizes = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, scalars = 0, []
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        if dtype == "F32" and math.prod(shape) == 1:
            scalars.append(begin)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for begin in scalars:
            file.seek(8 + len(text) + begin)
            file.write(torch.tensor(1.0).numpy().tobytes())
    return path
