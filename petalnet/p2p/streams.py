"""A stream to a peer: whole messages out, whole messages in.

    stream = await host.open_stream(peer_id, FORWARD)
    async with stream:
        await stream.send(request)
        answer = await stream.receive()

Both directions are safe to cancel. A `receive` that is cancelled loses nothing. A `send` that is cancelled has sent the message, or
nothing of it; where it is cancelled in the middle of one, the stream is reset, since the peer could not make sense of what follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol as Interface

import trio
from libp2p.exceptions import BaseLibp2pError

from petalnet.errors import BusyError, PeerLost, PetalnetError, ProtocolError, UnsupportedError
from petalnet.p2p.budget import Budget
from petalnet.p2p.fields import Message
from petalnet.p2p.frames import FrameDecoder
from petalnet.p2p.messages import Error, decode_message, encode_message
from petalnet.p2p.mux_protocol import INITIAL_WINDOW, Buffer, Reason
from petalnet.p2p.mux_stream import TookNothing
from petalnet.p2p.protocols import Limits, Protocol
from petalnet.p2p.sources import network_of

_REFUSAL_TIMEOUT_S = 1.0
_MEMORY_TIMEOUT_S = 30.0
"""For other messages to give back the memory that the next one needs, before its sender is told that this node is busy."""


class ByteStream(Interface):
    """What a Stream needs of the stream beneath; `MuxStream` tells what each does."""

    reset_reason: Reason | None

    @property
    def held(self) -> int: ...
    @property
    def ended(self) -> bool: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def is_lost(self) -> bool: ...
    async def wait(self, count: int) -> None: ...
    def take(self) -> list[Buffer]: ...
    def allow(self, count: int) -> None: ...
    async def send(self, parts: Sequence[Buffer], patience: float = ..., least: int = ...) -> None: ...
    def abandon(self, reason: Reason = ...) -> None: ...
    def finish(self) -> None: ...


class Served:
    """What a host that serves a stream adds to it: bounds on memory and pace, and somebody to tell of offences.

    Args:
        budget: memory for long messages and wide windows.
        pace: waits until one more request of the peer may be read.
        offence: is told what rule the peer broke.
        caller: the address by which the peer counts (`transport.caller_of`).
    """

    def __init__(self, budget: Budget, pace: Callable[[], Awaitable[None]], offence: Callable[[str], None], caller: str) -> None:
        self.budget = budget
        self.caller = caller
        self.pace = pace
        self.offence = offence


class Stream:
    """One stream of one protocol to one peer; an async context manager that closes it, or resets it where an exception passes through.

    One task may send while another receives; sends of several tasks go one after the other.

    Args:
        raw: the stream beneath.
        peer_id: the peer, base58.
        protocol: the protocol that is spoken.
        limits: of the host.
        on_lost: called where the connection turns out to have ended.
        served: where the peer opened the stream, what its host bounds it by.

    Attributes:
        peer_id, protocol: as given.
    """

    def __init__(
        self,
        raw: ByteStream,
        peer_id: str,
        protocol: Protocol,
        *,
        limits: Limits,
        on_lost: Callable[[], None],
        served: Served | None = None,
    ) -> None:
        self.peer_id = peer_id
        self.protocol = protocol
        self._raw = raw
        self._limits = limits
        self._served = served
        self._on_lost = on_lost
        self._decoder = FrameDecoder(protocol.limits)
        self._send_lock = trio.Lock()
        self._closed = False
        self._window = INITIAL_WINDOW  # what the peer may send ahead between two messages
        self._taken = 0  # of the budget
        self._kept = 0  # the part of it that lasts as long as the stream
        self._in_use: deque[int] = deque()  # the parts of it that are the latest messages', oldest first
        self._is_ahead = False  # whether what is received is read ahead
        self._is_long = protocol.limits.header + protocol.limits.payload > INITIAL_WINDOW  # whether its messages may need wide windows
        self._deadline = float("inf")  # for the message under way, whole
        # Bytes of a message that have to come, or go, within the protocol's time-out of a frame: half of the slowest rate, as it varies.
        self._least = int(limits.slowest_rate * protocol.frame_timeout_s / 2)
        self._idle_since = float("inf")

    @property
    def served(self) -> bool:
        """Whether the peer opened the stream."""
        return self._served is not None

    @property
    def network(self) -> str:
        """The public network from which a peer has opened the stream (see `sources`); "" where it came another way, or this side did."""
        return "" if self._served is None else network_of(self._served.caller)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            await self.close()
        else:
            await self.reset()

    # ---- sending

    async def send(self, message: Message) -> None:
        """Send one message. Arrays in it must not change until this returns.

        Raises:
            PeerLost: the connection or the stream has ended, or the peer takes nothing.
            UnsupportedError, BusyError: the peer has refused the stream.
            ValueError: the message exceeds the protocol's limits; nothing was sent.
        """
        parts = encode_message(message)
        size, limits = sum(map(len, parts)), self.protocol.limits
        if size > limits.header + limits.payload:
            raise ValueError(f"a message of {size} bytes is too long for {self.protocol.id}")
        try:
            self._send_lock.acquire_nowait()  # `acquire` would give up the turn
        except trio.WouldBlock:
            await self._send_lock.acquire()
        try:
            if self._closed:
                raise PeerLost(f"the stream to {self.peer_id} is closed", self.peer_id)
            try:
                await self._raw.send(parts, self.protocol.frame_timeout_s, self._least)
            except TookNothing as error:
                await self.reset()
                raise PeerLost(f"peer {self.peer_id}: {error}", self.peer_id) from error
            except (BaseLibp2pError, OSError) as error:
                lost = self._lost("while sending")
                await self.reset()
                raise lost from error
        finally:
            self._send_lock.release()

    # ---- receiving

    async def receive(self, *, ahead: int = 0) -> Message | None:
        """The next message, or None where the peer closed the stream between two messages.

        Args:
            ahead: how many of the messages before it are still in use, and count for what the peer may take of this node's memory.

        On a served stream, a peer that sends what the protocol does not allow is told so before the error is raised here.

        Raises:
            PeerLost: the connection or the stream ended or stopped in the middle of a message; a served stream was idle for too long.
            ProtocolError, UnsupportedError: what came is no message, or one that is not known, or the peer does not serve the protocol;
                the stream is of no use any more.
            BusyError: the peer has refused the stream; or, served, this node has no memory for the message.
        """
        if self._closed:
            raise PeerLost(f"the stream to {self.peer_id} is closed", self.peer_id)
        while len(self._in_use) > ahead:
            self._in_use.popleft()
        in_use = sum(self._in_use)
        self._is_ahead = ahead > 0
        self._give_back(self._taken - self._kept - in_use)
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            while (frame := self._decoder.next_frame()) is None:
                if not await self._read():
                    self._check_clean_end()
                    return None
            self._deadline = float("inf")
            self._in_use.append(self._taken - self._kept - in_use)
            message = decode_message(frame)
        except (ProtocolError, UnsupportedError, BusyError) as error:
            if not isinstance(error, BusyError):
                error.peer_id = self.peer_id
            if self._served is not None and isinstance(error, ProtocolError):
                self._served.offence(f"{self.protocol.id}: {error}")
            if not self._closed:
                await self._refuse(error)
            raise
        if self._served is not None:
            wide = self._limits.busy_window
            if not self._kept and self._is_long and self._served.budget.take(self.peer_id, wide, self._served.caller):
                self._kept = self._window = wide
                self._taken += self._kept
            await self._served.pace()
        elif self._is_long:
            self._window = self._limits.busy_window
        return message

    def forget_latest(self) -> None:
        """The message that was received last is not in use any more, whereas some before it are."""
        if self._in_use and not self._closed:
            self._give_back(self._in_use.pop())

    async def peer_ends(self) -> bool:
        """Wait until the peer has closed or reset the stream, or is gone (True), or sends something to be received (False).

        For whoever is busy with a request and receives nothing meanwhile. Safe to cancel.
        """
        await self._raw.wait(1)
        return not self._raw.held

    def idle_s(self, now: float) -> float:
        """Seconds since this side began to wait for a message; 0 where it does not, or a part of one has come."""
        return max(now - self._idle_since, 0.0) if self._idle_since > float("-inf") and not self._raw.held else 0.0

    def end_idle(self) -> None:
        """End a served stream on which no request comes; a deadline around each wait would cost more than the wait."""
        self._idle_since = float("-inf")
        self._raw.abandon()

    async def _read(self) -> bool:
        """Feed the decoder with what comes next; False at the end of the stream."""
        raw, decoder = self._raw, self._decoder
        if decoder.at_boundary:
            self._idle_since = began = trio.current_time()
            await raw.wait(1)
            if self._idle_since == float("-inf"):
                silent_s = trio.current_time() - began
                raise PeerLost(f"peer {self.peer_id} was silent for {silent_s:.1f} s and no request came", self.peer_id)
            self._idle_since = float("inf")
        elif decoder.size is None:
            await self._await_bytes(decoder.wanted, self.protocol.frame_timeout_s, "in the middle of a message")
        else:
            await self._await_rest(decoder.wanted)
        if not raw.held:
            return False
        if self._deadline == float("inf"):
            self._deadline = trio.current_time() + self.protocol.frame_timeout_s
        for chunk in raw.take():
            decoder.feed(chunk)
        raw.allow(self._window)
        return True

    async def _await_rest(self, wanted: int) -> None:
        """Wait for the rest of the message under way, whose size is known."""
        size = self._decoder.size or 0
        if self._served is not None and wanted > self._window:
            # What is read ahead may be waiting for the message in use.
            patience = min(self.protocol.frame_timeout_s, _MEMORY_TIMEOUT_S)
            with trio.move_on_after(float("inf") if self._is_ahead else patience) as scope:
                await self._served.budget.take_when_free(self.peer_id, size, self._served.caller)
                self._taken += size
            if scope.cancelled_caught:
                raise BusyError("this node has no memory for the message now", retry_after_s=patience)
        self._deadline = trio.current_time() + self.protocol.frame_timeout_s + wanted / self._limits.slowest_rate
        self._raw.allow(max(wanted, self._window))
        await self._await_bytes(wanted, self.protocol.frame_timeout_s, "in the middle of a message")

    async def _await_bytes(self, count: int, patience: float, what: str) -> None:
        """Wait until `count` bytes are held or the stream has ended; gives it up where it is silent for too long, or too slow."""
        raw = self._raw
        while raw.held < count:
            before, now = raw.held, trio.current_time()
            with trio.move_on_at(min(now + patience, self._deadline)) as scope:
                await raw.wait(count)
            if not scope.cancelled_caught:
                return
            # Were any byte enough, a few of them would hold the memory of a long message for hours.
            if trio.current_time() >= self._deadline or raw.held - before < self._least:
                await self.reset()
                how = "was too slow" if raw.held != before else f"was silent for {patience:g} s"
                raise PeerLost(f"peer {self.peer_id} {how} {what}", self.peer_id)

    def _check_clean_end(self) -> None:
        if not self._decoder.at_boundary:
            raise self._lost("in the middle of a message")
        # A peer that dies looks the same as one that closes the stream, but for the connection.
        if not self._raw.ended or self._raw.is_lost or self._raw.reset_reason is not None:
            raise self._lost("between two messages")

    def _lost(self, when: str) -> PetalnetError:
        if self._raw.is_lost:
            self._on_lost()
            return PeerLost(f"the connection to peer {self.peer_id} ended {when}", self.peer_id)
        if self._raw.reset_reason is Reason.UNSUPPORTED:
            return UnsupportedError(f"peer {self.peer_id} does not serve {self.protocol.id}", self.peer_id)
        if self._raw.reset_reason is Reason.REFUSED:
            return BusyError(f"peer {self.peer_id} has too many streams open")
        return PeerLost(f"peer {self.peer_id} ended the stream {when}", self.peer_id)

    # ---- the end

    async def _refuse(self, error: PetalnetError) -> None:
        """Tell the peer what is wrong, where it is the one that asks, and end the stream."""
        if self.served:
            with trio.move_on_after(_REFUSAL_TIMEOUT_S):
                try:
                    await self.send(Error.of(error))
                except PetalnetError:
                    return
            await self.close()
        else:
            await self.reset()

    async def close(self) -> None:
        """Say that nothing more will be sent, and let go of the stream; what the peer still sends is dropped. Never fails."""
        if not self._closed:
            self._closed = True
            self._raw.finish()
            self._give_back(self._taken)

    async def reset(self) -> None:
        """End the stream at once in both directions; the peer sees that it did not end well. Never fails."""
        if not self._closed:
            self._closed = True
            self._raw.abandon()
            self._give_back(self._taken)

    def _give_back(self, size: int) -> None:
        if size and self._served is not None:
            self._taken -= size
            self._served.budget.give_back(self.peer_id, size, self._served.caller)
