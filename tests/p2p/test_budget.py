"""The memory that peers may make a node hold."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from petalnet.p2p.budget import MEMORY_SHARE, Budget
from petalnet.p2p.protocols import Limits

LIMITS = Limits(max_held_per_peer=100, max_held=150)
PLENTY = 10**9


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 120)), max_size=40), st.randoms(use_true_random=False))
def test_no_peer_and_not_all_together_hold_too_much(asked: list[tuple[str, int]], chance) -> None:
    budget, held = Budget(LIMITS, memory=PLENTY), []
    for peer_id, size in asked:
        its_own, total = sum(s for p, s in held if p == peer_id), sum(s for _, s in held)
        fits = its_own + size <= 100 and total + size <= 150
        assert budget.take(peer_id, size) == fits
        if fits:
            held.append((peer_id, size))
        if held and chance.random() < 0.4:
            budget.give_back(*held.pop(chance.randrange(len(held))))
        assert budget.held == sum(s for _, s in held)
    while held:
        budget.give_back(*held.pop())
    assert budget.held == 0
    assert all(budget.take(peer_id, 1) for peer_id in "abc")


def test_a_small_machine_gives_no_more_than_its_share() -> None:
    budget = Budget(Limits(max_held_per_peer=PLENTY, max_held=PLENTY), memory=40 * MEMORY_SHARE)
    assert budget.take("a", 40)
    assert not budget.take("b", 1)


def test_peers_at_one_address_leave_some_to_the_others() -> None:
    budget = Budget(Limits(max_held_per_peer=50, max_held=200), memory=PLENTY)
    taken = [(peer_id, 50, "10.0.0.1") for peer_id in "abcd" if budget.take(peer_id, 50, "10.0.0.1")]
    assert len(taken) == 3
    assert not budget.take("d", 1, "10.0.0.1")
    assert budget.take("e", 50, "10.0.0.2")
    for entry in taken:
        budget.give_back(*entry)
    assert budget.held == 50
    assert budget.take("d", 50, "10.0.0.1")


async def test_who_waits_gets_what_is_given_back(nursery: trio.Nursery) -> None:
    budget, got = Budget(LIMITS, memory=PLENTY), []

    async def wait(peer_id: str, size: int) -> None:
        await budget.take_when_free(peer_id, size)
        got.append(peer_id)

    assert budget.take("a", 100)
    nursery.start_soon(wait, "a", 50)
    nursery.start_soon(wait, "b", 100)
    await trio.testing.wait_all_tasks_blocked()
    assert got == []
    budget.give_back("a", 50)
    await trio.testing.wait_all_tasks_blocked()
    budget.give_back("a", 50)
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(got) == ["a", "b"]
    assert budget.held == 150
