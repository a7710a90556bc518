from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import UsageError
from petalnet.routing.placement import block_strengths, choose_span
from petalnet.routing.records import ServerRecord

Build = Callable[..., ServerRecord]
NOW = 1_800_000_000.0


def test_the_first_server_begins_at_the_beginning(now: float) -> None:
    assert choose_span([], 12, 5, now=now) == (0, 5)


def test_holes_are_filled_before_weak_blocks_are_strengthened(record: Build, now: float) -> None:
    servers = [record("A", span=(0, 5), decode_tokens_s=1.0), record("B", span=(7, 12), decode_tokens_s=900.0)]
    assert choose_span(servers, 12, 2, now=now) == (5, 7)
    assert choose_span(servers, 12, 3, now=now) == (4, 7), "the hole and, beside it, the weaker neighbour"


def test_the_largest_hole_that_can_be_filled_wins_over_a_cheap_neighbourhood(record: Build, now: float) -> None:
    servers = [record("A", span=(1, 6), decode_tokens_s=1.0), record("B", span=(9, 12), decode_tokens_s=900.0)]
    assert choose_span(servers, 12, 4, now=now) == (5, 9)


def test_servers_that_are_loading_count_and_those_that_go_or_are_gone_do_not(record: Build, now: float) -> None:
    loading = record("A", span=(0, 6), state="joining", decode_tokens_s=0.0)
    assert choose_span([loading], 12, 6, now=now) == (6, 12)
    assert choose_span([record("A", span=(0, 6), state="draining")], 12, 6, now=now) == (0, 6)
    assert choose_span([record("A", span=(0, 6), state="left")], 12, 6, now=now) == (0, 6)
    assert choose_span([record("A", span=(0, 6))], 12, 6, now=now + 90) == (0, 6)


@pytest.mark.parametrize("count", [0, -1, 13])
def test_an_impossible_count_is_refused(now: float, count: int) -> None:
    with pytest.raises(UsageError, match="1 to 12 blocks"):
        choose_span([], 12, count, now=now)


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12), st.floats(0, 1e6)).filter(lambda item: item[0] < item[1]), max_size=6),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_the_chosen_window_is_the_weakest_and_does_not_depend_on_the_order(record: Build, swarm, count: int, random) -> None:
    servers = [record(peer, span=(a, b), decode_tokens_s=rate) for peer, (a, b, rate) in zip("ABCDEF", swarm, strict=False)]
    first, end = choose_span(servers, 12, count, now=NOW)
    assert first >= 0 and end - first == count and end <= 12
    strength = block_strengths(servers, 12, now=NOW)
    assert min(strength[first:end]) == min(strength)
    random.shuffle(servers)
    assert choose_span(servers, 12, count, now=NOW) == (first, end)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_servers_that_come_one_after_another_complete_the_model(record: Build, counts: list[int]) -> None:
    servers: list[ServerRecord] = []
    for peer, count in zip("ABCDEFGH", counts, strict=False):
        uncovered = block_strengths(servers, 12, now=NOW).count(0.0)
        span = choose_span(servers, 12, count, now=NOW)
        servers.append(record(peer, span=span, state="joining"))
        assert block_strengths(servers, 12, now=NOW).count(0.0) == max(uncovered - count, 0)
