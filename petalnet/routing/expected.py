"""What a token is expected to take: in a server, and on the ways between a client and its servers. Pure arithmetic in whole nanoseconds.

*In a server:* a fixed cost for the message, what waits there, and its blocks, at the rate that it announces, corrected by what this client
saw (`observed`). A pass without a session waits besides until the server has done those that this client has asked it for before.

*On the way:* a token goes from the client to the first server, from server to server, and from the last one to the client; each way takes
half of a round trip. The client has measured its own. Of two servers the round trip is what they have measured themselves and announce, the
larger one where both do, and never less than the difference of the client's round trips to them, which is what the triangle allows: so
nobody comes closer to others by a lie than the client's own clock lets him. Where neither says, it is the sum of the client's round trips:
no more than that is needed, since the client can carry the token itself. Servers that announce one public address stand in one house.

Where servers do not send on to each other, each token comes back to the client after each server, which is that same sum.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from petalnet.routing.observed import LEAST_WAIT_S, NOTHING_SEEN, Observed, Speed, of_single
from petalnet.routing.records import ServerRecord, Work

HOP_S = 0.001
"""Seconds that a hop costs beside its ways and its blocks: framing, encryption, two wake-ups."""
UNKNOWN_ROUND_TRIP_S = 0.1
"""Assumed for a server that was never measured: a far one on the internet, so that measured near ones are preferred."""
SAME_HOUSE_S = 0.002
"""The round trip between servers behind one public address that have not measured it."""
LONGEST_ROUND_TRIP_S = 60.0
FASTEST_BLOCK_S: Mapping[Work, float] = {"decode": 1e-5, "prefill": 1e-8, "forward": 1e-8}
"""Counted at least for a token and block: what the quickest devices need for blocks of next to no weights. More is not believed."""
OWN_SHARE = 0.5
"""The time of the user's own servers counts so much: what they do costs nobody else anything, and what they see goes nowhere."""
LAST_RESORT_NS = 10**15
"""Counted for each server of a route that has no room or is in doubt: eleven days, so that it is taken only where nobody else holds some
block."""
MOST_IN_A_HOUSE = 32
"""Servers that may announce one address before that says nothing any more."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """What a client knows of servers beside their records.

    Attributes:
        round_trip: seconds to a server and back, None where it was not measured.
        direct: whether servers send on to each other; otherwise all goes through the client.
        own: servers on the user's own machine.
        cut: (server, server after it) whose link did not open, or broke, lately: the client carries what goes there.
        doubtful: servers that have failed and not been seen to work since, or were late a moment ago.
        observed: how quick servers were so far.
        under_way: server → tokens × blocks of passes that this client waits for there, which come before the next pass.
        clock: the time by which `observed` goes, seconds.
    """

    round_trip: Callable[[str], float | None]
    direct: bool = True
    own: Collection[str] = frozenset()
    cut: Collection[tuple[str, str]] = frozenset()
    doubtful: Collection[str] = frozenset()
    observed: Observed | None = None
    under_way: Mapping[str, float] = field(default_factory=dict)
    clock: float = 0.0


class Cost(NamedTuple):
    """Nanoseconds of a step in a server: whatever it does, and for each block; and until the server is free for it, counted from when the
    first one of the route is sent the step."""

    fixed_ns: int
    block_ns: int
    free_ns: int = 0


class HopTime(NamedTuple):
    """What is expected of one server, in seconds.

    Attributes:
        speed: by what rate.
        block_s: of the whole step in one block.
        queue_s: waiting.
        round_trip_s: between the client and the server; None where it is not known.
    """

    speed: Speed
    block_s: float
    queue_s: float
    round_trip_s: float | None


class Expected:
    """What steps of one kind are expected to take at and between servers.

    Args:
        records: one a server.
        work, tokens: the kind of steps, and rows × new tokens.
    """

    def __init__(self, records: Iterable[ServerRecord], client: Client, *, work: Work = "decode", tokens: int = 1) -> None:
        self.records = {record.peer_id: record for record in records}
        self.client = client
        self.work: Work = work
        self.tokens = tokens
        # Passes without a session go hop by hop through the client.
        self.direct = client.direct and work != "forward"
        self._half: dict[str, int] = {}
        self._costs: dict[str, Cost] = {}

    def half(self, peer_id: str) -> int:
        """The way between the client and a server, ns."""
        known = self._half.get(peer_id)
        if known is None:
            measured_s = self.client.round_trip(peer_id)
            trip_s = UNKNOWN_ROUND_TRIP_S if measured_s is None else min(max(measured_s, 0.0), LONGEST_ROUND_TRIP_S)
            known = self._half[peer_id] = round(trip_s / 2 * 1e9)
        return known

    def cost(self, peer_id: str) -> Cost:
        """What a step costs in a server."""
        known = self._costs.get(peer_id)
        if known is None:
            time = self.hop_time(peer_id)
            factor = OWN_SHARE if peer_id in self.client.own else 1.0
            free_s = self._free_s(peer_id, time.speed.block_s)
            known = Cost(round((HOP_S + time.queue_s) * factor * 1e9), round(time.block_s * factor * 1e9), round(free_s * factor * 1e9))
            self._costs[peer_id] = known
        return known

    def hop_time(self, peer_id: str) -> HopTime:
        """What is expected of a server, by its parts."""
        record, client = self.records[peer_id], self.client
        speed = (client.observed or NOTHING_SEEN).speed(record, self.work, client.clock)
        block_s = max(speed.block_s, FASTEST_BLOCK_S[self.work])
        single = of_single(record, self.work, self.tokens)
        queue_s = self._queue_s(record, block_s)
        if speed.queue is not None and abs(change_s := speed.queue.with_prior(queue_s) - queue_s) >= LEAST_WAIT_S:
            queue_s += change_s
        return HopTime(speed, block_s * single, queue_s, client.round_trip(peer_id))

    def _queue_s(self, record: ServerRecord, block_s: float) -> float:
        """Seconds of waiting, where what waits there is requests like ours through the whole span.

        Steps of a few tokens wait for half of the round under way and share the next one; longer work waits for all that is before it.
        """
        waiting = record.queue
        if not waiting:
            return 0.0
        pass_s = block_s * (record.span[1] - record.span[0])
        if self.work != "decode":
            return waiting * pass_s * self.tokens
        under_way, next_round = (of_single(record, "decode", self.tokens * count) for count in (waiting, waiting + 1))
        return pass_s * (under_way / 2 + next_round - of_single(record, "decode", self.tokens))

    def _free_s(self, peer_id: str, block_s: float) -> float:
        """Seconds until a server has done what this client has asked it for. Steps of sessions are run before passes."""
        return block_s * self.client.under_way.get(peer_id, 0.0) if self.work == "forward" else 0.0

    def between(self, one: str, other: str) -> int:
        """The way from one server to another, ns."""
        known = self.known_ways.get(other, _NO_WAYS).get(one)
        return self.half(one) + self.half(other) if known is None else known

    @cached_property
    def known_ways(self) -> Mapping[str, Mapping[str, int]]:
        """Server → the one before it → the way between them, ns, where more is known of it than the client's round trips."""
        ways: dict[str, dict[str, int]] = defaultdict(dict)
        if not self.direct:
            return ways
        for peer_id, record in self.records.items():
            for other, seconds in record.next_round_trips:
                if other in self.records and other != peer_id:
                    way = round(min(seconds, LONGEST_ROUND_TRIP_S) / 2 * 1e9)
                    # Who is slow to answer the other may be so to all: of two that were measured the longer is the safer guess.
                    ways[peer_id][other] = ways[other][peer_id] = max(way, ways[peer_id].get(other, 0))
        for house in _houses(self.records.values()):
            for one in house:
                for other in house:
                    if one != other:
                        ways[one].setdefault(other, round(SAME_HOUSE_S / 2 * 1e9))
        for one, others in ways.items():
            for other, way in others.items():
                if self.client.round_trip(one) is not None and self.client.round_trip(other) is not None:
                    others[other] = max(way, abs(self.half(one) - self.half(other)))
        for one, other in self.client.cut:
            if one in self.records and other in self.records:
                ways[other][one] = self.half(one) + self.half(other) + round(HOP_S * 1e9)
        return ways

    def route_ns(self, chain: Sequence[tuple[int, str]], end: int) -> int:
        """What a step takes along a chain of (first block, server) that ends before block `end`."""
        total = self.half(chain[0][1]) + self.half(chain[-1][1])
        for (first, peer_id), (stop, after) in zip(chain, [*chain[1:], (end, "")], strict=True):
            cost = self.cost(peer_id)
            total += cost.fixed_ns + (stop - first) * cost.block_ns
            if after:
                total += self.between(peer_id, after)
        return total


def _houses(records: Iterable[ServerRecord]) -> Iterable[list[str]]:
    """Servers that announce one public IP address, where they are a few."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for addr in record.addrs:
            parts = addr.split("/")
            if len(parts) > 2 and parts[1] in ("ip4", "ip6") and "p2p-circuit" not in parts:
                found[parts[2]].add(record.peer_id)
    for ip, house in found.items():
        if 1 < len(house) <= MOST_IN_A_HOUSE and _is_public(ip):
            yield sorted(house)


def _is_public(ip: str) -> bool:
    try:
        return ipaddress.ip_address(ip).is_global
    except ValueError:
        return False


_NO_WAYS: Mapping[str, int] = {}
