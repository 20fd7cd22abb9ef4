"""What makes room for what."""

from types import SimpleNamespace

import pytest

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.kept import Kept


def test_what_is_kept_makes_room_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("klein_kv.runtime.serving.kept.time", clock)
    kept: Kept[str] = Kept(100, 5, 0.5)

    def put(key: str, owner: str = "a", nbytes: int = 20, ttl_s: float = 60) -> None:
        kept.put(key, key, nbytes, owner=owner, ttl_s=ttl_s)

    def held() -> str:
        return "".join(key for key in "abcdefgh" if kept.get(key))

    put("a")
    put("b")
    assert (held(), kept.nbytes) == ("ab", 40)
    assert kept.get("a")
    put("c")  # an owner's third is more than half of five: the one that was not used goes
    assert held() == "ac"
    put("d", "b")
    put("e", "c", ttl_s=10)
    put("f", "d", 40)  # of all: the oldest goes
    assert (held(), kept.nbytes) == ("cdef", 100)
    now = 10
    assert held() == "cdf"
    put("g", "e")  # and what is over goes before that
    assert (held(), kept.nbytes) == ("cdfg", 100)
    put("g", "e")  # again: in its own place
    assert (held(), kept.nbytes) == ("cdfg", 100)
    now = 70
    put("h")
    assert (held(), kept.nbytes) == ("h", 20)
    with pytest.raises(ServiceError) as caught:
        put("i", nbytes=51)
    assert caught.value.code == "payload_too_large"
