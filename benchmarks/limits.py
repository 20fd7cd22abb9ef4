"""What bounds an edit: its transformer's operations, and the machine's speed at matrix products."""

import time

from klein_kv.artifacts.config import TransformerConfig

__all__ = ["edit_operations", "matrix_speed"]


def edit_operations(
    net: TransformerConfig, kind: str, *, steps: int, image: int, text: int, references: int
) -> int:
    """Operations of all steps of one edit, two for each multiply-add.

    Counted are the matrix products and attention that the result needs, in the blocks and in the
    embeddings around them. Norms, RoPE, activations and the timestep's vectors are left out: less
    than a thousandth. diffusers computes up to 4 % more, for rows of the last block that nobody
    reads; that counts against its speed.

    Args:
        net: the network's shape.
        kind: "repeated" where keys and values of the references are known, "diffusers_plain" where
            references take part in every step, anything else where the first step encodes them.
        steps: denoising steps.
        image: tokens of the output.
        text: tokens of the prompt.
        references: tokens of all references.
    """
    dim = net.inner_dim
    row = 2 * (4 * dim * dim + 3 * dim * net.mlp_hidden_dim)  # linear layers of a block, one token

    def blocks(queries: int, keys: int, read: int) -> int:
        """The last block gives everyone's keys and values, and otherwise only the rows read."""
        one = row + 4 * keys * dim
        return net.num_blocks * queries * one - (queries - read) * (one - 4 * dim * dim)

    def embedded(tokens: int) -> int:
        return 2 * dim * tokens * net.in_channels

    around = 2 * dim * (text * net.joint_attention_dim + image * net.out_channels)
    keys = image + text + references
    if kind == "diffusers_plain":
        return steps * (blocks(keys, keys, image) + embedded(image + references) + around)
    edit = steps * (blocks(image + text, keys, image) + embedded(image) + around)
    if kind == "repeated":
        return edit
    return edit + blocks(references, references, 0) + embedded(references)


def matrix_speed(device: str, threads: int) -> dict[str, float]:
    """Operations per second of large matrix products in torch by type, the better of two runs.

    Args:
        device: "cpu" or a GPU of torch's.
        threads: on a CPU.
    """
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
