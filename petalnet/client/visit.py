"""One step of a session as its caller gave it: what is left of it to be computed, and the answers that there are. Pure.

A long one goes to the servers in chunks. Where servers are lost meanwhile, the chunks that were answered stay done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from petalnet.client.inputs import Inputs, columns, reach_of, steps_of
from petalnet.p2p.fields import Blob
from petalnet.p2p.session_messages import UNIT_TOKENS, Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor


class Visit:
    """New tokens that go through all blocks.

    Attributes:
        hidden: [rows, new, hidden].
        position: KV entries before them.
        order: which rows they continue, int64 [rows]; None for each its own.
        inputs: what goes along.
        is_ordered: whether the servers' rows are in that order already.
    """

    def __init__(self, hidden: Blob, position: int, order: Blob | None, inputs: Inputs) -> None:
        self.hidden = hidden
        self.position = position
        self.order = order
        self.inputs = inputs
        self.is_ordered = order is None
        self._answers: list[list[Blob]] = []

    @property
    def end(self) -> int:
        """KV entries after them."""
        return self.position + self.hidden.shape[1]

    def answered(self, answers: Sequence[Blob]) -> None:
        """The next part of it is done: the last server's output, or with `all_hidden` each server's, first block to last."""
        self._answers.append(list(answers))
        self.is_ordered = True

    def rest(self, position: int) -> tuple[Blob, Inputs]:
        """What is left where the servers have `position` entries."""
        done, new = position - self.position, self.hidden.shape[1]
        inputs = self.inputs
        if not done:
            return self.hidden, inputs
        names = inputs.names
        if names is not None:
            names = tuple(row[position // UNIT_TOKENS - self.position // UNIT_TOKENS :] for row in names)
        return columns(self.hidden, done, new), replace(
            inputs,
            position_ids=None if inputs.position_ids is None else columns(inputs.position_ids, done, new),
            prompts=None,  # for the first tokens, which are in one chunk
            keep=inputs.keep if inputs.keep < new - done else 0,
            promise_rows=0 if self._answers else inputs.promise_rows,
            names=names if names and names[0] else None,
        )

    def steps(self, position: int, number: int, ends: Sequence[int]) -> list[Step]:
        """The steps for what is left; `ends` as for `steps_of`, of the tokens that `rest` gives."""
        hidden, inputs = self.rest(position)
        order = None if self.is_ordered else self.order
        reach = reach_of(self.position, self.hidden.shape[1], self.inputs) if position > self.position else 0
        return steps_of(hidden, position, order, inputs, number=number, ends=ends, reach=reach)

    def outputs(self) -> list[Blob]:
        """What it came to: the output of the last `inputs.keep` tokens (0: all), or with `inputs.all_hidden` the outputs of all blocks,
        [blocks, rows, new, hidden], in one or several arrays."""
        if len(self._answers) == 1:
            return self._answers[0]
        if len({tuple(answer.shape[0] for answer in answers) for answers in self._answers}) == 1:
            return [_joined(parts, -2) for parts in zip(*self._answers, strict=True)]
        return [_joined([_joined(answers, 0) for answers in self._answers], -2)]  # the blocks were divided otherwise among later servers


def _joined(outputs: Sequence[Blob], dimension: int) -> Blob:
    return outputs[0] if len(outputs) == 1 else encode_tensor(torch.cat([decode_tensor(output) for output in outputs], dim=dimension))
