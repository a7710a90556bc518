"""The hops of one inference session.

Runs on the portal's thread. A chain has one long-lived stream to each server of its route, opened in parallel. A step visits them one
after another through the client; between two hops the bytes are passed on as they came. The caller's fault and a full server leave the
chain as it is, anything else breaks it.

A first step whose beginning the servers may have computed for an earlier session asks for that first (`Attach`), all of them at once, and
then sends only what the least of them lacks.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from petalnet.client.requests import (
    Busy,
    Target,
    ask,
    blaming,
    describe_route,
    find_hops,
    last_of,
    open_stream,
    prompts_of,
    retrying,
)
from petalnet.errors import CallerError, ProtocolError, ServerError
from petalnet.p2p.messages import (
    ITEM_SIZES,
    NAME_BYTES,
    UNIT_TOKENS,
    Attach,
    Attached,
    Blob,
    OpenSession,
    SessionOpened,
    Step,
    StepDone,
)
from petalnet.routing.routes import Hop

if TYPE_CHECKING:
    from petalnet.p2p.host import Stream

logger = logging.getLogger(__name__)

CLOSE_WITHIN_S = 2.0
LEAST_UNITS_TO_ATTACH = 2
"""Whole units of a prompt from which on asking for them is worth a round trip."""
LEAST_BYTES_TO_ASK = 64 * 1024
"""Size of a prompt from which on a server that was full is asked for room before the prompt is sent again."""

Names = tuple[tuple[bytes, ...], ...]
"""For each row the names of its units, in their order."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What goes through blocks beside the hidden states; see `messages.Step` for shapes. `prompts` is for all blocks of the target.

    The last three are for sessions only. `names` are those of the units that the step completes, None where these have none.
    """

    mask: Blob | None = None
    position_ids: Blob | None = None
    prompts: Blob | None = None
    all_hidden: bool = False
    keep: int = 0
    promise_rows: int = 0
    names: Names | None = None


@dataclass
class Link:
    """One hop of a session and the stream to its server.

    Attributes:
        shares: whether the server also knows the beginnings of other peers' sessions.
        attached: KV entries that its session began with; None where it was not asked.
    """

    hop: Hop
    stream: Stream
    shares: bool = False
    attached: int | None = None


@dataclass
class _Progress:
    """How far a step has come, so that one that met a full server goes on from there.

    Attributes:
        given: the hidden states of the whole step, as given; by them a repetition is recognised.
        position: where it begins after what was attached.
        hidden: what the next link gets.
        outputs: of the links that are done.
        refused: whether the link that is next was full.
    """

    given: Blob
    position: int
    hidden: Blob
    outputs: list[Blob] = field(default_factory=list)
    refused: bool = False


class Chain:
    """The links of one session, first block to last; `open` makes one."""

    def __init__(self, target: Target, links: list[Link]) -> None:
        self.target = target
        self.links = links
        self._steps = 0
        self._is_new = True  # no server has had a step
        self._progress: _Progress | None = None

    @classmethod
    async def open(cls, target: Target, max_length: int) -> Chain:
        """Find a route and open a stream with a session of `max_length` KV entries a row on each of its servers.

        Raises: as `retrying`.
        """

        async def attempt(full: frozenset[str]) -> Chain:
            return await cls.open_once(target, max_length, full)

        return await retrying(target, attempt)

    @classmethod
    async def open_once(cls, target: Target, max_length: int, full: frozenset[str]) -> Chain:
        """`open`, without the servers in `full`, and without another try. Raises Busy, CallerError, MissingBlocksError, ServerError."""
        hops = await find_hops(target, full)
        links: list[Link] = []
        failures: list[BaseException] = []

        async def open_link(hop: Hop) -> None:
            try:
                links.append(await _open_link(target, hop, max_length))
            except (ServerError, Busy, CallerError) as error:
                failures.append(error)

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

        A step that met a full server may be given again, the very same objects: it goes on there.

        Returns:
            the output of the last `inputs.keep` tokens (0: all); with `inputs.all_hidden` each hop's, [blocks, rows, new, hidden].
        Raises:
            CallerError, Busy: a server refused; the chain goes on, and servers before it roll back with the next step.
            ServerError: the chain is broken; `close` it.
        """
        progress = self._progress
        self._steps += 1
        if progress is None or progress.given is not hidden:
            progress = self._progress = _Progress(hidden, position, hidden)
            if self._is_new and position == 0:
                progress.position = await self._attach(hidden, inputs)
                progress.hidden = _without_beginning(hidden, progress.position)
            self._is_new = False
        names: Blob | None = None
        if inputs.names is not None:
            attached = (progress.position - position) // UNIT_TOKENS
            names = _encode_names(tuple(row[attached:] for row in inputs.names)) if attached < len(inputs.names[0]) else None
        for link in self.links[len(progress.outputs) :]:
            keep = inputs.keep if link is self.links[-1] else 0
            request = Step(
                step=self._steps,
                position=progress.position,
                hidden=progress.hidden,
                mask=inputs.mask,
                position_ids=inputs.position_ids,
                prompts=prompts_of(inputs.prompts, self.target, link.hop),
                order=order,
                all_hidden=inputs.all_hidden,
                keep=keep,
                promise_rows=inputs.promise_rows,
                names=names,
            )
            asks_first, progress.refused = progress.refused, True
            async with blaming(self.target, link.hop):
                if asks_first and position == 0 and len(progress.hidden.data) >= LEAST_BYTES_TO_ASK:
                    await ask(link.stream, _without_tokens(request), StepDone)
                answer = await ask(link.stream, request, StepDone)
                if answer.step != self._steps:
                    raise ProtocolError(f"answered step {answer.step} instead of {self._steps}", link.hop.peer_id)
                progress.hidden = checked(answer.output, progress.hidden, link.hop, inputs.all_hidden, keep)
            progress.outputs.append(answer.output)
            progress.refused = False
            for row in inputs.names or ():
                self.target.swarm.membership.sent_names.note(link.hop.peer_id, row)
        self._progress = None
        return progress.outputs if inputs.all_hidden else progress.outputs[-1:]

    async def _attach(self, hidden: Blob, inputs: Inputs) -> int:
        """Have the servers begin the session with what they know of the rows; the KV entries that all of them have then.

        Asks only where every server may know something, and never for tokens whose outputs are wanted.
        """
        units = (hidden.shape[1] - inputs.keep) // UNIT_TOKENS
        if inputs.names is None or not inputs.keep or units < LEAST_UNITS_TO_ATTACH:
            return 0
        rows = [row[:units] for row in inputs.names]
        sent = self.target.swarm.membership.sent_names
        for link in self.links:
            if not link.shares:
                units = min(units, *(sent.known(link.hop.peer_id, row) for row in rows))
        if units < LEAST_UNITS_TO_ATTACH:
            return 0
        rows = [row[:units] for row in rows]
        request = Attach(_encode_names(tuple(rows)))
        failures: list[BaseException] = []

        async def attach(link: Link) -> None:
            try:
                async with blaming(self.target, link.hop):
                    position = (await ask(link.stream, request, Attached)).position
                    if position % UNIT_TOKENS or position > units * UNIT_TOKENS:
                        raise ProtocolError(f"attached {position} tokens where {units} units were named", link.hop.peer_id)
                link.attached = position
                for row in rows:
                    sent.forget(link.hop.peer_id, row[position // UNIT_TOKENS :])
            except (ServerError, Busy, CallerError) as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for link in self.links:
                if link.attached is None:
                    nursery.start_soon(attach, link)
        if failures:
            self._progress = None
            raise min(failures, key=_gravity)
        return min(link.attached or 0 for link in self.links)

    async def close(self) -> None:
        """Say goodbye to every server, which frees the KV there. Bounded; never raises for a dead server."""
        links, self.links = self.links, []
        await _close(links)


async def _open_link(target: Target, hop: Hop, max_length: int) -> Link:
    from petalnet.p2p.protocols import INFERENCE

    request = OpenSession(session=secrets.token_hex(8), model=target.model, first=hop.first, end=hop.end, max_length=max_length)
    async with blaming(target, hop):
        stream = await open_stream(target, hop, INFERENCE)
        try:
            opened = await ask(stream, request, SessionOpened)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_WITHIN_S):
                await stream.reset()
            raise
        return Link(hop, stream, opened.shares_prefixes)


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


def _gravity(error: BaseException) -> int:
    """Of several servers' errors the one to act on: the caller's fault first, since no other route would help; busy last."""
    return 0 if isinstance(error, CallerError) else 1 if isinstance(error, ServerError) else 2


def checked(output: Blob, given: Blob, hop: Hop, all_hidden: bool, keep: int = 0) -> Blob:
    """What the next hop gets, from an answer that was checked to have the shape and dtype of what was sent."""
    rows, new, hidden = given.shape
    shape: tuple[int, ...] = (rows, keep or new, hidden)
    if all_hidden:
        shape = (hop.end - hop.first, *shape)
    if output.shape != shape or output.dtype != given.dtype:
        raise ProtocolError(f"answered {output.dtype} {list(output.shape)} instead of {given.dtype} {list(shape)}", hop.peer_id)
    return last_of(output) if all_hidden else output


def _without_tokens(request: Step) -> Step:
    """A step that only asks for room. Where there is none, hardly anything was sent for it."""
    rows, _, size = request.hidden.shape
    nothing = replace(request.hidden, shape=(rows, 0, size), data=b"")
    return replace(request, hidden=nothing, mask=None, position_ids=None, prompts=None, keep=0, names=None)


def _encode_names(names: Names) -> Blob:
    """uint8 [rows, units, NAME_BYTES]."""
    return Blob("uint8", (len(names), len(names[0]), NAME_BYTES), "raw", b"".join(name for row in names for name in row))


def _without_beginning(hidden: Blob, tokens: int) -> Blob:
    """[rows, new, hidden] without the first tokens of each row."""
    if not tokens:
        return hidden
    rows, new, size = hidden.shape
    token_bytes = size * ITEM_SIZES[hidden.dtype]
    data = memoryview(hidden.data)
    parts = [data[(row * new + tokens) * token_bytes : (row + 1) * new * token_bytes] for row in range(rows)]
    return replace(hidden, shape=(rows, new - tokens, size), data=parts[0] if rows == 1 else b"".join(parts))
