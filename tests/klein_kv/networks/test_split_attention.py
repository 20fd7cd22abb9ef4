"""Attention in two parts against attention over all keys at once."""

import pytest
import torch
import torch.nn.functional as F

from klein_kv.networks.split_attention import attend_apart


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    batch: int, own: int, refs: int, scale: float = 1.0, heads: int = 3, dim: int = 16
) -> list[torch.Tensor]:
    """q, k, v of the batch, k and v of the references; `scale` sharpens the reference scores."""
    return [
        normal(batch, own + 2, heads, dim, seed=1),
        normal(batch, own, heads, dim, seed=2),
        normal(batch, own, heads, dim, seed=3),
        scale * normal(1, refs, heads, dim, seed=4),
        normal(1, refs, heads, dim, seed=5),
    ]


def at_once(x: list[torch.Tensor]) -> torch.Tensor:
    """torch's attention over all keys, [B, S, H * D]."""
    q, k, v, k_ref, v_ref = x
    k, v = (torch.cat([r.expand(len(q), -1, -1, -1), y], 1) for r, y in ((k_ref, k), (v_ref, v)))
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
    return out.transpose(1, 2).flatten(2)


def exact(x: list[torch.Tensor]) -> torch.Tensor:
    return at_once([y.double() for y in x])


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(
    ("batch", "own", "refs"), [(1, 7, 5), (3, 40, 90), (2, 1, 1), (2, 33, 600)]
)
def test_is_attention_over_all_keys(batch: int, own: int, refs: int, scale: float) -> None:
    """Also where one part has all the weight, and where scores are large."""
    x = inputs(batch, own, refs, scale)
    expected = exact(x)
    error = (attend_apart(x[0], (x[1], x[2]), (x[3], x[4])) - expected).abs().max()
    # Large scores have large rounding errors, however the keys are taken.
    assert error < 3e-6 + 2 * (at_once(x) - expected).abs().max()


def test_bfloat16() -> None:
    """Two results are rounded before they are joined: measured, a quarter more error."""
    x = [y.bfloat16() for y in inputs(2, 60, 300, dim=32)]
    expected = exact(x)
    apart = attend_apart(x[0], (x[1], x[2]), (x[3], x[4]))
    assert apart.dtype == torch.bfloat16
    assert (apart - expected).norm() < 1.5 * (at_once(x) - expected).norm()


def test_queries_that_are_views() -> None:
    """The parts of one product, as a single block's queries are before their norm."""
    x = inputs(2, 6, 8)
    wide = normal(2, 8, 5, 16)
    for q in (wide[:, :, 1:4], wide.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 2:]):
        out = attend_apart(q, (x[1], x[2]), (x[3], x[4]))
        torch.testing.assert_close(out.double(), exact([q, *x[1:]]), rtol=0, atol=3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "own", "refs"), [(1, 7, 5), (3, 40, 90), (2, 33, 600)])
def test_kernels_of_a_gpu(batch: int, own: int, refs: int, dtype: torch.dtype, cudnn: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU that torch sees")
    x = [y.to(dtype) for y in inputs(batch, own, refs, dim=64)]
    q, k, v, k_ref, v_ref = (y.cuda() for y in x)
    out = attend_apart(q, (k, v), (k_ref, v_ref), cudnn).cpu()
    bound = 3e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact(x), rtol=0, atol=bound)
