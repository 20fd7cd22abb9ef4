"""`KleinKVInpaintPipeline`: an edit inside a mask, or one that starts from an image.

The call is diffusers' `Flux2KleinInpaintPipeline.__call__` without what belongs to guidance, which
distilled weights do not have; with `seed=`, `mask_blur=`, `overlay=`, and a mask that may be left
out.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from klein_kv.artifacts.pixels import to_rgb
from klein_kv.errors import RequestError
from klein_kv.runtime.inputs.masks import lay_back
from klein_kv.runtime.inputs.start_image import StartImage, make_start, size_of
from klein_kv.runtime.one_at_a_time import one_at_a_time
from klein_kv.runtime.options import CallArguments, output_size
from klein_kv.runtime.pipeline import KleinKVOutput, KleinKVPipeline

__all__ = ["KleinKVInpaintPipeline"]


class KleinKVInpaintPipeline(KleinKVPipeline):
    """A loaded artifact folder, ready to change images; see `KleinKVPipeline` for the rest.

    Use `from_pretrained`, or `from_pipe` beside a pipeline that is there. The image that is changed
    is the first reference: with KV weights, its keys and values are known from the second edit on,
    whatever mask and prompt it has.
    """

    @one_at_a_time
    def __call__(  # type: ignore[override] # noqa: D417 - the rest is documented there
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | None = None,
        image_reference: list[Image.Image] | Image.Image | None = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 4,
        sigmas: list[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
        seed: int | None = None,
        mask_blur: float = 0,
        overlay: bool = False,
    ) -> KleinKVOutput | tuple[Any]:
        """Changes an image.

        Arguments that are not named here are those of `KleinKVPipeline.__call__`.

        Args:
            prompt: a text, or one per image; "" is allowed.
            image: the image that is changed, of at least 64 pixels a side; above 1024x1024 it is
                made smaller.
            image_reference: further reference images.
            mask_image: white where the image changes: a PIL image, numpy [H, W], [B, H, W] or
                [B, H, W, 1], torch [B, 1, H, W], of truth values or numbers in 0..1, or a list of
                these, one per image. What is grey is black or white, from 0.5 on. None changes all.
            height: pixels, a multiple of 16, that image and mask are resized to; default the
                image's own (diffusers reads neither).
            width: pixels, as `height`; both together at most the area of 1024x1024.
            padding_mask_crop: works on the region of the mask alone, with so many pixels around it,
                as large as the image may be, and lays it back; image and mask are PIL images, and
                `output_type` is "pil".
            strength: part of the steps that are run, 0 to 1: with four, 0.75 runs three, on the
                image with noise; from above 0.75 on all four run, on noise alone.
            latents: noise of one's own; the first step then starts from it as it is.
            mask_blur: radius in pixels of a Gaussian blur of a PIL mask; where the result is laid
                over the image, its edge becomes soft.
            overlay: lays the result over the image, so that pixels where the mask is black stay as
                they are, to the bit, where the VAE would change them; `output_type` is "pil".
                With `padding_mask_crop` that is so anyway.

        Raises:
            RequestError: a bad argument; nothing has been computed then.
            ArtifactError: artifacts or engines of an earlier klein-kv, which cannot blend.
            CapacityError: the request does not fit into memory.
            NotFiniteError: the result holds NaN or infinity.
        """
        if (overlay or padding_mask_crop is not None) and output_type != "pil":
            option = "overlay" if overlay else "padding_mask_crop"
            raise RequestError(
                f"output_type is {output_type!r}, expected 'pil' with {option}: what was made is "
                "laid over the image"
            )
        if image is None:
            raise RequestError("image is None, expected the PIL image that is to be changed")
        unit, picture = self.config.vae.multiple_of, to_rgb(image, self.encoder.matte)
        start, crops = make_start(
            picture,
            mask_image,
            output_size(self.config, height, width, size_of(picture, unit), None),
            unit,
            strength=strength,
            noised=latents is None,
            padding=padding_mask_crop,
            blur=mask_blur,
            overlay=overlay,
        )
        arguments = CallArguments(
            prompt=prompt,
            image=image_reference,
            height=start.pixels.shape[1],
            width=start.pixels.shape[2],
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
            seed=seed,
            start=start,
        )
        images = self._make(arguments, attention_kwargs)
        if crops:  # one for all, or over and over
            images = [lay_back(made, *crop) for made, crop in zip(images, cycle(crops))]
        return KleinKVOutput(images) if return_dict else (images,)

    def _warm_start(self, height: int | None, width: int | None) -> StartImage:
        height, width = output_size(self.config, height, width, None, None)
        unit = self.config.vae.multiple_of
        mask = np.ones((1, height // unit * (width // unit), 1), np.float32)
        return StartImage(np.zeros((1, height, width, 3), np.uint8), mask)
