"""Damage to people's files, and what klein-kv may answer to it: it works, or one clear error."""

import contextlib
import copy
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from klein_kv.errors import KleinKVError

__all__ = ["damaged_bytes", "damaged_json", "damaged_safetensors", "works_or_one_clear_error"]

_DEEP = "@deep@"  # stands for nesting that json.dumps itself cannot write
_HUGE: Any = [2**31, 2**63, 10**30, 10**400, 1e308, float("inf"), float("nan")]
_ODD_VALUES: Any = [
    *(None, True, False, 0, -1, 1, 2, 7, 0.5, -0.0, 1e-320, *_HUGE, -(2**63), -float("inf")),
    *("", "x", "0", "float32", "\0", "../../x", "/etc/hostname", "\ud800", "\x1b[31m\n"),
    "y" * 9999,
    *([], [[]], [0], [-1, 1], [1.5, "x"], {}, {"": None}, {"x": [1]}, _DEEP),
]
_ODD = st.sampled_from(_ODD_VALUES).map(copy.deepcopy)


@contextlib.contextmanager
def works_or_one_clear_error(seconds: float = 5.0, gigabytes: float = 3.0) -> Iterator[None]:
    """Nothing but a `KleinKVError`, short and without control codes; `seconds` are of a CPU."""
    start = time.process_time()
    with _memory_limit(gigabytes):
        try:
            yield
        except KleinKVError as error:
            text = str(error)
            assert 10 < len(text) < 4000, len(text)
            assert all(x.isprintable() or x == "\n" for x in text), repr(text)
    assert time.process_time() - start < seconds


@contextlib.contextmanager
def _memory_limit(gigabytes: float) -> Iterator[None]:
    """Has what takes more address space raise a MemoryError, which is a failure."""
    if sys.platform != "linux":
        yield
        return
    import resource
    from pathlib import Path

    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def damaged_bytes(data: st.DataObject, content: bytes, *ends: int) -> bytes:
    """The content with bits and bytes changed, gone or there twice, mostly before one of `ends`."""
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        end = min(data.draw(st.sampled_from([*ends, len(damaged)])), len(damaged))
        place = data.draw(st.integers(0, end))
        kind = data.draw(st.sampled_from(["splice", "splice", "bit", "cut", "twice"]))
        if kind == "cut":
            del damaged[place:]
        elif kind == "twice":
            damaged[place:place] = damaged[place : place + data.draw(st.integers(1, 40))]
        elif kind == "bit" and place < len(damaged):
            damaged[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            new = data.draw(st.binary(max_size=4) | st.text('{}[]",:.0-9eNa\\', max_size=6))
            new = new.encode() if isinstance(new, str) else new
            damaged[place : place + data.draw(st.integers(0, 4))] = new
    return bytes(damaged)


def damaged_json(data: st.DataObject, value: Any) -> bytes:
    """JSON of the value with one to three of its nodes replaced, removed, swapped or doubled."""
    root = [copy.deepcopy(value)]
    twice = ""
    for _ in range(data.draw(st.integers(1, 3))):
        parent, key = _node(data, root)
        kind = data.draw(
            st.sampled_from(["odd", "odd", "number", "remove", "swap", "add", "twice"])
        )
        if kind == "remove" and parent is not root:
            del parent[key]
        elif kind == "swap":
            other, at = _node(data, root)
            parent[key] = copy.deepcopy(other[at])
        elif kind == "add" and isinstance(parent[key], dict):
            parent[key][data.draw(st.text(max_size=5))] = data.draw(_ODD)
        elif kind == "add" and isinstance(parent[key], list):
            parent[key].append(data.draw(_ODD))
        elif kind == "number" and type(parent[key]) in (int, float):
            number = parent[key]
            near = [number - 1, number + 1, -number, 2 * number, number // 2, str(number)]
            parent[key] = data.draw(st.sampled_from(near))
        elif kind == "twice" and isinstance(parent, dict):
            twice = f"{json.dumps(key)}: {json.dumps(data.draw(_ODD))}, "
        else:
            parent[key] = data.draw(_ODD)
    text = json.dumps(root[0])
    if twice:
        at = text.find(twice.partition(":")[0])
        text = text[:at] + twice + text[at:] if at >= 0 else text
    return text.replace(f'"{_DEEP}"', "[" * 50_000 + "]" * 50_000).encode()


def _node(data: st.DataObject, root: list[Any]) -> tuple[Any, Any]:
    """A node as (what holds it, its key or index): one goes down from the root and stops."""
    parent, key = root, 0
    while True:
        value = parent[key]
        if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 9)) == 0:
            return parent, key
        inner = list(value) if isinstance(value, dict) else range(len(value))
        parent, key = value, data.draw(st.sampled_from(inner))


def damaged_safetensors(data: st.DataObject, content: bytes) -> bytes:
    """A safetensors file with damage to its bytes, its header, or how long both are."""
    length = int.from_bytes(content[:8], "little")
    kind = data.draw(st.sampled_from(["bytes", "header", "header", "header", "length", "data"]))
    if kind == "bytes":
        return damaged_bytes(data, content, 64, 8 + length)
    text, rest = content[8 : 8 + length], content[8 + length :]
    if kind == "header":
        text = damaged_json(data, json.loads(text))
        length = len(text)
    elif kind == "data":
        rest = damaged_bytes(data, rest)
    else:
        length = data.draw(st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + text + rest
