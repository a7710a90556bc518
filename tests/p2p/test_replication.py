"""Who is asked, and what answers come to."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.p2p.identity import Identity
from petalnet.p2p.places import key_place, peer_place, shared_bits
from petalnet.p2p.record_store import Kept, read_kept
from petalnet.p2p.replication import (
    LOOK_UP_EVERY_S,
    MAX_LOOK_UPS,
    MAX_PER_NETWORK,
    REPLICAS,
    Announcement,
    Asking,
    Lie,
    LookUps,
    Merge,
    Round,
    may_end,
    nearest,
)
from petalnet.p2p.signed import sign
from petalnet.routing.records import SWARM_KEY, ServerRecord, discovery_key

NOW = 1_800_000_000.0
KEY = discovery_key("some-model")
PEERS = [Identity(bytes([number]) * 32).peer_id for number in range(60)]
SERVERS = [Identity(bytes([100 + number]) * 32) for number in range(4)]


def record(server: Identity, *, sequence: int = 1, state: str = "online", issued: float = NOW, model: str = "some-model") -> bytes:
    payload = ServerRecord(
        peer_id=server.peer_id, addrs=(), model=model, model_name="", span=(0, 4), num_blocks=8, state=state, dtype="float32",
        sequence=sequence, issued=issued, expires=issued + 30,
    )  # fmt: skip
    return sign(server, payload.encode())


def named(merge: Merge) -> dict[str, int]:
    return {kept.peer_id: kept.sequence for kept in merge.result()}


# ---- whom to ask


@given(st.sets(st.sampled_from(PEERS)), st.integers(1, 20), st.binary(min_size=32, max_size=32))
def test_the_nearest_are_those_with_the_least_distance(peers: set[str], count: int, key: bytes) -> None:
    chosen = nearest(key, peers, count)
    distances = [peer_place(peer) ^ key_place(key) for peer in chosen]
    assert distances == sorted(distances) and len(chosen) == min(count, len(peers))
    assert all(peer_place(peer) ^ key_place(key) > distances[-1] for peer in peers - set(chosen))
    assert shared_bits(key_place(key), key_place(key)) == 256


def test_one_public_network_does_not_get_all_places() -> None:
    racks = {peer: "198.51.100.0/24" if number < 50 else "" for number, peer in enumerate(PEERS)}
    chosen = nearest(KEY, PEERS, REPLICAS, network=racks.__getitem__)
    assert len(chosen) == REPLICAS and sum(bool(racks[peer]) for peer in chosen) <= MAX_PER_NETWORK


@given(st.data())
def test_a_round_ends_with_the_nearest_of_those_that_do_not_fail(data: st.DataObject) -> None:
    peers = data.draw(st.lists(st.sampled_from(PEERS), unique=True, max_size=40))
    failing = set(data.draw(st.lists(st.sampled_from(PEERS), unique=True)))
    late = data.draw(st.integers(0, len(peers)))
    turn = Round(KEY)
    turn.offer(peers[:late])
    asked: list[str] = turn.next()
    turn.offer(peers)
    under_way = [*asked, *(more := turn.next())]
    asked += more
    while under_way:
        peer = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        if peer in failing:
            turn.failed(peer)
            more = turn.next()
            asked += more
            under_way += more
    assert len(asked) == len(set(asked)), "nobody is asked twice"
    assert set(nearest(KEY, set(peers) - failing, REPLICAS)) <= set(asked)


def test_a_few_are_drawn_from_all_that_matter_and_replaced_where_they_fail() -> None:
    matter = set(nearest(KEY, PEERS, REPLICAS))
    seen: set[str] = set()
    for seed in range(40):
        turn = Round(KEY, 3, rng=random.Random(seed))
        turn.offer(PEERS)
        first = turn.next()
        assert len(first) == 3 and set(first) <= matter and turn.next() == []
        seen.update(first)
        turn.failed(first[0])
        assert len(turn.next()) == 1
    assert seen == matter


def test_a_peer_that_is_near_to_two_keys_is_asked_once() -> None:
    asking = Asking([KEY, SWARM_KEY])
    for key in (KEY, SWARM_KEY):
        asking.offer(key, PEERS[:5])
    wanted = asking.next()
    assert set(wanted) == set(PEERS[:5]) and all(keys == [KEY, SWARM_KEY] for keys in wanted.values())
    asking.offer(KEY, PEERS[5:6])
    asking.failed(PEERS[0], [KEY, SWARM_KEY])
    assert asking.next() == {PEERS[5]: [KEY]}


def test_look_ups_are_gone_back_to_for_a_while() -> None:
    look_ups = LookUps()
    assert look_ups.is_due(KEY, 0.0) and not look_ups.is_due(KEY, 1.0)
    look_ups.note(KEY, PEERS[:3], 2.0)
    assert look_ups.peers(KEY) == PEERS[:3] and not look_ups.is_due(KEY, LOOK_UP_EVERY_S + 1)
    look_ups.forget(PEERS[1])
    assert look_ups.peers(KEY) == [PEERS[0], PEERS[2]] and look_ups.is_due(KEY, 3.0)
    for number in range(2 * MAX_LOOK_UPS):
        look_ups.is_due(b"%32d" % number, 4.0)
    assert len(look_ups._found) == MAX_LOOK_UPS


@given(st.integers(0, 20), st.integers(0, 20))
def test_most_answers_do(asked: int, answered: int) -> None:
    if may_end(asked, answered):
        assert answered >= 2 and answered >= asked * 0.7


# ---- what answers come to


def test_the_newest_of_each_server_counts_and_the_youngest_age() -> None:
    merge = Merge(KEY, NOW, most=10)
    old, new = record(SERVERS[0]), record(SERVERS[0], sequence=2)
    merge.answer([old, record(SERVERS[1])], [20.0, 29.0])
    merge.answer([new], [10.0])
    merge.answer([new], [5.0])
    assert named(merge) == {SERVERS[0].peer_id: 2, SERVERS[1].peer_id: 1}
    expires = {kept.peer_id: kept.expires for kept in merge.result()}
    assert expires == {SERVERS[0].peer_id: NOW + 25, SERVERS[1].peer_id: NOW + 1}


def test_what_has_expired_or_belongs_elsewhere_or_comes_from_another_time_is_left_out() -> None:
    merge = Merge(KEY, NOW, most=10)
    records = [record(SERVERS[0]), record(SERVERS[1], model="other"), record(SERVERS[2], issued=NOW - 1000), record(SERVERS[3])]
    merge.answer(records, [31.0, 0.0, 0.0, 0.0])
    assert named(merge) == {SERVERS[3].peer_id: 1}


@pytest.mark.parametrize("answer", [([b"forged"], []), ([b""] * 11, []), ([b""], [1.0, 2.0])])
def test_what_no_honest_storer_answers_is_a_lie(answer: tuple[list[bytes], list[float]]) -> None:
    merge = Merge(KEY, NOW, most=10)
    with pytest.raises(Lie):
        merge.answer(*answer)
    payload = ServerRecord.decode(read_payload(record(SERVERS[0])))
    with pytest.raises(Lie):
        merge.answer([record(SERVERS[1]), sign(SERVERS[2], payload.encode())], [])
    assert named(merge) == {SERVERS[1].peer_id: 1}, "what was good stays"


def read_payload(data: bytes) -> bytes:
    from petalnet.p2p.signed import open_signed

    return open_signed(data)[1]


@given(liars=st.integers(0, 2), honest=st.integers(7, 10), truncate=st.integers(0, 2))
def test_a_few_liars_do_not_bring_back_the_dead(liars: int, honest: int, truncate: int) -> None:
    """Copies of a dead server's record hold, as far as one can see: by its signature, and by the times that clocks may be off."""
    merge = Merge(KEY, NOW, most=10)
    living, dead = record(SERVERS[0]), record(SERVERS[1], issued=NOW - 300)
    for _ in range(honest):
        merge.answer([living], [3.0], 1)
    for number in range(liars):
        merge.answer([dead], [0.0], 10**9 if number < truncate else 1)
    assert named(merge) == {SERVERS[0].peer_id: 1}


def test_of_samples_each_counts_and_so_does_what_this_node_keeps_itself() -> None:
    merge = Merge(KEY, NOW, most=10)
    own = read_kept(record(SERVERS[3]), [KEY], now=NOW)
    merge.add_own(own)
    for number in range(9):
        merge.answer([record(SERVERS[number % 3])], [0.0], 500)
    assert len(named(merge)) == 4
    few = Merge(KEY, NOW, most=10)
    few.add_own(own)
    few.answer([record(SERVERS[0])], [0.0], 1)
    few.answer([], [], 0)
    assert set(named(few)) == {SERVERS[0].peer_id, SERVERS[3].peer_id}


def test_what_keepers_say_of_an_announcement() -> None:
    kept = Kept(b"", "me", 7, NOW, NOW + 30, frozenset([KEY, SWARM_KEY]))
    announcement = Announcement(kept, {KEY: 1, SWARM_KEY: 1})
    for peer in PEERS[:5]:
        announcement.answer(peer, [KEY, SWARM_KEY], newest=7, counts=[3, 40])
    announcement.answer(PEERS[5], [KEY], newest=9, counts=[10**9])
    assert announcement.crowds == {KEY: 3, SWARM_KEY: 40}
    assert announcement.newest == 9 and announcement.stored == {"me", *PEERS[:5]}
