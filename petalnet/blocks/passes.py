"""What there is to compute for a pass without a session, forward or backward: run by rows, with gradients from a kept graph or anew.

Requests come here checked (see `checks`). Everything in this module is for the compute thread.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from petalnet.blocks.adapters import Adapter, Dropout
from petalnet.blocks.graphs import Graph, GraphStore, NoRoom, Recorded
from petalnet.blocks.outputs import encode_output
from petalnet.blocks.span import Span
from petalnet.blocks.work import Arrays
from petalnet.p2p.fields import Blob
from petalnet.p2p.pass_messages import Backward, Forward
from petalnet.p2p.tensors import decode_tensor, encode_tensor

RECOMPUTED_BYTES = 2 * 2**30
"""Memory for the graph of one backward pass that is computed anew, so that no request takes a server's memory away from the others."""
GRAPH_FLOATS_PER_FEATURE = 48
"""Numbers that a block's graph keeps for each token and feature: 10 in BLOOM, 15 to 20 in Llama's kind, over 40 in Mixtral."""
SCORE_BYTES = 8
"""And for each attention score, where the library computes these one after the other: in float32, and once more in the block's dtype."""


class Pass:
    """A pass through some blocks, of any of its rows, with a graph or without one."""

    def __init__(self, span: Span, request: Forward | Backward, adapters: Sequence[Adapter]) -> None:
        """
        Args:
            adapters: those that the request names; the client's own, if it names such, last.
        """
        self.span = span
        self.request = request
        self._lora = adapters[-1] if request.lora else None
        self._others = adapters[:-1] if request.lora else adapters

    @cached_property
    def arrays(self) -> Arrays:
        return Arrays.of(self.request)

    @cached_property
    def _position_end(self) -> int:
        """One past the last position of all rows, and of what they belong to: whatever rows a part has, its frequencies are the same."""
        positions = self.arrays.position_ids
        return max(self.request.reach, self.arrays.hidden.shape[1] if positions is None else int(positions.max()) + 1)

    def run(self, start: int, end: int, *, all_hidden: bool = False) -> list[torch.Tensor]:
        """The outputs of rows start … end - 1; `all_hidden`: of every block."""
        arrays = self.arrays.rows(start, end)
        request = self.request
        return self._run(arrays, arrays.hidden, arrays.prompts, self._lora, start, request.first, request.end, all_hidden)

    def enter(self, hidden: torch.Tensor, start: int, end: int, begin: int, stop: int) -> torch.Tensor:
        """What rows start … end - 1 are after blocks [begin, stop), which they enter as `hidden`."""
        arrays = self.arrays.rows(start, end)
        (output,) = self._run(arrays, hidden, self._prompts_of(arrays, begin, stop), self._lora, start, begin, stop, False)
        return output

    def record(self, hidden: torch.Tensor, start: int, end: int, begin: int, stop: int, *, with_lora: bool = True) -> Recorded:
        """Likewise, with autograd's graph. `with_lora`: whether gradients of the client's LoRA will be wanted."""
        span, arrays, lora = self.span, self.arrays.rows(start, end), self._lora
        # Copies, since what came from the network is part of a larger piece of memory, which a graph would hold.
        entered = hidden.to(span.device, span.dtype, copy=True).requires_grad_()
        prompts = self._prompts_of(arrays, begin, stop)
        if prompts is not None:
            prompts = prompts.to(span.device, span.dtype, copy=True).requires_grad_()
        leaves: list[torch.Tensor] = []
        if lora is not None and with_lora:
            lora, leaves = lora.leaves(begin, stop)
        with torch.enable_grad():
            (output,) = self._run(arrays, entered, prompts, lora, start, begin, stop, False)
        return Recorded(output, entered, prompts, leaves)

    def _prompts_of(self, arrays: Arrays, begin: int, stop: int) -> torch.Tensor | None:
        first = self.request.first
        return None if arrays.prompts is None else arrays.prompts[begin - first : stop - first]

    def _run(
        self,
        arrays: Arrays,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        lora: Adapter | None,
        start: int,
        begin: int,
        stop: int,
        all_hidden: bool,
    ) -> list[torch.Tensor]:
        request = self.request
        return self.span.forward(
            hidden,
            attention_mask=arrays.mask,
            position_ids=arrays.position_ids,
            prompts=prompts,
            first=begin,
            end=stop,
            all_hidden=all_hidden,
            position_end=self._position_end,
            adapters=self._others if lora is None else [*self._others, lora],
            dropout=Dropout(request.dropout, request.seed, start) if lora is not None and request.dropout else None,
        )


class ForwardWork:
    """A pass without a past, run by rows: `part` after `part`, then `answer`.

    Attributes:
        graph: what is kept of it for the gradients; None where nothing is, which may come to light only while it runs.
    """

    def __init__(
        self,
        span: Span,
        request: Forward,
        adapters: Sequence[Adapter] = (),
        *,
        graph: Graph | None = None,
        graphs: GraphStore | None = None,
    ) -> None:
        """
        Args:
            graph: to be made; it is one of `graphs`.
        """
        self.graph = graph
        self._graphs = graphs
        self._request = request
        self._pass = Pass(span, request, adapters)
        self._pieces: list[torch.Tensor] = []

    def part(self, start: int, end: int) -> None:
        """Run rows start … end - 1."""
        recorded = self._record(start, end)
        if recorded is not None:
            self._pieces.append(recorded.output.detach())
            return
        all_hidden = self._request.all_hidden
        with torch.inference_mode():
            outputs = self._pass.run(start, end, all_hidden=all_hidden)
            self._pieces.append(torch.stack(outputs) if all_hidden else outputs[-1])

    def answer(self) -> Blob:
        """The output array, once all rows are done."""
        return encode_output(self._request, _joined(self._pieces, 1 if self._request.all_hidden else 0))

    def _record(self, start: int, end: int) -> Recorded | None:
        """Run rows with a graph that is kept; None where there is no room for it."""
        if self.graph is None or self._graphs is None:
            return None
        hidden = self._pass.arrays.hidden[start:end]
        try:
            with self._graphs.recording(self.graph):
                recorded = self._pass.record(hidden, start, end, self._request.first, self._request.end)
        except (NoRoom, MemoryError, torch.OutOfMemoryError) as error:
            traceback.clear_frames(error.__traceback__)  # which hold what there is of the graph
            self._graphs.done(self.graph)
            self.graph = None
            return None
        self.graph.parts.append(recorded)
        self.graph.cuts.append(end)
        return recorded


class BackwardWork:
    """Gradients of such a pass, by rows as well, as far as they are wanted: the pass is run again, with autograd's graph."""

    def __init__(self, span: Span, request: Backward, adapters: Sequence[Adapter] = (), *, graph_bytes: int = RECOMPUTED_BYTES) -> None:
        """
        Args:
            graph_bytes: about the memory that autograd's graph may take. Where all blocks would take more, a pass without gradients notes
                the inputs of groups of blocks first, and the graph is made for one group after another.
        """
        self._pass = Pass(span, request, adapters)
        self._request = request
        self._graph_bytes = graph_bytes
        self._gradients = Gradients(request, span, prompts=request.prompts is not None, lora=bool(request.lora))

    def part(self, start: int, end: int) -> None:
        """Take the gradients of rows start … end - 1."""
        if self._gradients.any_wanted:
            self._gradients.take(start, end, self._groups(start, end))

    def answer(self) -> BackwardAnswer:
        """The gradients, once all rows are done."""
        hidden, prompts = self._request.hidden, self._request.prompts
        assert hidden is not None
        return self._gradients.answer(hidden.dtype, None if prompts is None else prompts.dtype)

    def _groups(self, start: int, end: int) -> Iterator[tuple[Recorded, bool]]:
        """Groups of blocks, the last first; each is run when it is asked for."""
        run, first, last = self._pass, self._request.first, self._request.end
        begins = range(first, last, self._blocks_at_once(end - start))
        entering = [run.arrays.hidden[start:end]]
        with torch.no_grad():
            for begin in begins[:-1]:
                entering.append(run.enter(entering[-1], start, end, begin, begin + begins.step))
        for begin in reversed(begins):
            stop = min(begin + begins.step, last)
            recorded = run.record(entering.pop(), start, end, begin, stop, with_lora=self._gradients.lora_wanted)
            yield recorded, begin > first or self._gradients.hidden_wanted

    def _blocks_at_once(self, rows: int) -> int:
        span = self._pass.span
        _, length, width = self._pass.arrays.hidden.shape
        per_block = rows * length * GRAPH_FLOATS_PER_FEATURE * width * span.dtype.itemsize
        per_block += rows * span.score_heads * length * length * SCORE_BYTES
        return max(1, min(self._request.end - self._request.first, self._graph_bytes // per_block))


class KeptBackwardWork:
    """Gradients from the graph that was kept of the forward pass. Each part ends at one of the graph's `cuts`."""

    def __init__(self, span: Span, request: Backward, graph: Graph) -> None:
        """
        Args:
            graph: has been taken from the store, for this alone.
        """
        self._graph = graph
        recorded = graph.parts[0]
        self._gradients = Gradients(request, span, prompts=recorded.prompts is not None, lora=bool(recorded.lora))

    def part(self, start: int, end: int) -> None:
        """Take the gradients of rows start … end - 1."""
        if not self._gradients.any_wanted:
            return
        graph = self._graph
        for (before, cut), recorded in zip(itertools.pairwise([0, *graph.cuts]), graph.parts, strict=True):
            if start <= before and cut <= end:
                self._gradients.take(before, cut, [(recorded, self._gradients.hidden_wanted)])

    def answer(self) -> BackwardAnswer:
        """The gradients, once all rows are done."""
        return self._gradients.answer(self._graph.dtype, self._graph.prompts_dtype)


PassWork = ForwardWork | BackwardWork | KeptBackwardWork


class BackwardAnswer(NamedTuple):
    """Gradients as in `BackwardDone`; None for those that are not wanted or that there is nothing of."""

    hidden: Blob | None
    prompts: Blob | None
    lora: Blob | None


class Gradients:
    """The gradients that a backward pass is to answer with, collected part by part."""

    def __init__(self, request: Backward, span: Span, *, prompts: bool, lora: bool) -> None:
        """
        Args:
            prompts, lora: whether the pass has such.
        """
        self.hidden_wanted = request.input_gradient
        self.prompts_wanted = prompts and request.prompt_gradient
        self.lora_wanted = lora and request.lora_gradient
        self._output = decode_tensor(request.grad_output).to(span.device, span.dtype)
        self._hidden: list[torch.Tensor] = []
        self._prompts: list[torch.Tensor] = []
        self._lora: torch.Tensor | None = None

    @property
    def any_wanted(self) -> bool:
        return self.hidden_wanted or self.prompts_wanted or self.lora_wanted

    def take(self, start: int, end: int, groups: Iterable[tuple[Recorded, bool]]) -> None:
        """Take the gradients of rows start … end - 1.

        Args:
            groups: their pass through one group of blocks after another, the last blocks first, and whether the gradient of what entered
                these is needed: by whoever asks, or by the group before.
        """
        gradient: torch.Tensor = self._output[start:end]
        prompts: list[torch.Tensor] = []
        lora: list[torch.Tensor] = []
        for recorded, needs_hidden in groups:
            inputs = [recorded.hidden] if needs_hidden else []
            if self.prompts_wanted and recorded.prompts is not None:
                inputs.append(recorded.prompts)
            if self.lora_wanted:
                inputs += recorded.lora
            if not inputs:
                break
            found = list(torch.autograd.grad(recorded.output, inputs, gradient.to(recorded.output.dtype), materialize_grads=True))
            if needs_hidden:
                gradient = found.pop(0)
            if self.prompts_wanted and recorded.prompts is not None:
                prompts.insert(0, found.pop(0))
            lora[:0] = [one.float().reshape(-1) for one in found]
        if self.hidden_wanted:
            self._hidden.append(gradient)
        if prompts:
            self._prompts.append(_joined(prompts, 0))
        if self.lora_wanted:
            flat = torch.cat(lora) if lora else torch.empty(0)
            self._lora = flat if self._lora is None else self._lora + flat

    def answer(self, dtype: str, prompts_dtype: str | None) -> BackwardAnswer:
        """What was collected, on the wire in the dtypes of what it is of, and never rounded beyond that."""
        return BackwardAnswer(
            encode_tensor(_joined(self._hidden, 0), dtype=getattr(torch, dtype)) if self._hidden else None,
            encode_tensor(_joined(self._prompts, 1), dtype=getattr(torch, prompts_dtype)) if self._prompts and prompts_dtype else None,
            None if self._lora is None else encode_tensor(self._lora),
        )


def _joined(pieces: list[torch.Tensor], dimension: int) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dimension)
