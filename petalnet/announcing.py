"""What a server says about itself, and when: at a steady beat, at once when its state changes, and soon when its load does."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import trio

from petalnet.errors import PetalnetError, RecordRejected
from petalnet.routing.pace import BEAT_S, LEFT_LIFETIME_S, LIFETIME_BEATS
from petalnet.routing.records import MAX_ADDRS, MAX_ROUND_TRIPS, ServerRecord, next_sequence
from petalnet.routing.swarm import SwarmView
from petalnet.version import __version__

logger = logging.getLogger(__name__)

LIFETIME_S = LIFETIME_BEATS * BEAT_S
"""Seconds for which a record is valid in a swarm of ordinary size."""
LOAD_CHECK_S = 1.0
LOAD_GAP_S = 3.0
"""Shortest time between two announcements that only tell of load."""
RATES_OVER_S = 20.0
"""Seconds of computing over which rates are averaged."""
NEW_RATE, URGENT_RATE = 1.1, 1.4
"""By how many times a rate has to differ from what was told to be told anew at the next beat, and to be told at once."""
RATE_GAP_S = 10.0
"""Shortest time between two announcements that only tell of rates."""


RATE_FIELDS = ("decode_tokens_s", "prefill_tokens_s", "forward_tokens_s")


class Swarm(Protocol):
    """Where announcements go and where the other servers are known from (a `Peering`)."""

    view: SwarmView

    @property
    def beat_s(self) -> float: ...

    async def announce(self, record: ServerRecord) -> int: ...


@dataclass(frozen=True)
class Load:
    """What changes from second to second."""

    free_kv_tokens: int
    queue: int

    def differs(self, other: Load, capacity: int) -> bool:
        """Whether others would decide differently: a tenth of the KV capacity more or less, or a queue twice or half as long."""
        if abs(self.free_kv_tokens - other.free_kv_tokens) * 10 > capacity:
            return True
        return max(self.queue, other.queue) > 2 * min(self.queue, other.queue) + 1


class Rates:
    """Rates as they turn out in real work, smoothed: what a server can do for one who is alone there, whatever waits. How much that is
    says the queue, which is announced beside them. Pure."""

    def __init__(self) -> None:
        self._smooth: dict[str, float] = {}
        self._seen: dict[str, tuple[float, float]] = {}

    def note(self, done: Mapping[str, tuple[float, float]], told: Mapping[str, float]) -> None:
        """Account for what was done since the last time.

        Args:
            done: tokens so far and the seconds that they took, by the record's field.
            told: rates from which the first of it begins.
        """
        for name, (tokens, seconds) in done.items():
            tokens_before, seconds_before = self._seen.get(name, (0.0, 0.0))
            self._seen[name] = tokens, seconds
            new_tokens, new_s = tokens - tokens_before, seconds - seconds_before
            if new_tokens <= 0 or new_s <= 0:
                continue
            before = self._smooth.get(name) or told.get(name) or new_tokens / new_s
            share = 1 - math.exp(-new_s / RATES_OVER_S)
            # The average of times, not of rates: what took ten times as long for a moment counts as that.
            self._smooth[name] = 1 / ((1 - share) / before + share * new_s / new_tokens)

    def differing(self, told: Mapping[str, float], times: float) -> dict[str, float]:
        """Those that differ by so many times from what was told."""
        return {
            name: float(f"{rate:.3g}")
            for name, rate in self._smooth.items()
            if not (told.get(name, 0.0) / times < rate < told.get(name, 0.0) * times)
        }


def _fitting(record: ServerRecord) -> ServerRecord:
    """The record, without what it can do without where it would be too long: its links, then the digests of a hundred blocks and more."""
    shorter = record
    for expendable in ("next_bytes_s", "next_round_trips", "block_digests"):
        try:
            shorter.encode()
        except RecordRejected as error:
            logger.debug("%s; leaving out %s", error, expendable)
            shorter = replace(shorter, **{expendable: ()})  # type: ignore[arg-type]
    return shorter


@dataclass
class Announcer:
    """Keeps one server's record in the swarm true.

    Attributes:
        record: what is announced; its state, times, load and round trips are filled in at each announcement.
        load: gives the present load.
        round_trip_s: seconds to a peer, None where it is not known.
        addrs: gives the multiaddrs at which the server is reached, without its peer id; without it, the record's stay as they are.
        done: gives the work that was done (see `Rates.note`); without it, the record's rates stay as they are.
        bytes_s: bytes a second that the link to a peer was seen to carry, None where it is not known.
    """

    swarm: Swarm
    record: ServerRecord
    load: Callable[[], Load]
    round_trip_s: Callable[[str], float | None]
    addrs: Callable[[], Sequence[str]] | None = None
    done: Callable[[], Mapping[str, tuple[float, float]]] | None = None
    bytes_s: Callable[[str], float | None] | None = None
    _rates: Rates = field(default_factory=Rates, init=False)
    _told: Load = field(default=Load(0, 0), init=False)
    _told_at: float = field(default=0.0, init=False)
    _alone: bool = field(default=False, init=False)  # whether nobody else has taken the last announcement in, as on a busy machine

    def change(self, **fields: Any) -> None:
        """Change these fields of the record; told with the next announcement."""
        if not fields.keys().isdisjoint(RATE_FIELDS):
            self._rates = Rates()  # of other blocks, or measured anew
        self.record = replace(self.record, **fields)

    async def tell(self) -> int:
        """Announce now; returns on how many peers the record is stored."""
        now = time.time()
        self._told = self.load()
        self._told_at = trio.current_time()
        next_round_trips = self._next_round_trips(now)
        rates: dict[str, Any] = dict(self._rates.differing(self._rates_told(), NEW_RATE))
        self.record = replace(
            self.record,
            addrs=self._addrs_now(),
            free_kv_tokens=self._told.free_kv_tokens,
            queue=self._told.queue,
            **rates,
            next_round_trips=next_round_trips,
            next_bytes_s=self._next_bytes_s(next_round_trips),
            version=__version__,
            sequence=next_sequence(self.record.sequence, now),
            issued=now,
            expires=now + (LEFT_LIFETIME_S if self.record.state == "left" else LIFETIME_BEATS * self.swarm.beat_s),
        )
        stored = await self.swarm.announce(_fitting(self.record))
        self._alone = stored <= 1
        return stored

    async def run(self) -> None:
        """Announce at every beat, and when the load, the addresses or the speed have changed, until cancelled."""
        capacity = 1
        while True:
            await trio.sleep(LOAD_CHECK_S)
            load = self.load()
            capacity = max(capacity, load.free_kv_tokens)
            since = trio.current_time() - self._told_at
            moved = self._addrs_now() != self.record.addrs
            if self.done is not None:
                self._rates.note(self.done(), self._rates_told())
            news = load.differs(self._told, capacity) or self._alone
            is_other = since >= RATE_GAP_S and bool(self._rates.differing(self._rates_told(), URGENT_RATE))
            # By both clocks: while a machine sleeps, one of them stands, and its record expires.
            is_due = since >= self.swarm.beat_s or not 0 <= time.time() - self.record.issued < self.swarm.beat_s + LOAD_CHECK_S
            if moved or is_due or is_other or (since >= LOAD_GAP_S and news):
                try:
                    await self.tell()
                except PetalnetError as error:
                    logger.warning("the swarm could not be told (%s); trying again at the next beat", error)

    def _rates_told(self) -> dict[str, float]:
        return {name: getattr(self.record, name) for name in RATE_FIELDS}

    def _addrs_now(self) -> tuple[str, ...]:
        return self.record.addrs if self.addrs is None else tuple(self.addrs())[:MAX_ADDRS]

    def _next_round_trips(self, now: float) -> tuple[tuple[str, float], ...]:
        """Round trips to servers that hold the block after our last one, the quickest first."""
        end = self.record.span[1]
        others = self.swarm.view.servers(self.record.model, now=now)
        measured = [
            (seconds, other.peer_id)
            for other in others
            if other.holds(end) and other.peer_id != self.record.peer_id and (seconds := self.round_trip_s(other.peer_id)) is not None
        ]
        return tuple((peer_id, seconds) for seconds, peer_id in sorted(measured)[:MAX_ROUND_TRIPS])

    def _next_bytes_s(self, round_trips: Sequence[tuple[str, float]]) -> tuple[float, ...]:
        """What the links to these servers were seen to carry, to two digits; nothing where none of them has had enough to carry yet."""
        if self.bytes_s is None:
            return ()
        rates = tuple(float(f"{self.bytes_s(peer_id) or 0.0:.2g}") for peer_id, _ in round_trips)
        return rates if any(rates) else ()
