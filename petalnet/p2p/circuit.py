"""Connections through a relay: libp2p's circuit relay v2, as the two ends of a circuit see it.

A peer that nobody can reach asks a relay for a *reservation* (protocol `hop`) and keeps its connection to it. Whoever wants to reach that
peer asks the relay for a *circuit* (`hop` again), the relay passes the wish on (`stop`), and from then on it copies bytes between the two
streams. On those bytes the two ends do what they would do on a TCP connection: Noise, the muxer, streams. So the relay sees who talks to
whom, when and how much, and nothing of what is said.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.exceptions import StreamEOF, StreamReset
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from petalnet.errors import PeerUnreachable, ProtocolError, UsageError
from petalnet.p2p.addresses import PeerAddress, circuit_addr, ip_of, parse_peer, relay_of
from petalnet.p2p.identity import public_key_bytes
from petalnet.p2p.libp2p_host import Libp2pHost, finish_stream
from petalnet.p2p.mux_stream import MuxStream
from petalnet.p2p.protocols import Limits

logger = logging.getLogger(__name__)

HOP = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP = TProtocol("/libp2p/circuit/relay/0.2.0/stop")
MAX_MESSAGE_BYTES = 4096
"""Of the protocol's own messages: a peer id, a handful of addresses, numbers."""
_PIECE = 64 * 1024
MAX_RELAY_ADDRS = 3
"""Addresses of one relay that are told to others; they have to fit into records several times over."""

P = TypeVar("P", bound=ProtobufMessage)


async def read_protobuf(stream: NetStream, kind: type[P]) -> P:
    """The next message, which comes behind its length. Raises ProtocolError; libp2p's errors where the stream ends."""
    try:
        message = kind()
        message.ParseFromString(await read_varint_prefixed_bytes_limited(stream, MAX_MESSAGE_BYTES))
    except DecodeError as error:
        raise ProtocolError(f"peer {stream.muxed_conn.peer_id} sent what is no {kind.__name__}") from error
    return message


async def write_protobuf(stream: NetStream, message: ProtobufMessage) -> None:
    """Send a message behind its length."""
    await stream.write(encode_varint_prefixed(message.SerializeToString()))


def status_name(status: int) -> str:
    """A relay's answer in words."""
    names = {int(value): name for name, value in Status.items()}
    return names[status].lower().replace("_", " ") if status in names else f"status {status}"


def peer_of(message: PeerId) -> ID:
    """The peer that a message names. Raises ProtocolError where that is no id of an ed25519 key."""
    peer = ID(message.id)
    if len(message.id) > 64 or public_key_bytes(str(peer)) is None:
        raise ProtocolError("a circuit message names no peer")
    return peer


def is_relayed(connection: object) -> bool:
    """Whether a connection of the swarm leads through a relay."""
    return isinstance(connection, SwarmConn) and connection.get_connection_type() is ConnectionType.RELAYED


@dataclass(frozen=True)
class Reservation:
    """A relay's promise to pass circuits on to this node.

    Attributes:
        relay_id: the relay.
        addrs: addresses, without this node's own id, by which others reach it through the relay.
        expires: unix seconds.
    """

    relay_id: str
    addrs: tuple[str, ...]
    expires: float


class Incoming:
    """What comes on a stream of a circuit, with a window that fits: the muxer's own reading would let far less be under way.

    Where the connection beneath has libp2p's stock muxer, that one's reading has to do.
    """

    def __init__(self, stream: NetStream, window: int) -> None:
        self._stream = stream
        self._window = window
        self._rest = memoryview(b"")

    async def read(self, n: int) -> bytes | memoryview:
        """What has come, at most `n` bytes; empty at the end of the stream. Raises libp2p's errors where it broke."""
        muxed = self._stream.muxed_stream
        if not isinstance(muxed, MuxStream):
            try:
                return await self._stream.read(n)
            except StreamEOF:
                return b""
        if not self._rest:
            await muxed.wait(1)
            if not muxed.held:
                if muxed.ended and muxed.reset_reason is None and not muxed.is_lost:
                    return b""
                raise StreamReset("the stream was reset")
            pieces = muxed.take()
            self._rest = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            connection = muxed.muxed_conn
            room = self._window - connection.mux.window(muxed.number)
            if room >= self._window // 4:
                connection.mux.grant(muxed.number, room)
                connection.pump()
        data, self._rest = self._rest[:n], self._rest[n:]
        return data


class Circuit(ReadWriteCloser):
    """A stream to a relay, as the raw connection beneath a secured one.

    Attributes:
        relay_id: the relay, base58.
    """

    def __init__(self, stream: NetStream, window: int, on_close: Callable[[NetStream], None] | None = None) -> None:
        self.relay_id = str(stream.muxed_conn.peer_id)
        self._stream = stream
        self._incoming = Incoming(stream, window)
        self._on_close = on_close
        self._reading: trio.CancelScope | None = None
        self.closed = trio.Event()

    async def read(self, n: int | None = None) -> bytes:
        """What has come, at most `n` bytes; empty at the end."""
        if not self.closed.is_set():
            with trio.CancelScope() as self._reading:
                try:
                    return bytes(await self._incoming.read(_PIECE if n is None else n))
                except (BaseLibp2pError, OSError) as error:
                    raise ConnectionClosedError(f"the circuit through {self.relay_id} is gone: {error}") from error
        raise ConnectionClosedError("the circuit was closed")

    async def write(self, data: bytes) -> None:
        if self.closed.is_set():
            raise ConnectionClosedError("the circuit was closed")
        try:
            await self._stream.write(data)
        except (BaseLibp2pError, OSError) as error:
            raise ConnectionClosedError(f"the circuit through {self.relay_id} is gone: {error}") from error

    async def close(self) -> None:
        """End this side; whoever reads stops. Never fails."""
        if self.closed.is_set():
            return
        self.closed.set()
        if self._reading is not None:
            self._reading.cancel()
        try:
            await self._stream.close_write()
        except (BaseLibp2pError, OSError) as error:
            logger.debug("a circuit through %s ended: %r", self.relay_id, error)
        finally:
            if self._on_close is not None:
                self._on_close(self._stream)

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: where the other end is, only the relay knows."""
        return None


class Circuits:
    """The circuits that begin or end at this host."""

    def __init__(self, libp2p: Libp2pHost, limits: Limits) -> None:
        self._libp2p = libp2p
        self._limits = limits
        self._nursery: trio.Nursery | None = None
        self.reservations: Mapping[str, Reservation] = {}
        libp2p.set_stream_handler(STOP, self._accept)

    def finish_in(self, nursery: trio.Nursery) -> None:
        """Where the ends of circuits are waited for."""
        self._nursery = nursery

    async def reserve(self, relay_id: str, relay_addrs: tuple[str, ...]) -> Reservation:
        """Ask a connected peer to relay for this node, or to go on doing so.

        Args:
            relay_addrs: direct addresses (without /p2p/) at which the relay is known to answer.
        Raises:
            PeerUnreachable: it refuses or does not answer.
        """
        answer = await self._ask(relay_id, HopMessage(type=HopMessage.RESERVE))
        now = time.time()
        expires = float(answer.reservation.expire)
        if expires <= now:
            raise PeerUnreachable(f"relay {relay_id} gave a reservation that is over already", relay_id)
        relays = [PeerAddress(relay_id, addr) for addr in relay_addrs]
        for data in answer.reservation.addrs[:16]:
            try:
                relays.append(parse_peer(_text(data, relay_id)))
            except UsageError as error:
                logger.debug("relay %s told an address that is none: %s", relay_id, error)
        far = any(not _is_loopback(addr) for addr in relay_addrs)  # then what the relay calls itself on its own machine helps nobody
        usable = [
            relay
            for relay in dict.fromkeys(relays)
            if relay.peer_id == relay_id and relay_of(relay.addr) is None and not (far and _is_loopback(relay.addr))
        ]
        addrs = tuple(circuit_addr(relay) for relay in usable[:MAX_RELAY_ADDRS])
        return Reservation(relay_id, addrs, min(expires, now + self._limits.relay_reservation))

    async def _ask(self, relay_id: str, request: HopMessage) -> HopMessage:
        """A relay's answer to a request that leads to nothing else on the stream."""
        stream, answer = await self._request(relay_id, request)
        await self._end(stream)
        return answer

    async def _request(self, relay_id: str, request: HopMessage) -> tuple[NetStream, HopMessage]:
        """The stream and the answer, which is OK. Raises PeerUnreachable."""
        stream: NetStream | None = None
        reason = "no answer in time"
        with trio.move_on_after(self._limits.relay_step):
            try:
                stream = await self._libp2p.new_stream(ID.from_string(relay_id), [HOP])
                await write_protobuf(stream, request)
                answer = await read_protobuf(stream, HopMessage)
            except (BaseLibp2pError, ProtocolError, OSError, ValueError) as error:  # ValueError: what the reader of lengths raises
                reason = str(error) or type(error).__name__
            except BaseException:
                await _reset(stream)
                raise
            else:
                if answer.type == HopMessage.STATUS and answer.status == Status.OK:
                    return stream, answer
                reason = status_name(answer.status)
        await _reset(stream)
        raise PeerUnreachable(f"relay {relay_id} refused: {reason}", relay_id)

    async def dial(self, relay_id: str, peer: ID, addr: str) -> SwarmConn:
        """A secured connection to `peer` through a relay that is connected; `addr` is the peer's circuit address.

        Raises:
            PeerUnreachable: the relay refuses or does not answer; libp2p's errors where the peer behind it is not the one.
        """
        stream, _ = await self._request(relay_id, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=peer.to_bytes())))
        circuit = Circuit(stream, self._limits.circuit_window, self._finish)
        connection: SwarmConn | None = None
        try:
            with trio.fail_after(self._limits.handshake_timeout):
                connection = await self._libp2p.swarm.upgrade_outbound_raw_conn(_raw(circuit, addr, initiator=True), peer)
            return connection
        except trio.TooSlowError:
            raise PeerUnreachable(f"peer {peer} did not answer through relay {relay_id}", str(peer)) from None
        finally:
            if connection is None:
                await _reset(stream)

    async def _accept(self, stream: INetStream) -> None:
        """Serve `stop`: somebody wants to reach this node through a relay."""
        if not isinstance(stream, NetStream):
            raise TypeError(f"libp2p gave a {type(stream).__name__} for a stream")
        relay_id = str(stream.muxed_conn.peer_id)
        with trio.fail_after(self._limits.relay_step):
            request = await read_protobuf(stream, StopMessage)
            if request.type != StopMessage.CONNECT:
                await write_protobuf(stream, StopMessage(type=StopMessage.STATUS, status=Status.UNEXPECTED_MESSAGE))
                return
            reservation = self.reservations.get(relay_id)
            if reservation is None:
                await write_protobuf(stream, StopMessage(type=StopMessage.STATUS, status=Status.PERMISSION_DENIED))
                return
            peer_id = str(peer_of(request.peer))
            await write_protobuf(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
        logger.debug("peer %s comes through relay %s", peer_id, relay_id)
        circuit = Circuit(stream, self._limits.circuit_window)
        raw = _raw(circuit, circuit_addr(PeerAddress(relay_id, _relay_addr(reservation))), initiator=False)
        # The name in the request is only what the relay says; who it is, the handshake proves.
        await self._libp2p.swarm.upgrade_inbound_raw_conn(raw, raw.get_transport_addresses()[0])
        await circuit.closed.wait()

    def _finish(self, stream: NetStream) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(finish_stream, stream, self._limits.linger)

    async def _end(self, stream: NetStream) -> None:
        await stream.close()
        self._finish(stream)


def _raw(circuit: Circuit, addr: str, *, initiator: bool) -> RawConnection:
    return RawConnection(circuit, initiator, ConnectionType.RELAYED, [Multiaddr(addr)])


def _relay_addr(reservation: Reservation) -> str:
    relay = relay_of(reservation.addrs[0]) if reservation.addrs else None
    return relay.addr if relay is not None else "/ip4/0.0.0.0/tcp/0"


def _is_loopback(addr: str) -> bool:
    ip = ip_of(addr)
    return ip is not None and ip.is_loopback


def _text(data: bytes, relay_id: str) -> str:
    """A relay's own address as text, with its id at its end (which some leave out)."""
    try:
        text = str(Multiaddr(data))
    except ValueError as error:  # every error of the multiaddr package is one
        raise UsageError("it cannot be read") from error
    return text if text.endswith(relay_id) else f"{text}/p2p/{relay_id}"


async def _reset(stream: NetStream | None) -> None:
    if stream is not None:
        with trio.CancelScope(shield=True):
            await stream.reset()
