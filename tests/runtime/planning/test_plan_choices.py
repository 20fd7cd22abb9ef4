"""What would fit instead: every choice does, and no smaller change of its kind."""

from dataclasses import replace

import pytest

from klein_kv.runtime.planning.memory_plan import make_plan
from klein_kv.runtime.planning.plan_choices import what_fits
from klein_kv.runtime.planning.request import Request, edit_stages
from tests.klein_configs import KLEIN_9B
from tests.runtime.planning.test_memory_plan import FOOTPRINT, GB, request

FOUR = ((1024, 1024),) * 4


def choices(capacity, asked, *, footprint=FOOTPRINT, device=True):
    def make(other, changed):
        return make_plan(other, changed, capacity, **({} if device else {"reserved": 0}))

    first = make(footprint, asked)
    assert not first.fits
    fitting = what_fits(first, make, device=device)
    assert all(choice.plan.fits for choice in fitting)
    return fitting


LIGHT = replace(FOOTPRINT, weights=dict.fromkeys(FOOTPRINT.weights, 0))
SMALL = FOOTPRINT.changed(transformer="nvfp4", text_encoder="fp8")
TOGETHER = "nvfp4 transformer, fp8 text encoder and fp8 K/V"


@pytest.mark.parametrize(
    ("capacity", "asked", "options", "texts"),
    [
        (
            26 * GB,
            request(4),
            {},
            ["2 references", "fp8 K/V", "fp8 transformer", "references up to 768x768"],
        ),
        # The proportion stays, in whole tokens.
        (30 * GB, request(0, height=1536, width=2048, batch=8), {}, ["1904x1424", "batch 7"]),
        # Several together where none is enough.
        (15 * GB, request(4), {}, [TOGETHER]),
        (10 * GB, request(4), {}, [f"2 references with {TOGETHER}"]),
        (15 * GB, request(4, batch=2, text_tokens=8192), {}, [f"batch 1 with {TOGETHER}"]),
        (5 * GB, request(4), {}, []),
        (5 * GB, request(4), {"footprint": SMALL}, []),
        # A host has fewer choices.
        (
            6_200_000_000,
            request(4),
            {"footprint": LIGHT, "device": False},
            ["2 references", "references up to 768x768"],
        ),
    ],
)
def test_least_change_of_each_kind(capacity, asked, options, texts):
    assert [choice.text for choice in choices(capacity, asked, **options)] == texts


def test_nothing_smaller_would_do():
    for capacity, more in (
        (26 * GB, request(3)),
        (26 * GB, replace(request(4), references=((896, 896),) * 4)),
        (30 * GB, request(0, height=1440, width=1920, batch=8)),
    ):
        assert not make_plan(FOOTPRINT, more, capacity).fits


def test_without_references_left_there_is_no_first_step():
    first = choices(20 * GB, request(1))[0]
    assert first.text == "no references"
    assert first.plan.request.stages == ("text_encoder", "cached_step", "vae_decoder")


@pytest.mark.parametrize(
    "asked",
    [
        request(4, known=True),
        Request(1024, 1024, FOUR, ("vae_encoder", "encode_references")),
        Request(1024, 1024, FOUR, edit_stages("plain", 4)),
    ],
    ids=["known references", "references alone", "plain weights"],
)
def test_choices_are_of_the_same_kind(asked):
    """Stages may go with the references; nothing else is made another request."""
    for choice in choices(14 * GB, asked):
        changed = choice.plan.request
        assert set(changed.stages) <= set(asked.stages)
        assert changed.kv_held == asked.kv_held
        assert choice.plan.footprint.config is KLEIN_9B
