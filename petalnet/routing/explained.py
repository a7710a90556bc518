"""Why a route is taken: what each of its hops is expected to take and from what this follows, the next best routes, and who was left out.

All times are seconds as they are expected to be; a preference for the user's own servers, which the choice knows, is no time and is said
in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from petalnet.errors import MissingBlocksError
from petalnet.routing.expected import HOP_S, Client, Expected
from petalnet.routing.records import ServerRecord, Work
from petalnet.routing.routes import Choice, choose

RUNNERS_UP = 3
SAME_S = 5e-5
"""Times that differ by less are shown as equal."""


@dataclass(frozen=True)
class Parts:
    """What a step is expected to take along a route, in seconds: on the ways, in the servers' handling, waiting, and computing."""

    way_s: float
    handling_s: float
    queue_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return self.way_s + self.handling_s + self.queue_s + self.compute_s


def explain(
    records: Sequence[ServerRecord],
    first: int,
    end: int,
    client: Client,
    *,
    now: float,
    work: Work = "decode",
    tokens: int = 1,
    kv_tokens: int = 0,
) -> dict[str, Any]:
    """The route through blocks [first, end) and why, ready for JSON. Arguments and errors are those of `choose`.

    Returns:
        `{"seconds", "way_s", "handling_s", "queue_s", "compute_s", "way_back_s", "hops": [{"peer_id", "blocks", "way_s", "way", …}, …],
        "runners_up": [{"hops": [{"peer_id", "blocks"}, …], "seconds", "loses"}, …], "left_out": [{"peer_id", "blocks", "why"}, …]}`
    """
    best = choose(records, first, end, client, now=now, work=work, tokens=tokens, kv_tokens=kv_tokens)
    parts = parts_of(best)
    others: dict[tuple[tuple[int, str], ...], Choice] = {}
    for _, peer_id in best.chain:
        try:
            without = [record for record in records if record.peer_id != peer_id]
            found = choose(without, first, end, client, now=now, work=work, tokens=tokens, kv_tokens=kv_tokens)
        except MissingBlocksError:
            continue
        others.setdefault(found.chain, found)
    ranked = sorted(others.values(), key=lambda choice: (_resorts(choice), choice.seconds, len(choice.chain), choice.chain))
    _, last = best.chain[-1]
    return {
        "seconds": parts.seconds,
        "way_s": parts.way_s,
        "handling_s": parts.handling_s,
        "queue_s": parts.queue_s,
        "compute_s": parts.compute_s,
        "way_back_s": best.expected.half(last) / 1e9,
        "hops": _hops(best),
        "runners_up": [
            {"hops": _spans(other), "seconds": parts_of(other).seconds, "loses": _loses(best, other)} for other in ranked[:RUNNERS_UP]
        ],
        "left_out": list(_left_out(records, best, kv_tokens, now)),
    }


def parts_of(choice: Choice) -> Parts:
    """What a route takes, by its parts."""
    expected = choice.expected
    peers = [peer_id for _, peer_id in choice.chain]
    ways = expected.half(peers[0]) + expected.half(peers[-1]) + sum(expected.between(one, other) for one, other in pairwise(peers))
    times = [expected.hop_time(peer_id) for peer_id in peers]
    return Parts(
        ways / 1e9,
        HOP_S * len(peers),
        sum(time.queue_s for time in times),
        sum(time.block_s * (stop - start) for time, (start, stop) in zip(times, _blocks(choice), strict=True)),
    )


def _blocks(choice: Choice) -> list[tuple[int, int]]:
    starts = [start for start, _ in choice.chain]
    return list(zip(starts, [*starts[1:], choice.end], strict=True))


def _spans(choice: Choice) -> list[dict[str, Any]]:
    return [
        {"peer_id": peer_id, "public_name": choice.expected.records[peer_id].public_name, "blocks": list(span)}
        for (_, peer_id), span in zip(choice.chain, _blocks(choice), strict=True)
    ]


def _hops(choice: Choice) -> list[dict[str, Any]]:
    expected = choice.expected
    hops = []
    before = ""
    for shown, (start, stop) in zip(_spans(choice), _blocks(choice), strict=True):
        peer_id = shown["peer_id"]
        record, time = expected.records[peer_id], expected.hop_time(peer_id)
        notes = []
        if peer_id in expected.client.doubtful:
            notes.append("failed or late, nobody else holds some block")
        elif peer_id in choice.last_resort:
            notes.append("too little room, nobody else holds some block")
        if time.speed.announced_s is None:
            rate = "assumed" if not time.speed.seen else "measured here"
        else:
            is_true = time.speed.block_s == time.speed.announced_s
            rate = "announced" if not time.speed.seen else "announced, and seen" if is_true else "corrected"
        hops.append(
            {
                **shown,
                "way_s": (expected.between(before, peer_id) if before else expected.half(peer_id)) / 1e9,
                "way": how_known(expected, before, peer_id),
                "round_trip_s": time.round_trip_s,
                "compute_s": time.block_s * (stop - start),
                "rate": rate,
                "announced_compute_s": None if time.speed.announced_s is None else time.speed.announced_s * (stop - start),
                "queue_s": time.queue_s,
                "queue": record.queue,
                "free_kv_tokens": record.free_kv_tokens,
                "own": peer_id in expected.client.own,
                "dtype": record.dtype,
                "quantization": record.quantization,
                "notes": notes,
            }
        )
        before = peer_id
    return hops


def how_known(expected: Expected, before: str, peer_id: str) -> str:
    """From what the way to a server, from the one before or from the client (""), follows."""
    if not before:
        return "assumed" if expected.client.round_trip(peer_id) is None else "measured"
    if not expected.direct:
        return "through the client"
    if (before, peer_id) in expected.client.cut:
        return "through the client, link broken"
    if expected.known_ways.get(peer_id, {}).get(before) is None:
        return "at most, through the client"
    says = any(
        other == there for here, there in ((before, peer_id), (peer_id, before)) for other, _ in expected.records[here].next_round_trips
    )
    return "measured by them" if says else "one address"


def _resorts(choice: Choice) -> int:
    return sum(peer_id in choice.last_resort for _, peer_id in choice.chain)


def _loses(best: Choice, other: Choice) -> str:
    """Why a route is not the best one, in words."""
    if _resorts(other) > _resorts(best):
        resorts = [peer_id for _, peer_id in other.chain if peer_id in other.last_resort]
        why = "failed or was late" if resorts[0] in other.expected.client.doubtful else "has too little room"
        return f"…{resorts[0][-6:]} {why}"
    mine, theirs = parts_of(best), parts_of(other)
    by_part = {
        "on the way": theirs.way_s - mine.way_s,
        "handling": theirs.handling_s - mine.handling_s,
        "waiting": theirs.queue_s - mine.queue_s,
        "computing": theirs.compute_s - mine.compute_s,
    }
    more = theirs.seconds - mine.seconds
    told = [f"{seconds * 1000:+.1f} ms {what}" for what, seconds in by_part.items() if abs(seconds) >= SAME_S]
    own = best.expected.client.own
    if more < SAME_S and any(peer_id in own for _, peer_id in best.chain):
        return ", ".join(["servers on this machine go first", *told])
    if more < SAME_S:
        more_hops = len(other.chain) - len(best.chain)
        return f"as quick, with {more_hops} hop{'s' * (more_hops > 1)} more" if more_hops > 0 else "as quick; the first by name is taken"
    return ", ".join(told)


def _left_out(records: Iterable[ServerRecord], best: Choice, kv_tokens: int, now: float) -> Iterable[dict[str, Any]]:
    """Usable servers of some of the blocks that had no chance, and why."""
    taken = {peer_id for _, peer_id in best.chain}
    for record in records:
        if record.expires <= now or record.peer_id in taken or not (record.span[0] < best.end and record.span[1] > best.first):
            continue
        why = None
        if record.peer_id in best.expected.client.doubtful:
            why = "failed or was late a moment ago, and was not seen to work since"
        elif record.peer_id in best.last_resort:
            why = f"room for {record.free_kv_tokens} KV tokens, {kv_tokens} are needed"
        elif record.peer_id not in best.expected.records and _contradicts(record, best):
            why = "other weights than the rest of the route"
        if why is not None:
            yield {"peer_id": record.peer_id, "public_name": record.public_name, "blocks": list(record.span), "why": why}


def _contradicts(record: ServerRecord, best: Choice) -> bool:
    mine = dict(enumerate(record.block_digests, record.span[0]))
    return any(
        mine.get(block, digest) != digest
        for _, peer_id in best.chain
        for block, digest in enumerate(best.expected.records[peer_id].block_digests, best.expected.records[peer_id].span[0])
    )
