"""A stream to a peer: whole messages out, whole messages in.

    stream = await host.open_stream(peer_id, FORWARD)
    async with stream:
        await stream.send(request)
        answer = await stream.receive()

Both directions are safe to cancel. `receive` takes bytes off the muxer only when they are there, so that a cancelled call loses
nothing. `send` is atomic for frames of up to 64 KB; a longer one that is cancelled half-way resets the stream, since the peer could
not make sense of what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.net_stream import NetStream
from libp2p.stream_muxer.yamux.yamux import HEADER_SIZE, MAX_MESSAGE_SIZE, MAX_WINDOW_SIZE, YamuxStream

from petalnet.errors import PeerLost, PetalnetError, ProtocolError, UnsupportedError
from petalnet.p2p.frames import FrameDecoder
from petalnet.p2p.messages import Error, Message, decode_message, encode_message
from petalnet.p2p.protocols import Protocol

_CHUNK = MAX_MESSAGE_SIZE - HEADER_SIZE
"""Bytes that the muxer sends as one frame of its own."""
_MIN_WINDOW = 2 * 1024 * 1024
"""Bytes that a peer may send ahead of our reading once a stream is in use; half of it is always left, so that most messages never wait."""
_MAX_WINDOW = MAX_WINDOW_SIZE
_REFUSAL_TIMEOUT_S = 1.0
_WINDOW_POLL_S = 0.001


class Stream:
    """One stream of one protocol to one peer; an async context manager that closes it, or resets it where an exception passes through.

    One task may send while another receives; sends of several tasks go one after the other.

    Attributes:
        peer_id: the peer, base58.
        protocol: the protocol that was agreed on.
        served: True where the peer opened the stream.
    """

    def __init__(
        self,
        raw: NetStream,
        peer_id: str,
        protocol: Protocol,
        *,
        served: bool,
        on_lost: Callable[[], None],
        on_done: Callable[[NetStream], None],
    ) -> None:
        muxed = raw.muxed_stream
        if not isinstance(muxed, YamuxStream):
            raise TypeError(f"streams of {type(muxed).__name__} are not supported")
        self.peer_id = peer_id
        self.protocol = protocol
        self.served = served
        self._raw = raw
        self._muxed = muxed
        self._decoder = FrameDecoder(protocol.limits)
        self._send_lock = trio.Lock()
        self._closed = False
        self._on_lost = on_lost
        self._on_done = on_done

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            await self.close()
        else:
            await self.reset()

    async def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            PeerLost: the connection or the stream has ended, or the peer takes nothing.
            ValueError: the message exceeds the protocol's limits; nothing was sent.
        """
        data = encode_message(message)
        limits = self.protocol.limits
        if len(data) > limits.header + limits.payload:
            raise ValueError(f"a message of {len(data)} bytes is too long for {self.protocol.id}")
        async with self._send_lock:
            if self._closed:
                raise PeerLost(f"the stream to {self.peer_id} is closed", self.peer_id)
            try:
                await self._write(memoryview(data))
            except PeerLost:
                await self.reset()
                raise
            except (BaseLibp2pError, OSError) as error:
                await self.reset()
                raise self._lost("while sending") from error

    async def _write(self, data: memoryview) -> None:
        sent = 0
        try:
            while sent < len(data):
                if self._muxed.send_window <= 0:
                    await self._wait_for_window()
                size = min(_CHUNK, len(data) - sent, max(self._muxed.send_window, 1))
                # The deadline of the shield is that of the session's write (security.WRITE_TIMEOUT_S).
                with trio.CancelScope(shield=True):
                    await self._muxed.write(data[sent : sent + size])  # type: ignore[arg-type]  # takes any buffer
                sent += size
                if sent < len(data):
                    await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            if sent:
                await self.reset()
            raise

    async def _wait_for_window(self) -> None:
        """Until the peer has read some of what it was sent; the muxer's own wait would reset the stream after 5 s."""
        began = trio.current_time()
        while self._muxed.send_window <= 0:
            if self._ended():
                raise PeerLost(f"peer {self.peer_id} is gone", self.peer_id)
            waited = trio.current_time() - began
            if waited >= self.protocol.frame_timeout_s:
                raise PeerLost(f"peer {self.peer_id} took nothing for {self.protocol.frame_timeout_s:g} s", self.peer_id)
            # Looking less and less often, so that peers that never read do not keep this node busy.
            await trio.sleep(max(_WINDOW_POLL_S, waited / 50))

    async def receive(self) -> Message | None:
        """The next message, or None where the peer closed the stream between two messages.

        On a served stream, a peer that sends what the protocol does not allow is told so before the error is raised here.

        Raises:
            PeerLost: the connection or the stream ended or stopped in the middle of a message; a served stream was idle for too long.
            ProtocolError, UnsupportedError: what came is no message, or one that is not known; the stream is of no use any more.
        """
        if self._closed:
            raise PeerLost(f"the stream to {self.peer_id} is closed", self.peer_id)
        try:
            while (frame := self._decoder.next_frame()) is None:
                if not await self._read():
                    self._check_clean_end()
                    return None
            return decode_message(frame)
        except (ProtocolError, UnsupportedError) as error:
            error.peer_id = self.peer_id
            await self._refuse(error)
            raise

    async def _read(self) -> bool:
        """Feed the decoder; False at the end of the stream."""
        inside = not self._decoder.at_boundary
        patience = self.protocol.frame_timeout_s if inside else self.protocol.idle_timeout_s if self.served else float("inf")
        with trio.move_on_after(patience) as scope:
            await self._wait_for_bytes()
        if scope.cancelled_caught:
            await self.reset()
            what = "in the middle of a message" if inside else "and no request came"
            raise PeerLost(f"peer {self.peer_id} was silent for {patience:g} s {what}", self.peer_id)
        # The muxer's own read would answer each small message with a window update, a good part of a hop's cost.
        buffer = self._muxed.conn.stream_buffers.get(self._muxed.stream_id)
        if not buffer:
            if self._muxed.reset_received:
                raise self._lost("while receiving")
            return False
        self._decoder.feed(bytes(buffer))
        buffer.clear()
        await self._grant()
        return True

    async def _grant(self) -> None:
        """Let the peer send on: the rest of a long message without waiting for us, and a fair piece of what may follow."""
        muxed = self._muxed
        window = min(max(self._decoder.wanted, _MIN_WINDOW), _MAX_WINDOW)
        increment = window - muxed.recv_window
        if increment < window // 2 or self._ended():
            return
        muxed.recv_window += increment
        try:
            with trio.CancelScope(shield=True):
                await muxed.send_window_update(increment)
        except (BaseLibp2pError, OSError) as error:
            raise self._lost("while receiving") from error

    async def _wait_for_bytes(self) -> None:
        """Until a read will not wait: there are bytes, or the stream has ended."""
        connection, number = self._muxed.conn, self._muxed.stream_id
        await trio.lowlevel.checkpoint_if_cancelled()
        while not connection.stream_buffers.get(number) and not self._ended():
            event = connection.stream_events.get(number)
            if event is None:
                return
            await event.wait()
            if number in connection.stream_events:
                connection.stream_events[number] = trio.Event()

    def _ended(self) -> bool:
        muxed = self._muxed
        return muxed.closed or muxed.recv_closed or muxed.reset_received or muxed.conn.event_shutting_down.is_set()

    def _check_clean_end(self) -> None:
        if not self._decoder.at_boundary:
            raise self._lost("in the middle of a message")
        if self._muxed.conn.event_shutting_down.is_set():  # a peer that dies looks the same as one that closes the stream
            raise self._lost("between two messages")

    def _lost(self, when: str) -> PeerLost:
        if self._muxed.conn.event_shutting_down.is_set():
            self._on_lost()
            return PeerLost(f"the connection to peer {self.peer_id} ended {when}", self.peer_id)
        return PeerLost(f"peer {self.peer_id} ended the stream {when}", self.peer_id)

    async def _refuse(self, error: PetalnetError) -> None:
        """Tell the peer what is wrong, where it is the one that asks, and end the stream."""
        if self.served:
            with trio.move_on_after(_REFUSAL_TIMEOUT_S):
                try:
                    await self.send(Error.of(error))
                except PeerLost:
                    return
            await self.close()
        else:
            await self.reset()

    async def close(self) -> None:
        """Say that nothing more will be sent, and let go of the stream; what the peer still sends is dropped. Never fails."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                await self._raw.close()
            except (BaseLibp2pError, OSError):
                await self._raw.reset()
        self._on_done(self._raw)

    async def reset(self) -> None:
        """End the stream at once in both directions; the peer sees that it did not end well. Never fails."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            await self._raw.reset()
