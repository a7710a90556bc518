"""One request of a pass to one server: over a stream that stays open, after what the server needs for it, given up when the server is gone.

A server that hangs breaks no stream: one that takes longer than expected by a wide margin is asked whether it is there at all, and where
it is not, and others hold its blocks, these are tried.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import trio

from petalnet.client.lateness import Lateness
from petalnet.client.lora import Lora
from petalnet.client.requests import Answer, Target, find_hops, open_stream, receive_answer
from petalnet.errors import (
    BusyError,
    CallerError,
    GraphGone,
    LoraGone,
    MissingBlocksError,
    PeerLate,
    PeerLost,
    PetalnetError,
    ProtocolError,
    ServerError,
)
from petalnet.p2p.pass_messages import Backward, Forward, LoraPut
from petalnet.routing.routes import Hop

logger = logging.getLogger(__name__)


async def ask_server(
    target: Target, hop: Hop, request: Forward | Backward, expected: type[Answer], token_s: float, lora: Lora | None = None
) -> Answer:
    """A server's answer, which is of the expected type; given up where the server turns out not to be there any more and others are.

    Args:
        token_s: seconds that each token is expected to take; 0 where that is not known.
        lora: what the request names, where it names a version; the server is given what it does not have.
    Raises: the error that was answered; PeerLate, PeerLost, ProtocolError.
    """
    answer: Answer | None = None
    failure: PetalnetError | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            given = request.hidden if isinstance(request, Forward) else request.grad_output
            await _is_gone(target, hop, math.prod(given.shape[:-1]), token_s)
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            answer = await _ask_with_lora(target, hop, request, expected, lora if request.lora else None)
        except PetalnetError as error:  # raised below, bare: leaving the nursery by it would wrap it into a group
            failure = error
        nursery.cancel_scope.cancel()
    if isinstance(failure, GraphGone) and not (isinstance(request, Backward) and request.hidden is None):
        raise ProtocolError(f"it misses a graph that it does not need: {failure}", hop.peer_id)
    if failure is not None:
        raise failure
    if answer is None:
        raise PeerLate("it does not answer any more, not even pings", hop.peer_id)
    return answer


async def _is_gone(target: Target, hop: Hop, tokens: int, token_s: float) -> None:
    """Wait until a hop's server does not answer pings and others hold its blocks; it is asked when the pass takes long, and less and less
    often."""
    host, lateness = target.swarm.membership.host, Lateness(token_s)
    began, asked = trio.current_time(), 0
    while True:
        round_trip_s = host.round_trip_s(hop.peer_id) or 0.0
        await trio.sleep_until(began + lateness.suspect_after_s(tokens, round_trip_s, asked))
        asked += 1
        try:
            await host.ping(hop.peer_id, lateness.answer_within_s(tokens, round_trip_s))
        except PetalnetError as error:
            logger.info("a pass is late: %s", error)
            try:
                await find_hops(replace(target, first=hop.first, end=hop.end), frozenset({hop.peer_id}), "forward", tokens)
                return
            except (CallerError, MissingBlocksError, ServerError) as nobody:
                logger.info("the pass is waited for: %s", nobody)


async def _ask_with_lora(target: Target, hop: Hop, request: Forward | Backward, expected: type[Answer], lora: Lora | None) -> Answer:
    """Brings what the server has dropped once more."""
    try:
        return await _ask_once(target, hop, request, expected, lora)
    except LoraGone as error:
        logger.debug("LoRA parameters are brought once more: %s", error)
    target.swarm.membership.lora_uploads.forget(hop.peer_id)
    try:
        return await _ask_once(target, hop, request, expected, lora)
    except LoraGone as error:
        raise ProtocolError(f"it has no LoRA parameters that it was given: {error}", hop.peer_id) from error


async def _ask_once(target: Target, hop: Hop, request: Forward | Backward, expected: type[Answer], lora: Lora | None) -> Answer:
    """One request on an idle stream or a new one."""
    from petalnet.p2p.protocols import FORWARD

    membership = target.swarm.membership
    idle = membership.idle_streams
    while True:
        stream = idle.take(hop.peer_id)
        used_before = stream is not None
        if stream is None:
            stream = await open_stream(target, hop, FORWARD)
        in_order = True  # whether the next answer on the stream is the request's
        try:
            unneeded = membership.kept_graphs.untold(hop.peer_id)
            if unneeded is not None:
                await stream.send(unneeded)
            if lora is None:
                await stream.send(request)
            else:
                async with membership.lora_uploads.bringing(hop, lora) as brought:
                    if brought is not None:
                        await stream.send(brought)
                    await stream.send(request)
                    if brought is not None:
                        in_order = False
                        await receive_answer(stream, LoraPut)
                        in_order = True
            answer = await receive_answer(stream, expected)
        except BaseException as error:
            if in_order and isinstance(error, (CallerError, BusyError, GraphGone, LoraGone)):
                await idle.keep(stream)
                raise
            await stream.reset()
            if used_before and isinstance(error, PeerLost):
                continue  # the server has closed it while it was idle, or is gone: a new stream will tell
            raise
        await idle.keep(stream)
        return answer
