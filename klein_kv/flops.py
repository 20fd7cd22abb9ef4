"""How much arithmetic each graph is: what a speed-up can be at most.

Counted are matrix products, attention and convolutions, two operations per multiply-add, as
`klein_kv.networks` writes them; norms, RoPE and activations are left out.
The VAE's count is in `klein_kv.networks.vae_layers`.
"""

from dataclasses import dataclass

from klein_kv.artifacts.config import TextEncoderConfig, TransformerConfig

__all__ = [
    "Operations",
    "block_weights",
    "diffusers_kv_edit_flops",
    "edit_flops",
    "plain_edit_flops",
    "reference_flops",
    "reference_operations",
    "step_flops",
    "step_operations",
    "text_block_weights",
    "text_operations",
]


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations by what sets their rate.

    Attributes:
        linears: linear layers of the blocks: what fp8 and nvfp4 make faster.
        attention: products with keys and values.
        other: everything else, which keeps the graph's own type.
    """

    linears: int = 0
    attention: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return self.linears + self.attention + self.other

    def __add__(self, more: "Operations") -> "Operations":
        return Operations(
            self.linears + more.linears,
            self.attention + more.attention,
            self.other + more.other,
        )


def reference_flops(net: TransformerConfig, ref_tokens: int) -> int:
    """All of `reference_operations`."""
    return reference_operations(net, ref_tokens).total


def step_flops(
    net: TransformerConfig, *, batch: int, image_tokens: int, text_tokens: int, ref_tokens: int
) -> int:
    """All of `step_operations`."""
    return step_operations(
        net,
        batch=batch,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        ref_tokens=ref_tokens,
    ).total


def reference_operations(net: TransformerConfig, ref_tokens: int) -> Operations:
    """Operations of `encode_references`.

    Args:
        net: the network's shape.
        ref_tokens: R. Nothing after the last block's keys and values is computed.
    """
    dim, rows = net.inner_dim, net.num_blocks * ref_tokens
    unread = _unread(net, ref_tokens, ref_tokens)
    return Operations(
        linears=rows * _block_row(net) - unread.linears,
        attention=rows * 4 * ref_tokens * dim - unread.attention,
        other=ref_tokens * 2 * net.in_channels * dim + _time(net, 9),
    )


def step_operations(
    net: TransformerConfig,
    *,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    ref_tokens: int,
    plain: bool = False,
) -> Operations:
    """Operations of `cached_step`; `first_step` is this and `reference_operations`.

    Args:
        net: the network's shape.
        batch: images made at once.
        image_tokens: S.
        text_tokens: T.
        ref_tokens: R. Nothing but the image's tokens leaves the last block.
        plain: operations of `plain_step`, in which references are tokens like the image's.
    """
    dim = net.inner_dim
    tokens = image_tokens + (ref_tokens if plain else 0)
    queries, keys = tokens + text_tokens, image_tokens + text_tokens + ref_tokens
    unread = _unread(net, queries - image_tokens, keys)
    embed = tokens * 2 * net.in_channels * dim + text_tokens * 2 * net.joint_attention_dim * dim
    output = image_tokens * 2 * dim * net.out_channels
    rows = net.num_blocks * queries
    return Operations(
        linears=batch * (rows * _block_row(net) - unread.linears),
        attention=batch * (rows * 4 * keys * dim - unread.attention),
        other=batch * (embed + output) + _time(net, 17),
    )


def text_operations(config: TextEncoderConfig, *, batch: int, text_tokens: int) -> Operations:
    """Operations of `text_encoder`, up to its last tapped block.

    Attention is counted whole: a kernel that skips what the causal mask hides does half of it.

    Args:
        config: the encoder's shape.
        batch: prompts.
        text_tokens: T.
    """
    width = config.num_attention_heads * config.head_dim
    return Operations(
        linears=2 * batch * text_tokens * text_block_weights(config),
        attention=4 * batch * config.num_exported_layers * text_tokens**2 * width,
    )


def block_weights(net: TransformerConfig) -> int:
    """Weights of the linear layers of all blocks; a double block has one set for each stream."""
    return (2 * net.num_layers + net.num_single_layers) * _block_row(net) // 2


def text_block_weights(config: TextEncoderConfig) -> int:
    """Weights of the linear layers of the text encoder's exported blocks."""
    width = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    one = config.hidden_size * (2 * width + 2 * kv + 3 * config.intermediate_size)
    return config.num_exported_layers * one


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
    are ever read; so do text tokens in every step.
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
    text = _unread(net, text_tokens, image_tokens + text_tokens + ref_tokens)
    encode = 0
    if ref_tokens:
        references = _unread(net, ref_tokens, ref_tokens)
        encode = reference_flops(net, ref_tokens) + references.total
    return edit + batch * (steps * text.total + encode)


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

    Source: diffusers, `Flux2KleinPipeline.__call__`, in which all tokens leave the last block.
    """
    tokens = image_tokens + ref_tokens
    step = step_flops(net, batch=batch, image_tokens=tokens, text_tokens=text_tokens, ref_tokens=0)
    text = _unread(net, text_tokens, tokens + text_tokens)
    return steps * (step + batch * text.total)


def _unread(net: TransformerConfig, tokens: int, keys: int) -> Operations:
    """What the last block would compute for tokens of which only keys and values are read.

    Args:
        net: the network's shape.
        tokens: how many.
        keys: that their queries would see.
    """
    dim = net.inner_dim
    return Operations(
        linears=tokens * (_block_row(net) - 4 * dim * dim), attention=tokens * 4 * keys * dim
    )


def _block_row(net: TransformerConfig) -> int:
    """Linear layers of one block for one token: the same count in double and single blocks."""
    dim, mlp = net.inner_dim, net.mlp_hidden_dim
    return 2 * (4 * dim * dim + 3 * mlp * dim)


def _time(net: TransformerConfig, vectors: int) -> int:
    """Timestep embedding and the modulation vectors that are made of it, once per run."""
    dim = net.inner_dim
    return 2 * (net.timestep_guidance_channels * dim + dim * dim + vectors * dim * dim)
