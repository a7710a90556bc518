"""A node's membership of a swarm: its libp2p host, the records of all servers merged into one view, and its own announcements.

Records come by three ways (look-ups, stores on this node, gossip) and are checked in one place, `read_record`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

import trio

from petalnet.config import DEFAULT_HTTP_PORT, DEFAULT_PORT
from petalnet.errors import AddressInUse, NotAdmitted, PeerUnreachable, PetalnetError, RecordRejected
from petalnet.p2p.access import Access
from petalnet.p2p.admission import Admission
from petalnet.p2p.discovery import Discovery
from petalnet.p2p.gossip import Gossip
from petalnet.p2p.host import Host, open_host
from petalnet.p2p.hole_punching import HolePunching
from petalnet.p2p.identity import Identity
from petalnet.p2p.reachability import Reachability
from petalnet.p2p.relay import Relay
from petalnet.p2p.offences import Offences
from petalnet.p2p.protocols import Limits
from petalnet.p2p.signed import open_signed, sign
from petalnet.routing.records import SWARM_KEY, ServerRecord, discovery_key
from petalnet.routing.swarm import SwarmView

logger = logging.getLogger(__name__)

GOSSIP_TOPIC = "petalnet/records/1"
PORTS_TRIED = 20
"""How many ports after the default one are tried before giving up."""
REFRESH_EVERY_S = 10.0


def read_record(data: bytes, *, now: float) -> ServerRecord:
    """The server record in a signed envelope, signature, ranges and times checked. Raises RecordRejected."""
    signer, payload = open_signed(data)
    record = ServerRecord.decode(payload)
    record.check(signer=signer, now=now)
    return record


class Peering:
    """A running membership; `open_peering` makes one.

    Attributes:
        host: the libp2p host.
        view: what is known of the swarm's servers, itself included. Times in it are unix seconds.
        discovery: the records protocol over Kademlia.
        reachability: whether others can reach this node; None where it does not listen.
    """

    def __init__(self, host: Host, *, server: bool) -> None:
        self.host = host
        self.view = SwarmView()
        self.discovery = Discovery(host, server=server, on_record=self._take)
        self.reachability = Reachability(host) if host.addrs else None
        self._hole_punching = HolePunching(host)
        self._gossip = Gossip(host)
        host.on_peer_lost(self._on_peer_lost)
        host.on_peer_found(self._on_peer_found)

    async def run(self, initial_peers: Sequence[str], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be a member until cancelled; started once the first attempt to join is over."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hole_punching.run)
            if self.reachability is not None:
                nursery.start_soon(self.reachability.run)
            self._gossip.subscribe(GOSSIP_TOPIC, self._accept, lambda peer_id, data: None)
            await nursery.start(self._gossip.run)
            await nursery.start(self.discovery.run, initial_peers)
            task_status.started()

    async def look_up(self, model: str | None = None) -> None:
        """Ask the swarm who serves a model (None: any)."""
        for data in await self.discovery.find(SWARM_KEY if model is None else discovery_key(model)):
            self._take(data)

    async def keep_fresh(self, model: str | None = None) -> None:
        """Look up again and again, and forget what has expired, until cancelled."""
        while True:
            try:
                await self.look_up(model)
            except PetalnetError as error:
                logger.debug("the swarm could not be looked up: %s", error)
            await trio.sleep(REFRESH_EVERY_S)
            self.view.expire(time.time())

    async def announce(self, record: ServerRecord) -> int:
        """Tell the swarm about this node; returns on how many peers the record is stored, itself included."""
        data = sign(self.host.identity, record.encode())
        self.view.add(record, now=time.time())
        await self._gossip.publish(GOSSIP_TOPIC, data)
        return await self.discovery.announce([discovery_key(record.model), SWARM_KEY], data)

    def _take(self, data: bytes, author: str | None = None) -> bool:
        """A signed record from wherever, or from its `author` only. One that does not hold is dropped."""
        now = time.time()
        try:
            record = read_record(data, now=now)
            if author not in (None, record.peer_id):
                raise RecordRejected(f"it came from {author}, not from {record.peer_id}")
        except RecordRejected as error:
            logger.debug("a server record was dropped: %s", error)
            return False
        if self.view.add(record, now=now) and record.peer_id != self.host.peer_id:
            logger.debug("%s: blocks %d:%d of %s, %s", record.peer_id, *record.span, record.model_name, record.state)
        return True

    def _accept(self, peer_id: str, data: bytes) -> bool:
        """Gossip's validator: what does not hold is not passed on, what does is taken in here.

        A server speaks for itself: with records of others, a peer could fill everybody's view with servers that do not exist.
        """
        return self._take(data, author=peer_id)

    def _on_peer_found(self, peer_id: str) -> None:
        self.view.mark_ok(peer_id)

    def _on_peer_lost(self, peer_id: str) -> None:
        record = self.view.record(peer_id)
        if record is not None and record.state != "left":
            self.view.mark_failed(peer_id, now=time.time())


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

    Raises:
        AddressInUse: an address is taken.
        NotAdmitted: initial peers refused this node, or it refuses them, and none of the others answered.
        PeerUnreachable: none of the initial peers answered.
    """
    admission = Admission(swarm_key=access.swarm_key, allowed=access.allowed, blocked=access.blocked, offences=Offences(limits))
    open_at = partial(open_host, identity, announce=announce, admission=admission, limits=limits)
    async with AsyncExitStack() as stack:
        host = await (_open_on_free_port(stack, open_at) if listen is None else stack.enter_async_context(open_at(listen=listen)))
        peering = Peering(host, server=server)
        if relay:
            Relay(host)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(peering.run, initial_peers)
        if initial_peers and not peering.discovery.joined:
            named = ", ".join(initial_peers[:3]) + (", …" if initial_peers[3:] else "")
            refusal = next(iter(admission.refusals.values()), None)
            if must_join and refusal is not None:
                raise NotAdmitted(f"no swarm was joined: {refusal}", refusal.peer_id)
            if must_join:
                raise PeerUnreachable(f"no swarm was reached: none of the initial peers answered ({named})")
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
