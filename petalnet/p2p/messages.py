"""The typed messages that peers exchange, and their coding as frame headers. Sans-IO and free of torch.

A message is a frozen dataclass. Scalar fields travel in a msgpack map, arrays (`Blob`) as raw bytes in the frame's payload, in the
order of their fields. Whatever is decoded was checked field by field (type, range, length, sizes that add up); a field that is
missing or wrong is a `ProtocolError`, an unknown message type an `UnsupportedError`, and unknown extra fields are ignored, so that a
later minor version may add some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack

from petalnet.errors import PetalnetError, ProtocolError, UnsupportedError, from_wire, to_wire
from petalnet.p2p import pass_messages, session_messages, weight_messages  # noqa: F401  # whoever decodes has to know all types
from petalnet.p2p.fields import MESSAGE_TYPES, Message, decode_blob, integer, many, message_type, number, octets, scalar, text
from petalnet.p2p.frames import Buffer, Frame, encode_frame


@message_type("error")
@dataclass(frozen=True)
class Error(Message):
    """The answer to a request that failed: the error's class, one line for a person, and for *busy* when to try again (seconds) and how
    many KV tokens (rows × max_length) would fit now (0 where that is not known). `step`: the number of the step that failed; 0 where it
    was another request."""

    code: str = scalar(text(20))
    message: str = scalar(text(1000))
    retry_after_s: float = scalar(number(0, 3600), 0.0)
    fits_tokens: int = scalar(integer(0, 2**53), 0)
    step: int = scalar(integer(0, 2**53), 0)

    @classmethod
    def of(cls, error: PetalnetError, step: int = 0) -> Error:
        code, message, retry_after_s, fits_tokens = to_wire(error)
        return cls(code, message, min(max(retry_after_s, 0.0), 3600.0), fits_tokens, step)

    def exception(self, peer_id: str) -> PetalnetError:
        return from_wire(self.code, self.message, self.retry_after_s, self.fits_tokens, peer_id)


@message_type("ping")
@dataclass(frozen=True)
class Ping(Message):
    """A heartbeat; answered by a `Pong` of the same nonce."""

    nonce: int = scalar(integer(0, 2**63 - 1))


@message_type("pong")
@dataclass(frozen=True)
class Pong(Message):
    nonce: int = scalar(integer(0, 2**63 - 1))


@message_type("dial_back")
@dataclass(frozen=True)
class DialBack(Message):
    """Can this node be reached, at the IP address where you see it, at these TCP ports? Answered by `DialBackDone`."""

    ports: tuple[int, ...] = scalar(many(integer(1, 65535), 4))


@message_type("dial_back_done")
@dataclass(frozen=True)
class DialBackDone(Message):
    """The IP address at which the asker is seen, and those of the ports at which it answered there, as itself."""

    observed: str = scalar(text(64))
    ports: tuple[int, ...] = scalar(many(integer(1, 65535), 4))


@message_type("store")
@dataclass(frozen=True)
class Store(Message):
    """Keep this signed server record under these keys (32 bytes each); answered by `Stored`."""

    keys: tuple[bytes, ...] = scalar(many(octets(32), 64))
    record: bytes = scalar(octets(8192))


@message_type("stored")
@dataclass(frozen=True)
class Stored(Message):
    """The record is kept, or a newer one of the same server is.

    Attributes:
        newest: the highest sequence number that is remembered of the server: above the record's own, the record was not taken in.
        counts: how many records are kept under each of the keys.
    """

    newest: int = scalar(integer(0, 2**63 - 1), 0)
    counts: tuple[int, ...] = scalar(many(integer(0, 2**53), 64), ())


@message_type("find")
@dataclass(frozen=True)
class Find(Message):
    """Which records are kept under this key; answered by `Records`."""

    key: bytes = scalar(octets(32))


@message_type("records")
@dataclass(frozen=True)
class Records(Message):
    """Records under a key: all of them, or a sample where they are many.

    Attributes:
        ages: for each record the seconds since it came from its server, or none at all where they are not known.
        count: records that there are under the key: more than these where they are a sample.
    """

    records: tuple[bytes, ...] = scalar(many(octets(8192), 1024))
    ages: tuple[float, ...] = scalar(many(number(0, 1e9), 1024), ())
    count: int = scalar(integer(0, 2**53), 0)


def encode_message(message: Message) -> list[Buffer]:
    """The frame of a message, in parts; arrays in it are not copied."""
    scalars: dict[str, Any] = {}
    blobs: dict[str, Any] = {}
    parts: list[Buffer] = []
    for name, check, _ in message.layout:
        value = getattr(message, name)
        if check is not None:
            scalars[name] = value
        elif value is not None:
            blobs[name] = (value.dtype, value.shape, value.codec)
            parts.append(value.data)
    return encode_frame(msgpack.packb((message.name, scalars, blobs)), parts)


def decode_message(frame: Frame) -> Message:
    """The checked message of a frame.

    Raises:
        ProtocolError: the header is not msgpack, a field is missing or out of range, or sizes do not add up.
        UnsupportedError: the message type is not known.
    """
    try:
        header = msgpack.unpackb(frame.header, max_str_len=16384, max_bin_len=16384, max_array_len=2048, max_map_len=64)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError("a frame header is not valid msgpack") from error
    if type(header) is not list or [type(part) for part in header] != [str, dict, dict]:
        raise ProtocolError("a frame header does not have the form of a message")
    name, scalars, blobs = header
    cls = MESSAGE_TYPES.get(name)
    if cls is None:
        raise UnsupportedError(f"message type {name[:40]!r} is not known")
    values: dict[str, Any] = {}
    payload, offset = memoryview(frame.payload), 0
    for field_name, check, required in cls.layout:
        if check is None:
            description = blobs.get(field_name)
            if description is not None:
                values[field_name], offset = decode_blob(description, payload, offset)
            elif required:
                raise ProtocolError(f"message {name} lacks the array {field_name!r}")
        elif field_name in scalars:
            try:
                values[field_name] = check(scalars[field_name])
            except ValueError as error:
                raise ProtocolError(f"field {field_name!r} of message {name}: {error}") from error
        elif required:
            raise ProtocolError(f"message {name} lacks the field {field_name!r}")
    if offset != len(payload):
        raise ProtocolError(f"message {name} has {len(payload) - offset} bytes that belong to no array")
    return cls(**values)
