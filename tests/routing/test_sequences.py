from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalnet.routing.sequences import MEMORY_S, Sequences


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20)), max_size=30))
def test_only_what_is_newer_than_all_before_is_news(arrivals: list[tuple[str, int]]) -> None:
    sequences = Sequences(10)
    highest: dict[str, int] = {}
    for peer, number in arrivals:
        assert sequences.note(peer, number, 0.0) == (number > highest.get(peer, -1))
        highest[peer] = max(number, highest.get(peer, -1))
        assert sequences.newest(peer) == highest[peer]


def test_numbers_are_forgotten_when_no_older_record_can_pass_for_valid() -> None:
    sequences = Sequences(10)
    sequences.note("a", 5, 0.0)
    sequences.note("b", 5, 10.0)
    sequences.expire(MEMORY_S)
    assert sequences.is_news("a", 1) and not sequences.is_news("b", 1)
    sequences.forget("b")
    assert len(sequences) == 0 and sequences.newest("b") == 0


def test_those_not_heard_of_for_longest_are_forgotten_first() -> None:
    sequences = Sequences(2)
    for peer, number in (("a", 1), ("b", 1), ("a", 2), ("c", 1)):
        sequences.note(peer, number, 0.0)
    assert len(sequences) == 2 and sequences.is_news("b", 1) and not sequences.is_news("a", 2)
