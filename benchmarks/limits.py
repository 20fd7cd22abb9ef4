"""What bounds an edit: its transformer's operations, and the machine's speed at matrix products."""

import time

from klein_kv.artifacts.config import TransformerConfig


def edit_operations(
    net: TransformerConfig, kind: str, *, steps: int, image: int, text: int, references: int
) -> int:
    """Operations of all steps of one edit, two for each multiply-add.

    Counted are the matrix products and attention that the result needs, in the blocks and in the
    embeddings around them. Norms, RoPE, activations and the timestep's vectors are left out: less
    than a thousandth. diffusers also computes rows of the last block that nobody reads (1.6 % at
    klein 9B's size, 3.8 % at "small"), which counts against its speed here.

    Args:
        net: the network's shape.
        kind: "repeated" where the references' keys and values are known, "diffusers_plain" where
            references take part in every step, else the first step encodes them.
        steps, image, text, references: how many steps, and tokens of each sort.
    """
    dim = net.inner_dim
    row = 2 * (4 * dim * dim + 3 * dim * net.mlp_hidden_dim)  # linear layers of a block, one token

    def blocks(queries: int, keys: int, read: int) -> int:
        """The last block gives everyone's keys and values, and otherwise only the rows read."""
        one = row + 4 * keys * dim
        return net.num_blocks * queries * one - (queries - read) * (one - 4 * dim * dim)

    tokens = image + text + references
    encoding = 2 * dim * references * net.in_channels
    embedding = 2 * dim * (image * (net.in_channels + net.out_channels))
    embedding += 2 * dim * text * net.joint_attention_dim
    if kind == "diffusers_plain":
        return steps * (blocks(tokens, tokens, image) + embedding + encoding)
    edit = steps * (blocks(image + text, tokens, image) + embedding)
    return edit if kind == "repeated" else edit + blocks(references, references, 0) + encoding


def matrix_speed(device: str, threads: int) -> dict[str, float]:
    """Operations per second of large matrix products in torch by type, the better of two runs."""
    import torch

    torch.set_num_threads(threads)
    side = 2048 if device == "cpu" else 8192
    speed = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)[0, 0].item()  # which waits for the device
            seconds.append(time.perf_counter() - start)
        speed[str(dtype).removeprefix("torch.")] = 2 * side**3 / min(seconds[1:])
    return speed
