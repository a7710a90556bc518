"""A node's place in the network: it listens, dials, serves protocols, opens streams, and notices when a peer is gone.

    async with open_host(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/31330"]) as host:
        host.serve(FORWARD, handle_forward)
        stream = await host.open_stream(peer_id, FORWARD, addrs=["/ip4/10.0.0.1/tcp/31330"])

What lies beneath is libp2p. No peer can end a node by what it sends: whatever goes wrong on a stream ends that stream.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht.common import PROTOCOL_ID as KADEMLIA_ID
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from petalnet.errors import AddressInUse, PeerUnreachable, PetalnetError, UnsupportedError, UsageError
from petalnet.p2p.addresses import parse_addr, plain_addr, reachable_addrs
from petalnet.p2p.admission import Admission
from petalnet.p2p.budget import Budget
from petalnet.p2p.dialect import describe_foreign, foreign_version
from petalnet.p2p.dialler import Dialler, abort, is_good
from petalnet.p2p.heartbeat import Heartbeat, Pings, serve_ping
from petalnet.p2p.identity import Identity
from petalnet.p2p.libp2p_host import Libp2pHost, finish_stream, reason_of
from petalnet.p2p.mux import MuxConnection
from petalnet.p2p.mux_stream import MuxStream
from petalnet.p2p.peer_status import PeerStatus
from petalnet.p2p.protocol_server import ProtocolServer
from petalnet.p2p.protocols import PING, Limits, Protocol
from petalnet.p2p.quiet import tame_logging
from petalnet.p2p.security import NoiseSession
from petalnet.p2p.stock_streams import StockStream, bound
from petalnet.p2p.streams import ByteStream, Served, Stream
from petalnet.p2p.transport import caller_of, is_address_in_use

__all__ = ["Host", "Stream", "open_host"]

logger = logging.getLogger(__name__)
tame_logging()

CONNECT_TIMEOUT_S = 10.0
LIBP2P_CONNECT_TIMEOUT_S = 3.0
"""Seconds for what libp2p dials by itself: peers that it heard of, many of which are long gone."""
CLOSE_TIMEOUT_S = 0.5
IDENTIFIED_WITHIN_S = 2.0
"""For a peer to say which protocols it serves, where that has to be known."""
TELL_VERSION_EVERY_S = 60.0
"""Seconds between two warnings of that kind: peer ids cost nothing, and each could bring a line into the log."""
PARTING_S = 1.0
"""Between finding out that a peer speaks another version and ending the connection: the peer needs it to find out as well."""


class Host:
    """A running host; made by `open_host`.

    Attributes:
        identity: who this node is.
        peer_id: its peer id, base58.
        addrs: full multiaddrs (ending in /p2p/…) at which others reach it, those that reach farthest first; empty where it only dials.
        admission: who may connect.
        limits: what peers may take.
        libp2p: the host beneath; for the other modules of this package only.
    """

    def __init__(self, identity: Identity, nursery: trio.Nursery, announce: Sequence[str], admission: Admission, limits: Limits) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.admission = admission
        self.limits = limits
        self._announce = list(announce)
        self._plain_addrs: list[str] = []
        self.libp2p = Libp2pHost(
            identity,
            opener=self._open_for_libp2p,
            addrs=lambda: self._plain_addrs,
            admission=admission,
            limits=limits,
            round_trip_s=self._shortest_round_trip_s,
            on_offence=self.offence,
            on_identified=self._on_identified,
        )
        self._budget = Budget(limits)
        self._nursery = nursery
        self._heartbeats: dict[str, Heartbeat] = {}
        self._pings = Pings(self._open_ping, self._last_heard)
        self._lost_callbacks: list[Callable[[str], None]] = []
        self._found_callbacks: list[Callable[[str], None]] = []
        self._identified: set[str] = set()
        self._told_version_at = float("-inf")
        self._identified_more = trio.lowlevel.ParkingLot()
        self._dialler = Dialler(self.libp2p, limits, admission)
        self.circuits = self._dialler.circuits
        self.circuits.finish_in(nursery)
        self.libp2p.swarm.register_notifee(_Notifee(self))
        self.serve(PING, serve_ping)

    @property
    def addrs(self) -> list[str]:
        return [f"{addr}/p2p/{self.peer_id}" for addr in self._plain_addrs]

    def serve(self, protocol: Protocol, handler: Callable[[Stream], Awaitable[None]]) -> None:
        """Run `handler` for each stream of `protocol` that a peer opens, from now on.

        The stream is closed when the handler returns. A PetalnetError that it raises is told to the peer; any other exception is
        logged, and the peer learns only that there was one.
        """
        server = ProtocolServer(protocol, handler, wrap=self._served_stream, capacity=self.limits.max_connections)
        self.libp2p.set_stream_handler(TProtocol(protocol.id), server.serve)
        self._nursery.start_soon(server.end_idle_streams)

    async def connect(self, peer_id: str, addrs: Sequence[str] = (), *, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Make sure that there is a connection to the peer.

        Args:
            peer_id: the peer, base58; whoever answers at an address has to prove that it is this one.
            addrs: multiaddrs to try, beside those that are known from before; a /p2p/ part at their end is allowed.
            timeout_s: seconds for all of it.
        Raises:
            PeerUnreachable: none of the addresses answered as that peer in time, or none is known.
        """
        await self._dialler.connection(peer_id, addrs, timeout_s)

    async def check_version(self, peer_id: str) -> None:
        """Make sure that a connected peer is no petalnet node of another version, which takes a round trip where it may be one.

        Raises:
            NotAdmitted: it is; one line says which of the two has to be updated.
        """
        connection = self._dialler.live(peer_id)
        if connection is not None and isinstance(connection.muxed_conn, MuxConnection):
            return  # whose name has the version in it
        with trio.move_on_after(IDENTIFIED_WITHIN_S):
            while peer_id not in self._identified and self.is_connected(peer_id):
                await self._identified_more.park()
        self.admission.check(peer_id)

    async def open_stream(
        self, peer_id: str, protocol: Protocol, *, addrs: Sequence[str] = (), timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Stream:
        """A new stream to a peer, which is connected to where it is not yet; arguments as in `connect`.

        On a connection that stands this takes no round trip: whether the peer serves the protocol shows with its first answer.

        Raises:
            PeerUnreachable: there is no connection and none can be made, or the peer does not answer in time.
            UnsupportedError: the peer, which is no petalnet node, does not serve the protocol.
        """
        for again in (True, False):
            connection = await self._dialler.connection(peer_id, addrs, timeout_s)
            if not isinstance(connection.muxed_conn, MuxConnection):
                break
            try:
                return self._stream(connection.muxed_conn.open(protocol.id), peer_id, protocol)
            except MuxedConnUnavailable as error:  # it has ended this moment
                self._check_peer(peer_id)
                if not again:
                    raise PeerUnreachable(f"the connection to peer {peer_id} broke", peer_id) from error
        try:
            with trio.fail_after(timeout_s):
                raw = await self._new_stream(peer_id, [TProtocol(protocol.id)], addrs, timeout_s)
        except trio.TooSlowError:
            raise PeerUnreachable(f"peer {peer_id} did not open a stream of {protocol.id} within {timeout_s:g} s", peer_id) from None
        return self._stream(self._byte_stream(raw), peer_id, protocol)

    def _served_stream(self, raw: NetStream, protocol: Protocol, pace: Callable[[], Awaitable[None]]) -> Stream:
        peer_id = str(raw.muxed_conn.peer_id)
        caller = caller_of(raw.get_remote_address())
        served = Served(self._budget, pace, offence=lambda reason: self.offence(peer_id, reason), caller=caller)
        return self._stream(self._byte_stream(raw), peer_id, protocol, served)

    def _stream(self, raw: ByteStream, peer_id: str, protocol: Protocol, served: Served | None = None) -> Stream:
        return Stream(raw, peer_id, protocol, limits=self.limits, on_lost=lambda: self._check_peer(peer_id), served=served)

    def _byte_stream(self, raw: NetStream) -> ByteStream:
        if isinstance(raw.muxed_stream, MuxStream):
            return raw.muxed_stream
        return StockStream(raw, self._nursery.start_soon, lambda stream: finish_stream(stream, self.limits.linger))

    def connected_peers(self) -> list[str]:
        """Ids of the peers to which there is a live connection."""
        return [str(peer) for peer in self.libp2p.swarm.connections if self.is_connected(str(peer))]

    def is_connected(self, peer_id: str) -> bool:
        """Whether there is a live connection to the peer."""
        return self._dialler.live(peer_id) is not None

    def is_direct(self, peer_id: str) -> bool:
        """Whether there is a live connection to the peer that leads through no relay."""
        return self._dialler.is_direct(peer_id)

    def remote_ip(self, peer_id: str) -> str | None:
        """The IP address from which a peer's direct connection comes, or to which it leads; None where there is no direct one."""
        return self._dialler.remote_ip(peer_id)

    def round_trip_s(self, peer_id: str) -> float | None:
        """The round trip to a connected peer in seconds (the least of the last heartbeats), or None where it is not known yet."""
        heartbeat = self._heartbeats.get(peer_id)
        return None if heartbeat is None else heartbeat.round_trip_s

    async def ping(self, peer_id: str, timeout_s: float) -> float:
        """One round trip to a connected peer, in seconds: whether it is alive now. It answers also while it computes or is busy otherwise.

        Whatever else comes from the peer in the second half of the time counts as an answer: on a slow link a ping may have to wait.

        Raises:
            PeerUnreachable: it is not connected, or did not answer within `timeout_s`.
        """
        return await self._pings.ping(peer_id, timeout_s)

    def bytes_s(self, peer_id: str) -> float | None:
        """Bytes a second that the link to a connected peer has been seen to carry, or None where that is not known (yet)."""
        connection = self._dialler.live(peer_id)
        session = None if connection is None else connection.muxed_conn.secured_conn  # type: ignore[attr-defined]  # of both muxers
        return session.bytes_s() if isinstance(session, NoiseSession) else None

    def _shortest_round_trip_s(self, peer_id: str) -> float | None:
        heartbeat = self._heartbeats.get(peer_id)
        return None if heartbeat is None else heartbeat.shortest_s

    async def disconnect(self, peer_id: str) -> None:
        """End all connections to a peer at once; streams on them raise PeerLost."""
        for connection in list(self._dialler.all(peer_id)):
            await abort(connection)
        self._check_peer(peer_id)

    def offence(self, peer_id: str, reason: str, weight: float = 1.0) -> None:
        """Note that a peer broke a rule that no honest peer of any version would break; one that goes on so is dropped and kept away.

        Args:
            weight: how much it counts towards `Limits.offence_threshold`.
        """
        logger.debug("peer %s broke a rule (weight %g): %s", peer_id, weight, reason)
        if self.admission.offend(peer_id, weight):
            logger.info("peer %s is dropped and kept away for a while: %s", peer_id, reason)
            self._nursery.start_soon(self.disconnect, peer_id)

    def peers(self) -> list[PeerStatus]:
        """The connections that stand, the oldest first."""
        found = []
        for peer_id in self.connected_peers():
            for connection in self._dialler.all(peer_id):
                session = connection.muxed_conn.secured_conn  # type: ignore[attr-defined]  # of both muxers, not of their interface
                if isinstance(connection, SwarmConn) and isinstance(session, NoiseSession) and is_good(connection):
                    found.append(PeerStatus.of(connection, session, self.round_trip_s(peer_id)))
        return sorted(found, key=lambda peer: peer.since)

    def known_addrs(self, peer_id: str) -> list[str]:
        """Addresses of a peer (without /p2p/) that are known from being given, from dialling or from what other peers say."""
        return self._dialler.known_addrs(peer_id)

    @property
    def plain_addrs(self) -> list[str]:
        """The announced addresses without the peer id at their end."""
        return list(self._plain_addrs)

    @property
    def announces_fixed(self) -> bool:
        """Whether the owner said what to announce."""
        return bool(self._announce)

    @property
    def listened_addrs(self) -> list[str]:
        """Where this host listens, by the addresses of this machine's interfaces now, or what its owner told to announce (plain)."""
        listened = [parse_addr(str(addr)) for addr in self.libp2p.get_transport_addrs()]
        return list(dict.fromkeys(self._announce or [known for addr in listened for known in reachable_addrs(addr)]))

    def set_announced(self, addrs: Sequence[str]) -> None:
        """Tell others these addresses (without /p2p/ at their end) from now on."""
        self._plain_addrs = list(dict.fromkeys(addrs))

    def measure_again(self, peer_id: str) -> None:
        """Measure the round trip to a peer anew: there is a better connection to it now."""
        heartbeat = self._heartbeats.pop(peer_id, None)
        if heartbeat is not None:
            heartbeat.stop()
            self._watch(peer_id)

    def _on_identified(self, peer_id: str, protocols: Sequence[str]) -> None:
        """A peer has said what it serves."""
        version = foreign_version(protocols)
        if version is not None:
            why = describe_foreign(peer_id, version)
            is_news = self.admission.turn_away(peer_id, why)
            told = is_news and trio.current_time() >= self._told_version_at + TELL_VERSION_EVERY_S
            logger.log(logging.WARNING if told else logging.DEBUG, "%s", why)
            if told:
                self._told_version_at = trio.current_time()
            self._nursery.start_soon(self._part_from, peer_id)
        elif self.is_connected(peer_id):
            self._identified.add(peer_id)
        self._identified_more.unpark_all()

    async def _part_from(self, peer_id: str) -> None:
        await trio.sleep(PARTING_S)
        await self.disconnect(peer_id)

    def _watch(self, peer_id: str) -> None:
        self._heartbeats[peer_id] = heartbeat = Heartbeat(peer_id)
        self._nursery.start_soon(self._keep_watch, heartbeat)

    def on_peer_lost(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer_id)` whenever the last connection to a peer is gone, be it closed, broken or silent."""
        self._lost_callbacks.append(callback)

    def on_peer_found(self, callback: Callable[[str], None]) -> None:
        """Call `callback(peer_id)` whenever there is a first connection to a peer, whoever dialled."""
        self._found_callbacks.append(callback)

    # ---- streams

    async def _new_stream(
        self, peer_id: str, protocols: Sequence[TProtocol], addrs: Sequence[str], timeout_s: float, *, dial: bool = True
    ) -> NetStream:
        for again in (True, False):
            if not dial and not self.is_connected(peer_id):
                raise PeerUnreachable(f"peer {peer_id} is not connected", peer_id)
            connection = await self._dialler.connection(peer_id, addrs, timeout_s)
            raw: NetStream | None = None
            try:
                raw = await connection.new_stream()
                negotiation = MultiselectCommunicator(raw)
                raw.set_protocol(
                    await self.libp2p.multiselect_client.select_one_of(protocols, negotiation, int(self.limits.negotiation_timeout))
                )
                return raw
            except (BaseLibp2pError, OSError, UnicodeDecodeError) as error:
                if raw is not None:
                    await raw.reset()
                if is_good(connection):  # the peer is there and says no
                    wanted = ", ".join(protocols)
                    if isinstance(error, MultiselectClientError) and "not supported" in str(error):
                        raise UnsupportedError(f"peer {peer_id} does not serve {wanted}", peer_id) from error
                    raise PeerUnreachable(f"peer {peer_id} opened no stream of {wanted}: {reason_of(error)}", peer_id) from error
                self._check_peer(peer_id)
                if not again:
                    raise PeerUnreachable(f"the connection to peer {peer_id} broke: {reason_of(error)}", peer_id) from error
            except trio.Cancelled:
                if raw is not None:
                    with trio.CancelScope(shield=True):
                        await raw.reset()
                raise
        raise PeerUnreachable(f"the connection to peer {peer_id} broke twice", peer_id)

    async def _open_for_libp2p(self, peer: ID, protocols: Sequence[TProtocol]) -> NetStream:
        """Streams for libp2p's own protocols, with the one exception after which gossip tries again.

        Only Kademlia may dial: the others follow each connection, and would bring back one that was ended on purpose.
        """
        try:
            with trio.fail_after(LIBP2P_CONNECT_TIMEOUT_S):
                return await self._new_stream(str(peer), protocols, (), LIBP2P_CONNECT_TIMEOUT_S, dial=KADEMLIA_ID in protocols)
        except (trio.TooSlowError, PetalnetError) as error:
            raise SwarmException(f"no stream to {peer}: {error}") from error

    # ---- peers that come and go

    def _check_peer(self, peer_id: str) -> None:
        """Start or stop what depends on whether the peer is connected, and tell those who want to know."""
        connected, known = self.is_connected(peer_id), peer_id in self._heartbeats
        if connected and not known:
            self._watch(peer_id)
            logger.debug("peer %s is connected", peer_id)
            _tell_all(self._found_callbacks, peer_id)
        elif known and not connected:
            self._heartbeats.pop(peer_id).stop()
            self._identified.discard(peer_id)
            self._identified_more.unpark_all()
            logger.debug("peer %s is gone", peer_id)
            _tell_all(self._lost_callbacks, peer_id)

    async def _keep_watch(self, heartbeat: Heartbeat) -> None:
        """Until the peer is gone or does not answer; then see to it that it is gone."""
        peer_id = heartbeat.peer_id

        await heartbeat.run(
            lambda: self._open_ping(peer_id), last_heard=lambda: self._last_heard(peer_id), peers=lambda: len(self._heartbeats)
        )
        if heartbeat.dead:
            logger.info("peer %s does not answer any more", peer_id)
            await self.disconnect(peer_id)

    async def _open_ping(self, peer_id: str) -> Stream:
        if not self.is_connected(peer_id):
            raise PeerUnreachable(f"peer {peer_id} is not connected", peer_id)
        return await self.open_stream(peer_id, PING)

    def _last_heard(self, peer_id: str) -> float:
        """Trio time at which any byte last came from the peer."""
        sessions = [connection.muxed_conn.secured_conn for connection in self._dialler.all(peer_id)]  # type: ignore[attr-defined]
        return max((session.last_heard for session in sessions if isinstance(session, NoiseSession)), default=float("-inf"))

    def _stock_connections(self) -> int:
        return sum(isinstance(connection.muxed_conn, Yamux) for found in self.libp2p.swarm.connections.values() for connection in found)

    async def _close(self) -> None:
        """Say goodbye to all peers, at once."""
        self._lost_callbacks.clear()
        with trio.CancelScope(shield=True):
            connections = [connection for found in self.libp2p.swarm.connections.values() for connection in found]
            with trio.move_on_after(CLOSE_TIMEOUT_S):
                async with trio.open_nursery() as nursery:
                    for connection in connections:
                        nursery.start_soon(connection.close)
            for connection in connections:
                await abort(connection)

    def _set_addrs(self) -> None:
        self._plain_addrs = self.listened_addrs


def _tell_all(callbacks: Sequence[Callable[[str], None]], peer_id: str) -> None:
    for callback in callbacks:
        try:
            callback(peer_id)
        except Exception:  # not swallowed: logged. The others have to hear of the peer too, and libp2p, which told us, must not fail by it
            logger.exception("a service could not be told of peer %s", peer_id)


class _Notifee(INotifee):
    """Tells the host of connections that come and go."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        if isinstance(conn.muxed_conn, Yamux):
            bound(conn.muxed_conn, self._host._stock_connections)
        self._host._check_peer(str(conn.muxed_conn.peer_id))

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        self._host._check_peer(str(conn.muxed_conn.peer_id))

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """Streams are watched by those who hold them."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """Streams are watched by those who hold them."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Addresses are worked out once all are bound."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """A host listens until it ends."""


@asynccontextmanager
async def open_host(
    identity: Identity,
    *,
    listen: Sequence[str] = (),
    announce: Sequence[str] = (),
    admission: Admission | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Host]:
    """A host that runs as long as the context is open.

    Args:
        identity: who it is.
        listen: multiaddrs to listen on; port 0 means any free one. None at all: it only dials.
        announce: multiaddrs to tell others, in place of those that are listened on.
        admission: who may connect; None for anybody.
        limits: what peers may take; None for what the table says.
    Raises:
        AddressInUse: another program listens on one of the addresses.
        UsageError: one of the addresses is malformed or is none of this machine's.
    """
    wanted = [parse_addr(addr) for addr in listen]
    announced = [parse_addr(plain_addr(addr), whole=addr) for addr in announce]
    failure: Exception | None = None
    # Whoever cancels the context cancels what runs in it; libp2p has to live a little longer, to say goodbye.
    life = trio.CancelScope(shield=True)
    async with trio.open_nursery() as nursery:
        host = Host(identity, nursery, announced, admission or Admission(), limits or Limits())
        try:
            with trio.CancelScope(shield=True):  # what is not started yet could be ended neither by its nursery nor by `life`
                await nursery.start(_run_libp2p, host.libp2p, wanted, life)
            for addr, error in host.libp2p.transport.failures.items():
                raise _listen_error(addr, error) from error
            host._set_addrs()
            yield host
        except Exception as error:  # raised below, bare: leaving the nursery by it would wrap it into a group
            failure = error
        finally:
            await host._close()
            life.cancel()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _run_libp2p(
    libp2p: Libp2pHost, listen: Sequence[str], life: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with life:
        async with libp2p.run([Multiaddr(addr) for addr in listen]):
            task_status.started()
            await trio.sleep_forever()


def _listen_error(addr: str, error: OSError) -> UsageError:
    if is_address_in_use(error):
        return AddressInUse(f"cannot listen on {addr}: another program uses this port")
    return UsageError(f"cannot listen on {addr}: {error.strerror or error}")
