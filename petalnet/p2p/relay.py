"""The relay side of libp2p's circuit relay v2: a node that can be reached stands in for servers that cannot.

It keeps reservations, joins two streams to a circuit where somebody asks for a server that has one, and copies bytes between them until
either side ends, or the circuit has had its share (the numbers are in `protocols.Limits`). What it copies is encrypted between the two
ends. A side that does not read holds up the other, not the relay: what is under way is bounded by the streams' windows.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import trio
from google.protobuf.message import Message as ProtobufMessage
from libp2p.abc import INetStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Reservation as ReservationMessage
from multiaddr import Multiaddr

from petalnet.errors import ProtocolError
from petalnet.p2p.addresses import relay_of
from petalnet.p2p.circuit import HOP, STOP, Incoming, peer_of, read_protobuf, status_name, write_protobuf
from petalnet.p2p.host import Host
from petalnet.p2p.libp2p_host import finish_stream
from petalnet.p2p.transport import caller_of

logger = logging.getLogger(__name__)

_CHUNK = 256 * 1024


class _Refused(Exception):
    """A request is answered with a status other than OK."""

    def __init__(self, status: Status.ValueType) -> None:
        super().__init__(status_name(status))
        self.status = status


@dataclass(frozen=True)
class _Place:
    """A reservation as the relay keeps it: until when (unix seconds), and the caller (see `transport.caller_of`) that it counts for."""

    expires: float
    caller: str


class Relay:
    """Relays for others on a host, from when it is made.

    Args:
        is_reachable: whether others reach this host by themselves, as far as it knows; else it could not stand in for anybody.

    Attributes:
        bytes_relayed: bytes copied so far, both directions of all circuits.
    """

    def __init__(self, host: Host, is_reachable: Callable[[], bool] = lambda: True) -> None:
        self._host = host
        self._limits = host.limits
        self._is_reachable = is_reachable
        self._reservations: dict[str, _Place] = {}
        self._circuits: Counter[str] = Counter()  # by the peer at either end, and by the address where they begin
        self._circuits_in_all = 0
        self.bytes_relayed = 0
        host.libp2p.set_stream_handler(HOP, self._serve)
        host.on_peer_lost(self._on_peer_lost)

    @property
    def circuits(self) -> int:
        """Circuits that are open now."""
        return self._circuits_in_all

    @property
    def reservations(self) -> list[str]:
        """Peers that have a reservation."""
        now = time.time()
        return [peer_id for peer_id, place in self._reservations.items() if place.expires > now]

    def _on_peer_lost(self, peer_id: str) -> None:
        self._reservations.pop(peer_id, None)

    async def _serve(self, stream: INetStream) -> None:
        """One stream of `hop`: a reservation, or a circuit for as long as it lasts."""
        if not isinstance(stream, NetStream):
            raise TypeError(f"libp2p gave a {type(stream).__name__} for a stream")
        source = str(stream.muxed_conn.peer_id)
        try:
            with trio.fail_after(self._limits.relay_step):
                request = await read_protobuf(stream, HopMessage)
            if not self._host.is_direct(source):  # a relay behind a relay would hide who pays
                raise _Refused(Status.PERMISSION_DENIED)
            if request.type == HopMessage.RESERVE:
                await self._write(stream, self._reserve(source))
            elif request.type == HopMessage.CONNECT:
                await self._connect(stream, source, peer_of(request.peer))
            else:
                raise _Refused(Status.UNEXPECTED_MESSAGE)
        except ProtocolError as error:
            logger.debug("relaying for peer %s: %s", source, error)
            await self._write(stream, HopMessage(type=HopMessage.STATUS, status=Status.MALFORMED_MESSAGE))
        except _Refused as refusal:
            logger.debug("relaying for peer %s is refused: %s", source, refusal)
            await self._write(stream, HopMessage(type=HopMessage.STATUS, status=refusal.status))

    async def _write(self, stream: NetStream, message: ProtobufMessage) -> None:
        with trio.fail_after(self._limits.relay_step):
            await write_protobuf(stream, message)

    # ---- reservations

    def _reserve(self, peer_id: str) -> HopMessage:
        now = time.time()
        self._reservations = {other: place for other, place in self._reservations.items() if place.expires > now}
        caller = self._caller(peer_id)
        others = [place for other, place in self._reservations.items() if other != peer_id]
        from_there = sum(place.caller == caller for place in others)
        full = len(others) >= self._limits.max_reservations or from_there >= self._limits.max_reservations_per_address
        if full or not self._is_reachable():
            raise _Refused(Status.RESERVATION_REFUSED)
        self._reservations[peer_id] = _Place(now + self._limits.relay_reservation, caller)
        logger.debug("peer %s has a reservation; %d in all", peer_id, len(self._reservations))
        return HopMessage(
            type=HopMessage.STATUS,
            status=Status.OK,
            limit=self._limit(),
            reservation=ReservationMessage(
                expire=int(now + self._limits.relay_reservation),
                addrs=[Multiaddr(addr).to_bytes() for addr in self._host.addrs if relay_of(addr.rpartition("/p2p/")[0]) is None],
            ),
        )

    def _caller(self, peer_id: str) -> str:
        ip = self._host.remote_ip(peer_id)
        return caller_of(None if ip is None else (ip, 0))

    def _limit(self) -> Limit:
        return Limit(duration=int(self._limits.circuit_lifetime), data=self._limits.circuit_bytes)

    # ---- circuits

    async def _connect(self, stream: NetStream, source: str, target: ID) -> None:
        ends = source, str(target)
        place = self._reservations.get(ends[1])
        if place is None or place.expires <= time.time():
            raise _Refused(Status.NO_RESERVATION)
        caller = f"from {self._caller(source)}"
        if (
            self._circuits_in_all >= self._limits.max_circuits
            or any(self._circuits[end] >= self._limits.max_circuits_per_peer for end in ends)
            or self._circuits[caller] >= self._limits.max_circuits_per_address
        ):
            raise _Refused(Status.RESOURCE_LIMIT_EXCEEDED)
        counted = *ends, caller
        self._circuits.update(counted)
        self._circuits_in_all += 1
        try:
            onward = await self._open_onward(source, target)
            try:
                await self._write(stream, HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit()))
                logger.debug("circuit from %s to %s", *ends)
                await self._join(stream, onward)
                logger.debug("the circuit from %s to %s has ended", *ends)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await onward.reset()
                raise
        finally:
            self._circuits.subtract(counted)
            self._circuits += Counter()  # forget those at zero
            self._circuits_in_all -= 1

    async def _open_onward(self, source: str, target: ID) -> NetStream:
        """The stream to the server that has the reservation, with the circuit accepted on it."""
        onward: NetStream | None = None
        try:
            with trio.fail_after(self._limits.relay_step):
                onward = await self._host.libp2p.new_stream(target, [STOP])
                peer = PeerId(id=ID.from_string(source).to_bytes())
                await write_protobuf(onward, StopMessage(type=StopMessage.CONNECT, peer=peer, limit=self._limit()))
                answer = await read_protobuf(onward, StopMessage)
                if answer.type != StopMessage.STATUS or answer.status != Status.OK:
                    raise ProtocolError(f"peer {target} refuses a circuit: {status_name(answer.status)}")
                return onward
        except (BaseLibp2pError, ProtocolError, OSError, ValueError, trio.TooSlowError) as error:
            logger.debug("no circuit to %s: %s", target, error or type(error).__name__)
            if onward is not None:
                await onward.reset()
            raise _Refused(Status.CONNECTION_FAILED) from error
        except BaseException:
            if onward is not None:
                with trio.CancelScope(shield=True):
                    await onward.reset()
            raise

    async def _join(self, one: NetStream, other: NetStream) -> None:
        """Copy both ways until both have ended, either broke, or the circuit has had its share."""
        left = self._limits.circuit_bytes
        broken = False

        async def copy(source: NetStream, sink: NetStream) -> None:
            nonlocal left, broken
            try:
                incoming = Incoming(source, self._limits.circuit_window)
                while data := await incoming.read(_CHUNK):
                    left -= len(data)
                    if left < 0:
                        logger.debug("a circuit has carried all that it may")
                        break
                    await sink.write(data)  # type: ignore[arg-type]  # takes any buffer
                    self.bytes_relayed += len(data)
                else:
                    await sink.close_write()
                    return
            except (BaseLibp2pError, OSError) as error:
                logger.debug("a circuit broke: %r", error)
            broken = True
            nursery.cancel_scope.cancel()

        with trio.move_on_after(self._limits.circuit_lifetime) as lifetime:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, one, other)
                nursery.start_soon(copy, other, one)
        if broken or lifetime.cancelled_caught:
            await one.reset()
            await other.reset()
        else:
            await finish_stream(other, self._limits.linger)
