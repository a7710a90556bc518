"""Who has broken rules lately, and is kept away for it.

Each offence adds its weight to the peer's score, which halves after every half-life. At the threshold the peer is banned, and each further
ban is twice as long as the one before. A peer that has behaved for as long as it was kept away begins anew, with nothing against it. Only
what no honest peer of any version would do is an offence: an honest peer behind a bad line must never come near the threshold.

Pure: `now` is passed in (seconds on any clock that does not go back). The number of peers remembered is bounded, because ids cost
nothing: when there are too many, those with the least against them are forgotten first.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from petalnet.p2p.protocols import Limits

MAX_BAN_S = 24 * 3600.0


@dataclass(slots=True)
class _Entry:
    """What is known of one peer: its score at the time `at`, how many bans it has had, and the end and length of the last one."""

    score: float
    at: float
    bans: int = 0
    banned_until: float = float("-inf")
    ban_s: float = 0.0


class Offences:
    """The offences of all peers of one node, within the bounds of `limits`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, peer_id: str, now: float, weight: float = 1.0) -> bool:
        """Note an offence. True where the peer is to be dropped now: it is at the threshold, or banned already."""
        entry = self._current(peer_id, now)
        if entry is None:
            self._make_room(now)
            entry = self._entries[peer_id] = _Entry(0.0, now)
        if entry.banned_until > now:
            return True
        entry.score = self._score(entry, now) + weight
        entry.at = now
        if entry.score < self._limits.offence_threshold:
            return False
        entry.ban_s = min(self._limits.ban * 2.0**entry.bans, MAX_BAN_S)
        entry.bans = min(entry.bans + 1, 64)
        entry.banned_until = now + entry.ban_s
        entry.score = 0.0
        return True

    def banned_until(self, peer_id: str, now: float) -> float | None:
        """When the peer's ban ends, on the clock of `now`; None where there is none."""
        entry = self._current(peer_id, now)
        return None if entry is None or entry.banned_until <= now else entry.banned_until

    def _current(self, peer_id: str, now: float) -> _Entry | None:
        """What is known of a peer; forgotten once it has behaved for as long as its last ban took."""
        entry = self._entries.get(peer_id)
        if entry is not None and entry.bans and entry.banned_until + entry.ban_s <= now:
            del self._entries[peer_id]
            return None
        return entry

    def _score(self, entry: _Entry, now: float) -> float:
        return float(entry.score * 0.5 ** (max(now - entry.at, 0.0) / self._limits.offence_half_life))

    def _make_room(self, now: float) -> None:
        """Forget an eighth of the peers where all places are taken, so that this need not be done for each new one."""
        places = self._limits.max_offenders
        if len(self._entries) < places:
            return

        def severity(peer_id: str) -> tuple[float, int, float]:
            entry = self._entries[peer_id]
            return max(entry.banned_until - now, 0.0), entry.bans, self._score(entry, now)

        for peer_id in heapq.nsmallest(max(places // 8, 1), self._entries, key=severity):
            del self._entries[peer_id]
