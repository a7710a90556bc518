"""How the rows of a pass without a session are cut into micro-batches. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from petalnet.client.inputs import Inputs, columns, reach_of
from petalnet.client.requests import part_of
from petalnet.p2p.fields import Blob

MOST_ROWS = 1024
MOST_TOKENS = 32768
"""Rows, and rows × length, that a server takes of one pass."""
MOST_BYTES = 256 * 1024 * 1024
"""Of the arrays of one message, which may hold twice as much (see `protocols.FORWARD`)."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows start … stop - 1 of a pass.

    Attributes:
        hidden: raw, [stop - start, length, hidden].
        inputs: what else goes through the blocks with these rows; `prompts` for all blocks of the pass.
    """

    start: int
    stop: int
    hidden: Blob
    inputs: Inputs


def most_rows(hidden: Blob, inputs: Inputs, blocks: int) -> int:
    """Rows that go into one message, and whose answer does; at least 1."""
    rows, length, _ = hidden.shape
    row_bytes = len(hidden.data) // rows
    prompt_bytes = 0 if inputs.prompts is None else len(inputs.prompts.data) // rows
    bytes_each = max(row_bytes + prompt_bytes, row_bytes * (blocks if inputs.all_hidden else 1))
    return max(min(MOST_ROWS, MOST_TOKENS // max(length, 1), MOST_BYTES // max(bytes_each, 1)), 1)


def cut(hidden: Blob, inputs: Inputs, count: int) -> list[MicroBatch]:
    """So many micro-batches, whose rows differ by one at most.

    Args:
        hidden: raw, [rows, length, hidden].
    """
    rows, length, _ = hidden.shape
    if count == 1:
        return [MicroBatch(0, rows, hidden, inputs)]
    inputs = replace(inputs, reach=inputs.reach or reach_of(0, length, inputs))
    bounds = [rows * number // count for number in range(count + 1)]
    return [
        MicroBatch(start, stop, part_of(hidden, start, stop), _rows_of(inputs, start, stop))
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def _rows_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    mask, position_ids, prompts = inputs.mask, inputs.position_ids, inputs.prompts
    return replace(
        inputs,
        mask=None if mask is None else part_of(mask, start, stop),
        position_ids=None if position_ids is None else part_of(position_ids, start, stop),
        prompts=None if prompts is None else columns(prompts, start, stop),
    )
