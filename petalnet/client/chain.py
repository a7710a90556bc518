"""The servers of one inference session, and what goes to them and comes from them.

Runs on the portal's thread. A chain has one long-lived stream to each server of its route, opened in parallel. What is to be sent when
something came is decided in `pipeline`; here are the streams. Each but the last has a task that reads it, for as long as the chain
lasts; the last one is read by whoever waits for a step, so that an answer wakes nobody else on its way. Whoever reads never waits for a
server to take something: that may be waiting for its own outputs to be read. What follows from a message is sent by tasks of their own.

The caller's fault and a full server leave the chain as it is, anything else breaks it. When a step is late, the server to blame is the
first that has not said or sent on anything. Where several may be that one, those that keep what they sent are asked for a piece of it.

A first step whose beginning the servers may have computed for an earlier session asks for that first (`Attach`), all of them at once, and
then sends only what the least of them lacks.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from petalnet.client.chunks import chunk_ends, stages_of
from petalnet.client.history import History
from petalnet.client.inputs import Inputs, Names, columns, encode_names
from petalnet.client.links import Link, close_links, gravity, open_links
from petalnet.client.pipeline import Pending, Pipeline, Send
from petalnet.client.precision import step_on_the_wire, step_once_more
from petalnet.client.recovery import Recovery
from petalnet.client.requests import (
    Answer,
    Full,
    Target,
    blamed,
    describe_route,
    find_hops,
    retrying,
    silent,
)
from petalnet.client.trace import HopTimes, StepTimes
from petalnet.client.visit import Visit
from petalnet.errors import CallerError, PeerLost, PetalnetError, ProtocolError, ServerError, one_line
from petalnet.p2p.fields import Blob, Message, blob_size, size_of
from petalnet.p2p.messages import UNIT_TOKENS, Attach, Attached, Error, LinkDown, Replay, Reserve, Reserved, Step, StepDone
from petalnet.routing.routes import Hop

logger = logging.getLogger(__name__)

LEAST_UNITS_TO_ATTACH = 2
"""Whole units of a prompt from which on asking for them is worth a round trip."""
PROBE_WITHIN_S = 5.0
"""For servers to prove that they have done a step that is late: they have it in memory."""
FEW_TOKENS = 16
"""New tokens up to which a step takes as long on the network as one of a single token."""
REMEMBERED_STEPS = 8
"""Such steps, of which the least network time counts."""


@dataclass(frozen=True)
class Counts:
    """What went through the client.

    Attributes:
        relayed_steps: since the chain was opened, outputs that it carried from one server to the next.
        replays: likewise, outputs that it asked for once more because they may have been lost on the way.
        recoveries: in all of the session, how often servers that were lost had to be replaced.
        rebuilt_tokens: KV entries of a row that others computed anew for that.
        uploaded_bytes: what the client sent for it: arrays, without headers.
    """

    relayed_steps: int
    replays: int
    recoveries: int = 0
    rebuilt_tokens: int = 0
    uploaded_bytes: int = 0


class Chain:
    """The links of one session, first block to last; `open` makes one.

    Attributes:
        links: as opened.
        history: what the session's KV entries were computed from.
        promised_rows: rows for which all servers have set aside room.
        failure: what broke the chain, None while it can be used.
        is_new: whether no server has had a step.
        uploaded_bytes: what was sent to compute entries anew: arrays, without headers.
        recoveries: of the session, so far.
        trace_sink: is told of each step that is complete.
    """

    def __init__(self, target: Target, links: list[Link], promised_rows: int = 0, history: History | None = None) -> None:
        """
        Args:
            promised_rows: that the sessions were opened with.
            history: is kept up to date.
        """
        self.target = target
        self.links = links
        self.history = history or History()
        self.promised_rows = promised_rows
        self.failure: Exception | None = None
        self.uploaded_bytes = 0
        self.recoveries: Sequence[Recovery] = ()
        self.is_new = True
        self.trace_sink: Callable[[StepTimes], None] | None = None
        self._last = len(links) - 1
        self._codecs = frozenset.intersection(*(frozenset(link.opened.codecs) for link in links))
        self._pipeline = Pipeline([link.hop for link in links], target.settings.direct_chains)
        self._number = 0  # of the last step
        self._is_rebuilding = False  # the steps under way were computed before, elsewhere
        self._has_backlog = False  # whether answers of a step that was given up may be on their way
        self._error: Exception | None = None  # what the step under way met
        self._waiting: trio.CancelScope | None = None  # of the step or request under way
        self._reading = trio.CancelScope()
        self._proofs: dict[int, trio.Event] | None = None  # while servers are asked whether they have done a step that is late
        self._network_s: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    @classmethod
    async def open(
        cls, target: Target, max_length: int, promise_rows: int = 0, full: Full | None = None, history: History | None = None
    ) -> Chain:
        """Find a route and open a session of `max_length` KV entries a row on each of its servers, with room for `promise_rows` rows.

        Args:
            promise_rows: 0 to ask for room with the first step.
            full: servers that have no room, as far as that is known.
            history: what the session's entries were computed from, in another chain; it is kept up to date.
        Raises: as `retrying`.
        """

        async def attempt(peers: frozenset[str]) -> Chain:
            return await cls.open_once(target, max_length, promise_rows, peers, history)

        return await retrying(target, attempt, full)

    @classmethod
    async def open_once(
        cls, target: Target, max_length: int, promise_rows: int, full: frozenset[str], history: History | None = None
    ) -> Chain:
        """`open`, without the servers in `full`, and without another try. Raises Busy, CallerError, MissingBlocksError, ServerError."""
        hops = await find_hops(target, full)
        links = await open_links(target, hops, max_length, promise_rows)
        chain = cls(target, links, promise_rows, history)
        target.swarm.membership.start(chain._read_all)
        if target.settings.show_route:
            logger.info("route: %s", describe_route(hops))
        return chain

    @property
    def hops(self) -> list[Hop]:
        return [link.hop for link in self.links]

    @property
    def counts(self) -> Counts:
        recoveries = self.recoveries
        tokens, uploaded = sum(recovery.tokens for recovery in recoveries), sum(recovery.uploaded_bytes for recovery in recoveries)
        return Counts(sum(self._pipeline.relayed_steps), self._pipeline.replays, len(recoveries), tokens, uploaded)

    @property
    def round_trip_s(self) -> float | None:
        """Expected seconds that a step of one token spends on the network, through the whole chain and back; None before the first one."""
        return min(self._network_s, default=None)

    # ---- steps

    async def step(self, visit: Visit) -> list[Blob]:
        """Run new tokens through all blocks, from where the history ends on.

        Returns:
            as `Visit.outputs`; what the servers have answered is noted there and in the history also where others fail.
        Raises:
            CallerError, Busy: a server refused; the chain goes on, and servers before it roll back with the next step.
            ServerError: the chain is broken; `close` it.
        """
        self._require_whole()
        history, inputs = self.history, visit.inputs
        if self.is_new:
            self.is_new = False
            if inputs.names is not None and not history.position:
                await self._attach(visit, inputs.names)
        began = time.perf_counter()
        hidden, inputs = visit.rest(history.position)
        requests = visit.steps(history.position, self._number + 1, self._ends(hidden, history.position, inputs))
        self._number = requests[-1].step
        try:
            await self._run(requests)
        finally:
            self._pipeline.abandon()
            finished = self._pipeline.finished
            for pending in finished:
                self._note(pending)
                visit.answered([pending.answers[hop] for hop in sorted(pending.answers)])
        rows = hidden.shape[0]
        self.promised_rows = max(self.promised_rows, rows, inputs.promise_rows)
        membership = self.target.swarm.membership
        for link in self.links:
            membership.mark_ok(link.hop.peer_id)
            for row in visit.inputs.names or ():
                membership.sent_names.note(link.hop.peer_id, row)
        self._note_times(finished, hidden.shape[1], time.perf_counter() - began)
        return visit.outputs()

    def _note(self, pending: Pending) -> None:
        sent = pending.sent or pending.request
        self.history.note(pending.request, sent.hidden, sent.codec)

    async def rebuild(self) -> None:
        """Have the servers of a new chain compute all entries of the history. Raises as `step`."""
        self.is_new = False
        requests = self.history.steps(self._cut, self._number + 1)
        self._number = requests[-1].step
        self._is_rebuilding = True
        try:
            await self._run(requests)
        except Exception as error:
            self._break(error)
            raise
        finally:
            self._is_rebuilding = False

    def _cut(self, rows: int, new: int, position: int) -> list[int]:
        """Where to cut what is computed anew."""
        shape = (rows, new, self.history.hidden_size)
        return self._ends(Blob("float32", shape, "raw", b""), position, Inputs())

    def _ends(self, hidden: Blob, position: int, inputs: Inputs) -> list[int]:
        """Where to cut a step into chunks: one past the last token of each."""
        rows, new, size = hidden.shape
        if new <= UNIT_TOKENS:
            return [new]
        host = self.target.swarm.membership.host
        token_bytes = blob_size(hidden.dtype, (size,), hidden.codec)
        stages = stages_of(self.hops, [host.round_trip_s(link.hop.peer_id) for link in self.links], token_bytes)
        prompt_length = 0 if inputs.prompts is None else inputs.prompts.shape[2]
        return chunk_ends(new, rows, stages, token_bytes=token_bytes, position=position, first=prompt_length)

    async def _run(self, requests: list[Step]) -> list[Pending]:
        """Have steps computed; what they came to, in their order. Raises as `step`."""
        pipeline = self._pipeline
        self._error = None
        sends = pipeline.begin(requests)
        scope = trio.CancelScope(deadline=trio.current_time() + self.target.settings.request_timeout)
        if len(sends) == 1 and not self._has_backlog:
            with scope as self._waiting:
                await self._send(*sends[0])
                await self._receive_all()
        else:
            # Answers are read while chunks are sent, else the last server could wait for the client and the client for the first.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_all, sends)
                with scope as self._waiting:
                    await self._receive_all()
                if self.failure is not None or (self._error is None and not pipeline.is_complete):
                    nursery.cancel_scope.cancel()  # otherwise the message under way is finished: a part of one would break the stream
        self._waiting = None
        if pipeline.is_complete:
            self._has_backlog = False  # what came before this answer has been read
            return pipeline.finished
        if self._error is None:
            await self._blame_for_silence()
        self._has_backlog = True
        pipeline.abandon()
        assert self._error is not None
        raise self._error

    async def _receive_all(self) -> None:
        """Read the last server's stream until the steps under way are done, or have failed."""
        while not self._pipeline.is_complete and self._error is None:
            await self._receive(self._last)

    async def _send_all(self, sends: list[Send]) -> None:
        for send in sends:
            if self._error is None:
                await self._send(*send)

    async def _send(self, index: int, message: Message) -> None:
        """Send to a hop. A failure breaks the chain."""
        try:
            if type(message) is Step:
                step = self._on_the_wire(index, message)
                if step is not message and not index:
                    self._pipeline.sent(step)
                message = step
            if self._is_rebuilding:
                self.uploaded_bytes += size_of(message)
            await self.links[index].stream.send(message)
        except ValueError as error:  # CallerError is not among what `send` raises: the message is too long
            self._stop(CallerError(str(error)))
        except PetalnetError as error:
            self._fail(index, error)

    def _on_the_wire(self, index: int, step: Step) -> Step:
        """A step with its hidden states in the form in which a hop gets them."""
        precision, opened = self.target.settings.wire_precision, self.links[index].opened
        if self._is_rebuilding:
            return step_once_more(step, opened.dtype, self._codecs)
        if precision == "exact" and opened.dtype == step.hidden.dtype:
            return step  # as for most tokens: nothing could be shorter
        if precision != "auto":
            return step_on_the_wire(step, precision, opened.dtype, self._codecs)
        hops = self.hops
        bytes_s = self.target.swarm.membership.host.bytes_s(hops[index].peer_id)
        return step_on_the_wire(step, precision, opened.dtype, self._codecs, bytes_s, max(hop.prefill_s for hop in hops))

    async def _receive(self, index: int) -> None:
        """Take the next message of a hop, and have sent what follows from it. A failure breaks the chain."""
        link = self.links[index]
        try:
            message = await link.stream.receive()
            sends = self._take_answer(index, message) if type(message) is StepDone else self._take_other(index, message)
        except PetalnetError as error:
            self._fail(index, error)
        else:
            for send in sends:
                self.links[send.hop].onward.append(send.message)
                self.links[send.hop].has_onward.unpark()

    def _take_answer(self, index: int, done: StepDone) -> list[Send]:
        """A hop has answered a step. Raises ProtocolError where that makes no sense."""
        pipeline = self._pipeline
        if self._proofs is not None:
            if done.step == pipeline.oldest.request.step and index in self._proofs:
                self._proofs[index].set()
            return []
        is_news = pipeline.is_expected(index, done.step)
        sends = pipeline.answered(index, done)
        if is_news and self._waiting is not None and not pipeline.is_complete:
            # Something moves: a long prompt may take longer in all.
            self._waiting.deadline = trio.current_time() + self.target.settings.request_timeout
        return sends

    def _take_other(self, index: int, message: Message | None) -> list[Send]:
        """A hop has sent something else, or ended its stream. Raises ServerError where it must not."""
        link, pipeline = self.links[index], self._pipeline
        peer_id = link.hop.peer_id
        if message is None:
            raise PeerLost("the server closed the stream", peer_id)
        if isinstance(message, LinkDown):
            if index < self._last:
                next_id, reason = self.links[index + 1].hop.peer_id, one_line(message.reason)
                logger.info("server %s does not reach %s; this client carries between them: %s", peer_id, next_id, reason)
            return pipeline.link_down(index, message.pushed)
        if isinstance(message, Error) and message.step:
            if self._proofs is None and pipeline.is_pending(message.step):
                error = message.exception(peer_id)
                if pipeline.was_replayed(message.step, index):
                    self._break(PeerLost(f"an output of server {peer_id} was lost on its way, and it does not have it any more: {error}"))
                elif isinstance(error, ServerError):
                    raise error
                else:
                    self._stop(blamed(self.target, link.hop, error))
            return []
        if link.replied is not None and not link.replied.is_set():
            link.reply = message
            link.replied.set()
            return []
        if not isinstance(message, Error):
            raise ProtocolError(f"sent {message.name} unasked", peer_id)
        # The server has closed the session, and says why; nobody is to blame.
        raise message.exception(peer_id)

    def _stop(self, error: Exception) -> None:
        """What is under way has failed."""
        if self._error is None:
            self._error = error
        if self._waiting is not None:
            self._waiting.cancel()

    def _fail(self, index: int, error: PetalnetError) -> None:
        """A hop's stream has failed, or its server closed the session and said why. What follows from an earlier failure blames nobody."""
        if self.failure is None:
            self._break(blamed(self.target, self.links[index].hop, error))

    def _break(self, error: Exception) -> None:
        """Nobody can go on with this chain."""
        if self.failure is None:
            self.failure = error
        self._stop(error)

    def _require_whole(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def _read_all(self) -> None:
        """Read all streams but the last one's until the chain is closed."""
        with self._reading:
            async with trio.open_nursery() as nursery:
                for index in range(self._last):
                    nursery.start_soon(self._read, index)
                    nursery.start_soon(self._send_onward, index)
                nursery.start_soon(self._send_onward, self._last)

    async def _read(self, index: int) -> None:
        while self.failure is None:
            await self._receive(index)

    async def _send_onward(self, index: int) -> None:
        link = self.links[index]
        while True:
            while link.onward:
                await self._send(index, link.onward.popleft())
            await link.has_onward.park()

    async def _blame_for_silence(self) -> None:
        """The steps under way are late: break the chain, and blame the first server that has done nothing.

        Of those that may be that one, all but the last keep what they sent: whoever has done the step can show a piece of it.
        """
        pending = self._pipeline.oldest
        suspects = range(pending.reached + 1, self._last + 1)
        keeping = [index for index in suspects if self._pipeline.is_up(index)] if pending.request.hidden.shape[1] else []
        self._proofs = {index: trio.Event() for index in keeping}
        with trio.CancelScope(deadline=trio.current_time() + PROBE_WITHIN_S) as self._waiting:
            for index in keeping:
                await self._send(index, Replay(pending.request.step, pending.request.position, 1))
            for proof in self._proofs.values():
                await proof.wait()
        proven = {index for index, proof in self._proofs.items() if proof.is_set()}
        self._waiting = self._proofs = None
        late = next(index for index in suspects if index not in proven)  # the last one keeps nothing
        self._fail(late, silent(self.target, self.links[late].hop))

    def _note_times(self, finished: list[Pending], new: int, wall_s: float) -> None:
        spent = [pending.spent[self._last] for pending in finished]
        if len(spent) == 1 and new <= FEW_TOKENS:
            self._network_s.append(max(wall_s - sum(spent[0][2::3]), 0.0))
        if self.trace_sink is None:
            return
        sums = spent[0] if len(spent) == 1 else [sum(times) for times in zip(*spent, strict=True)]
        hops = []
        for index, link in enumerate(self.links):
            direct = self._pipeline.is_up(index) and not any(index in pending.carried for pending in finished)
            queue_s, compute_s, held_s = sums[3 * index : 3 * index + 3]
            hops.append(HopTimes(link.hop.peer_id, link.hop.first, link.hop.end, queue_s, compute_s, held_s, direct))
        self.trace_sink(StepTimes(new, len(finished), wall_s, tuple(hops)))

    # ---- other requests

    async def reserve(self, rows: int) -> None:
        """Have all servers set aside room for so many rows, where they have not yet; before a step with more rows than ever.

        Raises:
            CallerError, Busy: a server has no room; the chain goes on.
            ServerError: the chain is broken.
        """
        self._require_whole()
        if rows > self.promised_rows:
            await self._ask_all(Reserve(rows), Reserved)
            self.promised_rows = rows

    async def _attach(self, visit: Visit, named: Names) -> None:
        """Have the servers begin the session with what they know of the named rows; the history begins with what all of them have then.

        Asks only where every server may know something, and never for tokens whose outputs are wanted.
        """
        hidden, keep = visit.hidden, visit.inputs.keep
        units = (hidden.shape[1] - keep) // UNIT_TOKENS
        if not keep or units < LEAST_UNITS_TO_ATTACH:
            return
        rows = [row[:units] for row in named]
        sent = self.target.swarm.membership.sent_names
        for link in self.links:
            if not link.opened.shares_prefixes:
                units = min(units, *(sent.known(link.hop.peer_id, row) for row in rows))
        if units < LEAST_UNITS_TO_ATTACH:
            return
        rows = [row[:units] for row in rows]
        replies = await self._ask_all(Attach(encode_names(tuple(rows))), Attached)
        for index, (link, reply) in enumerate(zip(self.links, replies, strict=True)):
            if reply.position % UNIT_TOKENS or reply.position > units * UNIT_TOKENS:
                self._fail(index, ProtocolError(f"attached {reply.position} tokens where {units} units were named", link.hop.peer_id))
                self._require_whole()
            for row in rows:
                sent.forget(link.hop.peer_id, row[reply.position // UNIT_TOKENS :])
        attached = min(reply.position for reply in replies)
        if attached:
            step = self._on_the_wire(0, Step(0, 0, columns(hidden, 0, attached), reach=visit.end))
            self.history.note(step, step.hidden, step.codec)

    async def _ask_all(self, request: Message, expected: type[Answer]) -> list[Answer]:
        """Send all servers a request that is no step, and wait for their answers, which are of the expected type.

        Raises: as `reserve`.
        """
        self._error = None
        for link in self.links:
            link.replied, link.reply = trio.Event(), None
        with trio.CancelScope(deadline=trio.current_time() + self.target.settings.request_timeout) as self._waiting:
            async with trio.open_nursery() as nursery:
                for index in range(len(self.links)):
                    nursery.start_soon(self._ask, index, request)
        self._waiting = None
        errors: list[Exception] = [] if self._error is None else [self._error]
        replies: list[Answer] = []
        for link in self.links:
            reply, link.replied = link.reply, None
            if reply is None:
                if not errors:
                    errors.append(blamed(self.target, link.hop, silent(self.target, link.hop)))
            elif type(reply) is expected:
                self.target.swarm.membership.mark_ok(link.hop.peer_id)
                replies.append(reply)
            elif isinstance(reply, Error):
                errors.append(blamed(self.target, link.hop, reply.exception(link.hop.peer_id)))
            else:
                wrong = ProtocolError(f"answered {reply.name} instead of {expected.name}", link.hop.peer_id)
                errors.append(blamed(self.target, link.hop, wrong))
        if not errors:
            return replies
        error = min(errors, key=gravity)
        if isinstance(error, ServerError):
            self._break(error)
        raise error

    async def _ask(self, index: int, request: Message) -> None:
        replied = self.links[index].replied
        assert replied is not None
        await self._send(index, request)
        while index == self._last and not replied.is_set() and self._error is None:
            await self._receive(index)
        await replied.wait()

    async def close(self) -> None:
        """Say goodbye to every server, which frees the KV there. Bounded; never raises for a dead server."""
        self._break(PeerLost("the chain was closed"))
        self._reading.cancel()
        await close_links(self.links)
