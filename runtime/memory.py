"""Host memory: how much is free, and what caches may take of it."""

from collections.abc import Mapping
from pathlib import Path

import psutil

__all__ = ["available_memory", "default_cache_bytes", "default_prompt_bytes"]

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


def default_cache_bytes(available: int, weights: Mapping[str, int]) -> int:
    """Budget of the reference store: a quarter of the memory that weights leave free.

    Where they do not all fit beside each other, the text encoder is not there at the same time as
    the others.

    Args:
        available: bytes that the backend can take when it is opened, before anything is loaded.
        weights: bytes of each component's weights in that memory; mapped files take none.
    """
    together, text = sum(weights.values()), weights.get("text_encoder", 0)
    held = together if together <= available else max(text, together - text)
    return max(0, available - held) // 4


def default_prompt_bytes() -> int:
    """Budget of the prompt cache: 256 MiB (ten prompts of klein 9B in float32), if that is free."""
    return min(256 << 20, available_memory() // 16)
