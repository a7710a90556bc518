"""Where the time of an answer went: what each server says of each step, and what this machine saw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HopTimes:
    """What one step took at one server, in seconds, as the server says; of a step in chunks the sums over its chunks.

    Attributes:
        peer_id: the server.
        first, end: its blocks [first, end).
        queue_s: waiting for the device.
        compute_s: computation.
        held_s: from the arrival of the step until its output was sent on.
        direct: whether its output went to the next server without the client. The last hop's goes to the client: False.
    """

    peer_id: str
    first: int
    end: int
    queue_s: float
    compute_s: float
    held_s: float
    direct: bool


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What one step of a session took.

    Attributes:
        tokens: new tokens of a row.
        chunks: the pieces in which it was sent, one behind the other; 1 where it was not cut.
        wall_s: seconds from when it was sent until its output was there.
        hops: first block to last.
    """

    tokens: int
    chunks: int
    wall_s: float
    hops: tuple[HopTimes, ...]
