"""Runs the passes that peers ask for without a session: what they need is found, they wait their turn, graphs are kept in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import trio

from petalnet.blocks.adapters import Adapter
from petalnet.blocks.checks import Checks
from petalnet.blocks.engine import Engine, Result
from petalnet.blocks.graphs import GRAPH_AGE_S, Graph, GraphStore
from petalnet.blocks.hop import WATCHED_TOKENS
from petalnet.blocks.lora_store import LoraStore, adapters_of
from petalnet.blocks.passes import BackwardAnswer, BackwardWork, ForwardWork, KeptBackwardWork, PassWork
from petalnet.blocks.scheduler import Task
from petalnet.blocks.span import Span
from petalnet.errors import PetalnetError
from petalnet.p2p.fields import Message
from petalnet.p2p.pass_messages import Backward, BackwardDone, Forward, ForwardDone

if TYPE_CHECKING:
    from petalnet.p2p.streams import Stream

KEPT_BACKWARD_WEIGHT = 1.5
"""A backward pass from a kept graph, in forward passes: weights are frozen, so their gradients are not computed."""
BACKWARD_WEIGHT = 2.5
"""One that computes the forward pass again."""
EXPIRY_S = GRAPH_AGE_S / 10
"""How often graphs that are too old are looked for."""


class PassService:
    """The passes of one span; belongs to the network thread.

    Attributes:
        graphs: of forward passes whose backward passes are to come.
    """

    def __init__(
        self,
        span: Span,
        checks: Checks,
        engine: Engine,
        graphs: GraphStore,
        *,
        adapters: Mapping[str, Adapter],
        loras: LoraStore,
    ) -> None:
        """
        Args:
            adapters: the host's, which peers may name.
            loras: what peers have put here.
        """
        self.graphs = graphs
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
        if graph is not None:
            return await self._backward_from(stream, checked, graph)
        adapters = adapters_of(checked, stream.peer_id, self._adapters, self._loras)
        return await self._backward(stream, checked, BackwardWork(self._span, checked, adapters))

    async def _forward(self, stream: Stream, request: Forward) -> ForwardDone | None:
        adapters = adapters_of(request, stream.peer_id, self._adapters, self._loras)
        graph: Graph | None = None
        if request.graph and not request.all_hidden:
            graph = self.graphs.begin(
                Graph(
                    stream.peer_id,
                    request.graph,
                    request.first,
                    request.end,
                    shape=tuple(request.hidden.shape),
                    dtype=request.hidden.dtype,
                    prompts_dtype=None if request.prompts is None else request.prompts.dtype,
                )
            )
        kept = False
        try:
            work = ForwardWork(self._span, request, adapters, graph=graph, graphs=self.graphs)
            result = await self._compute(stream, self._task(stream, request, request.hidden.shape, work, 1.0))
            if result is None:
                return None
            kept = work.graph is not None and self.graphs.keep(work.graph, trio.current_time())
            return ForwardDone(result.value, result.compute_s, result.queue_s, kept)
        finally:
            if graph is not None and not kept:
                self.graphs.done(graph)

    async def _backward_from(self, stream: Stream, request: Backward, graph: Graph) -> BackwardDone | None:
        self.graphs.take(graph)
        try:
            return await self._backward(stream, request, KeptBackwardWork(self._span, request, graph), graph.cuts)
        finally:
            self.graphs.done(graph)

    async def _backward(self, stream: Stream, request: Backward, work: PassWork, cuts: Sequence[int] = ()) -> BackwardDone | None:
        weight = KEPT_BACKWARD_WEIGHT if cuts else BACKWARD_WEIGHT
        result = await self._compute(stream, self._task(stream, request, request.grad_output.shape, work, weight, cuts))
        if result is None:
            return None
        found: BackwardAnswer = result.value
        return BackwardDone(found.hidden, found.prompts, found.lora, result.compute_s, result.queue_s)

    def _task(
        self, stream: Stream, request: Forward | Backward, shape: Sequence[int], work: PassWork, weight: float, cuts: Sequence[int] = ()
    ) -> Task:
        rows, length, _ = shape
        return Task(
            peer=stream.peer_id,
            session=None,
            key=None,
            units=rows,
            width=length,
            kind="pass",
            max_units=self._checks.rows_at_once(length),
            work=work,
            weight=weight * (request.end - request.first) / len(self._span),
            network=stream.network,
            cuts=tuple(cuts),
        )

    async def _compute(self, stream: Stream, task: Task) -> Result[Any] | None:
        """Have a task computed; None, and the task dropped, where the peer ends the stream before it is. Raises as `Engine.submit`."""
        if task.tokens_left <= WATCHED_TOKENS:
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
            raise failure
        return result


async def _cancel_at_end(stream: Stream, scope: trio.CancelScope) -> None:
    if await stream.peer_ends():
        scope.cancel()
