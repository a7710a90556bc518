"""When a step is late: soon enough for who waits for it, and never because it takes as long as those before."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from petalnet.client.lateness import (
    ANSWERING,
    ENOUGH,
    FEW_TOKENS,
    LEAST_S,
    LONGEST_ASKING_S,
    LONGEST_EXTRA_S,
    REMEMBERED,
    UNKNOWN_S,
    USUAL_TIMES,
    Lateness,
)

seconds = st.floats(0.0001, 30.0)
round_trips = st.floats(0.0, 2.0)
few = st.integers(1, FEW_TOKENS)
many = st.integers(FEW_TOKENS + 1, 100_000)


def percentile_99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def lateness_of(taken: list[float], tokens: int = 1) -> Lateness:
    lateness = Lateness()
    for one in taken:
        lateness.note(tokens, one)
    return lateness


@given(st.lists(seconds, min_size=ENOUGH, max_size=3 * REMEMBERED), round_trips, few)
def test_a_hang_is_noticed_in_time(taken: list[float], round_trip_s: float, tokens: int) -> None:
    lateness = lateness_of(taken)
    bound = max(LEAST_S, USUAL_TIMES * percentile_99(taken[-REMEMBERED:]) + round_trip_s)
    asked_at = lateness.suspect_after_s(tokens, round_trip_s)
    assert asked_at + lateness.answer_within_s(tokens, round_trip_s) <= bound * (1 + 1e-9)


@given(st.lists(seconds, min_size=1, max_size=2 * REMEMBERED), round_trips, few)
def test_steps_like_those_before_raise_no_alarm(taken: list[float], round_trip_s: float, tokens: int) -> None:
    """Nor one that takes twice as long."""
    lateness = lateness_of(taken)
    assert lateness.suspect_after_s(tokens, round_trip_s) > 2 * percentile_99(taken[-REMEMBERED:])


@given(st.lists(seconds, max_size=ENOUGH - 1), st.integers(1, 100_000))
def test_first_steps_are_waited_for(taken: list[float], tokens: int) -> None:
    lateness = lateness_of(taken)
    assert lateness.suspect_after_s(tokens, 0.0) >= UNKNOWN_S / 2 and lateness.give_up_after_s(tokens, 0.0) >= UNKNOWN_S


@given(st.lists(seconds, max_size=20), st.lists(st.tuples(many, seconds), max_size=20), many, round_trips)
def test_long_steps_have_their_time_and_it_is_bounded(
    taken: list[float], prompts: list[tuple[int, float]], tokens: int, round_trip_s: float
) -> None:
    lateness = lateness_of(taken)
    for length, one in prompts:
        lateness.note(length, one)
    usual, longest = lateness.give_up_after_s(1, round_trip_s), lateness.give_up_after_s(tokens, round_trip_s)
    assert usual < longest <= usual + LONGEST_EXTRA_S
    if prompts:
        rate = max(one / length for length, one in prompts[-8:])
        assert longest >= usual + min(USUAL_TIMES * rate * tokens, LONGEST_EXTRA_S) * (1 - 1e-9)
    assert lateness.give_up_after_s(2 * tokens, round_trip_s) >= longest


@given(st.lists(seconds, max_size=20), st.integers(1, 100_000), round_trips)
def test_servers_have_time_to_answer(taken: list[float], tokens: int, round_trip_s: float) -> None:
    """Nearly two of the longest round trips that any step has shown, at least."""
    lateness = lateness_of(taken)
    within = lateness.answer_within_s(tokens, round_trip_s)
    least = ANSWERING * min(LONGEST_ASKING_S, max(LEAST_S / 2, 2 * lateness.usual_s))
    assert least * (1 - 1e-9) <= within <= ANSWERING * LONGEST_ASKING_S * (1 + 1e-9)


@given(st.lists(seconds, max_size=20), few, st.integers(0, 30))
def test_servers_that_answer_are_asked_less_and_less(taken: list[float], tokens: int, asked: int) -> None:
    lateness = lateness_of(taken)
    times = [lateness.suspect_after_s(tokens, 0.0, asked + more) for more in range(3)]
    first, second = times[1] - times[0], times[2] - times[1]
    assert 0 < first <= second * (1 + 1e-9) <= 2 * first * (1 + 1e-6)


def test_what_was_announced_counts_until_it_is_known_better() -> None:
    announced = Lateness(token_s=0.03)
    assert announced.give_up_after_s(50, 0.0) == UNKNOWN_S + USUAL_TIMES * 0.03 * 50
    announced.note(50, 0.5)
    assert announced.give_up_after_s(50, 0.0) == UNKNOWN_S + USUAL_TIMES * 0.5
