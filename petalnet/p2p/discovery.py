"""How servers are found: signed records, kept by the peers nearest to a key.

A server stores its record (see `routing.records`) on the peers that Kademlia's metric puts nearest to each of its keys, and renews it
before it expires; whoever looks for a key asks those peers and merges what they answer. Many records a key, one a peer, the newest
sequence wins. A peer stores only its own record, over a connection that proves who it is, so nobody fills the stores with records of
peers that do not exist. In a small swarm, where the nearest peers are all peers, everybody is asked.

What is decided lies in `replication` (whom to ask), `avoidance` (whom not to ask), `record_keeper` and `record_store` (what is kept and
answered), all of it free of I/O; here it meets the network.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

import trio

from petalnet.errors import PeerUnreachable, PetalnetError, RecordRejected, UnsupportedError
from petalnet.p2p.addresses import PeerAddress, parse_peer
from petalnet.p2p.avoidance import Avoidance, Reason
from petalnet.p2p.fields import Message
from petalnet.p2p.gossip import MIN_NEIGHBOURS
from petalnet.p2p.host import Host
from petalnet.p2p.known_peers import KnownPeers
from petalnet.p2p.messages import Error, Find, Records, Store, Stored
from petalnet.p2p.protocols import RECORDS
from petalnet.p2p.record_keeper import MAX_ANSWER_RECORDS, RecordKeeper, RecordService
from petalnet.p2p.record_link import RecordLink
from petalnet.p2p.record_store import Kept, RecordStore, read_kept
from petalnet.p2p.replication import REPLICAS, Announcement, Asking, Lie, LookUps, Merge, may_end
from petalnet.p2p.routing_table import RoutingTable
from petalnet.p2p.signed import open_signed
from petalnet.p2p.sources import network_of, source_of
from petalnet.routing.records import ServerRecord

logger = logging.getLogger(__name__)

QUERY_TIMEOUT_S = 1.0
"""Seconds in which a connected peer has to answer; one that does not is avoided for a growing while."""
DIAL_TIMEOUT_S = 5.0
"""Seconds to connect to a peer that is to be asked. Whoever asks does not wait for that longer than for the rest."""
ROUND_TIMEOUT_S = 1.8
"""Seconds for asking around: two deadlines one after the other, for a peer that took the place of one that did not answer."""
SHORTEST_PATIENCE_S = 0.1
"""Seconds that the last few get at least, when the others have answered a look-up."""
LOOK_UP_TIMEOUT_S = 0.8
"""Seconds for Kademlia to find peers nearer to a key than those that are known; then those that are known have to do."""
LOOK_UP_FROM = 20
"""Peers in the table (a bucket's worth) below which it holds the whole swarm, so that there is nobody nearer to be found."""
JOIN_TIMEOUT_S = 8.0
KNOWN_TIMEOUT_S = 3.0
"""Seconds for peers that are remembered: who begins a swarm again, all of whose members are gone, does not wait for longer."""
KNOWN_AT_ONCE = 12
REFRESH_TIMEOUT_S = 1.0
MAINTAIN_EVERY_S = 2.0
REFRESH_EVERY_S = 60.0
TELL_CLOCK_EVERY_S = 3600.0
"""Seconds between two warnings that this machine's clock is wrong."""
CHECK_TIMEOUT_S = 3.0
"""Seconds for a server whose connection broke to be there again, before its record counts as that of a dead one."""
MAX_CHECKS = 8
"""Of those, at once: a node that has lost its own line must not dial everybody whose record it keeps."""
MAX_WAITING_CHECKS = 64
"""That wait for their turn. For more of them it would come too late: records expire by themselves."""
IDENTIFY_WAITS_S = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2)
"""Seconds between looks at whether a new peer has told its addresses; libp2p gives no sign when it has."""


class Discovery:
    """The records protocol of one node.

    Args:
        host: its host.
        server: whether it keeps records and routes for others; clients that come and go do not.
        on_record: is given the signed bytes of each record that a server has just stored on this node.
        neighbours: the peers that gossip with this node, which looks for more where they are few; by default all that are connected.
        known: the peers that are remembered from before; they are tried where the entries of the swarm do not answer.
        clock: unix time.

    Attributes:
        joined: whether the swarm was reached, or there was none to reach.
        known: the peers by which the swarm is found again.
        crowds: how many records there are under each key that this node announced itself under, as most of its keepers say.
        newest_own: the highest sequence number that keepers remember of this node's own records, though one of them may have lied.
    """

    def __init__(
        self,
        host: Host,
        *,
        server: bool,
        on_record: Callable[[bytes], object],
        neighbours: Callable[[], Sequence[str]] | None = None,
        known: KnownPeers | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.joined = False
        self.known = KnownPeers() if known is None else known
        self.crowds: dict[bytes, int] = {}
        self.newest_own = 0
        self._host = host
        self._neighbours = neighbours or host.connected_peers
        self._clock = clock or time.time
        self._told_refusal = False
        self._told_clock_at = float("-inf")
        self._store = RecordStore(host.peer_id, host.limits.max_records)
        self._avoidance = Avoidance()
        self._look_ups = LookUps()
        self._table = RoutingTable(host, server=server, admits=self._may_ask)
        self._links: dict[str, RecordLink] = {}
        self._dials: dict[str, trio.Event] = {}
        self._bootstrap: list[PeerAddress] = []
        self._nursery: trio.Nursery | None = None
        self._checks = trio.CapacityLimiter(MAX_CHECKS)
        self._checked: set[str] = set()
        self._new_peers: trio.MemorySendChannel[str]
        self._new_peers, self._arrivals = trio.open_memory_channel[str](256)
        if server:
            keeper = RecordKeeper(self._store, on_record=on_record, limits=host.limits)
            host.serve(RECORDS, RecordService(keeper, source=self._source, clock=self._clock, on_offence=host.offence).serve)
        host.on_peer_found(self._on_peer_found)
        host.on_peer_lost(self._on_peer_lost)

    async def run(self, bootstrap: Sequence[str], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Join through the bootstrap peers (full multiaddrs) and stay joined until cancelled; started after the first attempt."""
        self._bootstrap = [peer for text in bootstrap if (peer := parse_peer(text)).peer_id != self._host.peer_id]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._table.run)
            nursery.start_soon(self._take_in)
            self._nursery = nursery
            try:
                await self._join()
                task_status.started()
                await self._maintain()
            finally:
                self._nursery = None

    # ---- what a node does with records

    async def announce(self, keys: Sequence[bytes], record: bytes) -> int:
        """Store this node's signed record under `keys`; returns on how many peers it is now kept, itself included.

        The same call with a newer record replaces it (one whose state is "left" withdraws it). Where keepers remember a newer one,
        from a life of this node in which its clock was ahead, `newest_own` says so, and it takes a higher number to be heard.

        Raises:
            RecordRejected: the record does not hold, or is not this node's.
        """
        kept = read_kept(record, keys, now=self._clock())
        if kept.peer_id != self._host.peer_id:
            raise RecordRejected(f"a node announces its own record, not that of {kept.peer_id}")
        self._store.add(kept, now=self._clock())
        refusals: list[str] = []
        announcement = Announcement(kept, {key: self._store.count(key) for key in keys})

        async def store(peer_id: str, its_keys: Sequence[bytes]) -> bool:
            answer = await self._ask(peer_id, Store(tuple(its_keys), record))
            if isinstance(answer, Error):
                refusals.append(answer.message)
            if not isinstance(answer, Stored):
                return False
            announcement.answer(peer_id, its_keys, newest=answer.newest, counts=answer.counts)
            return True

        await self._ask_around(keys, store)
        if len(announcement.stored) > 1:
            self._told_refusal = False
        elif refusals and not self._told_refusal:
            self._told_refusal = True
            logger.warning("no peer keeps what this node announces, so nobody will find it: %s", refusals[0])
        self.crowds |= announcement.crowds
        self.newest_own = announcement.newest
        return len(announcement.stored)

    async def find(self, key: bytes, *, keepers: int = REPLICAS) -> list[Kept]:
        """The records under `key`, the newest of each peer, from this node and those that keep them; within 2 s.

        Args:
            keepers: how many of those that keep them are asked: all for certainty, a few, by chance, to stay in the picture.
        """
        now = self._clock()
        merge = Merge(key, now, most=MAX_ANSWER_RECORDS)
        for kept in self._store.find(key, now=now):
            merge.add_own(kept)

        async def query(peer_id: str, _: Sequence[bytes]) -> bool:
            answer = await self._ask(peer_id, Find(key))
            if not isinstance(answer, Records):
                return False
            try:
                merge.answer(answer.records, answer.ages, answer.count)
            except Lie as lie:
                self._host.offence(peer_id, f"it keeps a record that does not hold: {lie}")
                self._avoid(peer_id, Reason.LYING)
                return False
            return True

        await self._ask_around([key], query, keepers, hurry=True)
        doubt = merge.doubt()
        if doubt and trio.current_time() >= self._told_clock_at + TELL_CLOCK_EVERY_S:
            self._told_clock_at = trio.current_time()
            logger.warning("%s", doubt)
        return merge.result()

    async def _ask_around(
        self, keys: Sequence[bytes], ask: Callable[[str, Sequence[bytes]], Awaitable[bool]], count: int = REPLICAS, *, hurry: bool = False
    ) -> None:
        """Run `ask` for the peers nearest to each key, with the keys that they are near to: the nearest of all that are found in time.

        Where `ask` says that it came to nothing, the next nearest peer is asked. Those that take long are still waited for, in the
        background, when this returns: so it comes out who is silent.

        Args:
            count: how many peers are asked for each key.
            hurry: return when most have answered.
        """
        asking = Asking(keys, count, network=self._network)
        began = trio.current_time()
        wanted = answered = under_way = 0
        changed = trio.lowlevel.ParkingLot()
        nursery = self._nursery
        if nursery is None:  # not joined yet, or not any more
            return

        def pump() -> None:
            nonlocal wanted, under_way
            for peer_id, its_keys in asking.next().items():
                wanted += 1
                under_way += 1
                nursery.start_soon(run, peer_id, its_keys)

        async def run(peer_id: str, its_keys: Sequence[bytes]) -> None:
            nonlocal wanted, answered, under_way
            fine = await ask(peer_id, its_keys)
            if fine:
                answered += 1
            else:
                wanted -= 1
                asking.failed(peer_id, its_keys)
                if trio.current_time() < began + ROUND_TIMEOUT_S:
                    pump()
            under_way -= 1
            changed.unpark_all()

        async def look_further(key: bytes) -> None:
            nonlocal under_way
            with trio.move_on_after(LOOK_UP_TIMEOUT_S):
                self._look_ups.note(key, await self._table.look_up(key, 2 * REPLICAS), trio.current_time())
            asking.offer(key, self._candidates(key))
            pump()
            under_way -= 1
            changed.unpark_all()

        for key in keys:
            asking.offer(key, self._candidates(key))
            if len(self._table) >= LOOK_UP_FROM and self._look_ups.is_due(key, began):
                under_way += 1
                nursery.start_soon(look_further, key)
        pump()
        deadline = began + ROUND_TIMEOUT_S
        while under_way and trio.current_time() < deadline:
            if hurry and may_end(wanted, answered):
                deadline = min(deadline, trio.current_time() + max(trio.current_time() - began, SHORTEST_PATIENCE_S))
                hurry = False
            with trio.move_on_at(deadline):
                await changed.park()

    def _candidates(self, key: bytes) -> Iterable[str]:
        peers = {*self._table.peers(), *self._look_ups.peers(key)}
        if len(self._table) < LOOK_UP_FROM:  # a small swarm, or the table has not filled: the neighbours are all there is
            peers.update(self._host.connected_peers())
        # Better one who was silent than nobody: a node whose only neighbour was busy once must not lose sight of its swarm.
        return list(filter(self._may_ask, peers)) or [peer_id for peer_id in peers if self._was_silent(peer_id)]

    def _may_ask(self, peer_id: str) -> bool:
        return peer_id != self._host.peer_id and not self._avoidance.is_avoided(peer_id, trio.current_time())

    def _was_silent(self, peer_id: str) -> bool:
        return self._host.is_connected(peer_id) and self._avoidance.reason(peer_id, trio.current_time()) is Reason.SILENT

    async def _ask(self, peer_id: str, request: Message) -> Message | None:
        """A peer's answer; None where there is none in time, and the peer is then avoided for a while."""
        if not await self._reach(peer_id):
            return None
        link = self._links.setdefault(peer_id, RecordLink(self._host, peer_id, timeout_s=QUERY_TIMEOUT_S))
        with trio.move_on_after(QUERY_TIMEOUT_S):
            try:
                answer = await link.ask(request)
            except UnsupportedError:
                self._avoid(peer_id, Reason.UNSERVED)
                return None
            except PetalnetError as error:
                logger.debug("peer %s: %s", peer_id, error)
                self._avoid(peer_id, Reason.UNREACHABLE)
                return None
            if isinstance(answer, Error):
                logger.debug("peer %s refused a request: %s", peer_id, answer.message)
            return answer
        logger.debug("peer %s did not answer within %g s", peer_id, QUERY_TIMEOUT_S)
        self._avoid(peer_id, Reason.SILENT)
        return None

    async def _reach(self, peer_id: str) -> bool:
        """Whether the peer is connected, after an attempt at that which goes on when the caller does not wait for it any longer."""
        if not self._host.is_connected(peer_id) and self._nursery is not None:
            over = self._dials.get(peer_id)
            if over is None:
                over = self._dials[peer_id] = trio.Event()
                self._nursery.start_soon(self._dial, peer_id, over)
            await over.wait()
        return self._host.is_connected(peer_id)

    async def _dial(self, peer_id: str, over: trio.Event) -> None:
        try:
            await self._host.connect(peer_id, timeout_s=DIAL_TIMEOUT_S)
        except PetalnetError as error:
            logger.debug("%s", error)
            self._avoid(peer_id, Reason.UNREACHABLE)
        finally:
            del self._dials[peer_id]
            over.set()

    def _avoid(self, peer_id: str, reason: Reason) -> None:
        self._avoidance.add(peer_id, reason, trio.current_time())
        link = self._links.pop(peer_id, None)
        if link is not None and self._nursery is not None:
            self._nursery.start_soon(link.close)
        self._look_ups.forget(peer_id)
        self._table.remove(peer_id)

    def _source(self, peer_id: str) -> str:
        return source_of(self._host.remote_ip(peer_id))

    def _network(self, peer_id: str) -> str:
        # The other end of a connection is where it is; the addresses that a peer tells of itself are whatever it likes.
        remote = self._host.remote_ip(peer_id)
        hosts = [addr.split("/")[2] for addr in self._host.known_addrs(peer_id)] if remote is None else [remote]
        return next(filter(None, map(network_of, hosts)), "")

    # ---- staying in touch

    async def wake(self) -> None:
        """This node was away for a while: who did not answer meanwhile has a new chance, and neighbours are looked for at once."""
        self._avoidance.forgive()
        self._store.expire(self._clock())
        await self._find_neighbours()

    async def _join(self) -> None:
        await self._connect_to_any(self._bootstrap)
        if not self.joined and (remembered := self.known.peers(KNOWN_AT_ONCE)):
            await self._connect_to_any(remembered, timeout_s=KNOWN_TIMEOUT_S)
            if self._host.connected_peers():
                why = "none of the initial peers answers; " if self._bootstrap else ""
                logger.info("%sthe swarm was found again through a peer that was remembered", why)
        if not self._bootstrap:
            self.joined = True
        if self._host.connected_peers():
            with trio.move_on_after(REFRESH_TIMEOUT_S):
                await self._table.refresh()

    async def _connect_to_any(self, peers: Sequence[PeerAddress], *, timeout_s: float | None = None) -> set[str]:
        """Connect to as many of the peers as answer; returns with the first, and goes on with the rest for a moment.

        Returns those that did not answer, as far as that was waited for.
        """
        failed: set[str] = set()
        if not peers:
            return failed
        within_s = JOIN_TIMEOUT_S if timeout_s is None else timeout_s
        first = trio.Event()
        addrs: dict[str, list[str]] = {}
        for peer in peers:
            addrs.setdefault(peer.peer_id, []).append(peer.addr)

        async def connect(peer_id: str) -> None:
            try:
                await self._host.connect(peer_id, addrs[peer_id], timeout_s=within_s)
                await self._host.check_version(peer_id)
            except PeerUnreachable as error:
                failed.add(peer_id)
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
        return failed

    async def _maintain(self) -> None:
        """Keep neighbours, which gossip needs, and a routing table that knows who is there."""
        refreshed = trio.current_time()
        while True:
            await trio.sleep(MAINTAIN_EVERY_S * random.uniform(0.8, 1.2))
            self._store.expire(self._clock())
            self._avoidance.expire(trio.current_time())
            if len(self._neighbours()) < MIN_NEIGHBOURS:
                await self._find_neighbours()
            self._remember_peers()
            if trio.current_time() - refreshed > REFRESH_EVERY_S:
                refreshed = trio.current_time()
                with trio.move_on_after(5 * REFRESH_TIMEOUT_S):
                    await self._table.refresh()

    async def _find_neighbours(self) -> None:
        connected = set(self._host.connected_peers())
        known = [peer_id for peer_id in self._table.peers() if peer_id not in connected and self._may_ask(peer_id)]
        chosen = random.sample(known, min(len(known), 2 * MIN_NEIGHBOURS))
        peers = [PeerAddress(peer_id, addr) for peer_id in chosen for addr in self._host.known_addrs(peer_id)]
        peers += [peer for peer in self._bootstrap if peer.peer_id not in connected]
        tried = {peer.peer_id for peer in peers}
        remembered = [
            peer for peer in self.known.peers(KNOWN_AT_ONCE) if peer.peer_id not in connected | tried and self._may_ask(peer.peer_id)
        ]
        failed = await self._connect_to_any([*peers, *remembered])
        for peer_id in {*chosen, *(peer.peer_id for peer in remembered if peer.peer_id in failed)}:
            if not self._host.is_connected(peer_id):
                self._avoid(peer_id, Reason.UNREACHABLE)

    def _remember_peers(self) -> None:
        now = self._clock()
        self.known.expire(now)
        others_reach = set(self._table.peers())
        for status in self._host.peers():
            if status.peer_id in others_reach:
                self.known.note(status, self._host.known_addrs(status.peer_id), now=now)

    def _on_peer_found(self, peer_id: str) -> None:
        self._avoidance.connected(peer_id, trio.current_time())
        self._new_peer(peer_id)

    def _on_peer_lost(self, peer_id: str) -> None:
        self._links.pop(peer_id, None)
        self._table.remove(peer_id)
        if self._nursery is None or self._store.get(peer_id, now=self._clock()) is None:
            return
        if peer_id not in self._checked and len(self._checked) < MAX_WAITING_CHECKS:
            self._checked.add(peer_id)
            self._nursery.start_soon(self._check_lost, peer_id)

    async def _check_lost(self, peer_id: str) -> None:
        """See whether a server whose connection ended is gone; where it is, its record is given to nobody, long before it expires."""
        async with self._checks:
            self._checked.discard(peer_id)  # it may be lost anew from here on
            kept = self._store.get(peer_id, now=self._clock())
            if kept is None:
                return
            addrs = ServerRecord.decode(open_signed(kept.data)[1]).addrs
            try:
                await self._host.connect(peer_id, addrs, timeout_s=CHECK_TIMEOUT_S)
            except PetalnetError as error:
                current = self._store.get(peer_id, now=self._clock())
                if current is not None and current.sequence == kept.sequence:
                    logger.debug("the record of a server that is gone is dropped: %s", error)
                    self._store.mark_lost(peer_id)

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
