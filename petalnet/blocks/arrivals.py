"""When sessions that were just answered come back with their next token: learned from each session's own habit.

A client takes its answer, samples a token and asks for the next. How long that takes differs from client to client (a few milliseconds on
the same machine, a round trip over the internet) and little from token to token, so that it can be foretold.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

RECENT = 0.25
"""Share of the newest return in a session's averages."""
FORGET_S = 1.0
"""A session that stays away for longer is not expected any more, and its habit is forgotten: nobody would wait for it anyway."""
PATIENCE = 2.0
"""A session is late, and not expected any more, after its usual time and so many times its usual deviation from it."""
LEAST_DEVIATION_S = 0.001
"""However regular a session is, an operating system's scheduler is not."""


@dataclass
class _Habit:
    """How long a session usually stays away, and how much that varies; seconds."""

    away: float
    deviation: float

    def learn(self, away: float) -> None:
        self.deviation += RECENT * (abs(away - self.away) - self.deviation)
        self.away += RECENT * (away - self.away)


@dataclass(frozen=True)
class _Away:
    answered: float
    habit: _Habit | None
    key: Hashable
    tokens: int


@dataclass(frozen=True)
class Arrival:
    """A session that is about to come back.

    Attributes:
        wait: seconds until then, as expected.
        late: the time from which on it is not expected any more.
        usual: seconds for which it usually stays away.
        key, tokens: of its last step.
    """

    wait: float
    late: float
    usual: float
    key: Hashable
    tokens: int


class Arrivals:
    """Which sessions are away, and when they are expected back."""

    def __init__(self) -> None:
        self._away: dict[Hashable, _Away] = {}  # in the order in which they were answered
        self._here: dict[Hashable, _Habit] = {}

    def __len__(self) -> int:
        """Sessions that were answered within the last `FORGET_S` (as of the last `expected`) and are not back."""
        return len(self._away)

    def left(self, session: Hashable, key: Hashable, tokens: int, now: float) -> None:
        """A session got its answer; its next step will probably be like the last: of this key, with so many tokens."""
        self._away.pop(session, None)
        self._away[session] = _Away(now, self._here.pop(session, None), key, tokens)

    def came(self, session: Hashable, now: float) -> None:
        """A session asked for its next step at `now`."""
        away = self._away.pop(session, None)
        if away is None:
            return
        seconds = max(0.0, now - away.answered)
        if away.habit is None:
            self._here[session] = _Habit(seconds, seconds / 2)
        elif seconds <= FORGET_S:
            away.habit.learn(seconds)
            self._here[session] = away.habit

    def forget(self, session: Hashable) -> None:
        """A session has ended, or nobody knows when it comes back."""
        self._away.pop(session, None)
        self._here.pop(session, None)

    def expected(self, now: float) -> list[Arrival]:
        """Who is about to come back, the next first."""
        while self._away:
            session, oldest = next(iter(self._away.items()))
            if now - oldest.answered <= FORGET_S:
                break
            del self._away[session]
        arrivals = []
        for away in self._away.values():
            habit = away.habit
            if habit is None:
                continue
            due, deviation = away.answered + habit.away, max(habit.deviation, LEAST_DEVIATION_S)
            late = due + PATIENCE * deviation
            if late > now:
                # One that is due but not late yet comes at any moment: within its deviation.
                wait = max(due - now, min(deviation, late - now))
                arrivals.append(Arrival(wait, late, habit.away, away.key, away.tokens))
        arrivals.sort(key=lambda arrival: arrival.wait)
        return arrivals
