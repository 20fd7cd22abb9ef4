"""The nodes, in ComfyUI's V3 form: classes without state, told of by `comfy_entrypoint`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy import model_management
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, io, ui
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.preview_matrix import PREVIEW
from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import BACKENDS
from klein_kv.runtime.comfyui.models import (
    FOLDER,
    PRECISIONS,
    ModelChoice,
    artifact_folders,
    open_model,
)
from klein_kv.runtime.inpaint_pipeline import KleinKVInpaintPipeline
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.planning.memory_plan import size_text

__all__ = ["comfy_entrypoint"]

_CATEGORY = "klein-kv"
_REFERENCES = 4

_Model = io.Custom("KLEIN_KV_MODEL")
_References = io.Custom("KLEIN_KV_REFERENCES")
_Run = io.Custom("KLEIN_KV_RUN")


class KleinKVModel(io.ComfyNode):
    """Chooses artifacts; the first edit opens them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinKVModel",
            display_name="Klein KV Model",
            category=_CATEGORY,
            description=f"An artifact folder of klein-kv, below models/{FOLDER}.",
            inputs=[
                io.Combo.Input(
                    "artifacts",
                    options=sorted(artifact_folders()),
                    tooltip=f"A folder in models/{FOLDER} that `klein-kv export` or `klein-kv "
                    f"setup` made; other places: {FOLDER} in extra_model_paths.yaml.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    tooltip="auto takes TensorRT engines where there are some, else PyTorch on a "
                    "GPU, else ONNX Runtime.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    tooltip="own: the artifacts' type; the others: what `klein-kv quantize` added.",
                ),
            ],
            outputs=[_Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, artifacts: str, backend: str, precision: str) -> io.NodeOutput:
        folder = artifact_folders().get(artifacts)
        if folder is None:
            raise RequestError(
                f"there is no artifact folder {artifacts!r} below models/{FOLDER}; refresh the "
                "node's list (key R)"
            )
        return io.NodeOutput(ModelChoice(folder, backend, precision))


class KleinKVLora(io.ComfyNode):
    """Adds an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinKVLora",
            display_name="Klein KV LoRA",
            category=_CATEGORY,
            description="Merges a LoRA (or LoKr, LoHa, DoRA) into the weights. Chain nodes for "
            "several.",
            inputs=[
                _Model.Input("model"),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A .safetensors file in models/loras, for the transformer of klein.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="0 leaves the model as it is. Keys and values of references belong to "
                    "it: another strength encodes them again.",
                ),
            ],
            outputs=[_Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: ModelChoice, lora_name: str, strength: float) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        return io.NodeOutput(replace(model, adapters=(*model.adapters, (path, float(strength)))))


class KleinKVReferences(io.ComfyNode):
    """Puts reference images in order."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinKVReferences",
            display_name="Klein KV References",
            category=_CATEGORY,
            description="One to four reference images, in the order in which a prompt counts them. "
            "The first edit encodes them; later ones, whatever their prompt, seed or size, take "
            "the keys and values that are kept.",
            inputs=[
                io.Image.Input(
                    f"image_{n}",
                    optional=n > 1,
                    tooltip=f"Image {n} of the prompt. At most 1024x1024 pixels of it are used.",
                )
                for n in range(1, _REFERENCES + 1)
            ],
            outputs=[_References.Output(display_name="references")],
        )

    @classmethod
    def execute(cls, **images: torch.Tensor | None) -> io.NodeOutput:
        given = [images.get(f"image_{n}") for n in range(1, _REFERENCES + 1)]
        pictures = [x for image in given if image is not None for x in _pictures(image)]
        if len(pictures) > _REFERENCES:
            raise RequestError(
                f"{len(pictures)} reference images are given (a batch counts as its images), "
                f"expected at most {_REFERENCES}"
            )
        return io.NodeOutput(tuple(pictures))


class KleinKVEdit(io.ComfyNode):
    """Makes an image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinKVEdit",
            display_name="Klein KV Edit",
            category=_CATEGORY,
            description="Edits references by a prompt, or makes an image of the prompt alone.",
            inputs=[
                _Model.Input("model"),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to do.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16; 0: the first reference's, else 1024.",
                ),
                io.Int.Input("height", default=0, min=0, max=8192, step=16, tooltip="As width."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise.",
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=50, tooltip="klein is distilled for 4."
                ),
                _References.Input("references", optional=True, tooltip="What is edited."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the first reference changes; the rest stays. A black "
                    "one, as Load Image gives it for opaque pictures, counts as none.",
                ),
                io.Float.Input(
                    "strength",
                    optional=True,
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Below 1 the steps start from the first reference with noise: 0.75 "
                    "runs three of four.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                _Run.Output(display_name="run", tooltip="For Klein KV Info."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelChoice,
        prompt: str,
        width: int,
        height: int,
        seed: int,
        steps: int,
        references: tuple[Image.Image, ...] = (),
        mask: torch.Tensor | None = None,
        strength: float = 1.0,
    ) -> io.NodeOutput:
        if mask is not None and not mask.any():  # a picture without one
            mask = None
        starts_from_image = mask is not None or strength < 1
        if starts_from_image and not references:
            raise RequestError(
                "a mask, or a strength below 1, is given and no references, expected the image to "
                "change as image_1 of Klein KV References"
            )
        pipe = open_model(model)
        bar = ProgressBar(steps)
        previews = PREVIEW in pipe.manifest.files

        def after_step(pipe: KleinKVPipeline, i: int, _t: float, tensors: dict[str, Any]) -> None:
            preview = None
            if previews:
                preview = ("JPEG", pipe.preview(tensors["denoised"])[0], None)
            bar.update_absolute(i + 1, pipe.num_timesteps, preview)
            model_management.throw_exception_if_processing_interrupted()

        request: dict[str, Any] = {
            "prompt": prompt,
            "width": width or None,
            "height": height or None,
            "seed": seed,
            "num_inference_steps": steps,
            "output_type": "np",
            "callback_on_step_end": after_step,
            "callback_on_step_end_tensor_inputs": ["denoised"] if previews else [],
        }
        if starts_from_image:
            request |= {
                "image": references[0],
                "image_reference": list(references[1:]),
                "mask_image": None if mask is None else mask.float().cpu().numpy(),
                "strength": strength,
            }
            if mask is not None:
                request |= {"output_type": "pil", "overlay": True}
            made: Any = KleinKVInpaintPipeline.from_pipe(pipe)(**request)
        else:
            made = pipe(**request, image=list(references))
        text = _run_text(pipe, model.precision, has_references=bool(references))
        return io.NodeOutput(_image(made.images), text)


class KleinKVInfo(io.ComfyNode):
    """Says what a run did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinKVInfo",
            display_name="Klein KV Info",
            category=_CATEGORY,
            description="Where the seconds of an edit went, whether its references were known, "
            "what is held in memory.",
            inputs=[_Run.Input("run")],
            outputs=[io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, run: str) -> io.NodeOutput:
        return io.NodeOutput(run, ui=ui.PreviewText(run))


class _Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [KleinKVModel, KleinKVLora, KleinKVReferences, KleinKVEdit, KleinKVInfo]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls when it loads the pack."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    return _Extension()


def _pictures(image: torch.Tensor) -> list[Image.Image]:
    """PIL images of an IMAGE, float [B, H, W, C] in 0..1 with C of 1, 3 or 4."""
    if image.ndim != 4 or image.shape[3] not in (1, 3, 4) or 0 in image.shape:
        raise RequestError(
            f"the image has shape {tuple(image.shape)}, expected [batch, height, width, 3]"
        )
    # Rounded: a pixel of a file, divided by 255, may come back a little below a whole number.
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(x[..., 0] if x.shape[2] == 1 else x) for x in pixels]


def _image(made: NDArray[np.float32] | list[Image.Image]) -> torch.Tensor:
    """An IMAGE of float32 [B, H, W, 3] in 0..1, or of PIL images of one size."""
    if isinstance(made, list):
        made = np.stack([np.asarray(x, np.float32) for x in made]) / np.float32(255)
    return torch.from_numpy(made)


def _run_text(pipe: KleinKVPipeline, precision: str, *, has_references: bool) -> str:
    """What the last call of a pipeline did, in some lines for people."""
    timings, stats = pipe.timings, pipe.reference_store.stats
    if not has_references:
        how = "none"
    elif timings.plain_steps:
        how = "take part in every step (plain weights)"
    elif timings.cached_steps and not (timings.first_step or timings.encode_references):
        how = "hit: keys and values were kept"
    else:
        how = "miss: encoded in this run"
    held, kept = size_text(pipe.session.held_bytes), size_text(stats.bytes)
    return "\n".join(
        (
            f"{pipe.manifest.model_id}, {pipe.backend.name}, {precision} precision",
            timings.to_text(),
            f"references: {how}",
            f"memory: {held} of weights and work space (mapped files not counted); reference sets "
            f"kept: {stats.entries}, {kept} of at most {size_text(pipe.reference_store.budget)}",
        )
    )
