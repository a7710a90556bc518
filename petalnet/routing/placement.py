"""Which blocks a new server should hold: those that the swarm can do least."""

from __future__ import annotations

from collections.abc import Iterable

from petalnet.errors import UsageError
from petalnet.routing.records import ServerRecord

UNKNOWN_TOKENS_S = 1.0
"""Counted for a server that announces no rate yet (one that is loading): more than nothing, less than any measured one."""


def choose_span(records: Iterable[ServerRecord], num_blocks: int, count: int, *, now: float) -> tuple[int, int]:
    """The weakest `count` consecutive blocks [a, b) of a model of `num_blocks`.

    A block is as strong as the tokens a second of all servers that hold it or are loading it. Windows are compared by their weakest
    block, then their second weakest, and so on; of equal ones the first is taken. So holes are filled first, the most of them that
    one server can fill.

    Raises:
        UsageError: count is not between 1 and num_blocks.
    """
    if not 1 <= count <= num_blocks:
        raise UsageError(f"a server of this model can hold 1 to {num_blocks} blocks, not {count}")
    strength = block_strengths(records, num_blocks, now=now)
    starts = range(num_blocks - count + 1)
    first = min(starts, key=lambda start: (sorted(strength[start : start + count]), start))
    return first, first + count


def block_strengths(records: Iterable[ServerRecord], num_blocks: int, *, now: float) -> list[float]:
    """For each block of a model of `num_blocks`, the decode tokens a second of all servers that hold it or are loading it."""
    strength = [0.0] * num_blocks
    # In the order of the peer ids, because a sum of floats depends on the order of its terms.
    for record in sorted(records, key=lambda record: record.peer_id):
        if record.expires > now and record.state in ("joining", "online"):
            for block in range(record.span[0], min(record.span[1], num_blocks)):
                strength[block] += record.decode_tokens_s or UNKNOWN_TOKENS_S
    return strength
