"""Mending a chain that has lost servers: others take their place, and only their KV entries are computed anew.

Runs on the portal's thread. `recovery` says what is to be done; here it is done, once: whatever fails meanwhile is raised, and the next try
begins with what stands then. The steps that were not answered are given once more afterwards, by whoever runs them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import trio

from petalnet.client.chain import Chain
from petalnet.client.links import Link, open_places, places_of
from petalnet.client.pipeline import Send
from petalnet.client.recovery import gaps_of, runs_of
from petalnet.client.replacements import replacements
from petalnet.client.visit import Visit
from petalnet.errors import MissingBlocksError, PeerLost, PeerUnreachable, ProtocolError
from petalnet.p2p.session_messages import Resume, Resumed
from petalnet.routing.routes import Hop

RESUME_WITHIN_S = 10.0
"""For a server to go on between other neighbours: a part of a step that it is just computing is finished first."""


class NotMendable(PeerLost):
    """A chain of which nothing is left to go on with."""


async def mend(chain: Chain, visit: Visit, full: frozenset[str]) -> list[Hop]:
    """Have a broken chain stand as before.

    Args:
        visit: the step under way.
        full: servers that have no room.
    Returns:
        those that have taken over.
    Raises:
        MissingBlocksError: nobody holds the blocks of the servers that were lost.
        Busy, CallerError, ServerError: something has failed again.
    """
    exchange, history, target = chain.exchange, chain.history, chain.target
    kept = [link for link in exchange.links if link.lost is None and not link.is_torn and link.is_built]
    gone = [link for link in exchange.links if link not in kept]
    if not kept or not target.settings.direct_chains:
        raise NotMendable("there is nothing to go on with")
    if not visit.is_ordered and visit.order is not None:
        # The survivors that have not had the step are told the order; all others begin with it.
        if not chain.ordering:
            chain.number += 1
            chain.ordering = chain.number
        history.reorder(visit.order)
        visit.is_ordered = True
        chain.order = visit.order

    newcomers = await _find(chain, kept, gone, full)
    for link in kept:
        if link.lost is not None:
            raise link.lost  # it went while others were looked for: its answer would be waited for in vain
    hops = sorted([*(link.hop for link in kept), *newcomers], key=lambda hop: hop.first)
    exchange.leave(gone)
    # Newcomers try every link: a session that is opened without one keeps no outputs, from which others could be rebuilt.
    exchange.cut -= {pair for pair in exchange.cut if pair[0] in {hop.peer_id for hop in newcomers}}
    exchange.resume(hops, kept)
    places = {id(place.hop): place for place in places_of(hops, True, exchange.cut)}
    opened: list[Link] = []
    failures: list[Exception] = []

    async def open_new() -> None:
        rows = max(chain.promised_rows, history.rows)
        try:
            opened.extend(await open_places(target, [places[id(hop)] for hop in newcomers], chain.session, rows))
        except Exception as error:  # not swallowed: raised below, bare, once all others have answered
            failures.append(error)

    requests = []
    for link in kept:
        place = places[id(link.hop)]
        resume = Resume(chain.number, history.position, place.takes_from, place.pushes_to, chain.ordering, chain.order)
        requests.append((link, resume))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_new)
            answers = await exchange.ask_each(requests, Resumed, RESUME_WITHIN_S)
    except BaseException:  # a cancellation, most likely: whatever it is goes on, and leaves no stream behind
        exchange.leave(opened)
        raise
    exchange.join(opened)
    for link, answer in zip(kept, answers, strict=True):
        if isinstance(answer, Exception):
            link.lost = link.lost or answer
            failures.append(answer)
        elif (answer.position, answer.rows) != (history.position, history.rows):
            exchange.fail(link, ProtocolError(f"resumed at {answer.position} with {answer.rows} rows", link.hop.peer_id))
            failures.append(link.lost or ProtocolError("resumed wrongly", link.hop.peer_id))
        elif link.lost is not None:
            failures.append(link.lost)  # it went while others were waited for: that would not be noticed a second time
    if failures:
        raise _told(failures[0], newcomers, chain.avoided)
    exchange.failure = None
    await _rebuild(chain, hops, newcomers)
    for link in opened:
        link.is_built = True
    chain.order, chain.ordering = None, 0
    chain.avoided.clear()
    return newcomers


def _told(failure: Exception, newcomers: Sequence[Hop], avoided: Collection[str]) -> Exception:
    """What a failure comes to. Where a server that had been lost was tried again, since nobody else was there, and is gone indeed, its
    blocks have no server."""
    for hop in newcomers:
        if hop.peer_id in avoided and isinstance(failure, (PeerLost, PeerUnreachable)) and failure.peer_id == hop.peer_id:
            missing = MissingBlocksError(range(hop.first, hop.end), avoided)
            missing.__cause__ = failure
            return missing
    return failure


async def _find(chain: Chain, kept: Sequence[Link], gone: Sequence[Link], full: frozenset[str]) -> list[Hop]:
    """Servers for the blocks that nobody has. Raises MissingBlocksError, ServerError."""
    chain.avoided |= {link.hop.peer_id for link in gone if link.lost is not None}
    chain.avoided -= chain.exchange.cleared
    target, rows = chain.target, max(chain.promised_rows, chain.history.rows)
    found: list[Hop] = []
    for first, end in gaps_of([link.hop for link in kept], target.first, target.end):
        like = [record for hop, record in chain.records if hop.first < end and first < hop.end]
        kv_tokens = rows * chain.session.max_length
        try:
            found += await replacements(target, first, end, like, chain.avoided | full, kv_tokens, look=True)
        except MissingBlocksError:
            # Rather one of those that were lost, if it is in the routes again, than none: it may have started anew, or was not lost at all.
            found += await replacements(target, first, end, like, full, kv_tokens)
    return found


async def _rebuild(chain: Chain, hops: Sequence[Hop], newcomers: Sequence[Hop]) -> None:
    """Have the newcomers compute the session's entries. Raises as `Exchange.run`."""
    exchange, history = chain.exchange, chain.history
    sends: list[Send] = []
    for run in runs_of(hops, newcomers):
        read = history.parts if run.from_kept else history.steps
        requests = read(chain.cut, chain.number + 1)
        chain.number = requests[-1].step
        sends += exchange.pipeline.rebuild(requests, run.first, run.last, from_kept=run.from_kept)
    if sends:
        await exchange.run_again(sends)
