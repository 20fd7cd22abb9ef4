"""How much memory a graph takes while it runs, where no engine has reported it."""

from collections.abc import Mapping
from pathlib import Path

from klein_kv.artifacts.config import ITEM_SIZE, ModelConfig
from klein_kv.artifacts.weights import graph_weights
from klein_kv.networks.vae_layers import vae_scratch

__all__ = ["estimate_scratch", "load_vae_shapes"]


def load_vae_shapes(
    artifacts: Path, files: Mapping[str, str]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the weights of "vae_encoder" and "vae_decoder", as `estimate_scratch` wants them.

    Args:
        artifacts: the artifact folder.
        files: ONNX files by graph.

    Raises:
        ArtifactError: a table of weights is missing or damaged.
    """
    return {
        graph: {name: ref.shape for name, ref in graph_weights(artifacts, file).items()}
        for graph, file in files.items()
        if graph.startswith("vae_")
    }


def estimate_scratch(
    graph: str,
    config: ModelConfig,
    dtype: str,
    sizes: Mapping[str, int],
    vae_shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> int:
    """Bytes between a graph's inputs and its outputs: what one block or layer holds at once.

    Beside the engines of klein 9B for 1024x1024 and four references (bf16, TensorRT-RTX 1.7.1):
    `first_step` 2.01 GB here and 2.10 there, `cached_step` 0.84 and 0.52, `encode_references` 2.01
    and 1.62, `text_encoder` 0.055 and 0.052, VAE 0.81 and 1.34 against 0.81 and 1.35. ONNX Runtime
    takes more: for it these are lower bounds.

    Args:
        graph: its name.
        config: the checkpoint's configuration.
        dtype: type of activations.
        sizes: of the symbols of the graph's signature.
        vae_shapes: weights of "vae_encoder" and "vae_decoder".
    """
    item, batch = ITEM_SIZE[dtype], sizes["batch"]
    if graph == "text_encoder":
        text = config.text_encoder
        width = 4 * text.hidden_size + 3 * text.intermediate_size
        return item * batch * sizes["text_tokens"] * width
    if graph.startswith("vae_"):
        return item * vae_scratch(
            vae_shapes[graph],
            config.vae.num_levels,
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
