"""Who takes part in the GPU suite: diffusers' two pipelines, and this project's torch backend.

Everyone gets the same weights, noise, prompt embeddings and encoded references, and everyone is
timed over the same stretch: from the first denoising step to the last, Euler updates included.
diffusers' pipelines are called whole; a watch on their scheduler marks the steps, and references
are encoded once, not in every call.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_models import Networks, Scene, make_pipeline
from gpu_timing import Clock, Sample

from klein_kv.config import ModelConfig
from klein_kv.export.random_model import make_scheduler
from klein_kv.runtime.backend import Backend
from klein_kv.runtime.loop import LoopInputs, denoise_loop
from klein_kv.runtime.references import grid_ids, reference_ids, text_ids
from klein_kv.runtime.torch_backend import TorchBackend
from klein_kv.schedule import make_schedule
from klein_kv.signature import GraphSet, kv_names

__all__ = ["Contender", "Diffusers", "Ours", "all_contenders"]

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(slots=True)
class Contender:
    """One way to run a request.

    Attributes:
        name: unique.
        family: whose operations it does: "plain" (references in every step), "diffusers_kv" or
            "kv" (encoded in the first step, by diffusers or by us) or "hit" (encoded before).
        clock: times the steps.
        warm_up_runs: requests of two steps or more after which nothing is done for the first time.
        latents: result of the last run, [1, S, C], on the device.
    """

    name: str
    family: str
    clock: Clock
    warm_up_runs: int = field(default=1, init=False)
    latents: torch.Tensor | None = field(default=None, init=False)

    def prepare(self, scene: Scene) -> float | None:  # noqa: ARG002
        """What happens before a request: its seconds on the device, if anything does."""
        return None

    def run(self, scene: Scene, steps: int) -> Sample:
        """Runs a request."""
        raise NotImplementedError

    def release(self) -> None:
        """Frees what `prepare` and the runs at this scene left on the device."""
        self.latents = None


@dataclass(slots=True)
class Diffusers(Contender):
    """diffusers' own pipeline.

    Attributes:
        pipe: `Flux2KleinKVPipeline` or `Flux2KleinPipeline`; its scheduler is being watched.
    """

    pipe: Any
    _seen: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        name: str,
        kind: str,
        transformer: Any,
        vae: Any,
        clock: Clock,
        round_timesteps: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> "Diffusers":
        """A pipeline of kind "kv" or "plain" around a transformer.

        Args:
            name: of the contender.
            kind: of the pipeline.
            transformer: diffusers' module.
            vae: diffusers' module.
            clock: times the steps.
            round_timesteps: changes the timesteps that the transformer is given.
        """
        pipe = make_pipeline(kind, transformer, vae)
        self = cls(name, "plain" if kind == "plain" else "diffusers_kv", clock, pipe)
        self._watch(pipe.scheduler, round_timesteps)
        return self

    def _watch(
        self,
        scheduler: Any,
        round_timesteps: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """Both pipelines call `set_begin_index` right before their loop and `step` last in it."""
        begin, step, set_timesteps = (
            scheduler.set_begin_index,
            scheduler.step,
            scheduler.set_timesteps,
        )

        @functools.wraps(begin)
        def watched_begin(index: int = 0) -> None:
            begin(index)
            self._seen.clear()
            self.clock.start()

        @functools.wraps(step)
        def watched_step(*args: Any, **options: Any) -> Any:
            out = step(*args, **options)
            self.clock.mark()
            self._seen[:] = [out[0]]
            return out

        # `retrieve_timesteps` of the pipelines reads this signature, which `wraps` keeps.
        @functools.wraps(set_timesteps)
        def watched_set_timesteps(*args: Any, **options: Any) -> None:
            set_timesteps(*args, **options)
            if round_timesteps is not None:
                scheduler.timesteps = round_timesteps(scheduler.timesteps)

        scheduler.set_begin_index, scheduler.step = watched_begin, watched_step
        scheduler.set_timesteps = watched_set_timesteps

    @torch.inference_mode()
    def run(self, scene: Scene, steps: int) -> Sample:
        if scene.ref_tokens is not None:
            self.pipe.prepare_image_latents = lambda **_: scene.ref_tokens
        options = {"guidance_scale": 1.0} if self.family == "plain" else {}
        dtype = self.pipe.transformer.dtype
        samples: list[Sample] = []

        def after_step(_: Any, i: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if i == steps - 1:
                samples.append(self.clock.stop())
            return tensors

        self.pipe(
            image=scene.images or None,
            prompt_embeds=scene.text.to(dtype),
            latents=scene.noise.to(dtype),
            height=scene.output,
            width=scene.output,
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=after_step,
            **options,
        )
        (self.latents,) = self._seen
        return samples[0]

    def release(self) -> None:
        self._seen.clear()
        Contender.release(self)


@dataclass(slots=True)
class Ours(Contender):
    """This project's loop on its torch backend.

    Attributes:
        backend: its own: what a backend holds for one contender would slow or spare another.
        config: of the networks.
        scheduler: the scheduler's configuration.
        dtype: of the weights.
    """

    backend: Backend
    config: ModelConfig
    scheduler: dict[str, Any]
    dtype: torch.dtype
    _kv: dict[str, torch.Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def prepare(self, scene: Scene) -> float | None:
        if self.family != "hit":
            return None
        self._kv = {}
        references = self._references(scene)
        self.clock.start()
        self._kv = self.backend.run("encode_references", references)
        self.clock.mark()
        return self.clock.stop().seconds

    @torch.inference_mode()
    def run(self, scene: Scene, steps: int) -> Sample:
        upload = self.backend.upload
        grid = scene.noise.shape[2], scene.noise.shape[3]
        tokens = scene.noise.to(self.dtype).flatten(2).transpose(1, 2).contiguous()
        inputs = LoopInputs(
            latents=tokens,
            text=scene.text.to(self.dtype),
            img_ids=upload(grid_ids(*grid)),
            txt_ids=upload(text_ids(scene.text.shape[1])),
        )
        if scene.ref_tokens is None:
            inputs.kv = self._no_references(scene)
        elif self.family == "hit":
            inputs.kv = dict(self._kv)
        else:
            inputs.references = self._references(scene)
        schedule = make_schedule(self.scheduler, steps, scene.sizes["image_tokens"])

        def after_step(_: int, __: LoopInputs) -> bool:
            self.clock.mark()
            return False

        self.clock.start()
        graphs = GraphSet("kv", _DTYPE_NAMES[self.dtype])
        denoise_loop(self.backend, schedule, inputs, graphs, after_step)
        sample = self.clock.stop()
        self.latents = inputs.latents.clone()  # the buffer may be the backend's own
        return sample

    def release(self) -> None:
        self._kv = {}
        for graph in ("first_step", "cached_step", "encode_references"):
            self.backend.release(graph)
        Contender.release(self)

    def _references(self, scene: Scene) -> dict[str, torch.Tensor]:
        assert scene.ref_tokens is not None
        unit = self.config.vae.multiple_of
        grids = [(image.height // unit, image.width // unit) for image in scene.images]
        return {
            "ref_hidden_states": scene.ref_tokens[0].to(self.dtype),
            "ref_ids": self.backend.upload(reference_ids(grids)),
        }

    def _no_references(self, scene: Scene) -> dict[str, torch.Tensor]:
        net = self.config.transformer
        shape = (1, 0, net.num_attention_heads, net.attention_head_dim)
        empty = torch.zeros(shape, dtype=self.dtype, device=scene.noise.device)
        return dict.fromkeys(kv_names(net.num_blocks), empty)


def all_contenders(
    networks: Networks, clock: Clock, compile_options: dict[str, Any] | None, graphs: bool
) -> list[Contender]:
    """Everyone, the most important first.

    Args:
        networks: weights that all share.
        clock: one for all.
        compile_options: for `torch.compile` of diffusers' blocks; None leaves out who compiles.
        graphs: CUDA graphs can be used.
    """
    compiles = compile_options is not None
    modes = ["graphs"] * (compiles and graphs) + ["compiled"] * compiles + ["eager"]

    def theirs(kind: str, mode: str) -> list[Contender]:
        if mode not in modes:
            return []
        transformer = networks.transformer()
        if mode == "compiled":
            transformer.compile_repeated_blocks(**(compile_options or {}))
        name = f"diffusers_{kind}_{mode}"
        return [Diffusers.make(name, kind, transformer, networks.vae, clock)]

    best, *others = [ours_contenders(networks, clock, networks.state, mode) for mode in modes]
    return [
        *theirs("kv", "eager"),
        *theirs("kv", "compiled"),
        *best,
        *theirs("plain", "compiled"),
        *theirs("plain", "eager"),
        *(contender for pair in others for contender in pair),
    ]


def ours_contenders(
    networks: Networks, clock: Clock, state: dict[str, torch.Tensor], mode: str
) -> list[Ours]:
    """A "kv" and a "hit" contender, each on a backend of its own.

    Args:
        networks: shapes and devices.
        clock: times the steps.
        state: weights of the denoiser.
        mode: "eager", "compiled", or "graphs" (compiled, and cached steps replayed).
    """
    dtype = next(iter(state.values())).dtype
    scheduler = dict(make_scheduler().config)
    contenders = []
    for name, family in ((f"ours_{mode}", "kv"), (f"ours_hit_{mode}", "hit")):
        backend = TorchBackend.from_tensors(
            networks.config,
            _DTYPE_NAMES[dtype],
            device=str(networks.device),
            transformer=state,
            compile_blocks=mode != "eager",
            cuda_graphs=mode == "graphs",
        )
        contender = Ours(name, family, clock, backend, networks.config, scheduler, dtype)
        # The first run of a step at a shape is eager, the second is recorded.
        contender.warm_up_runs = 2 if mode == "graphs" else 1
        contenders.append(contender)
    return contenders
