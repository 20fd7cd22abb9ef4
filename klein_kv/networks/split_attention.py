"""Attention over reference keys and own keys apart, joined by their log-sum-exp.

Joining keys first writes all reference keys and values again at every block and step, once for each
image of a batch. Apart, the references' stay where they are: the queries of all images attend to
them as one long sequence. With softmax over keys 1 and keys 2,

    out = out_1 * w + out_2 * (1 - w),   w = sigmoid(lse_1 - lse_2)

In 16 bits both results are rounded before they are joined, which adds to the error of attention (a
quarter, measured in bfloat16 on a CPU). The kernels are torch's own, called below
`scaled_dot_product_attention`, which does not give the log-sum-exp.
"""

import torch

__all__ = ["attend_apart"]

aten = torch.ops.aten


def attend_apart(
    q: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    references: tuple[torch.Tensor, torch.Tensor],
    cudnn: bool = False,
) -> torch.Tensor:
    """Softmax attention over both.

    Args:
        q: queries [B, S, H, D].
        own: keys and values [B, K, H, D].
        references: keys and values [1, R, H, D], R > 0, shared by the batch.
        cudnn: on a GPU, cuDNN's kernel in place of flash attention.

    Returns:
        [B, S, H * D].
    """
    batch, length = q.shape[:2]
    out, lse = _attend(q, *own, cudnn)
    ref_out, ref_lse = _attend(q.reshape(1, batch * length, *q.shape[2:]), *references, cudnn)
    ref_out = ref_out.view(out.shape)
    ref_lse = ref_lse.view(lse.shape[1], batch, length).transpose(0, 1)  # [B, H, S]
    weight = (ref_lse - lse).sigmoid().transpose(1, 2)[..., None]  # [B, S, H, 1]
    joined = torch.lerp(out.float(), ref_out.float(), weight).to(q.dtype)
    return joined.flatten(2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cudnn: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result [B, S, H, D] and float32 log-sum-exp of the scores [B, H, S]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:  # for which there is no flash attention
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    elif cudnn:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    # Some kernels pad the rows, or add an axis of length 1.
    lse = lse.reshape(q.shape[0], q.shape[1], -1)[..., : q.shape[2]]
    return out.transpose(1, 2), lse
