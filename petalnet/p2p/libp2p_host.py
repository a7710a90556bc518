"""libp2p's host and swarm, set up as petalnet needs them, and the guard that lets no peer harm them.

Only `host`, `discovery` and `gossip` use what is here; everything above them deals in `Host` and `Stream`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p import new_swarm
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from petalnet.p2p.identity import Identity
from petalnet.p2p.security import NOISE_ID, Noise
from petalnet.p2p.transport import Tcp

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1000
MAX_CONNECTIONS_PER_PEER = 4
MAX_INBOUND_STREAMS_PER_PEER = 256
"""Of all protocols together, those still in negotiation included."""
NEGOTIATION_TIMEOUT_S = 10.0
LINGER_S = 5.0
"""Seconds for which a closed stream waits for the peer to close its side, before it is reset."""

StreamOpener = Callable[[ID, Sequence[TProtocol]], Awaitable[NetStream]]
AddrsSource = Callable[[], Sequence[str]]


class Libp2pHost(BasicHost):
    """A libp2p host whose outbound streams are opened by `opener`, so that libp2p's own protocols dial as petalnet does.

    Attributes:
        swarm: the network beneath.
        transport: the TCP transport, with what could not be listened on.
    """

    def __init__(self, identity: Identity, *, opener: StreamOpener, addrs: AddrsSource) -> None:
        private = Ed25519PrivateKey.from_bytes(identity.private_bytes)
        key_pair = KeyPair(private, private.get_public_key())
        self.transport = Tcp()
        network = new_swarm(
            key_pair=key_pair,
            sec_opt={NOISE_ID: Noise(key_pair)},  # nothing else: the default list ends in plaintext
            muxer_opt={TProtocol(YAMUX_ID): Yamux},
            transports=[self.transport],
            retry_config=RetryConfig(max_retries=0),
            connection_config=ConnectionConfig(
                max_connections=MAX_CONNECTIONS,
                high_watermark=MAX_CONNECTIONS,
                min_connections=0,
                low_watermark=0,
                max_connections_per_peer=MAX_CONNECTIONS_PER_PEER,
                outbound_stream_protocol_negotiation_timeout=NEGOTIATION_TIMEOUT_S,
                inbound_stream_protocol_negotiation_timeout=NEGOTIATION_TIMEOUT_S,
            ),
        )
        if not isinstance(network, Swarm):
            raise TypeError(f"libp2p gave a {type(network).__name__} for a swarm")
        network.auto_connector = _NoAutoConnector(network)
        # Its limits are on rates (10 dials a second to a peer), which hinder us; the numbers above and in the guard bound what peers take.
        network.set_resource_manager(None)
        super().__init__(
            network,
            addrs_factory=lambda _: [Multiaddr(addr) for addr in addrs()],
            # What strangers claim to see would be announced to others; whoever is behind a NAT passes --announce-maddrs.
            disable_identify_address_discovery=True,
        )
        self.swarm = network
        self._opener = opener
        self._inbound: Counter[ID] = Counter()
        self._serve_stream = network.common_stream_handler
        network.set_stream_handler(self._guarded)

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> NetStream:
        return await self._opener(peer_id, protocol_ids)

    async def _guarded(self, stream: INetStream) -> None:
        """Serve an inbound stream, whatever happens on it; an exception that got away from here would end the whole node."""
        if not isinstance(stream, NetStream):
            raise TypeError(f"libp2p gave a {type(stream).__name__} for a stream")
        peer_id = stream.muxed_conn.peer_id
        if self._inbound[peer_id] >= MAX_INBOUND_STREAMS_PER_PEER:
            await stream.reset()
            return
        self._inbound[peer_id] += 1
        try:
            await self._serve_stream(stream)
        except Exception as error:
            logger.debug("a stream of %s with peer %s failed: %r", stream.get_protocol(), peer_id, error)
            await stream.reset()
        else:
            await finish_stream(stream)
        finally:
            self._inbound[peer_id] -= 1
            if not self._inbound[peer_id]:
                del self._inbound[peer_id]


class _NoAutoConnector(AutoConnector):
    """Dials nobody: the stock one dials whatever it has heard of, up to half of the connections allowed."""

    async def maybe_connect(self) -> None:
        """Neighbours are discovery's business, and servers their users'."""


async def finish_stream(stream: NetStream) -> None:
    """Close a stream for good: say so, wait for the peer to do the same, and reset it where it does not. Never fails.

    A reset right away would make the peer lose what it has not read yet; without any, the muxer would keep the stream for ever.
    """
    muxed = stream.muxed_stream
    try:
        with trio.move_on_after(LINGER_S):
            await stream.close()
            while not muxed.closed:  # type: ignore[attr-defined]  # an attribute of yamux's streams, not of the interface
                await muxed.read(64 * 1024)
    except (BaseLibp2pError, OSError) as error:  # the end of the stream is one too
        logger.debug("a stream of %s ended: %r", stream.get_protocol(), error)
    if not muxed.closed:  # type: ignore[attr-defined]
        await stream.reset()
