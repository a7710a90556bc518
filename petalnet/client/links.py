"""The streams of one inference session to the servers of its route: opened in parallel, with one id for all, and closed together.

Runs on the portal's thread.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import trio

from petalnet.client.attempts import Busy
from petalnet.client.lora import Lora
from petalnet.client.lora_uploads import lora_version
from petalnet.client.requests import Target, ask, blamed, open_stream
from petalnet.errors import BusyError, CallerError, LoraGone, PeerLate, ProtocolError, ServerError, TooLargeError
from petalnet.p2p.fields import Message
from petalnet.p2p.pass_messages import LoraPut
from petalnet.p2p.session_messages import OpenSession, Progress, SessionOpened
from petalnet.routing.routes import Hop

if TYPE_CHECKING:
    from petalnet.p2p.host import Stream
    from petalnet.routing.records import ServerRecord

logger = logging.getLogger(__name__)

CLOSE_WITHIN_S = 2.0
OPEN_WITHIN_S = 10.0
"""For a server to open a session, beside the connection: it has nothing to compute for that."""


@dataclass(frozen=True)
class Session:
    """What all servers of a session are told of it.

    Attributes:
        max_length: KV entries that a row may take.
        lora: the client's LoRA parameters that it runs with.
        id: by which servers know steps of it that other servers bring.
    """

    max_length: int
    lora: Lora | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(eq=False)
class Link:
    """One hop of a session and the stream to its server.

    Attributes:
        opened: what the server said of itself.
        record: what it had announced, where that is known.
        index: the hop's number in the chain.
        is_last: whether its blocks are the last ones.
        is_built: whether the server has all of the session's KV entries.
        onward: what is to be sent to it because of what others said, in this order.
        has_onward: where its task waits for more of that.
        is_torn: whether a message was left in the middle, so that no other can follow.
        lost: what became of it, where the chain has to go on without it.
        drains: whether the server is about to leave, and told so.
        is_resuming: whether it was told of new neighbours and has not answered yet: what it says of links concerns the former ones.
        scope: of its tasks.
        replied: set when `reply` is there, the answer to a request that is no step; None where there is no such request.
        progress, has_progress: the answer to the last `AskProgress`, and who waits for it, if anybody does.
    """

    hop: Hop
    stream: Stream
    opened: SessionOpened
    record: ServerRecord | None = None
    index: int = 0
    is_last: bool = False
    is_built: bool = True
    onward: deque[Message] = field(default_factory=deque)
    has_onward: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    is_torn: bool = False
    lost: Exception | None = None
    drains: bool = False
    is_resuming: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    replied: trio.Event | None = None
    reply: Message | None = None
    progress: Progress | None = None
    has_progress: trio.Event | None = None


@dataclass(frozen=True)
class Place:
    """Where a hop stands in its chain: between these peers, "" for none that it has anything to do with."""

    hop: Hop
    takes_from: str = ""
    pushes_to: str = ""


def places_of(hops: Sequence[Hop], direct: bool, cut: Collection[tuple[str, str]] = ()) -> list[Place]:
    """All hops of a chain whose servers send outputs on themselves, or do not.

    Args:
        cut: peers of which the first cannot reach the second.
    """
    ways = [direct and (hop.peer_id, after.peer_id) not in cut for hop, after in pairwise(hops)]
    before = ["", *(hop.peer_id if up else "" for hop, up in zip(hops, ways, strict=False))]
    after = [*(hop.peer_id if up else "" for hop, up in zip(hops[1:], ways, strict=True)), ""]
    return [Place(*place) for place in zip(hops, before, after, strict=True)]


async def open_links(target: Target, hops: Sequence[Hop], session: Session, promise_rows: int) -> list[Link]:
    """A session on each server of a route, with room for `promise_rows` rows; all of them or none.

    Raises: Busy, CallerError, ServerError: that of several servers' errors which is to be acted on (see `gravity`).
    """
    return await open_places(target, places_of(hops, target.settings.direct_chains), session, promise_rows)


async def open_places(target: Target, places: Sequence[Place], session: Session, promise_rows: int) -> list[Link]:
    """`open_links`, of some of a chain's hops."""
    links: dict[int, Link] = {}
    failures: list[Exception] = []

    async def open_link(index: int) -> None:
        try:
            links[index] = await _open_link(target, places[index], session, promise_rows)
        except (ServerError, Busy, CallerError) as error:
            failures.append(error)

    try:
        async with trio.open_nursery() as nursery:
            for index in range(len(places)):
                nursery.start_soon(open_link, index)
    except BaseException:  # a cancellation, most likely: whatever it is goes on, and leaves no stream behind
        await close_links(links.values())
        raise
    if failures:
        await close_links(links.values())
        raise min(failures, key=gravity)
    return [links[index] for index in range(len(places))]


async def _open_link(target: Target, place: Place, session: Session, promise_rows: int) -> Link:
    hop, membership = place.hop, target.swarm.membership
    try:
        try:
            stream, opened = await _open_session(target, place, session, promise_rows)
        except LoraGone:
            membership.lora_uploads.forget(hop.peer_id)
            stream, opened = await _open_session(target, place, session, promise_rows)
    except LoraGone as error:
        raise blamed(target, hop, ProtocolError(f"it has no LoRA parameters that it was given: {error}", hop.peer_id)) from error
    except (ServerError, BusyError, TooLargeError) as error:
        raise blamed(target, hop, error) from error
    return Link(hop, stream, opened, membership.record(hop.peer_id))


async def _open_session(target: Target, place: Place, session: Session, promise_rows: int) -> tuple[Stream, SessionOpened]:
    """What the client brings for it goes before it. Raises the error that was answered; PeerLate."""
    from petalnet.p2p.protocols import INFERENCE

    hop, settings = place.hop, target.settings
    if session.lora is not None:
        await _bring(target, hop, session.lora)
    request = OpenSession(
        session=session.id,
        model=target.model,
        first=hop.first,
        end=hop.end,
        max_length=session.max_length,
        promise_rows=promise_rows,
        takes_from=place.takes_from,
        pushes_to=place.pushes_to,
        adapter=hop.adapter,
        lora=lora_version(session.lora, hop),
    )
    within_s = min(settings.request_timeout, settings.connect_timeout + OPEN_WITHIN_S)
    try:
        with trio.fail_after(within_s):
            stream = await open_stream(target, hop, INFERENCE)
            try:
                opened = await ask(stream, request, SessionOpened)
            except BaseException:  # likewise
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_WITHIN_S):
                    await stream.reset()
                raise
    except trio.TooSlowError:
        raise PeerLate(f"no answer within {within_s:g} s", hop.peer_id) from None
    return stream, opened


async def _bring(target: Target, hop: Hop, lora: Lora) -> None:
    """Have a hop's server given LoRA parameters, unless it was. Raises the error that was answered; PeerLate."""
    from petalnet.p2p.protocols import FORWARD

    membership, within_s = target.swarm.membership, target.settings.request_timeout
    async with membership.lora_uploads.bringing(hop, lora) as message:
        if message is None:
            return
        try:
            with trio.fail_after(within_s):
                stream = await open_stream(target, hop, FORWARD)
                try:
                    await ask(stream, message, LoraPut)
                except BaseException:  # a cancellation, most likely: whatever it is goes on, and leaves no stream behind
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_WITHIN_S):
                        await stream.reset()
                    raise
        except trio.TooSlowError:
            raise PeerLate(f"LoRA parameters were not taken within {within_s:g} s", hop.peer_id) from None
    await membership.idle_streams.keep(stream)


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
