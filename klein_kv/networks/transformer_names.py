"""Names of the transformer's tensors in Black Forest Labs' files.

They hold the same numbers as a diffusers folder (source of the names: black-forest-labs/flux2,
`src/flux2/model.py`). Two things are laid out differently:

- q, k and v of a double block are one tensor, so that each is a range of its rows;
- the last modulation holds shift before scale, diffusers' `norm_out` scale before shift: its two
  halves change places (diffusers: `scripts/convert_flux2_to_diffusers.py`).
"""

from collections.abc import Collection, Mapping

__all__ = ["Rows", "bfl_rows"]

_WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
_QKV = (
    ("img_attn", ("to_q", "to_k", "to_v")),
    ("txt_attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
)

Rows = tuple[str, int, int]
"""Name of a tensor and a range of its rows."""


def bfl_rows(
    shapes: Mapping[str, tuple[int, ...]], stored: Collection[str] = ()
) -> dict[str, tuple[Rows, ...]]:
    """For each diffusers name, the rows of the Black Forest Labs tensors that it is made of.

    Args:
        shapes: names and shapes of `transformer_parameters`.
        stored: names of a file; one with q, k and v apart is read as it is.
    """
    whole = {f"{ours}.weight": f"{bfl}.weight" for ours, bfl in _WHOLE.items()}
    table: dict[str, tuple[Rows, ...]] = {}
    blocks = dict.fromkeys(tuple(x.split(".")[:2]) for x in shapes if "transformer_blocks" in x)
    for kind, number in blocks:
        ours, double = f"{kind}.{number}", kind == "transformer_blocks"
        bfl = f"{'double' if double else 'single'}_blocks.{number}"
        names = _DOUBLE if double else _SINGLE
        whole |= {f"{ours}.{name}": f"{bfl}.{source}" for name, source in names.items()}
        for stream, parts in _QKV if double else ():
            for part, (name, short) in enumerate(zip(parts, ("to_q", "to_k", "to_v"), strict=True)):
                dim = shapes[f"{ours}.attn.{name}.weight"][0]
                rows = (f"{bfl}.{stream}.qkv.weight", part * dim, (part + 1) * dim)
                own = f"{bfl}.{stream}.{short}.weight"
                table[f"{ours}.attn.{name}.weight"] = ((own, 0, dim) if own in stored else rows,)
    table |= {ours: ((bfl, 0, shapes[ours][0]),) for ours, bfl in whole.items()}
    last, half = "final_layer.adaLN_modulation.1.weight", shapes["norm_out.linear.weight"][0] // 2
    table["norm_out.linear.weight"] = ((last, half, 2 * half), (last, 0, half))
    return table
