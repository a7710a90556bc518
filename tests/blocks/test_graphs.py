"""The store of kept graphs: whatever peers do, its bounds hold, and who keeps nothing loses nothing but time."""

from __future__ import annotations

import threading
from dataclasses import replace

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from petalnet.blocks.graphs import GRAPH_AGE_S, LEAST_BYTES, PEER_SHARE, Graph, GraphStore, Recorded

MOST = 20 * LEAST_BYTES
PEERS = ("a", "b", "c")


def graph(peer: str = "a", number: int = 1, *, rows: int = 1, length: int = 8) -> Graph:
    return Graph(peer, number, 0, 2, (rows, length, 4), "float32")


def recorded() -> Recorded:
    one = torch.ones(1)
    return Recorded(0, 1, 0, 2, one, one, None, [], 0)


def new_store(most_bytes: int = MOST) -> GraphStore:
    return GraphStore(most_bytes=most_bytes, free=Graph.free)


def kept(store: GraphStore, peer: str, number: int, size: int = 0, now: float = 0.0) -> Graph:
    made = store.begin(graph(peer, number))
    assert made is not None and (not size or store.grow(made, size)) and store.keep(made, now)
    made.parts.append(recorded())
    return made


def test_a_graph_is_found_by_its_peer_alone_and_used_once() -> None:
    store = new_store()
    one = kept(store, "a", 7, 1000)
    assert store.bytes == LEAST_BYTES + 1000 and len(store) == 1
    assert store.find("b", 7) is None and store.find("a", 8) is None
    assert store.find("a", 7) is one and store.take(one)
    assert store.find("a", 7) is None and not store.take(one)
    assert store.bytes == LEAST_BYTES + 1000, "it takes memory while it is used"
    store.done(one)
    store.done(one)
    assert (store.bytes, len(store), one.parts) == (0, 0, [])


def test_one_of_the_same_name_takes_its_place() -> None:
    store = new_store()
    first, second = kept(store, "a", 1), kept(store, "a", 1)
    assert store.find("a", 1) is second and first.state == "gone" and not first.parts


def test_what_is_not_named_is_found_by_nobody() -> None:
    store = new_store()
    one, other = store.begin(graph("a", 0)), store.begin(graph("a", 0))
    assert one is not None and other is not None and len(store) == 2
    assert store.find("a", 0) is None


def test_graphs_are_dropped_by_name_by_peer_and_by_age() -> None:
    store = new_store()
    graphs = [kept(store, peer, number, now=float(number)) for peer in "ab" for number in (1, 2, 3)]
    store.drop("a", [2, 9])
    assert [one.state for one in graphs] == ["kept", "gone", "kept", "kept", "kept", "kept"]
    store.drop_peer("a")
    assert [one.state for one in graphs] == ["gone"] * 3 + ["kept"] * 3
    store.expire(2.0 + GRAPH_AGE_S)
    assert [one.state for one in graphs] == ["gone"] * 5 + ["kept"]


def test_a_peer_makes_room_for_itself_before_others_do() -> None:
    store = new_store()
    of_b = kept(store, "b", 1, 3 * LEAST_BYTES)
    own = [kept(store, "a", number, 3 * LEAST_BYTES) for number in range(1, 4)]
    assert [one.state for one in own] == ["gone", "kept", "kept"], "each takes four, and a peer may have ten"
    assert of_b.state == "kept"


def test_the_oldest_goes_when_all_take_too_much() -> None:
    store = new_store()
    graphs = [kept(store, f"peer {number}", 1, 4 * LEAST_BYTES) for number in range(5)]
    assert [one.state for one in graphs] == ["gone", "kept", "kept", "kept", "kept"]


def test_nothing_is_dropped_for_what_has_no_room_anyway() -> None:
    store = new_store()
    used = kept(store, "a", 1, 6 * LEAST_BYTES)
    store.take(used)
    waiting = kept(store, "a", 2)
    made = store.begin(graph("a", 3))
    assert made is not None and not store.grow(made, 4 * LEAST_BYTES)
    assert made.state == "gone" and waiting.state == "kept"
    assert store.begin(graph("a", 4)) is not None, "it had no room beside others, so it may have some later"


def test_what_is_too_large_by_itself_is_not_tried_again() -> None:
    store = new_store()
    made = store.begin(graph("a", 1, rows=3))
    assert made is not None and not store.grow(made, MOST // 2)
    assert store.begin(graph("b", 1, rows=3)) is None and store.begin(graph("b", 1, rows=4)) is None
    assert store.begin(graph("b", 1, rows=2)) is not None and store.begin(graph("b", 2, rows=3, length=4)) is not None


def test_what_is_too_large_for_its_kind_tells_nothing_of_others() -> None:
    """Else a peer with LoRA of the highest rank could have graphs of others' passes refused for as long as the server runs."""
    store = new_store()
    wide = replace(graph("a", 1), kind="LoRA")
    assert store.begin(wide) is not None and not store.grow(wide, MOST // 2)
    assert store.begin(replace(graph("a", 2), kind="LoRA")) is None
    assert store.begin(graph("b", 1)) is not None


def test_a_graph_that_is_made_may_be_dropped_meanwhile() -> None:
    store = new_store()
    made = store.begin(graph("a", 1))
    assert made is not None
    store.drop_peer("a")
    assert not store.grow(made, 1) and not store.keep(made, 0.0) and not store.bytes


def test_memory_is_freed_on_the_compute_thread_and_outside_of_the_lock() -> None:
    freed: list[Graph] = []
    store = GraphStore(most_bytes=MOST, free=lambda one: freed.append(one) or store.find("a", 1))  # type: ignore[func-returns-value]
    one = kept(store, "a", 1)
    store.drop("a", [1])
    assert freed == [one] and one.parts, "whoever drops it has it freed"
    other = kept(store, "a", 2, 8 * LEAST_BYTES)
    made = store.begin(graph("a", 3))
    assert made is not None
    thread = threading.Thread(target=store.grow, args=(made, 4 * LEAST_BYTES))
    thread.start()
    thread.join()
    assert freed == [one] and other.state == "gone" and not other.parts, "who makes a graph frees what has to go for it"


class Stores(RuleBasedStateMachine):
    """Peers do anything in any order; a model knows what each has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.store = new_store()
        self.made: list[Graph] = []
        self.taken: list[Graph] = []
        self.kept: list[Graph] = []
        self.now = 0.0

    @rule(peer=st.sampled_from(PEERS), number=st.integers(0, 5), rows=st.integers(1, 3))
    def begin(self, peer: str, number: int, rows: int) -> None:
        made = self.store.begin(graph(peer, number, rows=rows))
        if made is not None:
            self.made.append(made)

    @rule(which=st.integers(0, 50), size=st.integers(0, MOST))
    def grow(self, which: int, size: int) -> None:
        if self.made:
            made = self.made[which % len(self.made)]
            before = made.bytes
            if self.store.grow(made, size):
                made.parts.append(recorded())
                assert made.bytes == before + size
            else:
                assert made.state == "gone"

    @rule(which=st.integers(0, 50))
    def keep(self, which: int) -> None:
        if self.made:
            made = self.made.pop(which % len(self.made))
            self.now += 1.0
            if self.store.keep(made, self.now):
                self.kept.append(made)

    @rule(peer=st.sampled_from(PEERS), number=st.integers(1, 5))
    def take(self, peer: str, number: int) -> None:
        found = self.store.find(peer, number)
        if found is not None:
            assert found in self.kept and (found.peer_id, found.number) == (peer, number)
            assert self.store.take(found)
            self.taken.append(found)

    @rule(which=st.integers(0, 50))
    def done(self, which: int) -> None:
        graphs = [*self.taken, *self.made]
        if graphs:
            self.store.done(graphs[which % len(graphs)])

    @rule(peer=st.sampled_from(PEERS), numbers=st.lists(st.integers(1, 5)))
    def drop(self, peer: str, numbers: list[int]) -> None:
        self.store.drop(peer, numbers)
        assert all(self.store.find(peer, number) is None for number in numbers)

    @rule(peer=st.sampled_from(PEERS))
    def lose(self, peer: str) -> None:
        self.store.drop_peer(peer)

    @rule(later=st.floats(0, GRAPH_AGE_S))
    def expire(self, later: float) -> None:
        self.now += later
        self.store.expire(self.now)
        assert all(one.state != "kept" or self.now - one.kept_since < GRAPH_AGE_S for one in self.kept)

    @invariant()
    def bounds(self) -> None:
        every = {*self.made, *self.taken, *self.kept}
        there = [one for one in every if one.state != "gone"]
        assert len(self.store) == len(there)
        assert self.store.bytes == sum(one.bytes for one in there) <= MOST
        for peer in PEERS:
            assert sum(one.bytes for one in there if one.peer_id == peer) <= MOST * PEER_SHARE
            waiting = sum(one.bytes for one in there if one.peer_id == peer and one.state == "kept")
            assert self.store._waiting_of[peer] == waiting
        assert self.store._waiting == sum(self.store._waiting_of.values())
        assert not any(one.parts for one in every if one.state == "gone")
        assert all(one.state != "gone" or one.bytes >= 0 for one in self.taken)


TestStores = Stores.TestCase
TestStores.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
