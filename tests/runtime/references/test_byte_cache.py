"""The cache alone: what it holds, in which order it gives up, and who computes when many ask."""

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.references.byte_cache import ByteCache


@dataclass(eq=False)
class Value:
    nbytes: int
    name: str = ""


@dataclass
class Shelf:
    """A second level without a limit."""

    kept: dict[str, Value] = field(default_factory=dict)

    def load(self, key: str) -> Value | None:
        return self.kept.get(key)

    def store(self, key: str, value: Value) -> None:
        self.kept[key] = Value(value.nbytes, value.name)  # a copy, as a file is


def get(cache: ByteCache[Value], key: str, nbytes: int = 10) -> Value:
    with cache.claim(key) as claim:
        return claim.value or claim.publish(Value(nbytes, key))


def held(cache: ByteCache[Value]) -> list[str]:
    return list(cache._state.entries)


def test_least_recently_used_goes_first() -> None:
    cache: ByteCache[Value] = ByteCache(30)
    for key in "abcad":
        get(cache, key)
    assert held(cache) == ["c", "a", "d"]
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.evictions) == (1, 4, 1)
    assert (stats.entries, stats.bytes, stats.budget) == (3, 30, 30)


def test_one_large_value_displaces_several() -> None:
    cache: ByteCache[Value] = ByteCache(30)
    for key in "abc":
        get(cache, key)
    get(cache, "d", 25)
    assert held(cache) == ["d"]


def test_value_above_the_budget_displaces_nothing() -> None:
    cache: ByteCache[Value] = ByteCache(30)
    get(cache, "a")
    get(cache, "b", 31)
    assert held(cache) == ["a"]


def test_evicted_value_in_use_is_found_again() -> None:
    cache: ByteCache[Value] = ByteCache(10)
    first = get(cache, "a")
    get(cache, "b")
    assert held(cache) == ["b"]
    assert "a" in cache
    assert get(cache, "a") is first
    assert held(cache) == ["a"]
    get(cache, "b")
    del first
    gc.collect()
    assert "a" not in cache


def test_pinned_values_stay() -> None:
    cache: ByteCache[Value] = ByteCache(30)
    get(cache, "a")
    cache.pin("a")
    for key in "bcdef":
        get(cache, key)
    assert held(cache) == ["a", "e", "f"]
    assert cache.stats.pinned_bytes == 10
    get(cache, "large", 25)  # does not fit beside what is pinned
    assert held(cache) == ["a", "e", "f"]
    cache.unpin("a")
    get(cache, "g")
    assert held(cache) == ["e", "f", "g"]


def test_pin_takes_an_evicted_value_back_and_refuses_what_does_not_fit() -> None:
    cache: ByteCache[Value] = ByteCache(30)
    values = [get(cache, key, 20) for key in "ab"]
    cache.pin("a")
    assert held(cache) == ["a"]
    with pytest.raises(CapacityError, match="cannot be pinned"):
        cache.pin("b")
    with pytest.raises(RequestError, match="not in the cache"):
        cache.pin("c")
    cache.pin("a")
    assert cache.stats.pinned_bytes == values[0].nbytes


def test_budget_of_zero_keeps_nothing() -> None:
    cache: ByteCache[Value] = ByteCache(0, Shelf())
    first = get(cache, "a")
    assert get(cache, "a") is not first
    assert cache.stats.entries == 0
    with pytest.raises(RequestError, match="-1 bytes, expected 0 or more"):
        ByteCache(-1)


def test_free_and_clear() -> None:
    cache: ByteCache[Value] = ByteCache(50)
    for key in "abcde":
        get(cache, key)
    cache.pin("b")
    assert cache.free(15, keep="a") == 20
    assert held(cache) == ["a", "e", "b"]
    assert cache.free(1000) == 20
    assert held(cache) == ["b"]
    cache.clear()
    assert cache.stats.bytes == cache.stats.entries == cache.stats.pinned_bytes == 0


def test_second_level() -> None:
    shelf = Shelf()
    cache: ByteCache[Value] = ByteCache(10, shelf)
    for key in "abca":
        get(cache, key)
    assert set(shelf.kept) == {"a", "b", "c"}
    assert get(cache, "a") is not shelf.kept["a"] or held(cache) == ["a"]
    stats = cache.stats
    assert (stats.misses, stats.restored, stats.entries) == (3, 1, 1)
    get(cache, "large", 11)
    assert "large" in shelf.kept


def test_abandoned_claim_is_open_again() -> None:
    cache: ByteCache[Value] = ByteCache(10)
    with pytest.raises(ValueError, match="no luck"), cache.claim("a"):
        raise ValueError("no luck")
    with cache.claim("a") as claim:
        assert claim.value is None
    assert get(cache, "a").name == "a"


def run_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not errors


def test_threads_that_ask_for_the_same_compute_once() -> None:
    cache: ByteCache[Value] = ByteCache(100)
    barrier, made, got = threading.Barrier(8), [], []

    def work(_i: int) -> None:
        barrier.wait()
        with cache.claim("a") as claim:
            if claim.value is None:
                made.append(claim.publish(Value(10)))
            got.append(claim.value)

    run_threads(8, work)
    assert len(made) == 1
    assert all(value is made[0] for value in got)
    assert cache.stats.hits == 7


def test_another_thread_takes_over_when_one_fails() -> None:
    cache: ByteCache[Value] = ByteCache(100)
    barrier, tries = threading.Barrier(4), []

    def fail() -> None:
        raise ValueError("the first one fails")

    def work(i: int) -> None:
        barrier.wait()
        try:
            with cache.claim("a") as claim:
                if claim.value is None:
                    tries.append(i)
                    if len(tries) == 1:
                        fail()
                    claim.publish(Value(10))
        except ValueError:
            assert tries[0] == i

    run_threads(4, work)
    assert len(tries) == 2


def test_waiting_ends_with_publication_not_with_the_claim() -> None:
    cache: ByteCache[Value] = ByteCache(100)
    with cache.claim("a") as claim:
        claim.publish(Value(10))
        run_threads(1, lambda _i: None if get(cache, "a") is claim.value else pytest.fail("two"))
        assert get(cache, "a") is claim.value


def test_many_threads_many_keys() -> None:
    cache: ByteCache[Value] = ByteCache(35, Shelf())

    def work(i: int) -> None:
        for j in range(300):
            key = str((i * 7 + j * j) % 11)
            assert get(cache, key).name == key
            assert cache.stats.bytes <= 35

    run_threads(6, work)


@given(
    st.integers(1, 40),
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from(["get", "hold", "pin", "unpin"]))
    ),
)
def test_budget_holds_whatever_is_asked(budget: int, calls: list[tuple[str, str]]) -> None:
    sizes = dict(zip("abcdef", (1, 5, 10, 20, 30, 41), strict=True))
    cache: ByteCache[Value] = ByteCache(budget)
    in_use = []
    for key, what in calls:
        value = get(cache, key, sizes[key])
        assert value.name == key
        if what == "hold":
            in_use.append(value)
        elif what == "pin":
            try:
                cache.pin(key)
            except CapacityError:
                assert cache.stats.pinned_bytes + sizes[key] > budget
        elif what == "unpin":
            cache.unpin(key)
        stats = cache.stats
        assert stats.bytes == sum(sizes[x] for x in held(cache)) <= budget
        assert stats.pinned_bytes <= stats.bytes
    alive = {id(value) for value in in_use}
    assert all(id(get(cache, value.name, value.nbytes)) in alive for value in in_use)
