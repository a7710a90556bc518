"""What the compute thread does for one request: decode its arrays, run the span, encode the answer. Requests come here checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from petalnet.blocks.sessions import Session
from petalnet.blocks.span import Span
from petalnet.p2p.messages import Backward, Blob, Forward, Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor

GRAPH_BYTES = 2 * 2**30
"""Memory for the graph of one backward pass, so that no request takes a server's memory away from the others."""
GRAPH_FLOATS_PER_FEATURE = 24
"""Numbers that a block's graph keeps for each token and feature: 24 in BLOOM (its eager attention's scores aside, which
`service.Limits` bounds), fewer in most families."""


@dataclass
class StepWork:
    """One step of a session. `whole` runs it at once; a long one is run by `piece` after `piece`, then `encode`.

    Attributes:
        order: which of the session's rows each row continues; None for each its own.
    """

    span: Span
    session: Session
    request: Step
    order: torch.Tensor | None

    @cached_property
    def _arrays(self) -> _Arrays:
        return _Arrays.of(self.request)

    def whole(self) -> Blob:
        """Run all of the step; the answer's array."""
        rows, new, hidden = self.request.hidden.shape
        if new:
            return self.encode([self.piece(0, new)])
        with torch.inference_mode():
            self._begin()
        blocks = self.session.end - self.session.first if self.request.all_hidden else 1
        return self.encode([torch.empty((blocks, rows, 0, hidden))])

    def piece(self, start: int, end: int) -> torch.Tensor:
        """Run tokens start … end - 1 of the step; [blocks, rows, end - start, hidden], with one block where only the last is wanted."""
        arrays, request = self._arrays, self.request
        with torch.inference_mode():
            if start == 0:
                self._begin()
            outputs = self.span.forward(
                arrays.hidden[:, start:end],
                attention_mask=None if arrays.mask is None else arrays.mask[:, : request.position + end],
                position_ids=None if arrays.position_ids is None else arrays.position_ids[:, start:end],
                cache=self.session.cache,
                prompts=arrays.prompts,
                first=self.session.first,
                end=self.session.end,
                all_hidden=request.all_hidden,
            )
            return torch.stack(outputs)

    def encode(self, pieces: list[torch.Tensor]) -> Blob:
        """The answer's array, of pieces that are complete."""
        output = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
        if self.request.keep:
            output = output[:, :, -self.request.keep :]
        return _encode_like(self.request.hidden, output if self.request.all_hidden else output[0])

    def _begin(self) -> None:
        """Bring the session to where the step begins."""
        session, cache, rows = self.session, self.session.cache, self.request.hidden.shape[0]
        if self.request.position == 0 and rows != session.rows:
            cache.clear()
        cache.set_length(self.request.position)
        if self.order is not None:
            with torch.inference_mode():  # as are the steps that filled the cache
                cache.reorder(self.order)
        session.rows = rows


def run_forward(span: Span, request: Forward) -> Blob:
    """A pass without a past: the output array."""
    arrays = _Arrays.of(request)
    with torch.inference_mode():
        outputs = span.forward(
            arrays.hidden,
            attention_mask=arrays.mask,
            position_ids=arrays.position_ids,
            prompts=arrays.prompts,
            first=request.first,
            end=request.end,
            all_hidden=request.all_hidden,
        )
        return _encode_like(request.hidden, torch.stack(outputs) if request.all_hidden else outputs[-1])


def run_backward(span: Span, request: Backward, graph_bytes: int = GRAPH_BYTES) -> tuple[Blob, Blob | None]:
    """Run the pass again and take the gradients of its inputs and, where there are any, of its prompts.

    Args:
        graph_bytes: about the memory that autograd's graph may take. Where all blocks would take more, a pass without gradients notes
            the inputs of groups of blocks first, and the graph is made for one group after another.
    """
    arrays = _Arrays.of(request)
    first, end = request.first, request.end
    tokens = math.prod(request.hidden.shape[:2])
    per_block = tokens * GRAPH_FLOATS_PER_FEATURE * span.hidden_size * span.dtype.itemsize
    group = max(1, min(end - first, graph_bytes // max(per_block, 1)))

    def run(hidden: torch.Tensor, prompts: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
        (output,) = span.forward(
            hidden, attention_mask=arrays.mask, position_ids=arrays.position_ids, prompts=prompts, first=start, end=stop
        )
        return output

    def prompts_of(start: int, stop: int) -> torch.Tensor | None:
        return None if arrays.prompts is None else arrays.prompts[start - first : stop - first]

    starts = range(first, end, group)
    entering = [arrays.hidden]
    with torch.no_grad():
        for start in starts[:-1]:
            entering.append(run(entering[-1], prompts_of(start, start + group), start, start + group))
    gradient = decode_tensor(request.grad_output).to(span.device, span.dtype)
    prompt_gradients: list[torch.Tensor] = []
    for start, entered in zip(reversed(starts), reversed(entering), strict=True):
        stop = min(start + group, end)
        inputs = [entered.detach().requires_grad_()]
        if arrays.prompts is not None:
            inputs.append(arrays.prompts[start - first : stop - first].detach().requires_grad_())
        with torch.enable_grad():
            output = run(inputs[0], inputs[1] if len(inputs) > 1 else None, start, stop)
        gradient, *others = torch.autograd.grad(output, inputs, gradient.to(output.dtype))
        prompt_gradients += others
    return (
        _encode_like(request.hidden, gradient),
        None if request.prompts is None else _encode_like(request.prompts, torch.cat(prompt_gradients[::-1])),
    )


@dataclass(frozen=True)
class _Arrays:
    """The arrays of a request, decoded; all on the CPU."""

    hidden: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    prompts: torch.Tensor | None

    @classmethod
    def of(cls, request: Step | Forward | Backward) -> _Arrays:
        mask, positions, prompts = request.mask, request.position_ids, request.prompts
        return cls(
            decode_tensor(request.hidden),
            None if mask is None else decode_tensor(mask),
            None if positions is None else decode_tensor(positions),
            None if prompts is None else decode_tensor(prompts),
        )


def _encode_like(received: Blob, tensor: torch.Tensor) -> Blob:
    """A tensor in the dtype and codec in which the peer sent another."""
    return encode_tensor(tensor.to(getattr(torch, received.dtype)), received.codec)
