"""How fast somebody may go on: token buckets, one a name. Pure: `now` (seconds, of any clock that only grows) is passed in."""

from __future__ import annotations

from collections import OrderedDict


class Rates:
    """A bucket for each name that comes along: it fills at `rate` a second up to `burst`, and whoever takes more has to wait.

    Names are bounded: the one that was heard of longest ago is forgotten first, which gives it a full bucket when it is back. So where
    names are free (peer ids), a second instance for what is not (addresses) has to stand behind the first.
    """

    def __init__(self, rate: float, burst: float, *, capacity: int = 4096) -> None:
        self.rate, self.burst = rate, burst
        self._capacity = capacity
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name: tokens, and when there were that many

    def __len__(self) -> int:
        return len(self._buckets)

    def wait(self, name: str, now: float, amount: float = 1.0) -> float:
        """Seconds until `amount` may be taken; 0 where that is now. More than the burst may be taken when the bucket is full."""
        return max(min(amount, self.burst) - self._tokens(name, now), 0.0) / self.rate

    def take(self, name: str, now: float, amount: float = 1.0) -> bool:
        """Take `amount`, or nothing and False where it is not there yet."""
        if self.wait(name, now, amount) > 0:
            return False
        self.charge(name, now, amount)
        return True

    def charge(self, name: str, now: float, amount: float) -> None:
        """Take what is only known afterwards (bytes of an answer); the bucket may owe some then."""
        self._buckets[name] = self._tokens(name, now) - amount, now
        self._buckets.move_to_end(name)
        if len(self._buckets) > self._capacity:
            self._buckets.popitem(last=False)

    def _tokens(self, name: str, now: float) -> float:
        tokens, then = self._buckets.get(name, (self.burst, now))
        return min(tokens + max(now - then, 0.0) * self.rate, self.burst)
