"""Runs the passes that peers ask for without a session: what they need is found, they wait their turn, graphs are kept in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import trio

from petalnet.blocks.adapters import Adapter
from petalnet.blocks.checks import Checks
from petalnet.blocks.engine import Engine, Result
from petalnet.blocks.gradients import BackwardAnswer
from petalnet.blocks.graphs import GRAPH_AGE_S, Graph, GraphStore
from petalnet.blocks.hop import WATCHED_TOKENS
from petalnet.blocks.lora_store import LoraStore, adapters_of
from petalnet.blocks.passes import ForwardWork, FrugalBackwardWork, KeptBackwardWork, PassWork, RecordingWork
from petalnet.blocks.scheduler import Task
from petalnet.blocks.spread import AnySpan
from petalnet.errors import CallerError, GraphGone, PetalnetError
from petalnet.p2p.fields import Message, size_of
from petalnet.p2p.pass_messages import Backward, BackwardDone, Forward, ForwardDone

if TYPE_CHECKING:
    from petalnet.p2p.streams import Stream

FRUGAL_WEIGHT = 1.5
"""What a unit of a frugal backward pass costs, in forward passes of a block: half of them are such, the other half run the block again and
go back, which takes as long as forward, since there are no gradients of weights to compute. (Measured with BLOOM and Llama blocks.)"""
EXPIRY_S = GRAPH_AGE_S / 10
"""How often graphs that are too old are looked for."""


class PassService:
    """The passes of one span; belongs to the network thread.

    Attributes:
        graphs: of forward passes whose backward passes are to come.
    """

    def __init__(
        self,
        span: AnySpan,
        checks: Checks,
        engine: Engine,
        graphs: GraphStore,
        recomputed: GraphStore,
        *,
        adapters: Mapping[str, Adapter],
        loras: LoraStore,
    ) -> None:
        """
        Args:
            recomputed: for graphs of backward passes that are computed anew.
            adapters: the host's, which peers may name.
            loras: what peers have put here.
        """
        self.graphs = graphs
        self._recomputed = recomputed
        self._span = span
        self._checks = checks
        self._engine = engine
        self._adapters = adapters
        self._loras = loras

    async def run(self) -> None:
        """Drop graphs that are too old, until cancelled."""
        while True:
            await trio.sleep(EXPIRY_S)
            self.graphs.expire(trio.current_time())

    def graph_of(self, peer_id: str, request: Message) -> Graph | None:
        """What is kept for a request here."""
        return self.graphs.find(peer_id, request.graph) if isinstance(request, Backward) and request.graph else None

    async def answer(self, stream: Stream, request: Message) -> Message | None:
        """The answer to a request; None where its peer has ended the stream meanwhile.

        Raises:
            PetalnetError: as it is to be told to the peer.
        """
        graph = self.graph_of(stream.peer_id, request)
        checked = self._checks.stateless(request, stream.protocol.limits.payload, graph)
        if isinstance(checked, Forward):
            return await self._forward(stream, checked)
        if graph is not None and self.graphs.take(graph):
            done = await self._backward_from(stream, checked, graph, self.graphs)
        else:
            if graph is not None:  # dropped in this very moment, for the room of one that is being made
                self._checks.stateless(request, stream.protocol.limits.payload)
            done = await self._backward_anew(stream, checked)
        if done is None:
            return None
        found: BackwardAnswer = done.value
        answer = BackwardDone(found.hidden, found.prompts, found.lora, done.compute_s, done.queue_s)
        # Gradients are never rounded on the wire, whereas what they are of may have been, or came in several messages (LoRA).
        size, most = size_of(answer), stream.protocol.limits.payload
        if size > most:
            raise CallerError(f"the gradients take {size} bytes, one message holds {most}: ask for those of fewer rows or blocks at a time")
        return answer

    async def _forward(self, stream: Stream, request: Forward) -> ForwardDone | None:
        adapters = adapters_of(request, stream.peer_id, self._adapters, self._loras)
        graph: Graph | None = None
        if request.graph and not request.all_hidden:
            graph = self.graphs.begin(_graph(stream.peer_id, request, request.graph, adapters))
        kept = False
        try:
            work = ForwardWork(self._span, request, adapters, rows_at_once=self._rows(request), graph=graph, graphs=self.graphs)
            done = await self._compute(stream, request, work)
            if done is None:
                return None
            kept = work.graph is not None and self.graphs.keep(work.graph, trio.current_time())
            return ForwardDone(done.value, done.compute_s, done.queue_s, kept)
        finally:
            if graph is not None and not kept:
                self.graphs.done(graph)

    async def _backward_from(self, stream: Stream, request: Backward, graph: Graph, graphs: GraphStore) -> Result[Any] | None:
        """Use up a graph that was taken."""
        try:
            work = KeptBackwardWork(self._span, request, graph)
            return await self._compute(stream, request, work, cuts=work.cuts)
        finally:
            graphs.done(graph)

    async def _backward_anew(self, stream: Stream, request: Backward) -> Result[Any] | None:
        """Compute the forward pass again, with all of its graph where there is room for it."""
        adapters = adapters_of(request, stream.peer_id, self._adapters, self._loras)
        rows_at_once = self._rows(request)
        graph = self._recomputed.begin(_graph(stream.peer_id, request, 0, adapters))
        if graph is not None:
            try:
                work = RecordingWork(self._span, request, adapters, rows_at_once=rows_at_once, graph=graph, graphs=self._recomputed)
                recorded = await self._compute(stream, request, work)
                if recorded is None:
                    return None
                done = await self._backward_from(stream, request, graph, self._recomputed)
                return done and Result(done.value, recorded.queue_s + done.queue_s, recorded.compute_s + done.compute_s)
            except GraphGone:
                pass  # there is no room for all of it
            finally:
                self._recomputed.done(graph)
        frugal = FrugalBackwardWork(self._span, request, adapters, rows_at_once=rows_at_once)
        return await self._compute(stream, request, frugal, weight=FRUGAL_WEIGHT)

    def _rows(self, request: Forward | Backward) -> int:
        assert request.hidden is not None
        return self._checks.rows_at_once(request.hidden.shape[1])

    async def _compute(
        self, stream: Stream, request: Forward | Backward, work: PassWork, *, weight: float = 1.0, cuts: tuple[int, ...] = ()
    ) -> Result[Any] | None:
        """Have work computed; None, and it dropped, where the peer ends the stream before it is. Raises as `Engine.submit`.

        Args:
            weight: what a unit costs, in a forward pass through one block.
        """
        task = Task(
            peer=stream.peer_id,
            session=None,
            key=None,
            units=work.units,
            width=work.width,
            kind="pass",
            max_units=work.units,
            work=work,
            weight=weight / len(self._span),
            network=stream.network,
            cuts=cuts,
        )
        if work.units * work.width <= WATCHED_TOKENS * len(self._span):
            return await self._engine.submit(task)
        result: Result[Any] | None = None
        failure: PetalnetError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_end, stream, nursery.cancel_scope)
            try:
                result = await self._engine.submit(task)
            except PetalnetError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # whose traceback refers to this frame, and the frame to the work: a cycle that only the collector ends
        return result


async def _cancel_at_end(stream: Stream, scope: trio.CancelScope) -> None:
    if await stream.peer_ends():
        scope.cancel()


def _graph(peer_id: str, request: Forward | Backward, number: int, adapters: Sequence[Adapter]) -> Graph:
    """A graph of this request, of which nothing is made yet."""
    hidden, prompts = request.hidden, request.prompts
    assert hidden is not None
    return Graph(
        peer_id,
        number,
        request.first,
        request.end,
        shape=hidden.shape,
        dtype=hidden.dtype,
        prompts_dtype=None if prompts is None else prompts.dtype,
        has_lora=bool(request.lora),
        kind=(sum(adapter.nbytes_in(request.first, request.end) for adapter in adapters).bit_length(), request.dropout > 0),
    )
