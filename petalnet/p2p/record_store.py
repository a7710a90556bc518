"""The server records that this node keeps for the swarm. Pure: no I/O, `now` is passed in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from petalnet.errors import BusyError, RecordRejected
from petalnet.p2p.signed import open_signed
from petalnet.routing.records import ServerRecord

MAX_PEERS = 10_000
"""Records of 4 KB at most: 40 MB."""
MAX_KEYS = 64
"""Keys under which one peer's record is kept."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One record: its signed bytes, who it speaks of, its sequence number, when it expires (unix s), and its keys."""

    data: bytes
    peer_id: str
    sequence: int
    expires: float
    keys: frozenset[bytes]


def read_kept(data: bytes, keys: Iterable[bytes], *, now: float) -> Kept:
    """A record to keep, with signature, ranges and times checked. Raises RecordRejected."""
    signer, payload = open_signed(data)
    record = ServerRecord.decode(payload)
    record.check(signer=signer, now=now)
    return Kept(data, signer, record.sequence, record.expires, frozenset(keys))


class RecordStore:
    """Records by key: many a key, one a peer. A newer record of a peer replaces its older one under all its keys."""

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._by_peer: dict[str, Kept] = {}
        self._by_key: defaultdict[bytes, dict[str, None]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._by_peer)

    def add(self, kept: Kept, *, now: float) -> bool:
        """Keep a record; False where one as new or newer is there already (which then also answers for the keys given here).

        Raises:
            RecordRejected: too many keys.
            BusyError: there is no room for another peer's record.
        """
        before = self._by_peer.get(kept.peer_id)
        if before is not None and before.expires > now and before.sequence > kept.sequence:
            return False
        if before is not None and before.sequence == kept.sequence:
            kept = Kept(before.data, before.peer_id, before.sequence, before.expires, before.keys | kept.keys)
        if len(kept.keys) > MAX_KEYS:
            raise RecordRejected(f"a record under {len(kept.keys)} keys; {MAX_KEYS} are allowed")
        if before is None and len(self._by_peer) >= self._max_peers:
            self.expire(now)
            if len(self._by_peer) >= self._max_peers:
                raise BusyError("this node keeps as many records as it can", retry_after_s=60)
        self.remove(kept.peer_id)
        self._by_peer[kept.peer_id] = kept
        for key in kept.keys:
            self._by_key[key][kept.peer_id] = None
        return before is None or before.sequence < kept.sequence

    def find(self, key: bytes, *, now: float) -> list[Kept]:
        """The records under a key that have not expired."""
        return [kept for peer_id in self._by_key.get(key, ()) if (kept := self._by_peer[peer_id]).expires > now]

    def remove(self, peer_id: str) -> None:
        """Forget a peer's record."""
        kept = self._by_peer.pop(peer_id, None)
        if kept is None:
            return
        for key in kept.keys:
            peers = self._by_key[key]
            del peers[peer_id]
            if not peers:
                del self._by_key[key]

    def expire(self, now: float) -> None:
        """Forget what has expired."""
        for peer_id in [peer_id for peer_id, kept in self._by_peer.items() if kept.expires <= now]:
            self.remove(peer_id)
