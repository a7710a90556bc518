"""The gradients that a backward pass is to answer with, as they come: blocks from the last to the first, chunk of rows by chunk of rows."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch

from petalnet.blocks.graphs import Recorded
from petalnet.blocks.spread import AnySpan, on_one_device
from petalnet.p2p.fields import Blob
from petalnet.p2p.pass_messages import Backward
from petalnet.p2p.tensors import decode_tensor, encode_tensor


class BackwardAnswer(NamedTuple):
    """Gradients as in `BackwardDone`; None for those that are not wanted or that there is nothing of."""

    hidden: Blob | None = None
    prompts: Blob | None = None
    lora: Blob | None = None


class Gradients:
    """Of one backward pass; for the compute thread.

    Attributes:
        hidden_wanted, prompts_wanted, lora_wanted: which are.
    """

    def __init__(self, request: Backward, span: AnySpan, *, prompts: bool, lora: bool) -> None:
        """
        Args:
            prompts, lora: whether the pass has such.
        """
        self.hidden_wanted = request.input_gradient
        self.prompts_wanted = prompts and request.prompt_gradient
        self.lora_wanted = lora and request.lora_gradient
        self._first, self._end = request.first, request.end
        self._request, self._span = request, span
        self._entering = torch.empty(0)  # what the next blocks to come put out has this gradient
        self._hidden: torch.Tensor | None = None
        self._prompts: torch.Tensor | None = None
        self._lora: dict[int, torch.Tensor] = {}

    @cached_property
    def _output(self) -> torch.Tensor:
        # Not before the compute thread needs it: to convert a long one takes a while, and the network thread has others to serve.
        return decode_tensor(self._request.grad_output).to(self._span.device_of(self._end - 1), self._span.dtype)

    def take(self, recorded: Recorded) -> None:
        """Go back through some rows' pass through some blocks: the last ones, or those before the ones that were taken last."""
        rows = slice(recorded.first_row, recorded.end_row)
        gradient = self._output[rows] if recorded.stop == self._end else self._entering
        inputs = [recorded.hidden] if recorded.begin > self._first or self.hidden_wanted else []
        prompts = recorded.prompts if self.prompts_wanted else None
        lora = recorded.lora if self.lora_wanted else []
        inputs += [*lora, *([] if prompts is None else [prompts])]
        if not inputs:
            return
        found = list(torch.autograd.grad(recorded.output, inputs, gradient.to(recorded.output), materialize_grads=True))
        if prompts is not None:
            if self._prompts is None:  # of each row, or the sum where all have the same
                count = len(self._output) if prompts.ndim == 4 else 1
                shape = (self._end - self._first, count, *prompts.shape[-2:])
                # Chunk after chunk is added to the sum, which is not to be rounded each time.
                self._prompts = prompts.new_zeros(shape, dtype=prompts.dtype if prompts.ndim == 4 else torch.float32)
            blocks = slice(recorded.begin - self._first, recorded.stop - self._first)
            self._prompts[blocks, rows if prompts.ndim == 4 else 0] += found.pop().to(self._prompts.device)
        for number, one in enumerate(found[len(found) - len(lora) :], recorded.lora_first):
            self._lora[number] = self._lora[number] + one if number in self._lora else one
        if inputs[0] is recorded.hidden:
            self._entering = found[0]
        if recorded.begin == self._first and self.hidden_wanted:
            if self._hidden is None:
                self._hidden = torch.empty_like(self._output)
            self._hidden[rows] = self._entering

    def answer(self, dtype: str, prompts_dtype: str | None) -> BackwardAnswer:
        """All of them, once all was taken: on the wire in the dtypes of what they are of, and never rounded beyond that."""
        lora: torch.Tensor | None = None
        if self.lora_wanted:
            flat = [one.float().reshape(-1) for _, one in sorted(self._lora.items())]
            lora = torch.cat(on_one_device(flat)) if flat else torch.empty(0)
        return BackwardAnswer(_encoded(self._hidden, dtype), _encoded(self._prompts, prompts_dtype), _encoded(lora, "float32"))


def _encoded(gradient: torch.Tensor | None, dtype: str | None) -> Blob | None:
    return None if gradient is None or dtype is None else encode_tensor(gradient, dtype=getattr(torch, dtype))
