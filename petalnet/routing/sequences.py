"""The newest announcement that was ever seen of each server, so that no older one brings back what is gone. Pure.

Records outlive their own expiry in the hands of whoever kept a copy, and clocks differ, so a copy is turned down by its number, not by
its time alone. A number needs to be remembered only as long as an older record could still pass for a valid one.
"""

from __future__ import annotations

from collections import OrderedDict

from petalnet.routing.records import CLOCK_TOLERANCE, MAX_LIFETIME

MEMORY_S = MAX_LIFETIME + 2 * CLOCK_TOLERANCE
"""A record that is older than one seen now has expired by everybody's clock after this many seconds."""


class Sequences:
    """Sequence numbers by peer, at most `capacity` of them; those not heard of for longest are forgotten first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._newest: OrderedDict[str, tuple[int, float]] = OrderedDict()  # peer: sequence, and when that may be forgotten

    def __len__(self) -> int:
        return len(self._newest)

    def is_news(self, peer_id: str, sequence: int) -> bool:
        """Whether no announcement of this number or a higher one is remembered."""
        known = self._newest.get(peer_id)
        return known is None or known[0] < sequence

    def newest(self, peer_id: str) -> int:
        """The highest number that is remembered of a peer, 0 where there is none."""
        return self._newest.get(peer_id, (0, 0.0))[0]

    def note(self, peer_id: str, sequence: int, now: float) -> bool:
        """Remember a number; False where it is not news."""
        if not self.is_news(peer_id, sequence):
            return False
        self._newest[peer_id] = sequence, now + MEMORY_S
        self._newest.move_to_end(peer_id)
        if len(self._newest) > self._capacity:
            self._newest.popitem(last=False)
        return True

    def forget(self, peer_id: str) -> None:
        """Forget a peer's number."""
        self._newest.pop(peer_id, None)

    def expire(self, now: float) -> None:
        """Forget numbers that no valid record can fall below any more."""
        while self._newest:
            peer_id, (_, until) = next(iter(self._newest.items()))
            if until > now:
                return
            del self._newest[peer_id]
