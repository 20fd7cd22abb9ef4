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
from klein_kv.schedule import Schedule, make_schedule, round_to_dtype

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


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 70_000), steps=st.integers(1, 200), data=st.data())
def test_equals_diffusers(tokens: int, steps: int, data: st.DataObject) -> None:
    below_one = st.floats(2**-10, 1 - 2**-10)
    sigmas = data.draw(st.none() | st.lists(below_one, min_size=1, max_size=6))
    theirs = diffusers_scheduler(KLEIN, steps, tokens, sigmas)
    assert_same(make_schedule(KLEIN, steps, tokens, sigmas), theirs)


@pytest.mark.parametrize("tokens", [64, 1024, 4096, 4300, 4301, 16384])
def test_klein_sizes(tokens: int) -> None:
    for steps in (1, 2, 4, 50):
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
        assert_same(ours, diffusers_scheduler(KLEIN, 4, 1024, sigmas))
    assert ours.sigmas.tolist()[-2:] == [0.0, 0.0]
    with pytest.raises(ValueError, match="read-only"):
        ours.sigmas[0] = 2.0


@pytest.mark.parametrize(
    "config",
    [
        {"use_dynamic_shifting": True},
        dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).config),
        {**KLEIN, "shift_terminal": 0.0, "use_flow_sigmas": None, "shift": 1.0},
    ],
    ids=["absent options", "as diffusers saves it", "off in other words"],
)
def test_other_ways_to_write_the_same(config: dict[str, Any]) -> None:
    assert_same(make_schedule(config, 4, 1024), diffusers_scheduler(config, 4, 1024))
    assert_same(make_schedule(config, 4, 1024), diffusers_scheduler(KLEIN, 4, 1024))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KLEIN | {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (KLEIN | {"use_flow_sigmas": True}, "use_flow_sigmas"),
        (KLEIN | {"time_shift_type": "linear"}, "time_shift_type"),
        (KLEIN | {"num_train_timesteps": 0}, "num_train_timesteps"),
        (KLEIN | {"shift_terminal": 0.02}, "shift_terminal"),
        (KLEIN | {"_class_name": "DDIMScheduler"}, "_class_name"),
        # as diffusers reads a configuration that does not say
        ({}, "use_dynamic_shifting is False, expected True"),
    ],
)
def test_unsupported_option_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        make_schedule(config, 4, 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1024), "num_inference_steps"),
        ((True, 1024), "num_inference_steps"),
        ((4.0, 1024), "num_inference_steps"),
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(values=st.lists(st.floats(width=32), min_size=1))
def test_rounding_equals_torch(dtype: str, values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(round_to_dtype(array, dtype), expected)


def test_rounding_to_another_type_is_refused() -> None:
    with pytest.raises(RequestError, match="float8"):
        round_to_dtype(np.zeros(1, np.float32), "float8")
