"""The hops of one inference session, and requests that belong to no session: all that the client says to servers about tensors.

Runs on the portal's thread. A chain has one long-lived stream to each server of its route, opened in parallel. A step visits them one
after another through the client; between two hops the bytes are passed on as they came. An error has a class (see `errors`): the
caller's fault and a full server leave the chain as it is, anything else breaks it, and the server at fault is out of the routes at once.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import trio

from petalnet.client.settings import ClientSettings
from petalnet.client.swarm import Swarm
from petalnet.errors import (
    BusyError,
    CallerError,
    MissingBlocksError,
    PeerLost,
    ProtocolError,
    ServerError,
    describe_blocks,
)
from petalnet.p2p.messages import (
    Backward,
    BackwardDone,
    Blob,
    Error,
    Forward,
    ForwardDone,
    Message,
    OpenSession,
    SessionOpened,
    Step,
    StepDone,
    blob_size,
)
from petalnet.routing.routes import Hop, Work

if TYPE_CHECKING:
    from petalnet.p2p.host import Stream
    from petalnet.p2p.protocols import Protocol

logger = logging.getLogger(__name__)

T = TypeVar("T")
Answer = TypeVar("Answer", bound=Message)

CLOSE_WITHIN_S = 2.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
"""Pause before the second retry, doubled with each further one; the first retry comes at once, since it goes to other servers."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which blocks of which model, in which swarm, and how to treat its servers."""

    swarm: Swarm
    model: str
    first: int
    end: int
    settings: ClientSettings


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What goes through blocks beside the hidden states; see `messages.Step` for shapes. `prompts` is for all blocks of the target."""

    mask: Blob | None = None
    position_ids: Blob | None = None
    prompts: Blob | None = None
    all_hidden: bool = False


class Busy(Exception):
    """A server had no room; internal to the choice of a route."""

    def __init__(self, error: BusyError, peer_id: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.peer_id = peer_id


async def retrying(target: Target, attempt: Callable[[frozenset[str]], Awaitable[T]]) -> T:
    """`attempt(servers to do without)` until it succeeds, within the bounds of the target's settings.

    A server's fault is tried again elsewhere (the server is out of the routes by then), a full server is left out of the next tries until
    nobody else holds its blocks, then waited for.

    Raises:
        CallerError, MissingBlocksError: at once.
        ServerError, BusyError: when the retries are used up.
    """
    full: set[str] = set()
    last: BusyError | None = None
    retries = 0
    failure: BusyError | ServerError
    while True:
        try:
            return await attempt(frozenset(full))
        except Busy as busy:
            full.add(busy.peer_id)
            last = failure = busy.error
            pause = 0.0
        except MissingBlocksError:
            if last is None:
                raise
            full.clear()
            failure, pause, last = last, min(max(last.retry_after_s, FIRST_PAUSE_S), LONGEST_PAUSE_S), None
        except CallerError:
            raise
        except ServerError as error:
            failure = error
            pause = min(FIRST_PAUSE_S * 2 ** (retries - 1), LONGEST_PAUSE_S) if retries else 0.0
        if target.settings.max_retries is not None and retries >= target.settings.max_retries:
            raise failure
        retries += 1
        logger.info("trying again (%d): %s", retries, failure)
        await trio.sleep(pause)


@dataclass(frozen=True)
class Link:
    """One hop of a session and the stream to its server."""

    hop: Hop
    stream: Stream


class Chain:
    """The links of one session, first block to last; `open` makes one."""

    def __init__(self, target: Target, links: list[Link]) -> None:
        self.target = target
        self.links = links
        self._steps = 0

    @classmethod
    async def open(cls, target: Target, max_length: int) -> Chain:
        """Find a route and open a stream with a session of `max_length` KV entries a row on each of its servers.

        Raises: as `retrying`.
        """

        async def attempt(full: frozenset[str]) -> Chain:
            return await cls._open_once(target, max_length, full)

        return await retrying(target, attempt)

    @classmethod
    async def _open_once(cls, target: Target, max_length: int, full: frozenset[str]) -> Chain:
        hops = await find_hops(target, full)
        links: list[Link] = []
        failures: list[BaseException] = []

        async def open_link(hop: Hop) -> None:
            try:
                links.append(await _open_link(target, hop, max_length))
            except (ServerError, BusyError, CallerError) as error:
                failures.append(error if not isinstance(error, BusyError) else Busy(error, hop.peer_id))

        try:
            async with trio.open_nursery() as nursery:
                for hop in hops:
                    nursery.start_soon(open_link, hop)
        except BaseException:
            await _close(links)
            raise
        chain = cls(target, sorted(links, key=lambda link: link.hop.first))
        if failures:
            await chain.close()
            raise min(failures, key=_gravity)
        if target.settings.show_route:
            logger.info("route: %s", describe_route(hops))
        return chain

    @property
    def hops(self) -> list[Hop]:
        return [link.hop for link in self.links]

    async def step(self, hidden: Blob, position: int, order: Blob | None, inputs: Inputs) -> list[Blob]:
        """Run new tokens through all blocks, from KV entry `position` on.

        Returns:
            the output; with `inputs.all_hidden` each hop's, [blocks, rows, new, hidden].
        Raises:
            CallerError, BusyError: a server refused; the chain goes on, and servers before it roll back with the next step.
            ServerError: the chain is broken; `close` it.
        """
        self._steps += 1
        outputs: list[Blob] = []
        for link in self.links:
            request = Step(
                step=self._steps,
                position=position,
                hidden=hidden,
                mask=inputs.mask,
                position_ids=inputs.position_ids,
                prompts=prompts_of(inputs.prompts, self.target, link.hop),
                order=order,
                all_hidden=inputs.all_hidden,
            )
            async with _blaming(self.target, link.hop):
                answer = await _ask(link.stream, request, StepDone)
                if answer.step != self._steps:
                    raise ProtocolError(f"answered step {answer.step} instead of {self._steps}", link.hop.peer_id)
                hidden = _checked(answer.output, hidden, link.hop, inputs.all_hidden)
            outputs.append(answer.output)
        return outputs if inputs.all_hidden else outputs[-1:]

    async def close(self) -> None:
        """Say goodbye to every server, which frees the KV there. Bounded; never raises for a dead server."""
        links, self.links = self.links, []
        await _close(links)


async def forward(target: Target, hidden: Blob, inputs: Inputs) -> tuple[list[Hop], list[Blob]]:
    """A stateless forward pass through the target's blocks, each hop retried on another route when its server fails.

    Returns:
        the hops that did it and the output of each ([blocks, rows, length, hidden] each with `inputs.all_hidden`).
    """
    hops: list[Hop] = []
    outputs: list[Blob] = []
    rest = target
    while rest.first < rest.end:

        async def attempt(full: frozenset[str], rest: Target = rest, hidden: Blob = hidden) -> tuple[Hop, Blob]:
            hop = (await find_hops(rest, full, "forward", math.prod(hidden.shape[:-1])))[0]
            request = Forward(
                model=target.model,
                first=hop.first,
                end=hop.end,
                hidden=hidden,
                mask=inputs.mask,
                position_ids=inputs.position_ids,
                prompts=prompts_of(inputs.prompts, target, hop),
                all_hidden=inputs.all_hidden,
            )
            async with _blaming(target, hop, passing_busy=True):
                answer = await _ask_once(target, hop, request, ForwardDone)
                _checked(answer.output, hidden, hop, inputs.all_hidden)
            return hop, answer.output

        hop, output = await retrying(rest, attempt)
        hops.append(hop)
        outputs.append(output)
        hidden = _last_of(output) if inputs.all_hidden else output
        rest = replace(rest, first=hop.end)
    return hops, outputs if inputs.all_hidden else outputs


async def backward(target: Target, hidden: Blob, grad_output: Blob, inputs: Inputs) -> tuple[Blob, Blob | None]:
    """Gradients of a stateless forward pass through the target's blocks: of its hidden states, and of its prompts where there are some.

    The target is one hop of an earlier `forward`; where its server is gone, others do it, which need not cut it at the same blocks.
    """

    async def attempt(full: frozenset[str]) -> tuple[Blob, Blob | None]:
        hops = await find_hops(target, full, "forward", math.prod(hidden.shape[:-1]))
        entering = [hidden]
        for hop in hops[:-1]:
            part = replace(target, first=hop.first, end=hop.end)
            _, outputs = await forward(part, entering[-1], replace(inputs, prompts=prompts_of(inputs.prompts, target, hop)))
            entering.append(outputs[-1])
        gradient, prompt_gradients = grad_output, []
        for hop, entered in zip(reversed(hops), reversed(entering), strict=True):
            request = Backward(
                model=target.model,
                first=hop.first,
                end=hop.end,
                hidden=entered,
                grad_output=gradient,
                mask=inputs.mask,
                position_ids=inputs.position_ids,
                prompts=prompts_of(inputs.prompts, target, hop),
            )
            async with _blaming(target, hop, passing_busy=True):
                answer = await _ask_once(target, hop, request, BackwardDone)
                _same(answer.grad_hidden, entered, "gradient")
                if request.prompts is not None:
                    if answer.grad_prompts is None:
                        raise ProtocolError("the gradient of the prompts is missing", hop.peer_id)
                    _same(answer.grad_prompts, request.prompts, "gradient of the prompts")
                    prompt_gradients.append(answer.grad_prompts)
            gradient = answer.grad_hidden
        return gradient, _joined(prompt_gradients[::-1]) if prompt_gradients else None

    return await retrying(target, attempt)


async def find_hops(target: Target, full: frozenset[str] = frozenset(), work: Work = "decode", tokens: int = 1) -> list[Hop]:
    """The route that a request to the target takes now. Raises MissingBlocksError, ServerError."""
    settings = target.settings
    return await target.swarm.membership.route(
        target.model,
        target.first,
        target.end,
        allowed=settings.allowed_servers,
        blocked=settings.blocked_servers | full,
        work=work,
        tokens=tokens,
    )


def describe_route(hops: list[Hop]) -> str:
    return " → ".join(f"{hop.first}:{hop.end} at …{hop.peer_id[-6:]}" for hop in hops)


async def _open_link(target: Target, hop: Hop, max_length: int) -> Link:
    from petalnet.p2p.protocols import INFERENCE

    request = OpenSession(session=secrets.token_hex(8), model=target.model, first=hop.first, end=hop.end, max_length=max_length)
    async with _blaming(target, hop):
        stream = await _open_stream(target, hop, INFERENCE)
        try:
            await _ask(stream, request, SessionOpened)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_WITHIN_S):
                await stream.reset()
            raise
        return Link(hop, stream)


async def _open_stream(target: Target, hop: Hop, protocol: Protocol) -> Stream:
    host = target.swarm.membership.host
    return await host.open_stream(hop.peer_id, protocol, addrs=hop.addrs, timeout_s=target.settings.connect_timeout)


async def _ask_once(target: Target, hop: Hop, request: Message, expected: type[Answer]) -> Answer:
    """One request that belongs to no session, on a stream that was used before or a new one."""
    from petalnet.p2p.protocols import FORWARD

    idle = target.swarm.membership.idle_streams
    while True:
        stream = idle.take(hop.peer_id)
        used_before = stream is not None
        if stream is None:
            stream = await _open_stream(target, hop, FORWARD)
        try:
            answer = await _ask(stream, request, expected)
        except (CallerError, BusyError):
            await idle.keep(stream)
            raise
        except BaseException as error:
            await stream.reset()
            if used_before and isinstance(error, PeerLost):
                continue  # the server has closed it while it was idle, or is gone: a new stream will tell
            raise
        await idle.keep(stream)
        return answer


async def _ask(stream: Stream, request: Message, expected: type[Answer]) -> Answer:
    await stream.send(request)
    answer = await stream.receive()
    if type(answer) is expected:
        return answer
    if isinstance(answer, Error):
        raise answer.exception(stream.peer_id)
    if answer is None:
        raise PeerLost("the server closed the stream", stream.peer_id)
    raise ProtocolError(f"answered {answer.name} instead of {expected.name}", stream.peer_id)


@asynccontextmanager
async def _blaming(target: Target, hop: Hop, *, passing_busy: bool = False) -> AsyncIterator[None]:
    """What goes wrong inside is the fault of the hop's server, unless its error says otherwise; bounded by the request time-out."""
    timeout_s = target.settings.request_timeout
    where = f"server {hop.peer_id} ({describe_blocks(range(hop.first, hop.end))})"
    try:
        with trio.fail_after(timeout_s):
            yield
    except trio.TooSlowError:
        target.swarm.membership.mark_failed(hop.peer_id)
        raise PeerLost(f"{where} did not answer within {timeout_s:g} s", hop.peer_id) from None
    except ServerError as error:
        target.swarm.membership.mark_failed(hop.peer_id)
        raise type(error)(f"{where}: {error}", hop.peer_id) from error
    except BusyError as error:
        if passing_busy:
            raise Busy(error, hop.peer_id) from error
        raise
    target.swarm.membership.mark_ok(hop.peer_id)


def _gravity(error: BaseException) -> int:
    """Of several servers' errors the one to act on: the caller's fault first, since no other route would help; busy last."""
    return 0 if isinstance(error, CallerError) else 1 if isinstance(error, ServerError) else 2


async def _close(links: list[Link]) -> None:
    async def close(link: Link) -> None:
        try:
            await link.stream.close()
        except ServerError as error:
            logger.debug("a stream to %s was not closed cleanly: %s", link.hop.peer_id, error)

    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_WITHIN_S):
        async with trio.open_nursery() as nursery:
            for link in links:
                nursery.start_soon(close, link)


def _checked(output: Blob, given: Blob, hop: Hop, all_hidden: bool) -> Blob:
    """What the next hop gets, from an answer that was checked to have the shape and dtype of what was sent."""
    shape = (hop.end - hop.first, *given.shape) if all_hidden else given.shape
    if output.shape != shape or output.dtype != given.dtype:
        raise ProtocolError(f"answered {output.dtype} {list(output.shape)} instead of {given.dtype} {list(shape)}", hop.peer_id)
    return _last_of(output) if all_hidden else output


def _same(answered: Blob, sent: Blob, what: str) -> None:
    if answered.shape != sent.shape or answered.dtype != sent.dtype:
        raise ProtocolError(f"the {what} is {answered.dtype} {list(answered.shape)} instead of {sent.dtype} {list(sent.shape)}")


def _last_of(blob: Blob) -> Blob:
    return _part(blob, blob.shape[0] - 1, blob.shape[0], drop_dimension=True)


def _part(blob: Blob, start: int, stop: int, *, drop_dimension: bool = False) -> Blob:
    """Entries [start, stop) along the first dimension of a raw array, without a copy."""
    if blob.codec != "raw":
        raise ProtocolError(f"an array of codec {blob.codec} cannot be cut")
    size = blob_size(blob.dtype, blob.shape[1:], "raw")
    shape = blob.shape[1:] if drop_dimension else (stop - start, *blob.shape[1:])
    return Blob(blob.dtype, shape, "raw", memoryview(blob.data)[start * size : stop * size])


def _joined(blobs: list[Blob]) -> Blob:
    """Raw arrays one after another along the first dimension."""
    if len(blobs) == 1:
        return blobs[0]
    return Blob(blobs[0].dtype, (sum(blob.shape[0] for blob in blobs), *blobs[0].shape[1:]), "raw", b"".join(blob.data for blob in blobs))


def prompts_of(prompts: Blob | None, target: Target, hop: Hop) -> Blob | None:
    return None if prompts is None else _part(prompts, hop.first - target.first, hop.end - target.first)
