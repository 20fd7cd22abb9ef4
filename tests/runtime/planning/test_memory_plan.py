"""The plan of device memory: what it adds up, what stays, what is loaded."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import GRAPH_FILES, GraphSet, KVFormat
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.planning.footprint import COMPONENTS, Footprint, component_of, linear_weights
from klein_kv.runtime.planning.memory_plan import RESERVED, MemoryPlan, make_plan, size_text
from klein_kv.runtime.planning.request import Request, edit_stages
from klein_kv.runtime.planning.scratch import estimate_scratch
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


def request(references: int = 4, known: bool = False, **changes: Any) -> Request:
    stages = edit_stages("kv", references, known=known)
    sizes = ((1024, 1024),) * references
    return replace(Request(1024, 1024, sizes, stages, kv_held=known), **changes)


def plan(capacity: int = ROOMY, **changes: Any) -> MemoryPlan:
    return make_plan(FOOTPRINT, request(**changes), capacity, scratch=SCRATCH)


def test_a_second_place_for_keys_and_values_counts() -> None:
    """Regression: what the torch backend copies for its CUDA graphs was not in the plan."""
    whole = plan()
    copied = make_plan(FOOTPRINT, request(), ROOMY, scratch=SCRATCH, kv_copies=1)
    for one, two in zip(whole.stages, copied.stages, strict=True):
        assert two.total - one.total == KV  # it stays, whatever else runs
    again = make_plan(FOOTPRINT, request(kv_held=True), ROOMY, scratch=SCRATCH, kv_copies=1)
    assert {stage.parts["kv"] for stage in again.stages} == {2 * KV}


def test_buffers_stay_while_their_component_does() -> None:
    roomy = plan()
    assert roomy.all_fits
    assert len({stage.parts["activations"] for stage in roomy.stages}) == 1
    tight = plan(roomy.together - 1)
    assert tight.fits
    assert not tight.all_fits
    assert all(stage.total <= tight.capacity for stage in tight.stages)
    alone = [stage for stage in tight.stages if len(stage.resident) < 3]
    assert alone
    assert all(x.parts["activations"] < roomy.stages[0].parts["activations"] for x in alone)
    later = make_plan(FOOTPRINT, request(), ROOMY, scratch=SCRATCH, held_scratch=2 * GB)
    assert {stage.parts["scratch"] for stage in later.stages} == {2 * GB}


def test_stages_add_up() -> None:
    planned = plan(batch=2)
    assert [stage.name for stage in planned.stages] == [
        "text_encoder",
        "vae_encoder",
        "first_step",
        "cached_step",
        "vae_decoder",
    ]
    assert planned.kv_bytes == KV
    stages = {stage.name: stage.parts for stage in planned.stages}
    assert {name for name, parts in stages.items() if "kv" in parts} == {
        "first_step",
        "cached_step",
    }
    # Inputs and outputs of all graphs, and what is copied to them.
    tokens, text, ids = 2 * 4096 * 128 * 2, 2 * 512 * 12288 * 2, 32 * (4096 + 512)
    references = 16384 * (128 * 2 + 32)
    step = tokens + text + 8 + ids
    prompt, image = 2 * 512 * 8, 1024 * 1024 * 3
    buffers = {
        "text_encoder": prompt + text // 2,  # one prompt for both images
        "vae_encoder": image + 4096 * 128 * 2,
        "first_step": step + references + 2 * tokens,  # noise_pred and latents out
        "cached_step": step + 2 * tokens,
        "vae_decoder": tokens + 2 * image + 2 * 2 * image,  # uint8, and bfloat16
    }
    sources = step + references + prompt + image
    for parts in stages.values():
        assert parts["activations"] == sources + sum(buffers.values())
    assert all(parts["scratch"] == GB for parts in stages.values())
    assert all(parts["reserved"] == RESERVED for parts in stages.values())
    assert planned.peak == max(sum(parts.values()) for parts in stages.values())
    assert {stage.scratch_source for stage in planned.stages} == {"engines"}


def test_what_is_mixed_with_an_image_counts() -> None:
    """The image's encoding, its latents, the noise that stays, and the mask."""
    stages = edit_stages("kv", 4, blends=True)
    assert stages[1:5] == ("vae_encoder", "first_step", "blend", "cached_step")
    plain, mixed = plan(batch=2), plan(batch=2, stages=stages)
    tokens, mask, sigma = 2 * 4096 * 128 * 2, 2 * 4096 * 2, 4
    fed = 2 * tokens + tokens // 2 + mask + sigma
    for stage in plain.stages:
        other = mixed.stage(stage.name)
        assert other is not None
        assert other.total - stage.total == 2 * fed + tokens, "inputs, their sources, the output"
    (blend,) = (stage for stage in mixed.stages if stage.name == "blend")
    assert blend.parts["kv"] == KV
    assert estimate_scratch("blend", FOOTPRINT, request().sizes("blend", KLEIN_9B)) == 0


def test_other_inputs_change_the_stages() -> None:
    assert [s.name for s in plan(references=0).stages] == [
        "text_encoder",
        "cached_step",
        "vae_decoder",
    ]
    assert edit_stages("plain", 2) == ("text_encoder", "vae_encoder", "plain_step", "vae_decoder")
    assert edit_stages("plain", 0) == ("text_encoder", "plain_step", "vae_decoder")
    estimated = make_plan(FOOTPRINT, request(), ROOMY)
    assert {stage.scratch_source for stage in estimated.stages} == {"estimated"}


def test_eight_bits_halve_keys_and_values() -> None:
    packed = FOOTPRINT.changed(float8_kv=True)
    assert packed.kv_bytes(request()) == KV // 2 + 2 * 32 * 32 * 4  # a scale per head and tensor
    assert packed.kv_bytes(request(references=0)) == 0
    quantized = FOOTPRINT.changed(float8_kv=True, transformer="fp8")
    assert quantized.graphs.kv_dtype == KVFormat.FP8_CONSTANT
    assert quantized.kv_bytes(request()) == KV // 2  # the scales are constants of the graphs


def test_all_stays_where_it_fits() -> None:
    planned = plan()
    assert all(stage.resident == set(COMPONENTS) for stage in planned.stages)
    assert planned.loads == {}
    assert planned.fits


def test_text_encoder_goes_first() -> None:
    planned = plan(32 * GB)
    assert planned.fits
    assert planned.loads == {"text_encoder": 12 * GB}
    resident = {stage.name: stage.resident for stage in planned.stages}
    assert resident["text_encoder"] == {"text_encoder", "transformer", "vae"}
    assert resident["first_step"] == {"transformer", "vae"}
    assert resident["vae_decoder"] == {"transformer", "vae"}


def test_known_references_stay_and_the_transformer_makes_room() -> None:
    """12 + 18 + 8.6 GB do not go together on 32: a new prompt loads both in turn."""
    planned = plan(32 * GB, known=True)
    assert planned.fits
    assert planned.loads == {"text_encoder": 12 * GB, "transformer": 18 * GB}
    assert all(stage.parts["kv"] == KV for stage in planned.stages)
    assert "transformer" not in planned.stages[0].resident


def test_one_at_a_time_on_a_small_device() -> None:
    planned = plan(22 * GB, references=0)
    assert planned.fits
    assert list(planned.loads) == ["text_encoder", "transformer"]
    assert not plan(19 * GB, references=0).fits


def test_what_is_loaded_now_counts_once() -> None:
    """The runtime plans from what is on the device, not from a request before it."""
    empty = make_plan(FOOTPRINT, request(), ROOMY, scratch=SCRATCH, loaded=())
    assert empty.loads == FOOTPRINT.weights
    assert "transformer" not in empty.stages[0].parts
    some = make_plan(FOOTPRINT, request(), ROOMY, scratch=SCRATCH, loaded={"transformer"})
    assert set(some.loads) == {"text_encoder", "vae"}
    assert "transformer" in some.stages[0].parts


@given(
    capacity=st.integers(1, 60) | st.none(),
    sizes=st.tuples(*[st.integers(0, 30)] * 3),
    references=st.integers(0, 4),
    known=st.booleans(),
    loaded=st.sets(st.sampled_from(COMPONENTS)) | st.none(),
)
def test_a_plan_never_holds_more_than_it_must_or_can(
    capacity: int | None,
    sizes: tuple[int, ...],
    references: int,
    known: bool,
    loaded: set[str] | None,
) -> None:
    weights = {name: size * GB for name, size in zip(COMPONENTS, sizes, strict=True)}
    room = ROOMY if capacity is None else capacity * GB
    asked = request(references, known and references > 0)
    planned = make_plan(
        replace(FOOTPRINT, weights=weights), asked, room, scratch=SCRATCH, loaded=loaded
    )
    before = set(loaded or ())
    for stage in planned.stages:
        own = component_of(stage.name)
        assert own in stage.resident
        bare = stage.total - sum(weights[other] for other in stage.resident - {own})
        assert stage.total <= room or stage.total == bare
        if loaded is not None:
            assert stage.resident <= before | {own}, "something came without being loaded"
            assert stage.loads == (0 if own in before else weights[own])
            before = set(stage.resident)
    needed = max(
        stage.total - sum(weights[x] for x in stage.resident - {component_of(stage.name)})
        for stage in planned.stages
    )
    assert planned.fits == (needed <= room)


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
def test_estimates_beside_engines(graph: str, reported: int, within: float) -> None:
    """Engines of klein 9B, 1024x1024, four references, TensorRT-RTX 1.7.1: never far below."""
    sizes = request().sizes(graph, KLEIN_9B)
    planned = estimate_scratch(graph, FOOTPRINT, sizes)
    assert reported * 0.95 < planned < reported * (1 + within)


def test_quantized_weights_are_smaller() -> None:
    linears, text = 8_724_152_320, 5_209_325_568  # of all blocks of klein 9B, Qwen3-8B to block 27
    fp8 = FOOTPRINT.changed(transformer="fp8")
    assert fp8.weights == {**FOOTPRINT.weights, "transformer": 18 * GB - linears}
    both = FOOTPRINT.changed(transformer="nvfp4", text_encoder="fp8")
    assert both.weights["transformer"] == 18 * GB - int(linears * (2 - 0.5625))
    assert both.weights["text_encoder"] == 12 * GB - text
    assert both.precisions == {"transformer": "nvfp4", "text_encoder": "fp8"}


@pytest.mark.parametrize("config", [KLEIN_9B, KLEIN_4B], ids=["9b", "4b"])
def test_linear_weights_are_those_of_the_checkpoint(config: ModelConfig) -> None:
    def matrices(shapes: dict[str, tuple[int, ...]], *prefixes: str) -> int:
        return sum(
            prod(shape) for name, shape in shapes.items() if name.startswith(prefixes) and shape[1:]
        )

    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    assert linear_weights(config) == {
        "transformer": matrices(transformer_parameters(config.transformer), *blocks),
        "text_encoder": matrices(text_encoder_parameters(config.text_encoder), "model.layers."),
    }


def test_sizes_for_people() -> None:
    assert [size_text(x) for x in (123, 20_000_000, 8_589_934_592)] == [
        "0.000 MB",
        "20.0 MB",
        "8.59 GB",
    ]
