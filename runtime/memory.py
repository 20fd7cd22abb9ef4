"""Whether a request fits into memory, asked before any work is done."""

from pathlib import Path

import psutil

from klein_kv.config import ITEM_SIZE, ModelConfig
from klein_kv.errors import CapacityError

__all__ = ["available_memory", "check_request_memory", "request_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this process can still take: what the system has left, or its control group."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text().strip()
        if limit != "max":
            return min(available, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return available


def request_bytes(
    config: ModelConfig,
    dtype: str,
    *,
    batch: int,
    image_tokens: int,
    ref_tokens: int,
    text_tokens: int,
) -> dict[str, int]:
    """Bytes that a request needs at its peak, by part.

    Keys and values are exact. Activations are what one block holds at once: the residual stream,
    its norm, q, k, v with the references in front, and both halves of the SwiGLU; a lower bound.

    Args:
        config: the checkpoint's configuration.
        dtype: type of the graphs.
        batch: images made at once.
        image_tokens: S.
        ref_tokens: R.
        text_tokens: T.
    """
    net, item = config.transformer, ITEM_SIZE[dtype]
    rows = batch * (image_tokens + text_tokens)
    keys = 2 * batch * ref_tokens * net.inner_dim
    denoise = rows * (6 * net.inner_dim + 3 * net.mlp_hidden_dim) + keys
    encode = ref_tokens * (6 * net.inner_dim + 3 * net.mlp_hidden_dim)
    return {
        "reference K/V": net.kv_bytes(ref_tokens, dtype),
        "activations": max(denoise, encode) * item,
    }


def check_request_memory(parts: dict[str, int], ref_tokens: int) -> None:
    """Refuses a request that cannot fit.

    Raises:
        CapacityError: with the numbers, and what would help.
    """
    needed, available = sum(parts.values()), available_memory()
    if needed <= available:
        return
    listed = ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in parts.items())
    mend = "fewer or smaller references, or a smaller output" if ref_tokens else "a smaller output"
    raise CapacityError(
        f"the request needs at least {needed / 1e9:.1f} GB ({listed}), {available / 1e9:.1f} GB of "
        f"memory are free; use {mend}"
    )
