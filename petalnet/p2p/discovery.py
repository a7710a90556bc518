"""How servers are found: signed records, kept by the peers nearest to a key.

A server stores its record (see `routing.records`) on the peers that Kademlia's metric puts nearest to each of its keys, and renews it
before it expires; whoever looks for a key asks those peers and merges what they answer. Many records a key, one a peer, the newest
sequence wins. A peer stores only its own record, over a connection that proves who it is, so nobody fills the stores with records of
peers that do not exist. In a small swarm, where the nearest peers are all peers, everybody is asked.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import trio

from petalnet.errors import PeerUnreachable, PetalnetError, ProtocolError, RecordRejected, UnsupportedError
from petalnet.p2p.addresses import PeerAddress, parse_peer
from petalnet.p2p.host import Host
from petalnet.p2p.messages import Error, Find, Message, Records, Store, Stored
from petalnet.p2p.protocols import RECORDS
from petalnet.p2p.record_store import Kept, RecordStore, read_kept
from petalnet.p2p.routing_table import RoutingTable
from petalnet.p2p.streams import Stream

logger = logging.getLogger(__name__)

REPLICAS = 10
"""Peers on which a record is stored under each key. Half of them may vanish between two renewals and it is still found."""
QUERY_TIMEOUT_S = 1.0
"""Seconds in which a peer has to answer; one that does not is passed over for `AVOIDED_S`."""
LOOK_UP_TIMEOUT_S = 0.8
"""Seconds for Kademlia to find peers nearer to a key than those that are known; then those that are known have to do."""
LOOK_UP_FROM = 20
"""Peers in the table (a bucket's worth) below which it holds the whole swarm, so that there is nobody nearer to be found."""
AVOIDED_S = 30.0
JOIN_TIMEOUT_S = 8.0
REFRESH_TIMEOUT_S = 1.0
MIN_NEIGHBOURS = 3
MAINTAIN_EVERY_S = 2.0
REFRESH_EVERY_S = 60.0
IDENTIFY_WAITS_S = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2)
"""Seconds between looks at whether a new peer has told its addresses; libp2p gives no sign when it has."""
MAX_ANSWER_BYTES = RECORDS.limits.header - 4096


class Discovery:
    """The records protocol of one node.

    Args:
        host: its host.
        server: whether it keeps records and routes for others; clients that come and go do not.
        on_record: is given the signed bytes of each record that this node is handed to keep; it may have expired by another's clock.
        clock: unix time.

    Attributes:
        joined: whether the swarm was reached, or there was none to reach.
    """

    def __init__(self, host: Host, *, server: bool, on_record: Callable[[bytes], object], clock: Callable[[], float] = time.time) -> None:
        self.joined = False
        self._host = host
        self._server = server
        self._on_record = on_record
        self._clock = clock
        self._store = RecordStore()
        self._table = RoutingTable(host, server=server)
        self._links: dict[str, _Link] = {}
        self._avoided: dict[str, float] = {}  # peer: trio time until which it is not asked
        self._bootstrap: list[PeerAddress] = []
        self._new_peers: trio.MemorySendChannel[str]
        self._new_peers, self._arrivals = trio.open_memory_channel[str](256)
        if server:
            host.serve(RECORDS, self._serve)
        host.on_peer_found(self._on_peer_found)
        host.on_peer_lost(self._on_peer_lost)

    async def run(self, bootstrap: Sequence[str], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Join through the bootstrap peers (full multiaddrs) and stay joined until cancelled; started after the first attempt."""
        self._bootstrap = [peer for text in bootstrap if (peer := parse_peer(text)).peer_id != self._host.peer_id]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._table.run)
            nursery.start_soon(self._take_in)
            await self._join()
            task_status.started()
            await self._maintain()

    # ---- what a node does with records

    async def announce(self, keys: Sequence[bytes], record: bytes) -> int:
        """Store this node's signed record under `keys`; returns on how many peers it is now kept, itself included.

        The same call with a newer record replaces it (one whose state is "left" withdraws it).

        Raises:
            RecordRejected: the record does not hold, or is not this node's.
        """
        kept = read_kept(record, keys, now=self._clock())
        if kept.peer_id != self._host.peer_id:
            raise RecordRejected(f"a node announces its own record, not that of {kept.peer_id}")
        self._store.add(kept, now=self._clock())
        stored = 1

        async def store(peer_id: str) -> None:
            nonlocal stored
            answer = await self._ask(peer_id, Store(tuple(keys), record))
            stored += isinstance(answer, Stored)

        await self._ask_around(keys, store)
        return stored

    async def find(self, key: bytes) -> list[bytes]:
        """The signed records under `key`, the newest of each peer, from this node and those that keep them; within 2 s."""
        now = self._clock()
        newest: dict[str, Kept] = {kept.peer_id: kept for kept in self._store.find(key, now=now)}

        async def query(peer_id: str) -> None:
            answer = await self._ask(peer_id, Find(key))
            if not isinstance(answer, Records):
                return
            for data in answer.records:
                try:
                    kept = read_kept(data, (key,), now=now)
                except RecordRejected as error:
                    logger.debug("peer %s keeps a record that does not hold: %s", peer_id, error)
                    continue
                known = newest.get(kept.peer_id)
                if known is None or known.sequence < kept.sequence:
                    newest[kept.peer_id] = kept

        await self._ask_around([key], query)
        return [kept.data for kept in newest.values()]

    async def _ask_around(self, keys: Sequence[bytes], ask: Callable[[str], Awaitable[None]]) -> None:
        """Run `ask` for the peers nearest to the keys: those that are known at once, and nearer ones as they are found."""
        asked: set[str] = set()
        async with trio.open_nursery() as nursery:

            def start(peers: Sequence[str]) -> None:
                for peer_id in peers:
                    if peer_id not in asked and self._may_ask(peer_id):
                        asked.add(peer_id)
                        nursery.start_soon(ask, peer_id)

            async def look_further(key: bytes) -> None:
                with trio.move_on_after(LOOK_UP_TIMEOUT_S):
                    start(await self._table.look_up(key, REPLICAS))

            for key in keys:
                start(self._table.nearest(key, REPLICAS))
            # In a small swarm, and before the table has filled, the neighbours are all there is.
            start([peer_id for peer_id in self._host.connected_peers() if self._may_ask(peer_id)][:REPLICAS])
            if len(self._table) >= LOOK_UP_FROM:
                for key in keys:
                    nursery.start_soon(look_further, key)

    def _may_ask(self, peer_id: str) -> bool:
        return peer_id != self._host.peer_id and self._avoided.get(peer_id, float("-inf")) <= trio.current_time()

    async def _ask(self, peer_id: str, request: Message) -> Message | None:
        """A peer's answer; None where there is none in time, and the peer is then passed over for a while."""
        link = self._links.setdefault(peer_id, _Link(self._host, peer_id))
        with trio.move_on_after(QUERY_TIMEOUT_S):
            try:
                answer = await link.ask(request)
            except UnsupportedError:  # a client, or a stranger: it keeps no records, which will not change while it is connected
                self._avoid(peer_id, float("inf"))
                return None
            except PetalnetError as error:
                logger.debug("peer %s: %s", peer_id, error)
                self._avoid(peer_id)
                return None
            if isinstance(answer, Error):
                logger.debug("peer %s refused a request: %s", peer_id, answer.message)
            return answer
        logger.debug("peer %s did not answer within %g s", peer_id, QUERY_TIMEOUT_S)
        self._avoid(peer_id)
        return None

    def _avoid(self, peer_id: str, seconds: float = AVOIDED_S) -> None:
        self._avoided[peer_id] = trio.current_time() + seconds
        self._links.pop(peer_id, None)
        self._table.remove(peer_id)

    # ---- what it does for others

    async def _serve(self, stream: Stream) -> None:
        while (request := await stream.receive()) is not None:
            try:
                await stream.send(self._answer(stream.peer_id, request))
            except (RecordRejected, ProtocolError) as error:
                await stream.send(Error("caller", str(error)[:1000]))

    def _answer(self, peer_id: str, request: Message) -> Message:
        now = self._clock()
        if isinstance(request, Find):
            return _fit(self._store.find(request.key, now=now))
        if isinstance(request, Store):
            if any(len(key) != 32 for key in request.keys) or not request.keys:
                raise ProtocolError("a key has 32 bytes, and a record needs one at least")
            kept = read_kept(request.record, request.keys, now=now)
            if kept.peer_id != peer_id:
                raise RecordRejected(f"peer {peer_id} may not store a record of {kept.peer_id}")
            if self._store.add(kept, now=now):
                self._on_record(kept.data)
            self._new_peer(peer_id)
            return Stored()
        raise UnsupportedError(f"{RECORDS.id} takes store and find")

    # ---- staying in touch

    async def _join(self) -> None:
        if not self._bootstrap:
            self.joined = True
            return
        await self._connect_to_any([*self._bootstrap])
        if self.joined:
            with trio.move_on_after(REFRESH_TIMEOUT_S):
                await self._table.refresh()

    async def _connect_to_any(self, peers: Sequence[PeerAddress]) -> None:
        """Connect to as many of the peers as answer; returns with the first, and goes on with the rest for a moment."""
        first = trio.Event()
        addrs: dict[str, list[str]] = {}
        for peer in peers:
            addrs.setdefault(peer.peer_id, []).append(peer.addr)

        async def connect(peer_id: str) -> None:
            try:
                await self._host.connect(peer_id, addrs[peer_id], timeout_s=JOIN_TIMEOUT_S)
            except PeerUnreachable as error:
                logger.debug("%s", error)
            else:
                self.joined = True
                first.set()

        async with trio.open_nursery() as nursery:

            async def hurry() -> None:
                await first.wait()
                await trio.sleep(0.25)
                nursery.cancel_scope.cancel()

            nursery.start_soon(hurry)
            async with trio.open_nursery() as dials:
                for peer_id in random.sample(list(addrs), len(addrs)):
                    dials.start_soon(connect, peer_id)
            nursery.cancel_scope.cancel()

    async def _maintain(self) -> None:
        """Keep neighbours, which gossip needs, and a routing table that knows who is there."""
        refreshed = trio.current_time()
        while True:
            await trio.sleep(MAINTAIN_EVERY_S * random.uniform(0.8, 1.2))
            self._store.expire(self._clock())
            self._avoided = {peer_id: until for peer_id, until in self._avoided.items() if until > trio.current_time()}
            if len(self._host.connected_peers()) < MIN_NEIGHBOURS:
                await self._find_neighbours()
            if trio.current_time() - refreshed > REFRESH_EVERY_S:
                refreshed = trio.current_time()
                with trio.move_on_after(5 * REFRESH_TIMEOUT_S):
                    await self._table.refresh()

    async def _find_neighbours(self) -> None:
        connected = set(self._host.connected_peers())
        known = [peer_id for peer_id in self._table.peers() if peer_id not in connected and self._may_ask(peer_id)]
        peers = [PeerAddress(peer_id, addr) for peer_id in known for addr in self._host.known_addrs(peer_id)]
        peers += [peer for peer in self._bootstrap if peer.peer_id not in connected]
        if peers:
            await self._connect_to_any(peers)
        for peer_id in known:
            if not self._host.is_connected(peer_id):
                self._avoid(peer_id)

    def _on_peer_found(self, peer_id: str) -> None:
        self._avoided.pop(peer_id, None)
        self._new_peer(peer_id)

    def _on_peer_lost(self, peer_id: str) -> None:
        self._links.pop(peer_id, None)
        self._avoided.pop(peer_id, None)
        self._table.remove(peer_id)

    def _new_peer(self, peer_id: str) -> None:
        with suppress(trio.WouldBlock):  # it is found again by the next refresh
            self._new_peers.send_nowait(peer_id)

    async def _take_in(self) -> None:
        """Take connected peers into the routing table, once libp2p has learnt their addresses; clients have none."""

        async def take(peer_id: str) -> None:
            for wait in IDENTIFY_WAITS_S:
                if not self._host.is_connected(peer_id) or await self._table.add(peer_id):
                    return
                await trio.sleep(wait)

        async with trio.open_nursery() as nursery:
            async for peer_id in self._arrivals:
                nursery.start_soon(take, peer_id)


class _Link:
    """The stream for requests to one peer, opened when needed and kept; one request at a time."""

    def __init__(self, host: Host, peer_id: str) -> None:
        self._host = host
        self._peer_id = peer_id
        self._lock = trio.Lock()
        self._stream: Stream | None = None

    async def ask(self, request: Message) -> Message:
        """The answer to a request. Raises PetalnetError."""
        async with self._lock:
            reused = self._stream is not None
            try:
                return await self._ask_once(request)
            except UnsupportedError:
                raise
            except PetalnetError:
                if not reused:
                    raise
                return await self._ask_once(request)  # the peer may have closed a stream that was idle

    async def _ask_once(self, request: Message) -> Message:
        stream, self._stream = self._stream, None
        if stream is None:
            stream = await self._host.open_stream(self._peer_id, RECORDS, timeout_s=QUERY_TIMEOUT_S)
        try:
            await stream.send(request)
            answer = await stream.receive()
            if answer is None:
                raise ProtocolError(f"peer {self._peer_id} closed the stream instead of answering", self._peer_id)
        except BaseException:
            await stream.reset()
            raise
        self._stream = stream
        return answer


def _fit(found: list[Kept]) -> Records:
    """An answer with as many of the records as a frame holds; which ones, where they are too many, is left to chance."""
    size = 0
    chosen: list[bytes] = []
    for kept in random.sample(found, len(found)):
        size += len(kept.data) + 5
        if size > MAX_ANSWER_BYTES or len(chosen) >= 1024:
            break
        chosen.append(kept.data)
    return Records(tuple(chosen))
