"""Direct connections between peers that a relay connects: hole punching, as libp2p's DCUtR has it on the wire.

Both peers are behind routers that let out what their own machines begin, and let in only the answers. So both begin at once: the one that
was reached through the relay says when, over the relayed connection, and at that moment each dials the address at which the other's dial
will come out of its router. Each router then takes the other's first packet for an answer, and the two dials become one connection
(TCP's simultaneous open). On it the usual handshakes follow, with the roles that the relayed connection has.

The dials leave from a port of their own, not from the one that is listened on (which belongs to one process alone, and has nothing to do
with this). That address is foretold: the IP address at which the relay sees this node, and the same port, which most routers keep. Where a
router does not, nothing comes of it, and the relay carries on.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import socket
from collections.abc import Sequence

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from petalnet.errors import PetalnetError, ProtocolError, UsageError
from petalnet.p2p.addresses import IpAddress, ip_of, parse_addr, plain_addr, port_of
from petalnet.p2p.circuit import read_protobuf, write_protobuf
from petalnet.p2p.host import Host
from petalnet.p2p.libp2p_host import finish_stream
from petalnet.p2p.rates import Rates
from petalnet.p2p.reachability import ask_to_dial_back
from petalnet.p2p.transport import TcpStream, tune

logger = logging.getLogger(__name__)

DCUTR = TProtocol("/libp2p/dcutr")
ATTEMPTS = 3
PAUSE_BETWEEN_ATTEMPTS_S = 1.0
"""Seconds before the second attempt, and twice that before the third."""
ATTEMPT_S = 3.0
"""Seconds for which both dial: the second packet of a dial goes out after one, the third after three."""
PAUSE_S = (0.0005, 0.004)
"""Seconds between dials, drawn anew each time, where a router answers those that come too early with a refusal: then the two dials have to
be under way at the same time, which for near peers is a matter of luck, and of short pauses."""
MOST_REFUSED = 60
"""Refusals of one target after which it is left alone."""
EXCHANGE_S = 15.0
"""For a whole attempt, the handshakes included."""
AGAIN_AFTER_S = 60.0
"""Seconds after which the same peer may make this node try again; the attempts in a row are free."""
MAX_TARGETS = 2
LOWEST_PORT = 1024
"""Nobody is made to knock at the doors of well-known services."""
OBSERVED_FOR_S = 120.0

Target = tuple[IpAddress, int]


class HolePunching:
    """Tries to make relayed connections direct, on a host, while `run` runs."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._limits = host.limits
        self._nursery: trio.Nursery | None = None
        self._asking = trio.Lock()
        self._under_way: set[str] = set()
        self._rates = Rates(1 / AGAIN_AFTER_S, ATTEMPTS, capacity=host.limits.max_connections)
        self._observed: dict[str, tuple[IpAddress, float]] = {}  # where a relay sees this node, and until when (trio time) that counts
        host.libp2p.set_stream_handler(DCUTR, self._serve)
        host.on_peer_found(self._on_peer_found)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as self._nursery:
            await trio.sleep_forever()

    # ---- the side that was reached through the relay

    def _on_peer_found(self, peer_id: str) -> None:
        if self._nursery is not None and self._relay_to(peer_id, direction="in") is not None:
            self._nursery.start_soon(self._lead, peer_id)

    async def _lead(self, peer_id: str) -> None:
        if peer_id in self._under_way or len(self._under_way) >= self._limits.max_hole_punches:
            return
        self._under_way.add(peer_id)
        try:
            for attempt in range(ATTEMPTS):
                await trio.sleep(attempt * PAUSE_BETWEEN_ATTEMPTS_S)
                if self._host.is_direct(peer_id) or not self._host.is_connected(peer_id):
                    return
                try:
                    with trio.move_on_after(EXCHANGE_S):
                        if await self._try(peer_id):
                            return
                except (BaseLibp2pError, PetalnetError, OSError, ValueError, trio.TooSlowError) as error:  # ValueError: of lengths
                    logger.debug("no direct connection to peer %s: %r", peer_id, error)
        finally:
            self._under_way.discard(peer_id)

    async def _try(self, peer_id: str) -> bool:
        async with _Port() as port:
            own = await self._own_addr(peer_id, port.number)
            stream = await self._host.libp2p.new_stream(ID.from_string(peer_id), [DCUTR])
            try:
                began = trio.current_time()
                await write_protobuf(stream, HolePunch(type=HolePunch.CONNECT, ObsAddrs=[own]))
                targets = _targets(await read_protobuf(stream, HolePunch), HolePunch.CONNECT)
                round_trip_s = trio.current_time() - began
                await write_protobuf(stream, HolePunch(type=HolePunch.SYNC))
            except BaseException:
                with trio.CancelScope(shield=True):
                    await stream.reset()
                raise
            await finish_stream(stream, self._limits.linger)
            await trio.sleep(round_trip_s / 2)  # now the peer has read it
            return await self._connect(peer_id, port, targets, initiator=False)

    # ---- the side that came through the relay

    async def _serve(self, stream: INetStream) -> None:
        if not isinstance(stream, NetStream):
            raise TypeError(f"libp2p gave a {type(stream).__name__} for a stream")
        peer_id = str(stream.muxed_conn.peer_id)
        if self._relay_to(peer_id, direction="out") is None or len(self._under_way) >= self._limits.max_hole_punches:
            raise ProtocolError(f"peer {peer_id} asks for a hole to be punched where none is wanted", peer_id)
        if peer_id in self._under_way or not self._rates.take(peer_id, trio.current_time()):
            raise ProtocolError(f"peer {peer_id} asks for too many holes", peer_id)
        self._under_way.add(peer_id)
        try:
            with trio.fail_after(EXCHANGE_S):
                async with _Port() as port:
                    targets = _targets(await read_protobuf(stream, HolePunch), HolePunch.CONNECT)
                    own = await self._own_addr(peer_id, port.number)
                    await write_protobuf(stream, HolePunch(type=HolePunch.CONNECT, ObsAddrs=[own]))
                    _targets(await read_protobuf(stream, HolePunch), HolePunch.SYNC)
                    await self._connect(peer_id, port, targets, initiator=True)
        finally:
            self._under_way.discard(peer_id)

    # ---- both

    def _relay_to(self, peer_id: str, *, direction: str) -> str | None:
        """The relay through which a peer is connected, where it is so only and came (or was dialled) that way."""
        if self._host.is_direct(peer_id):
            return None
        statuses = (status for status in self._host.peers() if status.peer_id == peer_id and status.direction == direction)
        return next((status.relay for status in statuses if status.relay is not None), None)

    async def _own_addr(self, peer_id: str, port: int) -> bytes:
        """The address at which a dial from `port` will be seen by the peer."""
        relay_id = self._relay_to(peer_id, direction="in") or self._relay_to(peer_id, direction="out")
        if relay_id is None:
            raise ProtocolError(f"peer {peer_id} is not behind a relay", peer_id)
        async with self._asking:  # several peers may want to know at once
            ip, until = self._observed.get(relay_id, (None, 0.0))
            if ip is None or until < trio.current_time():
                ip = (await ask_to_dial_back(self._host, relay_id, ())).observed
                self._observed = {relay: seen for relay, seen in self._observed.items() if seen[1] >= trio.current_time()}
                self._observed[relay_id] = ip, trio.current_time() + OBSERVED_FOR_S
        return bytes(Multiaddr(f"/ip{ip.version}/{ip}/tcp/{port}").to_bytes())

    async def _connect(self, peer_id: str, port: _Port, targets: Sequence[Target], *, initiator: bool) -> bool:
        """Dial until both dials meet, and secure what comes of it; False where nothing does."""
        connected = await port.dial(targets)
        if connected is None:
            logger.debug("no direct connection to peer %s: the dials did not meet", peer_id)
            return False
        tune(connected)
        raw = RawConnection(TcpStream(connected), initiator)
        swarm = self._host.libp2p.swarm
        try:
            with trio.fail_after(self._limits.handshake_timeout):
                if initiator:
                    await swarm.upgrade_outbound_raw_conn(raw, ID.from_string(peer_id))
                else:
                    await swarm.upgrade_inbound_raw_conn(raw, raw.get_transport_addresses()[0])
        except BaseException:
            with trio.CancelScope(shield=True):
                await raw.close()
            raise
        if not self._host.is_direct(peer_id):
            return False
        logger.info("connected directly to peer %s, without the relay", peer_id)
        self._host.measure_again(peer_id)
        return True


class _Port:
    """A local TCP port that is kept for dialling out from it, as often as it takes."""

    def __init__(self) -> None:
        self._keeper = socket.socket()
        self.number = 0

    async def __aenter__(self) -> _Port:
        self._keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._keeper.bind(("", 0))
        self.number = self._keeper.getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._keeper.close()

    async def dial(self, targets: Sequence[Target]) -> trio.socket.SocketType | None:
        """A socket that is connected to one of the targets; None where none is in time."""
        won: list[trio.socket.SocketType] = []

        async def dial(ip: IpAddress, port: int) -> None:
            refusal = ""
            for _ in range(MOST_REFUSED):
                dialling = trio.socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6)
                try:
                    dialling.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    await dialling.bind(("", self.number))
                    await dialling.connect((str(ip), port))
                except OSError as error:
                    dialling.close()
                    refusal = str(error)
                    await trio.sleep(random.uniform(*PAUSE_S))
                except BaseException:
                    dialling.close()
                    raise
                else:
                    if won:
                        dialling.close()
                    else:
                        won.append(dialling)
                        nursery.cancel_scope.cancel()
                    return
            logger.debug("%s port %d: %s, %d times", ip, port, refusal, MOST_REFUSED)

        with trio.move_on_after(ATTEMPT_S):
            async with trio.open_nursery() as nursery:
                for ip, port in targets:
                    nursery.start_soon(dial, ip, port)
        return won[0] if won else None


def _targets(message: HolePunch, kind: int) -> list[Target]:
    """Where the peer's dial will come from. Raises ProtocolError where the message is not of the kind that has its turn."""
    if message.type != kind:
        raise ProtocolError("a message of hole punching came out of turn")
    found: list[Target] = []
    for data in message.ObsAddrs[:16]:
        try:
            addr = parse_addr(plain_addr(str(Multiaddr(data))))
        except (UsageError, ValueError):  # every error of the multiaddr package is a ValueError; peers may tell QUIC addresses too
            continue
        ip = ip_of(addr)
        if ip is not None and port_of(addr) >= LOWEST_PORT and _may_be_dialled(ip):
            found.append((ip, port_of(addr)))
    return found[:MAX_TARGETS]


def _may_be_dialled(ip: IpAddress) -> bool:
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return not (ip.is_loopback or ip.is_multicast or ip.is_unspecified or ip.is_link_local or ip == ipaddress.ip_address("255.255.255.255"))
