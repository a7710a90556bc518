"""What there is to compute for a step of a session: its arrays, what is finished of its answer, and the answer's form on the wire.

Requests come here checked (see `checks`). Everything in this module is for the compute thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from petalnet.blocks.outputs import encode_output, is_finite, wanted_tokens
from petalnet.blocks.sessions import Session
from petalnet.blocks.span import SpanStep
from petalnet.errors import CallerError, ServerError
from petalnet.p2p.fields import Blob
from petalnet.p2p.pass_messages import Backward, Forward
from petalnet.p2p.session_messages import Step
from petalnet.p2p.tensors import decode_tensor


@dataclass(frozen=True)
class Arrays:
    """The arrays of a request, decoded; all on the CPU, shapes as in the messages."""

    hidden: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    prompts: torch.Tensor | None

    @classmethod
    def of(cls, request: Step | Forward | Backward) -> Arrays:
        assert request.hidden is not None
        return cls(decode_tensor(request.hidden), *map(_decoded, (request.mask, request.position_ids, request.prompts)))

    def rows(self, start: int, end: int) -> Arrays:
        """Those of rows start … end - 1."""
        if (start, end) == (0, self.hidden.shape[0]):
            return self
        mask, position_ids, prompts = self.mask, self.position_ids, self.prompts
        return Arrays(
            self.hidden[start:end],
            None if mask is None else mask[start:end],
            None if position_ids is None else position_ids[start:end],
            None if prompts is None else prompts[:, start:end],
        )


class NotFinite(ServerError):
    """Another server brought a step with numbers that are not finite, or it came to such here. The session goes on from where it began."""


class InputsNotFinite(CallerError):
    """A client gave a step numbers that are not finite, or parameters with which its outputs are not: that would be taken for the fault of
    a server, here or further on. Likewise."""


@dataclass(eq=False)
class StepWork:
    """A step of a session, run in parts: `part`, `wanted`, `check` and `take` for one run of new tokens after another, then `answer`.

    Attributes:
        order: which of the session's rows each row continues; None for each its own.
        names: for each row the names of the units that the step completes; None where it names none.
        brought_by: the server that brought the step on a link; "" where its client did.
        passed_on: with `all_hidden` in a session that pushes, the output of the last block alone; there once the answer is.
        failed: whether a part of it has; those that were begun after it mean nothing then.
    """

    session: Session
    request: Step
    order: list[int] | None = None
    names: list[list[bytes]] | None = None
    brought_by: str = ""
    passed_on: Blob | None = None
    failed: bool = False
    _pieces: list[torch.Tensor] = field(default_factory=list)

    @cached_property
    def _arrays(self) -> Arrays:
        arrays = Arrays.of(self.request)
        if arrays.prompts is None or not self.session.pushes:
            return arrays
        own = self.session.end - self.session.first
        return replace(arrays, prompts=arrays.prompts[:own])  # the others are for the blocks that follow

    @cached_property
    def position_end(self) -> int:
        """One past the last position that the step reaches, or the whole that it is a part of: less than its KV entries where rows are
        padded."""
        request = self.request
        new = request.hidden.shape[1]
        if request.position_ids is None or not new:
            return max(request.position + new, request.reach)
        return max(int(decode_tensor(request.position_ids).max()) + 1, request.reach)

    def part(self, start: int, end: int) -> SpanStep:
        """New tokens start … end - 1, for `Span.step`."""
        arrays, position = self._arrays, self.request.position
        new = arrays.hidden.shape[1]
        whole = (start, end) == (0, new)
        mask, position_ids = arrays.mask, arrays.position_ids
        return SpanStep(
            rows=self.session.kv,
            hidden=arrays.hidden if whole else arrays.hidden[:, start:end],
            mask=mask if mask is None or whole else mask[:, : position + end],
            position_ids=position_ids if position_ids is None or whole else position_ids[:, start:end],
            prompts=arrays.prompts,
            all_hidden=self.request.all_hidden,
            position_end=None if whole and not self.request.reach else self.position_end,
            adapters=self.session.adapters,
        )

    def wanted(self, start: int, end: int, outputs: list[torch.Tensor]) -> torch.Tensor | None:
        """What the answer needs of the outputs of new tokens start … end - 1: [rows, wanted, hidden], or [blocks, …] of every block. The
        servers that follow need them all.

        Args:
            outputs: [rows, end - start, hidden] of the last block, or of every block where the request asks for that.
        """
        unwanted = min(max(self.request.hidden.shape[1] - wanted_tokens(self.request) - start, 0), end - start)
        if self.session.pushes:
            unwanted = 0
        if unwanted >= end - start:
            return None
        output = torch.stack(outputs) if self.request.all_hidden else outputs[-1]
        return output[..., unwanted:, :] if unwanted else output

    def check(self, start: int, end: int, piece: torch.Tensor | None) -> None:
        """Look at new tokens start … end - 1 and at what was `wanted` of their outputs. What is padding may be anything, and so may what a
        client itself brings, where it also gets the outputs.

        Raises:
            NotFinite: another server brought numbers that are not finite, or the outputs are not, although the inputs were.
            InputsNotFinite: a client brought such numbers, and another server would get what they come to; or they come from an adapter.
        """
        if piece is None:
            if not self.brought_by:
                return
        elif is_finite(piece):
            return
        arrays, position = self._arrays, self.request.position
        hidden, mask = arrays.hidden[:, start:end], arrays.mask
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask[:, position + start : position + end]
        step = self.request.step
        if not ((arrays.prompts is None or is_finite(arrays.prompts)) and is_finite(hidden[real])):
            if self.brought_by:
                raise NotFinite(f"server {self.brought_by} brought step {step} with numbers that are not finite")
            if self.session.pushes:
                raise InputsNotFinite(f"the inputs of step {step} are not finite")
        elif piece is not None and not is_finite(piece[..., real[:, -piece.shape[-2] :], :]):
            if self.session.adapters:
                raise InputsNotFinite(f"with the adapter of this session the outputs of step {step} are not finite")
            raise NotFinite(f"the outputs of step {step} here are not finite, though its inputs are")

    def take(self, piece: torch.Tensor | None) -> None:
        """Keep what was `wanted`, part by part."""
        if piece is not None:
            self._pieces.append(piece)

    def answer(self) -> Blob:
        """The answer's array, once all parts are done."""
        if self._pieces:
            output = _joined(self._pieces, -2)
        else:
            rows, _, hidden = self.request.hidden.shape
            blocks = (self.session.end - self.session.first,) if self.request.all_hidden else ()
            output = torch.empty((*blocks, rows, 0, hidden))
        if self.session.pushes and self.request.until == self.session.end:  # all was kept, but the step goes no further
            output = output[..., output.shape[-2] - wanted_tokens(self.request) :, :]
        if self.session.pushes and self.request.all_hidden:
            self.passed_on = encode_output(self.request, output[-1])
        return encode_output(self.request, output)


def _decoded(blob: Blob | None) -> torch.Tensor | None:
    return None if blob is None else decode_tensor(blob)


def _joined(pieces: list[torch.Tensor], dimension: int) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dimension)
