"""The plan of device memory: what it adds up, what stays, what is loaded."""

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_kv.artifacts.signature import GRAPH_FILES, GraphSet, KVFormat
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.planning.footprint import COMPONENTS, Footprint, component_of, linear_weights
from klein_kv.runtime.planning.memory_plan import RESERVED, MemoryPlan, make_plan, size_text
from klein_kv.runtime.planning.request import Request, edit_stages
from tests.klein_configs import KLEIN_4B, KLEIN_9B

GB = 10**9
FOOTPRINT = Footprint(
    config=KLEIN_9B,
    graphs=GraphSet("kv", "bfloat16"),
    weights={"text_encoder": 12 * GB, "transformer": 18 * GB, "vae": GB // 5},
)
SCRATCH = dict.fromkeys(GRAPH_FILES, (GB, "engines"))
KV = 4 * 4096 * 2 * 32 * 4096 * 2  # four references of 4,096 tokens, k and v of 32 blocks
ROOMY = 1000 * GB
TOKENS, TEXT = 4096 * 128 * 2, 512 * 12288 * 2  # bytes of one image's latents, of one prompt's text


def request(references: int = 4, known: bool = False, **changes) -> Request:
    stages = edit_stages("kv", references, known=known)
    sizes = ((1024, 1024),) * references
    return replace(Request(1024, 1024, sizes, stages, kv_held=known), **changes)


def plan(
    capacity: int = ROOMY, options: dict | None = None, footprint: Footprint = FOOTPRINT, **changes
) -> MemoryPlan:
    """Of a request with changes, on engines that need 1 GB; `options` are `make_plan`'s."""
    options = {"scratch": SCRATCH} | (options or {})
    return make_plan(footprint, request(**changes), capacity, **options)


def each(planned: MemoryPlan, part: str) -> set[int | None]:
    """What a part takes in the stages."""
    return {stage.parts.get(part) for stage in planned.stages}


# --- what it adds up ---


def test_stages_add_up():
    planned = plan(batch=2)
    stages = {stage.name: stage.parts for stage in planned.stages}
    steps = ["first_step", "cached_step"]
    assert list(stages) == ["text_encoder", "vae_encoder", *steps, "vae_decoder"]
    assert planned.kv_bytes == KV
    assert [name for name, parts in stages.items() if "kv" in parts] == steps
    # Inputs and outputs of all graphs, and what is copied to them.
    step = 2 * TOKENS + 2 * TEXT + 8 + 32 * (4096 + 512)
    references, prompt, image = 16384 * (128 * 2 + 32), 2 * 512 * 8, 1024 * 1024 * 3
    buffers = {
        "text_encoder": prompt + TEXT,  # one prompt for both images
        "vae_encoder": image + TOKENS,
        "first_step": step + references + 4 * TOKENS,  # noise_pred and latents out
        "cached_step": step + 4 * TOKENS,
        "vae_decoder": 2 * TOKENS + 2 * image + 2 * 2 * image,  # uint8, and bfloat16
    }
    sources = step + references + prompt + image
    assert each(planned, "activations") == {sources + sum(buffers.values())}
    assert (each(planned, "scratch"), each(planned, "reserved")) == ({GB}, {RESERVED})
    assert planned.peak == max(sum(parts.values()) for parts in stages.values())
    assert {stage.scratch_source for stage in planned.stages} == {"engines"}
    estimated = make_plan(FOOTPRINT, request(), ROOMY)
    assert {stage.scratch_source for stage in estimated.stages} == {"estimated"}


def test_a_second_place_for_keys_and_values_counts():
    """Regression: what the torch backend copies for its CUDA graphs was not in the plan."""
    copied = plan(options={"kv_copies": 1})
    for one, two in zip(plan().stages, copied.stages, strict=True):
        assert two.total - one.total == KV  # it stays, whatever else runs
    assert each(plan(options={"kv_copies": 1}, kv_held=True), "kv") == {2 * KV}


def test_buffers_stay_while_their_component_does():
    roomy = plan()
    assert roomy.all_fits
    (whole,) = each(roomy, "activations")
    tight = plan(roomy.together - 1)
    assert tight.fits
    assert not tight.all_fits
    assert all(stage.total <= tight.capacity for stage in tight.stages)
    alone = [stage for stage in tight.stages if len(stage.resident) < 3]
    assert alone
    assert all(stage.parts["activations"] < whole for stage in alone)
    assert each(plan(options={"held_scratch": 2 * GB}), "scratch") == {2 * GB}


def test_what_is_mixed_with_an_image_counts():
    """The image's encoding, its latents, the noise that stays, and the mask."""
    stages = edit_stages("kv", 4, blends=True)
    assert stages[1:5] == ("vae_encoder", "first_step", "blend", "cached_step")
    plain, mixed = plan(batch=2), plan(batch=2, stages=stages)
    fed = 5 * TOKENS + 2 * 4096 * 2 + 4  # latents and noise of both, one image; mask, sigma
    for stage in plain.stages:
        other = mixed.stage(stage.name)
        assert other is not None
        assert other.total - stage.total == 2 * fed + 2 * TOKENS, "inputs, sources, the output"
    blend = mixed.stage("blend")
    assert blend is not None
    assert blend.parts["kv"] == KV
    assert FOOTPRINT.scratch_bytes("blend", request().sizes("blend", KLEIN_9B)) == 0


def test_other_inputs_change_the_stages():
    assert edit_stages("kv", 0) == ("text_encoder", "cached_step", "vae_decoder")
    assert edit_stages("plain", 2) == ("text_encoder", "vae_encoder", "plain_step", "vae_decoder")
    assert edit_stages("plain", 0) == ("text_encoder", "plain_step", "vae_decoder")


def test_eight_bits_halve_keys_and_values():
    packed = FOOTPRINT.changed(float8_kv=True)
    assert packed.kv_bytes(request()) == KV // 2 + 2 * 32 * 32 * 4  # a scale per head and tensor
    assert packed.kv_bytes(request(references=0)) == 0
    quantized = FOOTPRINT.changed(float8_kv=True, transformer="fp8")
    assert quantized.graphs.kv_dtype == KVFormat.FP8_CONSTANT
    assert quantized.kv_bytes(request()) == KV // 2  # the scales are constants of the graphs


def test_quantized_weights_are_smaller():
    linears, text = 8_724_152_320, 5_209_325_568  # of all blocks of klein 9B, Qwen3-8B to block 27
    fp8 = FOOTPRINT.changed(transformer="fp8")
    assert fp8.weights == {**FOOTPRINT.weights, "transformer": 18 * GB - linears}
    both = FOOTPRINT.changed(transformer="nvfp4", text_encoder="fp8")
    assert both.weights["transformer"] == 18 * GB - int(linears * (2 - 0.5625))
    assert both.weights["text_encoder"] == 12 * GB - text
    assert both.precisions == {"transformer": "nvfp4", "text_encoder": "fp8"}


@pytest.mark.parametrize("config", [KLEIN_9B, KLEIN_4B], ids=["9b", "4b"])
def test_linear_weights_are_those_of_the_checkpoint(config):
    def matrices(shapes, *prefixes):
        return sum(
            prod(shape) for name, shape in shapes.items() if name.startswith(prefixes) and shape[1:]
        )

    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    assert linear_weights(config) == {
        "transformer": matrices(transformer_parameters(config.transformer), *blocks),
        "text_encoder": matrices(text_encoder_parameters(config.text_encoder), "model.layers."),
    }


@pytest.mark.parametrize(
    ("graph", "reported", "within"),
    [
        ("text_encoder", 51_974_144, 0.06),
        ("vae_encoder", 813_839_872, 0.02),
        ("first_step", 2_099_101_696, 0.05),
        ("encode_references", 1_621_188_608, 0.25),
        ("cached_step", 517_767_168, 0.65),
        ("vae_decoder", 1_350_514_176, 0.02),
    ],
)
def test_estimates_beside_engines(graph, reported, within):
    """Engines of klein 9B, 1024x1024, four references, TensorRT-RTX 1.7.1: never far below."""
    planned = FOOTPRINT.scratch_bytes(graph, request().sizes(graph, KLEIN_9B))
    assert reported * 0.95 < planned < reported * (1 + within)


# --- what stays ---

ALL = set(COMPONENTS)
TEXT_GONE, TRANSFORMER_GONE = ALL - {"text_encoder"}, ALL - {"transformer"}


@pytest.mark.parametrize(
    ("capacity", "changes", "loads", "first", "last"),
    [
        (ROOMY, {}, [], ALL, ALL),
        (32 * GB, {}, ["text_encoder"], ALL, TEXT_GONE),
        # 12 + 18 + 8.6 GB do not go together: a new prompt loads both in turn.
        (32 * GB, {"known": True}, ["text_encoder", "transformer"], TRANSFORMER_GONE, TEXT_GONE),
        (22 * GB, {"references": 0}, ["text_encoder", "transformer"], TRANSFORMER_GONE, TEXT_GONE),
    ],
)
def test_what_stays(capacity, changes, loads, first, last):
    planned = plan(capacity, **changes)
    assert planned.fits
    assert planned.loads == {component: FOOTPRINT.weights[component] for component in loads}
    assert (planned.stages[0].resident, planned.stages[-1].resident) == (first, last)
    if "known" in changes:
        assert each(planned, "kv") == {KV}


def test_what_does_not_fit():
    assert not plan(19 * GB, references=0).fits


def test_what_is_loaded_now_counts_once():
    """The runtime plans from what is on the device, not from a request before it."""
    empty = plan(options={"loaded": ()})
    assert empty.loads == FOOTPRINT.weights
    assert "transformer" not in empty.stages[0].parts
    some = plan(options={"loaded": {"transformer"}})
    assert set(some.loads) == {"text_encoder", "vae"}
    assert "transformer" in some.stages[0].parts


@given(
    capacity=st.integers(1, 60) | st.none(),
    sizes=st.tuples(*[st.integers(0, 30)] * 3),
    references=st.integers(0, 4),
    known=st.booleans(),
    loaded=st.sets(st.sampled_from(COMPONENTS)) | st.none(),
)
def test_a_plan_never_holds_more_than_it_must_or_can(capacity, sizes, references, known, loaded):
    weights = {name: size * GB for name, size in zip(COMPONENTS, sizes, strict=True)}
    room = ROOMY if capacity is None else capacity * GB
    footprint = replace(FOOTPRINT, weights=weights)
    asked = {"references": references, "known": known and references > 0}
    planned = plan(room, {"loaded": loaded}, footprint, **asked)
    before, needed = set(loaded or ()), 0
    for stage in planned.stages:
        own = component_of(stage.name)
        assert own in stage.resident
        bare = stage.total - sum(weights[other] for other in stage.resident - {own})
        needed = max(needed, bare)
        assert stage.total <= room or stage.total == bare
        if loaded is not None:
            assert stage.resident <= before | {own}, "something came without being loaded"
            assert stage.loads == (0 if own in before else weights[own])
            before = set(stage.resident)
    assert planned.fits == (needed <= room)


def test_sizes_for_people():
    texts = [size_text(nbytes) for nbytes in (123, 20_000_000, 8_589_934_592)]
    assert texts == ["0.000 MB", "20.0 MB", "8.59 GB"]
