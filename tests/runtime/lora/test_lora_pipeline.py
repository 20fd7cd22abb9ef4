"""Adapters in a pipeline: diffusers' results and names, exact on the way back, no stale keys."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import BackendError, CapacityError, RequestError
from klein_kv.networks.transformer import transformer_parameters
from tests.checkpoints import load_diffusers
from tests.conftest import load_ours
from tests.runtime.stub_backend import Stub

LAYERS = ("attn.to_q", "attn.to_out.0", "ff.linear_in", "attn.to_qkv_mlp_proj", "attn.to_out")
REQUEST: dict[str, Any] = {
    "height": 64,
    "width": 80,
    "max_sequence_length": 64,
    "num_inference_steps": 3,
    "output_type": "latent",
}

Adapter = dict[str, torch.Tensor]


def make_adapter(pipe: KleinKVPipeline, seed: int, size: float = 0.3) -> Adapter:
    """Low-rank changes of many layers of the transformer, as PEFT names them."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, shape in transformer_parameters(pipe.config.transformer).items():
        module = name.removesuffix(".weight")
        if module.endswith(LAYERS) or module in ("x_embedder", "norm_out.linear"):
            down = torch.randn(4, shape[1], generator=generator) / shape[1] ** 0.5
            up = torch.randn(shape[0], 4, generator=generator) * size
            adapter[f"transformer.{module}.lora_A.weight"] = down
            adapter[f"transformer.{module}.lora_B.weight"] = up
    return adapter


@pytest.fixture
def pipe(tiny_artifacts: Path, backend: str) -> Iterator[KleinKVPipeline]:
    with load_ours(tiny_artifacts, backend, reference_cache_bytes=1 << 28) as pipeline:
        yield pipeline


@pytest.fixture
def noise() -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((1, 128, 4, 5)).astype(np.float32)


@pytest.fixture
def image(picture: Callable[..., Image.Image]) -> Image.Image:
    return picture(96, 80)


def latents(pipe: KleinKVPipeline, noise: NDArray[Any], **request: Any) -> NDArray[Any]:
    result: Any = pipe("a kite", latents=noise, **REQUEST | request)
    array: NDArray[Any] = result.images
    return array


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return bool(np.array_equal(one, other))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_latents_are_diffusers(
    pipe: KleinKVPipeline, tiny_checkpoint: Path, noise: NDArray[Any], image: Image.Image
) -> None:
    theirs = load_diffusers(tiny_checkpoint)
    for judge in (pipe, theirs):
        for seed in (1, 2):
            judge.load_lora_weights(make_adapter(pipe, seed), adapter_name=f"a{seed}")

    def compare(scale: float | None = None) -> None:
        kwargs = {} if scale is None else {"attention_kwargs": {"scale": scale}}
        with torch.no_grad():
            expected = theirs(
                image=[image], prompt="a kite", latents=torch.from_numpy(noise), **REQUEST, **kwargs
            ).images
        actual = latents(pipe, noise, image=[image], **kwargs)
        np.testing.assert_allclose(actual, expected.numpy(), atol=1e-4)

    compare()  # the one that was loaded last
    assert pipe.get_active_adapters() == theirs.get_active_adapters() == ["a2"]
    for judge in (pipe, theirs):
        judge.set_adapters(["a1", "a2"], [0.7, -0.4])
    compare()
    compare(scale=0.5)
    for judge in (pipe, theirs):
        judge.delete_adapters("a1")
    compare()
    assert pipe.get_list_adapters() == theirs.get_list_adapters()
    for judge in (pipe, theirs):
        judge.disable_lora()
    compare()
    for judge in (pipe, theirs):
        judge.enable_lora()
        judge.fuse_lora(lora_scale=1.5)
    compare()
    assert pipe.fused_loras == theirs.fused_loras == {"a2"}


def test_the_base_comes_back_bit_for_bit_and_keys_are_never_old(
    pipe: KleinKVPipeline, noise: NDArray[Any], image: Image.Image, tiny_artifacts: Path
) -> None:
    base = latents(pipe, noise, image=[image])
    known = pipe.encode_references([image])
    pipe.load_lora_weights(make_adapter(pipe, 1), adapter_name="style")
    changed = latents(pipe, noise, image=[image])
    assert not np.allclose(changed, base, atol=1e-2)
    with pytest.raises(RequestError, match="another set of adapters"):
        latents(pipe, noise, references=known)
    own = pipe.encode_references([image])
    assert same(latents(pipe, noise, references=own), changed)

    fresh = load_ours(tiny_artifacts, pipe.backend.name)
    fresh.load_lora_weights(make_adapter(pipe, 1))
    assert same(latents(fresh, noise, image=[image]), changed)

    hits = pipe.reference_store.stats.hits
    pipe.set_adapters("style", 0.0)
    assert same(latents(pipe, noise, image=[image]), base)
    pipe.set_adapters("style")
    assert same(latents(pipe, noise, image=[image]), changed)
    pipe.load_lora_weights(make_adapter(pipe, 2), "style", hotswap=True)
    assert not np.allclose(latents(pipe, noise, image=[image]), changed, atol=1e-2)
    pipe.unload_lora_weights()
    assert same(latents(pipe, noise, image=[image]), base)
    assert same(latents(pipe, noise, references=known), base)
    assert pipe.reference_store.stats.hits >= hits + 3, "sets that come back are hits"


def test_saved_references_belong_to_their_adapters(
    pipe: KleinKVPipeline, noise: NDArray[Any], image: Image.Image, tmp_path: Path
) -> None:
    pipe.load_lora_weights(make_adapter(pipe, 1), adapter_name="style")
    pipe.encode_references([image]).save(tmp_path / "refs")
    expected = latents(pipe, noise, image=[image])
    pipe.reference_store.clear()
    loaded = pipe.load_references(tmp_path / "refs")
    assert same(latents(pipe, noise, references=loaded), expected)
    pipe.set_adapters("style", 0.5)
    with pytest.raises(RequestError, match="another set of adapters"):
        pipe.load_references(tmp_path / "refs")


def test_fused_adapters_stay_when_others_come_and_go(
    pipe: KleinKVPipeline, noise: NDArray[Any]
) -> None:
    base = latents(pipe, noise)
    pipe.load_lora_weights(make_adapter(pipe, 1))
    one = latents(pipe, noise)
    pipe.fuse_lora()
    assert same(latents(pipe, noise), one), "fused, it does not count twice"
    pipe.unload_lora_weights()
    assert same(latents(pipe, noise), one)
    pipe.load_lora_weights(make_adapter(pipe, 2))
    assert pipe.get_active_adapters() == ["default_0"]
    both = latents(pipe, noise)
    assert not np.allclose(both, one, atol=1e-2)
    assert same(latents(pipe, noise, attention_kwargs={"scale": 0}), one)
    pipe.unfuse_lora()
    pipe.delete_adapters(["default_0", "default_0"])  # was a KeyError
    assert same(latents(pipe, noise), base)


@pytest.mark.parametrize("during", [True, False])
def test_after_an_error_in_a_switch_the_weights_are_right_again(
    during: bool, pipe: KleinKVPipeline, noise: NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the error is held, and with it what was loaded until then."""
    base = latents(pipe, noise)
    pipe.load_lora_weights(make_adapter(pipe, 1))
    replace = type(pipe.backend).replace_weights

    def lost() -> Any:
        raise BackendError("the device is lost")

    def broken(self: Any, changes: dict[str, Any]) -> None:
        some = dict(list(changes.items())[: len(changes) // 2])
        if during:
            some[list(changes)[-1]] = lost
        replace(self, some)
        lost()

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.backend), "replace_weights", broken)
        with pytest.raises(BackendError, match="lost") as held:
            latents(pipe, noise)
    pipe.unload_lora_weights()
    assert same(latents(pipe, noise), base)
    assert held.tb is not None


def test_weights_that_do_not_fit_beside_the_files_are_refused(
    pipe: KleinKVPipeline, noise: NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = latents(pipe, noise)
    pipe.load_lora_weights(make_adapter(pipe, 1))
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.backend), "available_memory", lambda _: 100_000)
        with pytest.raises(CapacityError, match=r"change .* of weights.*export --lora"):
            latents(pipe, noise)
    pipe.unload_lora_weights()
    assert same(latents(pipe, noise), base)


def test_a_call_inside_a_call_does_not_change_the_outer_one(
    pipe: KleinKVPipeline, noise: NDArray[Any]
) -> None:
    pipe.load_lora_weights(make_adapter(pipe, 1), "a")
    expected = latents(pipe, noise)

    def inside(own: KleinKVPipeline, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            own.set_adapters("a", -1)
            latents(own, noise)
        return {}

    assert same(latents(pipe, noise, callback_on_step_end=inside), expected)
    assert not same(latents(pipe, noise), expected)


ACTIONS: dict[str, Callable[[KleinKVPipeline], object]] = {
    "a": lambda pipe: pipe.set_adapters("a"),
    "a and b": lambda pipe: pipe.set_adapters(["a", "b"], [1, 0.5]),
    "b": lambda pipe: pipe.set_adapters("b", -2),
    "disable": KleinKVPipeline.disable_lora,
    "enable": KleinKVPipeline.enable_lora,
    "fuse": lambda pipe: pipe.fuse_lora(adapter_names=["b"], lora_scale=0.5),
    "unfuse": KleinKVPipeline.unfuse_lora,
}


STUB_REQUEST = REQUEST | {"prompt_embeds": np.ones((1, 4, 96), np.float32), "seed": 1}


@pytest.fixture(scope="module")
def open_stub(tiny_artifacts: Path) -> Callable[[], KleinKVPipeline]:
    """Pipelines with two adapters on a backend that is quick and sensitive to every weight."""
    manifest = Manifest.load(tiny_artifacts)

    def open_pipe() -> KleinKVPipeline:
        stub: Any = Stub(manifest)
        pipe = KleinKVPipeline(tiny_artifacts, manifest, stub, reference_cache_bytes=1 << 28)
        pipe.set_progress_bar_config(disable=True)
        for number, name in enumerate("ab"):
            pipe.load_lora_weights(make_adapter(pipe, number), name)
        return pipe

    return open_pipe


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.set_adapters("c"), "no adapter 'c', expected some of a, b"),
        (lambda pipe: pipe.set_adapters(["a"], [1, 2]), "2 weights for 1 adapters"),
        (lambda pipe: pipe.set_adapters("a", 5), "-4 to 4"),
        (lambda pipe: pipe.set_adapters("a", float("nan")), "-4 to 4"),
        (lambda pipe: pipe.set_adapters("a", {"unet": 1.0}), "key 'transformer'"),
        (lambda pipe: pipe.delete_adapters(["a", "c"]), "no adapter 'c'"),
        (lambda pipe: pipe.load_lora_weights({}, "a"), "expected another one"),
        (lambda pipe: pipe.load_lora_weights({}, ""), "adapter_name is '', expected a text"),
        (lambda pipe: pipe.load_lora_weights({}, "c", hotswap=True), "expected one that is loaded"),
        (lambda pipe: pipe.load_lora_weights("none.safetensors"), "none.safetensors"),
        (lambda pipe: pipe.fuse_lora(components=["text_encoder"]), "components"),
        (lambda pipe: pipe.fuse_lora(lora_scale="1"), "lora_scale is '1', expected a number"),
        (lambda pipe: pipe.fuse_lora(adapter_names=[]), "no active adapter to fuse"),
        (lambda pipe: pipe("x", attention_kwargs={"scale": "1"}), "scale of adapters"),
    ],
)
def test_bad_calls_change_nothing(
    call: Callable[[KleinKVPipeline], object],
    message: str,
    open_stub: Callable[[], KleinKVPipeline],
) -> None:
    pipe = open_stub()
    before = pipe(**STUB_REQUEST).images
    with pytest.raises(RequestError, match=message):
        call(pipe)
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    assert pipe.get_active_adapters() == ["b"]
    assert same(pipe(**STUB_REQUEST).images, before)


@settings(max_examples=15)
@given(actions=st.lists(st.sampled_from([*ACTIONS, "edit", "encode"]), min_size=2, max_size=14))
def test_any_sequence_of_calls_edits_with_the_weights_that_are_wanted(
    actions: list[str], open_stub: Callable[[], KleinKVPipeline]
) -> None:
    pipe, done = open_stub(), list[Callable[[KleinKVPipeline], object]]()
    image = Image.new("RGB", (64, 64), "teal")
    request = STUB_REQUEST | {"image": image}
    for action in [*actions, "edit"]:
        if action == "encode":
            pipe.encode_references(image)
        elif action != "edit":
            done.append(ACTIONS[action])
            ACTIONS[action](pipe)
        else:
            fresh = open_stub()
            for step in done:
                step(fresh)
            assert same(pipe(**request).images, fresh(**request).images)
