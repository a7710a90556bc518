"""Who in the swarm is near a key: libp2p's Kademlia, used for routing only.

Its stores of values and providers are the wrong tool for announcements by many writers, so they are shut: the validator lets only
public keys be stored, which are small and prove themselves. Records are `discovery`'s business.
"""

from __future__ import annotations

import logging

import trio
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.pubkey import PublicKeyValidator
from libp2p.records.validator import NamespacedValidator
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from petalnet.p2p.host import Host

logger = logging.getLogger(__name__)

MAX_PEERS_PER_SUBNET = 16
"""Of one public /24 in one bucket of 20: a provider's whole rack may serve, but does not fill the table by itself."""
_RESTART_S = 1.0


class RoutingTable:
    """The table of one node; `run` keeps it going."""

    def __init__(self, host: Host, *, server: bool) -> None:
        self._host = host
        self._dht = KadDHT(
            host.libp2p,
            DHTMode.SERVER if server else DHTMode.CLIENT,
            validator=NamespacedValidator({"pk": PublicKeyValidator()}, strict_validation=True),
            validator_changed=True,  # otherwise it adds validators of its own
            strict_validation=True,
            max_peers_per_subnet=MAX_PEERS_PER_SUBNET,
        )

    def __len__(self) -> int:
        return self._dht.routing_table.size()

    async def run(self) -> None:
        """Serve and refresh the table until cancelled. Where libp2p's service fails, it is started again."""
        while True:
            try:
                async with background_trio_service(self._dht) as manager:
                    await manager.wait_finished()
            except Exception as error:  # not swallowed: logged, and the service begins anew with the table as it was
                logger.warning("the routing table's service failed and is started again: %r", error)
            await trio.sleep(_RESTART_S)

    async def add(self, peer_id: str) -> bool:
        """Take a peer in, where its addresses are known and there is room; False where not."""
        addrs = self._host.known_addrs(peer_id)
        if not addrs:
            return False
        peer = ID.from_string(peer_id)
        return await self._dht.routing_table.add_peer(PeerInfo(peer, [Multiaddr(addr) for addr in addrs]))

    def remove(self, peer_id: str) -> None:
        """Forget a peer."""
        self._dht.routing_table.remove_peer(ID.from_string(peer_id))

    def peers(self) -> list[str]:
        """All peers in the table."""
        return [str(peer) for peer in self._dht.routing_table.get_peer_ids()]

    def nearest(self, key: bytes, count: int) -> list[str]:
        """The peers nearest to a key among those in the table, the nearest first."""
        return [str(peer) for peer in self._dht.routing_table.find_local_closest_peers(key, count)]

    async def look_up(self, key: bytes, count: int) -> list[str]:
        """The peers nearest to a key in the whole swarm, asking others for theirs. May take long; the caller sets a deadline."""
        return [str(peer) for peer in await self._dht.peer_routing.find_closest_peers_network(key, count)]

    async def refresh(self) -> None:
        """Learn of the peers near this one, by asking others, and be learnt of by them. May take long."""
        await self._dht.peer_routing.find_closest_peers_network(ID.from_string(self._host.peer_id).to_bytes())
