"""The stream multiplexer on trio: `mux_protocol` over a Noise session, behind libp2p's interfaces for muxed connections and streams.

One task reads the connection and hands bytes to the streams; whoever has something to send encrypts it and gives it to the kernel in its
own turn, so that a message on an idle connection costs no switch between tasks. Only where the kernel takes no more does a second task
send the rest when it can. What has been encrypted is always sent: no cancellation cuts a frame.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from petalnet.p2p.mux_protocol import INITIAL_WINDOW, Buffer, Closed, Ended, Event, Mux, MuxError, Opened, Reason, Received, WasReset
from petalnet.p2p.protocols import Limits
from petalnet.p2p.security import NoiseSession

logger = logging.getLogger(__name__)

MUX_ID = "/petalnet/mux/1.0.0"

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
_TINY = 2048
"""Bytes below which pieces that wait to be read are put together: kept apart, each would take hundreds of bytes besides its own."""


class TookNothing(MuxedStreamReset):
    """The peer has read nothing of what was sent for too long; the stream was reset."""


class MuxStream(IMuxedStream):
    """One stream. One task may receive while others send; made by `MuxConnection`.

    Attributes:
        muxed_conn: the connection that it runs on.
        number: its number on the connection.
        protocol: what is spoken on it by the word of who opened it; "" if that is negotiated.
    """

    muxed_conn: MuxConnection

    def __init__(self, connection: MuxConnection, number: int, protocol: str) -> None:
        self.muxed_conn = connection
        self.number = number
        self.protocol = protocol
        self.ended = False  # the peer sends no more
        self.ended_here = False
        self.reset_reason: Reason | None = None
        self._chunks: list[Buffer] = []
        self._tail: bytearray | None = None  # the last of the chunks, where it is put together from tiny ones
        self._held = 0
        self._wanted = 1
        self._allowed = 0  # bytes that may be granted as the peer sends
        self._granted_at = float("-inf")
        self._consumed = 0
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()

    # ---- what petalnet's own streams use

    @property
    def held(self) -> int:
        """Bytes that have come and were not taken yet."""
        return self._held

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended beneath the stream."""
        return self.muxed_conn.is_closed

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come or be sent."""
        return self.number not in self.muxed_conn.streams

    async def wait(self, count: int) -> None:
        """Until `count` bytes are held, or the stream has ended in one way or another. Safe to cancel."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._held:
            self.muxed_conn.pump()  # it may have been opened just now
        self._wanted = count
        while self._held < count and not (self.ended or self.is_over):
            await self._readable.park()

    def take(self) -> list[Buffer]:
        """The bytes that have come, in pieces; without granting the peer any more."""
        chunks, self._chunks, self._tail, self._held = self._chunks, [], None, 0
        return chunks

    def allow(self, count: int) -> None:
        """Let the peer send until `count` bytes are held: not all at once, but as it sends, a window's worth ahead."""
        self._allowed = count - self._held - self.muxed_conn.mux.window(self.number)
        if self._allowed > 0:
            self._refill()
            self.muxed_conn.pump()

    def _refill(self) -> None:
        """Grant what is allowed, once half of the window is used."""
        connection = self.muxed_conn
        window = connection.mux.window(self.number)
        if window > connection.window // 2 or self.ended:
            return
        now = trio.current_time()
        connection.tune(connection.window - window, now - self._granted_at)
        self._granted_at = now
        size = min(connection.window - window, self._allowed)
        self._allowed -= size
        connection.mux.grant(self.number, size)

    async def send(self, parts: Sequence[Buffer], patience: float = float("inf")) -> None:
        """Send bytes, given in parts, which must not change until this returns.

        A call that is cancelled may have sent a part of them; where that is so, the stream is reset.

        Args:
            patience: seconds without a byte sent, after which the stream is reset.
        Raises:
            MuxedStreamReset, MuxedStreamClosed: it is over, or was closed by this side.
            TookNothing: `patience` is at an end.
        """
        connection = self.muxed_conn
        await connection.turn()
        self._check_open()
        mux = connection.mux
        mux.send(self.number, parts)
        total = mux.pending(self.number)
        connection.pump()
        if mux.pending(self.number):
            connection.waiting.add(self)
            try:
                while (before := mux.pending(self.number)) and not connection.is_closed:
                    with trio.move_on_after(patience):
                        await self._writable.park()
                        continue
                    if mux.pending(self.number) == before:
                        self.abandon()
                        raise TookNothing(f"the peer took nothing for {patience:g} s")
            except trio.Cancelled:
                if mux.pending(self.number) != total:
                    self.abandon()
                else:
                    mux.withdraw(self.number)
                raise
            finally:
                connection.waiting.discard(self)
        if self.reset_reason is not None or connection.is_closed:
            self._check_open()

    def abandon(self, reason: Reason = Reason.CANCELLED) -> None:
        """Reset the stream at once, which never waits."""
        self.muxed_conn.mux.reset(self.number, reason)
        if self.reset_reason is None:
            self.reset_reason = Reason.CANCELLED
        self.muxed_conn.forget(self)
        self.muxed_conn.pump()

    def finish(self) -> None:
        """Send no more, after what is queued, and drop what still comes; never waits. A peer that does not end its side is reset later."""
        self.ended_here = True
        self.muxed_conn.mux.end(self.number)
        self.take()
        self.muxed_conn.let_go(self)
        self.muxed_conn.pump()

    # ---- what the connection calls

    def on_received(self, data: memoryview) -> None:
        if self in self.muxed_conn.lingering:
            return
        self._held += len(data)
        if self._allowed > 0:
            self._refill()
        if not self._chunks or len(data) >= _TINY:
            # A view would keep all that it was decrypted with: a small piece is copied.
            self._chunks.append(data if 2 * len(data) >= len(data.obj) else bytes(data))  # type: ignore[arg-type]
            self._tail = None
        elif self._tail is None:
            self._tail = bytearray(data)
            self._chunks.append(self._tail)
        else:
            self._tail += data
        if self._held >= self._wanted:
            self._readable.unpark_all()

    def on_change(self) -> None:
        """The stream has ended, in one way or another."""
        self._readable.unpark_all()
        self._writable.unpark_all()

    def on_sent(self) -> None:
        self._writable.unpark_all()

    def _check_open(self) -> None:
        if self.muxed_conn.is_closed:
            raise MuxedStreamReset("the connection has ended")
        if self.reset_reason is not None or self.is_over:
            raise MuxedStreamReset("the stream was reset")
        if self.ended_here:
            raise MuxedStreamClosed("the stream was closed for sending")

    # ---- libp2p's interface, for its own protocols

    @property
    def closed(self) -> bool:
        """Whether both sides have ended the stream."""
        return self.is_over

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, with None whatever has come; raises MuxedStreamEOF at the end."""
        if n == 0:
            return b""
        await self.wait(1)
        if not self._held:
            if self.ended and self.reset_reason is None:
                raise MuxedStreamEOF("the peer has ended the stream")
            raise MuxedStreamReset("the stream was reset")
        data = b"".join(self.take())
        if n is not None and 0 < n < len(data):
            self._chunks, self._tail, self._held = [memoryview(data)[n:]], None, len(data) - n
            data = data[:n]
        self._consumed += len(data)
        if self._consumed >= INITIAL_WINDOW // 2 and not self.ended:
            consumed, self._consumed = self._consumed, 0
            self.muxed_conn.mux.grant(self.number, consumed)
            self.muxed_conn.pump()
        return data

    async def write(self, data: bytes) -> None:
        await self.send([data])

    async def close(self) -> None:
        """Send no more; what comes can still be read."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.ended_here = True
        self.muxed_conn.mux.end(self.number)
        self.muxed_conn.pump()

    async def reset(self) -> None:
        self.abandon()

    def set_deadline(self, ttl: int) -> None:
        """Not offered: deadlines are trio's cancel scopes here."""
        raise MuxedStreamError("streams have no deadlines of their own; use a cancel scope")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.secured_conn.get_remote_address()

    async def __aenter__(self) -> MuxStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


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
        self._opened: trio.MemorySendChannel[MuxStream]
        self._opened, self._to_accept = trio.open_memory_channel[MuxStream](limits.max_streams_per_peer)
        self._backlog: memoryview | None = None  # encrypted bytes that the kernel has not taken yet
        self._unfinished = False  # whether the writer task has something to do
        self._writer = trio.lowlevel.ParkingLot()
        self._flushed = trio.lowlevel.ParkingLot()
        self._batch = _SMALL_BATCH
        self._sends = 0
        self._closing = False
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

    def let_go(self, stream: MuxStream) -> None:
        """Wait a while for the peer to end a stream that this side is through with."""
        if stream.number not in self.mux:
            self.forget(stream)
        elif self._nursery is not None and not self._closing:
            if not self.lingering:
                self._nursery.start_soon(self._reset_lingerers)
            self.lingering[stream] = trio.current_time() + self._limits.linger

    async def _reset_lingerers(self) -> None:
        while self.lingering:
            stream, until = next(iter(self.lingering.items()))  # the oldest
            await trio.sleep_until(until)
            if self.lingering.get(stream) == until:
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
        if self._unfinished or self._closing or not self.event_started.is_set():
            return
        try:
            for _ in range(_BATCHES_A_TURN):
                if not self._send_batch():
                    return
                if self._backlog is not None:
                    break
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
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self._write)
                    self.pump()
                    await self._read()
                    self._nursery.cancel_scope.cancel()
        except* Exception as failure:
            # A defect of ours that one peer's bytes met: it ends that peer's connection; libp2p would let it end the node.
            logger.error("the connection to peer %s failed", self.peer_id, exc_info=failure)
        finally:
            with trio.CancelScope(shield=True):
                await self._end()

    async def _read(self) -> None:
        try:
            while True:
                for plain in await self.secured_conn.receive():
                    for event in self.mux.receive(plain):
                        if type(event) is Received:
                            if (stream := self.streams.get(event.number)) is not None:
                                stream.on_received(event.data)
                        elif not self._on_event(event):
                            return
                self.pump()
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
