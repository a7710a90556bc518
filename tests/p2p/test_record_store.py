from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from petalnet.errors import BusyError, RecordRejected
from petalnet.p2p.record_store import MAX_KEYS, Kept, RecordStore

KEYS = [bytes([n]) * 32 for n in range(4)]


def kept(peer: str, sequence: int, *keys: bytes, expires: float = 100.0) -> Kept:
    return Kept(f"{peer}/{sequence}".encode(), peer, sequence, expires, frozenset(keys))


def found(store: RecordStore, key: bytes, now: float = 0.0) -> set[bytes]:
    return {entry.data for entry in store.find(key, now=now)}


def test_many_records_a_key_and_one_a_peer() -> None:
    store = RecordStore()
    assert store.add(kept("a", 1, KEYS[0], KEYS[1]), now=0)
    assert store.add(kept("b", 1, KEYS[0]), now=0)
    assert found(store, KEYS[0]) == {b"a/1", b"b/1"}
    assert store.add(kept("a", 2, KEYS[0]), now=0)
    assert found(store, KEYS[0]) == {b"a/2", b"b/1"}
    assert found(store, KEYS[1]) == set()  # the newer record is not kept there
    assert not store.add(kept("a", 1, KEYS[1]), now=0)
    assert found(store, KEYS[1]) == set()
    assert not store.add(kept("a", 2, KEYS[1]), now=0)  # the same record under one more key
    assert found(store, KEYS[1]) == {b"a/2"} and found(store, KEYS[0]) == {b"a/2", b"b/1"}


def test_expired_records_are_neither_given_nor_in_the_way() -> None:
    store = RecordStore()
    store.add(kept("a", 9, KEYS[0], expires=10), now=0)
    assert found(store, KEYS[0], now=9) == {b"a/9"} and found(store, KEYS[0], now=10) == set()
    assert store.add(kept("a", 1, KEYS[0]), now=11) is False  # not news by its number, but kept: the clock was set back
    assert found(store, KEYS[0], now=11) == {b"a/1"}
    store.add(kept("b", 1, KEYS[0], expires=12), now=11)
    store.expire(12)
    assert len(store) == 1


def test_the_store_is_bounded() -> None:
    store = RecordStore(max_peers=2)
    store.add(kept("a", 1, KEYS[0], expires=5), now=0)
    store.add(kept("b", 1, KEYS[0]), now=0)
    with pytest.raises(BusyError):
        store.add(kept("c", 1, KEYS[0]), now=0)
    store.add(kept("a", 2, KEYS[0], expires=5), now=0)  # one that is known may renew
    store.add(kept("c", 1, KEYS[0]), now=6)  # a has expired
    assert found(store, KEYS[0], now=6) == {b"b/1", b"c/1"}
    with pytest.raises(RecordRejected, match="keys"):
        store.add(kept("b", 2, *(bytes([n]) * 32 for n in range(MAX_KEYS + 1))), now=6)


class Against(RuleBasedStateMachine):
    """The store against the plain statement of what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.model, self.now = RecordStore(max_peers=3), {}, 0.0

    @rule(peer=st.sampled_from("abcd"), sequence=st.integers(1, 5), keys=st.sets(st.sampled_from(KEYS), min_size=1), life=st.integers(1, 4))
    def add(self, peer: str, sequence: int, keys: set[bytes], life: int) -> None:
        record = kept(peer, sequence, *keys, expires=self.now + life)
        before = self.model.get(peer)
        if before is None and sum(entry.expires > self.now for entry in self.model.values()) >= 3:
            with pytest.raises(BusyError):
                self.store.add(record, now=self.now)
            self.model = {name: entry for name, entry in self.model.items() if entry.expires > self.now}
            return
        if before is None and len(self.model) >= 3:
            self.model = {name: entry for name, entry in self.model.items() if entry.expires > self.now}
        self.store.add(record, now=self.now)
        if before is None or before.sequence < sequence or (before.expires <= self.now and before.sequence != sequence):
            self.model[peer] = record
        elif before.sequence == sequence:
            self.model[peer] = Kept(before.data, peer, sequence, before.expires, before.keys | record.keys)

    @rule(peer=st.sampled_from("abcd"))
    def remove(self, peer: str) -> None:
        self.store.remove(peer)
        self.model.pop(peer, None)

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def agrees(self) -> None:
        for key in KEYS:
            expected = {entry.data for entry in self.model.values() if key in entry.keys and entry.expires > self.now}
            assert found(self.store, key, self.now) == expected
        assert len(self.store) == len(self.model) <= 3


test_the_store_does_what_it_says = Against.TestCase


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_newest_wins_in_any_order(arrivals: list[tuple[str, int]]) -> None:
    store = RecordStore()
    for peer, sequence in arrivals:
        store.add(kept(peer, sequence, KEYS[0]), now=0)
    newest = {peer: max(sequence for name, sequence in arrivals if name == peer) for peer, _ in arrivals}
    assert found(store, KEYS[0]) == {f"{peer}/{sequence}".encode() for peer, sequence in newest.items()}
