"""The keeping side of the records protocol: what a node answers to those who store records on it and look for some.

`RecordKeeper` decides (pure: requests and `now` in, answers out). `RecordService` gives it streams, and shares those fairly: where
nearly all are taken, one that waits for its next request is closed, of the source that has the most. An honest peer opens another one
when it needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import trio

from petalnet.errors import BusyError, PetalnetError, ProtocolError, RecordRejected, UnsupportedError
from petalnet.p2p.fields import Message
from petalnet.p2p.messages import Error, Find, Records, Store, Stored
from petalnet.p2p.protocols import RECORDS, Limits
from petalnet.p2p.rates import Rates
from petalnet.p2p.record_store import RecordStore, read_kept
from petalnet.p2p.streams import Stream
from petalnet.routing.records import RecordForged

MAX_ANSWER_RECORDS = 256
"""Records in one answer: enough for many routes through any model. Ten storers draw theirs apart, so a reader gets more."""
MAX_ANSWER_BYTES = 512 * 1024
"""Bytes in one answer; less than the frame of the protocol holds, for it is made, sent and read in one piece."""
MAX_KEYS = 2
"""Keys in one request to store: a record has no more."""

SHORT_ANSWER_RECORDS = 16
"""Records in an answer while more than that is asked for; those who asked for much lately get none, so the others get that at least."""

STREAMS_SHARED_FROM = 3 * RECORDS.max_streams // 4
"""Streams from which on one that waits gives way to a new one, so that the last quarter is never taken for long."""


class RecordKeeper:
    """What one node keeps for others and tells them.

    Args:
        store: the records.
        on_record: is given the signed bytes of each record that is news, and of whom it speaks.
        limits: what others may take.
    """

    def __init__(self, store: RecordStore, *, on_record: Callable[[bytes], object], limits: Limits) -> None:
        self.store = store
        self._on_record = on_record
        self._source_requests = Rates(*limits.record_requests_per_source)
        self._peer_bytes, self._source_bytes = Rates(*limits.record_bytes_per_peer), Rates(*limits.record_bytes_per_source)
        self._all_bytes = Rates(*limits.record_bytes)

    def answer(self, request: Message, *, peer_id: str, source: str, now: float) -> Message:
        """The answer to a request of a peer that comes from a source; `now` is in unix seconds.

        Raises:
            BusyError: the peer, or its source, asks more than its share.
            RecordRejected: a record does not hold.
            ProtocolError: a request that no honest peer makes.
            UnsupportedError: it is none of this protocol's.
        """
        wait = self._source_requests.wait(source, now)
        if wait > 0:
            raise BusyError("too many requests for records from one place", retry_after_s=wait)
        self._source_requests.charge(source, now, 1)
        if isinstance(request, Find):
            return self._find(request, peer_id, source, now)
        if isinstance(request, Store):
            return self._store(request, peer_id, source, now)
        raise UnsupportedError(f"{RECORDS.id} takes store and find")

    def _find(self, request: Find, peer_id: str, source: str, now: float) -> Records:
        # Who owes nothing is served; how much it was is known only then.
        wait = max(self._peer_bytes.wait(peer_id, now, 0), self._source_bytes.wait(source, now, 0))
        most = MAX_ANSWER_RECORDS
        if self._all_bytes.wait("", now, 0) > 0:
            most = SHORT_ANSWER_RECORDS
            wait = max(wait, self._source_bytes.wait(source, now, 0.75 * self._source_bytes.burst))
        if wait > 0:
            raise BusyError("too many records were asked for", retry_after_s=wait)
        records: list[bytes] = []
        ages: list[float] = []
        size = 64
        count = self.store.count(request.key)
        complete = count <= most
        for kept in self.store.find(request.key, now=now, most=most):
            if size + len(kept.data) + 16 > MAX_ANSWER_BYTES:
                complete = False
                break
            size += len(kept.data) + 16
            records.append(kept.data)
            ages.append(max(now - kept.received, 0.0))
        for bucket, name in ((self._peer_bytes, peer_id), (self._source_bytes, source), (self._all_bytes, "")):
            bucket.charge(name, now, size)
        return Records(tuple(records), tuple(ages), len(records) if complete else count)

    def _store(self, request: Store, peer_id: str, source: str, now: float) -> Stored:
        if not 1 <= len(request.keys) <= MAX_KEYS or any(len(key) != 32 for key in request.keys):
            raise ProtocolError(f"a record is stored under 1 to {MAX_KEYS} keys of 32 bytes")
        kept = read_kept(request.record, request.keys, now=now, source=source)
        if kept.peer_id != peer_id:
            raise RecordForged(f"peer {peer_id} may not store a record of {kept.peer_id}")
        if self.store.add(kept, now=now):
            self._on_record(kept.data)
        return Stored(newest=self.store.newest(peer_id), counts=tuple(map(self.store.count, request.keys)))


@dataclass(eq=False)
class _Served:
    """A stream that is served: from where, and while it waits for its next request, since when and how to end that."""

    source: str
    waiting_since: float = 0.0
    scope: trio.CancelScope | None = None


class RecordService:
    """Serves the records protocol on a node.

    Args:
        keeper: what is answered.
        source: where a peer comes from.
        clock: unix seconds.
        on_offence: is told of a peer that does what no honest one does, and what that was.
    """

    def __init__(
        self, keeper: RecordKeeper, *, source: Callable[[str], str], clock: Callable[[], float], on_offence: Callable[[str, str], None]
    ) -> None:
        self._keeper = keeper
        self._source = source
        self._clock = clock
        self._on_offence = on_offence
        self._served: set[_Served] = set()

    async def serve(self, stream: Stream) -> None:
        """Answer the requests on one stream until it ends."""
        served = _Served(self._source(stream.peer_id))
        if len(self._served) >= STREAMS_SHARED_FROM:
            self._close_one()
        self._served.add(served)
        try:
            while (request := await self._next(stream, served)) is not None:
                await stream.send(self._answer(request, stream.peer_id, served.source))
        finally:
            self._served.discard(served)

    async def _next(self, stream: Stream, served: _Served) -> Message | None:
        """The next request; None where the stream has ended, or is to end because it has waited long enough."""
        request: Message | None = None
        served.waiting_since = trio.current_time()
        with trio.CancelScope() as served.scope:
            request = await stream.receive()
        served.scope = None
        return request

    def _answer(self, request: Message, peer_id: str, source: str) -> Message:
        try:
            return self._keeper.answer(request, peer_id=peer_id, source=source, now=self._clock())
        except (RecordRejected, ProtocolError) as error:
            if isinstance(error, RecordForged):
                self._on_offence(peer_id, str(error))
            return Error("caller", str(error)[:1000])
        except PetalnetError as error:
            return Error.of(error)

    def _close_one(self) -> None:
        """End a stream that waits for a request: the one that waits longest, of the source that has the most."""
        waiting = [served for served in self._served if served.scope is not None]
        if waiting:
            counts = Counter(served.source for served in waiting)
            crowd = max(counts.values())
            longest = min(waiting, key=lambda served: (counts[served.source] < crowd, served.waiting_since))
            if longest.scope is not None:
                longest.scope.cancel()
