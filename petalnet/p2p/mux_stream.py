"""One stream of the multiplexer: what petalnet's own streams use of it, and libp2p's interface for its own protocols."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from petalnet.p2p.mux_protocol import INITIAL_WINDOW, Buffer, Reason

if TYPE_CHECKING:
    from petalnet.p2p.mux import MuxConnection

_TINY = 2048
"""Bytes below which pieces that wait to be read are put together: kept apart, each would take hundreds of bytes besides its own."""

_CLOSED_PATIENCE = 12.0
"""How many times longer a peer may take to end a stream that libp2p's own protocols have closed: some read on."""


class TookNothing(MuxedStreamReset):
    """The peer has read nothing, or next to nothing, of what was sent for too long; the stream was reset."""


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
        self._dropping = False  # what still comes
        self.reset_reason: Reason | None = None
        self._chunks: list[Buffer] = []
        self._tail: bytearray | None = None  # the last of the chunks, where it is put together from tiny ones
        self._held = 0
        self._wanted = 1
        self._allowed = 0  # bytes that may be granted as the peer sends
        self._granted_at = float("-inf")
        self._consumed = 0
        self._senders = 0
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

    async def send(self, parts: Sequence[Buffer], patience: float = float("inf"), least: int = 1) -> None:
        """Send bytes, given in parts, which must not change until this returns.

        A call that is cancelled may have sent a part of them; where that is so, or others are sending too, the stream is reset.

        Args:
            patience: seconds in which some bytes have to go; else the stream is reset.
            least: how many.
        Raises:
            MuxedStreamReset, MuxedStreamClosed: it is over, or was closed by this side.
            TookNothing: the peer took less than `least` bytes in `patience` seconds.
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
            self._senders += 1
            try:
                while (before := mux.pending(self.number)) and not connection.is_closed:
                    with trio.move_on_after(patience):
                        await self._writable.park()
                        continue
                    taken = before - mux.pending(self.number)
                    if 0 <= taken < least:
                        self.abandon()
                        raise TookNothing(f"the peer took {f'{taken} bytes' if taken else 'nothing'} in {patience:g} s")
            except trio.Cancelled:
                if mux.pending(self.number) != total or self._senders > 1:
                    self.abandon()
                else:
                    mux.withdraw(self.number)
                raise
            finally:
                self._senders -= 1
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
        self._dropping = True
        self.muxed_conn.let_go(self)
        self.muxed_conn.pump()

    # ---- what the connection calls

    def on_received(self, data: memoryview) -> None:
        if self._dropping:
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
        data = self._take_some(self._held if n is None or n < 0 else n)
        self._consumed += len(data)
        if self._consumed >= INITIAL_WINDOW // 2 and not self.ended:
            consumed, self._consumed = self._consumed, 0
            self.muxed_conn.mux.grant(self.number, consumed)
            self.muxed_conn.pump()
        return data

    def _take_some(self, most: int) -> bytes:
        """The next `most` bytes that have come, or all; what is left is not copied, as many readers take byte by byte."""
        if most >= self._held:
            return b"".join(self.take())
        parts: list[Buffer] = []
        chunks, missing = self._chunks, most
        used = 0
        while missing >= len(chunks[used]):
            parts.append(chunks[used])
            missing -= len(chunks[used])
            used += 1
        first = memoryview(chunks[used])
        parts.append(first[:missing])
        self._chunks, self._tail, self._held = [first[missing:], *chunks[used + 1 :]], None, self._held - most
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        await self.send([data])

    async def close_write(self) -> None:
        """Send no more; what comes can still be read, for as long as it comes."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.ended_here = True
        self.muxed_conn.mux.end(self.number)
        self.muxed_conn.pump()

    async def close(self) -> None:
        """Send no more; what comes can still be read for a while, after which a peer that has not ended its side is reset."""
        await self.close_write()
        if not self._dropping:
            self.muxed_conn.let_go(self, _CLOSED_PATIENCE)

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
