"""Which replica has the keys and values: rendezvous hashing over names that never change."""

import hashlib
from collections.abc import Sequence

__all__ = ["ranked"]


def ranked(key: str, names: Sequence[str]) -> list[str]:
    """Names in the order in which they are to be asked for a key, its home first.

    Each key has an order of its own: a name that is missing hands its keys on to all others alike,
    and nothing else moves. Source: Thaler and Ravishankar, "A Name-Based Mapping Scheme for
    Rendezvous" (1996).
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{name}\n{key}".encode()).digest())
