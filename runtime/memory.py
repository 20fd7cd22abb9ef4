"""Whether a request fits into memory, asked before any work is done."""

from collections.abc import Callable
from pathlib import Path

import psutil

from klein_kv.config import ITEM_SIZE, ModelConfig
from klein_kv.errors import CapacityError

__all__ = [
    "available_memory",
    "check_request_memory",
    "default_cache_bytes",
    "default_prompt_bytes",
    "request_bytes",
]

_CGROUP = Path("/sys/fs/cgroup")
_FILE_PAGES = ("active_file", "inactive_file")


def available_memory() -> int:
    """Bytes that this process can still take: what the system has left, or its control group."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return available
        used = int((_CGROUP / "memory.current").read_text())
        # Pages of files count as used, mapped weights among them, but give way when asked.
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        used -= sum(int(line.split()[1]) for line in lines if line.split()[0] in _FILE_PAGES)
        return min(available, max(int(limit) - used, 0))
    except (OSError, ValueError):
        return available


def default_cache_bytes(backend: str) -> int:
    """Budget of the reference store: a quarter of the memory that is free when it is opened.

    Args:
        backend: its name. Only where keys and values live in host memory is what is free known
            here; a device's store is off until it is given a budget.
    """
    return available_memory() // 4 if backend == "onnxruntime" else 0


def default_prompt_bytes() -> int:
    """Budget of the prompt cache: 256 MiB (ten prompts of klein 9B in float32), if that is free."""
    return min(256 << 20, available_memory() // 16)


def request_bytes(
    config: ModelConfig,
    dtype: str,
    *,
    batch: int,
    image_tokens: int,
    ref_tokens: int,
    text_tokens: int,
    kv_dtype: str | None = None,
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
        kv_dtype: type of keys and values; None for `dtype`.
    """
    net, item = config.transformer, ITEM_SIZE[dtype]
    rows = batch * (image_tokens + text_tokens)
    keys = 2 * batch * ref_tokens * net.inner_dim
    denoise = rows * (6 * net.inner_dim + 3 * net.mlp_hidden_dim) + keys
    encode = ref_tokens * (6 * net.inner_dim + 3 * net.mlp_hidden_dim)
    return {
        "reference K/V": net.kv_bytes(ref_tokens, kv_dtype or dtype),
        "activations": max(denoise, encode) * item,
    }


def check_request_memory(
    parts: dict[str, int], ref_tokens: int, free: Callable[[int], int] | None = None
) -> None:
    """Refuses a request that cannot fit.

    Args:
        parts: bytes by what they are for.
        ref_tokens: R of the request, for the advice in the message.
        free: asked for the bytes that are missing, before refusing; returns how many it gave up.

    Raises:
        CapacityError: with the numbers, and what would help.
    """
    needed, available = sum(parts.values()), available_memory()
    if needed > available and free is not None:
        available += free(needed - available)
    if needed <= available:
        return
    listed = ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in parts.items())
    mend = "fewer or smaller references, or a smaller output" if ref_tokens else "a smaller output"
    raise CapacityError(
        f"the request needs at least {needed / 1e9:.1f} GB ({listed}), {available / 1e9:.1f} GB of "
        f"memory are free; use {mend}"
    )
