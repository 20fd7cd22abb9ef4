"""Parity of an artifact folder with diffusers on the same checkpoint, graph by graph and whole.

Ours runs first and is released before diffusers loads its weights, one part of them at a time: the
memory needed is that of diffusers' largest part. Both get the same inputs.

float32 and float16 artifacts are held against diffusers in float32, so that the table shows their
whole error; bfloat16 ones against diffusers in bfloat16, on the same device.
"""

import gc
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.signature import is_kv
from klein_kv.errors import CapacityError, CheckpointError
from klein_kv.export.checkpoints.weight_index import read_folder
from klein_kv.export.checks.compare import compare
from klein_kv.export.checks.graph_runs import (
    PROMPT,
    GraphRuns,
    Row,
    compare_outputs,
    smallest_sizes,
)
from klein_kv.export.checks.tolerances import run_tolerance
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.planning.memory import available_memory

__all__ = ["DiffusersRun", "text_from_rows", "verify_artifacts"]

_SEED = 0
_PIPELINES = {"kv": Flux2KleinKVPipeline, "plain": Flux2KleinPipeline}
_TEXT = ("text_encoder", "tokenizer")
_DENOISER = ("transformer", "vae")

Array = NDArray[Any]


class DiffusersRun:
    """diffusers' pipeline on one checkpoint; first its text encoder, then, loaded, the rest.

    Raises:
        CheckpointError: diffusers cannot load it.
    """

    def __init__(
        self,
        checkpoint: Path,
        variant: str,
        layers: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._variant = variant
        self._layers = layers
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        # The K/V pipeline is not to be had without a transformer; the text's part is the same.
        self._pipe = self._load(Flux2KleinPipeline, _DENOISER)

    def _load(self, pipeline: Any, without: tuple[str, ...]) -> Any:
        try:
            pipe = pipeline.from_pretrained(
                self._checkpoint, dtype=self._dtype, local_files_only=True, **dict.fromkeys(without)
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"diffusers cannot load {self._checkpoint}: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self._device)

    def load_denoiser(self) -> None:
        """Drops the text encoder and loads transformer and VAE."""
        self._pipe = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._pipe = self._load(_PIPELINES[self._variant], _TEXT)

    def _tensor(self, array: Array) -> torch.Tensor:
        """Floats in the pipeline's type, integers as they are."""
        tensor = torch.tensor(array, device=self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What diffusers computes on a graph's inputs, in float32, but for latents of a step.

        Any graph but "vae_decoder" and "encode_references", whose keys and values are those of
        "first_step"; after the text encoder, whose input is `PROMPT`, call `load_denoiser`.
        """
        if graph == "text_encoder":
            embeds, _ = self._pipe.encode_prompt(
                PROMPT,
                max_sequence_length=inputs["input_ids"].shape[1],
                text_encoder_out_layers=self._layers,
            )
            return {"encoder_hidden_states": _array(embeds)}
        x = {name: self._tensor(array) for name, array in inputs.items()}
        if graph == "vae_encoder":
            normal = x["image"].permute(0, 3, 1, 2).float() / 255 * 2 - 1
            latent = self._pipe._encode_vae_image(normal.to(self._dtype), None)
            return {"ref_hidden_states": _array(latent.permute(0, 2, 3, 1))}
        if graph == "blend":
            scheduler = self._pipe.scheduler
            scheduler.sigmas = scheduler.timesteps = x["sigma"]
            scheduler.set_begin_index(0)
            noised = scheduler.scale_noise(x["image_latents"], x["sigma"], x["noise"])
            mixed = (1 - x["mask"]) * noised + x["mask"] * x["hidden_states"]
            return {"latents": _array(mixed)}
        if graph == "cached_step":
            cache = self._cache(x)
            noise = self._denoise(x, kv_cache=cache, kv_cache_mode="cached")[0]
            return {"noise_pred": _array(noise)}
        references, ids = x["ref_hidden_states"], x["ref_ids"]
        count = references.shape[1]
        latents, img_ids = x["hidden_states"], x["img_ids"]
        if graph == "plain_step":  # plain weights take references as tokens of the image
            x["hidden_states"] = torch.cat([latents, references], dim=1)
            x["img_ids"] = torch.cat([img_ids, ids])
            return {"noise_pred": _array(self._denoise(x)[0][:, : latents.shape[1]])}
        x["hidden_states"] = torch.cat([references, latents], dim=1)
        x["img_ids"] = torch.cat([ids, img_ids])
        noise, cache = self._denoise(x, kv_cache_mode="extract", num_ref_tokens=count)
        outputs = {"noise_pred": _array(noise)}
        for i, layer in enumerate([*cache.double_block_caches, *cache.single_block_caches]):
            outputs |= {f"k_ref.{i}": _array(layer.k_ref), f"v_ref.{i}": _array(layer.v_ref)}
        return outputs

    def _cache(self, x: Mapping[str, torch.Tensor]) -> Flux2KVCache:
        config = self._pipe.transformer.config
        cache = Flux2KVCache(config.num_layers, config.num_single_layers)
        cache.num_ref_tokens = x["k_ref.0"].shape[1]
        for i, layer in enumerate([*cache.double_block_caches, *cache.single_block_caches]):
            layer.store(x[f"k_ref.{i}"], x[f"v_ref.{i}"])
        return cache

    def _denoise(self, x: Mapping[str, torch.Tensor], **options: Any) -> Any:
        return self._pipe.transformer(
            hidden_states=x["hidden_states"],
            encoder_hidden_states=x["encoder_hidden_states"],
            timestep=x["timestep"] / 1000,
            img_ids=x["img_ids"][None],
            txt_ids=x["txt_ids"][None],
            return_dict=False,
            **options,
        )

    def images(
        self, embeds: Array, references: list[Image.Image], size: tuple[int, int], seed: int
    ) -> tuple[Array, Array]:
        """A whole run of four steps: the last latents [1, S, C], and pixels uint8 [1, H, W, 3]."""
        last: dict[str, Any] = {}

        def keep(_pipe: Any, _i: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            last.update(tensors)
            return {}

        options = {} if self._variant == "kv" else {"guidance_scale": 1.0}
        images = self._pipe(
            image=references or None,
            prompt_embeds=self._tensor(embeds.astype(np.float32)),
            generator=torch.Generator().manual_seed(seed),
            height=size[0],
            width=size[1],
            num_inference_steps=4,
            callback_on_step_end=keep,
            **options,
        ).images
        return _array(last["latents"]), np.stack([np.asarray(image) for image in images])


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().float().cpu().numpy()
    return array


def verify_artifacts(
    artifacts: Path,
    checkpoint: Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    threads: int | None = None,
) -> list[Row]:
    """Runs both and compares.

    Args:
        artifacts: an exported folder.
        checkpoint: the checkpoint it came from, in diffusers layout.
        backend: what runs the artifacts.
        device: where; diffusers runs there too if that is a GPU of the torch backend, else on the
            CPU.
        threads: CPU threads of our backend.

    Raises:
        CheckpointError: diffusers cannot load the checkpoint, or it is another model.
        ArtifactError: the artifacts are not whole.
        BackendError: the backend cannot run them, as onnxruntime bfloat16 on a CPU.
        CapacityError: diffusers' weights do not fit into memory.
    """
    ours = KleinKVPipeline.from_pretrained(
        artifacts,
        backend=backend,
        device=device,
        threads=threads,
        reference_cache_bytes=0,
        prompt_cache_bytes=0,
    )
    ours.set_progress_bar_config(disable=True)
    place = getattr(ours.backend, "device", None)
    if not isinstance(place, torch.device):  # not the torch backend's
        place = torch.device("cpu")
    dtype = torch.bfloat16 if ours.manifest.dtype == "bfloat16" else torch.float32
    _check_memory(checkpoint, dtype, place)
    layers = ours.config.text_encoder.layers
    with torch.no_grad():
        runs = GraphRuns(ours, smallest_sizes(ours))
        results = {}
        for graph in runs.graphs:
            if graph != "vae_decoder":  # seen in whole runs
                results[graph] = runs.inputs(graph), runs.run(graph)
                ours.backend.release(graph)
        embeds = results["text_encoder"][1]["encoder_hidden_states"]
        images = list(_our_images(ours, runs, embeds))
        ours.close()
        theirs = DiffusersRun(checkpoint, ours.manifest.variant, layers, dtype, place)
        return list(_rows(ours, theirs, runs, results, images, embeds))


def _our_images(
    ours: KleinKVPipeline, runs: GraphRuns, embeds: Array
) -> Iterator[tuple[Array, Array]]:
    """Last latents and pixels of whole runs with no, one and more references."""
    last: dict[str, Any] = {}

    def keep(_pipe: Any, _i: int, _time: float, tensors: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = np.array(tensors["latents"])
        return {}

    height, width = runs.sizes.output
    for count in range(len(runs.sizes.references) + 1):
        out: Any = ours(
            image=runs.sizes.pictures()[:count] or None,
            prompt_embeds=embeds,
            generator=torch.Generator().manual_seed(_SEED),
            height=height,
            width=width,
            callback_on_step_end=keep,
        )
        yield last["latents"], np.stack([np.asarray(image) for image in out.images])


def _rows(
    ours: KleinKVPipeline,
    theirs: DiffusersRun,
    runs: GraphRuns,
    results: dict[str, tuple[dict[str, Array], dict[str, Array]]],
    images: list[tuple[Array, Array]],
    embeds: Array,
) -> Iterator[Row]:
    _, encoded = results.pop("encode_references", ({}, {}))
    for graph, (inputs, outputs) in results.items():
        expected = theirs.run(graph, inputs)
        if graph == "text_encoder":
            theirs.load_denoiser()
        if graph == "first_step":
            kv = {name: array for name, array in expected.items() if is_kv(name)}
            yield from compare_outputs(ours, "encode_references", encoded, kv)
        yield from compare_outputs(ours, graph, outputs, expected)
    dtype, config = ours.manifest.dtype, ours.config
    for count, pair in enumerate(images):
        expected_pair = theirs.images(
            embeds, runs.sizes.pictures()[:count], runs.sizes.output, _SEED
        )
        for what, got, their in zip(("latents", "pixels"), pair, expected_pair, strict=True):
            name = f"end to end, {count} references, {what}"
            yield Row(name, compare(got, their), run_tolerance(what, dtype, config))


def _check_memory(checkpoint: Path, dtype: torch.dtype, place: torch.device) -> None:
    """Refuses what cannot be loaded: diffusers' largest part, on the host and on the device."""
    counts = {}
    for part in ("text_encoder", "transformer", "vae"):
        weights = read_folder(checkpoint / part, part)
        counts[part] = sum(math.prod(weight.shape) for weight in weights.values())
    text = counts["text_encoder"] * dtype.itemsize
    rest = (counts["transformer"] + counts["vae"]) * dtype.itemsize
    free = {"host": available_memory()}
    if place.type == "cuda":
        free["GPU"] = torch.cuda.mem_get_info(place)[0]
    for where, available in free.items():
        if max(text, rest) > available:
            raise CapacityError(
                f"diffusers needs at least {max(text, rest) / 1e9:.1f} GB of {where} memory for "
                f"this checkpoint in {str(dtype).removeprefix('torch.')} (text encoder "
                f"{text / 1e9:.1f} GB, then transformer and VAE {rest / 1e9:.1f} GB), "
                f"{available / 1e9:.1f} GB are free; verify on a larger machine, or bfloat16 "
                "artifacts, with --backend torch"
            )


def text_from_rows(rows: list[Row]) -> str:
    """A table of comparisons."""
    lines = [f"{'':40} {'relative':>10} {'max abs':>10} {'mean abs':>10} {'cosine':>12}"]
    for row in rows:
        mark = "" if row.ok else f"  FAILED, tolerance {row.tolerance.bound:.3g}"
        difference = row.difference
        lines.append(
            f"{row.name:40} {difference.relative:10.2e} {difference.max:10.2e} "
            f"{difference.mean:10.2e} {difference.cosine:12.9f}{mark}"
        )
    return "\n".join(lines)
