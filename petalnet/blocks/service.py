"""Answers peers that want blocks run: inference sessions on one protocol, stateless forward and backward passes on another.

Whatever arrives is checked (see `checks`) before it reaches the compute thread, and is promised the room that it needs before it takes
any. A request that is wrong gets a typed error and harms nobody else; the stream lives on where it makes sense.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import trio

from petalnet.blocks.adapters import Adapter
from petalnet.blocks.capture_trial import Choice
from petalnet.blocks.checks import Checks, Limits
from petalnet.blocks.costs import SEED_TOKENS, Costs
from petalnet.blocks.engine import Engine, Pipelined
from petalnet.blocks.graphs import GRAPH_BYTES, GraphStore
from petalnet.blocks.hop import Hop
from petalnet.blocks.kept import KeptOutputs
from petalnet.blocks.links import LINK_TIMEOUT_S, IncomingLinks, LinkCounts, LinkKey, OpenStream
from petalnet.blocks.lora_store import LoraStore, adapted, adapters_of
from petalnet.blocks.pages import PagePool
from petalnet.blocks.pass_service import PassService
from petalnet.blocks.pipeline import Pipeline
from petalnet.blocks.prefixes import PrefixCache
from petalnet.blocks.requests import SLOW_S, Held
from petalnet.blocks.runner import Runner
from petalnet.blocks.scheduler import Scheduler
from petalnet.blocks.sessions import Session, SessionManager
from petalnet.blocks.spread import AnySpan
from petalnet.blocks.throughput import Rates
from petalnet.errors import BusyError, CallerError, MovedError, PeerLost, PetalnetError, UnsupportedError
from petalnet.p2p.fields import CODECS, Message
from petalnet.p2p.messages import Error
from petalnet.p2p.pass_messages import Backward, DropGraphs, Forward, PutLora
from petalnet.p2p.session_messages import Draining, OpenLink, OpenSession, SessionOpened

if TYPE_CHECKING:
    from petalnet.p2p.streams import Stream

log = logging.getLogger(__name__)

USUAL_RATES = Rates(decode=20.0, prefill=200.0, forward=200.0)
"""Where nothing was measured; the first rounds correct it."""
DRAINING_RETRY_S = 60.0


@dataclass
class RecoveryCounts:
    """What sessions that have lost a server of their chain did here, since the server started.

    Attributes:
        resumed: how often one went on between other neighbours.
        replayed_tokens: KV tokens whose outputs were sent once more.
        rebuilt_tokens: KV tokens that were computed in the place of another server.
    """

    resumed: int = 0
    replayed_tokens: int = 0
    rebuilt_tokens: int = 0


class BlockService:
    """Serves one span. Register its three handlers for their protocols; `run` must be running meanwhile.

    Attributes:
        span, model, limits: what is served, under which key, and within which limits.
        dtype: what it computes in, by its name on the wire.
        checks: decides what makes sense.
        runner: what the compute thread runs.
        engine: the compute thread.
        sessions: the open sessions.
        open_link, link_counts: how streams to other servers are opened, and what went over them.
        incoming_links: finds the sessions that other servers bring steps for.
        adapters: LoRA adapters that peers may name, by the labels that the server announces.
        loras: LoRA parameters that peers have put here.
        passes: what is run without a session.
        read_ahead: what was read of sessions' streams while their requests were slow.
        recovery: what sessions that have lost a server did here.
        draining: set by `drain`: open sessions go on, new work is refused as *busy*.
    """

    def __init__(
        self,
        span: AnySpan,
        *,
        model: str,
        kv_tokens: int,
        rates: Rates = USUAL_RATES,
        share_prefixes: bool = False,
        limits: Limits | None = None,
        open_link: OpenStream | None = None,
        adapters: Mapping[str, Adapter] = MappingProxyType({}),
        graph_bytes: int = GRAPH_BYTES,
        captures: Sequence[Choice] = (),
    ) -> None:
        """Takes the memory for KV entries; blocks for as long as that takes.

        Args:
            model: the discovery key of the model whose blocks these are; requests that name another are refused.
            kv_tokens: positions that there is to be room for in each block; more by less than a page.
            rates: how fast the span is, as far as that is known.
            share_prefixes: whether a session may begin with what another peer's sessions have computed.
            open_link: from another server's id to a stream for steps to it; without it, outputs go to clients only.
            adapters: for the span's blocks, on its device.
            graph_bytes: memory for the graphs of passes whose gradients are to come, and as much for those that are computed anew.
            captures: for each of the span's stages whether its decoding is captured; empty where that was not asked.
        Raises:
            MemoryError, torch.OutOfMemoryError: there is no memory for so many positions.
        """
        self.span = span
        self.model = model
        self.limits = limits or Limits()
        self.draining = False
        self._captures = captures
        page_tokens = span.backend.page_tokens
        pages = -(-kv_tokens // page_tokens)
        store = span.make_store(pages)
        span.attach(store)  # type: ignore[arg-type]  # which is of the span's own kind
        pool = PagePool(pages, page_tokens)
        promised = store.machine_bytes
        self._kept = KeptOutputs(pages=pages, page_tokens=page_tokens, hidden_size=span.hidden_size, dtype=span.dtype, beside=promised)
        self.runner = Runner(span, pool, PrefixCache(pool), kept=self._kept, share_prefixes=share_prefixes)
        devices = [stage.device for stage in span.stages]
        self._scheduler = Scheduler(_costs(rates), devices=len(devices))
        pipelined = Pipelined(self.runner.begin, self.runner.finish, Pipeline(devices)) if len(devices) > 1 else None
        self.engine = Engine(self.runner.run, self._scheduler, pipelined=pipelined)
        self.sessions = SessionManager(span, pool, compute=self.engine, release=self._release, idle_s=self.limits.idle_when_full_s)
        self._share_prefixes = share_prefixes
        self.checks = Checks(span, self.limits)
        self.dtype = str(span.dtype).removeprefix("torch.")
        self.adapters = adapters
        self.loras = LoraStore.beside(span.weight_bytes, devices)
        frozen = [
            weight for adapter in adapters.values() for modules in adapter.blocks.values() for pair in modules.values() for weight in pair
        ]
        kept, recomputed = (
            GraphStore([*span.weights, *frozen], most_bytes=graph_bytes, free=lambda graph: self.engine.call(graph.free)) for _ in range(2)
        )
        self.passes = PassService(span, self.checks, self.engine, kept, recomputed, adapters=adapters, loras=self.loras)
        self.open_link = open_link
        self.link_counts = LinkCounts()
        self.incoming_links = IncomingLinks()
        self.read_ahead = Held()
        self.recovery = RecoveryCounts()
        self._hops: set[Hop] = set()
        self._has_hops = trio.Event()
        self._has_none = trio.lowlevel.ParkingLot()
        self._scopes: dict[str, set[trio.CancelScope]] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute until cancelled."""
        failure: RuntimeError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_at_hops)
            nursery.start_soon(self.passes.run)
            try:
                await self.engine.run(task_status=task_status)
            except RuntimeError as error:  # raised below, bare: leaving the nursery by it would wrap it into a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _look_at_hops(self) -> None:
        """Find sessions whose requests are slow, while there are sessions: a watch of each session's own would cost every token."""
        while True:
            if not self._hops:
                self._has_hops = trio.Event()
                await self._has_hops.wait()
            await trio.sleep(SLOW_S / 2)
            now = trio.current_time()
            for hop in self._hops:
                hop.look(now)

    def drain(self, grace_s: float | None = None) -> None:
        """Take no new sessions and no stateless passes from now on.

        Args:
            grace_s: seconds after which the sessions that are left will be ended, which their clients are told now; None: they are not.
        """
        self.draining = True
        if grace_s is not None:
            for hop in self._hops:
                hop.say(Draining(grace_s))

    async def empty(self) -> None:
        """Wait until no session is left."""
        while self._hops:
            await self._has_none.park()

    def peer_lost(self, peer_id: str) -> None:
        """Drop at once what a vanished peer had open here; to be called in the trio thread when its last connection is gone."""
        for scope in self._scopes.pop(peer_id, ()):
            scope.cancel()
        self.passes.graphs.drop_peer(peer_id)

    def describe(self) -> dict[str, Any]:
        """What goes on here, for the node's own user; plain values."""
        engine, sessions = self.engine, self.sessions
        rounds, delay = engine.rounds, engine.loop_delay
        return {
            "sessions": len(sessions),
            "waiting": engine.queue_length,
            "expected_wait_s": engine.expected_wait_s,
            "kv_tokens": {
                "all": sessions.max_tokens,
                "free": sessions.free_tokens,
                "held": self.runner.held_tokens,
                "kept": self.runner.kept_tokens,
            },
            "last_minute": {"rounds": rounds.count, "seconds": rounds.seconds, "tokens": rounds.tokens, "tasks": rounds.tasks},
            "kept_outputs_bytes": self._kept.bytes,
            "graphs": {"number": len(self.passes.graphs), "bytes": self.passes.graphs.bytes},
            "loras": {"versions": len(self.loras), "bytes": self.loras.nbytes},
            "links": asdict(self.link_counts),
            "recovery": asdict(self.recovery),
            "cuda_graphs": [
                {"device": str(stage.device), **asdict(choice), **(stage.captured.describe() if stage.captured is not None else {})}
                for stage, choice in zip(self.span.stages, self._captures, strict=False)
            ],
            "loop_delay_s": {"median": delay.median_s, "worst": delay.worst_s},
        }

    async def check(self) -> None:
        """Raise RuntimeError unless the open sessions and the kept prefixes account for exactly the pages that are held.

        Takes a moment of the compute thread between two rounds; may be called at any time.
        """
        await self.engine.ask(self.runner.check, list(self.sessions))

    def _release(self, session: Session) -> None:
        """What is left to do for a closed session on the compute thread."""
        self._scheduler.forget(session)
        self.runner.release(session)

    async def handle_inference(self, stream: Stream) -> None:
        """Serve one stream: an `OpenSession`, maybe `Attach`, then `Step` after `Step`. The session ends with the stream."""
        await self._guarded(stream, self._serve_session)

    async def handle_push(self, stream: Stream) -> None:
        """Serve one stream from another server: an `OpenLink`, then `Step` after `Step` of the session that it names.

        Raises a PetalnetError, which is for the peer to hear, where that server has nothing to bring here.
        """
        request: Message | None = None
        with trio.move_on_after(LINK_TIMEOUT_S):
            request = await stream.receive()
        if not isinstance(request, OpenLink):
            raise UnsupportedError("a link begins with open_link")
        hop = await self.incoming_links.find(LinkKey(request.session, request.first, stream.peer_id))
        await hop.serve_link(stream)

    async def handle_forward(self, stream: Stream) -> None:
        """Serve one stream of `Forward` and `Backward` requests, each on its own."""
        await self._guarded(stream, self._serve_passes)

    async def _guarded(self, stream: Stream, serve: Callable[[Stream], Awaitable[None]]) -> None:
        peer_id = stream.peer_id
        with trio.CancelScope() as scope:
            self._scopes.setdefault(peer_id, set()).add(scope)
            try:
                await serve(stream)
            except PeerLost:
                log.debug("peer %s went away", peer_id)
            finally:
                scopes = self._scopes.get(peer_id, set())
                scopes.discard(scope)
                if not scopes:
                    self._scopes.pop(peer_id, None)

    async def _serve_session(self, stream: Stream) -> None:
        request = await self._receive(stream)
        if request is None:
            return
        try:
            if not isinstance(request, OpenSession):
                raise UnsupportedError(f"a session begins with open_session, not {request.name}")
            hop = self._open(stream, request)
        except PetalnetError as error:
            await stream.send(Error.of(error))
            return
        session = hop.session
        log.debug("session of %s on blocks %d:%d opened", stream.peer_id, session.first, session.end)
        try:
            await stream.send(SessionOpened(self.sessions.free_tokens, self._share_prefixes, self.dtype, CODECS))
            await hop.serve()
        finally:
            self.incoming_links.remove(hop)
            self.sessions.close(session)
            self._hops.discard(hop)
            if not self._hops:
                self._has_none.unpark_all()
            log.debug("session of %s on blocks %d:%d closed at position %d", stream.peer_id, session.first, session.end, session.position)

    def _open(self, stream: Stream, request: OpenSession) -> Hop:
        """A new session, with the room that it asks for. Raises a PetalnetError where it is refused."""
        self._check_model(request.model)
        if request.promise_rows:
            self.checks.rows(request.promise_rows)
        session = self.sessions.open(
            stream.peer_id,
            request.first,
            request.end,
            request.max_length,
            pushes=bool(request.pushes_to),
            network=stream.network,
            adapters=adapters_of(request, stream.peer_id, self.adapters, self.loras),
            adapted=adapted(request, stream.peer_id),
        )
        try:
            if request.promise_rows:
                self.sessions.admit(session, request.promise_rows)
            hop = Hop(self, session, request, stream)
            self.incoming_links.add(hop)
        except PetalnetError:
            self.sessions.close(session)
            raise
        self._hops.add(hop)
        self._has_hops.set()
        return hop

    async def _serve_passes(self, stream: Stream) -> None:
        while await self._serve_pass(stream):
            pass

    async def _serve_pass(self, stream: Stream) -> bool:
        """Serve one request; whether another may come. Requests and answers are hundreds of megabytes at times, and a stream may be idle
        for long before the next one: nothing here refers to them then."""
        request = await self._receive(stream)
        if request is None:
            return False
        if isinstance(request, DropGraphs):
            self.passes.graphs.drop(stream.peer_id, request.graphs)
            return True
        try:
            answer = await self._run_pass(stream, request)
        except PetalnetError as error:
            answer = Error.of(error)
        if answer is not None:
            await stream.send(answer)
        return answer is not None

    async def _receive(self, stream: Stream) -> Message | None:
        """The next message; None at the end of the stream, or when none came for so long that the stream is to be closed."""
        with trio.move_on_after(self.limits.idle_s):
            return await stream.receive()
        await stream.send(Error.of(CallerError(f"nothing came for {self.limits.idle_s:g} s; this stream is closed")))
        return None

    async def _run_pass(self, stream: Stream, request: Message) -> Message | None:
        if isinstance(request, PutLora):
            self._check_model(request.model)
            shapes = self.span.linear_shapes
            return await self.loras.take(stream.peer_id, request, shapes, self.span.device_of, network=stream.network)
        if isinstance(request, (Forward, Backward)):
            self._check_model(request.model, has_begun=self.passes.graph_of(stream.peer_id, request) is not None)
        return await self.passes.answer(stream, request)

    def weight(self, first: int, end: int) -> float:
        """What a token costs that goes through these blocks, in tokens that go through the whole span."""
        return (end - first) / len(self.span)

    def _check_model(self, model: str, *, has_begun: bool = False) -> None:
        if model != self.model:
            raise MovedError("another model is served here")
        if self.draining and not has_begun:
            raise BusyError("the server is shutting down", DRAINING_RETRY_S)


def _costs(rates: Rates) -> Costs:
    """How long rounds take, as far as that is known."""
    costs = Costs(rates.decode, rates.prefill)
    if rates.rounds:
        for tokens, seconds in ((1, 1 / rates.decode), (SEED_TOKENS, SEED_TOKENS / rates.prefill), *rates.rounds):
            costs.measured(tokens, seconds)
    return costs
