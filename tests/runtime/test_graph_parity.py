"""Every graph, by each backend, against the module of diffusers or transformers it stands for.

float32 graphs of four models; 16-bit graphs of `tiny`, which are held against float32 modules on
inputs that 16 bits hold exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.signature import kv_names
from tests.conftest import load_ours
from tests.runtime.graph_inputs import Arrays, cast, normal, reference_inputs, step_inputs
from tests.tolerances import assert_close


@dataclass(frozen=True, slots=True)
class Subject:
    """Our graphs of a model, and diffusers' pipeline with the same weights in float32."""

    ours: KleinKVPipeline
    theirs: Flux2KleinKVPipeline
    precision: str

    def run(self, graph: str, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """Runs a graph on arrays; float32 ones are cast to the graph's type."""
        backend = self.ours.backend
        buffers = {name: backend.upload(x) for name, x in cast(inputs, self.precision).items()}
        outputs = backend.run(graph, buffers)
        return {name: np.array(backend.download(x)) for name, x in outputs.items()}

    def step(self, **sizes: Any) -> Arrays:
        return step_inputs(self.ours.config.transformer, **sizes)

    def references(self) -> Arrays:
        return reference_inputs(self.ours.config.transformer)

    def close(self, graph: str, ours: Any, theirs: Any, what: str = "") -> None:
        assert_close(graph, self.precision, ours, theirs, what)


@pytest.fixture(
    scope="module",
    params=[
        (backend, name, precision)
        for backend in ("onnxruntime", "torch")
        for name in ("plain", "short", "sharded", "tiny")
        for precision in ("float32", "float16", "bfloat16")
        if precision == "float32" or name == "tiny"
        # ONNX Runtime does not compute bfloat16 on a CPU.
        if (backend, precision) != ("onnxruntime", "bfloat16")
    ],
    ids="-".join,
)
def subject(request):
    backend, name, precision = request.param
    if name != "tiny":
        _, artifacts, theirs = request.getfixturevalue("saved_models")(name)
    else:
        short = {"float32": "", "float16": "fp16_", "bfloat16": "bf16_"}[precision]
        artifacts = request.getfixturevalue(f"tiny_{short}artifacts")
        theirs = request.getfixturevalue("tiny_theirs")
    return Subject(load_ours(artifacts, backend), theirs, precision)


def their_step(subject, inputs, references=None, cache=None):
    """diffusers' transformer as its pipeline calls it: extract, cached or plain."""
    x = {name: torch.from_numpy(value) for name, value in inputs.items()}
    hidden, ids, options = x["hidden_states"], x["img_ids"], {}
    batch = len(hidden)
    if references is not None:
        tokens = torch.from_numpy(references["ref_hidden_states"])
        hidden = torch.cat([tokens.repeat(batch, 1, 1), hidden], dim=1)
        ids = torch.cat([torch.from_numpy(references["ref_ids"]), ids])
        options = {"kv_cache_mode": "extract", "num_ref_tokens": tokens.shape[1]}
    elif cache is not None:
        options = {"kv_cache_mode": "cached", "kv_cache": cache}
    with torch.no_grad():
        out = subject.theirs.transformer(
            hidden_states=hidden,
            timestep=x["timestep"].expand(batch) / 1000,
            guidance=None,
            encoder_hidden_states=x["encoder_hidden_states"],
            txt_ids=x["txt_ids"].repeat(batch, 1, 1),
            img_ids=ids.repeat(batch, 1, 1),
            return_dict=False,
            **options,
        )
    return out[0], out[1] if references is not None else None


def their_kv(cache: Flux2KVCache) -> list[Any]:
    layers = [*cache.double_block_caches, *cache.single_block_caches]
    return [x for layer in layers for x in (layer.k_ref, layer.v_ref)]


# --- transformer ---


def test_encode_references(subject):
    ours = subject.run("encode_references", subject.references())
    _, cache = their_step(subject, subject.step(), subject.references())
    assert list(ours) == kv_names(subject.ours.config.transformer.num_blocks)
    for (name, mine), other in zip(ours.items(), their_kv(cache), strict=True):
        subject.close("encode_references", mine, other[:1], name)


@pytest.mark.parametrize("batch", [1, 3])
def test_first_step(subject, batch):
    inputs, references = subject.step(batch=batch), subject.references()
    ours = subject.run("first_step", inputs | references)
    noise_pred, cache = their_step(subject, inputs, references)
    subject.close("first_step", ours["noise_pred"], noise_pred, "noise_pred")
    latents = inputs["hidden_states"] + inputs["sigma_step"] * noise_pred.numpy()
    subject.close("first_step", ours["latents"], latents, "latents")
    for name, other in zip(list(ours)[2:], their_kv(cache), strict=True):
        subject.close("encode_references", ours[name], other[:1], name)


@pytest.mark.parametrize("batch", [1, 3])
def test_cached_step(subject, batch):
    """On keys and values from another step of another request: prompt, noise, size and time."""
    references = subject.references()
    _, cache = their_step(subject, subject.step(seed=20, batch=batch), references)
    inputs = subject.step(seed=40, batch=batch, text_tokens=11, grid=(6, 4))
    noise_pred, _ = their_step(subject, inputs, cache=cache)
    kv = subject.run("encode_references", references)
    ours = subject.run("cached_step", inputs | kv)
    subject.close("cached_step", ours["noise_pred"], noise_pred, "noise_pred")


def test_cached_step_without_references(subject):
    net = subject.ours.config.transformer
    empty = np.zeros((1, 0, net.num_attention_heads, net.attention_head_dim), np.float32)
    inputs = subject.step()
    ours = subject.run("cached_step", inputs | dict.fromkeys(kv_names(net.num_blocks), empty))
    noise_pred, _ = their_step(subject, inputs)
    subject.close("cached_step", ours["noise_pred"], noise_pred, "noise_pred, R = 0")


def test_first_step_is_references_then_cached_step(subject):
    inputs, references = subject.step(), subject.references()
    together = subject.run("first_step", inputs | references)
    kv = subject.run("encode_references", references)
    apart = subject.run("cached_step", inputs | kv) | kv
    assert together.keys() == apart.keys()
    for name, value in together.items():
        subject.close("first_step = references + cached", apart[name], value, name)


def test_keys_and_values_do_not_depend_on_the_request(subject):
    references = subject.references()
    one = subject.run("first_step", subject.step() | references)
    other = subject.run(
        "first_step", subject.step(seed=60, batch=1, text_tokens=33, grid=(7, 4)) | references
    )
    for name in kv_names(subject.ours.config.transformer.num_blocks):
        np.testing.assert_array_equal(one[name], other[name], name)


# --- text encoder ---


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_text_encoder(subject, padding):
    config = subject.ours.config.text_encoder
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    mask = np.ones((2, 40), np.int64)
    if padding == "right":
        mask[0, 25:] = mask[1, 39:] = 0
    elif padding == "left":
        mask[0, :15] = mask[1, :1] = 0
    ours = subject.run("text_encoder", {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        states = subject.theirs.text_encoder(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    theirs = torch.cat([states[layer] for layer in config.layers], dim=-1)
    subject.close("text_encoder", ours["encoder_hidden_states"], theirs)


# --- VAE ---


@pytest.mark.parametrize("cells", [(2, 2), (7, 4), (3, 9)])
def test_vae_encoder(subject, cells, picture):
    unit = subject.ours.config.vae.multiple_of
    image = picture(cells[1] * unit, cells[0] * unit)
    ours = subject.run("vae_encoder", {"image": np.asarray(image)[None]})["ref_hidden_states"]
    with torch.no_grad():
        pixels = subject.theirs.image_processor.preprocess(image)
        theirs = subject.theirs._encode_vae_image(pixels, generator=None)
    subject.close("vae_encoder", ours, theirs.permute(0, 2, 3, 1))


@pytest.mark.parametrize("cells", [(2, 2), (7, 4), (3, 9)])
def test_vae_decoder(subject, cells):
    pipe, vae = subject.theirs, subject.theirs.vae
    tokens = normal(3, 2, *cells, subject.ours.config.vae.token_channels)
    ours = subject.run("vae_decoder", {"latents": tokens})
    with torch.no_grad():
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        latents = torch.from_numpy(tokens).permute(0, 3, 1, 2) * std + mean
        decoded = vae.decode(pipe._unpatchify_latents(latents), return_dict=False)[0]
    sample = pipe.image_processor.postprocess(decoded, output_type="pt")
    subject.close("sample", ours["sample"], sample, "vae_decoder")
    pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
    subject.close("pixels", ours["image"], pictures, "vae_decoder")
    assert ours["image"].dtype == np.uint8
