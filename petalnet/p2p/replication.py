"""On whom a record is stored, whom a look-up asks, and what it makes of the answers. Pure: no I/O, `now` is passed in.

The records of a key belong on the `REPLICAS` nearest peers that can be asked. Author and reader find them in the
same way, each from what it knows, so they meet on most of them however little they know: with half of the ten in common, five may fail.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low

from petalnet.errors import RecordRejected
from petalnet.p2p.places import key_place, peer_place
from petalnet.p2p.record_store import Kept, read_kept
from petalnet.p2p.signed import open_signed
from petalnet.routing.records import CLOCK_TOLERANCE, RecordForged, RecordOutOfTime

logger = logging.getLogger(__name__)

REPLICAS = 10
"""Peers on which a record is stored under each key. Half of them may vanish between two renewals and it is still found."""
MAX_PER_NETWORK = 4
"""Of them, from one public network: who rents a rack there has not bought the key. Addresses that are not public do not count."""
ANSWERS_FOR_ONE = 3
"""Storers of which one at least has to know of a server: three of ten. Author and reader have seven or more in common as a rule."""
MOST = 0.7
"""Share of those that were asked whose answers do for a look-up; the others get as much time again as these took."""
LOOK_UP_EVERY_S = 60.0
"""Seconds for which the peers that a look-up found near a key are gone back to without another one."""
MAX_LOOK_UPS = 256
"""Keys whose look-ups are remembered; a client follows a few models, a node that writes an overview one key."""


def nearest(key: bytes, peers: Iterable[str], count: int, *, network: Callable[[str], str] = lambda _: "") -> list[str]:
    """The peers nearest to a key, the nearest first, of one public network at most `MAX_PER_NETWORK`.

    Args:
        network: the public network that a peer is in; "" where it is not known or not public, which is not counted.
    """
    place = key_place(key)
    chosen: list[str] = []
    counts: dict[str, int] = {}
    for peer_id in sorted(set(peers), key=lambda peer_id: peer_place(peer_id) ^ place):
        if len(chosen) >= count:
            break
        name = network(peer_id)
        if name:
            counts[name] = counts.get(name, 0) + 1
            if counts[name] > MAX_PER_NETWORK:
                continue
        chosen.append(peer_id)
    return chosen


class Round:
    """One round of asking the peers nearest to a key, among candidates that may still turn up while it goes on.

    Those that matter are always the nearest `REPLICAS` of those that have not failed: a failure moves the wish outward, a nearer
    candidate inward. `next` gives those that were not asked yet.

    Args:
        key: what it is about.
        count: how many of those that matter are asked; fewer than all are drawn by chance, so that nobody is asked every time.
        network: see `nearest`.
        rng: draws.
    """

    def __init__(
        self, key: bytes, count: int = REPLICAS, *, network: Callable[[str], str] = lambda _: "", rng: random.Random | None = None
    ) -> None:
        self._key = key
        self._count = count
        self._network = network
        self._random = rng or random.Random()
        self._candidates: set[str] = set()
        self._asked: set[str] = set()
        self._failed: set[str] = set()

    def offer(self, peers: Iterable[str]) -> None:
        """More candidates."""
        self._candidates.update(peers)

    def next(self) -> list[str]:
        """Whom to ask now."""
        wanted = nearest(self._key, self._candidates - self._failed, REPLICAS, network=self._network)
        new = [peer_id for peer_id in wanted if peer_id not in self._asked]
        if self._count < REPLICAS:
            missing = max(self._count - len(self._asked - self._failed), 0)
            new = self._random.sample(new, min(missing, len(new)))
        self._asked.update(new)
        return new

    def failed(self, peer_id: str) -> None:
        """A peer did not do what it was asked: the next nearest takes its place."""
        self._failed.add(peer_id)


class Asking:
    """One round for several keys at once: a peer that is near to more than one of them is asked once, with all of those.

    Args:
        keys: what it is about.
        count, network, rng: as for `Round`.
    """

    def __init__(
        self,
        keys: Iterable[bytes],
        count: int = REPLICAS,
        *,
        network: Callable[[str], str] = lambda _: "",
        rng: random.Random | None = None,
    ) -> None:
        self._rounds = {key: Round(key, count, network=network, rng=rng) for key in keys}

    def offer(self, key: bytes, peers: Iterable[str]) -> None:
        """More candidates for a key."""
        self._rounds[key].offer(peers)

    def next(self) -> dict[str, list[bytes]]:
        """Whom to ask now, and with which keys."""
        wanted: dict[str, list[bytes]] = {}
        for key, turn in self._rounds.items():
            for peer_id in turn.next():
                wanted.setdefault(peer_id, []).append(key)
        return wanted

    def failed(self, peer_id: str, keys: Iterable[bytes]) -> None:
        """A peer did not do what it was asked with these keys."""
        for key in keys:
            self._rounds[key].failed(peer_id)


def may_end(wanted: int, answered: int) -> bool:
    """Whether so many answers do, of those that were asked and have not failed: what the rest would say was mostly said by then."""
    return answered >= max(MOST * wanted, 2)


class Announcement:
    """What keepers answer to those that announce one record.

    Args:
        kept: the record.
        counts: how many records this node itself keeps under each key.

    Attributes:
        stored: peers that keep it.
        newest: the highest sequence number of this server that any of them remembers; one of them may have lied.
    """

    def __init__(self, kept: Kept, counts: Mapping[bytes, int]) -> None:
        self.stored = {kept.peer_id}
        self.newest = 0
        self._sequence = kept.sequence
        self._counts = {key: [count] for key, count in counts.items()}

    def answer(self, peer_id: str, keys: Sequence[bytes], *, newest: int, counts: Sequence[int]) -> None:
        """One keeper's answer."""
        for key, count in zip(keys, counts, strict=False):
            self._counts[key].append(count)
        self.newest = max(self.newest, newest)
        if newest <= self._sequence:
            self.stored.add(peer_id)

    @property
    def crowds(self) -> dict[bytes, int]:
        """Records under each of the keys, as its keepers say: the median, for which most of them would have to lie."""
        return {key: median_low(told) for key, told in self._counts.items()}


class LookUps:
    """Which peers look-ups found near which keys, and when it is time for another one."""

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[float, list[str]]] = {}

    def is_due(self, key: bytes, now: float) -> bool:
        """Whether there was no look-up lately; the caller is taken to make one now."""
        then, peers = self._found.get(key, (float("-inf"), []))
        if now - then < LOOK_UP_EVERY_S:
            return False
        self._found.pop(key, None)
        self._found[key] = now, peers
        if len(self._found) > MAX_LOOK_UPS:
            del self._found[next(iter(self._found))]
        return True

    def note(self, key: bytes, peers: Sequence[str], now: float) -> None:
        """A look-up found these."""
        self._found[key] = now, list(peers)

    def peers(self, key: bytes) -> list[str]:
        """What the last look-up found."""
        return self._found.get(key, (0.0, []))[1]

    def forget(self, peer_id: str) -> None:
        """A peer is of no use any more: look-ups that named it are due again."""
        for key, (_, peers) in list(self._found.items()):
            if peer_id in peers:
                self._found[key] = float("-inf"), [other for other in peers if other != peer_id]


class Lie(Exception):
    """An answer that no honest storer gives."""


@dataclass(slots=True)
class Merge:
    """What the answers of several storers come to: of each server the newest record.

    A server's record is on most of the peers near the key, so one that few of many storers know of is left out: it is a copy of a dead
    server's that somebody hands on, or one whose keepers, but for a few, know that it is dead. Of one and the same record the youngest
    age that is told counts. Whoever tells too young a one keeps a dead server listed for the length of one record; the other way round,
    a single liar could make every server vanish.

    Args:
        key: what was asked for.
        now: unix seconds.
        most: records that one storer may answer with.

    Attributes:
        clocks: of servers whose records are left out because of their times, by how many seconds their clocks are ahead of ours.
    """

    key: bytes
    now: float
    most: int
    clocks: dict[str, float] = field(default_factory=dict)
    _own: set[str] = field(default_factory=set)
    _newest: dict[str, Kept] = field(default_factory=dict)
    _checked: dict[bytes, Kept | None] = field(default_factory=dict)
    _told: Counter[str] = field(default_factory=Counter)
    _answers: int = 0
    _samples: int = 0

    def add_own(self, kept: Kept) -> None:
        """A record that this node keeps itself: its server stored it here."""
        self._own.add(kept.peer_id)
        self._add(kept)

    def answer(self, records: Sequence[bytes], ages: Sequence[float], count: int = 0) -> None:
        """One storer's answer.

        Args:
            records, ages, count: as in the message.
        Raises:
            Lie: there is something in it that an honest storer, whatever its clock says, would not have kept. The rest of the answer is
                left out; what was good stays.
        """
        if len(records) > self.most or (ages and len(ages) != len(records)):
            raise Lie(f"an answer of {len(records)} records with {len(ages)} ages")
        self._answers += 1
        self._samples += count > len(records)
        told: set[str] = set()
        for data, age in zip(records, ages or [0.0] * len(records), strict=True):
            try:
                kept = self._read(data, age)
            except RecordForged as error:
                raise Lie(str(error)) from error
            if kept is not None:
                self._add(kept)
                told.add(kept.peer_id)
        self._told.update(told)

    def result(self) -> list[Kept]:
        """The newest record of each server, those that have expired left out."""
        # Where answers are samples, a server that few name may be in the others' rest; a single storer may say so of its answer for spite.
        needed = 0 if 2 * self._samples > self._answers else self._answers // ANSWERS_FOR_ONE
        return [
            kept
            for peer_id, kept in self._newest.items()
            if kept.expires > self.now and (self._told[peer_id] >= needed or peer_id in self._own)
        ]

    def doubt(self) -> str:
        """One line for a person whose clock is probably wrong, since most servers that were named have others; "" where it is not."""
        if len(self.clocks) <= len(self._newest):
            return ""
        ahead = median_low(self.clocks.values())
        servers = f"{len(self.clocks)} of {len(self.clocks) + len(self._newest)} servers that were found"
        how = f"{abs(ahead) / 60:.0f} min {'ahead of' if ahead > 0 else 'behind'}"
        return (
            f"this machine's clock seems to be wrong: {servers} have clocks that are about {how} it, and are left out until it is set "
            f"(up to {CLOCK_TOLERANCE / 60:.0f} min do no harm)"
        )

    def _add(self, kept: Kept) -> None:
        known = self._newest.get(kept.peer_id)
        if known is None or (known.sequence, known.received) < (kept.sequence, kept.received):
            self._newest[kept.peer_id] = kept

    def _read(self, data: bytes, age: float) -> Kept | None:
        """A record; None where our clock, or our version, does not believe what the storer's did."""
        if data not in self._checked:  # most storers answer with the same bytes; a signature is checked once
            try:
                self._checked[data] = read_kept(data, (self.key,), now=self.now)
            except RecordForged:
                raise
            except RecordOutOfTime as error:
                self._checked[data] = None
                # The storer has had it for no longer than `age`, so it is the clocks that differ.
                self.clocks[open_signed(data)[0]] = error.ahead_s + age
            except RecordRejected as error:
                logger.debug("a record was left out: %s", error)
                self._checked[data] = None
        known = self._checked[data]
        if known is None:
            return None
        lifetime = known.expires - known.received
        return replace(known, received=self.now - age, expires=self.now - age + lifetime)
