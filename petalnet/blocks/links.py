"""Links between the servers of a chain: a session's outputs go on them to the server of the blocks that follow, without the client.

A link is a stream of its own. While it opens, outputs wait for it, a bounded number; once it is up, a step of a few tokens is sent in the
turn of the task that computed it, and longer ones by a task of their own, so that a prompt's next chunk is computed meanwhile. A link that
cannot be opened, or that breaks, stays down until the session is resumed: the client is told so, and gets the outputs from then on.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import trio

from petalnet.errors import BusyError, CallerError, PetalnetError, ProtocolError, ServerError
from petalnet.p2p.fields import INT8_BLOCK, Blob, blob_size
from petalnet.p2p.messages import Error
from petalnet.p2p.session_messages import LinkDown, LinkOpened, OpenLink, Step, StepDone

if TYPE_CHECKING:
    from petalnet.blocks.hop import Hop
    from petalnet.p2p.streams import Stream

log = logging.getLogger(__name__)

LINK_TIMEOUT_S = 5.0
"""For a link to open, its connection included, and for the session that it is for."""
OUTBOX_STEPS = 2
"""Outputs of a session that may wait to be sent; where there are as many, none of its steps is computed."""
INLINE_BYTES = 64 * 1024
"""Size of an output that is sent at once by whoever has it: below it, changing to another task would cost more than the sending."""
MOST_WAITING, MOST_WAITING_PER_PEER = 1024, 64
"""Links that wait for their session, which its client may open a moment later."""

OpenStream = Callable[[str], Awaitable["Stream"]]
"""From a peer's id to a stream for steps to it. Raises ServerError where there can be none."""


@dataclass
class LinkCounts:
    """What went over a server's links, since it started.

    Attributes:
        open: links to other servers that are up now.
        pushed_steps, pushed_bytes: outputs that went to the next server, and the bytes of their hidden states.
        relayed_steps: outputs that went to the client because the link was down.
        failed: links that could not be opened, or broke.
    """

    open: int = 0
    pushed_steps: int = 0
    relayed_steps: int = 0
    pushed_bytes: int = 0
    failed: int = 0


def without_first(prompts: Blob, blocks: int) -> Blob:
    """Prompts without those of the first blocks, in the codec that they came in. Those that are cut off fill whole blocks of int8."""
    own = blocks * math.prod(prompts.shape[1:])
    data = memoryview(prompts.data)
    shape = (prompts.shape[0] - blocks, *prompts.shape[1:])
    if prompts.codec == "int8":
        scales = 4 * -(-math.prod(prompts.shape) // INT8_BLOCK)
        return Blob(prompts.dtype, shape, "int8", b"".join((data[4 * own // INT8_BLOCK : scales], data[scales + own :])))
    return Blob(prompts.dtype, shape, prompts.codec, data[blob_size(prompts.dtype, (own,), prompts.codec) :])


@dataclass(frozen=True)
class Output:
    """The output of a step of a session that pushes.

    Attributes:
        request: the step.
        position: KV entries after it.
        hidden: [rows, new, hidden], of the session's last block.
        prompts: those for the blocks that follow.
        queue_s, compute_s: seconds in the queue and of computation.
        arrived: when the step was here, by trio's clock.
        is_known: whether the client has the output already.
    """

    request: Step
    position: int
    hidden: Blob
    prompts: Blob | None
    queue_s: float
    compute_s: float
    arrived: float
    is_known: bool = False

    def step(self) -> Step:
        """The next server's step."""
        request = self.request
        spent = (*request.spent, self.queue_s, self.compute_s, trio.current_time() - self.arrived)
        return replace(request, hidden=self.hidden, prompts=self.prompts, spent=spent)

    def done(self) -> StepDone:
        """The client's answer, where it is the client who takes the output to the next server."""
        held_s = trio.current_time() - self.arrived
        return StepDone(self.request.step, self.position, self.hidden, self.compute_s, self.queue_s, held_s, self.request.spent)


class OutgoingLink:
    """Where the outputs of one session go; `run` must be running meanwhile."""

    def __init__(self, open_stream: OpenStream | None, peer_id: str, greeting: OpenLink, client: Stream, counts: LinkCounts) -> None:
        """
        Args:
            open_stream: makes the link's stream; None where this server opens none.
            peer_id: the server of the blocks that follow.
            greeting: the link's first message.
            client: the stream to the session's client.
            counts: is kept up to date.
        """
        self._open_stream = open_stream
        self._peer_id = peer_id
        self._greeting = greeting
        self._client = client
        self._counts = counts
        self._stream: Stream | None = None  # while it is up
        self._down: str | None = None  # why it is
        self._told = False  # the client has been told so
        self._outbox: deque[Output] = deque()
        self._pushed = 0
        self._changed = trio.lowlevel.ParkingLot()  # the outbox, or what becomes of it
        self._up = trio.CancelScope()
        self._relaying = trio.Lock()
        self._sending = 0  # outputs that are on their way into the stream
        self._is_given_up = False
        self._life = trio.CancelScope()  # of the opening and of the stream
        self._may_tell: trio.Event | None = None  # the client is told nothing before this

    @property
    def pushed(self) -> int:
        """The last step whose output went to the next server; 0 for none."""
        return self._pushed

    async def room(self) -> None:
        """Wait until another output may be computed, or the link is given up."""
        while len(self._outbox) >= OUTBOX_STEPS:
            await self._changed.park()

    def stays(self, peer_id: str, may_tell: trio.Event) -> bool:
        """Whether the link leads to that server, is up, and is not in the middle of an output. Then it is as if it had just been opened:
        what waits to be sent is dropped, and the client is told nothing of it until the event."""
        if self._peer_id != peer_id or self._stream is None or self._sending:
            return False
        self._may_tell = may_tell
        self._drop_outbox()
        return True

    def give_up(self) -> None:
        """Close the link, whatever it waits for; what waits to be sent is dropped, and the client is told nothing of it."""
        self._is_given_up = True
        self._down = self._down or "it was given up"
        self._stream = None
        self._life.cancel()
        self._drop_outbox()

    def _drop_outbox(self) -> None:
        self._outbox.clear()
        self._changed.unpark_all()

    async def put(self, output: Output) -> None:
        """Send an output to the next server, now or once those before it are sent; or to the client. Raises PeerLost of the client."""
        stream = self._stream
        if stream is not None and not self._outbox and len(output.hidden.data) <= INLINE_BYTES and await self._push(stream, output):
            return
        if self._is_given_up:
            return
        self._outbox.append(output)
        self._changed.unpark_all()
        if self._down is not None:
            await self._relay()

    async def run(self, may_tell: trio.Event | None = None) -> None:
        """Open the link, keep watch over it, and fall back to the client when it is down, which is told nothing before `may_tell`.

        Raises PeerLost of the client.
        """
        self._may_tell = may_tell
        with self._life:
            await self._live()
        if not self._is_given_up:
            log.debug("the link to %s is down: %s", self._peer_id, self._down)
            await self._relay()

    async def _live(self) -> None:
        """Open the link, and keep it up until it breaks."""
        try:
            with trio.fail_after(LINK_TIMEOUT_S):
                stream = await self._open()
        except trio.TooSlowError:
            self._break(f"the link was not open within {LINK_TIMEOUT_S:g} s")
        except PetalnetError as error:
            self._break(str(error))
        else:
            async with stream:
                self._stream = stream
                self._counts.open += 1
                try:
                    await self._keep_up(stream)
                finally:
                    self._stream = None
                    self._counts.open -= 1

    async def _open(self) -> Stream:
        if self._open_stream is None:
            raise ServerError("this server opens no links")
        stream = await self._open_stream(self._peer_id)
        try:
            await stream.send(self._greeting)
            answer = await stream.receive()
            if isinstance(answer, Error):
                raise answer.exception(self._peer_id)
            if not isinstance(answer, LinkOpened):
                raise ProtocolError(f"peer {self._peer_id} opened no link")
        except BaseException:  # a cancellation, most likely: whatever it is goes on, and leaves no stream behind
            await stream.reset()
            raise
        return stream

    async def _keep_up(self, stream: Stream) -> None:
        """Keep the link up until it breaks."""
        async with trio.open_nursery() as nursery:
            self._up = nursery.cancel_scope
            nursery.start_soon(self._send_what_waits, stream)
            self._break(await self._end_of(stream))

    async def _end_of(self, stream: Stream) -> str:
        """Wait until the link's other end ends it: it has nothing to send, so whatever comes is the end. Why, for a person."""
        try:
            message = await stream.receive()
        except PetalnetError as error:
            return str(error)
        return message.message if isinstance(message, Error) else f"peer {self._peer_id} closed the link"

    async def _send_what_waits(self, stream: Stream) -> None:
        while True:
            while self._outbox:
                output = self._outbox[0]
                if not await self._push(stream, output):
                    return
                if self._outbox and self._outbox[0] is output:
                    self._outbox.popleft()
                self._changed.unpark_all()
            await self._changed.park()

    async def _push(self, stream: Stream, output: Output) -> bool:
        """Send an output to the next server; False where the link is down."""
        self._sending += 1
        try:
            await stream.send(output.step())
        except PetalnetError as error:
            self._break(str(error))
            return False
        finally:
            self._sending -= 1
        if self._down is not None:
            return False  # it went down meanwhile, and the client has been told of those before only
        self._pushed = output.request.step
        self._counts.pushed_steps += 1
        self._counts.pushed_bytes += len(output.hidden.data)
        return True

    def _break(self, reason: str) -> None:
        if self._down is None:
            self._down = reason[:500]
            self._stream = None
            self._counts.failed += 1
            self._up.cancel()

    async def _relay(self) -> None:
        """Tell the client that the link is down, once, and send it what waits, in its order."""
        async with self._relaying:
            if self._may_tell is not None:
                await self._may_tell.wait()
            if not self._told and not self._is_given_up:
                self._told = True
                await self._client.send(LinkDown(self._down or "", self._pushed))
            while self._outbox:
                output = self._outbox[0]
                if not output.is_known:
                    await self._client.send(output.done())
                self._counts.relayed_steps += 1
                if self._outbox and self._outbox[0] is output:
                    self._outbox.popleft()
                self._changed.unpark_all()


class LinkKey(NamedTuple):
    """What a session is found by: its id, its first block, and the peer that may bring steps for it."""

    session: str
    first: int
    takes_from: str


class IncomingLinks:
    """The sessions that take steps from other servers, and the links that came before their session was opened."""

    def __init__(self) -> None:
        self._hops: dict[LinkKey, Hop] = {}
        self._waiting: dict[LinkKey, trio.Event] = {}
        self._per_peer: Counter[str] = Counter()

    @property
    def sessions(self) -> int:
        """Sessions that may take steps from another server."""
        return len(self._hops)

    @property
    def waiting(self) -> int:
        """Links that wait for their session."""
        return len(self._waiting)

    def add(self, hop: Hop) -> None:
        """A session that may take steps from another server is found from now on. A former one of the same client is ended: its stream is
        over, which shows only when a step is done.

        Raises BusyError where another client has such a one: ids are drawn by chance, so somebody who was told it keeps this client out,
        which may go elsewhere.
        """
        if hop.key is None:
            return
        former = self._hops.get(hop.key)
        if former is not None:
            if former.session.peer_id != hop.session.peer_id:
                raise BusyError("a session of this id is open on these blocks")
            former.end()
        self._hops[hop.key] = hop
        waiting = self._waiting.get(hop.key)
        if waiting is not None:
            waiting.set()

    def remove(self, hop: Hop) -> None:
        """A session has ended."""
        if hop.key is not None and self._hops.get(hop.key) is hop:
            del self._hops[hop.key]

    def move(self, hop: Hop, key: LinkKey | None) -> None:
        """A session takes steps from another server from now on, or from none. Raises CallerError where there is such a one."""
        if key == hop.key:
            return
        if key in self._hops:
            raise CallerError("a session of this id is open on these blocks")
        self.remove(hop)
        hop.key = key
        self.add(hop)

    async def find(self, key: LinkKey) -> Hop:
        """The session that a link is for, once its client has opened it.

        Raises:
            CallerError: there is none within `LINK_TIMEOUT_S`, or the same server has asked again meanwhile.
            BusyError: too many links wait for theirs.
        """
        if key not in self._hops:
            await self._wait_for(key)
        return self._hops[key]

    async def _wait_for(self, key: LinkKey) -> None:
        peer_id, former = key.takes_from, self._waiting.get(key)
        if former is None and (len(self._waiting) >= MOST_WAITING or self._per_peer[peer_id] >= MOST_WAITING_PER_PEER):
            raise BusyError("too many links wait for their session")
        self._waiting[key] = opened = trio.Event()
        if former is None:
            self._per_peer[peer_id] += 1
        else:
            former.set()  # the server has given that link up
        try:
            with trio.move_on_after(LINK_TIMEOUT_S):
                await opened.wait()
            is_latest = self._waiting.get(key) is opened
        finally:
            if self._waiting.get(key) is opened:
                del self._waiting[key]
                self._per_peer[peer_id] -= 1
                if not self._per_peer[peer_id]:
                    del self._per_peer[peer_id]
        if not is_latest or key not in self._hops:
            raise CallerError("no session here takes steps from this peer under that id")
