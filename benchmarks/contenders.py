"""Those who edit in `edit.py`: klein-kv, and diffusers' pipelines with a watch on their stages.

A contender makes an edit by its name, and tells its image, seconds, stages and memory. `Worker`
puts one into a process of its own.
"""

import contextlib
import functools
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.manifest import Manifest

PROMPT = "the same scene at night, photograph"
PIPELINES = {"diffusers_kv": "Flux2KleinKVPipeline", "diffusers_plain": "Flux2KleinPipeline"}
ONCE = ("text", "vae_encode", "vae_decode")  # stages beside the steps
TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def pictures(count: int, side: int) -> list[Image.Image]:
    """Smooth random pictures, all different."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return [Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC) for x in coarse]


def request(args: Any) -> dict[str, Any]:
    """What everyone is asked for."""
    images = pictures(args.references, args.reference_size) or None
    size = {"height": args.output, "width": args.output}
    return {"prompt": PROMPT, "image": images, "num_inference_steps": args.steps, **size}


class KleinKV:
    """Edits with references never seen before ("first"), then with known ones ("repeated")."""

    def __init__(self, pipe: Any, args: Any) -> None:
        self.names = ("first", "repeated") if args.references else ("first",)
        self._pipe, self._args = pipe, args
        self._torch = pipe.backend.name.startswith("torch")
        self._free = pipe.backend.available_memory()
        pipe.set_progress_bar_config(disable=True)

    def edit(self, name: str) -> dict[str, Any]:
        pipe, device = self._pipe, self._args.device
        if name == "first":
            pipe.reference_store.clear()
        with measured(device if self._torch else "cpu") as result:
            result["image"] = pipe(**request(self._args), seed=0).images[0]
        if device != "cpu" and not (self._torch or self._args.checkpoint):
            # What it holds; diffusers' process, if there were one, would count too.
            result["device_bytes"] = self._free - pipe.backend.available_memory()
        if name == self.names[-1]:
            pipe.reference_store.clear()  # whoever comes next has the memory
        timings = pipe.timings
        once = {stage: [getattr(timings, stage)] for stage in ONCE}
        return result | {
            "stages": {**once, "steps": list(timings.steps)},
            "hit": bool(self._args.references) and timings.first_step == 0,
            "backend": pipe.backend.name,
            "dtype": pipe.manifest.dtype,
            "net": pipe.config.transformer,
        }


class Diffusers:
    """One of diffusers' pipelines, which encodes its references in every call."""

    def __init__(self, name: str, pipe: Any, args: Any) -> None:
        self.names = (name,)
        self._pipe, self._args = pipe, args
        self._spans: list[tuple[str, Any, Any]] = []
        pipe.set_progress_bar_config(disable=True)
        self._watch(pipe.text_encoder, "forward", "text")
        self._watch(pipe.vae, "encode", "vae_encode")
        self._watch(pipe.transformer, "forward", "steps")
        self._watch(pipe.vae, "decode", "vae_decode")

    def edit(self, name: str) -> dict[str, Any]:
        import torch

        self._spans.clear()
        options = {"guidance_scale": 1.0} if name == "diffusers_plain" else {}
        options["generator"] = torch.Generator().manual_seed(0)
        with measured(self._args.device) as result:
            result["image"] = self._pipe(**request(self._args), **options).images[0]
        stages: dict[str, list[float]] = {}
        for stage, start, end in self._spans:
            seconds = end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
            stages.setdefault(stage, []).append(seconds)
        transformer = self._pipe.transformer
        return result | {
            "stages": stages,
            "hit": False,
            "backend": "diffusers",
            "dtype": str(transformer.dtype).removeprefix("torch."),
            "net": TransformerConfig.from_dict(transformer.config),
        }

    def _watch(self, module: Any, method: str, stage: str) -> None:
        def watched(*args: Any, **options: Any) -> Any:
            start = mark(self._args.device)
            result = call(*args, **options)
            self._spans.append((stage, start, mark(self._args.device)))
            return result

        call = getattr(module, method)
        setattr(module, method, functools.wraps(call)(watched))


def mark(device: str) -> Any:
    """A point in the device's work; on a GPU an event, which waits for nothing."""
    if device == "cpu":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@contextlib.contextmanager
def measured(device: str) -> Iterator[dict[str, Any]]:
    """Adds an edit's seconds and the most memory in use, on a GPU too where torch counts it."""
    process, result = Path("/proc/self"), dict[str, Any]()
    with contextlib.suppress(OSError):  # then it is the most that the process ever used
        (process / "clear_refs").write_text("5")
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield result
    result["seconds"] = time.perf_counter() - start
    status = (process / "status").read_text(encoding="utf-8")
    result["host_bytes"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if device != "cpu":
        result["device_bytes"] = torch.cuda.max_memory_allocated(device)


def open_klein_kv(args: Any) -> KleinKV:
    pipe = KleinKVPipeline.from_pretrained(
        args.artifacts,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
        backend_options=compiling(args),
        prompt_cache_bytes=0,  # everyone encodes the prompt in every edit
        kv_dtype=args.kv_dtype,
        precision=args.precision,
    )
    return KleinKV(pipe, args)


def open_diffusers(args: Any, name: str) -> Diffusers:
    import torch

    torch.set_num_threads(args.threads)
    pipe = load_diffusers(name, args.checkpoint, dtype=getattr(torch, TYPES[args.dtype]))
    if args.offload:
        pipe.enable_model_cpu_offload(device=args.device)
    else:
        pipe.to(args.device)
    if args.compile:
        pipe.transformer.compile_repeated_blocks()
    return Diffusers(name, pipe, args)


def open_drawn(args: Any) -> list[Any]:
    """Everyone on the same random weights; the folders give shapes, tokenizer and scheduler."""
    import torch
    from transformers import AutoConfig, Qwen3ForCausalLM

    from klein_kv.export.checkpoints import random_model
    from klein_kv.runtime.backends.pytorch.backend import TorchBackend

    torch.set_num_threads(args.threads)
    device, dtype = args.device, getattr(torch, TYPES[args.dtype])
    shapes = random_model.SIZES[args.size]
    config = AutoConfig.from_pretrained(args.checkpoint / "text_encoder")
    with torch.device(device):  # not on "meta": it has buffers that no state holds
        text_encoder = Qwen3ForCausalLM._from_config(config, dtype=dtype).eval()
    transformer = random_model.transformer_on_meta(shapes, dtype).to_empty(device=device)
    vae = random_model.vae_on_meta(shapes, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for module in (transformer, text_encoder, vae):
        random_model.fill_random(module.requires_grad_(False), generator)
    manifest = Manifest.load(args.artifacts)
    backend = TorchBackend.from_tensors(
        manifest.config,
        TYPES[args.dtype],
        device=device,
        transformer=transformer.state_dict(),
        text_encoder=text_encoder.state_dict(),
        vae=vae.state_dict(),
        **compiling(args),
    )
    ours = KleinKVPipeline(args.artifacts, manifest, backend, prompt_cache_bytes=0)
    if args.compile:
        transformer.compile_repeated_blocks()
    modules = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    pipes = [(name, load_diffusers(name, args.checkpoint, **modules)) for name in args.pipelines]
    return [KleinKV(ours, args), *(Diffusers(name, pipe, args) for name, pipe in pipes)]


def compiling(args: Any) -> dict[str, bool]:
    return {"compile_blocks": True, "cuda_graphs": args.device != "cpu"} if args.compile else {}


def load_diffusers(name: str, checkpoint: Path, **options: Any) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the checkpoint names another pipeline's class
        return getattr(diffusers, PIPELINES[name]).from_pretrained(checkpoint, **options)


class Worker:
    """A contender in a process of its own; an EOFError means that it wrote its error and died."""

    def __init__(self, opener: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, opener, arguments), daemon=True)
        self._process.start()
        other.close()  # so that its death is seen
        self.names: tuple[str, ...] = self._end.recv()

    def edit(self, name: str) -> Any:
        self._end.send(name)
        return self._end.recv()

    def close(self) -> None:
        self._end.close()
        self._process.join()


def serve(end: Any, opener: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    contender = opener(*arguments)
    end.send(contender.names)
    with contextlib.suppress(EOFError):  # closed, or its parent died
        while True:
            end.send(contender.edit(end.recv()))
