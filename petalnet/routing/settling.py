"""Where the servers of a swarm would stand if all that may move did: the better arrangement that a move is measured against. Pure.

A single move rarely shows what it is good for: two weak places need two movers, and neither makes the swarm stronger by itself. So, as
Petals does (`should_choose_other_blocks` in its `server/block_selection.py`), the whole swarm is let settle in thought: one server after
another goes where it adds most, until nobody wants to go. Where that ends depends on where it began, and may be far from the best. Hence a
second arrangement is tried that forgets where everybody stands: servers are placed anew, each where it adds most, in three orders, the
largest first. On small swarms the better of the two is nearly always the optimum (see `benchmarks/placement.py`).

Everybody who knows the same records computes the same arrangement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from petalnet.routing.strength import Place, strengths, weakest_window

ROUNDS = 3
"""How often each server is asked in thought whether it would go; more changes the weakest block by less than a thousandth."""
MARGIN = 1.2
"""An arrangement is worth moving for where the weakest block gets so many times as strong. A mover serves nobody while it loads, and its
sessions have to be rebuilt elsewhere. (Petals moves where the present is below 0.75 of what it would be: 1.33 times.)"""
FEW = 64
"""Servers up to which placing them anew is tried. With more, each is so small a part of the whole that settling ends as high."""

_ORDERS: tuple[Callable[[Place], tuple[int, int]], ...] = (
    lambda place: (-place.rate, place.first - place.end),
    lambda place: (-place.rate * (place.end - place.first), 0),
    lambda place: (place.first - place.end, -place.rate),
)


def worth(strength: Sequence[int], other: Sequence[int]) -> bool:
    """Whether the other strengths are enough better than these to move for: fewer holes, or by the margin at the weakest block."""
    holes, fewer = strength.count(0), other.count(0)
    return fewer < holes if fewer != holes else 0 < min(strength) * MARGIN <= min(other)


def arrange(places: Sequence[Place], num_blocks: int, movable: Collection[str]) -> list[Place]:
    """The arrangement to move towards, with a place for each of `places`, in their order; only servers in `movable` stand elsewhere than
    now."""
    settled = settle(places, num_blocks, movable)
    if len(places) > FEW:
        return settled
    anew = max((_anew(places, num_blocks, movable, order) for order in _ORDERS), key=lambda other: _merit(places, other, num_blocks))
    return anew if worth(strengths(settled, num_blocks), strengths(anew, num_blocks)) else settled


def settle(places: Sequence[Place], num_blocks: int, movable: Collection[str]) -> list[Place]:
    """Let one movable server after another go where it adds most, in rounds until none does."""
    settled = list(places)
    strength = strengths(settled, num_blocks)
    for _ in range(ROUNDS):
        moved = False
        for index, place in enumerate(settled):
            if place.peer_id not in movable:
                continue
            _add(strength, place, -1)
            first = weakest_window(strength, place.end - place.first, stay=place.first)
            if first != place.first:
                moved = True
                place = settled[index] = place.at(first)
            _add(strength, place, 1)
        if not moved:
            break
    return settled


def _anew(places: Sequence[Place], num_blocks: int, movable: Collection[str], order: Callable[[Place], tuple[int, int]]) -> list[Place]:
    """All movable servers placed one after another in this order, beside those that stay, and then settled."""
    placed = {place.peer_id: place for place in places}
    strength = strengths((place for place in places if place.peer_id not in movable), num_blocks)
    for place in sorted((place for place in places if place.peer_id in movable), key=order):
        first = weakest_window(strength, place.end - place.first, stay=place.first)
        placed[place.peer_id] = place.at(first)
        _add(strength, placed[place.peer_id], 1)
    return settle([placed[place.peer_id] for place in places], num_blocks, movable)


def _merit(places: Sequence[Place], other: Sequence[Place], num_blocks: int) -> tuple[int, int, int]:
    """Fewest holes, then the strongest weakest block, then fewest servers that would have to go."""
    strength = strengths(other, num_blocks)
    return -strength.count(0), min(strength), sum(now == then for now, then in zip(places, other, strict=True))


def _add(strength: list[int], place: Place, sign: int) -> None:
    for block in range(place.first, place.end):
        strength[block] += sign * place.rate
