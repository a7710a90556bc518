"""What each peer has had of the device, so that whoever has had least is served first: start-time fair queueing.

Each peer has a virtual time that advances by the seconds of computation that it gets. Who comes anew, or was away, starts where the least
of those present is: what nobody competed for is not held against anybody, and nobody saves up for later. Idle time forgives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KNOWN_PEERS = 1024
"""Peers that are absent and remembered all the same, for what they have had beyond others."""


@dataclass(eq=False)
class Share:
    """One peer's.

    Attributes:
        used: virtual time, seconds.
        since: when it came, or was last served.
        tasks: how many of its tasks are here.
    """

    used: float
    since: float
    tasks: int = 0

    def behind(self, now: float) -> float:
        """The least is served first. Time without service counts in a peer's favour, so that no stream of newcomers starves it."""
        return self.used - (now - self.since)


class Shares:
    """The shares of all peers in one kind of work."""

    def __init__(self) -> None:
        self._peers: dict[str, Share] = {}
        self._virtual = 0.0  # where whoever comes begins
        self._present = 0
        self._idle_since = 0.0

    def __len__(self) -> int:
        """Peers that are remembered."""
        return len(self._peers)

    def enter(self, peer: str, now: float) -> Share:
        """A task of this peer has come."""
        if not self._present:
            self._virtual += max(0.0, now - self._idle_since)
        self._present += 1
        share = self._peers.get(peer)
        if share is None:
            if len(self._peers) >= KNOWN_PEERS:
                self._forget()
            share = self._peers[peer] = Share(self._virtual, now)
        if not share.tasks:
            share.used, share.since = max(share.used, self._virtual), now
        share.tasks += 1
        return share

    def leave(self, share: Share, now: float) -> None:
        """One of its tasks is complete or gone."""
        share.tasks -= 1
        self._present -= 1
        if not self._present:
            self._idle_since = now

    def serve(self, present: Iterable[Share]) -> None:
        """Somebody of those present is served now."""
        self._virtual = max(self._virtual, min((share.used for share in present), default=0.0))

    @staticmethod
    def charge(share: Share, seconds: float, now: float) -> None:
        """A peer got so much computation, until now."""
        share.used += seconds
        share.since = now

    def _forget(self) -> None:
        """Make room: who is absent and has had no more than others goes first; then all who are absent, since names cost nothing."""
        owing = {peer: share for peer, share in self._peers.items() if share.tasks or share.used > self._virtual}
        present = {peer: share for peer, share in self._peers.items() if share.tasks}
        self._peers = owing if len(owing) < KNOWN_PEERS else present
