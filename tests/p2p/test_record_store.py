from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from petalnet.p2p.places import key_place, peer_place, shared_bits
from petalnet.p2p.record_store import Kept, RecordStore

KEYS = [bytes([n]) * 32 for n in range(4)]


def kept(peer: str, sequence: int, *keys: bytes, expires: float = 100.0, source: str = "") -> Kept:
    return Kept(f"{peer}/{sequence}".encode(), peer, sequence, 0.0, expires, frozenset(keys), source)


def found(store: RecordStore, key: bytes, now: float = 0.0) -> set[bytes]:
    return {entry.data for entry in store.find(key, now=now)}


def name(number: int, letter: str = "P") -> str:
    return letter + str(number).replace("0", "x")


def test_many_records_a_key_and_one_a_peer() -> None:
    store = RecordStore()
    assert store.add(kept("a", 1, KEYS[0], KEYS[1]), now=0)
    assert store.add(kept("b", 1, KEYS[0]), now=0)
    assert found(store, KEYS[0]) == {b"a/1", b"b/1"} and store.count(KEYS[0]) == 2
    assert store.add(kept("a", 2, KEYS[0]), now=0)
    assert found(store, KEYS[0]) == {b"a/2", b"b/1"}
    assert found(store, KEYS[1]) == set() and store.count(KEYS[1]) == 0  # the newer record is not kept there
    assert not store.add(kept("a", 1, KEYS[1]), now=0)
    assert found(store, KEYS[1]) == set()
    assert not store.add(kept("a", 2, KEYS[1]), now=0)  # the same record under one more key
    assert found(store, KEYS[1]) == {b"a/2"} and found(store, KEYS[0]) == {b"a/2", b"b/1"}
    assert store.newest("a") == 2 and store.newest("c") == 0


def test_expired_records_are_not_given_and_older_ones_not_taken_in_their_place() -> None:
    store = RecordStore()
    store.add(kept("a", 9, KEYS[0], expires=10), now=0)
    assert found(store, KEYS[0], now=9) == {b"a/9"} and found(store, KEYS[0], now=10) == set()
    assert store.get("a", now=9) is not None and store.get("a", now=10) is None
    assert not store.add(kept("a", 8, KEYS[0]), now=11)
    store.expire(12)
    assert len(store) == 0 and not store.add(kept("a", 9, KEYS[0]), now=13)
    assert store.add(kept("a", 10, KEYS[0]), now=13)
    assert not store.add(kept("b", 1, KEYS[0], expires=12), now=13)


def test_a_server_that_is_gone_is_not_named_until_it_stores_again() -> None:
    store = RecordStore("own")
    for peer in ("a", "own"):
        store.add(kept(peer, 1, KEYS[0]), now=0)
        store.mark_lost(peer)
    store.mark_lost("nobody")
    assert found(store, KEYS[0]) == {b"own/1"}
    store.add(kept("a", 1, KEYS[0]), now=0)
    assert found(store, KEYS[0]) == {b"a/1", b"own/1"}
    store.mark_lost("a")
    store.add(kept("a", 2, KEYS[0]), now=0)
    assert found(store, KEYS[0]) == {b"a/2", b"own/1"}


@pytest.mark.parametrize("crowd_first", [True, False])
def test_a_flood_from_one_place_replaces_only_what_came_from_there(crowd_first: bool) -> None:
    store = RecordStore("own", max_peers=300, rng=random.Random(1))
    store.add(kept("own", 1, KEYS[0], source="crowded"), now=0)

    def flood(letter: str) -> None:
        for number in range(2000):
            store.add(kept(name(number, letter), 1, KEYS[0], source="crowded"), now=0)
            assert len(store) <= 300

    if crowd_first:
        flood("S")
    for number in range(100):
        assert store.add(kept(name(number), 1, KEYS[0], source=f"place {number % 20}"), now=0), "a newcomer finds room"
    flood("T")
    assert store.get("own", now=0) is not None
    assert sum(store.get(name(number), now=0) is not None for number in range(100)) == 100
    # Whoever asks gets its share of each place, however many there are of one.
    answer = Counter(entry.source for entry in store.find(KEYS[0], now=0, most=63))
    assert answer == {"crowded": 3} | {f"place {number}": 3 for number in range(20)}


def test_of_a_crowd_those_that_are_long_known_stay() -> None:
    store = RecordStore(max_peers=100, rng=random.Random(1))
    for number in range(50):
        store.add(kept(name(number), 1, KEYS[0], expires=1e9), now=0)
    for number in range(10_000):
        store.add(kept(name(number, "S"), 1, KEYS[0], expires=1e9), now=1000 + number)
    assert sum(store.get(name(number), now=20_000) is not None for number in range(50)) >= 40


def test_of_a_crowd_those_that_are_near_stay() -> None:
    own = min((name(number, "X") for number in range(500)), key=lambda peer: peer_place(peer) ^ key_place(KEYS[0]))
    near, far = sorted(KEYS, key=lambda key: shared_bits(peer_place(own), key_place(key)))[:: len(KEYS) - 1][::-1]
    store = RecordStore(own, max_peers=100, rng=random.Random(1))
    for number in range(40):
        store.add(kept(name(number), 1, near), now=number)
    for number in range(3000):
        store.add(kept(name(number, "S"), 1, far), now=50)
    assert len(store.find(near, now=50)) == 40


def test_an_answer_from_a_full_store_costs_little() -> None:
    store = RecordStore()
    for number in range(10_000):
        store.add(kept(name(number), 1, KEYS[0], source=str(number % 3000)), now=0)
    began = time.perf_counter()
    for _ in range(20):
        assert len(store.find(KEYS[0], now=0, most=256)) == 256
    assert (time.perf_counter() - began) / 20 < 0.02


def test_those_that_left_are_named_only_where_there_is_room() -> None:
    store = RecordStore()
    for number in range(20):
        store.add(kept(name(number), 1, KEYS[0]), now=0)
        store.add(replace(kept(name(number, "L"), 1, KEYS[0]), left=True), now=0)
    assert store.count(KEYS[0]) == 20
    for most, living in ((10, 10), (20, 20), (25, 20), (None, 20)):
        answer = store.find(KEYS[0], now=0, most=most)
        assert sum(not entry.left for entry in answer) == living and len(answer) == (40 if most is None else most)
    store.add(kept("L1", 2, KEYS[0]), now=0)
    assert store.count(KEYS[0]) == 21, "it is back"


class Against(RuleBasedStateMachine):
    """The store against the plain statement of what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.model, self.now = RecordStore(max_peers=3), {}, 0.0
        self.newest: dict[str, int] = {}

    @rule(
        peer=st.sampled_from("abcd"), sequence=st.integers(1, 9), keys=st.sets(st.sampled_from(KEYS), min_size=1), life=st.integers(1, 4),
        source=st.sampled_from("xy"),
    )  # fmt: skip
    def add(self, peer: str, sequence: int, keys: set[bytes], life: int, source: str) -> None:
        record = kept(peer, sequence, *keys, expires=self.now + life, source=source)
        before = self.model.get(peer)
        full = before is None and len(self.model) >= 3
        news = self.store.add(record, now=self.now)
        assert news == (sequence > self.newest.get(peer, 0))
        if news:
            self.newest[peer] = sequence
            if full:
                self.model = {name: entry for name, entry in self.model.items() if entry.expires > self.now}
            self.model[peer] = record
            if len(self.model) > 3:
                gone = [name for name in self.model if name != peer and self.store.get(name, now=self.now) is None]
                assert len(gone) == 1, "one gives way for one"
                del self.model[gone[0]]
        elif before is not None and before.sequence == sequence:
            self.model[peer] = Kept(before.data, peer, sequence, before.received, before.expires, before.keys | record.keys, before.source)

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
            assert self.store.count(key) == sum(key in entry.keys for entry in self.model.values())
        assert len(self.store) == len(self.model) <= 3


test_the_store_does_what_it_says = Against.TestCase


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_newest_wins_in_any_order(arrivals: list[tuple[str, int]]) -> None:
    store = RecordStore()
    for peer, sequence in arrivals:
        store.add(kept(peer, sequence, KEYS[0]), now=0)
    newest = {peer: max(sequence for name, sequence in arrivals if name == peer) for peer, _ in arrivals}
    assert found(store, KEYS[0]) == {f"{peer}/{sequence}".encode() for peer, sequence in newest.items()}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 60))
def test_an_answer_is_shared_fairly(sizes: list[int], most: int) -> None:
    store = RecordStore()
    for place, size in enumerate(sizes):
        for number in range(size):
            store.add(kept(name(number, f"{'abcdefgh'[place]}z"), 1, KEYS[0], source=str(place)), now=0)
    answer = store.find(KEYS[0], now=0, most=most)
    assert len(answer) == len({entry.peer_id for entry in answer}) == min(most, sum(sizes))
    got = Counter(entry.source for entry in answer)
    short = [got[str(place)] for place, size in enumerate(sizes) if got[str(place)] < size]  # those that had more to give
    assert not short or max(got.values()) - min(short) <= 1


def test_a_clock_that_is_set_back_keeps_no_record_for_longer() -> None:
    store = RecordStore()
    store.add(replace(kept("a", 1, KEYS[0]), received=7200.0, expires=7230.0), now=7200)
    store.expire(0.0)
    assert found(store, KEYS[0], now=29.0) == {b"a/1"} and found(store, KEYS[0], now=30.0) == set()
