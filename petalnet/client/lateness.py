"""How long the steps of a session take, and from when on one of them is late. Pure.

A server that hangs, or a network that swallows what is sent, breaks no stream: only the time tells. A step that takes longer than those
before by a wide margin is a reason to ask the servers (see `diagnosis`), which costs them nothing and changes nothing; only who does not
answer then is given up. So of the time within which a hang has to be noticed, `give_up_after_s`, the last part is for their answers.

Steps of a few tokens take about the same time each, so the next one is held against those before. Those of many tokens are held against
the slowest rate at which such steps have gone, or against what was announced. What is not known yet is waited for generously.
"""

from __future__ import annotations

import math
from collections import deque

FEW_TOKENS = 16
"""Tokens (rows × new) up to which a step is one of a few tokens."""
REMEMBERED, REMEMBERED_LONG = 100, 8
"""Steps of a few tokens, and of many, that the next ones are held against."""
ENOUGH = 4
"""Steps of a few tokens from which on what is usual is known: the first may have waited for memory, or for code that was never run."""
USUAL_TIMES = 5.0
"""A step that takes so many times as long as the 99th percentile of those before is late."""
LEAST_S = 1.0
"""No step is given up earlier: the machines of volunteers pause for half a second now and then."""
UNKNOWN_S = 5.0
"""Until a step is given up where nothing is known."""
UNKNOWN_TOKEN_S = 0.02
"""For each token of a long step where no rate is known: a prompt on a small CPU."""
LONGEST_EXTRA_S = 10.0
"""Added for the tokens of a long step at most. Servers that compute answer all the same, so there is little reason to wait for minutes;
some there is, since links that are busy with a prompt carry answers late."""
LONGEST_ASKING_S = 2.0
"""Of the time until a step is given up the last half, and no more than this, is for servers to answer whether they are there."""
ANSWERING = 0.9
"""Of that part, what servers really have; what is left is for this machine's own tasks to have their turn."""
LONGEST_PAUSE_S = 5.0
"""Between two times that the servers are asked about one and the same step, each pause being twice the one before."""


class Lateness:
    """What is known of how long the steps of one session take; another chain of servers takes another one.

    Args:
        token_s: expected seconds of each token of a long step, by what servers announce; 0 where that is not known.
    """

    def __init__(self, token_s: float = 0.0) -> None:
        self._announced_s = token_s
        self._few: deque[float] = deque(maxlen=REMEMBERED)
        self._token_s: deque[float] = deque(maxlen=REMEMBERED_LONG)
        self._usual_s: float | None = None

    def note(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens (rows × new ones) has taken so long, from when it was sent until its answer was here."""
        if tokens <= FEW_TOKENS:
            self._few.append(seconds)
            self._usual_s = None
        else:
            self._token_s.append(seconds / tokens)

    def give_up_after_s(self, tokens: int, round_trip_s: float) -> float:
        """Seconds after which a step is late: then a hop that does not answer has been found out.

        Args:
            tokens: rows × new tokens.
            round_trip_s: through the whole chain and back, of one token; or to the farthest server of it.
        """
        few_s = UNKNOWN_S if len(self._few) < ENOUGH else 0.0
        few_s = max(few_s, LEAST_S, USUAL_TIMES * self.usual_s + round_trip_s)
        if tokens <= FEW_TOKENS:
            return few_s
        token_s = max(self._token_s) if self._token_s else max(self._announced_s, UNKNOWN_TOKEN_S)
        return few_s + min(USUAL_TIMES * token_s * tokens, LONGEST_EXTRA_S)

    def suspect_after_s(self, tokens: int, round_trip_s: float, asked: int = 0) -> float:
        """Seconds from the step's beginning after which its servers are to be asked, who then have until `give_up_after_s` to answer.

        Args:
            tokens, round_trip_s: as of `give_up_after_s`.
            asked: how often they were asked about this step already, and all was well.
        """
        late_s = self.give_up_after_s(tokens, round_trip_s)
        first_s = max(late_s / 2, late_s - LONGEST_ASKING_S)
        return first_s + sum(min(first_s * 2.0 ** min(time, 16), max(LONGEST_PAUSE_S, first_s)) for time in range(asked))

    def answer_within_s(self, tokens: int, round_trip_s: float) -> float:
        """Seconds that servers have to answer when they are asked."""
        return ANSWERING * (self.give_up_after_s(tokens, round_trip_s) - self.suspect_after_s(tokens, round_trip_s))

    @property
    def usual_s(self) -> float:
        """The 99th percentile of the last steps of a few tokens, seconds; 0 where there was none."""
        if self._usual_s is None:
            ranked = sorted(self._few)
            self._usual_s = ranked[math.ceil(0.99 * len(ranked)) - 1] if ranked else 0.0
        return self._usual_s
