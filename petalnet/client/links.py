"""The streams of one inference session to the servers of its route: opened in parallel, with one id for all, and closed together.

Runs on the portal's thread.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from petalnet.client.requests import Busy, Target, ask, blaming, open_stream
from petalnet.errors import CallerError, ServerError
from petalnet.p2p.fields import Message
from petalnet.p2p.messages import OpenSession, Progress, SessionOpened
from petalnet.routing.routes import Hop

if TYPE_CHECKING:
    from petalnet.p2p.host import Stream

logger = logging.getLogger(__name__)

CLOSE_WITHIN_S = 2.0


@dataclass
class Link:
    """One hop of a session and the stream to its server.

    Attributes:
        opened: what the server said of itself.
        onward: what is to be sent to it because of what others said, in this order.
        has_onward: where its task waits for more of that.
        replied: set when `reply` is there, the answer to a request that is no step; None where there is no such request.
        has_progress: set when `progress` is there, the answer to the latest `AskProgress`; None where nobody waits for one.
    """

    hop: Hop
    stream: Stream
    opened: SessionOpened
    onward: deque[Message] = field(default_factory=deque)
    has_onward: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    replied: trio.Event | None = None
    reply: Message | None = None
    has_progress: trio.Event | None = None
    progress: Progress | None = None


async def open_links(target: Target, hops: Sequence[Hop], max_length: int, promise_rows: int) -> list[Link]:
    """A session of `max_length` KV entries a row on each server of a route, with room for `promise_rows` rows; all of them or none.

    Raises: Busy, CallerError, ServerError: that of several servers' errors which is to be acted on (see `gravity`).
    """
    session = secrets.token_hex(16)
    peers = ["", *(hop.peer_id for hop in hops), ""] if target.settings.direct_chains else [""] * (len(hops) + 2)
    links: dict[int, Link] = {}
    failures: list[BaseException] = []

    async def open_link(index: int) -> None:
        hop = hops[index]
        request = OpenSession(
            session=session,
            model=target.model,
            first=hop.first,
            end=hop.end,
            max_length=max_length,
            promise_rows=promise_rows,
            takes_from=peers[index],
            pushes_to=peers[index + 2],
        )
        try:
            links[index] = await _open_link(target, hop, request)
        except (ServerError, Busy, CallerError) as error:
            failures.append(error)

    try:
        async with trio.open_nursery() as nursery:
            for index in range(len(hops)):
                nursery.start_soon(open_link, index)
    except BaseException:  # a cancellation, most likely: whatever it is goes on, and leaves no stream behind
        await close_links(links.values())
        raise
    if failures:
        await close_links(links.values())
        raise min(failures, key=gravity)
    return [links[index] for index in range(len(hops))]


async def _open_link(target: Target, hop: Hop, request: OpenSession) -> Link:
    from petalnet.p2p.protocols import INFERENCE

    async with blaming(target, hop):
        stream = await open_stream(target, hop, INFERENCE)
        try:
            opened = await ask(stream, request, SessionOpened)
        except BaseException:  # likewise
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_WITHIN_S):
                await stream.reset()
            raise
        return Link(hop, stream, opened)


async def close_links(links: Iterable[Link]) -> None:
    """Say goodbye to every server, which frees the KV there. Bounded; never raises for a dead server."""

    async def close(link: Link) -> None:
        try:
            await link.stream.close()
        except ServerError as error:
            logger.debug("a stream to %s was not closed cleanly: %s", link.hop.peer_id, error)

    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_WITHIN_S):
        async with trio.open_nursery() as nursery:
            for link in links:
                nursery.start_soon(close, link)


def gravity(error: BaseException) -> int:
    """Of several servers' errors the one to act on: the caller's fault first, since no other route would help; busy last."""
    return 0 if isinstance(error, CallerError) else 1 if isinstance(error, ServerError) else 2
