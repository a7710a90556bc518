"""How long the chunks are in which a long step goes through a chain. Pure: expected seconds in, tokens out.

A chain is a row of stages: the way to a server, its blocks, the way to the next server, and so on. While one stage works on a chunk, the
one before works on the next chunk, so m chunks take the sum of all stages' times for one chunk and m - 1 times the longest of them. Short
chunks fill the stages sooner and cost each stage's fixed time more often. What is expected need not be exact: near its best value, the
time hardly depends on the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from petalnet.p2p.session_messages import UNIT_TOKENS
from petalnet.routing.routes import Hop

MOST_CHUNKS = 256
MOST_CHUNK_BYTES = 64 * 1024 * 1024
"""Of the hidden states of a chunk: a quarter of what a message may hold, so that prompts longer than a message go through as well."""
LEAST_GAIN = 0.05
"""Part of the time that chunks have to save: what is expected is not so exact that less would be worth a thought."""
NEAR_S = 0.003
"""A server within this round trip is in the same house."""
NEAR_BYTES_S, FAR_BYTES_S = 1e9, 12.5e6
"""Bytes a second that are expected of the way to a server in the same house, and to others: 100 Mbit/s, as many homes send."""
LEAST_BYTES_S = 1e4
"""Believed at least of a link that a server has measured."""
MESSAGE_S = 0.0005
"""Seconds that each message costs on its way, beside its bytes."""
UNKNOWN_DECODE_S, UNKNOWN_PREFILL_S = 0.02, 0.001
"""Of a server that announces no rates: a slow one."""


class Stage(NamedTuple):
    """Seconds that a chunk takes there, whatever its length, and for each token of it (rows × new)."""

    fixed_s: float
    token_s: float


def stages_of(hops: Sequence[Hop], round_trips: Sequence[float | None], token_bytes: int) -> list[Stage]:
    """The stages of a chain; none at all for one server in the same house, beside whose work there is nothing to be done.

    Args:
        round_trips: seconds from the client to each server and back, None where they are not known.
        token_bytes: of the hidden states of one token.
    """
    near = [round_trip_s is not None and round_trip_s <= NEAR_S for round_trip_s in round_trips]
    if near == [True]:
        return []
    stages: list[Stage] = []
    carried = [0.0, *(hop.next_bytes_s for hop in hops)]  # as the server before says of its link
    for hop, is_near, was_near, bytes_s in zip(hops, near, [True, *near], carried, strict=False):
        usual = NEAR_BYTES_S if is_near and was_near else FAR_BYTES_S
        stages.append(Stage(MESSAGE_S, token_bytes / (max(bytes_s, LEAST_BYTES_S) if bytes_s else usual)))
        # A pass over one token is nearly all fixed cost: the weights are read once, whatever is in it.
        stages.append(Stage(hop.decode_s or UNKNOWN_DECODE_S, hop.prefill_s or UNKNOWN_PREFILL_S))
    return stages


def chunk_ends(new: int, rows: int, stages: Sequence[Stage], *, token_bytes: int, position: int = 0, first: int = 0) -> list[int]:
    """Where to cut new tokens.

    Args:
        new: tokens of each row.
        stages: of the chain; where there are none, only what is too long for a message is cut.
        token_bytes: of the hidden states of one token.
        position: KV entries before them. Cuts are where whole units end.
        first: tokens that the first chunk has to have at least.
    Returns:
        one past each chunk's last token, ascending, the last one `new`; `[new]` where nothing is to be cut.
    """
    inside = position % UNIT_TOKENS  # tokens of the unit that is under way
    units = -(-(inside + new) // UNIT_TOKENS)
    shortest = max(-(-(inside + first) // UNIT_TOKENS), 1)
    longest = max(MOST_CHUNK_BYTES // (rows * token_bytes) // UNIT_TOKENS, shortest)
    if shortest >= units or (not stages and longest >= units):
        return [new]
    least = -(-units // longest)
    counts = range(least, max(least, min(MOST_CHUNKS, units) if stages else 1) + 1)
    lengths = dict.fromkeys(max(-(-units // count), shortest) for count in counts)
    best = min(lengths, key=lambda length: _seconds(stages, rows, units, length))
    if longest >= units and _seconds(stages, rows, units, best) > _seconds(stages, rows, units, units) * (1 - LEAST_GAIN):
        return [new]
    return [*range(best * UNIT_TOKENS - inside, new, best * UNIT_TOKENS), new]


def _seconds(stages: Sequence[Stage], rows: int, units: int, length: int) -> float:
    """Seconds for `units` units of each row, in chunks of `length` units."""
    tokens = rows * length * UNIT_TOKENS
    times = [stage.fixed_s + stage.token_s * tokens for stage in stages]
    return sum(times) + (-(-units // length) - 1) * max(times, default=0.0)
