"""How strong a swarm is at each of its blocks, and where a span adds most. Pure.

A block is as strong as the tokens a second of all servers that hold it or are loading it, and a swarm is as strong as its weakest block:
every token goes through all of them. What is made largest is therefore the smallest strength, then the second smallest, and so on (the
*leximin* order). The first part is the objective of Petals (Borzunov et al., "Distributed Inference and Fine-tuning of Large Language
Models Over The Internet", NeurIPS 2023, section 3.2), which took it from the rebalancing of pipeline stages in SWARM (Ryabinin et al.,
ICML 2023, section 3.2); the rest of the order, which max-min fairness has always had, decides between ways that are equal so far.

Strengths are whole numbers, in thousandths of a token a second: sums then do not depend on the order of their terms, two servers that know
the same records come to the same result, and a difference is never a rounding error that moves a server.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from petalnet.routing.records import ServerRecord

SCALE = 1000.0
"""What one token a second counts."""
MOST_OF_MEDIAN = 8.0
"""A server's speed (blocks a second: its rate times its blocks) counts at most this often what the median server's does. Rates are what
servers say of themselves: whoever claims a million tokens a second would otherwise keep everybody away from the blocks that it names."""


@dataclass(frozen=True, slots=True)
class Place:
    """Blocks [first, end) that a server holds or is loading, and what it adds to the strength of each."""

    peer_id: str
    first: int
    end: int
    rate: int

    def at(self, first: int) -> Place:
        """The same server with as many blocks from `first` on."""
        return Place(self.peer_id, first, first + self.end - self.first, self.rate)


def places_of(
    records: Iterable[ServerRecord], num_blocks: int, *, now: float, states: Collection[str] = ("joining", "online")
) -> list[Place]:
    """What the servers in these states add to a model of `num_blocks`, in the order of their peer ids.

    A server that has announced no rate yet counts as a median one, for it is loading and will have one soon.
    """
    usable = sorted((record for record in records if record.expires > now and record.state in states), key=lambda record: record.peer_id)
    speeds = [record.decode_tokens_s * (record.span[1] - record.span[0]) for record in usable if record.decode_tokens_s > 0]
    usual = statistics.median_low(speeds) if speeds else 1.0
    places = []
    for record in usable:
        first, end = record.span[0], min(record.span[1], num_blocks)
        if first < end:
            length = record.span[1] - record.span[0]
            speed = min(record.decode_tokens_s * length or usual, MOST_OF_MEDIAN * usual)
            places.append(Place(record.peer_id, first, end, max(round(SCALE * speed / length), 1)))
    return places


def strengths(places: Iterable[Place], num_blocks: int) -> list[int]:
    """The strength of each block."""
    steps = [0] * (num_blocks + 1)
    for place in places:
        steps[place.first] += place.rate
        steps[place.end] -= place.rate
    strength, here = [], 0
    for step in steps[:-1]:
        here += step
        strength.append(here)
    return strength


def weakest_window(strength: Sequence[float], count: int, *, stay: int | None = None) -> int:
    """Where `count` consecutive blocks begin, to which a server adds most: the weakest block lies in them, the second weakest, and so on.

    That is also the window after which the swarm is best in the leximin order, whatever the server's rate: of two windows, the one with
    more blocks of the smallest strength in which they differ leaves fewer such blocks behind.

    Args:
        stay: taken where it is as good as any; else the first is.
    """
    low, high = 0, len(strength) - count  # the windows that are left begin in [low, high]
    order = sorted(range(len(strength)), key=strength.__getitem__)
    for index, block in enumerate(order):
        if low == high:
            return low
        if index + 1 < len(order) and strength[order[index + 1]] == strength[block]:
            return _among_equals(strength, count, range(low, high + 1), order[index:], stay)
        first, last = max(low, block - count + 1), min(high, block)
        if first <= last:
            low, high = first, last
    return stay if stay is not None and low <= stay <= high else low


def _among_equals(strength: Sequence[float], count: int, starts: Sequence[int], order: Sequence[int], stay: int | None) -> int:
    """`weakest_window` of these windows from the blocks in `order` on, of which several are equally strong."""
    for _, blocks in groupby(order, key=strength.__getitem__):
        weak = sorted(blocks)
        taken = [bisect_left(weak, start + count) - bisect_left(weak, start) for start in starts]
        most = max(taken)
        starts = [start for start, number in zip(starts, taken, strict=True) if number == most]
        if len(starts) == 1:
            break
    return stay if stay is not None and stay in starts else starts[0]
