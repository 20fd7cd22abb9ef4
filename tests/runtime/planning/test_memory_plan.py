"""The plan of device memory: what it adds up, what stays, what is loaded."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.errors import RequestError
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.planning.footprint import (
    COMPONENTS,
    Footprint,
    block_weights,
    component_of,
    text_block_weights,
)
from klein_kv.runtime.planning.memory_plan import RESERVED, MemoryPlan, make_plan, size_text
from klein_kv.runtime.planning.request import Request, edit_stages
from klein_kv.runtime.planning.scratch import estimate_scratch
from tests.klein_configs import KLEIN_4B, KLEIN_9B

SHAPES = {
    "vae_encoder": {"encoder.down_blocks.0.resnets.0.conv1.weight": (128, 128, 3, 3)},
    "vae_decoder": {"decoder.up_blocks.3.resnets.0.conv1.weight": (128, 256, 3, 3)},
}
GB = 10**9
FOOTPRINT = Footprint(
    config=KLEIN_9B,
    dtype="bfloat16",
    weights={"text_encoder": 12 * GB, "transformer": 18 * GB, "vae": GB // 5},
    vae_shapes=SHAPES,
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
    whole = make_plan(FOOTPRINT, request(), ROOMY, scratch=SCRATCH)
    copied = make_plan(FOOTPRINT, request(), ROOMY, scratch=SCRATCH, kv_copies=1)
    for one, two in zip(whole.stages, copied.stages, strict=True):
        assert two.total - one.total == KV  # it stays, whatever else runs
    again = make_plan(FOOTPRINT, request(kv_held=True), ROOMY, scratch=SCRATCH, kv_copies=1)
    assert {stage.parts["kv"] for stage in again.stages} == {2 * KV}


def test_buffers_of_engines_stay_while_their_component_does() -> None:
    roomy = make_plan(FOOTPRINT, request(), ROOMY, scratch=SCRATCH, fixed_buffers=True)
    assert roomy.all_fits
    assert len({stage.parts["activations"] for stage in roomy.stages}) == 1
    assert {stage.parts["scratch"] for stage in roomy.stages} == {GB}
    tight = roomy.together - 1
    plan = make_plan(FOOTPRINT, request(), tight, scratch=SCRATCH, fixed_buffers=True)
    assert plan.fits
    assert not plan.all_fits
    for stage in plan.stages:
        assert stage.total <= tight
    alone = [stage for stage in plan.stages if len(stage.resident) < 3]
    assert alone
    assert all(x.parts["activations"] < roomy.stages[0].parts["activations"] for x in alone)
    later = make_plan(
        FOOTPRINT, request(), ROOMY, scratch=SCRATCH, fixed_buffers=True, held_scratch=2 * GB
    )
    assert {stage.parts["scratch"] for stage in later.stages} == {2 * GB}


def test_stages_add_up() -> None:
    found = plan(batch=2)
    assert [stage.name for stage in found.stages] == [
        "text_encoder",
        "vae_encoder",
        "first_step",
        "cached_step",
        "vae_decoder",
    ]
    assert found.kv_bytes == KV
    stages = {stage.name: stage.parts for stage in found.stages}
    assert {name for name, parts in stages.items() if "kv" in parts} == {
        "first_step",
        "cached_step",
    }
    # noise_pred, latents in and out, text, timestep and step size, positions
    tokens, text = 2 * 4096 * 128 * 2, 2 * 512 * 12288 * 2
    loop = tokens + text + 8 + 32 * (4096 + 512)
    assert stages["cached_step"]["activations"] == loop + 2 * tokens
    assert stages["first_step"]["activations"] == loop + 2 * tokens + 16384 * (128 * 2 + 32)
    assert stages["vae_decoder"]["activations"] == loop + tokens
    pixels = 2 * 1024 * 1024 * 3
    assert stages["vae_decoder"]["images"] == pixels + 2 * pixels  # uint8, and bfloat16
    assert stages["vae_encoder"]["images"] == 1024 * 1024 * 3
    # One prompt for both images: ids and mask in, embeddings out.
    assert stages["text_encoder"]["activations"] == loop + text // 2 + 2 * 512 * 8
    assert all(parts["scratch"] == GB for parts in stages.values())
    assert all(parts["reserved"] == RESERVED for parts in stages.values())
    assert found.peak == max(sum(parts.values()) for parts in stages.values())
    assert {stage.scratch_source for stage in found.stages} == {"engines"}


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
    packed = replace(FOOTPRINT, kv_dtype="float8_e4m3fn")
    assert packed.kv_bytes(request()) == KV // 2 + 2 * 32 * 32 * 4  # a scale per head and tensor
    assert packed.kv_bytes(request(references=0)) == 0


def test_all_stays_where_it_fits() -> None:
    found = plan()
    assert all(stage.resident == set(COMPONENTS) for stage in found.stages)
    assert found.loads == {}
    assert found.fits


def test_text_encoder_goes_first() -> None:
    found = plan(32 * GB)
    assert found.fits
    assert found.loads == {"text_encoder": 12 * GB}
    resident = {stage.name: stage.resident for stage in found.stages}
    assert resident["text_encoder"] == {"text_encoder", "transformer", "vae"}
    assert resident["first_step"] == {"transformer", "vae"}
    assert resident["vae_decoder"] == {"transformer", "vae"}


def test_known_references_stay_and_the_transformer_makes_room() -> None:
    """12 + 18 + 8.6 GB do not go together on 32: a new prompt loads both in turn."""
    found = plan(32 * GB, known=True)
    assert found.fits
    assert found.loads == {"text_encoder": 12 * GB, "transformer": 18 * GB}
    assert all(stage.parts["kv"] == KV for stage in found.stages)
    assert "transformer" not in found.stages[0].resident


def test_one_at_a_time_on_a_small_device() -> None:
    found = plan(22 * GB, references=0)
    assert found.fits
    assert list(found.loads) == ["text_encoder", "transformer"]
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
    found = make_plan(
        replace(FOOTPRINT, weights=weights), asked, room, scratch=SCRATCH, loaded=loaded
    )
    before = set(loaded or ())
    for stage in found.stages:
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
        for stage in found.stages
    )
    assert found.fits == (needed <= room)


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
    found = estimate_scratch(graph, KLEIN_9B, "bfloat16", sizes, SHAPES)
    assert reported * 0.95 < found < reported * (1 + within)


def test_quantized_weights_are_smaller() -> None:
    linears, text = 8_724_152_320, 5_209_325_568  # of all blocks of klein 9B, Qwen3-8B to block 27
    fp8 = FOOTPRINT.quantized("fp8", "bf16")
    assert fp8.weights == {**FOOTPRINT.weights, "transformer": 18 * GB - linears}
    both = FOOTPRINT.quantized("nvfp4", "fp8")
    assert both.weights["transformer"] == 18 * GB - int(linears * (2 - 0.5625))
    assert both.weights["text_encoder"] == 12 * GB - text
    assert (both.precision, both.text_precision) == ("nvfp4", "fp8")
    with pytest.raises(RequestError, match="precision is 'int3'"):
        FOOTPRINT.quantized("int3", "bf16")


@pytest.mark.parametrize("config", [KLEIN_9B, KLEIN_4B], ids=["9b", "4b"])
def test_block_weights_are_those_of_the_checkpoint(config: ModelConfig) -> None:
    def matrices(shapes: dict[str, tuple[int, ...]], *prefixes: str) -> int:
        return sum(
            prod(shape) for name, shape in shapes.items() if name.startswith(prefixes) and shape[1:]
        )

    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    shapes = transformer_parameters(config.transformer)
    assert block_weights(config.transformer) == matrices(shapes, *blocks)
    shapes = text_encoder_parameters(config.text_encoder)
    assert text_block_weights(config.text_encoder) == matrices(shapes, "model.layers.")


def test_bad_requests() -> None:
    with pytest.raises(RequestError, match="batch is 0"):
        Request(128, 128, (), ("cached_step",), batch=0)
    with pytest.raises(RequestError, match="height is -16"):
        Request(-16, 128, (), ("cached_step",))


def test_sizes_for_people() -> None:
    assert [size_text(x) for x in (123, 20_000_000, 8_589_934_592)] == [
        "0.000 MB",
        "20.0 MB",
        "8.59 GB",
    ]
