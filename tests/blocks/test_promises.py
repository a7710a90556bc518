"""Promises of pages: they fit, nobody takes all, and what is told to those who wait follows from how sessions end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.blocks.promises import FIRST_LIFETIME_S, LONGEST_WAIT_S, SHORTEST_WAIT_S, NoRoom, Promise, Promises


def promised(promises: Promises, peer_id: str, pages: int, now: float = 0.0, network: str = "") -> Promise:
    promise = Promise(peer_id, network)
    promises.extend(promise, pages, now)
    return promise


def refusal(promises: Promises, peer_id: str, pages: int, now: float = 0.0) -> NoRoom:
    with pytest.raises(NoRoom) as caught:
        promises.extend(Promise(peer_id), pages, now)
    return caught.value


def test_a_promise_is_raised_and_ended() -> None:
    promises = Promises(100)
    promise = promised(promises, "a", 30)
    promises.extend(promise, 20, 1.0)
    assert (promise.pages, promises.free) == (30, 70), "what was promised covers less as well"
    promises.extend(promise, 100, 2.0)
    assert promises.free == 0 and promise.since == 0.0
    promises.end(promise, 3.0)
    promises.end(promise, 3.0)
    assert (promise.pages, promises.free) == (0, 100)


def test_a_peer_with_much_leaves_a_quarter_to_others() -> None:
    promises = Promises(100)
    first = promised(promises, "a", 60)
    assert refusal(promises, "a", 16).available == 15
    second = promised(promises, "a", 15)
    assert refusal(promises, "a", 1).available == 0
    other = promised(promises, "b", 25)
    promises.end(other, 1.0)
    promises.end(second, 1.0)
    promises.extend(first, 100, 1.0)  # its only session may take all there is
    assert promises.free == 0


def test_peers_of_one_network_leave_an_eighth_to_others_together() -> None:
    """Twenty sessions of twenty names that cost nothing shut nobody out."""
    promises = Promises(100)
    held = [promised(promises, f"peer {number}", 15, network="198.51.100.0/24") for number in range(4)]
    with pytest.raises(NoRoom) as caught:
        promised(promises, "peer 4", 30, network="198.51.100.0/24")
    assert caught.value.available == 28
    promised(promises, "peer 4", 28, network="198.51.100.0/24")
    promised(promises, "else", 12, network="192.0.2.0/24")
    for promise in held:
        promises.end(promise, 1.0)
    promised(promises, "peer 5", 60, 1.0, network="198.51.100.0/24")
    assert promises.free == 0


def test_a_peer_with_little_takes_what_is_free() -> None:
    promises = Promises(100)
    promised(promises, "a", 25)
    promised(promises, "a", 75)
    assert promises.free == 0


def test_those_who_wait_are_told_when_enough_sessions_may_have_ended() -> None:
    promises = Promises(100)
    early, late = promised(promises, "a", 50, now=0.0), promised(promises, "b", 50, now=4.0)
    assert refusal(promises, "c", 50, now=5.0).wait_s == pytest.approx(FIRST_LIFETIME_S - 5)
    assert refusal(promises, "c", 51, now=5.0).wait_s == pytest.approx(FIRST_LIFETIME_S - 1)
    late.progress = 0.5  # in one second: it will be through in another
    assert refusal(promises, "c", 50, now=5.0).wait_s == pytest.approx(1.0)
    late.progress = 1.0
    assert refusal(promises, "c", 50, now=5.0).wait_s == SHORTEST_WAIT_S
    assert promises.next_end_s(5.0) == SHORTEST_WAIT_S
    late.progress = 0.0
    assert refusal(promises, "c", 50, now=25.0).wait_s == pytest.approx(21.0), "what has outlived the average may do so again"
    assert refusal(promises, "c", 100, now=1000.0).wait_s == LONGEST_WAIT_S
    promises.end(early, 24.0)
    promises.end(late, 24.0)
    promised(promises, "a", 100, now=24.0)
    assert refusal(promises, "c", 1, now=24.0).wait_s > FIRST_LIFETIME_S, "sessions turn out to last longer"


@given(
    pages=st.integers(1, 60),
    steps=st.lists(st.tuples(st.sampled_from(["extend", "end", "wait"]), st.integers(0, 7), st.integers(0, 70)), max_size=40),
)
def test_promises_always_fit(pages: int, steps: list[tuple[str, int, int]]) -> None:
    promises = Promises(pages)
    known = [Promise(f"peer {which % 3}") for which in range(8)]
    now = 0.0
    for kind, which, number in steps:
        promise = known[which]
        if kind == "end":
            promises.end(promise, now)
        elif kind == "wait":
            now += number / 7
        else:
            before, available = promise.pages, promises.available(promise)
            try:
                promises.extend(promise, number, now)
            except NoRoom as refused:
                assert promise.pages == before and number > before + available
                assert refused.available == before + available < number
                assert SHORTEST_WAIT_S <= refused.wait_s <= LONGEST_WAIT_S
            else:
                assert promise.pages == max(before, number)
        assert promises.promised == sum(promise.pages for promise in known) <= pages
        assert promises.free == pages - promises.promised
