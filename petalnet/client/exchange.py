"""What goes to the servers of one session and comes from them.

Runs on the portal's thread. What is to be sent when something came is decided in `pipeline`; here are the streams. Each but the last has
a task that reads it, for as long as its server belongs to the chain; the last one is read by whoever waits for a step, so that an answer
wakes nobody else on its way. Whoever reads never waits for a server to take something: that may be waiting for its own outputs to be read.
What follows from a message, and what is long, is sent by tasks of the links, which finish what they have begun whatever happens.

The caller's fault and a full server leave the chain as it is. A stream that fails makes its server one that is lost, and the chain one that
has to be mended (see `mending`). Where a step takes too long, the servers are asked what they do (see `diagnosis`): those that are gone are
lost, and two that do not reach each other have this client between them from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise

import trio

from petalnet.client.diagnosis import Diagnosis, diagnose
from petalnet.client.lateness import LEAST_S, Lateness
from petalnet.client.links import Link, close_links, gravity
from petalnet.client.pipeline import Pending, Pipeline, Send
from petalnet.client.precision import step_on_the_wire, step_once_more
from petalnet.client.replacements import has_stand_in
from petalnet.client.requests import Answer, Target, blamed, silent
from petalnet.errors import CallerError, PeerLate, PeerLost, PeerUnreachable, PetalnetError, ProtocolError, ServerError, one_line
from petalnet.p2p.fields import Message, size_of
from petalnet.p2p.messages import Error
from petalnet.p2p.session_messages import Attached, Draining, LinkDown, Progress, Replay, Reserved, Resumed, Step, StepDone
from petalnet.routing.routes import Hop

logger = logging.getLogger(__name__)

MOST_ODD_REFUSALS = 2
"""How often a server that refuses what another one brought is taken to have been brought something else than this client gave: until both
have been replaced. Then it is the caller's mistake after all."""
PROBE_WITHIN_S = 5.0
"""For servers to prove that they have done a step that is late: they have it in memory."""
FIRST_LOOK_S = LEAST_S / 2
"""Nothing is late earlier: a step that is done by then costs no thought."""


class Watch:
    """Over the steps under way.

    Attributes:
        moved_at: when anything was heard of them last.
        deadline: when to look after them again.
        asked: how often servers were asked about them since then.
    """

    def __init__(self, now: float) -> None:
        self.moved(now)

    def moved(self, now: float) -> None:
        """Something was heard."""
        self.moved_at, self.deadline, self.asked = now, now + FIRST_LOOK_S, 0


class Exchange:
    """The links of one session, first block to last, and the steps under way in them; `run_links` must be running meanwhile.

    Attributes:
        links: as they stand now.
        pipeline: what is under way.
        failure: what broke the chain, None while it can be used.
        cut: servers that do not reach the next ones, by the peer ids of both.
        is_rebuilding: whether the steps under way were computed before, elsewhere.
        uploaded_bytes: what was sent of these: arrays, without headers.
        lateness: how long steps take.
    """

    def __init__(self, target: Target, links: Sequence[Link]) -> None:
        self.target = target
        self.links: list[Link] = []
        self.failure: Exception | None = None
        self.cut: set[tuple[str, str]] = set()
        self.doubted: dict[str, set[str]] = {}  # servers that brought a step on which others failed, and these
        self.cleared: set[str] = set()  # of these, those that had no part in it
        self._odd_refusals = 0
        self.is_rebuilding = False
        self.uploaded_bytes = 0
        self.lateness = Lateness(max((link.hop.prefill_s for link in links), default=0.0))
        self._nursery: trio.Nursery | None = None
        self._is_closed = False
        self._has_backlog = False  # whether answers of a step that was given up may be on their way
        self._error: Exception | None = None  # what the steps under way met
        self._waiting: trio.CancelScope | None = None  # of the steps under way
        self._moved_at = 0.0  # when anything was heard of them
        self._proofs: dict[int, trio.Event] | None = None  # while servers are asked whether they have done a step that is late
        links[-1].is_last = True
        self._arrange([link.hop for link in links], links)
        self._set_links(links)

    def resume(self, hops: Sequence[Hop], kept: Sequence[Link]) -> None:
        """These are to be the hops of the chain; those links that are kept are about to be told of their new neighbours."""
        self.links = list(kept)
        for link in kept:
            link.is_resuming = True
        self._arrange(hops, kept)

    def join(self, links: Sequence[Link]) -> None:
        """Those that were missing are there, or not all of them."""
        hops = self.pipeline.hops  # which is the same as before: some links may be known to be down already
        places = {hop.first: index for index, hop in enumerate(hops)}
        for link in links:
            link.index = places[link.hop.first]
            link.is_built, link.is_last = False, link.hop.end == hops[-1].end
            self.start(link)
        self._set_links(sorted([*self.links, *links], key=lambda link: link.index))

    def _arrange(self, hops: Sequence[Hop], links: Iterable[Link]) -> None:
        """These are the hops of the chain from now on, of which some have links already; nothing is under way."""
        places = {(hop.first, hop.end): index for index, hop in enumerate(hops)}
        for link in links:
            link.index = places[link.hop.first, link.hop.end]
        carried = [index for index, (hop, after) in enumerate(pairwise(hops)) if (hop.peer_id, after.peer_id) in self.cut]
        self.pipeline = Pipeline(hops, self.target.settings.direct_chains, carried)

    def _set_links(self, links: Sequence[Link]) -> None:
        """All hops have their links."""
        self.links = list(links)
        self._codecs = frozenset.intersection(*(frozenset(link.opened.codecs) for link in links))

    @property
    def hops(self) -> list[Hop]:
        """The servers."""
        return [link.hop for link in self.links]

    @property
    def far_s(self) -> float:
        """Seconds to the farthest server and back, as far as they are known."""
        host = self.target.swarm.membership.host
        return max([host.round_trip_s(link.hop.peer_id) or 0.0 for link in self.links])

    # ---- steps

    @property
    def _is_over(self) -> bool:
        """Whether there is nothing to wait for any more: all steps under way are done, or one has failed."""
        return self.pipeline.is_complete or self._error is not None

    async def run(self, sends: Sequence[Send]) -> list[Pending]:
        """Have steps computed that the pipeline has begun; what they came to, in their order.

        Raises:
            CallerError, Busy: a server refused; the chain goes on.
            ServerError: the chain is broken.
        """
        pipeline = self.pipeline
        self._error = None
        self._moved_at = trio.current_time()
        if len(sends) == 1 and not self._has_backlog and sends[0].is_short:
            with trio.CancelScope() as self._waiting:
                await self._send(self.links[sends[0].hop], sends[0].message)
        else:
            # Answers are read while chunks are sent, else the last server could wait for the client and the client for the first.
            self._post(sends)
        watch = Watch(self._moved_at)
        while not self._is_over:
            with trio.CancelScope(deadline=watch.deadline) as self._waiting:
                while not self._is_over:
                    await self._receive(self.links[-1])
            if self._waiting.cancelled_caught and not self._is_over:
                await self._look_after(watch)
        self._waiting = None
        if pipeline.is_complete:
            self._has_backlog = False  # what came before this answer has been read
            return pipeline.finished
        for link in self.links:
            link.onward.clear()  # what was not begun is of no use any more
        self._has_backlog = True
        pipeline.abandon()
        assert self._error is not None
        raise self._error

    async def run_again(self, sends: Sequence[Send]) -> None:
        """`run` for steps that were computed before, elsewhere; whatever fails breaks the chain."""
        self.is_rebuilding = True
        try:
            await self.run(sends)
        except Exception as error:  # whatever it is goes on; servers may have a part of the entries, so nobody can go on from here
            self._break(error)
            raise
        finally:
            self.is_rebuilding = False
            self.pipeline.abandon()

    async def _look_after(self, watch: Watch) -> None:
        """The steps under way take long: see whether they still should."""
        now, timeout_s = trio.current_time(), self.target.settings.request_timeout
        if watch.moved_at != self._moved_at:
            watch.moved(self._moved_at)
        if now >= watch.moved_at + timeout_s:
            await self._blame_for_silence()
            return
        rows, new, _ = self.pipeline.oldest.request.hidden.shape
        lateness, round_trip_s = self.lateness, self.far_s
        suspect_at = watch.moved_at + lateness.suspect_after_s(rows * new, round_trip_s, watch.asked)
        if now >= suspect_at:
            watch.asked += 1
            await self._examine(lateness.answer_within_s(rows * new, round_trip_s))
            suspect_at = watch.moved_at + lateness.suspect_after_s(rows * new, round_trip_s, watch.asked)
        watch.deadline = min(suspect_at, watch.moved_at + timeout_s)

    async def _examine(self, within_s: float) -> None:
        """Ask the servers what became of the oldest step: those that are gone are lost, where somebody else holds their blocks."""
        pipeline = self.pipeline
        oldest = pipeline.oldest
        found = Diagnosis()
        with trio.CancelScope() as self._waiting:
            async with trio.open_nursery() as nursery:

                async def read_last() -> None:
                    while not self._is_over:
                        await self._receive(self.links[-1])
                    nursery.cancel_scope.cancel()

                nursery.start_soon(read_last)
                found = await diagnose(self.target, self.links, oldest, within_s)
                nursery.cancel_scope.cancel()
        if self._is_over or not pipeline.is_pending(oldest.request.step):
            return
        if found.cut is not None:
            self._cut(found.cut)
        for index in sorted(found.gone):
            link = self.links[index]
            if await has_stand_in(self.target, link):
                self.fail(link, PeerLate("it does not answer any more", link.hop.peer_id))

    def _cut(self, index: int) -> None:
        """A server sends its outputs to the next one, which does not get them: this client carries them from now on."""
        one, other = self.links[index].hop.peer_id, self.links[index + 1].hop.peer_id
        if (one, other) not in self.cut:
            self.cut.add((one, other))
            self.target.swarm.membership.mark_cut(one, other)
            self._break(PeerLost(f"what server {one} sends does not reach server {other}"))

    def _post(self, sends: Sequence[Send]) -> None:
        """Have messages sent by the tasks of their links."""
        for send in sends:
            link = self.links[send.hop]
            link.onward.append(send.message)
            link.has_onward.unpark()

    async def _send(self, link: Link, message: Message) -> None:
        """Send to a hop. A failure breaks the chain."""
        if type(message) is Step:
            step = self.on_the_wire(link, message)
            if step is not message and not link.index:
                self.pipeline.sent(step)
            message = step
        if self.is_rebuilding:
            self.uploaded_bytes += size_of(message)
        is_done = False
        try:
            await link.stream.send(message)
            is_done = True
        except ValueError as error:  # CallerError is not among what `send` raises: the message is too long
            is_done = True
            self._stop(CallerError(str(error)))
        except PetalnetError as error:
            is_done = True
            self.fail(link, error)
        finally:
            link.is_torn = link.is_torn or not is_done

    def on_the_wire(self, link: Link, step: Step) -> Step:
        """A step with its hidden states in the form in which a hop gets them."""
        precision, opened = self.target.settings.wire_precision, link.opened
        if self.is_rebuilding:
            return step_once_more(step, opened.dtype, self._codecs)
        if precision == "exact" and opened.dtype == step.hidden.dtype:
            return step  # as for most tokens: nothing could be shorter
        if precision != "auto":
            return step_on_the_wire(step, precision, opened.dtype, self._codecs)
        bytes_s = self.target.swarm.membership.host.bytes_s(link.hop.peer_id)
        return step_on_the_wire(step, precision, opened.dtype, self._codecs, bytes_s, max(hop.prefill_s for hop in self.hops))

    async def _receive(self, link: Link) -> None:
        """Take the next message of a hop, and have sent what follows from it. A failure breaks the chain."""
        try:
            message = await link.stream.receive()
            sends = self._take_answer(link, message) if type(message) is StepDone else self._take_other(link, message)
        except PetalnetError as error:
            self.fail(link, error)
        else:
            self._post(sends)

    def _take_answer(self, link: Link, done: StepDone) -> list[Send]:
        """A hop has answered a step. Raises ProtocolError where that makes no sense."""
        pipeline, index = self.pipeline, link.index
        if self._proofs is not None:
            if done.step == pipeline.oldest.request.step and index in self._proofs:
                self._proofs[index].set()
            return []
        if pipeline.is_expected(index, done.step):
            self._moved_at = trio.current_time()  # a long prompt may take longer in all
        sends = pipeline.answered(index, done)
        if pipeline.is_complete and self._waiting is not None and not link.is_last:
            self._waiting.cancel()  # of whoever reads the last server's stream
        return sends

    def _take_other(self, link: Link, message: Message | None) -> list[Send]:
        """A hop has sent something else, or ended its stream. Raises ServerError where it must not."""
        pipeline, index, peer_id = self.pipeline, link.index, link.hop.peer_id
        if message is None:
            raise PeerLost("the server closed the stream", peer_id)
        if isinstance(message, LinkDown):
            if link.is_resuming:
                return []  # of a link that it has given up by now
            self._note_down(link, one_line(message.reason))
            return pipeline.link_down(index, message.pushed)
        if isinstance(message, Draining):
            link.drains = True
            return []
        if isinstance(message, Progress):
            link.progress = message
            if link.has_progress is not None:
                link.has_progress.set()
            return []
        if isinstance(message, Error) and message.step:
            if self._proofs is None and pipeline.is_pending(message.step):
                self._take_refusal(link, message)
            return []
        if link.replied is not None and not link.replied.is_set():
            if link.is_resuming and isinstance(message, (Reserved, Attached)):
                return []  # to a question that nobody asks any more
            link.is_resuming = link.is_resuming and not isinstance(message, Resumed)
            link.reply = message
            link.replied.set()
            return []
        if not isinstance(message, Error):
            raise ProtocolError(f"sent {message.name} unasked", peer_id)
        # The server has closed the session, and says why; nobody is to blame.
        raise message.exception(peer_id)

    def _note_down(self, link: Link, reason: str) -> None:
        if not link.is_last:
            next_id = self.pipeline.hops[link.index + 1].peer_id
            logger.info("server %s does not reach %s; this client carries between them: %s", link.hop.peer_id, next_id, reason)

    def _take_refusal(self, link: Link, message: Error) -> None:
        """A step under way has failed at a hop. Raises ServerError where that is its fault."""
        error, hop = message.exception(link.hop.peer_id), link.hop
        if self.pipeline.was_replayed(message.step, link.index):
            self._break(PeerLost(f"an output of server {hop.peer_id} was lost on its way, and it does not have it any more: {error}"))
        elif isinstance(error, ServerError):
            raise error
        elif isinstance(error, CallerError) and self._brought_by(link) is not None and self._odd_refusals < MOST_ODD_REFUSALS:
            # It was no mistake for the servers before, so one of them may have made it.
            self._odd_refusals += 1
            raise ServerError(f"it refuses what another server brought: {error}", hop.peer_id)
        else:
            self._stop(blamed(self.target, hop, error))

    def _stop(self, error: Exception) -> None:
        """What is under way has failed."""
        if self._error is None:
            self._error = error
        if self._waiting is not None:
            self._waiting.cancel()

    def fail(self, link: Link, error: PetalnetError) -> None:
        """A hop's stream has failed, or its server closed the session and said why: it is lost. What may follow from an earlier failure
        blames nobody."""
        if self._is_closed:
            link.lost = link.lost or error  # whoever reads this stream stops: it fails at once, again and again
        elif link.lost is None:
            is_own = self.failure is None or isinstance(error, (PeerLost, PeerUnreachable))
            brought_by = self._brought_by(link)
            link.lost = blamed(self.target, link.hop, error, brought_by) if is_own else error
            if is_own and brought_by is not None and not isinstance(error, (PeerLost, PeerUnreachable)):
                failed = self.doubted.setdefault(brought_by.peer_id, set())
                failed.add(link.hop.peer_id)
                before = self.links[link.index - 1]
                if len(failed) > 1 and before.lost is None:
                    before.lost = link.lost  # the second server that fails on what this one brings
                    self.cleared |= failed
            if link.replied is not None:
                link.replied.set()
            self._break(link.lost)
        elif any(link is other for other in self.links):
            self._break(link.lost)

    def part_with(self, link: Link) -> None:
        """Go on without a server that has done nothing wrong."""
        link.lost = PeerLost("it is about to leave", link.hop.peer_id)
        self._break(link.lost)

    def _brought_by(self, link: Link) -> Hop | None:
        """The hop whose server brings this one its steps, where that is so."""
        before = link.index - 1
        return self.pipeline.hops[before] if before >= 0 and self.pipeline.is_up(before) else None

    def _break(self, error: Exception) -> None:
        """Nobody can go on with this chain as it is."""
        if self.failure is None:
            self.failure = error
        self._stop(error)

    def require_whole(self) -> None:
        """Raises what broke the chain."""
        if self.failure is not None:
            raise self.failure

    # ---- the tasks of the links

    async def run_links(self) -> None:
        """Serve all links until the chain is closed."""
        async with trio.open_nursery() as self._nursery:
            for link in self.links:
                self._nursery.start_soon(self._serve, link)
            if self._is_closed:
                return
            await trio.sleep_forever()

    def start(self, link: Link) -> None:
        """Serve one link more."""
        if self._nursery is not None:
            self._nursery.start_soon(self._serve, link)

    async def _serve(self, link: Link) -> None:
        with link.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_onward, link)
                while link.lost is None and not link.is_last:
                    await self._receive(link)

    async def _send_onward(self, link: Link) -> None:
        while True:
            while link.onward:
                await self._send(link, link.onward.popleft())
            await link.has_onward.park()

    async def _blame_for_silence(self) -> None:
        """The steps under way are late for good: break the chain, and blame the first server that has done nothing.

        Of those that may be that one, all but the last keep what they sent: whoever has done the step can show a piece of it.
        """
        pending = self.pipeline.oldest
        suspects = range(pending.reached + 1, pending.last + 1)
        keeping = [index for index in suspects if self.pipeline.is_up(index)] if pending.request.hidden.shape[1] else []
        self._proofs = {index: trio.Event() for index in keeping}
        with trio.CancelScope(deadline=trio.current_time() + PROBE_WITHIN_S) as self._waiting:
            for index in keeping:
                self._post([Send(index, Replay(pending.request.step, pending.request.position, 1))])
            for proof in self._proofs.values():
                await proof.wait()
        proven = {index for index, proof in self._proofs.items() if proof.is_set()}
        self._waiting = self._proofs = None
        late = next(index for index in suspects if index not in proven)  # the last one keeps nothing
        self.fail(self.links[late], silent(self.target, self.links[late].hop))

    # ---- other requests

    async def ask_all(self, request: Message, expected: type[Answer]) -> list[Answer]:
        """Send all servers a request that is no step, and wait for their answers, which are of the expected type.

        Raises: as `run`.
        """
        replies = await self.ask_each([(link, request) for link in self.links], expected, self.target.settings.request_timeout)
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        if not errors:
            return [reply for reply in replies if not isinstance(reply, Exception)]
        raise min(errors, key=gravity)

    async def ask_each(self, requests: Sequence[tuple[Link, Message]], expected: type[Answer], within_s: float) -> list[Answer | Exception]:
        """Send servers requests that are no steps; what each of them answered. Who does not answer, or wrongly, is lost."""
        self._error = None
        for link, _ in requests:
            link.replied, link.reply = trio.Event(), None
        with trio.CancelScope(deadline=trio.current_time() + within_s):
            async with trio.open_nursery() as nursery:
                for link, request in requests:
                    nursery.start_soon(self._ask, link, request)
        answers: list[Answer | Exception] = []
        for link, _ in requests:
            reply, link.replied = link.reply, None
            if reply is None:
                self.fail(link, PeerLate(f"no answer within {within_s:g} s", link.hop.peer_id))
                answers.append(link.lost or PeerLost("the chain was closed"))
            elif type(reply) is expected:
                answers.append(reply)
            elif isinstance(reply, Error):
                answers.append(self._refused(link, reply.exception(link.hop.peer_id)))
            else:
                wrong = ProtocolError(f"answered {reply.name} instead of {expected.name}", link.hop.peer_id)
                answers.append(self._refused(link, wrong))
        return answers

    def _refused(self, link: Link, error: PetalnetError) -> Exception:
        if isinstance(error, ServerError):
            self.fail(link, error)
            return link.lost or error
        return blamed(self.target, link.hop, error)

    async def _ask(self, link: Link, request: Message) -> None:
        replied = link.replied
        assert replied is not None
        await self._send(link, request)
        while link.is_last and not replied.is_set() and link.lost is None:
            await self._receive(link)
        await replied.wait()

    def leave(self, links: Iterable[Link]) -> None:
        """Say goodbye to servers, without waiting for it."""
        links = list(links)
        for link in links:
            link.scope.cancel()
        if links:
            self.target.swarm.membership.start(partial(close_links, links))

    async def close(self) -> None:
        """Say goodbye to every server, which frees the KV there. Bounded; never raises for a dead server."""
        self._is_closed = True
        self._break(PeerLost("the chain was closed"))
        for link in self.links:
            link.scope.cancel()
            if link.replied is not None:
                link.replied.set()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        await close_links(self.links)
