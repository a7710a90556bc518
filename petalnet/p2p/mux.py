"""The stream multiplexer on trio: `mux_protocol` over a Noise session, behind libp2p's interfaces for muxed connections and streams.

One task reads the connection and hands bytes to the streams; whoever has something to send encrypts it and gives it to the kernel in its
own turn, so that a message on an idle connection costs no switch between tasks. Only where the kernel takes no more does a second task
send the rest when it can. What has been encrypted is always sent: no cancellation cuts a frame.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from multiaddr import Multiaddr

from petalnet.p2p.mux_protocol import Closed, Ended, Event, Mux, MuxError, Opened, Reason, Received, WasReset
from petalnet.p2p.mux_stream import MuxStream
from petalnet.p2p.protocols import Limits
from petalnet.p2p.rates import Rates
from petalnet.p2p.security import NoiseSession
from petalnet.version import PROTOCOL

logger = logging.getLogger(__name__)

MUX_ID = f"/petalnet/mux/{PROTOCOL}.0.0"

_SMALL_BATCH = 64 * 1024
_LARGE_BATCH = 256 * 1024
"""Bytes that are encrypted in one go: few where the kernel does not take them at once, so that what comes later does not wait for them."""
_BATCHES_A_TURN = 8
"""After which other tasks have their turn."""
_SENDS_A_TURN = 16
_GOODBYE_S = 0.5
_IN_A_HURRY = 0.75
"""Of a round trip: a half, and a half of that for what delays grants on their way."""
_FIRST_WINDOW = 1024 * 1024
"""On a machine's own loopback half of it costs half of the rate, and a short message beside four long ones waits 2.5 ms either way."""
_WIDEST_WINDOW = 16 * 1024 * 1024
"""What is under way at 1 Gbit/s and a round trip of 128 ms."""


class MuxConnection(IMuxedConn):
    """A connection whose streams are multiplexed as `mux_protocol` tells.

    Args:
        secured_conn: the Noise session beneath.
        peer_id: the peer at its other end.
        limits: how many streams the peer may open, and how long one that was closed waits for the peer.
        round_trip_s: the shortest time to the peer and back so far, where the kernel does not tell; None while it is not known.
        on_offence: is told what rule the peer broke, where it broke one; the connection has then ended.

    Attributes:
        mux: the protocol's state.
        window: bytes that a peer may send ahead on a stream that is being read; it grows with the distance.
        streams: the streams that are not over, by number.
        waiting: streams whose sender waits until its bytes are on their way.
        lingering: streams that this side is through with, and until when (trio time) their peer may end its side.
    """

    on_close: Callable[[], Awaitable[None]] | None

    def __init__(
        self,
        secured_conn: ISecureConn,
        peer_id: ID,
        *,
        limits: Limits,
        round_trip_s: Callable[[], float | None],
        on_offence: Callable[[str], None],
    ) -> None:
        if not isinstance(secured_conn, NoiseSession):
            raise TypeError(f"{MUX_ID} runs over a session of ours, not over a {type(secured_conn).__name__}")
        self.secured_conn = secured_conn
        self.peer_id = peer_id
        self.mux = Mux(initiator=secured_conn.is_initiator, max_streams=limits.max_streams_per_peer)
        self.streams: dict[int, MuxStream] = {}
        self.waiting: set[MuxStream] = set()
        self.lingering: dict[MuxStream, float] = {}
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.on_close = None
        self._limits = limits
        self._on_offence = on_offence
        self._round_trip_s = round_trip_s
        self.window = _FIRST_WINDOW
        self._openings = Rates(limits.max_openings, 2 * limits.max_openings)
        self._opened: trio.MemorySendChannel[MuxStream]
        self._opened, self._to_accept = trio.open_memory_channel[MuxStream](limits.max_streams_per_peer)
        self._backlog: memoryview | None = None  # encrypted bytes that the kernel has not taken yet
        self._unfinished = False  # whether the writer task has something to do
        self._writer = trio.lowlevel.ParkingLot()
        self._flushed = trio.lowlevel.ParkingLot()
        self._batch = _SMALL_BATCH
        self._sends = 0
        self._closing = False
        self._resetting = False  # whether a task waits to reset those that linger
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None

    @property
    def is_initiator(self) -> bool:
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self._closing

    @property
    def is_closed(self) -> bool:
        return self._closing

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.secured_conn.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.secured_conn.get_connection_type()

    # ---- streams

    def open(self, protocol: str = "") -> MuxStream:
        """A new stream, at once; `protocol` as in `mux_protocol`. Raises MuxedConnUnavailable."""
        if self._closing:
            raise MuxedConnUnavailable("the connection has ended")
        stream = MuxStream(self, self.mux.open(protocol), protocol)
        self.streams[stream.number] = stream
        return stream

    async def open_stream(self) -> MuxStream:
        await trio.lowlevel.checkpoint_if_cancelled()
        stream = self.open()
        self.pump()
        return stream

    async def accept_stream(self) -> MuxStream:
        try:
            return await self._to_accept.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise MuxedConnUnavailable("the connection has ended") from None

    def forget(self, stream: MuxStream) -> None:
        """Drop a stream that is over."""
        self.streams.pop(stream.number, None)
        self.lingering.pop(stream, None)
        stream.on_change()

    def _forget_finished(self) -> None:
        while self.mux.finished:
            if (stream := self.streams.get(self.mux.finished.pop())) is not None:
                self.forget(stream)

    def let_go(self, stream: MuxStream, patience: float = 1.0) -> None:
        """Wait a while (`patience` times the one of the limits) for the peer to end a stream that this side has ended; then reset it."""
        if stream.number not in self.mux:
            self.forget(stream)
        elif self._nursery is not None and not self._closing:
            if not self._resetting:
                self._resetting = True
                self._nursery.start_soon(self._reset_lingerers)
            self.lingering[stream] = trio.current_time() + patience * self._limits.linger

    async def _reset_lingerers(self) -> None:
        while self.lingering:
            # One that comes meanwhile waits for no less than `linger`.
            await trio.sleep_until(min([*self.lingering.values(), trio.current_time() + self._limits.linger]))
            self._reset_overdue(trio.current_time())
        self._resetting = False

    def _reset_overdue(self, now: float) -> None:
        """Not part of the task above, in whose variable the last stream would live on."""
        for stream in [stream for stream, until in self.lingering.items() if until <= now]:
            stream.abandon()

    def tune(self, used: int, seconds: float) -> None:
        """Widen the window where it is what holds a sender up: where half of it was used up within half a round trip.

        A window that is wider than that only fills the kernel's buffers, where short messages then wait behind long ones; and round trips
        that were taken meanwhile are long, which is why the shortest one counts.
        """
        round_trip_s = self.secured_conn.round_trip_s() or self._round_trip_s()
        if round_trip_s is not None and seconds < _IN_A_HURRY * round_trip_s and used >= self.window // 2:
            self.window = min(2 * self.window, _WIDEST_WINDOW)

    # ---- sending

    async def turn(self) -> None:
        """A checkpoint; now and then one that lets others run, so that a task which always has something to send does not rule alone."""
        self._sends += 1
        if self._sends % _SENDS_A_TURN:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()

    def pump(self) -> None:
        """Send what waits to be sent, as far as the kernel takes it at once; the rest is the writer task's. Never waits, never raises."""
        if not self.mux.has_output() or self._unfinished or self._closing or not self.event_started.is_set():
            return
        try:
            for _ in range(_BATCHES_A_TURN):
                self._send_batch()
                if self._backlog is not None:
                    break
                if not self.mux.has_output():
                    return
        except ConnectionClosedError:
            self._scope.cancel()  # the reader, which sees the same, tells everybody
            return
        self._unfinished = True
        self._writer.unpark()

    def _send_batch(self) -> bool:
        """Encrypt and send the next bytes; False where there were none."""
        pieces = self.mux.output(self._batch)
        self._forget_finished()
        if not pieces:
            return False
        sealed = self.secured_conn.seal(pieces)
        sent = self.secured_conn.try_send(sealed)
        if sent < len(sealed):
            self._backlog = memoryview(sealed)[sent:]
            self._batch = _SMALL_BATCH
        else:
            self._batch = _LARGE_BATCH
        for stream in tuple(self.waiting):
            if not self.mux.pending(stream.number):
                stream.on_sent()
        return True

    async def _write(self) -> None:
        """Send what the kernel did not take at once."""
        try:
            while True:
                if not self._unfinished:
                    await self._writer.park()
                while self._backlog is not None:
                    sent = await self.secured_conn.send_some(self._backlog)
                    self._backlog = self._backlog[sent:] if sent < len(self._backlog) else None
                if not self._send_batch():
                    self._unfinished = False
                    self._flushed.unpark_all()
                elif self._backlog is None:
                    await trio.lowlevel.checkpoint()
        except ConnectionClosedError as error:
            logger.debug("peer %s: %s", self.peer_id, error)
            self._scope.cancel()

    # ---- receiving

    async def start(self) -> None:
        """Run the connection until it ends."""
        self.event_started.set()
        self.secured_conn.established()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._write)
                    self.pump()
                    try:
                        await self._read()
                    finally:
                        self._nursery = None  # from now on it takes no more tasks
                    nursery.cancel_scope.cancel()
        except* Exception as failure:
            # A defect of ours that one peer's bytes met: it ends that peer's connection; libp2p would let it end the node.
            logger.error("the connection to peer %s failed", self.peer_id, exc_info=failure)
        finally:
            with trio.CancelScope(shield=True):
                await self._end()

    async def _read(self) -> None:
        try:
            while True:
                opened_before = self.mux.openings
                for plain in await self.secured_conn.receive():
                    for event in self.mux.receive(plain):
                        if type(event) is Received:
                            if (stream := self.streams.get(event.number)) is not None:
                                stream.on_received(event.data)
                        elif not self._on_event(event):
                            return
                self.pump()
                if opened := self.mux.openings - opened_before:
                    self._openings.charge("", trio.current_time(), opened)
                    await trio.sleep(self._openings.wait("", trio.current_time()))
        except ConnectionClosedError as error:
            logger.debug("the connection to peer %s has ended: %s", self.peer_id, error)
        except MuxError as error:
            logger.debug("peer %s broke the rules of %s: %s", self.peer_id, MUX_ID, error)
            self.mux.close(Reason.ERROR)
            self.pump()
            self._on_offence(f"{MUX_ID}: {error}")

    def _on_event(self, event: Event) -> bool:
        """Act on anything but data; False where the connection is over."""
        match event:
            case _ if self._closing:  # this side ended it while the bytes were on their way to here
                return False
            case Opened(number, protocol):
                self.streams[number] = stream = MuxStream(self, number, protocol)
                try:
                    self._opened.send_nowait(stream)
                except trio.WouldBlock:
                    stream.abandon(Reason.REFUSED)
            case Ended(number) if number in self.streams:
                stream = self.streams[number]
                stream.ended = True
                if number in self.mux:
                    stream.on_change()
                else:
                    self.forget(stream)
            case WasReset(number, reason) if number in self.streams:
                stream = self.streams[number]
                stream.reset_reason = reason
                self.forget(stream)
            case Closed():
                return False
        return True

    # ---- the end

    async def close(self) -> None:
        """Say goodbye and end the connection."""
        if not self._closing and self.event_started.is_set():
            self.mux.close()
            self.pump()
            with trio.move_on_after(_GOODBYE_S):
                while self._unfinished and not self._closing:
                    await self._flushed.park()
        await self._end()

    async def _end(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._scope.cancel()
        self._opened.close()
        self.lingering.clear()
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.on_change()
        await self.secured_conn.close()
        self.event_closed.set()
        if self.on_close is not None:
            await self.on_close()
