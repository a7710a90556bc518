"""One session of this server, as a hop of its client's chain: what comes for it is checked, run in its turn, and answered.

A session runs one step at a time, and gives outputs once more meanwhile. What is wrong with a request harms no other; a step that fails
while it is computed ends the session, since half of it may be done and nobody could go on from there. Where outputs go is told when the
session opens: to the client, or to the server of the blocks that follow.
"""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from petalnet.blocks.checks import split_names
from petalnet.blocks.links import LinkKey, OutgoingLink, Output, without_first
from petalnet.blocks.outputs import encode_output
from petalnet.blocks.scheduler import Task
from petalnet.blocks.sessions import Session
from petalnet.blocks.work import StepWork
from petalnet.errors import CallerError, PeerLost, PetalnetError, UnsupportedError
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.messages import Attach, Attached, Error, LinkOpened, OpenLink, OpenSession, Replay, Reserve, Reserved, Step, StepDone

if TYPE_CHECKING:
    from petalnet.blocks.service import BlockService
    from petalnet.p2p.streams import Stream

log = logging.getLogger(__name__)

WATCHED_TOKENS = 64
"""Where a step has more tokens, its stream is read while it waits and runs: a client that was interrupted in a long prompt wants none of
it any more, and the next chunk of a prompt is here when this one is done. For a few tokens that would cost more than it saves."""
MOST_REPLAYS = 16
"""Replays that a session may wait for at a time."""


class Requests:
    """What comes on a stream, in its order; one request can be read ahead.

    Attributes:
        arrived: when the request that `next` gave last was here, by trio's clock.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._ahead: tuple[Message, float] | None = None
        self.arrived = 0.0

    async def next(self) -> Message | None:
        """The next request, None at the end of the stream. Raises as `Stream.receive`."""
        if self._ahead is not None:
            (ahead, self.arrived), self._ahead = self._ahead, None
            return ahead
        request = await self._stream.receive()
        self.arrived = trio.current_time()
        return request

    async def read_ahead(self) -> bool:
        """Read the next request already; False where the stream has ended instead, in one way or another."""
        try:
            request = await self._stream.receive(ahead=True)
        except PetalnetError as error:
            log.debug("peer %s sends no more requests: %s", self._stream.peer_id, error)
            return False
        if request is None:
            return False
        self._ahead = request, trio.current_time()
        return True


class Hop:
    """Serves one session.

    Steps come from its client and, where that says so in `takes_from`, on a link from the server before; both go through one lock. The
    client hears of whatever goes wrong with a step, whoever brought it.

    Attributes:
        session: what is served.
        key: what links find it by; None where no other server may bring steps.
    """

    def __init__(self, service: BlockService, session: Session, request: OpenSession, client: Stream) -> None:
        """
        Args:
            service: whose session it is.
            request: what the client opened it with.
            client: the stream on which it did.
        """
        self.session = session
        self.key = LinkKey(request.session, session.first, request.takes_from) if request.takes_from else None
        self._service = service
        self._client = client
        self._link: OutgoingLink | None = None
        if request.pushes_to:
            greeting = OpenLink(request.session, session.end)
            self._link = OutgoingLink(service.open_link, request.pushes_to, greeting, client, service.link_counts)
        self._last_step = -1
        self._dtype = service.dtype  # of the hidden states that come
        self._done_step = 0  # the number of the last step that was computed, where outputs are kept
        self._step_done = trio.lowlevel.ParkingLot()
        self._replays = 0
        self._replaying = trio.Lock()  # one is made and sent at a time: it may be as long as a message can be
        self._nursery: trio.Nursery | None = None
        self._turn = trio.Lock()
        self._scope = trio.CancelScope()
        self._is_linked = False  # whether a link has come
        self._link_scope = trio.CancelScope()

    async def serve(self) -> None:
        """Serve the session until its client ends the stream, or the session has to end."""
        if self.key is None and self._link is None:
            await self._serve_client()
            return
        try:
            with self._scope:
                await self._serve_all()
        finally:
            self._link_scope.cancel()  # of a link that comes only now as well

    async def _serve_all(self) -> None:
        """Serve the client, and keep up the link to the next server."""
        failure: PetalnetError | None = None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._link is not None:
                nursery.start_soon(self._run_link, self._link)
            try:
                await self._serve_client()
            except PetalnetError as error:  # raised below, bare: leaving the nursery by it would wrap it into a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def serve_link(self, stream: Stream) -> None:
        """Run the steps that come on a link, until that or the session ends.

        Raises:
            CallerError: the session has its link.
            UnsupportedError: something else came than steps.
            PeerLost: of the link.
        """
        if self._is_linked:
            raise CallerError("the session has had its link")
        self._is_linked = True
        requests = Requests(stream)
        with self._link_scope:
            await stream.send(LinkOpened())
            while (request := await requests.next()) is not None:
                if not isinstance(request, Step):
                    raise UnsupportedError(f"a link takes step, not {request.name}")
                try:
                    goes_on = await self._take(request, requests, needs_more=False)
                except PeerLost:  # the client's stream has ended
                    goes_on = False
                if not goes_on:
                    self._scope.cancel()
                    return

    async def _run_link(self, link: OutgoingLink) -> None:
        try:
            await link.run()
        except PeerLost:  # the client's stream has ended
            self._scope.cancel()

    async def _serve_client(self) -> None:
        requests = Requests(self._client)
        while (request := await self._next(requests)) is not None:
            if isinstance(request, Step):
                if not await self._take(request, requests, needs_more=True):
                    return
                continue
            try:
                if isinstance(request, Replay):
                    self._start_replay(request, requests.arrived)
                    continue
                answer = await self._answer(request)
            except PetalnetError as error:
                answer = Error.of(error, request.step if isinstance(request, Replay) else 0)
            await self._client.send(answer)

    async def _next(self, requests: Requests) -> Message | None:
        """The client's next request; None at the end of the stream, or where the session is given up: no step came for too long, or for
        long and others need its room."""
        sessions, idle_s = self._service.sessions, self._service.limits.idle_s
        with sessions.idle(self.session):
            left_s = idle_s
            while left_s > 0:
                with trio.move_on_after(left_s):
                    request = await requests.next()
                    sessions.served(self.session)
                    return request
                left_s = idle_s - max(sessions.idle_s(self.session), 0.0)  # steps may have come on the link meanwhile
            await self._client.send(Error.of(CallerError(f"nothing came for {idle_s:g} s; this stream is closed")))
            return None
        await self._client.send(Error.of(CallerError("this session was idle for long and others needed its room; it is closed")))
        return None

    async def _answer(self, request: Message) -> Message:
        """The answer to what is no step. Raises a PetalnetError where it is refused."""
        service, session = self._service, self.session
        if isinstance(request, Reserve):
            service.checks.rows(request.rows)
            service.sessions.admit(session, request.rows)
            return Reserved(service.sessions.free_tokens)
        if not isinstance(request, Attach):
            raise UnsupportedError(f"a session takes step, not {request.name}")
        async with self._turn:
            service.sessions.admit(session, service.checks.attach(session, request))
            session.begun = True
            names = split_names(request.names)
            position = await service.engine.ask(service.runner.attach, session, names)
            if position:
                service.sessions.reached(session, len(names), position)
            return Attached(position)

    def _start_replay(self, request: Replay, arrived: float) -> None:
        """Answer a replay when it can be, and other requests meanwhile."""
        self._service.checks.replay(self.session, request)
        if self._nursery is None or self._replays >= MOST_REPLAYS:
            raise CallerError(f"a session answers {MOST_REPLAYS} replays at a time")
        self._replays += 1
        self._nursery.start_soon(self._replay, request, arrived)

    async def _replay(self, request: Replay, arrived: float) -> None:
        try:
            while True:
                done = self._done_step
                if done >= request.step and self.session.position >= request.position + request.tokens:
                    async with self._replaying:
                        if await self._send_outputs(request, arrived):
                            return
                while self._done_step == done:
                    await self._step_done.park()
        except PeerLost:  # the client's stream has ended
            self._scope.cancel()
        except PetalnetError as error:
            with suppress(PeerLost):
                await self._client.send(Error.of(error, request.step))
        finally:
            self._replays -= 1

    async def _send_outputs(self, request: Replay, arrived: float) -> bool:
        """Send the outputs that are asked for once more; False where the session has gone back meanwhile."""
        service, session, end = self._service, self.session, request.position + request.tokens

        def encoded(step: Step) -> Blob | None:
            found = service.runner.outputs(session, request.position, end)
            return None if found is None or len(found) != step.hidden.shape[0] else encode_output(step, found)

        shape = (session.rows, request.tokens, service.span.hidden_size)
        step = Step(request.step, request.position, Blob(self._dtype, shape, "raw", b""), codec=request.codec)
        service.checks.replayed(step, self._client.protocol.limits.payload)
        output = await service.engine.ask(encoded, step)
        if output is None:
            return False
        await self._client.send(StepDone(request.step, end, output, held_s=trio.current_time() - arrived))
        return True

    async def _take(self, step: Step, requests: Requests, *, needs_more: bool) -> bool:
        """Run a step and send its output on; False where the session is over.

        Args:
            requests: where it came from, which is read ahead meanwhile.
            needs_more: whether the end of these is the session's end.
        """
        if math.prod(step.hidden.shape[:2]) <= WATCHED_TOKENS:
            return await self._run(step, requests.arrived)
        goes_on = False
        failure: PetalnetError | None = None
        async with trio.open_nursery() as nursery:

            async def read_ahead() -> None:
                if not await requests.read_ahead() and needs_more:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(read_ahead)
            try:
                goes_on = await self._run(step, requests.arrived)
            except PetalnetError as error:  # raised below, bare: leaving the nursery by it would wrap it into a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return goes_on

    async def _run(self, step: Step, arrived: float) -> bool:
        """`_take`, of a step that came at `arrived`, in its turn."""
        try:
            self._turn.acquire_nowait()  # `acquire` would give others a turn
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            if self.key is not None:
                if step.step <= self._last_step:
                    return True  # it came from the client as well
                self._last_step = step.step
            if self._link is not None:
                await self._link.room()
            with self._service.sessions.computing(self.session):
                return await self._run_now(step, arrived)
        finally:
            self._turn.release()

    async def _run_now(self, step: Step, arrived: float) -> bool:
        service, session = self._service, self.session
        try:
            order = service.checks.step(session, step, self._client.protocol.limits.payload)
            rows, new, _ = step.hidden.shape
            service.sessions.admit(session, max(rows, step.promise_rows))
        except PetalnetError as error:
            if self.key is not None or self._link is not None:
                # Its followers may be on their way: they must not take what was there before for what this step would have left.
                service.sessions.reached(session, session.rows, min(session.position, step.position))
            await self._client.send(Error.of(error, step.step))
            return True
        session.begun = True
        work = StepWork(session, step, order, None if step.names is None else split_names(step.names))
        position = step.position + new
        task = Task(
            peer=session.peer_id,
            session=session,
            key=(session.first, session.end, service.span.batch_key(work.position_end, session)),
            units=new,
            width=rows,
            kind="step",
            max_units=service.checks.tokens_at_once(rows, position),
            work=work,
            weight=service.weight(session.first, session.end),
            network=session.promise.network,
        )
        try:
            result = await service.engine.submit(task)
        except PetalnetError as error:
            await self._client.send(Error.of(error, step.step))
            return False
        service.sessions.reached(session, rows, position)
        if self._link is None or step.all_hidden:
            held_s = trio.current_time() - arrived
            await self._client.send(StepDone(step.step, position, result.value, result.compute_s, result.queue_s, held_s, step.spent))
        if self._link is not None:
            self._dtype, self._done_step = step.hidden.dtype, step.step
            self._step_done.unpark_all()
            prompts = None if step.prompts is None else without_first(step.prompts, session.end - session.first)
            hidden = result.value if work.passed_on is None else work.passed_on
            await self._link.put(Output(step, position, hidden, prompts, result.queue_s, result.compute_s, arrived, step.all_hidden))
        return True
