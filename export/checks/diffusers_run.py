"""What diffusers computes on a checkpoint, for comparison; its weights one part at a time."""

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from numpy.typing import NDArray
from PIL import Image

from klein_kv.errors import CheckpointError

__all__ = ["DiffusersRun"]

_log = logging.getLogger(__name__)
_PIPELINES = {"kv": Flux2KleinKVPipeline, "plain": Flux2KleinPipeline}
_TEXT = ("text_encoder", "tokenizer")
_DENOISER = ("transformer", "vae")

Array = NDArray[Any]


class DiffusersRun:
    """diffusers' pipeline on one checkpoint.

    The text encoder is loaded first, and dropped by `load_denoiser`.

    Args:
        checkpoint: a folder in diffusers layout.
        variant: "kv" or "plain".
        dtype: type of weights and activations.
        device: where it runs.

    Raises:
        CheckpointError: diffusers cannot load it.
    """

    def __init__(
        self, checkpoint: Path, variant: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.variant = variant
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        # The K/V pipeline is not to be had without a transformer; the text's part is the same.
        self._pipe = self._load(Flux2KleinPipeline, _DENOISER)
        self._cache: Any = None

    def _load(self, pipeline: Any, without: tuple[str, ...]) -> Any:
        try:
            pipe = pipeline.from_pretrained(
                self._checkpoint,
                dtype=self._dtype,
                local_files_only=True,
                **dict.fromkeys(without),
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
        self._pipe = self._load(_PIPELINES[self.variant], _TEXT)

    def _tensor(self, array: Array) -> torch.Tensor:
        """Floats in the pipeline's type, integers as they are."""
        if array.dtype == np.int64:
            return torch.from_numpy(array).to(self._device)
        return torch.from_numpy(array.astype(np.float32)).to(self._device, self._dtype)

    def encode_prompt(self, prompt: str, length: int, layers: tuple[int, ...]) -> Array:
        """Text embeddings [1, length, D]."""
        embeds, _ = self._pipe.encode_prompt(
            prompt, max_sequence_length=length, text_encoder_out_layers=layers
        )
        return _array(embeds)

    def encode_image(self, pixels: NDArray[np.uint8]) -> Array:
        """Reference tokens [1, h, w, C] of an image [1, H, W, 3]."""
        normal = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        latent = self._pipe._encode_vae_image(normal.to(self._device, self._dtype), None)
        return _array(latent.permute(0, 2, 3, 1))

    def _denoise(self, step: dict[str, Array], hidden: Any, ids: Any, **options: Any) -> Any:
        time = torch.from_numpy(step["timestep"] / np.float32(1000))
        return self._pipe.transformer(
            hidden_states=hidden,
            encoder_hidden_states=self._tensor(step["encoder_hidden_states"]),
            timestep=time.to(self._device, self._dtype),
            img_ids=ids[None],
            txt_ids=self._tensor(step["txt_ids"])[None],
            return_dict=False,
            **options,
        )

    def first_step(
        self, step: dict[str, Array], references: dict[str, Array]
    ) -> tuple[Array, Array]:
        """noise_pred [1, S, C], and keys and values [2 * blocks, 1, R, H, D]."""
        latents, ref = (
            self._tensor(x) for x in (step["hidden_states"], references["ref_hidden_states"])
        )
        ids = torch.cat([self._tensor(references["ref_ids"]), self._tensor(step["img_ids"])])
        noise, cache = self._denoise(
            step,
            torch.cat([ref, latents], dim=1),
            ids,
            kv_cache_mode="extract",
            num_ref_tokens=ref.shape[1],
        )
        self._cache = cache
        layers = [*cache.double_block_caches, *cache.single_block_caches]
        kv = np.stack([_array(x) for layer in layers for x in (layer.k_ref, layer.v_ref)])
        return _array(noise), kv

    def cached_step(self, step: dict[str, Array]) -> Array:
        """noise_pred [1, S, C] on the keys and values of `first_step`."""
        (noise,) = self._denoise(
            step,
            self._tensor(step["hidden_states"]),
            self._tensor(step["img_ids"]),
            kv_cache=self._cache,
            kv_cache_mode="cached",
        )
        self._cache = None
        return _array(noise)

    def plain_step(self, step: dict[str, Array], references: dict[str, Array]) -> Array:
        """noise_pred [1, S, C] of plain weights, which take references as tokens of the image."""
        latents, ref = (
            self._tensor(x) for x in (step["hidden_states"], references["ref_hidden_states"])
        )
        ids = torch.cat([self._tensor(step["img_ids"]), self._tensor(references["ref_ids"])])
        (noise,) = self._denoise(step, torch.cat([latents, ref], dim=1), ids)
        return _array(noise[:, : latents.shape[1]])

    def images(
        self, embeds: Array, references: list[Image.Image], size: tuple[int, int], seed: int
    ) -> tuple[Array, Array]:
        """A whole run of four steps: the last latents [1, S, C], and pixels uint8 [1, H, W, 3]."""
        kept: list[Array] = []

        def keep(_pipe: Any, _i: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            kept[:] = [_array(tensors["latents"])]
            return {}

        options = {} if self.variant == "kv" else {"guidance_scale": 1.0}
        images = self._pipe(
            image=references or None,
            prompt_embeds=self._tensor(embeds),
            generator=torch.Generator().manual_seed(seed),
            height=size[0],
            width=size[1],
            num_inference_steps=4,
            callback_on_step_end=keep,
            **options,
        ).images
        return kept[0], np.stack([np.asarray(image) for image in images])


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().float().cpu().numpy()
    return array
