"""The cache alone: what it holds, and in which order it gives up."""

import gc
from dataclasses import dataclass

from klein_kv.runtime.references.byte_cache import ByteCache


@dataclass(eq=False)
class Value:
    nbytes: int
    name: str = ""


def get(cache: ByteCache[Value], key: str, nbytes: int = 10) -> Value:
    value = cache.get(key)
    if value is None:
        value = Value(nbytes, key)
        cache.put(key, value)
    return value


def held(cache: ByteCache[Value], keys: str = "abcd") -> str:
    gc.collect()
    return "".join(key for key in keys if key in cache)


def test_least_recently_used_goes_first() -> None:
    cache: ByteCache[Value] = ByteCache(30, "a value")
    for key in "abcad":
        get(cache, key)
    assert held(cache) == "acd"
    assert (cache.hits, cache.misses, cache.evictions) == (1, 4, 1)
    assert (len(cache), cache.nbytes) == (3, 30)
    get(cache, "b", 25)  # displaces several
    assert held(cache) == "b"


def test_evicted_value_in_use_is_found_again() -> None:
    cache: ByteCache[Value] = ByteCache(10, "a value")
    first = get(cache, "a")
    get(cache, "b")
    assert "a" in cache
    assert get(cache, "a") is first
    get(cache, "b")
    del first
    assert held(cache) == "b"


def test_what_is_given_up_is_handed_on() -> None:
    handed: list[str] = []

    class Watched(ByteCache[Value]):
        def _give_up(self, key: str, value: Value) -> None:
            handed.append(key)

    cache = Watched(20, "a value")
    for key in "abc":
        get(cache, key)
    get(cache, "d", 21)  # larger than the budget: it displaces nothing
    assert handed == ["a", "d"]
    assert held(cache) == "bc"
    assert cache.free(1, keep="b") == 10
    assert handed == ["a", "d", "c"]
    assert cache.free(100) == 10
    get(cache, "a")
    cache.clear()
    assert (handed, held(cache)) == (["a", "d", "c", "b"], "")


def test_no_budget_keeps_nothing() -> None:
    cache: ByteCache[Value] = ByteCache(0, "a value")
    value = get(cache, "a")
    assert cache.get("a") is None
    assert value.nbytes == 10, "though it is alive"
