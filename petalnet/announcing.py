"""What a server says about itself, and when: at a steady beat, at once when its state changes, and soon when its load does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
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


def _fitting(record: ServerRecord) -> ServerRecord:
    """The record, without what it can do without where it would be too long: round trips, then the digests of a hundred blocks and more."""
    shorter = record
    for expendable in ("next_round_trips", "block_digests"):
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
    """

    swarm: Swarm
    record: ServerRecord
    load: Callable[[], Load]
    round_trip_s: Callable[[str], float | None]
    addrs: Callable[[], Sequence[str]] | None = None
    _told: Load = field(default=Load(0, 0), init=False)
    _told_at: float = field(default=0.0, init=False)
    _alone: bool = field(default=False, init=False)  # whether nobody else has taken the last announcement in, as on a busy machine

    def change(self, **fields: Any) -> None:
        """Change these fields of the record; told with the next announcement."""
        self.record = replace(self.record, **fields)

    async def tell(self) -> int:
        """Announce now; returns on how many peers the record is stored."""
        now = time.time()
        self._told = self.load()
        self._told_at = trio.current_time()
        self.record = replace(
            self.record,
            addrs=self._addrs_now(),
            free_kv_tokens=self._told.free_kv_tokens,
            queue=self._told.queue,
            next_round_trips=self._next_round_trips(now),
            version=__version__,
            sequence=next_sequence(self.record.sequence, now),
            issued=now,
            expires=now + (LEFT_LIFETIME_S if self.record.state == "left" else LIFETIME_BEATS * self.swarm.beat_s),
        )
        stored = await self.swarm.announce(_fitting(self.record))
        self._alone = stored <= 1
        return stored

    async def run(self) -> None:
        """Announce at every beat and when the load or the addresses have changed, until cancelled."""
        capacity = 1
        while True:
            await trio.sleep(LOAD_CHECK_S)
            load = self.load()
            capacity = max(capacity, load.free_kv_tokens)
            since = trio.current_time() - self._told_at
            moved = self._addrs_now() != self.record.addrs
            news = load.differs(self._told, capacity) or self._alone
            # By both clocks: while a machine sleeps, one of them stands, and its record expires.
            is_due = since >= self.swarm.beat_s or not 0 <= time.time() - self.record.issued < self.swarm.beat_s + LOAD_CHECK_S
            if moved or is_due or (since >= LOAD_GAP_S and news):
                try:
                    await self.tell()
                except PetalnetError as error:
                    logger.warning("the swarm could not be told (%s); trying again at the next beat", error)

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
