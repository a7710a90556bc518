"""Offences add up, fade, end in bans that grow, and are forgotten; what is remembered is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.p2p.offences import MAX_BAN_S, Offences
from petalnet.p2p.protocols import Limits

LIMITS = Limits(offence_threshold=4.0, offence_half_life=10.0, ban=100.0, max_offenders=16)


def offend(offences: Offences, times: int, now: float = 0.0, peer: str = "a") -> list[bool]:
    return [offences.add(peer, now) for _ in range(times)]


def test_a_peer_is_banned_at_the_threshold() -> None:
    offences = Offences(LIMITS)
    assert offend(offences, 5) == [False, False, False, True, True]
    assert offences.banned_until("a", 0.0) == 100.0
    assert offences.banned_until("b", 0.0) is None
    assert offences.banned_until("a", 100.0) is None


def test_one_bad_offence_is_enough() -> None:
    assert Offences(LIMITS).add("a", 0.0, weight=4.0)


def test_offences_fade() -> None:
    offences = Offences(LIMITS)
    assert offend(offences, 3) == [False] * 3
    assert offend(offences, 2, now=10.0) == [False, False]  # 1.5 is left of 3
    assert offend(offences, 1, now=10.0) == [True]


def test_who_offends_now_and_then_is_never_banned() -> None:
    offences = Offences(LIMITS)
    assert not any(offences.add("a", now) for now in range(0, 10_000, 5))


def test_each_further_ban_is_twice_as_long_up_to_a_day() -> None:
    offences, now, lengths = Offences(LIMITS), 0.0, []
    for _ in range(14):
        offend(offences, 4, now)
        until = offences.banned_until("a", now)
        assert until is not None
        lengths.append(until - now)
        now = until
    assert lengths == [min(100.0 * 2**ban, MAX_BAN_S) for ban in range(14)]


def test_who_behaves_as_long_as_it_was_kept_away_begins_anew() -> None:
    offences = Offences(LIMITS)
    offend(offences, 4)
    assert offend(offences, 3, now=200.0) == [False] * 3
    assert offend(offences, 1, now=200.0) == [True]
    assert offences.banned_until("a", 200.0) == 300.0  # as long as the first one
    assert offences.banned_until("a", 1000.0) is None and len(offences) == 0


def test_many_identities_do_not_flush_out_the_worst() -> None:
    offences = Offences(LIMITS)
    offend(offences, 4)
    for number in range(1000):
        offences.add(str(number), 1.0)
        assert len(offences) <= 16
    assert offences.banned_until("a", 1.0) == 100.0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0.0, 500.0), st.floats(0.01, 20.0)), max_size=80))
def test_whatever_happens_the_bounds_hold(events: list[tuple[str, float, float]]) -> None:
    limits = Limits(offence_threshold=4.0, offence_half_life=10.0, ban=100.0, max_offenders=3)
    offences, now = Offences(limits), 0.0
    for peer, later, weight in events:
        now += later
        banned_before = offences.banned_until(peer, now) is not None
        dropped = offences.add(peer, now, weight)
        assert dropped == (offences.banned_until(peer, now) is not None)
        assert dropped or not banned_before
        assert dropped or weight < 4.0
        assert len(offences) <= 3
        until = offences.banned_until(peer, now)
        assert until is None or now < until <= now + MAX_BAN_S


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.9])
def test_a_first_offence_below_the_threshold_bans_nobody(weight: float) -> None:
    assert not Offences(LIMITS).add("a", 0.0, weight)
