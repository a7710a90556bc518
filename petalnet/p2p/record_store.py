"""The server records that this node keeps for the swarm. Pure: no I/O, `now` (unix seconds by our clock) is passed in.

A store is worth as much as it is hard to crowd out. Peer ids cost nothing, so room is shared among sources (see `sources`): where there
is none left, a record of the source that holds the most gives way, and of those one that is far from us and not long known. A newcomer
from elsewhere always finds room, and a flood from one place replaces only what came from there. Answers are drawn in the same way: a
fair share for each source.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from petalnet.errors import RecordRejected
from petalnet.p2p.places import key_place, peer_place, shared_bits
from petalnet.p2p.protocols import Limits
from petalnet.p2p.signed import open_signed
from petalnet.routing.records import ServerRecord
from petalnet.routing.sequences import Sequences

SET_BACK_S = 1.0
"""Seconds by which what was received lies in the future, from which on the clock was set back since."""
REMEMBERED = 4
"""Times as many sequence numbers as records are kept, of records that are kept or were: 200 bytes each."""
_SAMPLE = 32
"""Records among which the one that gives way is chosen. A source that holds a tenth of the store is missed once in 30 times."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kept:
    """One record.

    Attributes:
        data: its signed bytes.
        peer_id: the server that it speaks of.
        sequence: its number.
        received: when it left its author, unix seconds by our clock.
        expires: until when it is valid, by our clock.
        keys: the keys under which it is kept.
        source: where its author stored it from.
        left: whether it says that its server has left.
    """

    data: bytes
    peer_id: str
    sequence: int
    received: float
    expires: float
    keys: frozenset[bytes]
    source: str = ""
    left: bool = False


def read_kept(data: bytes, keys: Iterable[bytes], *, now: float, age: float = 0.0, source: str = "") -> Kept:
    """A record to keep, with signature, ranges, times and keys checked; it may have expired, if it left its author `age` seconds ago.

    Raises:
        RecordRejected: the record does not hold, or does not belong under one of the keys.
    """
    signer, payload = open_signed(data)
    record = ServerRecord.decode(payload)
    record.check(signer=signer, now=now)
    wanted = frozenset(keys)
    if not wanted.issubset(record.keys):
        raise RecordRejected(f"a record of {signer} does not belong under the key")
    record = record.received(now, age)
    return Kept(data, signer, record.sequence, record.issued, record.expires, wanted, source, record.state == "left")


@dataclass(slots=True)
class _Entry:
    kept: Kept
    since: float
    """When the peer's first record came, of those that followed one another without a gap."""
    nearness: int
    """Leading bits that the nearest of its keys has in common with this node's place."""
    lost: bool = False
    """Its author was found to be gone, before the record says so."""


class RecordStore:
    """Records by key: many a key, one a peer. A newer record of a peer replaces its older one under all its keys.

    Args:
        own: this node's peer id, whose record never gives way.
        max_peers: records that there is room for.
        rng: chooses the samples.
    """

    def __init__(self, own: str = "", max_peers: int = Limits.max_records, *, rng: random.Random | None = None) -> None:
        self._own = own
        self._place = peer_place(own) if own else 0
        self._max_peers = max_peers
        self._random = rng or random.Random()
        self._entries: dict[str, _Entry] = {}
        self._all: _Members[str] = _Members()
        self._sources: defaultdict[str, _Members[str]] = defaultdict(_Members)
        self._present, self._left = _Index(), _Index()
        self._sequences = Sequences(REMEMBERED * max_peers)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, kept: Kept, *, now: float) -> bool:
        """Keep a record, and say whether it was news.

        It is not where one as new or newer is or was there; one that is as new is kept under these keys as well.
        """
        entry = self._entries.get(kept.peer_id)
        if entry is not None and entry.kept.sequence == kept.sequence:
            if not kept.keys <= entry.kept.keys:
                self._replace(entry, replace(entry.kept, keys=entry.kept.keys | kept.keys))
            entry.lost = False
            return False
        if kept.expires <= now or not self._sequences.note(kept.peer_id, kept.sequence, now):
            return False
        if entry is not None:
            if entry.kept.expires <= now:
                entry.since = now
            entry.lost = False
            self._replace(entry, kept)
        else:
            if len(self._entries) >= self._max_peers:
                self.expire(now)
            if len(self._entries) >= self._max_peers:
                self.remove(self._give_way(kept))
            nearness = max((shared_bits(self._place, key_place(key)) for key in kept.keys), default=0)
            self._entries[kept.peer_id] = _Entry(kept, now, nearness)
            self._link(kept)
        return True

    def get(self, peer_id: str, *, now: float) -> Kept | None:
        """A peer's record, if it has not expired."""
        entry = self._entries.get(peer_id)
        return entry.kept if entry is not None and entry.kept.expires > now else None

    def find(self, key: bytes, *, now: float, most: int | None = None) -> list[Kept]:
        """The records under a key that have not expired and whose authors are not known to be gone.

        Args:
            most: where there are more, this many are drawn, as evenly from all sources as there are records of them; those that say that
                their servers have left only where there is room.
        """
        drawn = self._present.draw(key, most, self._random)
        drawn += self._left.draw(key, None if most is None else most - len(drawn), self._random)
        entries = [self._entries[peer_id] for peer_id in drawn]
        return [entry.kept for entry in entries if entry.kept.expires > now and not entry.lost]

    def count(self, key: bytes) -> int:
        """Records that are kept under a key, without those that say that their servers have left."""
        return self._present.count(key)

    def newest(self, peer_id: str) -> int:
        """The highest sequence number that is remembered of a peer, 0 where there is none."""
        return self._sequences.newest(peer_id)

    def mark_lost(self, peer_id: str) -> None:
        """A peer is gone: its record is given to nobody until it stores it again (a copy of it is not news then either)."""
        entry = self._entries.get(peer_id)
        if entry is not None and peer_id != self._own:
            entry.lost = True

    def remove(self, peer_id: str) -> None:
        """Drop a peer's record; its number is remembered."""
        entry = self._entries.pop(peer_id, None)
        if entry is not None:
            self._unlink(entry.kept)

    def expire(self, now: float) -> None:
        """Drop what has expired."""
        for entry in self._entries.values():
            if entry.kept.received > now + SET_BACK_S:  # our clock was set back: from now on it is as old as it can be seen to be
                self._replace(entry, replace(entry.kept, received=now, expires=now + entry.kept.expires - entry.kept.received))
        for peer_id in [peer_id for peer_id, entry in self._entries.items() if entry.kept.expires <= now]:
            self.remove(peer_id)
        self._sequences.expire(now)

    def _give_way(self, newcomer: Kept) -> str:
        """Whose record makes room for a newcomer's: of the most crowded source, far from us, not long known."""
        sample = [peer_id for peer_id in self._all.sample(_SAMPLE, self._random) if peer_id != self._own] or [self._all.any(self._own)]
        crowd = max(len(self._sources[self._entries[peer_id].kept.source]) for peer_id in sample)
        candidates = [peer_id for peer_id in sample if len(self._sources[self._entries[peer_id].kept.source]) == crowd]
        own_crowd = self._sources.get(newcomer.source)
        if own_crowd is not None and len(own_crowd) >= crowd:
            # The newcomer adds to the crowd itself: it takes the place of one of its own.
            candidates = [peer_id for peer_id in own_crowd.sample(_SAMPLE, self._random) if peer_id != self._own] or candidates
        farthest = min(self._entries[peer_id].nearness for peer_id in candidates)
        candidates = [peer_id for peer_id in candidates if self._entries[peer_id].nearness == farthest]
        candidates.sort(key=lambda peer_id: self._entries[peer_id].since)
        return self._random.choice(candidates[3 * len(candidates) // 4 :])  # those that are longer known stay

    def _replace(self, entry: _Entry, kept: Kept) -> None:
        self._unlink(entry.kept)
        entry.kept = kept
        self._link(kept)

    def _link(self, kept: Kept) -> None:
        self._all.add(kept.peer_id)
        self._sources[kept.source].add(kept.peer_id)
        (self._left if kept.left else self._present).add(kept)

    def _unlink(self, kept: Kept) -> None:
        self._all.discard(kept.peer_id)
        _discard(self._sources, kept.source, kept.peer_id)
        (self._left if kept.left else self._present).discard(kept)


class _Index:
    """Which peers' records are under which keys, by source."""

    def __init__(self) -> None:
        self._keys: defaultdict[bytes, defaultdict[str, _Members[str]]] = defaultdict(lambda: defaultdict(_Members))
        self._counts: defaultdict[bytes, int] = defaultdict(int)

    def count(self, key: bytes) -> int:
        return self._counts.get(key, 0)

    def add(self, kept: Kept) -> None:
        for key in kept.keys:
            self._keys[key][kept.source].add(kept.peer_id)
            self._counts[key] += 1

    def discard(self, kept: Kept) -> None:
        for key in kept.keys:
            _discard(self._keys[key], kept.source, kept.peer_id)
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._keys[key], self._counts[key]

    def draw(self, key: bytes, most: int | None, rng: random.Random) -> list[str]:
        """At most `most` peers: the same share of each source, and what the small ones leave goes to the large."""
        groups = list(self._keys.get(key, {}).values())
        room = self.count(key) if most is None else most
        if len(groups) > room:
            groups = rng.sample(groups, room)
        groups.sort(key=len)
        drawn: list[str] = []
        for index, group in enumerate(groups):
            share = min(len(group), -(-room // (len(groups) - index)))
            room -= share
            drawn += group.sample(share, rng)
        return drawn


class _Members(Generic[T]):
    """A set from which a sample can be drawn without looking at all of it."""

    __slots__ = ("_items", "_places")

    def __init__(self) -> None:
        self._items: list[T] = []
        self._places: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T) -> None:
        if item not in self._places:
            self._places[item] = len(self._items)
            self._items.append(item)

    def discard(self, item: T) -> None:
        place = self._places.pop(item, None)
        if place is None:
            return
        last = self._items.pop()
        if place < len(self._items):
            self._items[place] = last
            self._places[last] = place

    def sample(self, most: int, rng: random.Random) -> list[T]:
        return list(self._items) if most >= len(self._items) else rng.sample(self._items, most)

    def any(self, otherwise: T) -> T:
        return self._items[0] if self._items else otherwise


K = TypeVar("K")


def _discard(groups: defaultdict[K, _Members[str]], name: K, peer_id: str) -> None:
    group = groups[name]
    group.discard(peer_id)
    if not len(group):
        del groups[name]
