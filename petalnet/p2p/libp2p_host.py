"""libp2p's host and swarm, set up as petalnet needs them, and the guard that lets no peer harm them.

Only `host`, `discovery` and `gossip` use what is here; everything above them deals in `Host` and `Stream`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import trio
from libp2p import new_swarm
from libp2p.abc import IMuxedConn, INetStream, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamReset
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from petalnet.errors import PetalnetError
from petalnet.p2p.admission import Admission
from petalnet.p2p.identity import Identity
from petalnet.p2p.mux import MUX_ID, MuxConnection
from petalnet.p2p.mux_protocol import Reason
from petalnet.p2p.mux_stream import MuxStream
from petalnet.p2p.negotiation import BoundedMultiselect, BoundedMultiselectClient, bound_negotiations
from petalnet.p2p.protocols import Limits
from petalnet.p2p.rates import Rates
from petalnet.p2p.security import Noise
from petalnet.p2p.transport import Tcp, caller_of

logger = logging.getLogger(__name__)

StreamOpener = Callable[[ID, Sequence[TProtocol]], Awaitable[NetStream]]
AddrsSource = Callable[[], Sequence[str]]
T = TypeVar("T")

_OURS = "/petalnet/"
"""How the names of the protocols begin that keep a pace of their own (`protocol_server`)."""


class Libp2pHost(BasicHost):
    """A libp2p host whose outbound streams are opened by `opener`, so that libp2p's own protocols dial as petalnet does.

    Args:
        identity: who it is.
        opener: opens streams.
        addrs: the addresses to tell others.
        admission: who may connect.
        limits: what peers may take.
        round_trip_s: the shortest time to a peer and back, where it is known.
        on_offence: is told of a peer that broke the multiplexer's rules, and how.
        on_identified: is told of a peer, and of the protocols that it says it serves.

    Attributes:
        swarm: the network beneath.
        transport: the TCP transport, with what could not be listened on.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        opener: StreamOpener,
        addrs: AddrsSource,
        admission: Admission,
        limits: Limits,
        round_trip_s: Callable[[str], float | None],
        on_offence: Callable[[str, str], None],
        on_identified: Callable[[str, Sequence[str]], None],
    ) -> None:
        private = Ed25519PrivateKey.from_bytes(identity.private_bytes)
        key_pair = KeyPair(private, private.get_public_key())
        self.transport = Tcp(limits)
        self._announced = addrs
        self._limits = limits

        def mux(secured_conn: ISecureConn, peer_id: ID) -> MuxConnection:
            name = str(peer_id)
            return MuxConnection(
                secured_conn,
                peer_id,
                limits=limits,
                round_trip_s=lambda: round_trip_s(name),
                on_offence=lambda reason: on_offence(name, reason),
            )

        network = new_swarm(
            key_pair=key_pair,
            # Nothing else: the default list ends in plaintext.
            sec_opt={TProtocol(admission.security_id): Noise(key_pair, admission, limits)},
            muxer_opt={TProtocol(MUX_ID): mux, TProtocol(YAMUX_ID): Yamux},  # type: ignore[dict-item]  # called like a class
            transports=[self.transport],
            retry_config=RetryConfig(max_retries=0),
            connection_config=ConnectionConfig(
                max_connections=limits.max_connections,
                high_watermark=limits.max_connections,
                min_connections=0,
                low_watermark=0,
                max_connections_per_peer=limits.max_connections_per_peer,
                inbound_upgrade_timeout=limits.handshake_timeout,
                outbound_upgrade_timeout=limits.handshake_timeout,
                outbound_stream_protocol_negotiation_timeout=limits.negotiation_timeout,
                inbound_stream_protocol_negotiation_timeout=limits.negotiation_timeout,
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
        self.multiselect = BoundedMultiselect(self.multiselect.handlers)
        self.multiselect_client = BoundedMultiselectClient()
        bound_negotiations(network)
        self._add_conn = network.add_conn
        network.add_conn = self._add_connection  # type: ignore[method-assign]
        self.swarm = network
        self._opener = opener
        self._on_identified = on_identified
        self._inbound: Counter[ID] = Counter()
        self._inbound_from: Counter[str] = Counter()  # by address
        rate, capacity = limits.max_libp2p_streams, limits.max_connections
        self._pace_of_peers = Rates(rate, 2 * rate, capacity=capacity)
        self._pace_of_callers = Rates(4 * rate, 8 * rate, capacity=capacity)
        self._serve_stream = network.common_stream_handler
        network.set_stream_handler(self._guarded)
        self._upgrade_inbound = network.upgrade_inbound_raw_conn
        network.upgrade_inbound_raw_conn = self._admit_inbound  # type: ignore[method-assign]
        self._upgrade_outbound = network.upgrade_outbound_raw_conn
        network.upgrade_outbound_raw_conn = self._secure_outbound  # type: ignore[method-assign]

    def get_addrs(self) -> list[Multiaddr]:
        """The announced addresses with this host's id at their end (stock strips all after a relay's id)."""
        return [Multiaddr(f"{addr}/p2p/{self.get_id()}") for addr in self._announced()]

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> NetStream:
        return await self._opener(peer_id, protocol_ids)

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        """As libp2p does it, which tells nobody."""
        await super()._identify_peer(peer_id, reason=reason)
        if peer_id in self._identified_peers:
            try:
                self._on_identified(str(peer_id), self.get_peerstore().get_protocols(peer_id))
            except PeerStoreError:
                logger.debug("peer %s says of no protocol that it serves it", peer_id)
            except Exception:  # libp2p calls this from a task whose failure would end the whole program
                logger.exception("what peer %s serves could not be taken in", peer_id)

    async def _admit_inbound(self, raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
        """As the swarm does it, which keeps to itself why somebody was turned away."""
        try:
            with _errors_of_libp2p():
                return await self._upgrade_inbound(raw_conn, maddr)
        except Exception as error:  # raised again, whatever it is
            address = raw_conn.get_remote_address()
            source = f"{address[0]} port {address[1]}" if address is not None else str(maddr)
            step, reason = str(error.__cause__ or error), reason_of(error)
            logger.debug("a connection from %s came to nothing: %s", source, reason if step == reason else f"{step} ({reason})")
            raise

    async def _secure_outbound(self, raw_conn: IRawConnection, peer_id: ID, pre_scope: Any = None) -> SwarmConn:
        with _errors_of_libp2p():
            return await self._upgrade_outbound(raw_conn, peer_id, pre_scope)

    async def _add_connection(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        """Add a connection to the swarm's; one that ends while it is being added would stay among them for ever."""
        try:
            return await self._add_conn(muxed_conn, direction)
        finally:
            if muxed_conn.is_closed:
                for connection in self.swarm.connections.get(muxed_conn.peer_id, []):
                    if isinstance(connection, SwarmConn) and connection.muxed_conn is muxed_conn:
                        self.swarm.remove_conn(connection)

    async def _guarded(self, stream: INetStream) -> None:
        """Serve an inbound stream, whatever happens on it; an exception that got away from here would end the whole node."""
        if not isinstance(stream, NetStream):
            raise TypeError(f"libp2p gave a {type(stream).__name__} for a stream")
        peer_id, caller, limits = stream.muxed_conn.peer_id, caller_of(stream.get_remote_address()), self._limits
        full = self._inbound.total() >= limits.max_streams or self._inbound_from[caller] >= limits.max_streams_per_address
        if full or self._inbound[peer_id] >= limits.max_streams_per_peer:
            logger.debug("a stream of peer %s was refused: there are too many", peer_id)
            await stream.reset()
            return
        self._inbound[peer_id] += 1
        self._inbound_from[caller] += 1
        try:
            if isinstance(stream.muxed_stream, MuxStream) and stream.muxed_stream.protocol:
                await self._serve_named(stream, stream.muxed_stream)
            else:
                await self._keep_pace(stream)
                await self._serve_stream(stream)
            await finish_stream(stream, self._limits.linger)
        except Exception as error:
            logger.debug("%s with peer %s failed: %r", stream.get_protocol(), peer_id, error)
            try:
                await stream.reset()
            except Exception:
                # What fails here is a defect of ours or of libp2p's, and costs a stream whose connection is about to end anyway.
                logger.exception("a stream of peer %s could not be reset", peer_id)
        finally:
            _less(self._inbound, peer_id)
            _less(self._inbound_from, caller)

    async def _serve_named(self, stream: NetStream, muxed: MuxStream) -> None:
        """Serve a stream whose protocol the peer named when it opened it."""
        protocol = TProtocol(muxed.protocol)
        handler = self.multiselect.handlers.get(protocol)
        if handler is None:
            logger.debug("peer %s asked for %r, which is not served", muxed.muxed_conn.peer_id, muxed.protocol[:80])
            muxed.abandon(Reason.UNSUPPORTED)
            return
        stream.set_protocol(protocol)
        if not protocol.startswith(_OURS):
            await self._keep_pace(stream)
        await handler(stream)

    async def _keep_pace(self, stream: NetStream) -> None:
        """Wait until one more stream may be served for which libp2p works a while. Raises StreamReset where that would take too long."""
        caller = caller_of(stream.get_remote_address())
        places = (self._pace_of_peers, str(stream.muxed_conn.peer_id)), (self._pace_of_callers, caller)
        now = trio.current_time()
        wait = max(rates.wait(name, now) for rates, name in places)
        if wait > self._limits.negotiation_timeout:
            raise StreamReset("the peer opens too many streams of libp2p's protocols")
        for rates, name in places:
            rates.charge(name, now, 1.0)
        if wait:
            await trio.sleep(wait)
        if isinstance(stream.muxed_stream, MuxStream) and stream.muxed_stream.is_over:
            raise StreamReset("the peer has ended the stream")


def _less(counter: Counter[T], name: T) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


@contextmanager
def _errors_of_libp2p() -> Iterator[None]:
    """Let nothing but libp2p's errors and ours out of a handshake.

    A stranger's bytes make the libraries beneath raise errors of all kinds, which nobody above expects where it dials through a relay or
    punches a hole; where the swarm itself dials, it does the same.
    """
    try:
        yield
    except (BaseLibp2pError, PetalnetError, OSError):
        raise
    except Exception as error:
        raise SwarmException(f"a handshake failed: {error or type(error).__name__}") from error


class _NoAutoConnector(AutoConnector):
    """Dials nobody: the stock one dials whatever it has heard of, up to half of the connections allowed."""

    async def maybe_connect(self) -> None:
        """Neighbours are discovery's business, and servers their users'."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Who is gone matters to nobody here; the stock one keeps every peer that ever was."""


async def finish_stream(stream: NetStream, linger_s: float = Limits.linger) -> None:
    """Close a stream for good: say so, wait for the peer to do the same, and reset it where it does not. Never fails.

    A reset right away would make the peer lose what it has not read yet; without any, the muxer would keep the stream for ever.
    """
    muxed = stream.muxed_stream
    if isinstance(muxed, MuxStream):
        muxed.finish()  # it waits by itself
        return
    try:
        with trio.move_on_after(linger_s):
            await stream.close()
            while not muxed.closed:  # type: ignore[attr-defined]  # an attribute of yamux's streams, not of the interface
                await muxed.read(64 * 1024)
    except (BaseLibp2pError, OSError) as error:  # the end of the stream is one too
        logger.debug("%s with peer %s ended: %r", stream.get_protocol(), stream.muxed_conn.peer_id, error)
    if not muxed.closed:  # type: ignore[attr-defined]
        await stream.reset()


def reason_of(error: BaseException) -> str:
    """The innermost cause of an error in a few words, or the error of ours on the way there, which says all."""
    while error.__cause__ is not None and not isinstance(error, PetalnetError):
        error = error.__cause__
    return str(error) or type(error).__name__
