"""How much memory a graph takes while it runs, where no engine has reported it."""

from collections.abc import Mapping

from klein_kv.artifacts.config import ITEM_SIZE
from klein_kv.networks.vae import vae_scratch
from klein_kv.runtime.planning.footprint import Footprint

__all__ = ["estimate_scratch"]


def estimate_scratch(graph: str, footprint: Footprint, sizes: Mapping[str, int]) -> int:
    """Bytes between a graph's inputs and its outputs: what one block or layer holds at once.

    Beside the engines of klein 9B for 1024x1024 and four references (bf16, TensorRT-RTX 1.7.1):
    `first_step` 2.01 GB here and 2.10 there, `cached_step` 0.84 and 0.52, `encode_references` 2.01
    and 1.62, `text_encoder` 0.055 and 0.052, VAE 0.81 and 1.34 against 0.81 and 1.35. ONNX Runtime
    takes more: for it these are lower bounds.
    """
    config, batch = footprint.config, sizes["batch"]
    item = ITEM_SIZE[footprint.graphs.dtype]
    if graph == "text_encoder":
        text = config.text_encoder
        width = 4 * text.hidden_size + 3 * text.intermediate_size
        return item * batch * sizes["text_tokens"] * width
    if graph == "blend":  # elementwise: nothing between inputs and outputs
        return 0
    if graph.startswith("vae_"):
        return item * vae_scratch(
            config.vae,
            graph,
            batch=batch if graph == "vae_decoder" else 1,
            height=sizes["height"],
            width=sizes["width"],
        )
    # One block: the residual stream, its norm, q, k, v with the references in front, and both
    # halves of the SwiGLU.
    net, references = config.transformer, sizes["ref_tokens"]
    row = 6 * net.inner_dim + 3 * net.mlp_hidden_dim
    rows = batch * (sizes["image_tokens"] + sizes["text_tokens"])
    denoise = rows * row + 2 * batch * references * net.inner_dim
    elements = {
        "plain_step": (rows + batch * references) * row,
        "cached_step": denoise,
        "encode_references": references * row,
        "first_step": max(denoise, references * row),
    }
    return item * elements[graph]
