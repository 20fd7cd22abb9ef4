"""What happens in a call, from what was asked for to images, in numbered sections."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.inputs.noise import initial_noise
from klein_kv.runtime.inputs.prompt_encoder import EncodedPrompt
from klein_kv.runtime.inputs.start_image import StartImage
from klein_kv.runtime.loop import Blend, LoopInputs, denoise_loop, loop_inputs
from klein_kv.runtime.options import CallArguments, embeds_array, host_array, output_size, texts_of
from klein_kv.runtime.outputs.finite import is_finite, not_finite_error
from klein_kv.runtime.outputs.results import decode_latents, vae_latents
from klein_kv.runtime.planning.memory_plan import MemoryPlan
from klein_kv.runtime.planning.request import Request, edit_stages
from klein_kv.runtime.references.reference_encoder import PreparedReferences
from klein_kv.runtime.references.reference_set import ReferenceSet
from klein_kv.runtime.session import Session
from klein_kv.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from klein_kv.runtime.pipeline import KleinKVPipeline

__all__ = ["make_images"]


def make_images(pipe: "KleinKVPipeline", ask: CallArguments, *, warming_up: bool = False) -> Any:
    """Makes images, as `ask.output_type` says, with the parts of a pipeline.

    Warming up looks nothing up, keeps nothing, and runs what such a request may need besides.

    Raises:
        RequestError: a bad argument; nothing has been computed then.
        ArtifactError: a start image, and artifacts without the graph that it needs.
        CapacityError: it does not fit into memory.
        NotFiniteError: the result holds NaN or infinity, unless `pipe.check_finite` is off.
    """
    session, config, dtype = pipe.session, pipe.config, pipe.manifest.dtype
    plain = pipe.manifest.variant == "plain"

    # 1. Check everything, and settle the sizes.
    if ask.references is not None:
        pipe.encoder.check(ask.references)
    start = ask.start
    before = () if start is None else (start.pixels,)
    given = ask.image if isinstance(ask.image, PreparedReferences) else ask.images
    prepared = pipe.encoder.prepare(given, *before) if given or before else None
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
        tokens = pipe.prompts.tokenize(texts_of(ask.prompt), ask.max_sequence_length)
        prompts, text_tokens = tokens["input_ids"].shape
    layers_at = pipe.prompts.layers_at(tuple(ask.text_encoder_out_layers))
    batch = prompts * ask.num_images_per_prompt
    shape = (batch, config.transformer.in_channels, *grid)
    steps = ask.num_inference_steps
    schedule = make_schedule(pipe.manifest.scheduler, steps, grid[0] * grid[1], ask.sigmas)
    blends = False
    if start is not None:
        schedule = start.shortened(schedule)
        blends = start.blends(schedule, batch)
        if blends:
            _check_blend(pipe)

    # 2. Plan, or refuse what cannot fit.
    text_known = embeds is not None or (pipe.prompts.knows(tokens) and not warming_up)
    left_out = {"text_encoder"} if text_known else set()
    left_out |= {"vae_decoder"} if ask.output_type == "latent" else set()
    stages = edit_stages(pipe.manifest.variant, 0, blends=blends)
    stages = tuple(x for x in stages if x not in left_out)
    request = Request(
        height, width, (), stages, batch=batch, prompts=prompts, text_tokens=text_tokens
    )
    plan = _admit(pipe, request, wanted, warming_up=warming_up)
    if noise is None:
        noise = initial_noise(shape, generator=ask.generator, seed=ask.seed, dtype=dtype)
    elif noise.shape != shape:
        raise RequestError(
            f"latents has shape {noise.shape}, expected {shape} for this batch and size"
        )
    noise = noise.astype(NUMPY_DTYPES[dtype], copy=False)

    # 3. Keys and values that are at hand; what is loaded before the first graph runs.
    references = ask.references
    if prepared is not None and not warming_up:
        on_device = prepared.digest in pipe.reference_store
        if on_device or _has_room_beside_text(plan):
            references = pipe.reference_store.get(prepared.digest)
        if references is not None and not on_device:  # it came back from host memory
            _admit(pipe, request, prepared, warming_up=False)
    kv = pipe.no_references if wanted is None else None
    kv = references.kv if references is not None else kv
    session.prepare(None if plain else kv, eager=warming_up)

    # 4. Text, and latents.
    if embeds is None:
        encoded = pipe.prompts.encode(tokens, layers_at, look_up=not warming_up)
    else:
        encoded = EncodedPrompt(session.upload(embeds), embeds.shape)
    text = _repeated(session, encoded, ask.num_images_per_prompt)
    inputs = loop_inputs(session, noise, text, text_tokens, grid)

    # 5. References: tokens whose keys and values the first step makes, or what is at hand.
    new = prepared if references is None else None
    if plain or new is not None:
        inputs.references = pipe.encoder.tokens(prepared)
    elif kv is not None:
        inputs.kv = dict(kv)
    if warming_up and new is not None and not plain:
        session.run("encode_references", inputs.references or {})
    if blends and start is not None and prepared is not None:
        image_latents = pipe.encoder.first_tokens(prepared, inputs.references)
        _start_from(session, inputs, image_latents, start, schedule, noise.dtype)

    # 6. The steps.
    pipe._interrupt = False
    pipe.num_timesteps = schedule.num_steps if not warming_up else pipe.num_timesteps
    bar_config = {"total": schedule.num_steps, **pipe.progress_bar_config}
    with tqdm(**bar_config | ({"disable": True} if warming_up else {})) as bar:

        def after_step(i: int, state: LoopInputs) -> bool:
            if i == 0 and new is not None and not (plain or warming_up):
                pipe.reference_store.put(new.digest, pipe.encoder.set_of(new, state.kv))
            pipe.current_timestep = float(schedule.timesteps[i])
            bar.update()
            if ask.callback_on_step_end is not None:
                _call_back(pipe, i, state, ask, schedule, shape)
            return pipe._interrupt

        denoise_loop(session, schedule, inputs, pipe.graphs, after_step)
    pipe.current_timestep = None

    # 7. Pixels. Keys and values that nobody keeps make room for decoding.
    inputs.kv, inputs.references, inputs.blend, references, kv = {}, None, None, None, None
    in_grid = (batch, *grid, config.transformer.in_channels)
    if ask.output_type == "latent":
        final = session.download(inputs.latents).reshape(in_grid)
        images: Any = vae_latents(pipe.artifacts, config.vae, final)
        finite = is_finite(final)
    else:
        images, finite = decode_latents(session, inputs.latents, in_grid, ask.output_type)
    if warming_up:
        return images
    if pipe.check_finite and not finite:
        pipe.reference_store.clear()  # what is not finite may be in it
        again = replace(ask, latents=noise, generator=None, seed=None, callback_on_step_end=None)
        raise not_finite_error(
            session, pipe.graphs, lambda: make_images(pipe, again, warming_up=True)
        )
    pipe.prompts.keep(encoded)
    return images


def _check_blend(pipe: "KleinKVPipeline") -> None:
    """Refuses artifacts, or engines, of an earlier klein-kv."""
    try:
        pipe.session.graph_memory("blend")
    except ArtifactError as error:
        if "blend" in pipe.manifest.held_graphs(pipe.graphs):
            raise  # an engine that was not built
        raise ArtifactError(
            f"{pipe.artifacts} lacks the graph `blend`, which masks and a strength below 1 need; "
            "export the checkpoint again with this klein-kv"
        ) from error


def _start_from(
    session: Session,
    inputs: LoopInputs,
    image_latents: Buffer,
    start: StartImage,
    schedule: Schedule,
    dtype: np.dtype[Any],
) -> None:
    """Starts the loop from an image [1, S, C], and has it keep what the mask leaves out."""
    noise, shape = inputs.latents, (*inputs.latents_shape[:2], 1)
    if start.mask is not None:
        masks = np.resize(start.mask, shape)  # over and over
        inputs.blend = Blend(image_latents, noise, session.upload(masks.astype(dtype)))
    if start.mixes(schedule):
        nowhere = session.upload(np.zeros(shape, dtype))
        sigma = session.upload(schedule.sigmas[:1])
        inputs.latents = Blend(image_latents, noise, nowhere)(session, noise, sigma)


def _admit(
    pipe: "KleinKVPipeline",
    request: Request,
    wanted: ReferenceSet | PreparedReferences | None,
    *,
    warming_up: bool,
) -> MemoryPlan:
    """Plans a request with its references, and refuses what cannot fit."""
    if wanted is not None:
        known = isinstance(wanted, ReferenceSet)
        known = known or (wanted.digest in pipe.reference_store and not warming_up)
        request = pipe.encoder.with_references(request, wanted, known=known)
    if warming_up:
        stages = request.stages
        if "first_step" in stages:  # references that are sent before the prompt
            at = stages.index("first_step")
            request = replace(request, stages=(*stages[:at], "encode_references", *stages[at:]))
        # What the store keeps is worth more than warming up.
        return pipe.session.admit(request, lambda _missing, _keep: 0)
    digest = None if wanted is None else wanted.digest
    return pipe.session.admit(request, pipe.reference_store.free, digest)


def _has_room_beside_text(plan: MemoryPlan) -> bool:
    """Whether keys and values may come from host memory while the text is encoded."""
    stage = plan.stage("text_encoder")
    return stage is None or stage.total + plan.kv_bytes <= plan.capacity


def _repeated(session: Session, prompt: EncodedPrompt, times: int) -> Buffer:
    """Every prompt's embeddings so many times, one after the other."""
    if times == 1:
        return prompt.buffer
    batch, length, width = prompt.shape
    rows = [
        session.view(prompt.buffer, (1, length, width), i * length * width)
        for i in range(batch)
        for _ in range(times)
    ]
    return session.assemble((batch * times, length, width), rows)


def _call_back(
    pipe: "KleinKVPipeline",
    i: int,
    state: LoopInputs,
    ask: CallArguments,
    schedule: Schedule,
    shape: tuple[int, ...],
) -> None:
    """Calls the caller, who may change latents and text, or ask this pipeline for an image."""
    session, callback = pipe.session, ask.callback_on_step_end
    assert callback is not None  # noqa: S101 - asked before
    # Engines write to the same buffers at every run: what outlasts that needs its own.
    state.latents = session.assemble(state.latents_shape, [state.latents])
    buffers = {"latents": state.latents, "prompt_embeds": state.text}
    names = ask.callback_on_step_end_tensor_inputs or ()
    tensors = {
        name: _denoised(session, state, schedule, i, shape)
        if name == "denoised"
        else session.download(buffers[name])
        for name in names
    }
    adapters = pipe._merged
    with session.interrupted():
        answer = callback(pipe, i, pipe.current_timestep or 0.0, tensors) or {}
    pipe._bring_weights_to(adapters or ())
    if not isinstance(answer, Mapping):
        raise RequestError(
            f"the callback returned a {type(answer).__name__}, expected a dict or None"
        )
    for name, buffer in buffers.items():
        new = answer.get(name)
        if new is None or new is tensors.get(name):
            continue
        array = host_array(new, name, pipe.manifest.dtype)
        shape = session.download(buffer).shape
        if array.shape != shape:
            raise RequestError(
                f"the callback returned {name} of shape {array.shape}, expected {shape}"
            )
        buffers[name] = session.upload(array)
    state.latents, state.text = buffers["latents"], buffers["prompt_embeds"]


def _denoised(
    session: Session, state: LoopInputs, schedule: Schedule, i: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """The image that step i foresees, as latents [B, C, h, w]: all noise taken off at once.

    Flow matching: x = (1 - sigma) * image + sigma * noise, of which noise - image is predicted.
    """
    assert state.noise_pred is not None  # noqa: S101 - the step just ran
    latents, noise_pred = (
        session.download(x).astype(np.float32) for x in (state.latents, state.noise_pred)
    )
    tokens: NDArray[np.float32] = latents - schedule.sigmas[i + 1] * noise_pred  # [B, S, C]
    return tokens.transpose(0, 2, 1).reshape(shape)
