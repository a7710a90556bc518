"""One session of this server, as a hop of its client's chain: what comes for it is checked, run in its turn, and answered.

A session runs one step at a time, and gives outputs once more meanwhile. What is wrong with a request harms no other; a step that fails
while it is computed ends the session, since half of it may be done and nobody could go on from there. Where outputs go is told when the
session opens: to the client, or to the server of the blocks that follow. When a server of the chain is lost, the client says where the
session goes on from, and between which neighbours (`Resume`), whatever goes on here at that time.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import trio

from petalnet.blocks.checks import split_names
from petalnet.blocks.incoming import Incoming
from petalnet.blocks.links import LinkKey, OutgoingLink, Output, without_first
from petalnet.blocks.replays import Replays
from petalnet.blocks.requests import Requests
from petalnet.blocks.scheduler import Task
from petalnet.blocks.sessions import Session
from petalnet.blocks.work import InputsNotFinite, NotFinite, StepWork
from petalnet.errors import CallerError, PeerLost, PetalnetError, UnsupportedError
from petalnet.p2p.fields import Message
from petalnet.p2p.messages import Error
from petalnet.p2p.session_messages import (
    AskProgress,
    Attach,
    Attached,
    OpenLink,
    OpenSession,
    Progress,
    Replay,
    Reserve,
    Reserved,
    Resume,
    Resumed,
    Step,
    StepDone,
)

if TYPE_CHECKING:
    from petalnet.blocks.service import BlockService
    from petalnet.p2p.streams import Stream

log = logging.getLogger(__name__)

WATCHED_TOKENS = 64
"""Where a step has more tokens, its stream is read while it waits and runs: a client that was interrupted in a long prompt wants none of
it any more, and the next chunk of a prompt is here when this one is done. For fewer that would cost more than it saves, unless they turn
out to be slow."""
RESUME_EVERY_S = 0.1
"""Seconds from one `Resume` of a session to the next: each opens a link, and a chain is not mended more often."""


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
        self.key = self._key(request.session, request.takes_from)
        self._id = request.session
        self._service = service
        self._client = client
        self._link = self._link_to(request.pushes_to)
        self._replays = Replays(service, session, client)
        self._requests = Requests(client, service.read_ahead, urgent=self._take_urgent, ended=self.end)
        self._incoming = Incoming(service.read_ahead, self._take, self.end)
        self._taken = 0  # the last step that came
        self._answered = 0  # the last one whose output the client was sent
        self._drops = self.key is not None  # steps of numbers that it has had
        self._last_step = -1  # this one and all before are dropped
        self._given_up = -1  # replays likewise
        self._resumes = 0  # how often the client has resumed it; whatever was begun before comes to nothing
        self._resumed_at = float("-inf")
        self._resuming = trio.Lock()
        self._turn = trio.Lock()
        self._computing: trio.CancelScope | None = None  # of whoever waits for the computation of a step
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._notices: list[Message] = []

    async def serve(self) -> None:
        """Serve the session until its client ends the stream, or the session has to end (`end`)."""
        try:
            with self._scope:
                await self._serve_all()
        finally:
            self._nursery = None
            self._requests.forget()
            self._incoming.end()

    def end(self) -> None:
        """End the session, whatever it does."""
        self._scope.cancel()

    def say(self, notice: Message) -> None:
        """Tell the client something unasked."""
        if self._nursery is None:
            self._notices.append(notice)
        else:
            self._nursery.start_soon(self._tell, notice)

    def look(self, now: float) -> None:
        """See whether the client's request is slow; to be called now and then."""
        self._requests.look(now, self._nursery)

    async def _serve_all(self) -> None:
        """Serve the client, and keep up the link to the next server."""
        failure: PetalnetError | None = None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._link is not None:
                nursery.start_soon(self._run_link, self._link)
            for notice in self._notices:
                nursery.start_soon(self._tell, notice)
            try:
                await self._serve_client()
            except PetalnetError as error:  # raised below, bare: leaving the nursery by it would wrap it into a group
                failure = error
            self._nursery = None
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def serve_link(self, stream: Stream) -> None:
        """`Incoming.serve`, of a link to this session."""
        await self._incoming.serve(stream)

    async def _run_link(self, link: OutgoingLink, may_tell: trio.Event | None = None) -> None:
        try:
            await link.run(may_tell)
        except PeerLost:  # the client's stream has ended
            self.end()

    async def _tell(self, notice: Message) -> None:
        try:
            await self._client.send(notice)
        except PetalnetError:  # the client's stream has ended
            self.end()

    async def _serve_client(self) -> None:
        requests = self._requests
        while not requests.is_closed:
            with trio.CancelScope() as requests.scope:
                while not requests.scope.cancel_called:
                    request = await self._next(requests)
                    if request is None or not await self._serve_request(request, requests):
                        return

    async def _serve_request(self, request: Message, requests: Requests) -> bool:
        """False where the session is over."""
        if isinstance(request, Step):
            return await self._take(request, requests, "")
        if await self._take_urgent(request):
            return True
        try:
            if isinstance(request, Replay):
                if request.until:
                    await self._send_on(request, requests)
                elif request.step > self._given_up and self._nursery is not None:
                    self._replays.start(request, requests.arrived, self._nursery, self.end)
                return True
            answer = await self._answer(request)
        except PeerLost:
            raise
        except PetalnetError as error:
            answer = Error.of(error, request.step if isinstance(request, Replay) else 0)
        await self._client.send(answer)
        return True

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

    # ---- when a server of the chain is lost

    async def _take_urgent(self, request: Message) -> bool:
        """Answer what may not wait for a step that is under way; False for what is no such request."""
        if isinstance(request, AskProgress):
            sent = self._answered if self._link is None else max(self._answered, self._link.pushed)
            await self._tell(Progress(request.nonce, self._taken, self._replays.done_step, sent))
            return True
        if isinstance(request, Resume):
            answered = trio.Event()
            async with self._resuming:  # another may be read while this one waits
                try:
                    answer: Message = await self._resume(request, answered)
                except PetalnetError as error:
                    answer = Error.of(error)
                await self._tell(answer)
            answered.set()
            return True
        return False

    async def _resume(self, request: Resume, answered: trio.Event) -> Resumed:
        """Give up what is under way, and go on as the client says.

        Args:
            answered: set when the client has the answer; what it hears of links before that, it takes to be of former ones.
        Raises:
            PetalnetError: the session cannot go on so.
        """
        service, session = self._service, self.session
        await trio.sleep_until(self._resumed_at + RESUME_EVERY_S)
        self._resumed_at = trio.current_time()
        order = service.checks.resume(session, request)
        if order is not None:
            service.sessions.admit(session, len(order))
        key = self._key(self._id, request.takes_from)
        has_moved = key != self.key
        service.incoming_links.move(self, key)
        self._drops = True
        self._resumes += 1
        self._given_up = max(self._given_up, request.step)
        self._last_step = request.step  # what was above it was not the client's: a server made it up
        self._taken = min(self._taken, request.step)
        self._replays.give_up(self._given_up)
        if self._computing is not None:
            self._computing.cancel()
        if has_moved:
            await self._incoming.close()
        link = self._link
        if link is not None and not link.stays(request.pushes_to, answered):
            link.give_up()
            link = None
        if link is None:
            self._link = link = self._link_to(request.pushes_to)
            if link is not None and self._nursery is not None:
                self._nursery.start_soon(self._run_link, link, answered)
        async with self._turn:
            rows, position = await service.engine.ask(service.runner.resume, session, request.position, order, request.order_step)
            service.sessions.reached(session, rows, position)
        if position < request.position:
            raise CallerError(f"the session holds only {position} KV entries, not {request.position}")
        service.recovery.resumed += 1
        return Resumed(position, rows)

    async def _send_on(self, request: Replay, requests: Requests) -> None:
        """Send outputs once more to the next server, in their turn. Raises a PetalnetError where that is refused."""
        resumes = self._resumes
        async with self._turn:
            if self._link is not None:
                await self._link.room()
            if request.step <= self._given_up or resumes != self._resumes:
                return
            step = await self._replays.step(request)
            if resumes != self._resumes:
                return
            output = Output(step, request.position + request.tokens, step.hidden, step.prompts, 0.0, 0.0, requests.arrived)
            if self._link is None:
                await self._client.send(output.done())
                self._answered = step.step
            else:
                await self._link.put(output)

    def _key(self, session_id: str, takes_from: str) -> LinkKey | None:
        return LinkKey(session_id, self.session.first, takes_from) if takes_from else None

    def _link_to(self, pushes_to: str) -> OutgoingLink | None:
        if not pushes_to:
            return None
        greeting = OpenLink(self._id, self.session.end)
        return OutgoingLink(self._service.open_link, pushes_to, greeting, self._client, self._service.link_counts)

    # ---- steps

    async def _take(self, step: Step, requests: Requests, brought_by: str) -> bool:
        """Run a step in its turn and send its output on; False where the session is over.

        Args:
            requests: where it came from.
            brought_by: the server that brought it; "" where the client did.
        """
        if math.prod(step.hidden.shape[:2]) > WATCHED_TOKENS:
            requests.read_on(self._nursery)
        self._taken = max(self._taken, step.step)
        resumes = self._resumes
        try:
            self._turn.acquire_nowait()  # `acquire` would give others a turn
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            if step.step <= self._last_step or resumes != self._resumes:
                await trio.lowlevel.checkpoint()  # thousands of such steps may have come at once
                return True  # it came from the client as well, or nobody wants it any more
            if self._drops:
                self._last_step = step.step
            link = self._link if step.until != self.session.end else None
            if link is not None:
                await link.room()
                if resumes != self._resumes:
                    return True
            with self._service.sessions.computing(self.session):
                return await self._run(step, requests, link, brought_by)
        finally:
            self._turn.release()

    async def _run(self, step: Step, requests: Requests, link: OutgoingLink | None, brought_by: str) -> bool:
        service, session, resumes = self._service, self.session, self._resumes
        rows, new = 0, 0
        try:
            order = service.checks.step(session, step, self._client.protocol.limits.payload, pushes=link is not None)
            rows, new, _ = step.hidden.shape
            service.sessions.admit(session, max(rows, step.promise_rows))
        except PetalnetError as error:
            if self._drops or session.pushes:
                # Its followers may be on their way: they must not take what was there before for what this step would have left.
                service.sessions.reached(session, session.rows, min(session.position, step.position))
            await self._client.send(Error.of(error, step.step))
            return True
        session.begun = True
        names = None if step.names is None else split_names(step.names)
        work = StepWork(session, step, order, names, brought_by)
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
            self._computing = requests.scope
            try:
                result = await service.engine.submit(task)
            finally:  # what follows must not be cut off
                self._computing = None
        except PetalnetError as error:
            goes_on = isinstance(error, (NotFinite, InputsNotFinite))
            if goes_on:
                service.sessions.reached(session, rows, step.position)
            if resumes == self._resumes:
                await self._client.send(Error.of(error, step.step))
            return goes_on
        service.sessions.reached(session, rows, position)
        if resumes != self._resumes:
            return True
        self._replays.computed(step)
        if step.until:
            service.recovery.rebuilt_tokens += rows * new
        if link is None or step.all_hidden:
            held_s = trio.current_time() - requests.arrived
            await self._client.send(StepDone(step.step, position, result.value, result.compute_s, result.queue_s, held_s, step.spent))
            self._answered = step.step
        if link is not None and resumes == self._resumes:
            prompts = None if step.prompts is None else without_first(step.prompts, session.end - session.first)
            hidden = result.value if work.passed_on is None else work.passed_on
            await link.put(Output(step, position, hidden, prompts, result.queue_s, result.compute_s, requests.arrived, step.all_hidden))
        return True
