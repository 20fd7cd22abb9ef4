"""How far results may be from what they should be, by what computes them.

Errors are relative: the norm of the difference over the norm of what was expected, and the largest
difference over the largest value.
"""

import math
from dataclasses import dataclass

from klein_kv.config import ModelConfig
from klein_kv.signature import GraphSet, is_kv

__all__ = ["EXACT", "Limit", "tensor_limit"]


@dataclass(frozen=True, slots=True)
class Limit:
    """Largest relative errors that pass: of the whole tensor, and of its worst element."""

    norm: float
    largest: float

    def or_wider(self, other: "Limit") -> "Limit":
        """What passes under either of them."""
        return Limit(max(self.norm, other.norm), max(self.largest, other.largest))


EXACT = Limit(0.0, 0.0)

_TYPES = {
    "float32": Limit(1e-4, 1e-3),
    "float16": Limit(0.01, 0.03),
    "bfloat16": Limit(0.08, 0.15),
}
"""By the type of activations; the reference is float32. Measured on a CPU with random weights and
up to 14 blocks: float16 in onnxruntime norm 0.0017 and largest 0.004, bfloat16 in torch 0.021 and
0.027 at most. Real weights have more blocks, and no GPU has been measured: hence the room."""

_PIXELS = Limit(0.002, 0.02)
"""Images as bytes: a value between two levels may go to either. One level of 50 or more, in up to
6 % of the values of a grey picture; what they were rounded from is an output of its own."""

_FLOAT8_KV = Limit(0.05, 0.15)
"""Reference keys and values in float8 with a scale per head, nothing else of it. Measured as above,
with float32 activations: what is computed from them 0.005 and 0.008 at most; see `_KV_NOISE` for
the numbers themselves."""

_NOISE = {
    ("transformer", "fp8"): 0.039,
    ("transformer", "nvfp4"): 0.138,
    ("transformer", "fp8-weight-only"): 0.027,
    ("text_encoder", "fp8"): 0.056,
    ("text_encoder", "nvfp4"): 0.198,
    ("text_encoder", "fp8-weight-only"): 0.045,
}
"""By network and what its quantized files are called: relative error (norm) per square root of the
number of blocks that it went through, of the simulation in `quantized_ops` against float32 on the
inputs of these checks. The transformer's is that of the first block's keys and values, the rounding
of one layer: 28.2, 17.2 and 31.4 dB, on the tiny and the small fixture alike. Nothing measured was
above this times the root of the blocks by more than 4 %; the 14th of small had two thirds of it.
The text encoder's is that of tiny (27 blocks); small had 0.033 and 0.025. In nvfp4, which no recipe
of the package makes of it, it was not measured: as much more as the transformer's."""

_KV_NOISE = 0.027
"""Rounding keys and values to e4m3, which adds to the transformer's: in the first block 0.047 was
measured with fp8, with attention in float8 as well as without."""

_MARGIN = 2.0
"""What passes, over what was measured."""

_LARGEST_OF_NORM = 3.0
"""The worst element's limit over that of the norm. Measured against float32: at most half of it."""

_MOST = 0.7
"""Norm above which nothing passes, however many blocks there are: a tensor of zeros has 1."""


def tensor_limit(graphs: GraphSet, config: ModelConfig, graph: str, name: str) -> Limit:
    """What passes for an output of a graph, against whatever computes the same network.

    That may be the network without quantization, or the same quantized graph by other kernels. In
    16 bits that is hardly nearer (bfloat16 at the last block of small: 0.82 to 0.95 of the error
    against float32, fp8-weight-only 0.2): what rounds the other way is off by a whole step.

    Args:
        graphs: which graphs.
        config: gives the number of blocks.
        graph: its name.
        name: of the output.
    """
    component = graphs.files[graph].partition("/")[0]
    limit = _TYPES[graphs.dtype]
    if name == "image":
        return limit.or_wider(_PIXELS)
    precision = dict(graphs.quantized).get(component)
    packed = graphs.kv_dtype is not None and component == "transformer"
    if precision is None:
        return limit.or_wider(_FLOAT8_KV) if packed else limit
    if component == "text_encoder":
        blocks = max(config.text_encoder.layers)
    elif is_kv(name):
        blocks = int(name.partition(".")[2]) + 1
    else:
        blocks = config.transformer.num_blocks
    noise = math.hypot(_NOISE[component, precision], _KV_NOISE if packed else 0.0)
    norm = min(_MARGIN * noise * math.sqrt(blocks), _MOST)
    return limit.or_wider(Limit(norm, _LARGEST_OF_NORM * norm))
