"""Sets keep their replica, whatever happens to the others."""

from collections import Counter

from klein_kv.runtime.serving.replicas.engine import ranked

NAMES = [f"replica-{i}" for i in range(8)]
KEYS = [f"{i:064x}" for i in range(4000)]


def test_sets_are_spread_evenly_over_replicas() -> None:
    share = Counter(ranked(key, NAMES)[0] for key in KEYS)
    assert set(share) == set(NAMES)
    assert max(share.values()) < 1.2 * len(KEYS) / len(NAMES)


def test_a_lost_replica_moves_its_own_sets_only_and_spreads_them() -> None:
    left = [name for name in NAMES if name != "replica-3"]
    moved = Counter()
    for key in KEYS:
        before, after = ranked(key, NAMES), ranked(key, left)
        assert after == [name for name in before if name != "replica-3"]
        if before[0] == "replica-3":
            moved[after[0]] += 1
    assert set(moved) == set(left)
    assert max(moved.values()) < 1.5 * sum(moved.values()) / len(left)


def test_the_order_does_not_depend_on_the_process_or_on_how_names_are_listed() -> None:
    # What two fronts, or one before and after a restart, must agree on.
    assert ranked("a", NAMES) == ranked("a", NAMES[::-1])
    assert ranked("a", NAMES[:3]) == ["replica-2", "replica-0", "replica-1"]
