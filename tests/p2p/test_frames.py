"""Frames survive any cutting of the byte stream, and nothing else passes for one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import ProtocolError, UnsupportedError
from petalnet.p2p.frames import PREFIX, FrameDecoder, FrameLimits, encode_frame

LIMITS = FrameLimits(header=64, payload=256)
frames = st.tuples(st.binary(max_size=64), st.lists(st.binary(max_size=64), max_size=4))


@given(st.lists(frames, max_size=5), st.data())
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(sent: list[tuple[bytes, list[bytes]]], data: st.DataObject) -> None:
    stream = b"".join(b"".join(encode_frame(header, parts)) for header, parts in sent)
    decoder, received = FrameDecoder(LIMITS), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        decoder.feed(stream[:size])
        stream = stream[size:]
        while (frame := decoder.next_frame()) is not None:
            received.append((frame.header, bytes(frame.payload)))
            assert isinstance(frame.payload, bytearray)  # memory of its own
    assert received == [(header, b"".join(parts)) for header, parts in sent]
    assert decoder.at_boundary


@given(frames)
def test_wanted_is_what_is_missing(sent: tuple[bytes, list[bytes]]) -> None:
    """Reading exactly what is wanted, again and again, ends with the frame and not a byte more."""
    data, decoder, read = b"".join(encode_frame(*sent)), FrameDecoder(LIMITS), 0
    while (frame := decoder.next_frame()) is None:
        wanted = decoder.wanted
        assert wanted >= 1
        decoder.feed(data[read : read + wanted])
        read += wanted
        assert not decoder.at_boundary
    assert read == len(data)
    assert (frame.header, bytes(frame.payload)) == (sent[0], b"".join(sent[1]))
    assert decoder.at_boundary


@given(st.binary(max_size=400))
def test_rubbish_is_a_frame_or_an_error(data: bytes) -> None:
    decoder = FrameDecoder(LIMITS)
    decoder.feed(data)
    try:
        while (frame := decoder.next_frame()) is not None:
            assert len(frame.header) <= 64 and len(frame.payload) <= 256
    except (ProtocolError, UnsupportedError):
        return
    assert decoder.wanted >= 1


@pytest.mark.parametrize(
    ("prefix", "error"),
    [
        (PREFIX.pack(2, 0, 0, 0, 0), UnsupportedError),
        (PREFIX.pack(0, 0, 0, 0, 0), UnsupportedError),
        (PREFIX.pack(1, 1, 0, 0, 0), ProtocolError),
        (PREFIX.pack(1, 0, 1, 0, 0), ProtocolError),
        (PREFIX.pack(1, 0, 0, 65, 0), ProtocolError),
        (PREFIX.pack(1, 0, 0, 0, 257), ProtocolError),
        (PREFIX.pack(1, 0, 0, 2**32 - 1, 2**32 - 1), ProtocolError),
    ],
)
def test_a_bad_prefix_is_refused_before_anything_follows(prefix: bytes, error: type[Exception]) -> None:
    decoder = FrameDecoder(LIMITS)
    decoder.feed(prefix)
    with pytest.raises(error):
        decoder.next_frame()


def test_the_limits_themselves_are_allowed() -> None:
    decoder = FrameDecoder(LIMITS)
    decoder.feed(b"".join(encode_frame(bytes(64), [bytes(256)])))
    frame = decoder.next_frame()
    assert frame is not None and len(frame.header) == 64 and len(frame.payload) == 256


def test_the_layout_is_the_documented_one() -> None:
    assert b"".join(encode_frame(b"head", [b"pay", b"load"])) == struct.pack("!BBHII", 1, 0, 0, 4, 7) + b"headpayload"
