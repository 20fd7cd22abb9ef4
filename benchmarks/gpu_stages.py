"""The stages around the loop: references into the VAE, latents out of it."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_cells import attempt
from gpu_models import Networks, SuiteSize, make_pipeline, make_scene
from gpu_record import Record
from gpu_timing import Clock, with_spread

from klein_kv.runtime.torch_backend import TorchBackend

__all__ = ["measure_stages"]

REPEATS = 5


def measure_stages(
    record: Record, networks: Networks, size: SuiteSize, plan: list[tuple[int, int]]
) -> None:
    """Times diffusers' VAE as its pipelines call it, and as our backend does.

    Args:
        record: where results go.
        networks: the weights.
        size: of the references.
        plan: cells of the suite, as (output, references).
    """
    pipe = make_pipeline("plain", networks.transformer(), networks.vae)
    backend = TorchBackend.from_tensors(
        networks.config, "bfloat16", device=str(networks.device), vae=networks.vae
    )
    image = torch.rand(1, 3, size.reference, size.reference, device=networks.device)
    pixels = (255 * image).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    image = (2 * image - 1).to(networks.dtype)
    functions: dict[str, Callable[[], Any]] = {
        f"vae_encode {size.reference}, diffusers": lambda: pipe._encode_vae_image(image, None),
        f"vae_encode {size.reference}, ours": lambda: backend.run("vae_encoder", {"image": pixels}),
    }
    for output in sorted({output for output, _ in plan}, reverse=True):
        noise = make_scene(networks, size, output, 0).noise  # [1, C, h, w]
        unpatched = pipe._unpatchify_latents(noise)
        tokens = noise.permute(0, 2, 3, 1).contiguous()
        functions |= {
            f"vae_decode {output}, diffusers": lambda x=unpatched: networks.vae.decode(
                x, return_dict=False
            ),
            f"vae_decode {output}, ours": lambda x=tokens: backend.run(
                "vae_decoder", {"latents": x}
            ),
        }
    stages = record.document.setdefault("stages", {})
    for what, function in functions.items():
        found = attempt(record, what, lambda function=function: _measure(function, networks.device))
        if found is not None:
            stages[what] = found
    record.say("stages of the VAE")


@torch.inference_mode()
def _measure(function: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    clock = Clock(device)
    function()
    clock.start()
    for _ in range(REPEATS):
        function()
        clock.mark()
    sample = clock.stop()
    return {
        "samples": sample.steps,
        "seconds": with_spread(sample.steps),
        "peak_bytes": sample.peak_bytes,
    }
