"""Host memory: how much is free, and what caches may take of it."""

from collections.abc import Mapping
from pathlib import Path

import psutil

__all__ = ["available_memory", "default_prompt_bytes", "reference_budget"]

_CGROUP = Path("/sys/fs/cgroup")
_FILE_PAGES = ("active_file", "inactive_file")


def available_memory() -> int:
    """Bytes that this process can still take: what the system has left, or its control group."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        if limit == "max":
            return available
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
        # Pages of files count as used, mapped weights among them, but give way when asked.
        lines = (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        used -= sum(int(line.split()[1]) for line in lines if line.split()[0] in _FILE_PAGES)
        return min(available, max(int(limit) - used, 0))
    except (OSError, ValueError):
        return available


def reference_budget(
    available: int, weights: Mapping[str, int], besides: int, flagship: int
) -> int:
    """Default budget of the reference store: on a device, all that nothing else needs.

    Where keys and values of four 1024x1024 references (`flagship`) do not fit beside all weights,
    the text encoder and the others take turns: weights come back from files sooner than keys and
    values are computed again. `besides` is what else the largest request takes.
    """
    together, text = sum(weights.values()), weights.get("text_encoder", 0)
    if not together:  # a host, where mapped weights and other programs want memory too
        return available // 4
    room = available - besides - together
    if room < flagship:
        room = available - besides - max(text, together - text)
    return max(0, room)


def default_prompt_bytes() -> int:
    """Budget of the prompt cache: 256 MiB (ten prompts of klein 9B in float32), if that is free."""
    return min(256 << 20, available_memory() // 16)
