"""How the rows of a pass without a session are cut into micro-batches. Pure: expected seconds in, the number of micro-batches out.

Servers that hold the same blocks work on different micro-batches at once, and so do those that hold one another's following blocks, as
in a pipeline (GPipe, arXiv:1811.06965). But each micro-batch costs every server's fixed time once more: the weights are read for each. So
several numbers of them are tried on a timetable, in which each goes wherever it is done first (list scheduling), and the fewest that are
about as good as the best are taken. What is expected need not be exact: near its best value the time hardly depends on the number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from petalnet.client.inputs import Inputs, columns, reach_of
from petalnet.client.requests import part_of
from petalnet.p2p.fields import Blob
from petalnet.routing.expected import HOP_S, Expected
from petalnet.routing.observed import of_single

MOST_ROWS = 1024
MOST_TOKENS = 32768
"""Rows, and rows × length, that a server takes of one pass."""
MOST_BYTES = 128 * 1024 * 1024
"""Of what goes into a server, a quarter of what a message may hold (see `protocols.FORWARD`): a backward pass brings gradients as well."""
MOST_TRIED = 32
"""Micro-batches: with more, what each costs in messages outweighs what the last of them could gain."""
LEAST_GAIN = 0.05
"""Part of the time that more micro-batches have to save."""
FIXED_TOKENS = 64
"""What a pass takes beside its tokens, in tokens, at least: weights are read, and products of few rows use a processor badly. Measured on a
CPU with BLOOM, 1024 wide: a row of 64 tokens took 1.5 times as long alone as among four."""
MOST_WORKERS = 16
"""Servers that are thought of; a pass is not cut so far that it could use more."""


class Worker(NamedTuple):
    """A server that could do a part of a pass.

    Attributes:
        first, end: blocks that it holds, of those of the pass.
        way_s: seconds on the way there and back, and whatever else a message costs.
        fixed_s: seconds of a block, whatever is in it.
        token_s: of a block for each token.
    """

    first: int
    end: int
    way_s: float
    fixed_s: float
    token_s: float

    def seconds(self, blocks: int, tokens: int) -> float:
        return blocks * (self.fixed_s + tokens * self.token_s)


def workers_of(expected: Expected, first: int, end: int) -> list[Worker]:
    """The servers that are thought of for blocks [first, end), the most promising ones: many blocks, quickly."""
    workers = []
    for peer_id, record in expected.records.items():
        start, stop = max(record.span[0], first), min(record.span[1], end)
        if start >= stop:
            continue
        token_s = expected.hop_time(peer_id).speed.block_s
        fixed_s = token_s * max(of_single(record, "forward", 1), FIXED_TOKENS)
        workers.append(Worker(start, stop, 2 * expected.half(peer_id) / 1e9 + HOP_S, fixed_s, token_s))
    return sorted(workers, key=lambda worker: (worker.token_s / (worker.end - worker.first), worker))[:MOST_WORKERS]


def best_count(rows: int, length: int, workers: Sequence[Worker], *, first: int, end: int, least: int = 1) -> int:
    """Into how many micro-batches rows are best cut.

    Args:
        workers: that hold blocks [first, end) together; where it is a single one, as few as possible are best.
        least: for the sake of limits.
    """
    if len(workers) < 2 or least >= rows:
        return least
    counts = sorted({least, *(count for count in range(least + 1, min(rows, MOST_TRIED) + 1) if _is_even(rows, count))})
    times = {count: _seconds(-(-rows // count) * length, count, workers, first, end) for count in counts}
    best_s = min(times.values())
    return next(count for count in counts if times[count] * (1 - LEAST_GAIN) <= best_s)


def _is_even(rows: int, count: int) -> bool:
    """Whether so many micro-batches are all about as long: with five rows in four, three of them would wait for the long one."""
    return -(-rows // count) * count < rows * 1.25


def _seconds(tokens: int, count: int, workers: Sequence[Worker], first: int, end: int) -> float:
    """Seconds until so many micro-batches of so many tokens are through blocks [first, end); infinite where some block has no worker."""
    quickest_s = min(worker.seconds(1, tokens) for worker in workers)
    free_at = [0.0] * len(workers)
    latest = 0.0
    for _ in range(count):
        now, block = 0.0, first
        while block < end:
            best, best_s, done_at = -1, math.inf, 0.0
            for number, worker in enumerate(workers):
                if worker.first <= block < worker.end:
                    done = max(now + worker.way_s / 2, free_at[number]) + worker.seconds(worker.end - block, tokens)
                    whole_s = done + worker.way_s / 2 + (end - worker.end) * quickest_s
                    if whole_s < best_s:
                        best, best_s, done_at = number, whole_s, done
            if best < 0:
                return math.inf
            free_at[best] = done_at
            now, block = done_at + workers[best].way_s / 2, workers[best].end
        latest = max(latest, now)
    return latest


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
    prompts = inputs.prompts
    prompt_bytes = 0 if prompts is None or prompts.shape[1] != rows else len(prompts.data) // rows
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
        MicroBatch(start, stop, part_of(hidden, start, stop), _rows_of(inputs, rows, start, stop))
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def _rows_of(inputs: Inputs, rows: int, start: int, stop: int) -> Inputs:
    """Of what goes with so many rows that of some of them; prompts that all rows share go with each."""
    mask, position_ids, prompts = inputs.mask, inputs.position_ids, inputs.prompts
    return replace(
        inputs,
        mask=None if mask is None else part_of(mask, start, stop),
        position_ids=None if position_ids is None else part_of(position_ids, start, stop),
        prompts=prompts if prompts is None or prompts.shape[1] != rows else columns(prompts, start, stop),
        row=inputs.row + start,
    )
