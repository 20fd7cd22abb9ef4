"""How much arithmetic each transformer graph is: what a speed-up can be at most.

Counted are matrix products and attention, two operations per multiply-add, as
`klein_kv.model` writes them; norms, RoPE and activations are left out, and so are text encoder and
VAE.
"""

from klein_kv.config import TransformerConfig

__all__ = [
    "diffusers_kv_edit_flops",
    "edit_flops",
    "plain_edit_flops",
    "reference_flops",
    "step_flops",
]


def reference_flops(net: TransformerConfig, ref_tokens: int) -> int:
    """Operations of `encode_references`.

    Args:
        net: the network's shape.
        ref_tokens: R. Nothing after the last block's keys and values is computed.
    """
    dim = net.inner_dim
    rows = 2 * net.in_channels * dim
    rows += (net.num_blocks - 1) * _block_row(net) + 4 * dim * dim
    attention = (net.num_blocks - 1) * 4 * ref_tokens**2 * dim
    return ref_tokens * rows + attention + _time(net, 9)


def step_flops(
    net: TransformerConfig, *, batch: int, image_tokens: int, text_tokens: int, ref_tokens: int
) -> int:
    """Operations of `cached_step`; `first_step` is this and `reference_flops`.

    Args:
        net: the network's shape.
        batch: images made at once.
        image_tokens: S.
        text_tokens: T.
        ref_tokens: R.
    """
    dim, queries = net.inner_dim, image_tokens + text_tokens
    embed = image_tokens * 2 * net.in_channels * dim + text_tokens * 2 * (
        net.joint_attention_dim * dim
    )
    blocks = net.num_blocks * queries * (_block_row(net) + 4 * (ref_tokens + queries) * dim)
    output = image_tokens * 2 * dim * net.out_channels
    return batch * (embed + blocks + output) + _time(net, 17)


def edit_flops(
    net: TransformerConfig,
    *,
    steps: int,
    references_known: bool,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    ref_tokens: int,
) -> int:
    """Operations of all steps of one request.

    Args:
        net: the network's shape.
        steps: denoising steps.
        references_known: keys and values are at hand: all steps are `cached_step`.
        batch: images made at once.
        image_tokens: S.
        text_tokens: T.
        ref_tokens: R.
    """
    step = step_flops(
        net,
        batch=batch,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        ref_tokens=ref_tokens,
    )
    encode = 0 if references_known or ref_tokens == 0 else reference_flops(net, ref_tokens)
    return steps * step + encode


def diffusers_kv_edit_flops(
    net: TransformerConfig,
    *,
    steps: int,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    ref_tokens: int,
) -> int:
    """Operations of a request in diffusers' KV pipeline, whose references are new every time.

    Source: diffusers, `Flux2KleinKVPipeline.__call__`. Its first step runs the reference tokens,
    once per image of the batch, through the whole last block too, of which only keys and values
    are ever read.
    """
    edit = edit_flops(
        net,
        steps=steps,
        references_known=True,
        batch=batch,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        ref_tokens=ref_tokens,
    )
    if ref_tokens == 0:
        return edit
    dim = net.inner_dim
    rest_of_block = ref_tokens * (_block_row(net) - 4 * dim * dim) + 4 * ref_tokens**2 * dim
    return edit + batch * (reference_flops(net, ref_tokens) + rest_of_block)


def plain_edit_flops(
    net: TransformerConfig,
    *,
    steps: int,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    ref_tokens: int,
) -> int:
    """Operations of a request without reuse: references are image tokens of every step.

    Source: diffusers, `Flux2KleinPipeline.__call__`.
    """
    return steps * step_flops(
        net,
        batch=batch,
        image_tokens=image_tokens + ref_tokens,
        text_tokens=text_tokens,
        ref_tokens=0,
    )


def _block_row(net: TransformerConfig) -> int:
    """Linear layers of one block for one token: the same count in double and single blocks."""
    dim, mlp = net.inner_dim, net.mlp_hidden_dim
    return 2 * (4 * dim * dim + 3 * mlp * dim)


def _time(net: TransformerConfig, vectors: int) -> int:
    """Timestep embedding and the modulation vectors that are made of it, once per run."""
    dim = net.inner_dim
    return 2 * (net.timestep_guidance_channels * dim + dim * dim + vectors * dim * dim)
