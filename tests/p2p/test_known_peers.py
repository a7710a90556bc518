"""The peers by which a swarm is found again."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.p2p.identity import Identity
from petalnet.p2p.known_peers import MAX_AGE_S, MAX_PEERS, MAX_PER_SOURCE, KnownPeers
from petalnet.p2p.peer_status import PeerStatus

NOW = 1_800_000_000.0
IDS = [Identity.generate().peer_id for _ in range(3 * MAX_PEERS)]


def status(number: int, addr: str, *, direction: str = "out", path: str = "direct") -> PeerStatus:
    return PeerStatus(IDS[number], addr, direction, path, None, None, 0, 0, 0, "", NOW)


def known_of(*found: tuple[PeerStatus, list[str]], now: float = NOW) -> KnownPeers:
    known = KnownPeers(rng=random.Random(0))
    for connection, addrs in found:
        known.note(connection, addrs, now=now)
    return known


def test_a_peer_is_remembered_by_the_address_at_which_it_was_dialled() -> None:
    known = known_of((status(0, "/ip4/203.0.113.7/tcp/31330"), ["/ip4/198.51.100.1/tcp/1"]))
    assert [str(peer) for peer in known.peers(5)] == [f"/ip4/203.0.113.7/tcp/31330/p2p/{IDS[0]}"]


def test_of_one_that_dialled_us_only_what_is_where_it_came_from() -> None:
    """It may say that it is at somebody else's address, who would be knocked at."""
    told = ["/ip4/198.51.100.1/tcp/22", "/ip4/203.0.113.7/tcp/31330", "nonsense", "/dns4/victim.example/tcp/80"]
    known = known_of((status(0, "/ip4/203.0.113.7/tcp/50123", direction="in"), told))
    assert [peer.addr for peer in known.peers(5)] == ["/ip4/203.0.113.7/tcp/31330"]
    assert not len(known_of((status(1, "/ip4/203.0.113.7/tcp/50123", direction="in"), ["/ip4/198.51.100.1/tcp/22"])))
    assert not len(known_of((status(1, "", direction="in"), told)))


def test_it_survives_a_file_and_the_same_peers_are_no_change() -> None:
    known = known_of(*((status(number, f"/ip4/10.0.0.{number}/tcp/31330"), []) for number in range(5)))
    version = known.version
    again = KnownPeers(rng=random.Random(0))
    again.load(known.dump(), now=NOW + 60)
    assert again.dump() == known.dump() and again.peers(99) == known.peers(99)
    known.note(status(0, "/ip4/10.0.0.0/tcp/31330"), [], now=NOW + 5)
    assert known.version == version


def test_those_that_were_chosen_come_first_and_the_old_are_forgotten() -> None:
    caller = status(0, "/ip4/10.0.0.1/tcp/5", direction="in"), ["/ip4/10.0.0.1/tcp/31330"]
    known = known_of(caller, (status(1, "/ip4/10.0.0.2/tcp/31330"), []))
    assert [peer.peer_id for peer in known.peers(1)] == [IDS[1]]
    known.note(status(1, "/ip4/10.0.0.2/tcp/31330"), [], now=NOW + MAX_AGE_S)
    known.expire(NOW + MAX_AGE_S + 1)
    assert [peer.peer_id for peer in known.peers(9)] == [IDS[1]]


def test_a_crowd_of_callers_leaves_half_of_the_room_and_what_was_chosen() -> None:
    chosen = [(status(number, f"/ip4/8.8.{number}.1/tcp/31330"), []) for number in range(40)]
    crowd = [
        (status(number, f"/ip4/9.9.{number}.1/tcp/5", direction="in"), [f"/ip4/9.9.{number}.1/tcp/31330"]) for number in range(40, 180)
    ]
    known = known_of(*chosen, *crowd)
    peers = {peer.peer_id for peer in known.peers(MAX_PEERS)}
    assert len(known) == MAX_PEERS and set(IDS[:40]) <= peers
    known = known_of(*crowd)
    assert len(known) == MAX_PEERS // 2


def test_one_network_takes_no_more_than_its_share() -> None:
    known = known_of(*((status(number, f"/ip4/8.8.8.{number}/tcp/31330"), []) for number in range(60)))
    assert len(known) == MAX_PER_SOURCE


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "peer_id": st.sampled_from(IDS) | JSON,
        "addrs": st.lists(st.sampled_from(["/ip4/10.0.0.1/tcp/1", "/ip4/1.1.1.1/udp/1"]) | JSON) | JSON,
        "seen": st.floats() | JSON,
        "dialled": JSON,
    },
)


@given(JSON | st.lists(ENTRY | JSON))
def test_a_file_may_say_what_it_likes(entries: object) -> None:
    known = KnownPeers()
    known.load(entries, now=NOW)
    assert all(peer.peer_id in IDS for peer in known.peers(MAX_PEERS))


@pytest.mark.parametrize("seen", [NOW - MAX_AGE_S - 1, NOW + 1e9, float("nan"), float("inf")])
def test_times_in_a_file_are_not_believed_far_off(seen: float) -> None:
    known = KnownPeers()
    known.load([{"peer_id": IDS[0], "addrs": ["/ip4/10.0.0.1/tcp/1"], "seen": seen, "dialled": True}], now=NOW)
    assert not len(known)
