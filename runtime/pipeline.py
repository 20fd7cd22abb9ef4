"""`KleinKVPipeline`: prompt and reference images in, images out.

The call is diffusers' `Flux2KleinKVPipeline.__call__` (same arguments, meaning and defaults), with
`references=` and `seed=` added. Arrays are numpy's; torch is used only for torch generators and
`output_type="pt"`.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.config import DTYPES, dtype_name
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet, KVFormat
from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import Backend, Buffer, open_backend
from klein_kv.runtime.inputs.prompt_encoder import PromptEncoder
from klein_kv.runtime.inputs.prompts import PromptTokenizer
from klein_kv.runtime.inputs.start_image import StartImage
from klein_kv.runtime.loop import no_references
from klein_kv.runtime.lora.loader import LoraLoader
from klein_kv.runtime.maker import make_images
from klein_kv.runtime.one_at_a_time import one_at_a_time
from klein_kv.runtime.options import (
    CallArguments,
    RuntimeOptions,
    check_count,
    prompt_may_come_first,
    texts_of,
)
from klein_kv.runtime.outputs.preview import Previews
from klein_kv.runtime.planning.memory import default_prompt_bytes
from klein_kv.runtime.planning.request import Request
from klein_kv.runtime.references.byte_cache import ByteCache
from klein_kv.runtime.references.reference_encoder import (
    PreparedReferences,
    ReferenceEncoder,
    blank_references,
)
from klein_kv.runtime.references.reference_set import KVOrigin, ReferenceSet
from klein_kv.runtime.references.reference_store import ReferenceStore
from klein_kv.runtime.session import Session
from klein_kv.runtime.timings import Timings

__all__ = ["KleinKVOutput", "KleinKVPipeline"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KleinKVOutput:
    """Result of a call.

    Attributes:
        images: list of PIL images; or for output_type "np" float32 [B, H, W, 3] in 0..1, "pt" a
            torch tensor [B, 3, H, W] in 0..1, "latent" float [B, C, H / 8, W / 8].
    """

    images: Any


class KleinKVPipeline(LoraLoader):
    """A loaded artifact folder, ready to make images. Use `from_pretrained`, best in a `with`.

    Folders of plain klein weights run too, without any reuse of references: their pipeline is
    diffusers' `Flux2KleinPipeline` for distilled weights. A pipeline serves one call at a time;
    threads wait.

    Attributes:
        manifest: what the folder says of itself.
        backend: where the graphs run.
        graphs: which of them.
        session: the backend under a memory plan.
        reference_store: keys and values of references seen before, by digest.
        prompt_cache: text embeddings seen before.
        timings: where the time of the last call went.
        num_timesteps: steps of the last call.
        current_timestep: timestep of the step under way; None between calls.
        progress_bar_config: arguments for tqdm.
        check_finite: whether results that hold NaN or infinity are refused.
    """

    def __init__(
        self, artifacts: Path, manifest: Manifest, backend: Backend, /, **changes: Any
    ) -> None:
        options = RuntimeOptions.from_names(changes)
        if not manifest.distilled:
            raise RequestError(
                f"{artifacts} holds weights that are not distilled: they need classifier-free "
                "guidance, which this pipeline does not do; expected distilled weights, such as "
                "FLUX.2-klein-9b-kv"
            )
        # 1. What runs.
        self.artifacts = artifacts
        self.manifest = manifest
        self.config = manifest.config
        self.backend = backend
        self.graphs = _graphs(manifest, options)
        self.session = Session(backend, manifest, self.graphs, nvtx=options.nvtx)

        # 2. What is kept.
        budget = options.reference_cache_bytes
        if budget is None:
            budget = self.session.default_reference_budget()
        self.reference_store = ReferenceStore(budget, options.host_cache_bytes, backend)
        budget = options.prompt_cache_bytes
        self.prompt_cache: ByteCache[NDArray[Any]] = ByteCache(
            default_prompt_bytes() if budget is None else budget, "text embeddings"
        )

        # 3. What goes in: prompts, and references.
        tokenizer = PromptTokenizer(artifacts / "tokenizer", manifest.prompt)
        self.prompts = PromptEncoder(
            self.session, tokenizer, self.config.text_encoder, self.prompt_cache
        )
        origin = KVOrigin(
            model_digest=manifest.graphs_digest(self.graphs),
            dtype=manifest.dtype,
            kv_dtype=self.graphs.kv_dtype or manifest.dtype,
            backend=backend.name,
        )
        self.encoder = ReferenceEncoder(
            self.session, self.config, self.graphs, origin, self.reference_store, options.matte
        )
        self.no_references: dict[str, Buffer] = {}
        if manifest.variant == "kv":
            self.no_references = no_references(self.session, self.config.transformer, self.graphs)

        # 4. What comes out before the end.
        self._previews = Previews(artifacts, manifest)

        # 5. Adapters, none yet.
        self._start_without_adapters()

        # 6. The call under way, or the last one.
        self.timings = Timings()
        self.num_timesteps = 0
        self.current_timestep: float | None = None
        self.progress_bar_config: dict[str, Any] = {}
        self.check_finite = options.check_finite
        self._interrupt = False
        self._lock = threading.RLock()
        self._closed = False

    @classmethod
    def from_pretrained(cls, artifacts: str | Path, **changes: Any) -> Self:
        """Opens an artifact folder that `klein-kv export` wrote.

        `changes` are fields of `RuntimeOptions` by name, e.g. `device="cuda:0"`, `precision="fp8"`.

        Raises:
            ArtifactError: the folder is not whole, or not what its manifest says.
            BackendError: the backend cannot run these artifacts here.
            CapacityError: not enough memory to open them.
            RequestError: an unknown option, a budget below 0, another kv_dtype, or weights that are
                not distilled.
        """
        options = RuntimeOptions.from_names(changes)
        folder = Path(artifacts)
        manifest = Manifest.load(folder)
        backend = open_backend(
            options.backend,
            folder,
            manifest,
            options.device,
            options.threads,
            _graphs(manifest, options),
            options=options.backend_options,
        )
        try:
            return cls(folder, manifest, backend, **changes)
        except BaseException:
            backend.close()
            raise

    @classmethod
    def from_pipe(cls, pipe: "KleinKVPipeline") -> Self:
        """The same pipeline as one of this class: weights, engines, caches and adapters are one.

        Calls of both wait for each other, and closing one closes the other.
        """
        other = cls.__new__(cls)
        other.__dict__ = pipe.__dict__
        return other

    def close(self) -> None:
        """Frees everything that the pipeline holds; it cannot be used afterwards.

        On engines it also keeps the kernels that TensorRT compiled, for the next process.
        """
        with self._lock:
            self._closed = True
            self.reference_store.clear()
            self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments for tqdm's progress bar, e.g. `disable=True`."""
        self.progress_bar_config = config

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt = True` in a callback to end the loop early."""
        return self._interrupt

    @one_at_a_time
    def encode_prompt(
        self,
        prompt: str | list[str],
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
    ) -> NDArray[Any]:
        """Text embeddings [B, T, len(layers) * hidden_size] of one text or B of them.

        Shorter prompts are padded to `max_sequence_length`, T, which is part of the result; longer
        ones are cut with a warning.

        Raises:
            RequestError: not a text, or hidden states that were not exported.
        """
        layers_at = self.prompts.layers_at(tuple(text_encoder_out_layers))
        tokens = self.prompts.tokenize(texts_of(prompt), max_sequence_length)
        if not self.prompts.knows(tokens):
            batch, length = tokens["input_ids"].shape
            unit = self.config.vae.multiple_of
            request = Request(unit, unit, (), ("text_encoder",), batch, batch, length)
            self.session.admit(request, self.reference_store.free)
            self.session.prepare()
        encoded = self.prompts.encode(tokens, layers_at)
        self.prompts.keep(encoded)
        return self.session.download(encoded.buffer).copy()

    @one_at_a_time
    def encode_references(
        self, image: Image.Image | Sequence[Image.Image] | PreparedReferences
    ) -> ReferenceSet:
        """Keys and values of reference images, in order, before any prompt is known.

        Pass them as `references=`, or the images again: either costs only cached steps.

        Raises:
            RequestError: see `pixels.prepare_reference`; plain weights, whose references have no
                keys and values to keep.
            CapacityError: the keys and values do not fit into memory.
        """
        if self.manifest.variant == "plain":
            raise RequestError(
                f"{self.artifacts} holds plain weights, whose references take part in every step; "
                "pass them as image=, or use KV weights"
            )
        images: Any = image
        if not isinstance(image, PreparedReferences):
            images = list(image) if isinstance(image, list | tuple) else [image]
        if not images:
            raise RequestError("no reference image was given, expected at least one")
        self._merge_adapters()
        return self.encoder.encode(self.encoder.prepare(images))

    @one_at_a_time
    def load_references(self, path: str | Path) -> ReferenceSet:
        """A set that `ReferenceSet.save` wrote, ready to pass as `references=`.

        Raises:
            ArtifactError: the file is missing, damaged, or no saved reference set.
            RequestError: a set of other weights, types, backend or layout.
        """
        self._merge_adapters()
        return self.encoder.load(Path(path))

    @one_at_a_time
    def warm_up(
        self,
        height: int | None = None,
        width: int | None = None,
        references: Sequence[tuple[int, int]] = (),
        *,
        num_inference_steps: int = 4,
        prompts: int = 1,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 512,
    ) -> Timings:
        """Does once what the first call of these sizes would have to do besides: load, compile.

        No cache is touched and nothing is kept; `timings` stays that of the last call. Arguments
        are those of a call, but for the number of prompts and (height, width) of each reference.

        Returns:
            Where the time went, loading included.

        Raises:
            RequestError: a size that a call would refuse.
            CapacityError: such a call does not fit into memory.
        """
        check_count("prompts", prompts)
        arguments = CallArguments(
            prompt=[""] * prompts,
            image=blank_references(references),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            seed=0,
            start=self._warm_start(height, width),
        )
        with self.session.record() as timings:
            self._merge_adapters()
            make_images(self, arguments, warming_up=True)
            if self.session.captures:
                make_images(self, arguments, warming_up=True)
            return timings()

    def preview(self, latents: NDArray[Any]) -> list[Image.Image]:
        """Pictures of up to 512 pixels a side of latents [B, C, H / 16, W / 16], without the VAE.

        Made for "denoised" of `callback_on_step_end_tensor_inputs`, in a callback or any thread.

        Raises:
            ArtifactError: the folder was exported before there were previews.
            RequestError: latents of another shape.
        """
        return self._previews.make(latents)

    @prompt_may_come_first
    @one_at_a_time
    def __call__(
        self,
        image: list[Image.Image] | Image.Image | None = None,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
        references: ReferenceSet | None = None,
        seed: int | None = None,
    ) -> KleinKVOutput | tuple[Any]:
        """Makes images.

        Source of the meaning of all but the last two arguments: diffusers,
        `Flux2KleinKVPipeline.__call__`.

        Args:
            image: reference image or images, at most 1024x1024 pixels of each are used.
            prompt: a text, or one per image; "" is allowed.
            height: pixels, a multiple of 16 (diffusers rounds down with a warning; here another
                size is an error); default the first reference's, else 1024.
            width: pixels, as `height`; both together at most the area of 2048x2048.
            num_inference_steps: steps, 1 to 50; klein is distilled for 4.
            sigmas: a schedule of one's own, before the resolution-dependent shift.
            num_images_per_prompt: images per prompt.
            generator: `torch.Generator`, or one per image.
            latents: noise [B, C, H / 16, W / 16] of one's own, numpy or torch.
            prompt_embeds: text embeddings [B, T, D] in place of `prompt`, numpy or torch.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple of the images alone.
            attention_kwargs: {"scale": x} multiplies the weights of the active adapters in this
                call; other keys have no effect.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step;
                may return a dict with new "latents" [B, S, C] or "prompt_embeds". Tensors are
                numpy arrays.
            callback_on_step_end_tensor_inputs: which tensors the callback gets: those two, or
                "denoised", the image foreseen so far (see `preview`), [B, C, H / 16, W / 16].
            max_sequence_length: prompt tokens.
            text_encoder_out_layers: hidden states of the text encoder, among the exported ones.
            references: a set from `encode_references`, in place of `image`.
            seed: -2**63 to 2**64 - 1: noise without torch, in place of `generator`; the stream is
                that of a torch CPU generator to within 1e-6.

        Raises:
            RequestError: a bad argument; nothing has been computed then.
            CapacityError: the request does not fit into memory.
            NotFiniteError: the result holds NaN or infinity.
        """
        arguments = CallArguments(
            image=image,
            prompt=prompt,
            height=height,
            width=width,
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
            references=references,
            seed=seed,
        )
        images = self._make(arguments, attention_kwargs)
        return KleinKVOutput(images) if return_dict else (images,)

    def _make(self, arguments: CallArguments, attention_kwargs: dict[str, Any] | None) -> Any:
        """Images of one call, with the adapters that it is to have; notes where the time went."""
        if unknown := sorted((attention_kwargs or {}).keys() - {"scale"}):
            _log.warning("attention_kwargs %s have no effect", unknown)
        with self.session.record() as timings:
            self._merge_adapters(attention_kwargs)
            images = make_images(self, arguments)
            self.timings = timings()
        self._warn_of_adapters()
        return images

    def _warm_start(self, _height: int | None, _width: int | None) -> StartImage | None:
        """What the calls that `warm_up` stands for start from, beside noise."""
        return None


def _graphs(manifest: Manifest, options: RuntimeOptions) -> GraphSet:
    """The graphs of a folder that the options ask for."""
    kv_dtype: str = manifest.dtype
    if options.kv_dtype == "fp8":
        kv_dtype = KVFormat.FP8_PER_HEAD
    elif options.kv_dtype is not None and DTYPES.get(options.kv_dtype) != kv_dtype:
        raise RequestError(
            f"kv_dtype is {options.kv_dtype!r}, the graphs compute in {kv_dtype}; expected "
            f"{dtype_name(kv_dtype)!r} or 'fp8'"
        )
    return manifest.choose_graphs(kv_dtype, options.precision, options.attention)
