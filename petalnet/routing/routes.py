"""The chain of servers through a range of blocks that takes the least expected time.

The time of a hop is its round trip, a fixed cost for handling the message, the work that waits there, and the blocks times what a
block takes there. A server may be left before the end of its span and entered in its middle. Times are whole nanoseconds, so that
equal costs compare equal and the choice does not depend on the order of the records: then fewer hops win, then the smaller chain of
(first block, peer id).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from petalnet.errors import MissingBlocksError
from petalnet.routing.records import SLOWEST_BLOCK_S, ServerRecord
from petalnet.routing.records import Work as Work
from petalnet.routing.swarm import missing_blocks
from petalnet.routing.versions import versions

HOP_S = 0.001
"""Seconds that a hop costs beside its round trip and its blocks: framing, encryption, two wake-ups."""
UNKNOWN_ROUND_TRIP_S = 0.1
"""Assumed for a server that was never measured: a far one on the internet, so that measured near ones are preferred."""
UNKNOWN_BLOCK_S = 0.01
"""Seconds a token and block of a server that announces no rate: slow, so that measured ones are preferred."""
SPREAD = 2.0
"""With `rng`, a server's cost is multiplied by a random factor up to this: those within it share the load."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One server of a route and the blocks [first, end) that it is to run.

    Attributes:
        decode_s: expected seconds of one token alone through these blocks, by the rate that the server announces; 0 where it does not.
        prefill_s: the same for each token of a prompt. Two hops are equal whatever is expected of them.
        dtype: what the server computes in, as it announces it.
    """

    peer_id: str
    addrs: tuple[str, ...]
    first: int
    end: int
    decode_s: float = field(default=0.0, compare=False)
    prefill_s: float = field(default=0.0, compare=False)
    dtype: str = field(default="", compare=False)


class _Cost(NamedTuple):
    fixed_ns: int
    block_ns: int


class _Path(NamedTuple):
    """A chain that ends somewhere; paths compare by time, then hops, then the chain itself."""

    ns: int
    hops: int
    chain: tuple[tuple[int, str], ...]


def find_route(
    records: Iterable[ServerRecord],
    first: int,
    end: int,
    *,
    round_trip: Callable[[str], float | None],
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
        round_trip: seconds to a peer and back, None where it was not measured.
        now: unix seconds.
        work: which of the announced rates counts.
        tokens: tokens that go through in one go (rows × new tokens).
        rng: spreads load: the route then takes at most `SPREAD` times as long as the quickest, and routes differ from call to call.
        expected: block → digest of the version that was asked for; see `versions`.
        kv_tokens: room that is needed on each server: those that announce less are left out where the others suffice.
        like: records of servers in whose place others are to go on: for each block that these hold, only servers that announce the same
            digest (where these announce one), dtype and quantization.

    Raises:
        ValueError: the range is empty, or tokens < 1.
        MissingBlocksError: no server, or no server of the version that holds the rest, has some of the blocks.
    """
    if not 0 <= first < end or tokens < 1:
        raise ValueError(f"no route leads through blocks {first}:{end} for {tokens} tokens")
    usable = _newest(record for record in records if record.expires > now)
    if like:
        kinds = {(record.dtype, record.quantization) for record in like}
        usable = [record for record in usable if (record.dtype, record.quantization) in kinds]
    if kv_tokens and not missing_blocks(roomy := [record for record in usable if record.free_kv_tokens >= kv_tokens], first, end):
        usable = roomy
    missing = missing_blocks(usable, first, end)
    if missing:
        raise MissingBlocksError(missing, (record.peer_id for record in usable))
    costs = {record.peer_id: _cost(record, round_trip(record.peer_id), work, tokens, rng) for record in usable}
    known = versions(usable, expected=expected)
    gaps = [missing_blocks(version, first, end) for version in known]
    # The first that has all blocks, not the quickest: two calls in a row should not give answers of two versions.
    whole = next((version for version, gap in zip(known, gaps, strict=True) if not gap), None)
    if whole is None:
        hint = "the servers that have them hold other weights than "
        hint += "those that hold the rest of the model" if expected is None else "the ones that were asked for"
        nearest: list[int] = min(gaps, key=len)
        raise MissingBlocksError(nearest, (record.peer_id for record in usable), hint=hint)
    by_peer = {record.peer_id: record for record in usable}
    chain = _quickest(whole, costs, first, end).chain
    ends = [start for start, _ in chain[1:]] + [end]
    return [_hop(by_peer[peer_id], start, stop) for (start, peer_id), stop in zip(chain, ends, strict=True)]


def route_time(
    hops: Iterable[Hop],
    records: Iterable[ServerRecord],
    *,
    round_trip: Callable[[str], float | None],
    work: Work = "decode",
    tokens: int = 1,
) -> float:
    """Expected seconds of one pass along a route; `records` has the record of every hop's server."""
    by_peer = {record.peer_id: record for record in _newest(records)}
    total_ns = 0
    for hop in hops:
        cost = _cost(by_peer[hop.peer_id], round_trip(hop.peer_id), work, tokens, None)
        total_ns += cost.fixed_ns + (hop.end - hop.first) * cost.block_ns
    return total_ns / 1e9


def _hop(record: ServerRecord, first: int, end: int) -> Hop:
    blocks = record.span[1] - record.span[0]
    decode_s, prefill_s = (
        (end - first) * min(1 / (rate * blocks), SLOWEST_BLOCK_S) if rate > 0 else 0.0
        for rate in (record.decode_tokens_s, record.prefill_tokens_s)
    )
    return Hop(record.peer_id, record.addrs, first, end, decode_s, prefill_s, record.dtype)


def _newest(records: Iterable[ServerRecord]) -> list[ServerRecord]:
    newest: dict[str, ServerRecord] = {}
    for record in records:
        known = newest.get(record.peer_id)
        if known is None or record.sequence > known.sequence:
            newest[record.peer_id] = record
    return [newest[peer_id] for peer_id in sorted(newest)]


def _cost(record: ServerRecord, round_trip_s: float | None, work: Work, tokens: int, rng: Random | None) -> _Cost:
    rate = {"decode": record.decode_tokens_s, "prefill": record.prefill_tokens_s, "forward": record.forward_tokens_s}[work]
    blocks = record.span[1] - record.span[0]
    block_s = min(1 / (rate * blocks), SLOWEST_BLOCK_S) if rate > 0 else UNKNOWN_BLOCK_S
    trip_s = UNKNOWN_ROUND_TRIP_S if round_trip_s is None else max(round_trip_s, 0.0)
    # What waits there is taken to be requests like ours through the whole span.
    fixed_s = trip_s + HOP_S + record.queue * block_s * blocks * tokens
    factor = rng.uniform(1.0, SPREAD) if rng is not None else 1.0
    return _Cost(round(fixed_s * factor * 1e9), round(block_s * tokens * factor * 1e9))


def _quickest(records: Iterable[ServerRecord], costs: Mapping[str, _Cost], first: int, end: int) -> _Path:
    """The best path over records that cover [first, end): one pass over the blocks, with the best path so far that ends in each server."""
    entering: list[list[ServerRecord]] = [[] for _ in range(first, end)]
    for record in records:
        if record.span[0] < end and record.span[1] > first:
            entering[max(record.span[0], first) - first].append(record)
    here = _Path(0, 0, ())
    active: list[ServerRecord] = []
    ongoing: dict[str, _Path] = {}
    for block in range(first, end):
        active = [record for record in active if record.span[1] > block] + entering[block - first]
        reached: dict[str, _Path] = {}
        for record in active:
            fixed_ns, block_ns = costs[record.peer_id]
            path = _Path(here.ns + fixed_ns, here.hops + 1, (*here.chain, (block, record.peer_id)))
            staying = ongoing.get(record.peer_id)
            if staying is not None and staying < path:
                path = staying
            reached[record.peer_id] = path._replace(ns=path.ns + block_ns)
        ongoing = reached
        here = min(reached.values())
    return here
