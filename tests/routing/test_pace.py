from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalnet.routing.pace import BEAT_S, GOSSIP_PER_SECOND, LONGEST_BEAT_S, LONGEST_GOSSIP_S, STORES_PER_SECOND, beat_s, gossip_every_s


def test_small_swarms_keep_the_beat() -> None:
    assert beat_s(0) == beat_s(1) == beat_s(300) == BEAT_S
    assert gossip_every_s(12) <= 3


@given(st.integers(0, 10**9))
def test_what_a_keeper_and_a_listener_get_does_not_grow_with_the_swarm(servers: int) -> None:
    assert BEAT_S <= beat_s(servers) <= LONGEST_BEAT_S
    if beat_s(servers) < LONGEST_BEAT_S:
        assert servers / beat_s(servers) <= STORES_PER_SECOND + 1e-9
    if gossip_every_s(servers) < LONGEST_GOSSIP_S:
        assert servers / gossip_every_s(servers) <= GOSSIP_PER_SECOND + 1e-9
