"""The VAE's layers as the shapes of its weights tell them: the memory that its graphs take.

Names are those of diffusers' `AutoencoderKLFlux2`: level 0 has the size of the image, each further
level half of it.
"""

import re
from collections.abc import Mapping

__all__ = ["vae_scratch"]


def vae_scratch(
    shapes: Mapping[str, tuple[int, ...]], levels: int, *, batch: int, height: int, width: int
) -> int:
    """Numbers that the widest place of a graph holds at once, of weights' shapes by name.

    That is the first convolution of a residual block: its input, kept for the sum, the same after
    norm and activation, and its output. Engines of one size take within 2 % of it
    (TensorRT-RTX 1.7.1, klein's VAE at 1024x1024), ONNX Runtime more.
    """
    return max(
        (2 * shape[1] + shape[0]) * (batch * height * width >> 2 * _level(name, levels))
        for name, shape in shapes.items()
        if name.endswith(".conv1.weight")
    )


def _level(name: str, levels: int) -> int:
    """The level of a residual block; the one in the middle has the last."""
    block = re.search(r"(down|up)_blocks\.(\d+)\.", name)
    if block is None:
        return levels - 1
    return int(block[2]) if block[1] == "down" else levels - 1 - int(block[2])
