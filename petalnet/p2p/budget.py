"""The memory that peers may make this node hold: windows of streams in use, and long messages that are under way or being worked on."""

from __future__ import annotations

from collections import Counter

import psutil
import trio

from petalnet.p2p.protocols import Limits

MEMORY_SHARE = 4
"""One part in so many of the machine's memory is the most that all peers together may take, where that is less than the table says."""
CALLERS_SHARE = 0.75
"""Of that, what all peers at one address may take: identities cost nothing, and the others go on with the rest."""


class Budget:
    """Bytes held for each peer, for all at one address (`transport.caller_of`; None: it does not count), and for all of them.

    Attributes:
        held: bytes that are taken now.
    """

    def __init__(self, limits: Limits, *, memory: int | None = None) -> None:
        """`memory` is that of the machine in bytes; None: as it is."""
        total = psutil.virtual_memory().total if memory is None else memory
        self._max_held = min(limits.max_held, total // MEMORY_SHARE)
        self._max_per_peer = min(limits.max_held_per_peer, self._max_held)
        self._max_per_caller = int(CALLERS_SHARE * self._max_held)
        self._by_peer: Counter[str] = Counter()
        self._by_caller: Counter[str] = Counter()
        self._given_back = trio.lowlevel.ParkingLot()
        self.held = 0

    def take(self, peer_id: str, size: int, caller: str | None = None) -> bool:
        """Take `size` bytes for a peer; nothing and False where it, all at its address, or all peers together would hold too much."""
        if self._by_peer[peer_id] + size > self._max_per_peer or self.held + size > self._max_held:
            return False
        if caller is not None:
            if self._by_caller[caller] + size > self._max_per_caller:
                return False
            self._by_caller[caller] += size
        self._by_peer[peer_id] += size
        self.held += size
        return True

    async def take_when_free(self, peer_id: str, size: int, caller: str | None = None) -> None:
        """Take `size` bytes for a peer once they are there; the caller sets a deadline."""
        while not self.take(peer_id, size, caller):
            await self._given_back.park()

    def give_back(self, peer_id: str, size: int, caller: str | None = None) -> None:
        """Give back what was taken."""
        self.held -= size
        self._by_peer[peer_id] -= size
        if not self._by_peer[peer_id]:
            del self._by_peer[peer_id]
        if caller is not None:
            self._by_caller[caller] -= size
            if not self._by_caller[caller]:
                del self._by_caller[caller]
        self._given_back.unpark_all()
