"""Who in the swarm is near a key: libp2p's Kademlia, used for routing only.

Its stores of values and providers are the wrong tool for announcements by many writers, so they are shut: the validator lets only
public keys be stored, which are small and prove themselves. Records are `discovery`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.pubkey import PublicKeyValidator
from libp2p.records.validator import NamespacedValidator
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from petalnet.p2p.host import Host
from petalnet.p2p.libp2p_host import Libp2pHost

logger = logging.getLogger(__name__)

MAX_PEERS_PER_SUBNET = 16
"""Of one public /24 in one bucket of 20: a provider's whole rack may serve, but does not fill the table by itself."""
_RESTART_S = 1.0


class RoutingTable:
    """The table of one node; `run` keeps it going.

    Args:
        host: its host.
        server: whether others may have it in their tables.
        admits: whether a peer may be in the table and be asked in look-ups, by its id.
    """

    def __init__(self, host: Host, *, server: bool, admits: Callable[[str], bool]) -> None:
        self._host = host
        self._admits = admits
        self._dht = KadDHT(
            _SelectiveHost(host.libp2p, admits),  # type: ignore[arg-type]
            DHTMode.SERVER if server else DHTMode.CLIENT,
            validator=NamespacedValidator({"pk": PublicKeyValidator()}, strict_validation=True),
            validator_changed=True,  # otherwise it adds validators of its own
            strict_validation=True,
            max_peers_per_subnet=MAX_PEERS_PER_SUBNET,
        )
        # libp2p takes in whoever asks, answers or is named by others: also a peer that was evicted a moment ago.
        take_in = self._dht.routing_table.add_peer

        async def take_in_admitted(peer_obj: PeerInfo | ID, *, skip_server_mode_check: bool = False) -> bool:
            peer_id = peer_obj if isinstance(peer_obj, ID) else peer_obj.peer_id
            return admits(str(peer_id)) and bool(await take_in(peer_obj, skip_server_mode_check=skip_server_mode_check))

        self._dht.routing_table.add_peer = take_in_admitted  # type: ignore[method-assign]

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

    async def look_up(self, key: bytes, count: int) -> list[str]:
        """The peers nearest to a key in the whole swarm, asking others for theirs. May take long; the caller sets a deadline.

        What is found on the way goes into the table at once, so that a look-up that is cut short was not for nothing.
        """
        return [str(peer) for peer in await self._dht.peer_routing.find_closest_peers_network(key, count)]

    async def refresh(self) -> None:
        """Learn of the peers near this one, by asking others, and be learnt of by them. May take long."""
        await self._dht.peer_routing.find_closest_peers_network(ID.from_string(self._host.peer_id).to_bytes())


class _SelectiveHost:
    """The host as Kademlia sees it: a look-up that comes across a peer that is avoided goes on at once instead of waiting for it."""

    def __init__(self, host: Libp2pHost, admits: Callable[[str], bool]) -> None:
        self._host = host
        self._admits = admits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> NetStream:
        if not self._admits(str(peer_id)):
            raise SwarmException(f"peer {peer_id} is avoided")
        return await self._host.new_stream(peer_id, protocol_ids)
