"""What happens in a call, from what was asked for to images, in numbered sections."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from tqdm import tqdm

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.inputs.noise import initial_noise
from klein_kv.runtime.inputs.prompt_encoder import EncodedPrompt, PromptEncoder
from klein_kv.runtime.loop import LoopInputs, denoise_loop, loop_inputs, no_references
from klein_kv.runtime.options import CallArguments, embeds_array, host_array, output_size
from klein_kv.runtime.outputs.results import decode_latents, vae_latents
from klein_kv.runtime.planning.memory_plan import MemoryPlan
from klein_kv.runtime.planning.request import Request, edit_stages
from klein_kv.runtime.references.reference_encoder import PreparedReferences, ReferenceEncoder
from klein_kv.runtime.references.reference_set import ReferenceSet
from klein_kv.runtime.session import Session
from klein_kv.schedule import make_schedule

__all__ = ["ImageMaker"]


class Pipeline(Protocol):
    """What a callback gets, and stops the loop with."""

    _interrupt: bool


class ImageMaker:
    """Makes images with the parts of one pipeline.

    Args:
        artifacts: the artifact folder.
        manifest: its manifest.
        graphs: which of its graphs run.
        session: what runs them.
        prompts: texts to embeddings.
        encoder: reference images to sets.

    Attributes:
        prompts: see above.
        encoder: see above.
        progress_bar_config: arguments for tqdm.
        num_timesteps: steps of the last call.
        current_timestep: timestep of the step under way; None between calls.
    """

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        graphs: GraphSet,
        session: Session,
        prompts: PromptEncoder,
        encoder: ReferenceEncoder,
    ) -> None:
        self.artifacts = artifacts
        self.manifest = manifest
        self.config = manifest.config
        self.graphs = graphs
        self.session = session
        self.prompts = prompts
        self.encoder = encoder
        self.progress_bar_config: dict[str, Any] = {}
        self.num_timesteps = 0
        self.current_timestep: float | None = None
        self._no_references: dict[str, Buffer] = {}
        if manifest.variant == "kv":
            self._no_references = no_references(session, manifest.config.transformer, graphs)

    def make(self, ask: CallArguments, pipeline: Pipeline, *, warming_up: bool = False) -> Any:
        """Makes what was asked for.

        Args:
            ask: what.
            pipeline: handed to the callback, which may set its `_interrupt`.
            warming_up: look nothing up, keep nothing, and run what such a request may need besides.

        Returns:
            Images, as `ask.output_type` says.

        Raises:
            RequestError: a bad argument; nothing has been computed then.
            CapacityError: it does not fit into memory.
        """
        config, dtype = self.config, self.manifest.dtype
        plain = self.manifest.variant == "plain"

        # 1. Check everything, and settle the sizes.
        if ask.references is not None:
            self.encoder.check(ask.references)
        prepared = self.encoder.prepare(ask.images) if ask.images else None
        wanted: ReferenceSet | PreparedReferences | None = ask.references or prepared
        noise = None if ask.latents is None else host_array(ask.latents, "latents", dtype)
        first = None if wanted is None else wanted.first_size
        height, width = output_size(config, ask.height, ask.width, first, noise)
        grid = height // config.vae.multiple_of, width // config.vae.multiple_of
        embeds, tokens = None, {}
        if ask.prompt_embeds is not None:
            embeds = embeds_array(ask.prompt_embeds, config, dtype)
            prompts, text_tokens = embeds.shape[:2]
        else:
            tokens = self.prompts.tokenize(ask.prompts, ask.max_sequence_length)
            prompts, text_tokens = tokens["input_ids"].shape
        layers_at = self.prompts.layers_at(tuple(ask.text_encoder_out_layers))
        batch = prompts * ask.num_images_per_prompt

        # 2. Plan, or refuse what cannot fit.
        text_known = embeds is not None or (self.prompts.knows(tokens) and not warming_up)
        left_out = {"text_encoder"} if text_known else set()
        left_out |= {"vae_decoder"} if ask.output_type == "latent" else set()
        stages = tuple(x for x in edit_stages(self.manifest.variant, 0) if x not in left_out)
        request = Request(
            height, width, (), stages, batch=batch, prompts=prompts, text_tokens=text_tokens
        )
        plan = self._admit(request, wanted, warming_up=warming_up)
        steps = ask.num_inference_steps
        schedule = make_schedule(self.manifest.scheduler, steps, grid[0] * grid[1], ask.sigmas)
        noise = self._noise(noise, (batch, config.transformer.in_channels, *grid), ask)

        # 3. Keys and values that are at hand; what is loaded before the first graph runs.
        references = ask.references
        if prepared is not None and not warming_up:
            on_device = self.encoder.store.on_device(prepared.digest)
            references = self._known_references(prepared, plan)
            if references is not None and not on_device:  # it came back from host memory
                self._admit(request, prepared, warming_up=False)
        kv = self._no_references if wanted is None else None
        kv = references.kv if references is not None else kv
        self.session.prepare(None if plain else kv, eager=warming_up)

        # 4. Text, and latents.
        if embeds is None:
            encoded = self.prompts.encode(tokens, layers_at, look_up=not warming_up)
        else:
            encoded = EncodedPrompt(self.session.upload(embeds), embeds.shape)
        text = self._repeated(encoded, ask.num_images_per_prompt)
        inputs = loop_inputs(self.session, noise, text, text_tokens, grid)

        # 5. References: tokens whose keys and values the first step makes, or what is at hand.
        new = prepared if references is None else None
        if plain or new is not None:
            inputs.references = self.encoder.tokens(prepared)
        elif kv is not None:
            inputs.kv = dict(kv)
        if warming_up and new is not None and not plain:
            self.session.run("encode_references", inputs.references or {})

        # 6. The steps.
        pipeline._interrupt = False
        self.num_timesteps = schedule.num_steps if not warming_up else self.num_timesteps
        bar_config = {"total": schedule.num_steps, **self.progress_bar_config}
        with tqdm(**bar_config | ({"disable": True} if warming_up else {})) as bar:

            def after_step(i: int, state: LoopInputs) -> bool:
                if i == 0 and new is not None and not (plain or warming_up):
                    self.encoder.store.put(self.encoder.keep(new, state.kv))
                self.current_timestep = float(schedule.timesteps[i])
                bar.update()
                if ask.callback_on_step_end is not None:
                    self._call_back(i, state, ask, pipeline)
                return pipeline._interrupt

            denoise_loop(self.session, schedule, inputs, self.graphs, after_step)
        self.current_timestep = None

        # 7. Pixels. Keys and values that nobody keeps make room for decoding.
        inputs.kv, inputs.references, references, kv = {}, None, None, None
        shape = (batch, *grid, config.transformer.in_channels)
        if ask.output_type == "latent":
            final = self.session.download(inputs.latents).reshape(shape)
            images: Any = vae_latents(self.artifacts, config.vae, final)
        else:
            images = decode_latents(self.session, inputs.latents, shape, ask.output_type)
        if not warming_up:
            self.prompts.keep(encoded)
        return images

    def _admit(
        self,
        request: Request,
        wanted: ReferenceSet | PreparedReferences | None,
        *,
        warming_up: bool,
    ) -> MemoryPlan:
        """Plans a request with its references, and refuses what cannot fit."""
        digest = None if wanted is None else wanted.digest
        if wanted is not None:
            known = isinstance(wanted, ReferenceSet)
            known = known or (self.encoder.store.on_device(wanted.digest) and not warming_up)
            request = self.encoder.with_references(request, wanted, known=known)
        if warming_up:
            stages = request.stages
            if "first_step" in stages:  # references that are sent before the prompt
                at = stages.index("first_step")
                request = replace(request, stages=(*stages[:at], "encode_references", *stages[at:]))
            # What the store keeps is worth more than warming up.
            return self.session.admit(request, lambda _missing, _keep: 0)
        return self.session.admit(request, self.encoder.store.free, digest)

    def _known_references(
        self, prepared: PreparedReferences, plan: MemoryPlan
    ) -> ReferenceSet | None:
        """Keys and values at hand; those in host memory are on their way while text is encoded."""
        stage = plan.stage("text_encoder")
        tight = stage is not None and stage.total + plan.kv_bytes > plan.capacity
        if tight and not self.encoder.store.on_device(prepared.digest):
            return None  # no room beside the text encoder
        return self.encoder.store.get(prepared.digest)

    def _noise(
        self, latents: NDArray[Any] | None, shape: tuple[int, ...], ask: CallArguments
    ) -> NDArray[Any]:
        if latents is None:
            dtype = self.manifest.dtype
            drawn = initial_noise(shape, generator=ask.generator, seed=ask.seed, dtype=dtype)
            return drawn.astype(NUMPY_DTYPES[dtype], copy=False)
        if latents.shape != shape:
            raise RequestError(
                f"latents has shape {latents.shape}, expected {shape} for this batch and size"
            )
        return latents

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

    def _call_back(self, i: int, state: LoopInputs, ask: CallArguments, pipeline: Pipeline) -> None:
        """Calls the caller, who may change latents and text, or ask this pipeline for an image."""
        session, callback = self.session, ask.callback_on_step_end
        assert callback is not None  # noqa: S101 - asked before
        # Engines write to the same buffers at every run: what outlasts that needs its own.
        state.latents = session.assemble(state.latents_shape, [state.latents])
        held = {"latents": state.latents, "prompt_embeds": state.text}
        names = ask.callback_on_step_end_tensor_inputs or ()
        tensors = {name: session.download(held[name]) for name in names}
        with session.interrupted():
            returned = callback(pipeline, i, self.current_timestep or 0.0, tensors) or {}
        if not isinstance(returned, Mapping):
            raise RequestError(
                f"the callback returned a {type(returned).__name__}, expected a dict or None"
            )
        for name, buffer in held.items():
            new = returned.get(name)
            if new is None or new is tensors.get(name):
                continue
            array = host_array(new, name, self.manifest.dtype)
            shape = session.download(buffer).shape
            if array.shape != shape:
                raise RequestError(
                    f"the callback returned {name} of shape {array.shape}, expected {shape}"
                )
            held[name] = session.upload(array)
        state.latents, state.text = held["latents"], held["prompt_embeds"]
