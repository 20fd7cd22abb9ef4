"""How far a result may be from what it should be, and how far it was measured to be: one table.

By (graph, precision). Graphs are those of `artifacts.signature`; "latents", "sample" and "pixels"
are what a whole run gives. Errors are relative: the norm of the difference over the norm of what
was expected. `klein-kv verify` and the tests read the same entries.
"""

import math
from dataclasses import dataclass, replace

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import GraphSet, is_kv
from klein_kv.export.checks.compare import Difference

__all__ = ["EXACT", "TOLERANCES", "Tolerance", "output_tolerance", "run_tolerance"]

_WORST = 3.0
"""What a single number may be off by, over the bound times the largest number expected. At most 4
times the error of the whole was measured, which is then a quarter of its bound."""

_BLOCKS = 5
"""Blocks of the transformers of the tests. Errors grow with the root of the number of blocks."""

_MOST = 0.7
"""Bound of a quantized network, however many blocks it has: a tensor of zeros has the error 1."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What passes.

    `measured` is with torch 2.13, diffusers 0.42, transformers 5.23 and onnxruntime 1.31 on two
    cores of an x86 CPU with AVX2, over every comparison of the tests. Bounds leave room for other
    machines, whose kernels add in another order.
    """

    bound: float  # largest relative error allowed
    measured: float  # largest one measured
    step: float = 0.0  # what rounding to whole numbers may move a single one by besides

    def share(self, difference: Difference) -> float:
        """How much of the bound a difference takes: more than 1 does not pass, nor does NaN."""
        if not self.bound:
            return 0.0 if difference.equal else math.inf
        largest = max(difference.max - self.step, 0.0) / (_WORST * (difference.peak or 1.0))
        share = max(difference.relative, largest) / self.bound
        return share if math.isfinite(difference.max + difference.relative) else math.inf

    def allows(self, difference: Difference) -> bool:
        """Whether a difference passes."""
        return self.share(difference) <= 1


EXACT = Tolerance(0, 0)

TOLERANCES: dict[tuple[str, str], Tolerance] = {
    # Whole runs against diffusers: in the same precision, and what `verify` compares, float16 with
    # float32. Latents after every step, decoded samples in 0..1, uint8 pixels.
    ("latents", "float32"): Tolerance(1e-5, 1.5e-6),
    ("sample", "float32"): Tolerance(1e-5, 1.4e-6),
    ("pixels", "float32"): Tolerance(1e-3, 9.8e-5, step=1),
    ("latents", "float16"): Tolerance(2e-2, 9.4e-3),
    ("sample", "float16"): Tolerance(3e-3, 7.4e-4),
    ("pixels", "float16"): Tolerance(1e-2, 4.4e-3, step=1),
    ("latents", "bfloat16"): Tolerance(2.5e-2, 7.6e-3),
    ("sample", "bfloat16"): Tolerance(2e-2, 5.6e-3),
    ("pixels", "bfloat16"): Tolerance(2e-2, 6.6e-3, step=1),
    # Graphs of each backend against float32: the modules of diffusers and transformers, or the
    # float32 artifacts of the same checkpoint.
    ("first_step", "float32"): Tolerance(4e-6, 3.4e-7),
    ("cached_step", "float32"): Tolerance(4e-6, 5.0e-7),
    ("encode_references", "float32"): Tolerance(4e-6, 3.4e-7),
    ("text_encoder", "float32"): Tolerance(5e-6, 6.2e-7),
    ("vae_encoder", "float32"): Tolerance(3e-5, 4.5e-6),
    ("first_step", "float16"): Tolerance(5e-3, 1.2e-3),
    ("cached_step", "float16"): Tolerance(5e-3, 1.2e-3),
    ("encode_references", "float16"): Tolerance(5e-3, 8.9e-4),
    ("text_encoder", "float16"): Tolerance(1e-2, 2.3e-3),
    ("vae_encoder", "float16"): Tolerance(8e-3, 1.9e-3),
    ("first_step", "bfloat16"): Tolerance(4e-2, 1.4e-2),
    ("cached_step", "bfloat16"): Tolerance(4e-2, 1.4e-2),
    ("encode_references", "bfloat16"): Tolerance(3e-2, 7.5e-3),
    ("text_encoder", "bfloat16"): Tolerance(8e-2, 2.8e-2),
    ("vae_encoder", "bfloat16"): Tolerance(5e-2, 1.5e-2),
    ("blend", "float32"): Tolerance(1e-6, 0),
    ("blend", "float16"): Tolerance(2e-3, 4.2e-4),
    ("blend", "bfloat16"): Tolerance(1e-2, 2.4e-3),
    # A LoRA merged into one tensor by the backend's graph, against numpy: now and then a sum in
    # another order is rounded to the next number.
    ("merge_lora", "float32"): Tolerance(1e-6, 0),
    ("merge_lora", "float16"): Tolerance(1e-3, 0),
    ("merge_lora", "bfloat16"): Tolerance(1e-3, 0),
    ("merge_lora", "float8_e4m3fn"): Tolerance(1e-2, 0),
    # The two ways to the first step: bit for bit.
    ("first_step = references + cached", "float32"): EXACT,
    ("first_step = references + cached", "float16"): EXACT,
    ("first_step = references + cached", "bfloat16"): EXACT,
    # The same descriptions computed by torch, against the modules in the same precision.
    ("torch denoise", "float32"): Tolerance(4e-6, 2.6e-7),
    ("torch encode_references", "float32"): Tolerance(4e-6, 2.3e-7),
    ("torch encode_text", "float32"): Tolerance(5e-6, 4.1e-7),
    ("torch denoise", "bfloat16"): Tolerance(2e-2, 5.7e-3),
    ("torch encode_references", "bfloat16"): Tolerance(2e-2, 6.2e-3),
    ("torch encode_text", "bfloat16"): Tolerance(6e-2, 2.0e-2),
    # Quantized networks against float32, of one block: the first one's keys and values, the
    # rounding of one layer (28.2, 17.2 and 31.4 dB), on the tiny and small fixtures alike. Nothing
    # measured was above this times the root of the blocks by more than 4 %. The text encoder has 27
    # blocks; in nvfp4, which no recipe makes of it, as much more as the transformer has.
    ("transformer", "fp8"): Tolerance(0.078, 0.039),
    ("transformer", "nvfp4"): Tolerance(0.276, 0.138),
    ("transformer", "fp8-weight-only"): Tolerance(0.054, 0.027),
    ("text_encoder", "fp8"): Tolerance(0.112, 0.056),
    ("text_encoder", "nvfp4"): Tolerance(0.396, 0.198),
    ("text_encoder", "fp8-weight-only"): Tolerance(0.090, 0.045),
    # Reference keys and values in float8, besides.
    ("keys and values", "fp8"): Tolerance(0.054, 0.027),
    # One quantized layer on its inputs in float32, against its own weight: the largest over the
    # layers of the small fixture. A scale that is off by 2 gives 0.5 or more, exchanged halves of
    # bytes about 1; rounding normally distributed numbers 0.04 and 0.14.
    ("layer", "fp8"): Tolerance(0.178, 0.043),
    ("layer", "nvfp4"): Tolerance(0.398, 0.140),
}


def run_tolerance(what: str, dtype: str, config: ModelConfig) -> Tolerance:
    """What passes for something that the transformer took part in, with all its blocks."""
    tolerance = TOLERANCES[what, dtype]
    depth = math.sqrt(max(1.0, config.transformer.num_blocks / _BLOCKS))
    return replace(tolerance, bound=tolerance.bound * depth)


def output_tolerance(graphs: GraphSet, config: ModelConfig, graph: str, name: str) -> Tolerance:
    """What passes for output `name` of a graph of these, against the network in float32."""
    if graph == "blend":
        return TOLERANCES[graph, graphs.dtype]
    component = graphs.files[graph].partition("/")[0]
    if component == "vae":
        key = {"image": "pixels", "sample": "sample"}.get(name, graph)
        return TOLERANCES[key, graphs.dtype]
    if component == "text_encoder":
        own, blocks = TOLERANCES[graph, graphs.dtype], max(config.text_encoder.layers)
    else:
        step = "first_step" if graph == "plain_step" else graph
        own = run_tolerance("encode_references" if is_kv(name) else step, graphs.dtype, config)
        blocks = int(name.partition(".")[2]) + 1 if is_kv(name) else config.transformer.num_blocks
    precision = dict(graphs.quantized).get(component)
    parts = [] if precision is None else [TOLERANCES[component, precision]]
    if graphs.kv_dtype is not None and component == "transformer":
        parts.append(TOLERANCES["keys and values", "fp8"])
    growth = 1.0 if precision is None else math.sqrt(blocks)
    bound = min(_MOST, growth * math.hypot(*(part.bound for part in parts)))
    if bound <= own.bound:
        return own
    return Tolerance(bound, growth * math.hypot(*(part.measured for part in parts)))
