"""Every graph of a pipeline, run on the inputs of one small request, and held against a reference.

Numbers are normally distributed, as noise and normalised image latents are. What one graph gives to
another is handed on: text embeddings, keys and values. So the text is that of a prompt, and a fault
shows in the graph that has it, not in those after it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.attention_scales import attention_scales, kv_scales
from klein_kv.artifacts.engines.engine_set import open_engines
from klein_kv.artifacts.positions import grid_ids, reference_ids, text_ids
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.artifacts.signature import KVFormat, is_kv, kv_names
from klein_kv.artifacts.weights import NUMPY_DTYPES, graph_weights
from klein_kv.errors import ArtifactError
from klein_kv.export.checks.compare import Difference, compare
from klein_kv.export.checks.samples import made_up_image
from klein_kv.export.checks.tolerances import Tolerance, output_tolerance
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.inputs.prompts import PromptTokenizer
from klein_kv.runtime.pipeline import KleinKVPipeline

__all__ = ["PROMPT", "GraphRuns", "Row", "Sizes", "compare_outputs", "smallest_sizes"]

PROMPT = "a red kite over the sea, photograph"
_LEAST_OUTPUT, _LEAST_REFERENCE, _TEXT_TOKENS, _REFERENCES = 128, 64, 64, 2
_TIMESTEP, _SIGMA_STEP, _SIGMA = 500.0, -0.25, 0.75  # exact in every type, divided by 1000 too

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: of a tensor, or of the worst of a graph's keys and values."""

    name: str
    difference: Difference
    tolerance: Tolerance

    @property
    def ok(self) -> bool:
        """Whether the difference is within tolerance."""
        return self.tolerance.allows(self.difference)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            **self.difference.to_dict(),
            "tolerance": self.tolerance.bound,
            "ok": self.ok,
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one request: the output and each reference as (height, width) in pixels."""

    output: tuple[int, int]
    references: tuple[tuple[int, int], ...]
    text_tokens: int

    def pictures(self) -> list[Image.Image]:
        """Made-up references."""
        return [
            made_up_image(width, height, 1 + i) for i, (height, width) in enumerate(self.references)
        ]


def smallest_sizes(pipe: KleinKVPipeline) -> Sizes:
    """The smallest request with references that the pipeline's engines serve, or a small one."""
    unit = pipe.config.vae.multiple_of
    side, reference = (math.ceil(x / unit) for x in (_LEAST_OUTPUT, _LEAST_REFERENCE))
    least = {"grid_height": side, "grid_width": side + 2, "text_tokens": _TEXT_TOKENS}
    least |= {"height": (reference + 2) * unit, "width": reference * unit}
    least |= {"ref_tokens": _REFERENCES * (reference + 2) * reference}
    if pipe.backend.name == "tensorrt":
        folders = open_engines(pipe.artifacts, pipe.manifest, pipe.graphs).folders
        first = min(
            (folder.manifest for folder in folders),
            key=lambda engines: (
                engines.attention != pipe.graphs.attention,
                any(record.fixed for record in engines.engines.values()),
            ),
        )
        lowest: dict[str, int] = {}
        for record in first.engines.values():
            for symbol, (low, _, _) in record.profiles[0].symbols.items():
                lowest[symbol] = max(low, lowest.get(symbol, 0))
        least |= lowest
    height, width = least["height"], least["width"]
    count = max(1, round(least["ref_tokens"] / ((height // unit) * (width // unit))))
    return Sizes(
        (least["grid_height"] * unit, least["grid_width"] * unit),
        ((height, width),) * count,
        least["text_tokens"],
    )


class GraphRuns:
    """Graphs of one pipeline on one request; each is run when it is asked for."""

    def __init__(self, pipe: KleinKVPipeline, sizes: Sizes) -> None:
        self.sizes = sizes
        self._pipe = pipe
        config, unit = pipe.config, pipe.config.vae.multiple_of
        rng = np.random.default_rng(0)
        output, *references = (
            (height // unit, width // unit) for height, width in (sizes.output, *sizes.references)
        )
        channels, text = config.transformer.in_channels, sizes.text_tokens
        ids, mask = PromptTokenizer(pipe.artifacts / "tokenizer", pipe.manifest.prompt)(
            [PROMPT], text
        )

        def normal(*shape: int) -> Array:
            return rng.standard_normal((1, *shape), np.float32)

        self._inputs: dict[str, Array] = {
            "input_ids": ids,
            "attention_mask": mask,
            "image": np.asarray(sizes.pictures()[0])[None],
            "latents": normal(*output, channels),
            "hidden_states": normal(output[0] * output[1], channels),
            "encoder_hidden_states": normal(text, config.transformer.joint_attention_dim),
            "timestep": np.array([_TIMESTEP], np.float32),
            "sigma_step": np.array([_SIGMA_STEP], np.float32),
            "img_ids": grid_ids(*output),
            "txt_ids": text_ids(text),
            "ref_hidden_states": normal(sum(h * w for h, w in references), channels),
            "ref_ids": reference_ids(references),
            "image_latents": normal(output[0] * output[1], channels),
            "noise": normal(output[0] * output[1], channels),
            "mask": rng.integers(0, 5, (1, output[0] * output[1], 1)).astype(np.float32) / 4,
            "sigma": np.array([_SIGMA], np.float32),
        }
        dtype = NUMPY_DTYPES[pipe.manifest.dtype]
        for name, array in self._inputs.items():  # as the graphs see them, and so the reference
            if array.dtype == np.float32 and name not in ("timestep", "sigma_step", "sigma"):
                self._inputs[name] = array.astype(dtype).astype(np.float32)
        self._kv: dict[str, Buffer] = {}
        self._kv_scales = _constant_scales(pipe)

    @property
    def graphs(self) -> list[str]:
        """The networks' graphs, and `blend` where the folder holds it."""
        held = self._pipe.manifest.held_graphs(self._pipe.graphs)
        return [graph for graph in held if graph in (*self._pipe.graphs.files, "blend")]

    def inputs(self, graph: str) -> dict[str, Array]:
        """What a graph of artifacts in float32 reads in the same request.

        Raises:
            ArtifactError: keys and values that no graph gave.
        """
        signature = self._pipe.manifest.graphs.signature(graph, self._pipe.config)
        values = self._inputs
        if any(is_kv(spec.name) for spec in signature.inputs):
            kv = self.kept_kv()
            values = values | {name: array.astype(np.float32) for name, array in kv.items()}
        return {spec.name: values[spec.name] for spec in signature.inputs}

    def run(self, graph: str) -> dict[str, Array]:
        """What a graph's outputs stand for, on the host.

        Raises:
            ArtifactError: keys and values that no graph gave, numbers that are not finite, or all
                of them the same.
        """
        backend, signature = self._pipe.backend, self._pipe.graphs.signature
        feeds = {}
        for spec in signature(graph, self._pipe.config).inputs:
            if is_kv(spec.name):
                feeds[spec.name] = self._held_kv()[spec.name]
            else:
                array = self._inputs[spec.name].astype(NUMPY_DTYPES[spec.dtype])
                feeds[spec.name] = backend.upload(array)
        buffers = backend.run(graph, feeds)
        values = self._values(buffers)
        for name, array in values.items():
            with np.errstate(invalid="ignore"):
                spread = float(np.ptp(array.astype(np.float32)))
            if not (math.isfinite(spread) and spread):
                fault = "all the same" if spread == 0 else "not finite"
                raise ArtifactError(f"{graph}: values of {name} are {fault}")
        if graph == "text_encoder":
            embeddings = values["encoder_hidden_states"].astype(np.float32)
            self._inputs["encoder_hidden_states"] = embeddings
        if not self._kv:
            self._kv = {name: buffer for name, buffer in buffers.items() if is_kv(name)}
        return values

    def kept_kv(self) -> dict[str, Array]:
        """The keys and values that `cached_step` reads, as they are now."""
        return self._values(self._held_kv())

    def _values(self, buffers: Mapping[str, Buffer]) -> dict[str, Array]:
        """What buffers stand for: keys and values in float8 times their scales."""
        host = {name: np.array(self._pipe.backend.download(x)) for name, x in buffers.items()}
        values = {}
        for name in [name for name in host if "_scale." not in name]:
            part, _, block = name.partition(".")
            scale = self._kv_scales.get(name, host.get(f"{part}_scale.{block}"))
            values[name] = host[name] if scale is None else host[name].astype(np.float32) * scale
        return values

    def _held_kv(self) -> dict[str, Buffer]:
        if not self._kv:
            raise ArtifactError("neither encode_references nor first_step gave keys and values")
        return self._kv


def _constant_scales(pipe: KleinKVPipeline) -> dict[str, np.float32]:
    """Scales of float8 keys and values that are constants of the graphs, by tensor."""
    graphs, net = pipe.graphs, pipe.config.transformer
    if graphs.kv_dtype != KVFormat.FP8_CONSTANT:
        return {}
    ranges = load_quantized(pipe.artifacts, "transformer", dict(graphs.quantized)["transformer"])
    weights = graph_weights(pipe.artifacts, graphs.files["first_step"])
    scales = kv_scales(net, attention_scales(net, ranges.attention, weights))
    return dict(zip(kv_names(net.num_blocks), map(np.float32, scales), strict=True))


def compare_outputs(
    pipe: KleinKVPipeline,
    graph: str,
    got: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerance: Tolerance | None = None,
) -> list[Row]:
    """A row for each output of the reference; of keys and values one row, the worst tensor's.

    Without a `tolerance` for all of them they are the table's.
    """
    rows = []
    for name, array in expected.items():
        allowed = tolerance or output_tolerance(pipe.graphs, pipe.config, graph, name)
        rows.append(Row(f"{graph}, {name}", compare(got[name], array), allowed))
    kv = [row for row in rows if is_kv(row.name.removeprefix(f"{graph}, "))]
    if not kv:
        return rows
    worst = max(kv, key=lambda row: (not row.ok, row.tolerance.share(row.difference)))
    return [row for row in rows if row not in kv] + [worst]
