"""When sessions come back: learned, foretold, and given up."""

from __future__ import annotations

import pytest

from petalnet.blocks.arrivals import Arrivals


def visits(arrivals: Arrivals, session: str, seconds: list[float], now: float = 100.0) -> float:
    """A session is answered and comes back after so many seconds, again and again; the time when it was last answered."""
    for away in seconds:
        arrivals.left(session, "key", 1, now)
        now += away
        arrivals.came(session, now)
        now += 0.1
    arrivals.left(session, "key", 1, now)
    return now


def test_a_session_is_expected_after_its_usual_time_once_it_has_come_back() -> None:
    arrivals = Arrivals()
    assert visits(arrivals, "new", []) == 100.0
    assert arrivals.expected(100.0) == []
    now = visits(arrivals, "known", [0.01] * 20)
    (arrival,) = arrivals.expected(now)
    assert arrival.wait == pytest.approx(0.01)
    assert arrival.usual == pytest.approx(0.01)
    assert (arrival.key, arrival.tokens) == ("key", 1)
    assert now + 0.01 < arrival.late < now + 0.02
    assert arrivals.expected(arrival.late) == []  # it is late, and nobody waits any longer
    (due,) = arrivals.expected(now + 0.0105)  # it may come at any moment
    assert 0 < due.wait <= due.late - (now + 0.0105)


def test_a_session_that_is_irregular_is_given_more_time() -> None:
    arrivals = Arrivals()
    now = visits(arrivals, "irregular", [0.01, 0.05] * 20)
    (arrival,) = arrivals.expected(now)
    assert 0.015 < arrival.usual < 0.045
    assert arrival.late > now + 0.05


def test_who_is_here_is_not_expected_and_who_stays_away_is_forgotten() -> None:
    arrivals = Arrivals()
    now = visits(arrivals, "session", [0.01] * 3)
    arrivals.came("session", now + 0.01)
    assert arrivals.expected(now + 0.01) == []
    arrivals.left("session", "key", 1, now)
    assert len(arrivals.expected(now)) == 1
    assert arrivals.expected(now + 5.0) == []
    assert len(arrivals) == 0
    arrivals.came("session", now + 5.0)
    arrivals.left("session", "key", 1, now + 5.1)
    assert arrivals.expected(now + 5.1) == []  # a person typed: nothing is known of how it goes on


def test_who_has_ended_is_not_expected() -> None:
    arrivals = Arrivals()
    now = visits(arrivals, "session", [0.01] * 3)
    arrivals.forget("session")
    arrivals.forget("nobody")
    assert arrivals.expected(now) == []


def test_the_next_is_first() -> None:
    arrivals = Arrivals()
    now = visits(arrivals, "slow", [0.05] * 10)
    visits(arrivals, "quick", [0.01] * 10, now - 10 * 0.11)
    waits = [arrival.wait for arrival in arrivals.expected(now)]
    assert waits == pytest.approx([0.01, 0.05], abs=1e-3)
