"""What there is to compute for a pass without a session, forward or backward.

A pass goes through its blocks in rounds of some blocks each, all rows side by side or, where they are too many, one chunk of rows after
another: so whoever waits for a single token waits for a few blocks only, and a pass costs hardly more than in one go, which it would
if it were run row by row. A unit of work is a chunk's way through one block.

Requests come here checked (see `checks`). Everything in this module is for the compute thread.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from petalnet.blocks.adapters import Adapter, Dropout
from petalnet.blocks.gradients import BackwardAnswer, Gradients
from petalnet.blocks.graphs import Graph, GraphStore, NoRoom, Recorded
from petalnet.blocks.outputs import encode_output
from petalnet.blocks.spread import AnySpan, on_one_device
from petalnet.blocks.work import Arrays
from petalnet.errors import GraphGone
from petalnet.p2p.pass_messages import Backward, Forward

CHUNK_TOKENS = 512
"""Tokens of a chunk, single rows aside: more at once are no quicker, and a round would take longer."""


class Chunk(NamedTuple):
    """Rows start … end - 1."""

    start: int
    end: int


def chunks_of(rows: int, length: int, rows_at_once: int) -> list[Chunk]:
    """How so many rows are cut: into chunks that are about equal, none larger than there is memory for."""
    most = max(1, min(rows_at_once, CHUNK_TOKENS // length))
    count = -(-rows // most)
    return [Chunk(rows * number // count, rows * (number + 1) // count) for number in range(count)]


class Pass:
    """A pass through some blocks, of any of its rows, with a graph or without one.

    Attributes:
        blocks: how many there are.
        chunks: its rows.
        width: tokens of a chunk, the largest.
    """

    def __init__(self, span: AnySpan, request: Forward | Backward, adapters: Sequence[Adapter], rows_at_once: int) -> None:
        """
        Args:
            adapters: those that the request names; the client's own, if it names such, last.
            rows_at_once: for which there is memory.
        """
        assert request.hidden is not None
        rows, length, _ = request.hidden.shape
        self.blocks = request.end - request.first
        self.chunks = chunks_of(rows, length, rows_at_once)
        self.width = length * max(chunk.end - chunk.start for chunk in self.chunks)
        self._span = span
        self._request = request
        self._lora = adapters[-1] if request.lora else None
        self._others = adapters[:-1] if request.lora else adapters

    @cached_property
    def _arrays(self) -> Arrays:
        return Arrays.of(self._request)

    @cached_property
    def _position_end(self) -> int:
        """One past the last position of all rows, and of what they belong to: whatever is run at once, its frequencies are the same."""
        positions = self._arrays.position_ids
        return max(self._request.reach, self._arrays.hidden.shape[1] if positions is None else int(positions.max()) + 1)

    def entering(self, chunk: Chunk) -> torch.Tensor:
        """What the peer gave for some rows."""
        hidden = self._arrays.hidden[chunk.start : chunk.end]
        # A copy, since what came from the network is part of a larger piece of memory, which a graph would hold.
        return hidden.to(self._span.device_of(self._request.first), self._span.dtype, copy=True)

    def run(self, hidden: torch.Tensor, chunk: Chunk, begin: int, stop: int) -> list[torch.Tensor]:
        """The outputs of blocks [begin, stop) of the model, each, for a chunk that enters them as `hidden`."""
        return self._run(hidden, self._prompts(chunk, begin, stop), self._lora, chunk, begin, stop, all_hidden=True)

    def record(self, hidden: torch.Tensor, chunk: Chunk, begin: int, stop: int, *, with_lora: bool = True) -> Recorded:
        """Likewise with autograd's graph. `with_lora`: whether gradients of the client's LoRA will be wanted."""
        hidden = hidden.detach().requires_grad_()
        prompts = self._prompts(chunk, begin, stop)
        if prompts is not None:
            prompts = prompts.to(self._span.device_of(begin), self._span.dtype, copy=True).requires_grad_()
        lora, leaves, lora_first = self._lora, list[torch.Tensor](), 0
        if lora is not None and with_lora:
            lora_first = sum(2 * len(lora.blocks.get(block, ())) for block in range(self._request.first, begin))
            lora, leaves = lora.leaves(begin, stop)
        with torch.enable_grad():
            (output,) = self._run(hidden, prompts, lora, chunk, begin, stop, all_hidden=False)
        return Recorded(chunk.start, chunk.end, begin, stop, output, hidden, prompts, leaves, lora_first)

    def _prompts(self, chunk: Chunk, begin: int, stop: int) -> torch.Tensor | None:
        """[blocks, rows, prompt length, hidden] of a chunk's rows, or without their dimension where all rows of the pass have the same."""
        prompts, first = self._arrays.prompts, self._request.first
        if prompts is None:
            return None
        own = prompts[begin - first : stop - first]
        return own[:, chunk.start : chunk.end] if own.shape[1] == len(self._arrays.hidden) else own[:, 0]

    def _run(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        lora: Adapter | None,
        chunk: Chunk,
        begin: int,
        stop: int,
        *,
        all_hidden: bool,
    ) -> list[torch.Tensor]:
        request, arrays = self._request, self._arrays.rows(chunk.start, chunk.end)
        return self._span.forward(
            hidden,
            attention_mask=arrays.mask,
            position_ids=arrays.position_ids,
            prompts=prompts[:, None] if prompts is not None and prompts.ndim == 3 else prompts,
            first=begin,
            end=stop,
            all_hidden=all_hidden,
            position_end=self._position_end,
            adapters=self._others if lora is None else [*self._others, lora],
            dropout=Dropout(request.dropout, request.seed, request.row + chunk.start) if lora is not None and request.dropout else None,
        )


class ForwardWork:
    """A pass without a past: `part` after `part`, then `answer`.

    Attributes:
        units: blocks × chunks.
        width: tokens of a unit.
        graph: what is kept of it for the gradients; None where nothing is, which may come to light only while it runs.
    """

    def __init__(
        self,
        span: AnySpan,
        request: Forward | Backward,
        adapters: Sequence[Adapter] = (),
        *,
        rows_at_once: int = 1 << 30,
        graph: Graph | None = None,
        graphs: GraphStore | None = None,
    ) -> None:
        """
        Args:
            rows_at_once: for which there is memory.
            graph: to be made; it is one of `graphs`.
        """
        self._request = request
        self._pass = Pass(span, request, adapters, rows_at_once)
        self.units, self.width = self._pass.blocks * len(self._pass.chunks), self._pass.width
        self.graph = graph
        self._graphs = graphs
        self._hidden = torch.empty(0)
        self._outputs: list[torch.Tensor] = []
        self._pieces: list[torch.Tensor] = []

    def part(self, start: int, end: int) -> None:
        """Run units start … end - 1."""
        run, first, last = self._pass, self._request.first, self._request.end
        for number, begin, stop in _ways(start, end, first, last):
            chunk = run.chunks[number]
            if begin == first:
                self._hidden, self._outputs = run.entering(chunk), []
            if not self._recorded(chunk, begin, stop):
                with torch.inference_mode():
                    outputs = run.run(self._hidden, chunk, begin, stop)
                    self._hidden = outputs[-1]
                    self._outputs += outputs if self._all_hidden else []
            if stop == last:
                self._pieces.append(torch.stack(on_one_device(self._outputs)) if self._all_hidden else self._hidden)

    def block_of(self, unit: int) -> int:
        """Which block of the model a unit goes through."""
        return self._request.first + unit % self._pass.blocks

    def answer(self) -> object:
        """The output's array, once all units are done."""
        assert isinstance(self._request, Forward)
        return encode_output(self._request, _joined(self._pieces, 1 if self._all_hidden else 0))

    @property
    def _all_hidden(self) -> bool:
        return isinstance(self._request, Forward) and self._request.all_hidden

    def _recorded(self, chunk: Chunk, begin: int, stop: int) -> bool:
        """Run blocks with a graph that is kept; False where there is no room for it, or none is wanted."""
        if self.graph is None or self._graphs is None:
            return False
        try:
            with self._graphs.recording(self.graph):
                recorded = self._pass.record(self._hidden, chunk, begin, stop)
        except (NoRoom, MemoryError, torch.OutOfMemoryError) as error:
            traceback.clear_frames(error.__traceback__)  # which hold what there is of the graph
            self._graphs.done(self.graph)
            self.graph = None
            return False
        self.graph.parts.append(recorded)
        self._hidden = recorded.output.detach()
        return True


class RecordingWork(ForwardWork):
    """The forward half of a backward pass that is computed anew: there is nothing to answer but the graph."""

    def part(self, start: int, end: int) -> None:
        """Run units start … end - 1. Raises GraphGone where there is no room for the graph."""
        super().part(start, end)
        if self.graph is None:
            raise GraphGone("there is no room for this graph")

    def answer(self) -> object:
        return self.graph


class KeptBackwardWork:
    """Gradients from the graph of a forward pass. A unit is a chunk's way back through one block.

    Attributes:
        units, width: as of the forward pass.
        cuts: the units at which parts may end: the forward pass was recorded in such pieces.
    """

    def __init__(self, span: AnySpan, request: Backward, graph: Graph) -> None:
        """
        Args:
            graph: is complete, and was taken from its store for this alone.
        """
        self._graph = graph
        self._parts = {0: list[Recorded]()}
        done = 0
        for recorded in reversed(graph.parts):
            self._parts[done] = [recorded]
            done += recorded.stop - recorded.begin
        self.units = done
        self.cuts = (*list(self._parts)[1:], done)
        self.width = graph.shape[1] * max(recorded.end_row - recorded.first_row for recorded in graph.parts)
        last = graph.parts[-1]
        self._gradients = Gradients(request, span, prompts=last.prompts is not None, lora=graph.has_lora)

    def part(self, start: int, end: int) -> None:
        """Take the gradients of units start … end - 1."""
        for at, parts in self._parts.items():
            if start <= at < end:
                self._gradients.take(parts.pop())

    def block_of(self, unit: int) -> int:
        """Which block of the model a unit goes back through."""
        return self._graph.end - 1 - unit % (self._graph.end - self._graph.first)

    def answer(self) -> BackwardAnswer:
        """The gradients, once all units are done."""
        return self._gradients.answer(self._graph.dtype, self._graph.prompts_dtype)


class FrugalBackwardWork:
    """Gradients of a pass whose graph finds no room: run once without one, noting what enters each block, then block by block back."""

    def __init__(self, span: AnySpan, request: Backward, adapters: Sequence[Adapter] = (), *, rows_at_once: int = 1 << 30) -> None:
        self._request = request
        self._pass = Pass(span, request, adapters, rows_at_once)
        self.units, self.width = 2 * self._pass.blocks * len(self._pass.chunks), self._pass.width
        self._gradients = Gradients(request, span, prompts=request.prompts is not None, lora=bool(request.lora))
        self._entering: list[torch.Tensor] = []

    def part(self, start: int, end: int) -> None:
        """Run units start … end - 1: a chunk's way through the blocks, then its way back, then the next chunk's."""
        run, first, last = self._pass, self._request.first, self._request.end
        for number, begin, stop in _ways(start, end, first, last):
            chunk = run.chunks[number // 2]
            if number % 2 == 0:
                if begin == first:
                    self._entering = [run.entering(chunk)]
                with torch.no_grad():
                    self._entering += run.run(self._entering[-1], chunk, begin, stop)
                if stop == last:
                    self._entering.pop()  # that is the output
                continue
            for step in range(begin - first, stop - first):
                block = last - 1 - step
                recorded = run.record(self._entering.pop(), chunk, block, block + 1, with_lora=self._gradients.lora_wanted)
                self._gradients.take(recorded)

    def block_of(self, unit: int) -> int:
        """Which block of the model a unit goes through."""
        way, done = divmod(unit, self._pass.blocks)
        return self._request.end - 1 - done if way % 2 else self._request.first + done

    def answer(self) -> BackwardAnswer:
        """The gradients, once all units are done."""
        hidden, prompts = self._request.hidden, self._request.prompts
        assert hidden is not None
        return self._gradients.answer(hidden.dtype, None if prompts is None else prompts.dtype)


PassWork = ForwardWork | KeptBackwardWork | FrugalBackwardWork


def _ways(start: int, end: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Units start … end - 1, where each way through blocks [first, last) takes a unit a block: (number of the way, begin, stop)."""
    blocks = last - first
    while start < end:
        number, done = divmod(start, blocks)
        stop = min(blocks, done + end - start)
        yield number, first + done, first + stop
        start += stop - done


def _joined(pieces: list[torch.Tensor], dimension: int) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dimension)
