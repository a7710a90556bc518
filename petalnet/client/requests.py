"""Requests to servers: which server gets one, what its answer must be, and what an error of it means.

Runs on the portal's thread. An error has a class (see `errors`): the caller's fault is raised at once; a full server is gone round or
waited for; whatever else goes wrong is the server's fault, which is out of the routes in the same instant.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import trio

from petalnet.client.attempts import Busy, Full, Retries
from petalnet.client.settings import ClientSettings
from petalnet.client.swarm import Swarm
from petalnet.errors import (
    BusyError,
    CallerError,
    MissingBlocksError,
    PeerLate,
    PeerLost,
    PeerUnreachable,
    ProtocolError,
    ServerError,
    TooLargeError,
    describe_blocks,
    short_id,
)
from petalnet.p2p.fields import Blob, Message, blob_size
from petalnet.p2p.messages import Error
from petalnet.routing.routes import Hop, Work

if TYPE_CHECKING:
    from petalnet.p2p.host import Stream
    from petalnet.p2p.protocols import Protocol
    from petalnet.routing.records import ServerRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")
Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which blocks of which model, in which swarm, and how to treat its servers."""

    swarm: Swarm
    model: str
    first: int
    end: int
    settings: ClientSettings


async def retrying(
    target: Target, attempt: Callable[[frozenset[str]], Awaitable[T]], full: Full | None = None, *, at_stake: bool = False
) -> T:
    """`attempt(servers to do without)` until it succeeds, within the bounds of the target's settings.

    Args:
        full: servers that are known to have no room, and how long they have been waited for; others that are met are added.
        at_stake: whether something was computed that would be lost: then somebody who holds the blocks that nobody holds any more is waited
            for.

    A server's fault is tried again elsewhere (the server is out of the routes by then, one that was late is left out as long as others hold
    its blocks), a full server is left out of the next tries until nobody else holds its blocks, then waited for; one that is too small is
    not.

    Raises: the last error, which tells what all servers answered that were asked:
        CallerError: at once.
        MissingBlocksError: at once, or with something at stake when patience is used up.
        ServerError: when the retries are used up.
        BusyError: when patience is.
    """
    full = full or Full(target.settings)
    retries = Retries(target.settings)
    late: set[str] = set()
    while True:
        try:
            return await attempt(full.peers | late)
        except Busy as busy:
            full.add(busy)
            retries.attempts.note(busy.peer_id, busy.error)
        except MissingBlocksError as error:
            if late:
                late.clear()
            else:
                await retries.missing(error, full, at_stake=at_stake)
        except CallerError:
            raise
        except ServerError as error:
            if isinstance(error, PeerLate) and error.peer_id is not None:
                late.add(error.peer_id)
            await retries.after(error, at_stake=at_stake)


async def find_hops(
    target: Target,
    full: frozenset[str] = frozenset(),
    work: Work = "decode",
    tokens: int = 1,
    kv_tokens: int = 0,
    like: Sequence[ServerRecord] | None = None,
) -> list[Hop]:
    """The route that a request to the target takes now.

    Args:
        full: servers to do without; where only these hold some block, nobody else is looked for.
        work, tokens: what it is for, and how much.
        kv_tokens: room that a session takes on each server.
        like: records of servers whose work these are to go on with; None where there is none.
    Raises:
        MissingBlocksError, ServerError.
    """
    settings = target.settings
    return await target.swarm.membership.route(
        target.model,
        target.first,
        target.end,
        allowed=settings.allowed_servers,
        precisions=settings.precisions,
        blocked=settings.blocked_servers | full,
        work=work,
        tokens=tokens,
        look=not full,
        kv_tokens=kv_tokens,
        like=like or None,
        direct=settings.direct_chains,
        adapter=settings.active_adapter,
    )


def describe_route(hops: list[Hop]) -> str:
    return " → ".join(f"{hop.first}:{hop.end} at {short_id(hop.peer_id)}" for hop in hops)


async def open_stream(target: Target, hop: Hop, protocol: Protocol) -> Stream:
    """A stream to the hop's server."""
    host = target.swarm.membership.host
    return await host.open_stream(hop.peer_id, protocol, addrs=hop.addrs, timeout_s=target.settings.connect_timeout)


async def ask(stream: Stream, request: Message, expected: type[Answer]) -> Answer:
    """Send a request and receive its answer, which is of the expected type.

    Raises: the error that was answered; PeerLost, ProtocolError.
    """
    await stream.send(request)
    return await receive_answer(stream, expected)


async def receive_answer(stream: Stream, expected: type[Answer]) -> Answer:
    """The next answer on a stream, which is of the expected type. Raises: as `ask`."""
    answer = await stream.receive()
    if type(answer) is expected:
        return answer
    if isinstance(answer, Error):
        raise answer.exception(stream.peer_id)
    if answer is None:
        raise PeerLost("the server closed the stream", stream.peer_id)
    raise ProtocolError(f"answered {answer.name} instead of {expected.name}", stream.peer_id)


@asynccontextmanager
async def blaming(target: Target, hop: Hop) -> AsyncIterator[None]:
    """What goes wrong inside is the fault of the hop's server, unless its error says otherwise; bounded by the request time-out.

    A BusyError or TooLargeError becomes `Busy`.
    """
    try:
        with trio.fail_after(target.settings.request_timeout):
            yield
    except trio.TooSlowError:
        raise blamed(target, hop, silent(target, hop)) from None
    except (ServerError, BusyError, TooLargeError) as error:
        raise blamed(target, hop, error) from error


def blamed(target: Target, hop: Hop, error: Exception, before: Hop | None = None) -> Exception:
    """What an error that came of a request to a hop's server is for whoever made the request.

    A server's fault takes the server out of the routes and names it; BusyError and TooLargeError become `Busy`; others are as they are.

    Args:
        before: the hop whose server brought the request, where this client did not: either of the two may be wrong, so both are only
            doubted, unless the hop's server is gone.
    """
    membership = target.swarm.membership
    if isinstance(error, ServerError):
        if isinstance(error, PeerLate):
            membership.mark_late(hop.peer_id)
        elif isinstance(error, (PeerLost, PeerUnreachable)):
            membership.mark_failed(hop.peer_id)
        elif before is not None:
            membership.mark_late(before.peer_id)
            membership.mark_late(hop.peer_id)
        else:
            membership.mark_failed(hop.peer_id, wrong=True)
        return type(error)(f"{_describe(hop)}: {error}", hop.peer_id, said=str(error))
    if isinstance(error, (BusyError, TooLargeError)):
        return Busy(error, hop.peer_id)
    return error


def silent(target: Target, hop: Hop) -> PeerLost:
    """What there is to say of a server that did not answer in time."""
    return PeerLost(f"no answer within {target.settings.request_timeout:g} s", hop.peer_id)


def _describe(hop: Hop) -> str:
    return f"server {hop.peer_id} ({describe_blocks(range(hop.first, hop.end))})"


def checked(output: Blob, given: Blob, hop: Hop, all_hidden: bool) -> Blob:
    """What the next hop gets, from an answer that was checked to have the shape and dtype of what was sent."""
    shape = (hop.end - hop.first, *given.shape) if all_hidden else given.shape
    if output.shape != shape or output.dtype != given.dtype:
        raise ProtocolError(f"answered {output.dtype} {list(output.shape)} instead of {given.dtype} {list(shape)}", hop.peer_id)
    return last_of(output) if all_hidden else output


def last_of(blob: Blob) -> Blob:
    """The last entry along the first dimension."""
    return part_of(blob, blob.shape[0] - 1, blob.shape[0], drop_dimension=True)


def part_of(blob: Blob, start: int, stop: int, *, drop_dimension: bool = False) -> Blob:
    """Entries [start, stop) along the first dimension, without a copy. Not for codec int8."""
    if blob.codec == "int8":
        raise ProtocolError(f"an array of codec {blob.codec} cannot be cut")
    size = blob_size(blob.dtype, blob.shape[1:], blob.codec)
    shape = blob.shape[1:] if drop_dimension else (stop - start, *blob.shape[1:])
    return Blob(blob.dtype, shape, blob.codec, memoryview(blob.data)[start * size : stop * size])


def joined(blobs: list[Blob]) -> Blob:
    """Raw arrays one after another along the first dimension."""
    if len(blobs) == 1:
        return blobs[0]
    return Blob(blobs[0].dtype, (sum(blob.shape[0] for blob in blobs), *blobs[0].shape[1:]), "raw", b"".join(blob.data for blob in blobs))


def prompts_of(prompts: Blob | None, target: Target, hop: Hop) -> Blob | None:
    """Of the prompts for all blocks of the target those for the hop's."""
    return None if prompts is None else part_of(prompts, hop.first - target.first, hop.end - target.first)
