"""How fast servers turned out to be, as one client saw it: by this, what they announce is corrected. Pure: `now` is passed in, in seconds.

Whoever announces a rate may lie, or have become slow since. So each step that a server has done counts as a measurement: the expected time
of a block is the average of what is announced, which counts as `PRIOR` steps, and of what was seen, which counts as `MOST` steps at the
most, the latest first. What was seen loses its weight by half in each half-life, so one bad minute is forgiven and a server is tried
again. A server that turns out slow anew after it had been forgiven is remembered twice as long each time: so a liar gets few chances.

The times are absolute: who announces still more after it was found out gains nothing by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from petalnet.routing.records import ServerRecord, Work

PRIOR = 4.0
"""Steps as which the announcement counts."""
MOST = 16.0
"""Steps as which all that was seen counts at most: from there on, each step takes the place of the oldest."""
HALF_LIFE_S = 60.0
LONGEST_HALF_LIFE_S = 3600.0
QUEUE_HALF_LIFE_S = 15.0
"""Load changes faster than speed does."""
LEAST_WAIT_S = 0.001
"""What is shorter is no waiting."""
SLOW = 2.0
"""A server is slow that takes so many times as long as it announces, and honest below `HONEST` times."""
HONEST = 1.25
OUTLIER = 4.0
"""A step counts as at most so many times what was expected: a machine that was suspended has not become slow."""
UNKNOWN_BLOCK_S = 0.01
"""Seconds a token and block of a server that announces no rate: slow, so that measured ones are preferred."""
FEW_TOKENS = 16
"""Tokens (rows × new) up to which a step is a matter of the decode rate."""
WHOLE_STEP_TOKENS = 64
"""A prompt counts as another step for each so many tokens, up to `PRIOR` of them."""
LONGEST_S = 60.0
"""Seconds that anything counts as at most: of a block for a token, and of a queue."""
MAX_SERVERS = 4096
"""Servers that are remembered, those that were seen last."""
SLACK_S, SLACK = 0.005, 0.5
"""What a step may take beside what its servers say and its ways are known to take, before they are asked to account for it: this client's
own work and its delays, and this part of the ways' time."""


@dataclass(slots=True)
class Average:
    """Of measurements, whose weight halves in each half-life. `with_prior` is their average with what is expected without any."""

    total: float = 0.0
    weight: float = 0.0
    at: float = 0.0

    def age(self, now: float, half_life_s: float) -> None:
        if now > self.at:
            kept = 0.5 ** min((now - self.at) / half_life_s, 1000.0)
            self.total, self.weight, self.at = self.total * kept, self.weight * kept, now

    def add(self, value: float, weight: float) -> None:
        kept = min(1.0, max(MOST - weight, 0.0) / self.weight) if self.weight else 1.0
        self.total, self.weight = self.total * kept + value * weight, self.weight * kept + weight

    def with_prior(self, prior: float) -> float:
        return (PRIOR * prior + self.total) / (PRIOR + self.weight)


@dataclass(slots=True)
class _Track:
    """What was seen of one thing at one server, and how often it was found to be worse than the server says."""

    half_life_s: float
    average: Average = field(default_factory=Average)
    strikes: int = 0
    is_caught: bool = False  # whether it is found to be so now

    def age(self, now: float) -> Average:
        longer = 2.0 ** min(max(self.strikes - 1, 0), 16)
        self.average.age(now, min(self.half_life_s * longer, LONGEST_HALF_LIFE_S))
        return self.average

    def add(self, value: float, weight: float, said: float) -> None:
        """A measurement, and what it should have been. The average has its age already."""
        average = self.average
        if average.weight < PRIOR / 2:
            self.is_caught = False  # forgiven: from here on it counts anew
        average.add(value, weight)
        mean = average.total / average.weight
        if mean > SLOW * said and average.weight >= PRIOR and not self.is_caught:
            self.strikes, self.is_caught = self.strikes + 1, True
        elif mean < HONEST * said and average.weight >= 2 * PRIOR:
            self.strikes, self.is_caught = 0, False


@dataclass(slots=True)
class _Seen:
    """What was seen of one server."""

    blocks: dict[Work, _Track] = field(default_factory=dict)
    queue: _Track = field(default_factory=lambda: _Track(QUEUE_HALF_LIFE_S))


class Speed(NamedTuple):
    """What is expected of a server.

    Attributes:
        block_s: seconds a token in one block.
        announced_s: the same as it announces it; None where it does not.
        seen: how many steps' worth of own measurements is in it, up to `MOST`; 0 where it is as announced.
        queue: what steps waited there lately; None where none did.
    """

    block_s: float
    announced_s: float | None = None
    seen: float = 0.0
    queue: Average | None = None


class Observed:
    """What this client saw of all servers."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def note(
        self,
        record: ServerRecord,
        *,
        tokens: int,
        blocks: int,
        compute_s: float,
        queue_s: float,
        now: float,
        work: Work | None = None,
        steps: int = 1,
    ) -> None:
        """A server has done a step.

        Args:
            record: what it announces.
            tokens: rows × new tokens.
            blocks: how many blocks it ran.
            compute_s, queue_s: seconds of computation, and of waiting for it.
            work: None: decode or prefill, by the number of tokens.
            steps: how many such steps; the seconds are their average.
        """
        if tokens < 1 or blocks < 1 or not (compute_s >= 0 and queue_s >= 0):
            return
        seen = self._of(record.peer_id)
        work = work or ("decode" if tokens <= FEW_TOKENS else "prefill")
        track = seen.blocks.get(work)
        if track is None:
            track = seen.blocks[work] = _Track(HALF_LIFE_S, Average(at=now))
        announced_s = record.block_s(work) or UNKNOWN_BLOCK_S
        value = min(compute_s / blocks / of_single(record, work, tokens), LONGEST_S)
        value = min(value, OUTLIER * max(track.age(now).with_prior(announced_s), UNKNOWN_BLOCK_S))
        track.add(value, min(steps * min(1.0 + tokens / WHOLE_STEP_TOKENS, PRIOR), MOST), announced_s)
        seen.queue.age(now)
        # Where few wait, as it announces, a step waits for no more than a round or two like its own.
        seen.queue.add(min(queue_s, LONGEST_S), min(steps, MOST), compute_s * (1 + record.queue) + LEAST_WAIT_S)

    def speed(self, record: ServerRecord, work: Work, now: float) -> Speed:
        """What to expect of a server for this kind of work."""
        announced_s = record.block_s(work)
        block_s = UNKNOWN_BLOCK_S if announced_s is None else announced_s
        seen = self._seen.get(record.peer_id)
        if seen is None:
            return Speed(block_s, announced_s)
        queue = seen.queue.age(now)
        track = seen.blocks.get(work)
        if track is None:
            return Speed(block_s, announced_s, 0.0, queue)
        average = track.age(now)
        corrected_s = average.with_prior(block_s)
        # Who is about as quick as announced stays where he is among his like: users who go back and forth between equal servers would find
        # nothing of their earlier prompts there.
        is_true = announced_s is not None and announced_s / HONEST < corrected_s < announced_s * HONEST
        return Speed(block_s if is_true else corrected_s, announced_s, average.weight, queue)

    def _of(self, peer_id: str) -> _Seen:
        seen = self._seen.pop(peer_id, None) or _Seen()
        self._seen[peer_id] = seen  # the latest last
        if len(self._seen) > MAX_SERVERS:
            del self._seen[next(iter(self._seen))]
        return seen


def of_single(record: ServerRecord, work: Work, tokens: int) -> float:
    """How many times as long as a single token a step of so many takes in a block, by the shape of what the server announces.

    In a prompt and a pass each token counts, though few together take no less than one alone; a few tokens in a step take little longer
    than one. Both follow from the weights being read once.
    """
    one_s, more_s = record.block_s("decode"), record.block_s("prefill" if work == "decode" else work)
    if one_s is None or more_s is None:
        return float(tokens)
    if work != "decode":
        return max(float(tokens), one_s / more_s)
    return 1.0 + (tokens - 1) * min(more_s / one_s, 1.0)


def unaccounted(held: Sequence[float], wall_s: float, network_s: float) -> float:
    """Seconds of a step that each of its servers has to answer for beside what it says itself, the same for all of them.

    Who says that it took less than it did cannot hide it: the client has its own clock. It cannot tell whose the difference is, so all of
    a chain have a part of it; in the next chain it follows whoever it belongs to.

    Args:
        held: seconds that the servers say that they had the step.
        wall_s: seconds that the step took.
        network_s: seconds that the ways between them are known to take.
    """
    if not held:
        return 0.0
    return max(wall_s - sum(held) - network_s * (1 + SLACK) - SLACK_S, 0.0) / len(held)


NOTHING_SEEN = Observed()
"""For whoever has seen nothing yet; never added to."""
