"""The chain of servers through a range of blocks that takes the least expected time.

What servers and the ways between them are expected to take says `expected`. A server may be left before the end of its span and entered in
its middle. Times are whole nanoseconds, so that equal ones compare equal and the choice does not depend on the order of the records: then
fewer hops win, then the smaller chain of (first block, peer id).

The search goes through the blocks once, with the best path so far that ends in each server. Most servers have measured few others, so a
path is gone on with in two ways: over the ways that are known, which are few, and through the best of all other servers, to which the way
is the sum of the client's. This is exact. In a large swarm only the most promising servers of each block are looked at (`_shortlist`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import NamedTuple

from petalnet.errors import MissingBlocksError
from petalnet.routing.expected import LAST_RESORT_NS, Client, Cost, Expected
from petalnet.routing.observed import NOTHING_SEEN
from petalnet.routing.records import ServerRecord
from petalnet.routing.records import Work as Work
from petalnet.routing.swarm import missing_blocks
from petalnet.routing.versions import versions

SPREAD = 2.0
"""With `rng`, a route takes at most so many times as long as the quickest: servers within that share the load."""
DRAWS = 4
"""How often such a route is drawn; where none is quick enough, the quickest is taken."""
MOST_AT_A_BLOCK = 48
"""Servers that hold a block from which on only the best so many are looked at."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One server of a route and the blocks [first, end) that it is to run.

    Attributes:
        decode_s: expected seconds of one token alone through these blocks; 0 where the server announces no rate and none was seen.
        prefill_s: the same for each token of a prompt. Two hops are equal whatever is expected of them.
        dtype: what the server computes in, as it announces it.
        next_bytes_s: bytes a second that its link to the next hop's server was seen to carry, as it announces; 0 where it does not.
        adapter: the LoRA adapter that it is to apply, as its record names it; "" for none.
    """

    peer_id: str
    addrs: tuple[str, ...]
    first: int
    end: int
    decode_s: float = field(default=0.0, compare=False)
    prefill_s: float = field(default=0.0, compare=False)
    dtype: str = field(default="", compare=False)
    next_bytes_s: float = field(default=0.0, compare=False)
    adapter: str = field(default="", compare=False)


class _Path(NamedTuple):
    """A chain that ends somewhere; paths compare by time, then hops, then the chain itself."""

    ns: int
    hops: int
    chain: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Choice:
    """A route that was found, and what it was found among.

    Attributes:
        chain: (first block, server) of each hop.
        first, end: the blocks.
        expected: what is expected of each server that could be used.
        last_resort: of these, those that are taken only where nobody else holds some block.
    """

    chain: tuple[tuple[int, str], ...]
    first: int
    end: int
    expected: Expected
    last_resort: frozenset[str]

    @property
    def seconds(self) -> float:
        """What a step is expected to take along it."""
        return self.expected.route_ns(self.chain, self.end) / 1e9

    @property
    def hops(self) -> list[Hop]:
        ends = [start for start, _ in self.chain[1:]] + [self.end]
        client, records = self.expected.client, self.expected.records
        nexts = [peer_id for _, peer_id in self.chain[1:]] + [""]
        return [
            _hop(records[peer_id], start, stop, client, after)
            for (start, peer_id), stop, after in zip(self.chain, ends, nexts, strict=True)
        ]


def find_route(
    records: Iterable[ServerRecord],
    first: int,
    end: int,
    client: Client,
    *,
    now: float,
    work: Work = "decode",
    tokens: int = 1,
    rng: Random | None = None,
    expected: Mapping[int, str] | None = None,
    kv_tokens: int = 0,
    like: Sequence[ServerRecord] | None = None,
) -> list[Hop]:
    """The quickest route through blocks [first, end), one hop after another, over servers of one version of the model.

    Args:
        records: servers of the model that may be used; expired ones are left out.
        client: what is known of them beside that.
        now: unix seconds.
        work: which of the announced rates counts. A forward pass goes hop by hop through the client.
        tokens: tokens that go through in one go (rows × new tokens).
        rng: spreads load: the route then takes at most `SPREAD` times as long as the quickest, and servers that are about as good do
            work in proportion to their speed.
        expected: block → digest of the version that was asked for; see `versions`.
        kv_tokens: room that is needed on each server: those that announce less are left out where there are others.
        like: records of servers in whose place others are to go on: for each block that these hold, only servers that announce the same
            digest (where these announce one), dtype and quantization.

    Raises:
        ValueError: the range is empty, or tokens < 1.
        MissingBlocksError: no server, or no server of the version that holds the rest, has some of the blocks.
    """
    if not like:
        return choose(records, first, end, client, now=now, work=work, tokens=tokens, rng=rng, expected=expected, kv_tokens=kv_tokens).hops
    records = list(records)
    hops: list[Hop] = []
    digests = {record.span[0] + index: digest for record in like for index, digest in enumerate(record.block_digests)}
    for kind, blocks in groupby(range(first, end), key=lambda block: _kind(like, block)):
        start, *rest = blocks
        stop = rest[-1] + 1 if rest else start + 1
        same = [record for record in records if kind is None or (record.dtype, record.quantization) == kind]
        same = [record for record in same if _has_these(record, digests, start, stop)]
        found = choose(same, start, stop, client, now=now, work=work, tokens=tokens, rng=rng, expected=expected, kv_tokens=kv_tokens)
        hops += found.hops
    return hops


def choose(
    records: Iterable[ServerRecord],
    first: int,
    end: int,
    client: Client,
    *,
    now: float,
    work: Work = "decode",
    tokens: int = 1,
    rng: Random | None = None,
    expected: Mapping[int, str] | None = None,
    kv_tokens: int = 0,
) -> Choice:
    """`find_route` with what the route was found among. Arguments and errors are its."""
    if not 0 <= first < end or tokens < 1:
        raise ValueError(f"no route leads through blocks {first}:{end} for {tokens} tokens")
    whole, last_resort = servers_of(records, first, end, client, now=now, expected=expected, kv_tokens=kv_tokens)
    estimate = Expected(whole, client, work=work, tokens=tokens)
    costs = {record.peer_id: _resorted(estimate.cost(record.peer_id), record.peer_id in last_resort) for record in whole}
    ways = {record.peer_id: estimate.half(record.peer_id) for record in whole}
    listed = _shortlist(whole, costs, ways, first, end)
    estimate = Expected(listed, client, work=work, tokens=tokens)
    chain = _quickest(listed, costs, ways, estimate.known_ways, first, end)
    choice = Choice(chain, first, end, estimate, last_resort)
    return choice if rng is None else _drawn(choice, whole, costs, rng)


def servers_of(
    records: Iterable[ServerRecord],
    first: int,
    end: int,
    client: Client,
    *,
    now: float,
    expected: Mapping[int, str] | None = None,
    kv_tokens: int = 0,
) -> tuple[list[ServerRecord], frozenset[str]]:
    """The servers of one version of the model that have some of blocks [first, end), of which they have all together; and those that are
    taken only where nobody else holds some block. Arguments and errors are `find_route`'s."""
    usable = _newest(record for record in records if record.expires > now)
    last_resort = frozenset(record.peer_id for record in usable if record.peer_id in client.doubtful or record.free_kv_tokens < kv_tokens)
    whole = None
    if last_resort:
        whole = _version([record for record in usable if record.peer_id not in last_resort], first, end, expected)
    if whole is None:
        missing = missing_blocks(usable, first, end)
        if missing:
            raise MissingBlocksError(missing, (record.peer_id for record in usable))
        whole = _version(usable, first, end, expected)
    if whole is None:
        hint = "the servers that have them hold other weights than "
        hint += "those that hold the rest of the model" if expected is None else "the ones that were asked for"
        gaps = [missing_blocks(version, first, end) for version in versions(usable, expected=expected)]
        nearest: list[int] = min(gaps, key=len)
        raise MissingBlocksError(nearest, (record.peer_id for record in usable), hint=hint)
    return [record for record in whole if record.span[0] < end and record.span[1] > first], last_resort


def _drawn(choice: Choice, whole: Sequence[ServerRecord], costs: Mapping[str, Cost], rng: Random) -> Choice:
    """A route by chance, so that servers that hold the same blocks are taken in proportion to their speed.

    Of exponentially distributed numbers, each times what a server takes, the least is a server's with a probability in proportion to its
    speed. So the quickest route by such times is taken, if by the expected ones it is quick enough.
    """
    first, end, expected = choice.first, choice.end, choice.expected
    wide = Expected(whole, expected.client, work=expected.work, tokens=expected.tokens)
    slowest = SPREAD * wide.route_ns(choice.chain, end)
    no_ways = dict.fromkeys(costs, 0)
    for _ in range(DRAWS):
        drawn = {}
        for record in whole:
            chance, cost = rng.expovariate(1.0), costs[record.peer_id]
            there_and_back = 2 * wide.half(record.peer_id)
            drawn[record.peer_id] = Cost(round((cost.fixed_ns + there_and_back) * chance), round(cost.block_ns * chance))
        listed = _shortlist(whole, drawn, no_ways, first, end)
        chain = _quickest(listed, drawn, no_ways, {}, first, end)
        resorts = [sum(peer_id in choice.last_resort for _, peer_id in route) for route in (chain, choice.chain)]
        if resorts[0] <= resorts[1] and wide.route_ns(chain, end) <= slowest:
            return Choice(chain, first, end, wide, choice.last_resort)
    return choice


def _version(records: Sequence[ServerRecord], first: int, end: int, expected: Mapping[int, str] | None) -> list[ServerRecord] | None:
    """The servers of the first version of the model that has all blocks; None where none has.

    Not of the quickest: two calls in a row should not give answers of two versions.
    """
    if missing_blocks(records, first, end):
        return None
    return next((version for version in versions(records, expected=expected) if not missing_blocks(version, first, end)), None)


def _newest(records: Iterable[ServerRecord]) -> list[ServerRecord]:
    newest: dict[str, ServerRecord] = {}
    for record in records:
        known = newest.get(record.peer_id)
        if known is None or record.sequence > known.sequence:
            newest[record.peer_id] = record
    return [newest[peer_id] for peer_id in sorted(newest)]


def _kind(like: Sequence[ServerRecord], block: int) -> tuple[str, str] | None:
    """What a block is to be computed in; None where that does not matter."""
    return next(((record.dtype, record.quantization) for record in like if record.holds(block)), None)


def _has_these(record: ServerRecord, digests: Mapping[int, str], first: int, end: int) -> bool:
    """Whether a server announces these bytes for the blocks of [first, end) that it holds."""
    start, stop = max(first, record.span[0]), min(end, record.span[1])
    own = record.block_digests
    return all(block not in digests or (bool(own) and own[block - record.span[0]] == digests[block]) for block in range(start, stop))


def _resorted(cost: Cost, is_last: bool) -> Cost:
    return cost._replace(fixed_ns=cost.fixed_ns + LAST_RESORT_NS) if is_last else cost


def _hop(record: ServerRecord, first: int, end: int, client: Client, after: str) -> Hop:
    decode_s, prefill_s = (
        0.0 if speed.announced_s is None and not speed.seen else (end - first) * speed.block_s
        for speed in ((client.observed or NOTHING_SEEN).speed(record, work, client.clock) for work in ("decode", "prefill"))
    )
    links = zip(record.next_round_trips, record.next_bytes_s, strict=False)
    bytes_s = next((rate for (other, _), rate in links if other == after), 0.0)
    return Hop(record.peer_id, record.addrs, first, end, decode_s, prefill_s, record.dtype, bytes_s)


def _shortlist(
    records: Sequence[ServerRecord], costs: Mapping[str, Cost], ways: Mapping[str, int], first: int, end: int
) -> list[ServerRecord]:
    """The most promising servers where many hold a block: by their time a block, half of them with and half without the way to them.

    Those that are quick but far from the client may still be near each other.
    """
    if len(records) <= MOST_AT_A_BLOCK:
        return list(records)
    kept: set[str] = set()
    for counts_ways in (True, False):
        ranked = []
        for record in records:
            start, stop = max(first, record.span[0]), min(end, record.span[1])
            cost, way = costs[record.peer_id], 2 * ways[record.peer_id] if counts_ways else 0
            ranked.append(((cost.fixed_ns + way) / (stop - start) + cost.block_ns, record.peer_id, start, stop))
        room = [MOST_AT_A_BLOCK // 2] * (end - first)
        for _, peer_id, start, stop in sorted(ranked):
            if any(room[start - first : stop - first]):
                kept.add(peer_id)
                for block in range(start - first, stop - first):
                    room[block] -= room[block] > 0
    return [record for record in records if record.peer_id in kept]


def _quickest(
    records: Iterable[ServerRecord],
    costs: Mapping[str, Cost],
    ways: Mapping[str, int],
    known: Mapping[str, Mapping[str, int]],
    first: int,
    end: int,
) -> tuple[tuple[int, str], ...]:
    """The best chain over records that cover [first, end).

    Args:
        ways: between the client and each server.
        known: server → the one before it → the way between them, where it is not the sum of both.
    """
    entering: list[list[ServerRecord]] = [[] for _ in range(first, end)]
    for record in records:
        entering[max(record.span[0], first) - first].append(record)
    start = _Path(0, 0, ())
    active: list[ServerRecord] = []
    ongoing: dict[str, _Path] = {}
    for block in range(first, end):
        active = [record for record in active if record.span[1] > block] + entering[block - first]
        # Back at the client, by the time that this takes.
        back = sorted((path.ns + ways[peer_id], path.hops, path.chain, peer_id) for peer_id, path in ongoing.items())
        reached: dict[str, _Path] = {}
        for record in active:
            peer_id = record.peer_id
            fixed_ns, block_ns, free_ns = costs[peer_id]
            near = known.get(peer_id, {})
            before = start._replace(ns=ways[peer_id]) if block == first else None
            for ns, hops, chain, other in back:
                if other != peer_id and other not in near:
                    before = _Path(ns + ways[peer_id], hops, chain)
                    break
            for other in ongoing if len(ongoing) < len(near) else near:
                if other in ongoing and other in near:
                    path = ongoing[other]
                    arrived = _Path(path.ns + near[other], path.hops, path.chain)
                    if before is None or arrived < before:
                        before = arrived
            best = ongoing.get(peer_id)
            if before is not None:
                entered = _Path(max(before.ns, free_ns) + fixed_ns, before.hops + 1, (*before.chain, (block, peer_id)))
                best = entered if best is None or entered < best else best
            if best is not None:
                reached[peer_id] = _Path(best.ns + block_ns, best.hops, best.chain)
        ongoing = reached
    return min(_Path(path.ns + ways[peer_id], path.hops, path.chain) for peer_id, path in ongoing.items()).chain
