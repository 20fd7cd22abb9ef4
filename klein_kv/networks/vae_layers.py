"""The VAE's layers as the shapes of its weights tell them: arithmetic and memory of its graphs.

Names are those of diffusers' `AutoencoderKLFlux2`: level 0 has the size of the image, each further
level half of it.
"""

import re
from collections.abc import Mapping
from math import prod

from klein_kv.flops import Operations

__all__ = ["vae_operations", "vae_scratch"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a graph's weights by name."""


def vae_operations(
    shapes: Shapes, levels: int, *, batch: int, height: int, width: int
) -> Operations:
    """Operations of `vae_encoder` or `vae_decoder`: convolutions, and the attention in the middle.

    Args:
        shapes: the graph's weights.
        levels: of the VAE (`VaeConfig.num_levels`).
        batch: images.
        height: pixels.
        width: pixels.
    """
    convolutions, attention = 0, 0
    for name, shape in shapes.items():
        if len(shape) in (2, 4):
            pixels = batch * height * width // _cells(name, levels)
            convolutions += 2 * prod(shape) * pixels
        if name.endswith("to_q.weight"):
            tokens = height * width // 4 ** (levels - 1)
            attention += 4 * batch * tokens**2 * shape[0]
    return Operations(attention=attention, other=convolutions)


def vae_scratch(shapes: Shapes, levels: int, *, batch: int, height: int, width: int) -> int:
    """Numbers that the widest place of a graph holds at once.

    That is the first convolution of a residual block: its input, kept for the sum, the same after
    norm and activation, and its output. Engines of one size take within 2 % of it
    (TensorRT-RTX 1.7.1, klein's VAE at 1024x1024), ONNX Runtime more.
    """
    return max(
        (2 * shape[1] + shape[0]) * (batch * height * width // _cells(name, levels))
        for name, shape in shapes.items()
        if name.endswith(".conv1.weight")
    )


def _cells(name: str, levels: int) -> int:
    """Pixels of the image for one of the level that a layer gives out."""
    return int(4 ** _level(name, levels))


def _level(name: str, levels: int) -> int:
    last = levels - 1
    if found := re.search(r"(down|up)_blocks\.(\d+)\.(\w+)", name):
        block = int(found[2]) if found[1] == "down" else last - int(found[2])
        if found[3] == "downsamplers":
            return block + 1
        return block - 1 if found[3] == "upsamplers" else block
    return 0 if name.startswith(("encoder.conv_in", "decoder.conv_out")) else last
