"""Training steps over a `FaultySwarm` during which something happens to servers: forward, backward, and in between.

A `TrainingCase` trains nothing: it takes gradients of several batches one after another, and holds those of each against the local ones.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .faults import WITHIN_S, FaultySwarm, within
from .garbage_node import PASS_KINDS as GARBAGE
from .models import ids
from .training import Batch, Sides

MOMENTS = ("forward in", "forward out", "between", "backward in", "backward out")
"""When half of what a span is sent has come to its servers, or half of what it answers to the client; or after the forward pass."""
ROWS, LENGTH = 4, 40
PASS_BYTES = ROWS * LENGTH * 64 * 4
"""Of the hidden states, and of their gradients."""
TUNING = {"tuning_mode": "deep_ptune", "pre_seq_len": 4, "request_timeout": 30.0}
WITHIN = 1e-3
"""How far gradients may be apart, relative to the largest."""


@dataclass
class TrainingOutcome:
    """What became of the steps of a case."""

    seconds: list[float] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{' '.join(f'{second:.2f}' for second in self.seconds)} s; happened: {', '.join(self.happened) or 'nothing'}"


@dataclass(frozen=True)
class TrainingEvent:
    """Something happens to the server that does a part of a step.

    Attributes:
        kind: see `FaultySwarm.do`.
        span: whose server.
        step: of which batch, from 0.
        moment: one of `MOMENTS`.
    """

    kind: str
    span: int
    step: int
    moment: str


class TrainingCase:
    """Steps, and what happens in them.

    Attributes:
        outcome: what happened, and the seconds of each step.
    """

    def __init__(self, swarm: FaultySwarm, events: Sequence[TrainingEvent], steps: int = 2, seed: int = 0) -> None:
        self.swarm, self.events, self.steps, self.seed = swarm, events, steps, seed
        self.outcome = TrainingOutcome()

    def run(self, sides: Sides) -> None:
        """Raises AssertionError where a gradient is wrong or does not come, and whatever the passes raise."""
        for span in range(len(self.swarm.spans)):
            self.swarm.healthy(span)
        within(WITHIN_S, sides.remote.remote_blocks.route)
        for step in range(self.steps):
            tokens = ids(ROWS, LENGTH, seed=1000 * self.seed + step)
            batch = Batch(tokens, tokens.new_ones(tokens.shape), tokens)
            now = [event for event in self.events if event.step == step]
            began = time.monotonic()
            found = within(WITHIN_S, lambda batch=batch, now=now: self._step(sides, batch, now))
            self.outcome.seconds.append(time.monotonic() - began)
            assert max(found.values()) < WITHIN, f"step {step}: {found}; {self}; {self.outcome}"
        assert len(self.outcome.happened) == len(self.events), f"not all of it happened: {self}; {self.outcome}"

    def _step(self, sides: Sides, batch: Batch, events: Sequence[TrainingEvent]) -> dict[str, float]:
        between = []
        for event in events:
            if event.moment.startswith("forward"):
                self._arm(event)
            elif event.moment == "between":
                fuse = self.swarm.wires.when(self.swarm.pids(event.span), PASS_BYTES // 2, lambda pid: None)
                between.append((event, fuse))

        def after_forward() -> None:
            for event, fuse in between:
                if fuse.victim is not None:
                    self._do(event, fuse.victim)
            for event in events:
                if event.moment.startswith("backward"):
                    self._arm(event)

        return sides.gradients(batch, after_forward)

    def _arm(self, event: TrainingEvent) -> None:
        wires = self.swarm.wires

        def reached(pid: int) -> None:
            if event.moment.endswith("in"):
                self._do(event, pid)
            else:
                wires.when([os.getpid()], PASS_BYTES // 2, lambda _: self._do(event, pid))

        wires.when(self.swarm.pids(event.span), PASS_BYTES // 2, reached)

    def _do(self, event: TrainingEvent, pid: int) -> None:
        self.swarm.do(event.kind, pid)
        self.outcome.happened.append(f"{event.kind} {event.span}")

    def __str__(self) -> str:
        what = ", ".join(f"{event.kind} span {event.span} at {event.moment} of step {event.step}" for event in self.events)
        return f"{self.steps} steps: {what}"


def random_training(swarm: FaultySwarm, seed: int, kinds: Sequence[str]) -> TrainingCase:
    """Up to four events in three steps, drawn from a seed; for each span there always is a server that nothing has happened to."""
    chance = random.Random(seed)
    left = {span: swarm.replicas - 1 for span in range(len(swarm.spans))}
    events = []
    for _ in range(chance.randint(1, 4)):
        free = [span for span, count in left.items() if count]
        if not free:
            break
        span, kind = chance.choice(free), chance.choice(kinds)
        left[span] -= 1
        kind = f"garbage:{chance.choice(GARBAGE)}" if kind == "garbage" else kind
        events.append(TrainingEvent(kind, span, chance.randrange(2), chance.choice(MOMENTS)))
    return TrainingCase(swarm, events, steps=3, seed=seed)
