"""Whether this machine slept, this process was stopped, or the clock was set. Pure but for the clocks that it is given.

No timer tells: while a machine sleeps its monotonic clock stands, and while a process is stopped nothing of it runs. So somebody has to
look at both clocks again and again. What happened to connections meanwhile is nobody's fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LOOK_EVERY_S = 1.0
GAP_S = 6.0
"""Seconds of silence after which others have given this node up: three heartbeats of theirs (`p2p.heartbeat`)."""
AFTER_S = 10.0
"""Seconds after a gap for which connections that turn out to be broken were broken by it."""


@dataclass(frozen=True, slots=True)
class Gap:
    """What a look at the clocks has found.

    Attributes:
        asleep_s: seconds for which this node did nothing.
        set_back_s: seconds by which the clock was set back.
    """

    asleep_s: float
    set_back_s: float

    def __str__(self) -> str:
        slept = f"this machine slept, or this node was stopped, for {self.asleep_s:.0f} s" if self.asleep_s else ""
        was_set = f"this machine's clock was set back by {self.set_back_s:.0f} s" if self.set_back_s else ""
        return " and ".join(filter(None, (slept, was_set)))


class Waking:
    """The looks of one node, at least one in `LOOK_EVERY_S`.

    Args:
        monotonic: seconds, of a clock that nobody sets.
        wall: unix seconds.
    """

    def __init__(self, monotonic: Callable[[], float], wall: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._looked = monotonic(), wall()
        self._gap: Gap | None = None
        self._woke_at = float("-inf")

    def look(self) -> None:
        """Look at the clocks; what is found is kept for `take`."""
        before, wall_before = self._looked
        now, wall = self._looked = self._monotonic(), self._wall()
        passed, shifted = now - before, wall - wall_before - (now - before)
        asleep = max(passed, passed + shifted)  # a clock that was set forward looks like sleep, and is treated alike
        asleep_s, set_back_s = asleep if asleep > LOOK_EVERY_S + GAP_S else 0.0, -shifted if shifted < -GAP_S else 0.0
        if asleep_s or set_back_s:
            self._gap, self._woke_at = Gap(asleep_s, set_back_s), now

    def take(self) -> Gap | None:
        """The last gap, once."""
        gap, self._gap = self._gap, None
        return gap

    @property
    def is_drowsy(self) -> bool:
        """Whether there was a gap a moment ago, up to this one."""
        self.look()
        return self._looked[0] < self._woke_at + AFTER_S
