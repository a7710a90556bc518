"""A node's membership of a swarm: its libp2p host, the records of all servers merged into one view, and its own announcements.

Records come by three ways (look-ups, stores on this node, gossip) and are checked in one place, `read_record`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from petalnet.config import DEFAULT_HTTP_PORT, DEFAULT_PORT
from petalnet.errors import AddressInUse, NotAdmitted, PeerUnreachable, PetalnetError, RecordRejected
from petalnet.p2p.access import Access
from petalnet.p2p.admission import Admission
from petalnet.p2p.discovery import Discovery
from petalnet.p2p.gossip import Gossip
from petalnet.p2p.hole_punching import HolePunching
from petalnet.p2p.host import Host, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.known_peers import KnownPeers
from petalnet.p2p.offences import Offences
from petalnet.p2p.protocols import Limits
from petalnet.p2p.rates import Rates
from petalnet.p2p.reachability import Reachability
from petalnet.p2p.relay import Relay
from petalnet.p2p.replication import REPLICAS
from petalnet.p2p.signed import open_signed, sign
from petalnet.routing.pace import BEAT_S, beat_s, gossip_every_s, list_every_s, refresh_every_s
from petalnet.routing.records import SWARM_KEY, RecordForged, ServerRecord, discovery_key, next_sequence
from petalnet.routing.sequences import Sequences
from petalnet.routing.swarm import MAX_REMEMBERED, SwarmView
from petalnet.version import PROTOCOL
from petalnet.waking import LOOK_EVERY_S, Gap, Waking

logger = logging.getLogger(__name__)

GOSSIP_TOPIC = f"petalnet/records/{PROTOCOL}"
PORTS_TRIED = 20
"""How many ports after the default one are tried before giving up."""
ASK_ALL_EVERY_S = 60.0
"""Seconds between two look-ups that ask all keepers of a key."""
TIDY_EVERY_S = 10.0
"""How often what has expired is forgotten."""
RESTART_S = 1.0
AWAKE_WITHIN_S = 2.0
"""Seconds for peers to show that connections of before a sleep still stand."""
FEW_KEEPERS = 3
"""Keepers that a look-up in between asks: each tells all it has, so more would mostly say the same."""


async def _keep_going(name: str, service: Callable[[], Awaitable[None]]) -> None:
    """Run a service that a node can do without for a moment, and start it again where a defect of it ends it."""
    while True:
        try:
            await service()
        except Exception:  # not swallowed: logged, and begun anew; what a stranger's message met there must not end the node
            logger.exception("%s failed and is started again", name)
        await trio.sleep(RESTART_S)


def read_record(data: bytes, *, now: float, age: float = 0.0) -> ServerRecord:
    """The server record in a signed envelope, signature, ranges and times checked.

    Args:
        now: unix seconds by our clock, in which the record's times are given then, whatever its server's clock says.
        age: seconds since it left its server.

    Raises:
        RecordRejected: it does not hold.
    """
    signer, payload = open_signed(data)
    record = ServerRecord.decode(payload)
    record.check(signer=signer, now=now)
    return record.received(now, age)


class Peering:
    """A running membership; `open_peering` makes one.

    Attributes:
        host: the libp2p host.
        view: what is known of the swarm's servers, itself included. Times in it are unix seconds.
        discovery: the records protocol over Kademlia.
        reachability: whether others can reach this node; None where nobody has to (a client that does not relay), and where it does not
            listen.
    """

    def __init__(self, host: Host, *, server: bool, relay: bool = False, known: KnownPeers | None = None) -> None:
        self.host = host
        self.view = SwarmView(host.peer_id)
        self._gossip = Gossip(host)
        self.discovery = Discovery(host, server=server, on_record=self._take, neighbours=self._gossip.neighbours, known=known)
        self.reachability = reachability = Reachability(host) if (server or relay) and host.addrs else None
        if relay and reachability is not None:
            Relay(host, is_reachable=lambda: reachability.verdict.state != "unreachable")
        self._hole_punching = HolePunching(host)
        self._gossiped = Sequences(MAX_REMEMBERED)
        self._authors = Rates(*host.limits.gossip_per_author, capacity=MAX_REMEMBERED)
        self._announced: ServerRecord | None = None
        self._gossiped_at = float("-inf")
        self._listed_at = float("-inf")
        self._list_every_s = BEAT_S
        self._asked_all: dict[bytes, float] = {}
        self._waking = Waking(trio.current_time, time.time)
        host.on_peer_lost(self._on_peer_lost)
        host.on_peer_found(self._on_peer_found)

    async def run(self, initial_peers: Sequence[str], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be a member until cancelled; started once the first attempt to join is over."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_going, "hole punching", self._hole_punching.run)
            if self.reachability is not None:
                nursery.start_soon(_keep_going, "reachability", self.reachability.run)
            nursery.start_soon(_keep_going, "the watch over the clocks", self._watch_clocks)
            nursery.start_soon(_keep_going, "forgetting", self._tidy)
            self._gossip.subscribe(GOSSIP_TOPIC, self._accept, lambda peer_id, data: None)
            await nursery.start(self._gossip.run)
            await nursery.start(self.discovery.run, initial_peers)
            task_status.started()

    @property
    def beat_s(self) -> float:
        """Seconds after which a server should announce itself again: the more there are of its model, the longer."""
        return beat_s(0 if self._announced is None else self.discovery.crowds.get(self._announced.keys[0], 0))

    async def look_up(self, model: str | None = None, *, thorough: bool = False) -> None:
        """Ask the swarm who serves a model (None: any): all that keep its records once in a minute, a few of them in between.

        Args:
            thorough: ask all of them now: somebody is missing.
        """
        key = SWARM_KEY if model is None else discovery_key(model)
        if model is not None:
            self.view.follow(model)
        now = trio.current_time()
        everybody = thorough or now - self._asked_all.get(key, float("-inf")) >= ASK_ALL_EVERY_S
        if everybody:
            self._asked_all[key] = now
        for kept in await self.discovery.find(key, keepers=REPLICAS if everybody else FEW_KEEPERS):
            if self.view.is_news(kept.peer_id, kept.sequence):
                self._take(kept.data, age=time.time() - kept.received)

    async def keep_fresh(self, model: str | None = None) -> None:
        """Look up again and again until cancelled."""
        while True:
            try:
                await self.look_up(model)
            except PetalnetError as error:
                logger.debug("the swarm could not be looked up: %s", error)
            await trio.sleep(refresh_every_s(len(self.view)))

    async def _tidy(self) -> None:
        """Forget what has expired, until cancelled."""
        while True:
            await trio.sleep(TIDY_EVERY_S)
            self.view.expire(time.time())
            self._gossiped.expire(time.time())

    async def announce(self, record: ServerRecord) -> int:
        """Tell the swarm about this node; returns on how many peers the record is stored, itself included."""
        last = self._announced
        if last is not None and record.sequence <= last.sequence:
            record = replace(record, sequence=next_sequence(last.sequence, time.time()))
        stored = await self._announce(record)
        if self._announced is not record:
            return stored  # a newer one was announced meanwhile, and is what those that keep them know of: this one is out of date
        renumbered = next_sequence(record.sequence, time.time(), told=self.discovery.newest_own)
        if self.discovery.newest_own > record.sequence and renumbered > self.discovery.newest_own:
            logger.info("this server announced itself with a clock that was ahead before; going on from there")
            stored = await self._announce(replace(record, sequence=renumbered))
        return stored

    async def _announce(self, record: ServerRecord) -> int:
        data = sign(self.host.identity, record.encode())
        now = time.time()
        last, self._announced = self._announced, record
        self.view.add(record, now=now)
        changed = last is None or (last.state, last.span) != (record.state, record.span)
        if changed or now - self._gossiped_at >= gossip_every_s(len(self.view)):
            self._gossiped_at = now
            await self._gossip.publish(GOSSIP_TOPIC, data)
        keys = [discovery_key(record.model)]
        if changed or self._list_every_s <= self.beat_s or now - self._listed_at >= self._list_every_s:
            keys.append(SWARM_KEY)
        stored = await self.discovery.announce(keys, data)
        if SWARM_KEY in keys:
            crowd = self.discovery.crowds[SWARM_KEY]
            self._list_every_s = list_every_s(crowd, self._list_every_s, record.expires - record.issued)
            self._listed_at = now
        return stored

    def _take(self, data: bytes, age: float = 0.0) -> None:
        """A signed record from wherever. One that does not hold is dropped."""
        try:
            self._add(read_record(data, now=time.time(), age=age))
        except RecordRejected as error:
            logger.debug("a server record was dropped: %s", error)

    def _add(self, record: ServerRecord) -> None:
        if self.view.add(record, now=time.time()) and record.peer_id != self.host.peer_id:
            logger.debug("%s: blocks %d:%d of %s, %s", record.peer_id, *record.span, record.model_name, record.state)

    def _accept(self, peer_id: str, data: bytes) -> bool:
        """Gossip's validator: what does not hold is not passed on, what does is taken in here. Each record is passed on once.

        A server speaks for itself: with records of others, a peer could fill everybody's view with servers that do not exist.

        Raises:
            RecordForged: no honest peer passes such a thing on.
        """
        now = time.time()
        if not self._authors.take(peer_id, now):
            return False
        try:
            record = read_record(data, now=now)
        except RecordForged:
            raise
        except RecordRejected as error:
            logger.debug("a server record was dropped: %s", error)
            return False
        if record.peer_id != peer_id:
            raise RecordForged(f"a record of {record.peer_id} came from {peer_id}")
        # Not whether the view has it: what came by a look-up or a store has still to be gossiped on.
        if not self._gossiped.note(peer_id, record.sequence, now):
            return False
        self._add(record)
        return True

    def _on_peer_found(self, peer_id: str) -> None:
        self.view.mark_connected(peer_id)

    def _on_peer_lost(self, peer_id: str) -> None:
        record = self.view.record(peer_id)
        if record is not None and record.state != "left" and not self._waking.is_drowsy:
            self.view.mark_failed(peer_id, now=time.time())

    async def _watch_clocks(self) -> None:
        """Be back in the swarm as soon as this machine wakes up, or its clock is set."""
        while True:
            await trio.sleep(LOOK_EVERY_S)
            self._waking.look()
            gap = self._waking.take()
            if gap is not None:
                await self._wake_up(gap)

    async def _wake_up(self, gap: Gap) -> None:
        logger.warning("%s: connecting to the swarm again", gap)
        self._asked_all.clear()
        self.view.expire(time.time())
        async with trio.open_nursery() as nursery:
            for peer_id in self.host.connected_peers():
                nursery.start_soon(self._check_connection, peer_id)
        await self.discovery.wake()
        for model in (None, *self.view.followed):
            try:
                await self.look_up(model)
            except PetalnetError as error:
                logger.debug("the swarm could not be looked up: %s", error)

    async def _check_connection(self, peer_id: str) -> None:
        """End a connection whose other end has given it up: it may stand here for a long time."""
        try:
            await self.host.ping(peer_id, AWAKE_WITHIN_S)
        except PetalnetError as error:
            logger.debug("a connection did not survive: %s", error)
            await self.host.disconnect(peer_id)


@asynccontextmanager
async def open_peering(
    identity: Identity,
    *,
    initial_peers: Sequence[str],
    listen: Sequence[str] | None,
    announce: Sequence[str] = (),
    server: bool,
    relay: bool = False,
    must_join: bool = True,
    access: Access = Access(),  # noqa: B008  # a value that never changes
    limits: Limits = Limits(),  # noqa: B008  # likewise
    known: KnownPeers | None = None,
) -> AsyncIterator[Peering]:
    """A membership that has tried to join.

    Args:
        listen: multiaddrs to listen on, none if empty; None for every interface at the default port or the next free one.
        announce: addresses to tell others instead of those listened on.
        server: whether this node routes for others (Kademlia server mode).
        relay: whether this node relays connections for others that cannot be reached.
        must_join: give up where initial peers were given and none of them answers; otherwise go on trying.
        access: the swarm's key, and who may be connected.
        limits: what peers may take of this node.
        known: the peers that an earlier life of this node knew, tried where the initial ones do not answer; those of this one are added.

    Raises:
        AddressInUse: an address is taken.
        NotAdmitted: initial peers refused this node, or it refuses them, and none of the others answered.
        PeerUnreachable: none of the initial peers answered.
    """
    admission = Admission(swarm_key=access.swarm_key, allowed=access.allowed, blocked=access.blocked, offences=Offences(limits))
    open_at = partial(open_host, identity, announce=announce, admission=admission, limits=limits)
    async with AsyncExitStack() as stack:
        host = await (_open_on_free_port(stack, open_at) if listen is None else stack.enter_async_context(open_at(listen=listen)))
        peering = Peering(host, server=server, relay=relay, known=known)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(peering.run, initial_peers)
        if initial_peers and not peering.discovery.joined:
            named = ", ".join(initial_peers[:3]) + (", …" if initial_peers[3:] else "")
            refusal = next(iter(admission.refusals.values()), None)
            if must_join and refusal is not None:
                raise NotAdmitted(f"no swarm was joined: {refusal}", refusal.peer_id)
            if must_join:
                raise PeerUnreachable(
                    f"no swarm was reached: none of the initial peers answered ({named}); any running node of the swarm will do"
                )
            logger.warning("none of the initial peers answers yet (%s); trying on", named if refusal is None else refusal)
        try:
            yield peering
        finally:
            nursery.cancel_scope.cancel()


async def _open_on_free_port(stack: AsyncExitStack, open_at: Callable[..., AbstractAsyncContextManager[Host]]) -> Host:
    for port in (port for port in range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED) if port != DEFAULT_HTTP_PORT):
        with contextlib.suppress(AddressInUse):
            host = await stack.enter_async_context(open_at(listen=[f"/ip4/0.0.0.0/tcp/{port}"]))
            if port != DEFAULT_PORT:
                logger.info("port %d is taken; listening on %d", DEFAULT_PORT, port)
            return host
    raise AddressInUse(f"ports {DEFAULT_PORT} to {DEFAULT_PORT + PORTS_TRIED - 1} are all taken: say --host-maddrs /ip4/0.0.0.0/tcp/PORT")
