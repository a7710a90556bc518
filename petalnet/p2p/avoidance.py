"""Which peers are not asked for a while, because asking them cost time or they lied. Pure: `now` is passed in, in seconds.

Each further failure of a peer doubles the time, and an answer in between forgives nothing: a peer that answers now and then would cost
its deadline again and again. Failures are forgotten some time after they have cost their last penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MAX_PEERS = 4096
"""Peers that are remembered; those whose time is up soonest are forgotten first."""
FORGIVEN_AFTER = 600.0
"""Seconds after the end of a penalty, or as long as it lasted if that is longer, after which a peer's failures are forgotten."""


class Reason(Enum):
    """Why a peer is avoided: seconds for the first time, and at most."""

    UNREACHABLE = (15.0, 600.0)
    """It cannot be connected to; it may be back any time, and shows that by connecting."""
    UNSERVED = (300.0, 3600.0)
    """It does not keep records: a client, or a stranger. It may be a server when it connects the next time."""
    SILENT = (30.0, 3600.0)
    """It takes requests and does not answer."""
    LYING = (600.0, 6 * 3600.0)
    """It answered what no honest peer does."""


_LIFTED_BY_CONNECTING = (Reason.UNREACHABLE, Reason.UNSERVED)


@dataclass(slots=True)
class _Failures:
    count: int
    reason: Reason
    until: float
    forgotten: float


class Avoidance:
    """The peers of one node that are avoided."""

    def __init__(self, capacity: int = MAX_PEERS) -> None:
        self._capacity = capacity
        self._peers: dict[str, _Failures] = {}

    def add(self, peer_id: str, reason: Reason, now: float) -> float:
        """Avoid a peer from now on; returns until when. A failure while it is avoided anyway (it was asked before) does not count again."""
        known = self._peers.get(peer_id)
        if known is not None and known.forgotten <= now:
            known = None
        if known is not None and known.until > now and known.reason is reason:
            return known.until
        count = 1 if known is None else known.count + 1
        first, longest = reason.value
        seconds = min(first * 2.0 ** min(count - 1, 20), longest)
        until = max(now + seconds, known.until if known is not None else now)
        if known is None and len(self._peers) >= self._capacity:
            del self._peers[min(self._peers, key=lambda name: self._peers[name].until)]
        self._peers[peer_id] = _Failures(count, reason, until, until + max(seconds, FORGIVEN_AFTER))
        return until

    def is_avoided(self, peer_id: str, now: float) -> bool:
        """Whether the peer is not to be asked now."""
        return self.reason(peer_id, now) is not None

    def reason(self, peer_id: str, now: float) -> Reason | None:
        """Why the peer is not to be asked now, None where it may be."""
        known = self._peers.get(peer_id)
        return None if known is None or known.until <= now else known.reason

    def connected(self, peer_id: str, now: float) -> None:
        """The peer has connected: what that disproves is lifted, though not forgotten."""
        known = self._peers.get(peer_id)
        if known is not None and known.reason in _LIFTED_BY_CONNECTING:
            known.until = min(known.until, now)

    def forgive(self) -> None:
        """Forget all failures but lies: it was this node that was away."""
        self._peers = {peer_id: known for peer_id, known in self._peers.items() if known.reason is Reason.LYING}

    def expire(self, now: float) -> None:
        """Forget failures that are long past."""
        self._peers = {peer_id: known for peer_id, known in self._peers.items() if known.forgotten > now}
