"""`KleinKVPipeline`: prompt and reference images in, images out.

The call is diffusers' `Flux2KleinKVPipeline.__call__` (same arguments, meaning and defaults), with
`references=` and `seed=` added. Arrays are numpy's; torch is used only for torch generators and
`output_type="pt"`.
"""

import contextlib
import functools
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import RequestError
from klein_kv.runtime.arguments import (
    check_call,
    check_embeds,
    host_array,
    is_integer,
    output_size,
    prompt_may_come_first,
)
from klein_kv.runtime.backends.backend import Backend, Buffer, open_backend
from klein_kv.runtime.inputs.noise import initial_noise
from klein_kv.runtime.inputs.prompt_encoder import EncodedPrompt, PromptEncoder
from klein_kv.runtime.inputs.prompts import PromptTokenizer
from klein_kv.runtime.loop import LoopInputs, denoise_loop, loop_inputs, no_references
from klein_kv.runtime.outputs.results import decode_latents, vae_latents
from klein_kv.runtime.planning.memory import default_prompt_bytes
from klein_kv.runtime.planning.memory_plan import MemoryPlan, Request, edit_stages
from klein_kv.runtime.references.byte_cache import ByteCache
from klein_kv.runtime.references.host_level import open_host_level
from klein_kv.runtime.references.reference_encoder import PreparedReferences, ReferenceEncoder
from klein_kv.runtime.references.reference_set import KVOrigin, ReferenceSet, check_kv_dtype
from klein_kv.runtime.references.reference_store import ReferenceFolder, ReferenceStore
from klein_kv.runtime.session import Session
from klein_kv.runtime.timings import Timings
from klein_kv.runtime.warm_up import Sizes, blank_references, run_sizes, with_encode_references
from klein_kv.schedule import make_schedule

__all__ = ["KleinKVOutput", "KleinKVPipeline"]

_log = logging.getLogger(__name__)


P = ParamSpec("P")
R = TypeVar("R")


def one_at_a_time(call: Callable[P, R]) -> Callable[P, R]:
    """Has threads wait for each other, and leaves in `timings` what a call took that succeeded."""

    @functools.wraps(call)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        pipeline: Any = args[0]
        with pipeline._alone(), pipeline.session.record() as timings:
            result = call(*args, **kwargs)
            pipeline.timings = timings()
        return result

    return alone


@dataclass(frozen=True, slots=True)
class KleinKVOutput:
    """Result of a call.

    Attributes:
        images: list of PIL images; or for output_type "np" float32 [B, H, W, 3] in 0..1, "pt" a
            torch tensor [B, 3, H, W] in 0..1, "latent" float [B, C, H / 8, W / 8].
    """

    images: Any


class KleinKVPipeline:
    """A loaded artifact folder, ready to make images. Use `from_pretrained`.

    Folders of plain klein weights run too, without any reuse of references: their pipeline is
    diffusers' `Flux2KleinPipeline` for distilled weights.

    Attributes:
        manifest: what the folder says of itself.
        backend: where the graphs run.
        reference_store: keys and values of references seen before, by digest.
        host_level: those that the store gave up, in host memory; None without `host_cache_bytes`.
        prompt_cache: text embeddings seen before.
        timings: where the time of the last call went.
    """

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        backend: Backend,
        *,
        reference_cache_bytes: int | None = None,
        host_cache_bytes: int = 0,
        reference_cache_dir: str | Path | None = None,
        reference_cache_dir_bytes: int | None = None,
        prompt_cache_bytes: int | None = None,
        kv_dtype: str | None = None,
        precision: str | None = None,
        attention: str | None = None,
        nvtx: bool = False,
    ) -> None:
        if not manifest.distilled:
            raise RequestError(
                f"{artifacts} holds weights that are not distilled: they need classifier-free "
                "guidance, which this pipeline does not do; expected distilled weights, such as "
                "FLUX.2-klein-9b-kv"
            )
        self.artifacts = artifacts
        self.manifest = manifest
        self.backend = backend
        kv_dtype = check_kv_dtype(kv_dtype, manifest.dtype)
        self.graphs = manifest.choose_graphs(kv_dtype, precision, attention)
        self.session = Session(backend, artifacts, manifest, self.graphs, nvtx=nvtx)
        self.config = manifest.config
        self.timings = Timings()
        self._no_references: dict[str, Buffer] = {}
        if manifest.variant == "kv":
            net = manifest.config.transformer
            self._no_references = no_references(self.session, net, self.graphs)
        origin = KVOrigin(
            model_digest=manifest.graphs_digest(self.graphs),
            lora_digest="",
            dtype=manifest.dtype,
            kv_dtype=self.graphs.kv_dtype or manifest.dtype,
            backend=backend.name,
        )
        if reference_cache_bytes is None:
            reference_cache_bytes = self.session.default_reference_budget()
        levels = (
            (reference_cache_dir, "reference_cache_dir"),
            (host_cache_bytes, "host_cache_bytes"),
        )
        for given, name in levels:
            if given and reference_cache_bytes == 0:
                raise RequestError(
                    f"{name} is given and reference_cache_bytes is 0, which turns reuse off; give "
                    "it a budget"
                )
        folder = self._reference_folder(reference_cache_dir, reference_cache_dir_bytes, origin)
        self.host_level = open_host_level(host_cache_bytes, backend, folder)
        self.reference_store: ReferenceStore = ByteCache(
            reference_cache_bytes, self.host_level or folder, "a reference set"
        )
        if prompt_cache_bytes is None:
            prompt_cache_bytes = default_prompt_bytes()
        self.prompt_cache: ByteCache[NDArray[Any]] = ByteCache(prompt_cache_bytes)
        self._prompts = PromptEncoder(
            self.session,
            PromptTokenizer(artifacts / "tokenizer", manifest.prompt),
            manifest.config.text_encoder,
            manifest.graphs_digest(self.graphs),
            self.prompt_cache,
        )
        self._encoder = ReferenceEncoder(self.session, manifest, origin, self.reference_store)
        self._progress_bar_config: dict[str, Any] = {}
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: float | None = None
        self._lock = threading.RLock()
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        artifacts: str | Path,
        *,
        backend: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        backend_options: Mapping[str, Any] | None = None,
        reference_cache_bytes: int | None = None,
        host_cache_bytes: int = 0,
        reference_cache_dir: str | Path | None = None,
        reference_cache_dir_bytes: int | None = None,
        prompt_cache_bytes: int | None = None,
        kv_dtype: str | None = None,
        precision: str | None = None,
        attention: str | None = None,
        nvtx: bool = False,
    ) -> Self:
        """Opens an artifact folder that `klein-kv export` wrote.

        Args:
            artifacts: the folder.
            backend: "auto", "onnxruntime", "tensorrt" or "torch"; see `backend.open_backend`.
            device: "cpu", "cuda" or "cuda:N"; None for the backend's own.
            threads: CPU threads of the backend; None leaves it to the library.
            backend_options: further arguments of the torch backend (`TorchBackend`), e.g.
                `{"compile_blocks": True}`.
            reference_cache_bytes: budget of the reference store; 0 turns reuse off; None takes all
                that weights and the largest request leave free of a GPU's memory, on a CPU a
                quarter of the memory that is free now.
            host_cache_bytes: on a GPU, pinned host memory for sets that the store gives up.
            reference_cache_dir: folder for sets that memory gives up; None drops them.
            reference_cache_dir_bytes: budget of that folder; None takes a quarter of the disk
                space that is free now.
            prompt_cache_bytes: budget for text embeddings; 0 keeps none; None takes 256 MiB.
            kv_dtype: "fp8" takes the graphs that hand keys and values on in a quarter of float32's
                bytes (half of 16 bits'), with a loss; None, or the graphs' own type, keeps them as
                they are computed.
            precision: "fp8", "nvfp4" or "fp8-weight-only" computes with weights that `klein-kv
                quantize` made; None with the folder's own.
            attention: "fp8" computes attention in float8 too, and keeps keys and values so.
            nvtx: mark every graph and copy as an NVTX range (needs the nvtx package).

        Raises:
            ArtifactError: the folder is not whole, or not what its manifest says.
            BackendError: the backend cannot run these artifacts here.
            RequestError: a budget below 0, another kv_dtype, a folder that cannot be made, or
                weights that are not distilled.
        """
        folder = Path(artifacts)
        manifest = Manifest.load(folder)
        graphs = manifest.choose_graphs(
            check_kv_dtype(kv_dtype, manifest.dtype), precision, attention
        )
        return cls(
            folder,
            manifest,
            open_backend(
                backend, folder, manifest, device, threads, graphs, options=backend_options
            ),
            reference_cache_bytes=reference_cache_bytes,
            host_cache_bytes=host_cache_bytes,
            reference_cache_dir=reference_cache_dir,
            reference_cache_dir_bytes=reference_cache_dir_bytes,
            prompt_cache_bytes=prompt_cache_bytes,
            kv_dtype=kv_dtype,
            precision=precision,
            attention=attention,
            nvtx=nvtx,
        )

    def _reference_folder(
        self,
        folder: str | Path | None,
        budget: int | None,
        origin: KVOrigin,
    ) -> ReferenceFolder | None:
        if folder is None:
            return None
        net = self.config.transformer
        level = ReferenceFolder(Path(folder), budget or 0, self.session, origin, net)
        if budget is None:
            level.budget = (shutil.disk_usage(level.folder).free + level.bytes) // 4
        return level

    def close(self) -> None:
        """Frees everything that the pipeline holds; it cannot be used afterwards.

        On engines it also keeps the kernels that TensorRT compiled, for the next process.
        """
        with self._lock:
            self._closed = True
            self.reference_store.clear()
            self._no_references.clear()
            self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time; others wait.

        Raises:
            RequestError: the pipeline is closed.
        """
        with self._lock:
            if self._closed:
                raise RequestError("this pipeline is closed; open the artifacts again")
            yield

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments for tqdm's progress bar, e.g. `disable=True`."""
        self._progress_bar_config = config

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> float | None:
        """Timestep of the step under way; None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt = True` in a callback to end the loop early."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str],
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
    ) -> NDArray[Any]:
        """Text embeddings of prompts.

        Args:
            prompt: one text or B of them.
            max_sequence_length: T; shorter prompts are padded to it (which is part of the result),
                longer ones are cut with a warning.
            text_encoder_out_layers: hidden states to read, among the exported ones.

        Returns:
            [B, T, len(layers) * hidden_size] in the artifacts' dtype.

        Raises:
            RequestError: not a text, or hidden states that were not exported.
        """
        if not isinstance(prompt, str | list | tuple):
            raise RequestError(f"prompt is {prompt!r:.80}, expected a text or a list of texts")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        at = self._prompts.layers_at(tuple(text_encoder_out_layers))
        tokens = self._prompts.tokenize(prompts, max_sequence_length)
        batch, length = tokens["input_ids"].shape
        unit = self.config.vae.multiple_of
        request = Request(
            unit, unit, (), ("text_encoder",), batch=batch, prompts=batch, text_tokens=length
        )
        with self._alone():
            if not self._prompts.knows(tokens):
                self.session.admit(request, self.reference_store.free)
                self.session.prepare()
            encoded = self._prompts.encode(tokens, at)
            self._prompts.keep(encoded)
            return self.session.download(encoded.buffer).copy()

    def encode_references(self, image: Image.Image | Sequence[Image.Image]) -> ReferenceSet:
        """Keys and values of reference images, before any prompt is known.

        Args:
            image: one image or several, in order; the order is part of the result.

        Returns:
            A set to pass as `references=`: the same images then cost only cached steps.

        Raises:
            RequestError: see `images.prepare_reference`; plain weights, whose references have no
                keys and values to keep.
            CapacityError: the keys and values do not fit into memory.
        """
        if self.manifest.variant == "plain":
            raise RequestError(
                f"{self.artifacts} holds plain weights, whose references take part in every step; "
                "pass them as image=, or use KV weights"
            )
        images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        if not images:
            raise RequestError("no reference image was given, expected at least one")
        prepared = self._encoder.prepare(images)
        with self._alone():
            return self._encoder.encode(prepared)

    def load_references(self, path: str | Path) -> ReferenceSet:
        """A set that `ReferenceSet.save` wrote, ready to pass as `references=`.

        Raises:
            ArtifactError: the file is missing, damaged, or no saved reference set.
            RequestError: a set of other weights, LoRA set, types, backend or layout.
        """
        with self._alone():
            return self._encoder.load(Path(path))

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

        No cache is touched and nothing is kept; `timings` stays that of the last call.

        Args:
            height: of the output in pixels; default the first reference's, else 1024.
            width: alike.
            references: (height, width) of each reference image that calls will bring.
            num_inference_steps: steps of those calls.
            prompts: prompts of one call.
            num_images_per_prompt: images of each.
            max_sequence_length: prompt tokens.

        Returns:
            Where the time went, loading included.

        Raises:
            RequestError: a size that a call would refuse.
            CapacityError: such a call does not fit into memory.
        """
        check_call("", None, "pil", (), num_inference_steps, num_images_per_prompt, None)
        blank = blank_references(references)
        prepared = self._encoder.prepare(blank) if blank else None
        first = None if prepared is None else prepared.first_size
        height, width = output_size(self.config, height, width, first, None)
        unit = self.config.vae.multiple_of
        sizes = Sizes((height // unit, width // unit), num_images_per_prompt)
        if not is_integer(prompts) or prompts < 1:
            raise RequestError(f"prompts is {prompts!r}, expected 1 or more")
        texts = self._prompts.tokenize([""] * prompts, max_sequence_length)
        schedule = make_schedule(
            self.manifest.scheduler, num_inference_steps, sizes.grid[0] * sizes.grid[1], None
        )
        request = Request(
            height,
            width,
            (),
            edit_stages(self.manifest.variant, 0),
            batch=prompts * num_images_per_prompt,
            prompts=prompts,
            text_tokens=max_sequence_length,
        )
        if prepared is not None:
            request = self._encoder.with_references(request, prepared, known=False)
            request = replace(request, stages=with_encode_references(request.stages))
        with self._alone(), self.session.record() as timings:
            # What the store keeps is worth more than warming up.
            self.session.admit(request, lambda _missing, _keep: 0)
            self.session.prepare(eager=True)
            run_sizes(
                self.session,
                self._encoder,
                self.manifest,
                self.graphs,
                schedule,
                sizes,
                texts,
                prepared,
            )
            return timings()

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
            height: pixels, a multiple of 16 up to 2048 (diffusers rounds down with a warning; here
                another size is an error); default the first reference's, else 1024.
            width: alike.
            num_inference_steps: steps, 1 to 50; klein is distilled for 4.
            sigmas: a schedule of one's own, before the resolution-dependent shift.
            num_images_per_prompt: images per prompt.
            generator: `torch.Generator`, or one per image.
            latents: noise [B, C, H / 16, W / 16] of one's own, numpy or torch.
            prompt_embeds: text embeddings [B, T, D] in place of `prompt`, numpy or torch.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple of the images alone.
            attention_kwargs: accepted for compatibility; no key has an effect.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step;
                may return a dict with new "latents" [B, S, C] or "prompt_embeds". Tensors are
                numpy arrays.
            callback_on_step_end_tensor_inputs: which tensors the callback gets.
            max_sequence_length: prompt tokens.
            text_encoder_out_layers: hidden states of the text encoder, among the exported ones.
            references: a set from `encode_references`, in place of `image`.
            seed: 0 to 2**63 - 1: noise without torch, in place of `generator`; the stream is that
                of a torch CPU generator to within 1e-6.

        Raises:
            RequestError: a bad argument; nothing has been computed then.
            CapacityError: the request does not fit into memory.
        """
        check_call(
            prompt,
            prompt_embeds,
            output_type,
            callback_on_step_end_tensor_inputs,
            num_inference_steps,
            num_images_per_prompt,
            sigmas,
        )
        if attention_kwargs:
            _log.warning("attention_kwargs %s have no effect", sorted(attention_kwargs))
        images = [] if image is None else [image] if not isinstance(image, list) else image
        if images and references is not None:
            raise RequestError("both image and references are given, expected one of them")
        if references is not None:
            self._encoder.check(references)
        prepared = self._encoder.prepare(images) if images else None
        wanted = references or prepared
        first = None if wanted is None else wanted.first_size
        noise = None if latents is None else host_array(latents, "latents", self.manifest.dtype)
        height, width = output_size(self.config, height, width, first, noise)

        given = None
        if prompt_embeds is not None:
            given = host_array(prompt_embeds, "prompt_embeds", self.manifest.dtype)
            check_embeds(given, self.config)
        prompts = [prompt] if isinstance(prompt, str) else prompt or []
        tokens = {} if given is not None else self._prompts.tokenize(prompts, max_sequence_length)
        layers_at = self._prompts.layers_at(tuple(text_encoder_out_layers))
        count = len(given) if given is not None else len(prompts)
        batch = count * num_images_per_prompt
        unit = self.config.vae.multiple_of
        grid = height // unit, width // unit
        text_tokens = max_sequence_length if given is None else given.shape[1]
        left_out = {"text_encoder"} if given is not None or self._prompts.knows(tokens) else set()
        left_out |= {"vae_decoder"} if output_type == "latent" else set()
        stages = (x for x in edit_stages(self.manifest.variant, 0) if x not in left_out)
        request = Request(
            height, width, (), tuple(stages), batch=batch, prompts=count, text_tokens=text_tokens
        )
        plan = self._admit(wanted, request)
        schedule = make_schedule(
            self.manifest.scheduler, num_inference_steps, grid[0] * grid[1], sigmas
        )
        noise = self._noise(
            noise, (batch, self.config.transformer.in_channels, *grid), generator, seed
        )

        if prepared is not None:
            references = self._found(prepared, plan)
            prepared = None if references is not None else prepared
        kv = references.kv if references is not None else None
        if wanted is None and self.manifest.variant == "kv":
            kv = self._no_references
        self.session.prepare(kv)
        encoded = self._encoded(given, tokens, layers_at)
        text = self._repeated(encoded, num_images_per_prompt)
        inputs = loop_inputs(self.session, noise, text, text_tokens, grid)
        with self._references_ready(inputs, references, prepared) as after_first_step:
            self._interrupt = False
            self._num_timesteps = schedule.num_steps
            with tqdm(**{"total": schedule.num_steps, **self._progress_bar_config}) as bar:

                def after_step(i: int, state: LoopInputs) -> bool:
                    if i == 0:
                        after_first_step()
                    self._current_timestep = float(schedule.timesteps[i])
                    bar.update()
                    if callback_on_step_end is not None:
                        # Memory of its own: the callback may ask this pipeline for another image.
                        shape = (batch, grid[0] * grid[1], self.config.transformer.in_channels)
                        state.latents = self.session.assemble(shape, [state.latents])
                        self._call_back(
                            callback_on_step_end, i, state, callback_on_step_end_tensor_inputs or ()
                        )
                    return self._interrupt

                denoise_loop(self.session, schedule, inputs, self.graphs, after_step)
        self._current_timestep = None
        inputs.kv, inputs.references, references = {}, None, None  # gigabytes for decoding
        shape = (batch, *grid, self.config.transformer.in_channels)
        if output_type == "latent":
            final = self.session.download(inputs.latents).reshape(shape)
            result: Any = vae_latents(self.artifacts, self.config.vae, final)
        else:
            result = decode_latents(self.session, inputs.latents, shape, output_type)
        self._prompts.keep(encoded)
        return KleinKVOutput(result) if return_dict else (result,)

    def _encoded(
        self,
        given: NDArray[Any] | None,
        tokens: dict[str, NDArray[np.int64]],
        layers_at: list[int],
    ) -> EncodedPrompt:
        """Text embeddings on the device: those that were given, or of the prompts."""
        if given is None:
            return self._prompts.encode(tokens, layers_at)
        return EncodedPrompt(self.session.upload(given), given.shape)

    def _repeated(self, prompt: EncodedPrompt, times: int) -> Buffer:
        """Every prompt's embeddings so many times, one after the other."""
        if times == 1:
            return prompt.buffer
        batch, length, width = prompt.shape
        rows = [
            self.session.view(prompt.buffer, (1, length, width), i * length * width)
            for i in range(batch)
        ]
        shape = (batch * times, length, width)
        return self.session.assemble(shape, [row for row in rows for _ in range(times)])

    def _noise(
        self,
        latents: NDArray[Any] | None,
        shape: tuple[int, ...],
        generator: Any,
        seed: int | None,
    ) -> NDArray[Any]:
        if latents is None:
            dtype = self.manifest.dtype
            drawn = initial_noise(shape, generator=generator, seed=seed, dtype=dtype)
            return drawn.astype(NUMPY_DTYPES[dtype], copy=False)
        if latents.shape != shape:
            raise RequestError(
                f"latents has shape {latents.shape}, expected {shape} for this batch and size"
            )
        return latents

    def _admit(
        self, references: ReferenceSet | PreparedReferences | None, request: Request
    ) -> MemoryPlan:
        """Plans a request, and refuses what cannot fit.

        Args:
            references: of the request.
            request: what it is without them.
        """
        digest = None if references is None else references.digest
        if references is not None:
            known = isinstance(references, ReferenceSet) or digest in self.reference_store
            request = self._encoder.with_references(request, references, known=known)
        return self.session.admit(request, self.reference_store.free, digest)

    def _found(self, prepared: PreparedReferences, plan: MemoryPlan) -> ReferenceSet | None:
        """Keys and values at hand; those in host memory are on their way while text is encoded."""
        stage = plan.stage("text_encoder")
        tight = stage is not None and stage.total + plan.kv_bytes > plan.capacity
        if prepared.digest in self.reference_store or (self.host_level and not tight):
            return self.reference_store.find(prepared.digest)
        return None  # they follow when the text encoder has made room, or are computed

    @contextlib.contextmanager
    def _references_ready(
        self,
        inputs: LoopInputs,
        references: ReferenceSet | None,
        prepared: PreparedReferences | None,
    ) -> Iterator[Callable[[], None]]:
        """Gives the loop keys and values, or tokens whose keys and values are kept afterwards.

        Yields:
            What to call after the first step.
        """
        if self.manifest.variant == "plain":
            inputs.references = self._encoder.tokens(prepared)
            yield lambda: None
            return
        if prepared is None:
            if references is not None:
                inputs.kv = dict(references.kv)
            else:
                inputs.kv = dict(self._no_references)
            yield lambda: None
            return
        with self.reference_store.claim(prepared.digest) as claim:
            if claim.value is not None:
                inputs.kv = dict(claim.value.kv)
                yield lambda: None
                return
            inputs.references = self._encoder.tokens(prepared)

            def keep() -> None:
                claim.publish(self._encoder.keep(prepared, inputs.kv))

            yield keep

    def _call_back(
        self,
        callback: Callable[[Any, int, float, dict[str, Any]], Any],
        i: int,
        state: LoopInputs,
        names: Sequence[str],
    ) -> None:
        backend = self.session
        held = {"latents": state.latents, "prompt_embeds": state.text}
        tensors = {name: backend.download(held[name]) for name in names}
        returned = callback(self, i, self._current_timestep or 0.0, tensors) or {}
        if not isinstance(returned, Mapping):
            raise RequestError(
                f"the callback returned a {type(returned).__name__}, expected a dict or None"
            )
        for name, buffer in (("latents", state.latents), ("prompt_embeds", state.text)):
            new = returned.get(name)
            if new is None or new is tensors.get(name):
                continue
            array = host_array(new, name, self.manifest.dtype)
            shape = backend.download(buffer).shape
            if array.shape != shape:
                raise RequestError(
                    f"the callback returned {name} of shape {array.shape}, expected {shape}"
                )
            if name == "latents":
                state.latents = backend.upload(array)
            else:
                state.text = backend.upload(array)
