"""The peers by which a node finds its swarm again when it has lost all connections and its entries are gone. Pure: no I/O, `now` (unix
seconds) is passed in.

What is remembered of a peer is how it was connected: the address at which this node dialled it, or those of its addresses that are where
its connection came from. So nobody can have this node knock somewhere else. Room is shared among sources (see `sources`), and those who
came by themselves get half of it at most: a crowd of strangers does not crowd out the peers that this node chose. Among equals, who was
there last stays.

What comes back from a file is checked like what a stranger says.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from petalnet.errors import UsageError
from petalnet.p2p.addresses import PeerAddress, ip_of, parse_peer
from petalnet.p2p.peer_status import PeerStatus
from petalnet.p2p.sources import source_of

MAX_PEERS = 64
"""One of them that still runs is enough; a swarm of volunteers may have lost nine of ten after a week."""
MAX_PER_SOURCE = 16
"""A house or a rack with a swarm of its own fits."""
MAX_ADDRS = 3
MAX_AGE_S = 30 * 86_400.0
"""After which a peer that was not seen again is forgotten."""
MOST_AHEAD_S = 86_400.0
"""How far in the future a time in a file may be: clocks are set."""


@dataclass(frozen=True, slots=True)
class _Known:
    addrs: tuple[str, ...]
    seen: float
    """When it was last connected."""
    dialled: bool
    """Whether this node ever chose to connect to it."""
    source: str


class KnownPeers:
    """See the module's docstring.

    Attributes:
        version: grows with every change but the mere passing of time.
    """

    def __init__(self, *, rng: random.Random | None = None) -> None:
        self.version = 0
        self._peers: dict[str, _Known] = {}
        self._random = rng or random.Random()

    def __len__(self) -> int:
        return len(self._peers)

    def note(self, status: PeerStatus, addrs: Iterable[str], *, now: float) -> None:
        """A peer that others can connect to is connected.

        Args:
            status: its connection.
            addrs: what it says its addresses are.
        """
        there = _addresses(status.peer_id, [status.addr])
        if status.direction == "out":
            found = there
        else:
            ip = ip_of(there[0].addr) if there else None
            found = [address for address in _addresses(status.peer_id, addrs) if ip is not None and ip_of(address.addr) == ip]
        if found:
            self._add(found, now, status.direction == "out")

    def peers(self, count: int) -> list[PeerAddress]:
        """Addresses of `count` peers that are worth a try, drawn by chance, those first that this node has dialled before."""
        drawn = self._random.sample(list(self._peers), len(self._peers))
        drawn.sort(key=lambda peer_id: not self._peers[peer_id].dialled)
        return [PeerAddress(peer_id, addr) for peer_id in drawn[:count] for addr in self._peers[peer_id].addrs]

    def expire(self, now: float) -> None:
        """Forget peers that were not seen for long."""
        gone = [peer_id for peer_id, known in self._peers.items() if known.seen < now - MAX_AGE_S]
        for peer_id in gone:
            del self._peers[peer_id]
        self.version += bool(gone)

    def dump(self) -> list[dict[str, Any]]:
        """All of them as JSON."""
        return [
            {"peer_id": peer_id, "addrs": list(known.addrs), "seen": round(known.seen), "dialled": known.dialled}
            for peer_id, known in self._peers.items()
        ]

    def load(self, entries: object, *, now: float) -> None:
        """Take in what `dump` gave once; whatever is no such thing is left out."""
        for entry in entries[:MAX_PEERS] if isinstance(entries, list) else []:
            if not isinstance(entry, Mapping) or not isinstance(addrs := entry.get("addrs"), list):
                continue
            peer_id, seen = entry.get("peer_id"), entry.get("seen")
            if not isinstance(peer_id, str) or not isinstance(seen, int | float) or not now - MAX_AGE_S <= seen <= now + MOST_AHEAD_S:
                continue
            if found := _addresses(peer_id, addrs[:MAX_ADDRS]):
                self._add(found, min(float(seen), now), entry.get("dialled") is True)

    def _add(self, found: list[PeerAddress], seen: float, dialled: bool) -> None:
        peer_id, ip = found[0].peer_id, ip_of(found[0].addr)
        source = source_of(None if ip is None else str(ip))
        known = self._peers.get(peer_id)
        addrs = [address.addr for address in found]
        if known is not None:
            if dialled == known.dialled or not dialled:
                addrs += known.addrs
            dialled, seen = dialled or known.dialled, max(seen, known.seen)
        new = _Known(tuple(dict.fromkeys(addrs))[:MAX_ADDRS], seen, dialled, source)
        if known is None and not self._make_room(new):
            return
        if known is None or replace(known, seen=seen) != new:
            self.version += 1
        self._peers[peer_id] = new

    def _make_room(self, new: _Known) -> bool:
        """Whether there is room for one more, or who gives way to it."""
        sources = Counter(known.source for known in self._peers.values())
        if sources[new.source] >= MAX_PER_SOURCE:
            candidates = [peer_id for peer_id, known in self._peers.items() if known.source == new.source]
        else:
            callers = [peer_id for peer_id, known in self._peers.items() if not known.dialled]
            if not new.dialled and len(callers) >= MAX_PEERS // 2:
                candidates = callers
            elif len(self._peers) < MAX_PEERS:
                return True
            else:
                candidates = callers or list(self._peers)
        if not new.dialled:
            candidates = [peer_id for peer_id in candidates if not self._peers[peer_id].dialled]
        if not candidates:
            return False
        del self._peers[min(candidates, key=lambda peer_id: self._peers[peer_id].seen)]
        return True


def _addresses(peer_id: str, addrs: Iterable[object]) -> list[PeerAddress]:
    """Those of the addresses that can be dialled and name an IP address or a relay."""
    found = []
    for addr in addrs:
        if isinstance(addr, str) and len(addr) <= 300:
            try:
                found.append(parse_peer(f"{addr}/p2p/{peer_id}"))
            except UsageError:
                continue
    return found
