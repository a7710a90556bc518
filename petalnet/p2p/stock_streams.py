"""Streams of the stock multiplexer, with which peers that are no petalnet nodes are spoken to, in the form of our own (`mux.MuxStream`).

Yamux in py-libp2p does not enforce its receive window and drops bytes where a read is cancelled at the wrong moment; so bytes are taken
straight from its buffers, and a connection on which more is held than `MAX_HELD`, or its share of `MAX_HELD_BY_ALL`, is given up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.net_stream import NetStream
from libp2p.stream_muxer.exceptions import MuxedStreamReset
from libp2p.stream_muxer.yamux.yamux import HEADER_SIZE, MAX_MESSAGE_SIZE, Yamux, YamuxStream

from petalnet.p2p.mux_protocol import Buffer, Reason
from petalnet.p2p.mux_stream import TookNothing
from petalnet.p2p.security import NoiseSession

Spawn = Callable[[Callable[[], Awaitable[None]]], None]

_CHUNK = MAX_MESSAGE_SIZE - HEADER_SIZE
"""Bytes that yamux sends as one frame of its own."""
_WINDOW_POLL_S = 0.001
MAX_HELD = 32 * 1024 * 1024
"""Bytes in all unread streams of one connection: two of the widest windows that yamux grants by itself."""
MAX_HELD_BY_ALL = 256 * 1024 * 1024
"""The same of all connections together, each of which has the same share; what stock peers ask for is short, and read at once."""


def bound(muxed: Yamux, crowd: Callable[[], int]) -> None:
    """Give up a connection of the stock muxer once much more is held in it than was granted. (It takes no class of ours for itself.)

    Args:
        crowd: how many connections of this kind there are.
    """
    session = muxed.secured_conn
    if not isinstance(session, NoiseSession):
        return
    unchecked = 0

    def check(size: int) -> bool:
        nonlocal unchecked
        unchecked += size
        share = min(MAX_HELD, MAX_HELD_BY_ALL // max(crowd(), 1))
        if unchecked < share // 8:
            return True
        unchecked = 0
        return session.unread + sum(map(len, muxed.stream_buffers.values())) <= share

    session.on_received = check
    session.established()  # or it would count as one in its handshakes, of which the oldest have to go


class StockStream:
    """A yamux stream; see `MuxStream` for what the methods do.

    Args:
        raw: the stream after its negotiation.
        spawn: runs an async function in the background, on which nobody waits and which does not fail.
        finish: closes a stream and waits for the peer to end its side.
    """

    def __init__(self, raw: NetStream, spawn: Spawn, finish: Callable[[NetStream], Awaitable[None]]) -> None:
        if not isinstance(raw.muxed_stream, YamuxStream):
            raise TypeError(f"streams of {type(raw.muxed_stream).__name__} are not supported")
        self._raw = raw
        self._muxed = raw.muxed_stream
        self._spawn = spawn
        self._finish = finish
        self.reset_reason: Reason | None = None

    @property
    def held(self) -> int:
        return len(self._muxed.conn.stream_buffers.get(self._muxed.stream_id, b""))

    @property
    def ended(self) -> bool:
        return self._muxed.recv_closed and not self._muxed.reset_received

    @property
    def is_lost(self) -> bool:
        return self._muxed.conn.event_shutting_down.is_set()

    @property
    def is_over(self) -> bool:
        return self._muxed.closed or self._muxed.reset_received or self.is_lost

    async def wait(self, count: int) -> None:
        connection, number = self._muxed.conn, self._muxed.stream_id
        await trio.lowlevel.checkpoint_if_cancelled()
        while self.held < count and not (self._muxed.recv_closed or self.is_over):
            event = connection.stream_events.get(number)
            if event is None:
                return
            await event.wait()
            if number in connection.stream_events:
                connection.stream_events[number] = trio.Event()

    def take(self) -> list[Buffer]:
        buffer = self._muxed.conn.stream_buffers.get(self._muxed.stream_id)
        if not buffer:
            return []
        data = bytes(buffer)
        buffer.clear()
        return [data]

    def allow(self, count: int) -> None:
        """Grant all of it at once: the stock muxer does the same for its own readers."""
        size = count - self.held - int(self._muxed.recv_window)
        if size > count // 2 and not self.is_over:
            self._muxed.recv_window += size
            self._spawn(partial(self._quietly, partial(self._muxed.send_window_update, size)))

    async def _quietly(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except (BaseLibp2pError, OSError):
            return  # the connection has ended, as whoever uses the stream will see

    async def send(self, parts: Sequence[Buffer], patience: float = float("inf"), least: int = 1) -> None:
        data = memoryview(b"".join(parts))
        sent = counted = 0
        since = trio.current_time()
        try:
            while sent < len(data):
                if sent - counted >= least:
                    counted, since = sent, trio.current_time()
                await self._wait_for_window(since + patience)
                size = min(_CHUNK, len(data) - sent, max(self._muxed.send_window, 1))
                with trio.CancelScope(shield=True):  # the session's write has a deadline
                    await self._muxed.write(data[sent : sent + size])  # type: ignore[arg-type]  # takes any buffer
                sent += size
        except trio.Cancelled:
            if sent:
                self.abandon()
            raise

    async def _wait_for_window(self, deadline: float) -> None:
        """Until the peer has read some of what it was sent; the muxer's own wait would reset the stream after 5 s."""
        await trio.lowlevel.checkpoint_if_cancelled()
        began = trio.current_time()
        while self._muxed.send_window <= 0:
            waited = trio.current_time() - began
            if self.is_over:
                raise MuxedStreamReset("the stream has ended")
            if trio.current_time() >= deadline:
                self.abandon()
                raise TookNothing("the peer took nothing, or next to nothing, for too long")
            # Looking less and less often, so that peers that never read do not keep this node busy.
            await trio.sleep(max(_WINDOW_POLL_S, waited / 50))

    def abandon(self, reason: Reason = Reason.CANCELLED) -> None:
        if self.reset_reason is None:
            self.reset_reason = reason
            self._spawn(partial(self._quietly, self._raw.reset))

    def finish(self) -> None:
        self._spawn(partial(self._finish, self._raw))
