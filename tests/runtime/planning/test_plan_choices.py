"""What would fit instead: every choice does, and no smaller change of its kind."""

from dataclasses import replace
from typing import Any

import pytest

from klein_kv.runtime.planning.footprint import Footprint
from klein_kv.runtime.planning.memory_plan import MemoryPlan, make_plan
from klein_kv.runtime.planning.plan_choices import Choice, what_fits
from klein_kv.runtime.planning.request import Request, edit_stages
from tests.klein_configs import KLEIN_9B
from tests.runtime.planning.test_memory_plan import FOOTPRINT, GB, request


def choices(capacity: int, asked: Request, *, device: bool = True) -> list[Choice]:
    def make(footprint: Footprint, changed: Request) -> MemoryPlan:
        return make_plan(footprint, changed, capacity)

    first = make(FOOTPRINT, asked)
    assert not first.fits
    fitting = what_fits(first, make, device=device)
    assert all(choice.plan.fits for choice in fitting)
    return fitting


def texts(fitting: list[Choice]) -> list[str]:
    return [choice.text for choice in fitting]


def test_least_change_of_each_kind() -> None:
    fitting = choices(26 * GB, request(4))
    assert texts(fitting) == [
        "2 references",
        "fp8 K/V",
        "fp8 transformer",
        "references up to 768x768",
    ]
    one_more = make_plan(FOOTPRINT, request(3), 26 * GB)
    assert not one_more.fits
    larger = make_plan(FOOTPRINT, replace(request(4), references=((896, 896),) * 4), 26 * GB)
    assert not larger.fits


def test_smaller_outputs_and_batches() -> None:
    asked = replace(request(0), height=1536, width=2048, batch=8)
    fitting = choices(30 * GB, asked)
    assert texts(fitting) == ["1904x1424", "batch 7"]  # the proportion stays, in whole tokens
    changed = fitting[0].plan.request
    assert (changed.width, changed.height, changed.batch) == (1904, 1424, 8)
    larger = replace(asked, height=1440, width=1920)
    assert not make_plan(FOOTPRINT, larger, 30 * GB).fits


def test_without_references_left_there_is_no_first_step() -> None:
    fitting = choices(20 * GB, request(1))
    assert fitting[0].text == "no references"
    assert fitting[0].plan.request.stages == ("text_encoder", "cached_step", "vae_decoder")


def test_several_together_where_none_is_enough() -> None:
    assert texts(choices(15 * GB, request(4))) == [
        "nvfp4 transformer, fp8 text encoder and fp8 K/V"
    ]
    assert texts(choices(10 * GB, request(4))) == [
        "2 references with nvfp4 transformer, fp8 text encoder and fp8 K/V"
    ]
    assert choices(5 * GB, request(4)) == []


def test_a_host_has_fewer_choices() -> None:
    light = replace(FOOTPRINT, weights=dict.fromkeys(FOOTPRINT.weights, 0))

    def make(footprint: Footprint, changed: Request) -> MemoryPlan:
        return make_plan(footprint, changed, 6_200_000_000, reserved=0)

    fitting = what_fits(make(light, request(4)), make, device=False)
    assert texts(fitting) == ["2 references", "references up to 768x768"]


@pytest.mark.parametrize(
    "asked",
    [
        request(4, known=True),
        Request(1024, 1024, ((1024, 1024),) * 4, ("vae_encoder", "encode_references")),
        Request(1024, 1024, ((1024, 1024),) * 4, edit_stages("plain", 4)),
    ],
    ids=["known references", "references alone", "plain weights"],
)
def test_choices_are_of_the_same_kind(asked: Request) -> None:
    """Stages may go with the references; nothing else is made another request."""
    for choice in choices(14 * GB, asked):
        changed: Any = choice.plan.request
        assert set(changed.stages) <= set(asked.stages)
        assert changed.kv_held == asked.kv_held
        assert choice.plan.footprint.config is KLEIN_9B
