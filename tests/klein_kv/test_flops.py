"""The count against numbers worked out by hand for klein 9B, and against itself."""

import pytest

from klein_kv.flops import (
    diffusers_kv_edit_flops,
    edit_flops,
    plain_edit_flops,
    reference_flops,
    step_flops,
)
from tests.klein_configs import KLEIN_9B

NET = KLEIN_9B.transformer
SIZES = {"batch": 1, "image_tokens": 4096, "text_tokens": 512}


# Teraflops at 1024x1024 with one, two and four references of that size:
# 13.96 GFLOP per token, 524,288 per pair of query and key.
@pytest.mark.parametrize(
    ("references", "first", "cached", "plain"),
    [(1, 151, 85, 161), (2, 245, 95, 265), (4, 484, 115, 524)],
)
def test_klein_9b(references: int, first: int, cached: int, plain: int) -> None:
    tokens = 4096 * references
    step = step_flops(NET, ref_tokens=tokens, **SIZES)
    assert step == pytest.approx(cached * 1e12, rel=0.01)
    assert step + reference_flops(NET, tokens) == pytest.approx(first * 1e12, rel=0.03)
    assert plain_edit_flops(NET, steps=1, ref_tokens=tokens, **SIZES) == pytest.approx(
        plain * 1e12, rel=0.01
    )


def test_request_is_the_sum_of_its_steps() -> None:
    step, encode = step_flops(NET, ref_tokens=4096, **SIZES), reference_flops(NET, 4096)
    request = {"steps": 4, "ref_tokens": 4096, **SIZES}
    assert edit_flops(NET, references_known=True, **request) == 4 * step
    assert edit_flops(NET, references_known=False, **request) == 4 * step + encode
    none = request | {"ref_tokens": 0}
    assert edit_flops(NET, references_known=False, **none) == 4 * step_flops(
        NET, ref_tokens=0, **SIZES
    )
    both = step_flops(NET, ref_tokens=4096, **(SIZES | {"batch": 2}))
    assert 1.99 * step < both < 2 * step  # the timestep is embedded once


# Four steps at 1024x1024: plain over KV, plain over known references, KV over known references.
@pytest.mark.parametrize(
    ("references", "plain_kv", "plain_known", "kv_known"),
    [(1, 1.58, 1.89, 1.19), (2, 1.99, 2.78, 1.39), (4, 2.53, 4.56, 1.80)],
)
def test_diffusers_kv_pipeline(
    references: int, plain_kv: float, plain_known: float, kv_known: float
) -> None:
    request = {"steps": 4, "ref_tokens": 4096 * references, **SIZES}
    plain = plain_edit_flops(NET, **request)
    kv = diffusers_kv_edit_flops(NET, **request)
    known = edit_flops(NET, references_known=True, **request)
    assert plain / kv == pytest.approx(plain_kv, abs=0.006)
    assert plain / known == pytest.approx(plain_known, abs=0.01)
    assert kv / known == pytest.approx(kv_known, abs=0.006)
    # What we leave out of the last block is not much, but not nothing.
    assert 1 < kv / edit_flops(NET, references_known=False, **request) < 1.02
    none = request | {"ref_tokens": 0}
    assert diffusers_kv_edit_flops(NET, **none) == plain_edit_flops(NET, **none)
