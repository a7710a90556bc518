"""The stream multiplexer's protocol: many streams of bytes over one secure channel. Sans-IO: bytes in, events out, bytes to send on demand.

    id on the wire: /petalnet/mux/1.0.0
    frame: type u8 | code u8 | reserved u16 (0) | stream u32 | length u32 | body          integers are big-endian

    type      code    length            body      meaning
    1 OPEN    0       of the name       a name    the sender opens a stream, for the protocol of that name ("": it is negotiated)
    2 DATA    0       of the data       data      the next bytes of the stream
    3 GRANT   0       bytes             -         the sender of this frame takes that many bytes more on the stream
    4 END     0       0                 -         the sender of this frame sends no more on the stream
    5 RESET   reason  0                 -         the stream is over in both directions at once
    6 CLOSE   reason  0                 -         the connection is over; stream is 0

Theory of operation
-------------------
*Streams.* The initiator of the connection opens streams with odd numbers, the other side with even ones; each side's numbers only grow.
A stream is usable from the moment at which its OPEN is queued: nobody waits for an answer, so opening costs no round trip. Naming the
protocol in OPEN saves the round trips of a negotiation as well. A side ends its half with END; a stream is forgotten once both halves
have ended or either side has reset it. Frames that cross a reset on their way are met and ignored.

*Windows.* A side may send at most `INITIAL_WINDOW` bytes on a stream, and as many more as the other side has granted. It is the reader
who grants, as it takes bytes out, so that what a peer can make this node hold is bounded and the bound belongs to the reader. A window
that is exceeded is an error of the connection: no honest peer does it. Bytes that may still come for streams that were reset here are
counted too, so that a reset gives no licence to send for ever.

*Order of sending.* Control frames (all but DATA) go first; they are small and free somebody who waits. An END stays behind the bytes of
its stream. Streams with little to send (`SHORT`) come before those with much, each kind in turn, one frame at a time, so that a decode
step of some kilobytes waits for one frame and not for the megabytes of a prefill beside it. After `LONG_TURN_AFTER` bytes of the short
ones a long one has a turn, so that nobody starves.

*Copies.* What is queued to be sent is not copied: the buffers given to `send` must stay as they are until `pending` says 0. What is
received comes as views of the bytes given to `receive`.

*Errors.* Whatever a peer of this version would never send raises MuxError, and the connection is of no use after it. A frame for a stream
that never was is one of these things; one for a stream that is over is not.

The same class serves both roles. It knows no time: deadlines, and how often a peer may open streams, are its user's business.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from petalnet.errors import ProtocolError

Buffer = bytes | bytearray | memoryview

HEADER = struct.Struct("!BBHII")
INITIAL_WINDOW = 256 * 1024
"""Bytes that may be sent on a new stream before the first grant; part of the protocol, as both sides have to know it."""
MAX_WINDOW = 2**31 - 1
MAX_DATA = 256 * 1024
"""The longest body of a DATA frame that is accepted."""
DATA_SIZE = 65519 - HEADER.size
"""The longest that is sent: with its header one message of the Noise channel. Longer ones save little and make others wait."""
MAX_NAME = 256
SHORT = 64 * 1024
LONG_TURN_AFTER = 256 * 1024
MAX_CONTROL = 8192
"""Control frames that wait for a peer which does not read; one that provokes more of them is up to no good."""

OPEN, DATA, GRANT, END, RESET, CLOSE = range(1, 7)


class Reason(IntEnum):
    """Why a stream was reset or a connection closed. An unknown one on the wire counts as CANCELLED."""

    CANCELLED = 0
    """Its user has no more use for it."""
    UNSUPPORTED = 1
    """Nobody serves the protocol that it named."""
    REFUSED = 2
    """There are too many streams already."""
    ERROR = 3
    """The other side broke the protocol."""


class MuxError(ProtocolError):
    """The peer did what no peer of this version does; the connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer has opened a stream to speak `protocol` ("" if that is to be negotiated)."""

    number: int
    protocol: str


@dataclass(frozen=True, slots=True)
class Received:
    """The next bytes of a stream, as a view of what was given to `receive`."""

    number: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer sends no more on the stream."""

    number: int


@dataclass(frozen=True, slots=True)
class WasReset:
    """The peer has ended the stream in both directions; what waited to be sent on it was dropped."""

    number: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer ends the connection."""

    reason: Reason


Event = Opened | Received | Ended | WasReset | Closed


class _Stream:
    """One stream: what may be sent and received on it, and what waits to be sent."""

    __slots__ = ("credit", "ended", "ending", "number", "queue", "queued", "remote_ended", "waits", "window")

    def __init__(self, number: int) -> None:
        self.number = number
        self.credit = INITIAL_WINDOW  # bytes that may be sent
        self.window = INITIAL_WINDOW  # bytes that the peer may send
        self.queue: deque[memoryview] = deque()
        self.queued = 0
        self.waits = False  # whether it stands in one of the two lines
        self.ending = False  # END is to follow what is queued
        self.ended = False
        self.remote_ended = False


class Mux:
    """One side of a connection.

    Args:
        initiator: whether this side dialled.
        max_streams: streams that the peer may have open; more are refused.

    Attributes:
        finished: streams that are over since this side's END has followed the peer's; for its user to take note of and to clear.
        openings: streams that the peer has opened so far, those that were refused included.
    """

    def __init__(self, *, initiator: bool, max_streams: int) -> None:
        self._max_streams = max_streams
        self._streams: dict[int, _Stream] = {}
        self._next = 1 if initiator else 2
        self._remote_parity = 0 if initiator else 1
        self._last_remote = 0
        self._remote_count = 0
        self.finished: list[int] = []
        self.openings = 0
        self._stray = 0  # bytes that may still come for streams which were reset here
        self._control: list[bytes] = []
        self._short: deque[_Stream] = deque()
        self._long: deque[_Stream] = deque()
        self._short_run = 0
        # What has come of the frame under way: a part of its header, then how much of its body is missing.
        self._part = bytearray()
        self._missing = 0
        self._number = 0  # the stream of the body under way
        self._name: bytearray | None = None  # the body, where the frame is an OPEN

    # ---- streams

    def open(self, protocol: str = "") -> int:
        """Open a stream and return its number. Raises ValueError where the name is longer than `MAX_NAME` bytes."""
        name = protocol.encode()
        if len(name) > MAX_NAME:
            raise ValueError(f"a protocol's name of {len(name)} bytes is too long")
        number = self._next
        self._next += 2
        self._streams[number] = _Stream(number)
        self._control.append(HEADER.pack(OPEN, 0, 0, number, len(name)) + name)
        return number

    def __contains__(self, number: int) -> bool:
        """Whether a stream is open in at least one direction."""
        return number in self._streams

    @property
    def remote_streams(self) -> int:
        """Streams that the peer has opened and that are not over."""
        return self._remote_count

    def send(self, number: int, parts: Sequence[Buffer]) -> None:
        """Queue bytes to be sent. Raises ValueError where the stream is over, or was ended by this side."""
        stream = self._streams.get(number)
        if stream is None or stream.ending or stream.ended:
            raise ValueError(f"stream {number} takes nothing more")
        for part in parts:
            if len(part):
                stream.queue.append(memoryview(part))
                stream.queued += len(part)
        self._line_up(stream)

    def pending(self, number: int) -> int:
        """Bytes queued on a stream that are in no frame yet; 0 where it is over."""
        stream = self._streams.get(number)
        return 0 if stream is None else stream.queued

    def withdraw(self, number: int) -> None:
        """Drop what is queued on a stream and not in a frame yet."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.queue.clear()
            stream.queued = 0
            if stream.ending and not stream.ended:  # the bytes that it waited for will not come
                self._send_end(stream, self._control)

    def end(self, number: int) -> None:
        """Send no more on a stream, after what is queued; nothing where that was said before, or the stream is over."""
        stream = self._streams.get(number)
        if stream is None or stream.ending or stream.ended:
            return
        stream.ending = True
        if not stream.queued:
            self._send_end(stream, self._control)

    def reset(self, number: int, reason: Reason = Reason.CANCELLED) -> None:
        """End a stream at once in both directions; nothing where it is over."""
        stream = self._streams.get(number)
        if stream is not None:
            self._forget(stream)
            if not stream.remote_ended:
                self._stray += stream.window
            self._control.append(HEADER.pack(RESET, reason, 0, number, 0))

    def window(self, number: int) -> int:
        """Bytes that the peer may still send on a stream; 0 where it has ended its side or the stream is over."""
        stream = self._streams.get(number)
        return 0 if stream is None or stream.remote_ended else stream.window

    def grant(self, number: int, size: int) -> None:
        """Let the peer send `size` bytes more on a stream; nothing where it will send no more anyway."""
        stream = self._streams.get(number)
        if stream is None or stream.remote_ended:
            return
        size = min(size, MAX_WINDOW - stream.window)
        if size > 0:
            stream.window += size
            self._control.append(HEADER.pack(GRANT, 0, 0, number, size))

    def close(self, reason: Reason = Reason.CANCELLED) -> None:
        """Tell the peer that the connection is over."""
        self._control.append(HEADER.pack(CLOSE, reason, 0, 0, 0))

    # ---- sending

    def has_output(self) -> bool:
        """Whether there is anything to be sent now."""
        return bool(self._control or self._short or self._long)

    def output(self, size: int) -> list[Buffer]:
        """The next bytes to be sent, in pieces: about `size` of them (and one frame at most, and all control frames); [] for none."""
        pieces: list[Buffer] = []
        if self._control:
            pieces.extend(self._control)
            self._control.clear()
        while size > 0 and (self._short or self._long):
            stream = self._next_in_line()
            stream.waits = False
            taken = min(stream.queued, stream.credit, DATA_SIZE)
            if not taken:
                continue  # it was withdrawn meanwhile
            pieces.append(HEADER.pack(DATA, 0, 0, stream.number, taken))
            self._take(stream, taken, pieces)
            size -= HEADER.size + taken
            self._line_up(stream)
            if stream.ending and not stream.queued:
                self._send_end(stream, pieces)
        return pieces

    def _next_in_line(self) -> _Stream:
        if self._short and (self._short_run < LONG_TURN_AFTER or not self._long):
            stream = self._short.popleft()
            self._short_run += stream.queued
            return stream
        self._short_run = 0
        return self._long.popleft()

    def _line_up(self, stream: _Stream) -> None:
        if not stream.waits and stream.queued and stream.credit:
            stream.waits = True
            (self._short if stream.queued <= SHORT else self._long).append(stream)

    @staticmethod
    def _take(stream: _Stream, size: int, pieces: list[Buffer]) -> None:
        stream.credit -= size
        stream.queued -= size
        queue = stream.queue
        while size:
            part = queue[0]
            if len(part) <= size:
                queue.popleft()
            else:
                queue[0], part = part[size:], part[:size]
            pieces.append(part)
            size -= len(part)

    def _send_end(self, stream: _Stream, to: list[Buffer] | list[bytes]) -> None:
        stream.ended = True
        to.append(HEADER.pack(END, 0, 0, stream.number, 0))
        if stream.remote_ended:
            self._forget(stream)
            self.finished.append(stream.number)

    # ---- receiving

    def receive(self, data: Buffer) -> list[Event]:
        """What the next bytes of the channel mean. Raises MuxError, after which nothing can be received any more."""
        events: list[Event] = []
        view = memoryview(data)
        position, size = 0, len(view)
        while position < size:
            if self._missing:
                piece = view[position : position + self._missing]
                position += len(piece)
                self._missing -= len(piece)
                self._receive_body(piece, events)
            elif not self._part and size - position >= HEADER.size:
                self._receive_header(events, *HEADER.unpack_from(view, position))
                position += HEADER.size
            else:
                piece = view[position : position + HEADER.size - len(self._part)]
                position += len(piece)
                self._part += piece
                if len(self._part) == HEADER.size:
                    header = HEADER.unpack(self._part)
                    self._part.clear()
                    self._receive_header(events, *header)
        if len(self._control) > MAX_CONTROL:
            raise MuxError("the peer asks for more answers than it reads")
        return events

    def _receive_body(self, piece: memoryview, events: list[Event]) -> None:
        if self._name is None:
            if self._number in self._streams:  # else it was reset here meanwhile
                events.append(Received(self._number, piece))
            return
        self._name += piece
        if not self._missing:
            name, self._name = self._name, None
            try:
                self._opened(self._number, name.decode(), events)
            except UnicodeDecodeError:
                raise MuxError("a protocol's name is not UTF-8") from None

    def _receive_header(self, events: list[Event], kind: int, code: int, reserved: int, number: int, length: int) -> None:
        if reserved or (code and kind not in (RESET, CLOSE)):
            raise MuxError("reserved bits of a frame are set")
        if kind == DATA:
            self._data(number, length)
        elif kind == GRANT:
            self._granted(number, length)
        elif kind == OPEN:
            self._open_header(number, length, events)
        elif length:
            raise MuxError(f"a frame of type {kind} has a length of {length}")
        elif kind == END:
            self._remote_end(number, events)
        elif kind == RESET:
            self._remote_reset(number, code, events)
        elif kind == CLOSE:
            if number:
                raise MuxError("the end of a connection names a stream")
            events.append(Closed(_reason(code)))
        else:
            raise MuxError(f"frames of type {kind} are not known")

    def _data(self, number: int, length: int) -> None:
        if not 0 < length <= MAX_DATA:
            raise MuxError(f"a frame of {length} bytes of data")
        stream = self._known(number)
        if stream is None:
            self._stray -= length
            if self._stray < 0:
                raise MuxError(f"{length} bytes for stream {number}, which is over")
        elif stream.remote_ended:
            raise MuxError(f"data after the end of stream {number}")
        else:
            stream.window -= length
            if stream.window < 0:
                raise MuxError(f"the window of stream {number} is exceeded by {-stream.window} bytes")
        self._number, self._missing = number, length

    def _granted(self, number: int, length: int) -> None:
        if not length:
            raise MuxError("a grant of nothing")
        stream = self._known(number)
        if stream is not None:
            stream.credit += length
            if stream.credit > MAX_WINDOW:
                raise MuxError(f"the window of stream {number} grows beyond what a window may be")
            self._line_up(stream)

    def _open_header(self, number: int, length: int, events: list[Event]) -> None:
        if number % 2 != self._remote_parity or number <= self._last_remote:
            raise MuxError(f"the peer may not open a stream {number}")
        if length > MAX_NAME:
            raise MuxError(f"a protocol's name of {length} bytes")
        self._last_remote = number
        self.openings += 1
        if length:
            self._number, self._missing, self._name = number, length, bytearray()
        else:
            self._opened(number, "", events)

    def _opened(self, number: int, protocol: str, events: list[Event]) -> None:
        if self._remote_count >= self._max_streams:
            self._stray += INITIAL_WINDOW
            self._control.append(HEADER.pack(RESET, Reason.REFUSED, 0, number, 0))
            return
        self._streams[number] = _Stream(number)
        self._remote_count += 1
        events.append(Opened(number, protocol))

    def _remote_end(self, number: int, events: list[Event]) -> None:
        stream = self._known(number)
        if stream is None:
            return
        if stream.remote_ended:
            raise MuxError(f"stream {number} ends twice")
        stream.remote_ended = True
        if stream.ended:
            self._forget(stream)
        events.append(Ended(number))

    def _remote_reset(self, number: int, code: int, events: list[Event]) -> None:
        stream = self._known(number)
        if stream is not None:
            self._forget(stream)
            events.append(WasReset(number, _reason(code)))

    def _known(self, number: int) -> _Stream | None:
        """The stream, or None where it is over. Raises MuxError where it never was."""
        stream = self._streams.get(number)
        if stream is None:
            ever = number <= self._last_remote if number % 2 == self._remote_parity else number < self._next
            if not ever or not number:
                raise MuxError(f"there is no stream {number}")
        return stream

    def _forget(self, stream: _Stream) -> None:
        stream.queue.clear()
        stream.queued = 0
        del self._streams[stream.number]
        if stream.number % 2 == self._remote_parity:
            self._remote_count -= 1


def _reason(code: int) -> Reason:
    return Reason(code) if code in Reason._value2member_map_ else Reason.CANCELLED
