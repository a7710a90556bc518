"""What this client's steps show of servers' speed, brought to `routing.observed`. On the portal's thread.

Each token of an answer is a measurement, so noting one only adds up; what came close together is counted a few times a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import trio

from petalnet.client.trace import HopTimes, StepTimes
from petalnet.routing.expected import HOP_S, Client, Expected
from petalnet.routing.observed import FEW_TOKENS, Observed, unaccounted
from petalnet.routing.records import ServerRecord, Work

COUNT_EVERY_S = 0.25
WAYS_FOR_S = 5.0
"""How long the expected ways of a chain are used before they are worked out anew."""


class Observing:
    """Notes steps, and has them counted.

    Attributes:
        observed: what was seen so far; up to date after `count`.
    """

    def __init__(self, record: Callable[[str], ServerRecord | None], round_trip: Callable[[str], float | None]) -> None:
        """
        Args:
            record: a server's newest record.
            round_trip: seconds to a server and back, None where it was not measured.
        """
        self.observed = Observed()
        self._record = record
        self._round_trip = round_trip
        self._noted: dict[tuple[str, int, int, Work | None], tuple[int, float, float]] = {}  # steps, and their seconds
        self._counted_at = -math.inf
        self._ways: tuple[tuple[tuple[str, bool], ...], float, float] | None = None  # of a chain: when they were worked out, seconds

    def note(self, peer_id: str, *, tokens: int, blocks: int, compute_s: float, queue_s: float, work: Work | None = None) -> None:
        """A server has done a step; arguments as of `Membership.observe`."""
        key = peer_id, tokens, blocks, work
        steps, compute_before_s, queue_before_s = self._noted.get(key, (0, 0.0, 0.0))
        self._noted[key] = steps + 1, compute_before_s + compute_s, queue_before_s + queue_s
        if trio.current_time() - self._counted_at >= COUNT_EVERY_S:
            self.count()

    def count(self) -> None:
        """Count what was noted since the last time."""
        noted, self._noted = self._noted, {}
        self._counted_at = now = trio.current_time()
        for (peer_id, tokens, blocks, work), (steps, compute_s, queue_s) in noted.items():
            record = self._record(peer_id)
            if record is not None:
                self.observed.note(
                    record,
                    tokens=tokens,
                    blocks=blocks,
                    compute_s=compute_s / steps,
                    queue_s=queue_s / steps,
                    now=now,
                    work=work,
                    steps=steps,
                )

    def note_step(self, step: StepTimes, rows: int) -> None:
        """All servers of a chain have done a step.

        What servers say of themselves is checked by this client's own clock: what they and their ways do not account for is counted as
        computed by them (see `unaccounted`), and so is what a server held a step for without a reason.
        """
        tokens = step.tokens * rows
        extra_s = 0.0
        if step.chunks == 1 and tokens <= FEW_TOKENS:
            held = [max(hop.held_s, hop.queue_s + hop.compute_s) for hop in step.hops]
            extra_s = unaccounted(held, step.wall_s, self._ways_s(step.hops))
        for hop in step.hops:
            idle_s = max(hop.held_s - hop.queue_s - hop.compute_s - HOP_S, 0.0) if step.chunks == 1 else 0.0
            compute_s = hop.compute_s + idle_s + extra_s
            self.note(hop.peer_id, tokens=tokens, blocks=hop.end - hop.first, compute_s=compute_s, queue_s=hop.queue_s)

    def _ways_s(self, hops: Sequence[HopTimes]) -> float:
        """Seconds that a token is expected to be on the way through a chain; worked out anew every few seconds."""
        key = tuple((hop.peer_id, hop.direct) for hop in hops)
        now = trio.current_time()
        if self._ways is None or self._ways[0] != key or now - self._ways[1] > WAYS_FOR_S:
            known = (self._record(hop.peer_id) for hop in hops)
            cut = {(hop.peer_id, after.peer_id) for hop, after in pairwise(hops) if not hop.direct}
            expected = Expected([record for record in known if record is not None], Client(round_trip=self._round_trip, cut=cut))
            ways = [expected.between(one.peer_id, other.peer_id) for one, other in pairwise(hops)]
            ways += [expected.half(hops[0].peer_id), expected.half(hops[-1].peer_id)]
            self._ways = key, now, sum(ways) / 1e9
        return self._ways[2]
