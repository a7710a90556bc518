"""Which blocks a server should hold: at its start, and whether it should go elsewhere later. Pure; see `strength` for what is made largest.

Nobody gives orders. Servers that know the same records come to the same conclusions, and a rule that all compute says whose turn it is:

- *Joining.* A newcomer takes the blocks where it adds most, beside those that are online and those that are loading, and announces itself.
  Newcomers that chose at the same moment then look again, in thought in the order of their peer ids: each counts, of those that it has
  learnt of since it chose, only the ones before it, where they will be then. So of two that chose the same blocks one stays.
- *Moving.* A server looks now and then whether the swarm would be better by a margin if all stood elsewhere (`settling`). If so, those that
  would have to go take turns, the one first whose going helps most. One goes at a time for each `SERVERS_A_MOVER` servers: nobody
  begins while another drains, and those that load are counted where they will be.
- *No holes.* A server goes only where another that is online and not about to leave has each of its blocks (see `_needed`). It says that
  it drains, looks again once that is known everywhere, and only then goes: of two that would leave a block together, one stays.
- *No flapping.* Each move makes the swarm better in the leximin order, or is part of an arrangement better by the margin and never makes
  the weakest block weaker; who has moved does so again only after a while, unless there is a hole.

What strangers can still do: a server that lies about its rate keeps others away from its blocks, as if it were up to `MOST_OF_MEDIAN`
times as fast as the median (more identities, more of that), one that answers for blocks that it does not serve lets others leave them, and
those that say again and again, under ever new names, that they drain or load keep others from going where they are needed. Routers find
liars out and avoid them, placement does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from petalnet.errors import UsageError
from petalnet.routing.records import ServerRecord
from petalnet.routing.settling import arrange, worth
from petalnet.routing.strength import Place, places_of, strengths, weakest_window

SERVERS_A_MOVER = 64
"""In a swarm of more servers than this, more than one may move at a time."""


@dataclass(frozen=True)
class Move:
    """That a server should go to other blocks.

    Attributes:
        peer_id: the server.
        span: the blocks [a, b) that it should hold instead of its own.
        fills: whether nobody holds some of them now.
        strength: thousandths of a token a second at the weakest block: now, and once all have gone where they should.
    """

    peer_id: str
    span: tuple[int, int]
    fills: bool
    strength: tuple[int, int]

    @property
    def why(self) -> str:
        """What it is for, in words."""
        now, then = self.strength
        if self.fills:
            return "nobody serves some of them"
        if not now:
            return "that lets others go where nobody serves some blocks"
        return f"the weakest block would get {then / now:.1f} times as strong"


def choose_span(
    records: Iterable[ServerRecord], num_blocks: int, count: int, *, now: float, stay: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The `count` consecutive blocks [a, b) of a model of `num_blocks` where a server adds most; of equal ones `stay`, else the first.

    Args:
        records: the other servers.
        now: unix seconds.

    Raises:
        UsageError: count is not between 1 and num_blocks.
    """
    if not 1 <= count <= num_blocks:
        raise UsageError(f"a server of this model can hold 1 to {num_blocks} blocks, not {count}")
    strength = strengths(places_of(records, num_blocks, now=now), num_blocks)
    first = weakest_window(strength, count, stay=None if stay is None else stay[0])
    return first, first + count


def reconsider(
    records: Iterable[ServerRecord], own: ServerRecord, known: Iterable[str], *, now: float, again: bool = False
) -> tuple[int, int]:
    """Where a joining server should go, once others have had time to be heard of that chose at the same moment; its own span where that
    is as good as any.

    Args:
        records: the other servers.
        own: the server's own record.
        known: servers that it knew of when it chose; they may not have known of it.
        again: others have had time to do the same: what they say now is what they will load.
    """
    before = set(known)
    counted = [record for record in records if record.state == "online" or record.peer_id in before or record.peer_id < own.peer_id]
    places = places_of(counted, own.num_blocks, now=now)
    rivals = {record.peer_id for record in counted if record.state == "joining" and record.peer_id not in before and not again}
    strength = strengths((place for place in places if place.peer_id not in rivals), own.num_blocks)
    for place in places:
        if place.peer_id in rivals:  # where it will be once it has looked again like this server
            length = place.end - place.first
            first = weakest_window(strength, length, stay=place.first)
            for block in range(first, first + length):
                strength[block] += place.rate
    length = own.span[1] - own.span[0]
    first = weakest_window(strength, length, stay=own.span[0])
    return first, first + length


def find_moves(records: Iterable[ServerRecord], own: ServerRecord, *, now: float, idle: Collection[str] = ()) -> list[Move]:
    """Who should go where, in the order of their turns; empty where the swarm is well as it is, or enough of it is on the move.

    Each server is given its own view of its model's servers. What is true now may not be after a wait: whoever acts has to ask again.

    Args:
        own: the record of the server that asks, which is online.
        idle: servers that did not go when it was their turn, and are not counted on.
    """
    others = [record for record in records if record.expires > now and record.peer_id != own.peer_id and _agree(record, own)]
    if sum(record.state == "draining" for record in others) > len(others) // SERVERS_A_MOVER:
        return []
    places = places_of([*others, own], own.num_blocks, now=now)
    strength = strengths(places, own.num_blocks)
    total = sum(place.rate * (place.end - place.first) for place in places)
    if min(strength) > 0 and not worth(strength, [total // own.num_blocks]):
        return []  # not even if all blocks were equally strong; most looks end here
    online = [record for record in [*others, own] if record.state == "online"]
    target = arrange(places, own.num_blocks, {record.peer_id for record in online if record.movable and record.peer_id not in idle})
    then = strengths(target, own.num_blocks)
    if not worth(strength, then):
        return []
    holders = strengths((Place(record.peer_id, *record.span, 1) for record in online), own.num_blocks)
    return [
        Move(goal.peer_id, (goal.first, goal.end), 0 in strength[goal.first : goal.end], (min(strength), min(then)))
        for goal in _in_turn(places, target, strength, holders)
    ]


def may_leave(records: Iterable[ServerRecord], own: ServerRecord, move: Move, *, now: float) -> bool:
    """Whether a server's going would leave no block without a server that is online."""
    needed = _needed(own.span, move.span, fills=move.fills)
    for record in records:
        if record.peer_id != own.peer_id and record.state == "online" and record.expires > now and _agree(record, own):
            needed.difference_update(range(*record.span))
    return not needed


def yields_to(records: Iterable[ServerRecord], own: ServerRecord, *, now: float) -> bool:
    """Whether a server that has said that it drains, to move, should stay after all: others with smaller peer ids drain as well, and one of
    them has a block of its own, or they are as many as may move at a time."""
    others = [record for record in records if record.expires > now and record.peer_id != own.peer_id]
    before = [record for record in others if record.state == "draining" and record.peer_id < own.peer_id]
    shared = any(max(record.span[0], own.span[0]) < min(record.span[1], own.span[1]) for record in before)
    return shared or len(before) > len(others) // SERVERS_A_MOVER


def _in_turn(places: Sequence[Place], target: Sequence[Place], strength: Sequence[int], holders: Sequence[int]) -> list[Place]:
    """The new places of those that can go there now, whoever's going helps most first.

    Left out are those that would open a hole, and those after whose going, by itself, the weakest block is weaker than now.

    Args:
        holders: how many servers that are online hold each block.
    """
    before = (-list(strength).count(0), min(strength))
    ranked = []
    for place, goal in zip(places, target, strict=True):
        needed = _needed((place.first, place.end), (goal.first, goal.end), fills=0 in strength[goal.first : goal.end])
        if place == goal or any(holders[block] < 2 for block in needed):
            continue
        after = list(strength)
        for block in range(place.first, place.end):
            after[block] -= place.rate
        for block in range(goal.first, goal.end):
            after[block] += place.rate
        after.sort()
        if (-after.count(0), after[0]) >= before:
            ranked.append(([-value for value in after], goal.peer_id, goal))
    return [goal for _, _, goal in sorted(ranked, key=lambda entry: entry[:2])]


def _needed(span: tuple[int, int], goal: tuple[int, int], *, fills: bool) -> set[int]:
    """The blocks of a server's span that others must have before it goes: all, for it serves none while it loads.

    Where a hole is filled, only those that it will not have again: until then nobody gets a token through the model anyway.
    """
    return {block for block in range(*span) if not (fills and goal[0] <= block < goal[1])}


def _agree(record: ServerRecord, own: ServerRecord) -> bool:
    """Whether a server holds the same weights as this one in the blocks that both announce; another version of the model is no help."""
    if not record.block_digests or not own.block_digests:
        return True
    blocks = range(max(record.span[0], own.span[0]), min(record.span[1], own.span[1]))
    return all(record.block_digests[block - record.span[0]] == own.block_digests[block - own.span[0]] for block in blocks)
