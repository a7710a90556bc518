"""What a compute thread is asked for: tasks, and the parts in which rounds run them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

DECODE_UNITS = 16
"""A step of at most so many new tokens a row is a decode, ..."""
DECODE_TOKENS = 64
"""... if it has at most so many in all."""
Rank = Literal["empty", "decode", "prefill", "pass"]
Kind = Literal["decode", "prefill", "forward"]
"""Of rates: one token after another, prompts, and passes without a session."""


class Done(NamedTuple):
    """Work of one kind: its tokens, as if each had gone alone (decodes) or in rounds of `SEED_TOKENS`, and its rounds' seconds."""

    tokens: float
    seconds: float


@dataclass(eq=False)
class Task:
    """Something to compute, maybe in several parts. A session has at most one at a time.

    Attributes:
        peer: who asks.
        session: which session; None for a pass.
        key: tasks with equal keys may share a round's pass; None: it runs alone.
        units: how far it can be cut: new tokens of a step, of which a round runs several side by side; blocks that a pass goes through, one
            after the other; 0 for a step without tokens.
        width: tokens that one unit puts into a pass: rows of a step; all tokens that go through a block in a pass.
        kind: a step of a session, or a pass without one.
        max_units: the most units at a time, for the sake of memory.
        work: for the runner.
        done: units that are finished or under way.
        weight: what one of its tokens costs, in tokens of a step through the whole span: the share of the blocks that it goes through; of a
            pass, in one unit. Tasks of equal keys have equal weights.
        network: from which the peer is connected, by which it counts as well; "" where that is not known.
        cuts: the units at which its parts may end, ascending, its last one among them; empty where they may end anywhere.
    """

    peer: str
    session: Hashable
    key: Hashable
    units: int
    width: int
    kind: Literal["step", "pass"]
    max_units: int
    work: Any
    done: int = 0
    weight: float = 1.0
    network: str = ""
    cuts: tuple[int, ...] = ()

    @property
    def tokens_left(self) -> int:
        """Of a step."""
        return (self.units - self.done) * self.width

    @property
    def rank(self) -> Rank:
        if self.kind == "pass":
            return "pass"
        if self.units == 0:
            return "empty"
        small = self.units - self.done <= DECODE_UNITS and self.tokens_left <= DECODE_TOKENS
        return "decode" if small else "prefill"


@dataclass(frozen=True)
class Part:
    """Units start … end - 1 of a task."""

    task: Task
    start: int
    end: int

    @property
    def tokens(self) -> int:
        """That go through blocks side by side."""
        return self.task.width if self.task.kind == "pass" else (self.end - self.start) * self.task.width

    @property
    def weight(self) -> float:
        """What each of them costs, in tokens of a step through the whole span."""
        return self.task.weight * (self.end - self.start) if self.task.kind == "pass" else self.task.weight
