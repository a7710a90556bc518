"""Frames: how one message is laid out on a byte stream. Sans-IO: bytes in, frames out.

    version u8 | flags u8 (0) | reserved u16 (0) | header length u32 | payload length u32 | header | payload

Integers are big-endian. The header is msgpack (see `messages`), the payload is raw tensor bytes. Lengths are checked against the
limits of the protocol before any memory is taken for them, and memory grows only as bytes arrive, so a peer that announces much and
sends little costs little.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from petalnet.errors import ProtocolError, UnsupportedError

VERSION = 1
PREFIX = struct.Struct("!BBHII")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: `header` as msgpack bytes, `payload` as raw bytes in memory of its own (so that tensors in it are aligned)."""

    header: bytes
    payload: bytearray


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """The longest header and payload that a reader accepts, in bytes."""

    header: int = 16 * 1024
    payload: int = 256 * 1024 * 1024


def encode_frame(header: bytes, parts: Sequence[Buffer] = ()) -> list[Buffer]:
    """One frame whose payload is `parts` in sequence: itself in parts, to be sent one after the other. The payload is not copied."""
    size = sum(len(part) for part in parts)
    return [PREFIX.pack(VERSION, 0, 0, len(header), size) + header, *parts]


class FrameDecoder:
    """Cuts a byte stream into frames.

    `feed` takes bytes as they come, `next_frame` gives each complete frame once, `wanted` says how many more bytes the frame
    under way needs, `size` how long it is altogether, and `at_boundary` whether the stream may end here.
    """

    def __init__(self, limits: FrameLimits) -> None:
        self._limits = limits
        self._chunks: deque[memoryview] = deque()
        self._available = 0
        self._lengths: tuple[int, int] | None = None

    def feed(self, data: Buffer) -> None:
        """Take the next bytes of the stream; they are copied out only when a frame is complete."""
        if len(data):
            self._chunks.append(memoryview(data))
            self._available += len(data)

    @property
    def wanted(self) -> int:
        """Bytes that are still missing for the prefix, or for the whole of the frame under way; at least 1 while nothing is complete."""
        needed = PREFIX.size if self._lengths is None else sum(self._lengths)
        return max(needed - self._available, 0)

    @property
    def size(self) -> int | None:
        """Bytes of the header and payload of the frame under way; None while its prefix is not complete."""
        return None if self._lengths is None else sum(self._lengths)

    @property
    def at_boundary(self) -> bool:
        """True between frames."""
        return self._lengths is None and not self._available

    def next_frame(self) -> Frame | None:
        """The next complete frame, or None until more bytes are fed.

        Raises:
            UnsupportedError: the frame has a version that is not known.
            ProtocolError: reserved bits are set or a length exceeds the limits. After either the stream cannot be read on.
        """
        if self._lengths is None:
            if self._available < PREFIX.size:
                return None
            version, flags, reserved, header_size, payload_size = PREFIX.unpack(self._take(PREFIX.size))
            if version != VERSION:
                raise UnsupportedError(f"frame version {version} is not known; this node speaks version {VERSION}")
            if flags or reserved:
                raise ProtocolError("reserved bits of a frame are set")
            if header_size > self._limits.header:
                raise ProtocolError(f"a frame header of {header_size} bytes exceeds the limit of {self._limits.header}")
            if payload_size > self._limits.payload:
                raise ProtocolError(f"a frame payload of {payload_size} bytes exceeds the limit of {self._limits.payload}")
            self._lengths = (header_size, payload_size)
        header_size, payload_size = self._lengths
        if self._available < header_size + payload_size:
            return None
        self._lengths = None
        return Frame(bytes(self._take(header_size)), self._take(payload_size))

    def _take(self, size: int) -> bytearray:
        self._available -= size
        parts = []
        while size:
            chunk = self._chunks[0]
            if len(chunk) <= size:
                self._chunks.popleft()
            else:
                self._chunks[0], chunk = chunk[size:], chunk[:size]
            parts.append(chunk)
            size -= len(chunk)
        return bytearray().join(parts)
