"""Promises of KV pages: who may take how many, and when there may be room for whoever is told to wait.

A session is promised the pages for all that its rows may become before it takes the first one, so nobody runs out in mid-answer. Pages that
are promised and not taken yet hold what is kept of earlier prompts meanwhile. Pure: `now` is passed in, in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

LARGE_SHARE, LEFT_SHARE = 4, 4
"""A peer whose sessions hold more than a quarter of all pages leaves a quarter free when it asks for another session: someone who runs
twenty at once does not shut out those who want one."""
LARGE_NETWORK_SHARE, LEFT_NETWORK_SHARE = 2, 8
"""The same for all peers of a public network together, since peer ids cost nothing: above a half they leave an eighth. Less, since they may
be many people in one place."""
FIRST_LIFETIME_S = 10.0
"""How long a session is taken to last before any has ended: about an answer of a hundred tokens."""
RECENT = 0.25
"""Share of the newest session in the average of lifetimes."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.2, 30.0
"""Bounds of what is told: no sooner than another try costs anything, no later than anybody can foresee."""


class NoRoom(Exception):
    """Pages cannot be promised now.

    Attributes:
        available: how many could be.
        wait_s: seconds until there may be enough.
    """

    def __init__(self, available: int, wait_s: float) -> None:
        super().__init__(f"{available} pages are available; try again in {wait_s:.1f} s")
        self.available = available
        self.wait_s = wait_s


@dataclass(eq=False)
class Promise:
    """Pages that are set aside for one session.

    Attributes:
        peer_id: whose session it is.
        network: the public one from which that peer is connected (see `p2p.sources`); "" where that is not known.
        pages: how many.
        since: when the first of them were promised.
        progress: the share of its greatest length that the session has reached.
    """

    peer_id: str
    network: str = ""
    pages: int = 0
    since: float = 0.0
    progress: float = 0.0

    def remaining_s(self, now: float, lifetime_s: float) -> float:
        """For how long it may still be needed: as sessions usually last, or, where that is over, as long again as it has lasted; no longer
        than it takes to reach its greatest length at its pace so far."""
        age = max(now - self.since, 0.0)
        usual = lifetime_s - age if age < lifetime_s else age
        return min(usual, age * (1 - self.progress) / self.progress) if self.progress else usual


class Promises:
    """All promises on one pool of pages.

    Attributes:
        pages: how many pages there are.
        promised: how many of them are promised.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.promised = 0
        self._live: set[Promise] = set()
        self._of_peer: Counter[str] = Counter()
        self._of_network: Counter[str] = Counter()
        self._lifetime_s = FIRST_LIFETIME_S

    @property
    def free(self) -> int:
        """Pages that nobody has been promised."""
        return self.pages - self.promised

    def available(self, promise: Promise) -> int:
        """Pages that could be added to a promise now."""
        left = 0
        if (self._of_peer[promise.peer_id] - promise.pages) * LARGE_SHARE > self.pages:
            left = self.pages // LEFT_SHARE
        elif promise.network and (self._of_network[promise.network] - promise.pages) * LARGE_NETWORK_SHARE > self.pages:
            left = self.pages // LEFT_NETWORK_SHARE
        return max(self.free - left, 0)

    def extend(self, promise: Promise, pages: int, now: float) -> None:
        """Raise a promise to so many pages; one of as many or more stays as it is.

        Raises:
            NoRoom: they are not there now; the promise is as before.
        """
        more = pages - promise.pages
        if more <= 0:
            return
        available = self.available(promise)
        if more > available:
            raise NoRoom(promise.pages + available, self._wait_s(promise, more - available, now))
        if not promise.pages:
            promise.since = now
            self._live.add(promise)
        promise.pages = pages
        self.promised += more
        self._count(promise, more)

    def end(self, promise: Promise, now: float) -> None:
        """Take a promise back; harmless where that was done before."""
        if promise not in self._live:
            return
        self._live.remove(promise)
        self.promised -= promise.pages
        self._count(promise, -promise.pages)
        promise.pages = 0
        self._lifetime_s += RECENT * (max(now - promise.since, 0.0) - self._lifetime_s)

    def _count(self, promise: Promise, pages: int) -> None:
        """So many pages more are held by whoever this promise was given to."""
        for counter, name in ((self._of_peer, promise.peer_id), (self._of_network, promise.network)):
            if name:
                counter[name] += pages
                if not counter[name]:
                    del counter[name]

    def next_end_s(self, now: float) -> float:
        """Seconds until one session may have ended."""
        return _bounded(min(self._remaining(self._live, now), default=(LONGEST_WAIT_S, 0))[0])

    def _wait_s(self, promise: Promise, missing: int, now: float) -> float:
        """Seconds until others may have given so many pages back."""
        for seconds, pages in sorted(self._remaining(self._live - {promise}, now)):
            missing -= pages
            if missing <= 0:
                return _bounded(seconds)
        return LONGEST_WAIT_S

    def _remaining(self, promises: Iterable[Promise], now: float) -> list[tuple[float, int]]:
        return [(promise.remaining_s(now, self._lifetime_s), promise.pages) for promise in promises]


def _bounded(seconds: float) -> float:
    return min(max(seconds, SHORTEST_WAIT_S), LONGEST_WAIT_S)
