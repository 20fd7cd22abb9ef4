"""The schedule against diffusers' scheduler and transformer, bit by bit."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2 import pipeline_flux2_klein_kv as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_kv.errors import ArtifactError, RequestError
from klein_kv.schedule import Schedule, empirical_mu, make_schedule, round_to_dtype

KLEIN = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}


def diffusers_scheduler(
    config: dict[str, Any], steps: int, tokens: int, sigmas: Any = None
) -> FlowMatchEulerDiscreteScheduler:
    """Part 6 of Flux2KleinKVPipeline.__call__, with its own functions."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    sigmas = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    if hasattr(scheduler.config, "use_flow_sigmas") and scheduler.config.use_flow_sigmas:
        sigmas = None
    mu = reference.compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    reference.retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    return scheduler


def assert_same(ours: Schedule, theirs: FlowMatchEulerDiscreteScheduler) -> None:
    for name in ("sigmas", "timesteps"):
        expected = getattr(theirs, name)
        assert expected.dtype == torch.float32
        np.testing.assert_array_equal(getattr(ours, name), expected.numpy(), err_msg=name)
    expected_steps = [theirs.sigmas[i + 1] - theirs.sigmas[i] for i in range(ours.num_steps)]
    np.testing.assert_array_equal(ours.sigma_steps, torch.stack(expected_steps).numpy())


@given(tokens=st.integers(1, 70_000), steps=st.integers(1, 200))
def test_mu(tokens: int, steps: int) -> None:
    expected = reference.compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    assert empirical_mu(tokens, steps) == expected


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 20_000),
    steps=st.integers(2, 60),
    dynamic=st.booleans(),
    kind=st.sampled_from(["exponential", "linear"]),
    shift=st.sampled_from([1, 1.0, 3.0, 0.7]),
    terminal=st.sampled_from([None, 0.0, 0.02, 0.5]),
    flow=st.booleans(),
    train_steps=st.sampled_from([1000, 777]),
    data=st.data(),
)
def test_equals_diffusers(
    tokens: int,
    steps: int,
    dynamic: bool,
    kind: str,
    shift: float,
    terminal: float | None,
    flow: bool,
    train_steps: int,
    data: st.DataObject,
) -> None:
    config = {
        "use_dynamic_shifting": dynamic,
        "time_shift_type": kind,
        "shift": shift,
        "shift_terminal": terminal,
        "use_flow_sigmas": flow,
        "num_train_timesteps": train_steps,
    }
    below_one = st.floats(2**-10, 1 - 2**-10)
    sigmas = data.draw(st.none() | st.lists(below_one, min_size=1, max_size=6))
    theirs = diffusers_scheduler(config, steps, tokens, sigmas)
    assert_same(make_schedule(config, steps, tokens, sigmas), theirs)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("tokens", [64, 1024, 4096, 4300, 4301, 16384])
def test_klein_sizes(tokens: int, steps: int) -> None:
    assert_same(make_schedule(KLEIN, steps, tokens), diffusers_scheduler(KLEIN, steps, tokens))


def test_custom_sigmas_set_the_number_of_steps_but_not_the_shift() -> None:
    sigmas = [1.0, 0.5]
    ours = make_schedule(KLEIN, 4, 1024, sigmas)
    assert ours.num_steps == 2
    assert_same(ours, diffusers_scheduler(KLEIN, 4, 1024, sigmas))
    assert ours.sigmas[1] != make_schedule(KLEIN, 2, 1024, sigmas).sigmas[1]


def test_custom_sigmas_of_zero_and_as_array() -> None:
    sigmas = np.array([1.0, 0.25, 0.0])
    ours = make_schedule(KLEIN, 4, 1024, sigmas)
    with np.errstate(divide="ignore"):
        theirs = diffusers_scheduler(KLEIN, 4, 1024, sigmas)
    assert_same(ours, theirs)
    assert ours.sigmas.tolist()[-2:] == [0.0, 0.0]


def test_absent_options_take_the_scheduler_defaults() -> None:
    assert_same(make_schedule({}, 4, 1024), diffusers_scheduler({}, 4, 1024))


def test_config_as_saved() -> None:
    config = dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).config)
    assert_same(make_schedule(config, 4, 1024), diffusers_scheduler(config, 4, 1024))


@pytest.mark.parametrize(
    "option",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"time_shift_type": "cubic"},
        {"num_train_timesteps": 0},
        {"shift": "3"},
        {"shift": 0},
        {"shift_terminal": 1.0},
        {"_class_name": "DDIMScheduler"},
    ],
)
def test_unsupported_option_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(option))):
        make_schedule({**KLEIN, **option}, 4, 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1024), "num_inference_steps"),
        ((True, 1024), "num_inference_steps"),
        ((4.0, 1024), "num_inference_steps"),
        ((4, 0), "image_seq_len"),
        ((4, 1024, []), "non-empty"),
        ((4, 1024, [[1.0]]), "non-empty"),
        ((4, 1024, ["one"]), "numbers"),
        ((4, 1024, [1.0, float("nan")]), r"\[0, 1\]"),
        ((4, 1024, [1000.0, 500.0]), "divided by 1000"),
    ],
)
def test_bad_requests(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_schedule(KLEIN, *arguments)


def test_one_step_with_a_terminal_is_refused() -> None:
    """diffusers divides 0 by 0 here and goes on with NaN."""
    with pytest.raises(RequestError, match="shift_terminal"):
        make_schedule({**KLEIN, "shift_terminal": 0.02}, 1, 1024)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_model_timestep_equals_torch(dtype: str) -> None:
    kind = getattr(torch, dtype)
    for steps, tokens in [(1, 64), (4, 1024), (4, 4096), (50, 9216), (200, 300)]:
        schedule = make_schedule(KLEIN, steps, tokens)
        for i, t in enumerate(torch.from_numpy(schedule.timesteps.copy())):
            # pipeline: expand, cast to the latents' dtype, / 1000; transformer: cast, * 1000
            expected = (t.expand(2).to(kind) / 1000).to(kind) * 1000
            got = schedule.model_timestep(i, dtype)
            assert isinstance(got, np.float32)
            assert got == expected[0].float().item()


@pytest.mark.parametrize("i", [-1, 4])
def test_model_timestep_of_no_step(i: int) -> None:
    with pytest.raises(RequestError, match="0 to 3"):
        make_schedule(KLEIN, 4, 1024).model_timestep(i, "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(values=st.lists(st.floats(width=32), min_size=1))
def test_rounding_equals_torch(dtype: str, values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(round_to_dtype(array, dtype), expected)


def test_rounding_to_another_type_is_refused() -> None:
    with pytest.raises(RequestError, match="float8"):
        round_to_dtype(np.zeros(1, np.float32), "float8")


def test_schedule_is_read_only_and_owns_its_values() -> None:
    sigmas = np.array([1.0, 0.0], dtype=np.float32)
    schedule = Schedule(sigmas, np.array([1000.0], dtype=np.float32))
    sigmas[0] = 5.0
    assert schedule.sigmas[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        schedule.sigmas[0] = 2.0


@pytest.mark.parametrize(
    ("sigmas", "timesteps"),
    [
        (np.zeros(2), np.zeros(1)),
        (np.zeros((2, 1), np.float32), np.zeros(1, np.float32)),
        (np.zeros(2, np.float32), np.zeros(2, np.float32)),
        (np.zeros(1, np.float32), np.zeros(0, np.float32)),
    ],
)
def test_schedule_of_other_shapes_is_refused(sigmas: Any, timesteps: Any) -> None:
    with pytest.raises(RequestError, match="expected"):
        Schedule(sigmas, timesteps)
