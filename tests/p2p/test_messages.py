"""Messages come back as they were sent, and whatever else is decoded was checked."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import BusyError, CallerError, PeerLost, ProtocolError, ServerError, TooLargeError, UnsupportedError
from petalnet.p2p.fields import FLOATS, ITEM_SIZES, MESSAGE_TYPES, Blob, Message, blob_size
from petalnet.p2p.frames import Frame, FrameDecoder, FrameLimits
from petalnet.p2p.messages import Error, Find, Ping, Records, Store, decode_message, encode_message
from petalnet.p2p.session_messages import Attach, Attached, OpenSession, SessionOpened, Step, StepDone

FLOAT = st.floats(0, 3600, allow_nan=False)
COUNT = st.integers(0, 2**20)


def blobs() -> st.SearchStrategy[Blob]:
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    raw = st.tuples(st.sampled_from(sorted(ITEM_SIZES)), shapes, st.just("raw"))
    rounded = st.tuples(st.sampled_from(FLOATS), shapes, st.sampled_from(["bfloat16", "float16", "int8"]))

    def fill(description: tuple[str, tuple[int, ...], str]) -> st.SearchStrategy[Blob]:
        size = blob_size(*description)
        return st.binary(min_size=size, max_size=size).map(lambda data: Blob(*description, data))

    return st.one_of(raw, rounded).flatmap(fill)


OPTIONAL = st.none() | blobs()
MESSAGES = st.one_of(
    st.builds(Error, st.sampled_from(["caller", "busy", "server"]), st.text(max_size=100), FLOAT, COUNT),
    st.builds(Ping, COUNT),
    st.builds(Store, st.lists(st.binary(min_size=32, max_size=32), max_size=3).map(tuple), st.binary(max_size=100)),
    st.builds(Find, st.binary(max_size=32)),
    st.builds(Records, st.lists(st.binary(max_size=50), max_size=5).map(tuple)),
    st.builds(OpenSession, st.text(max_size=64), st.text(max_size=128), st.integers(0, 100), st.integers(1, 100), st.integers(1, 1000)),
    st.builds(SessionOpened, COUNT, st.booleans()),
    st.builds(Attach, blobs()),
    st.builds(Attached, COUNT),
    st.builds(
        Step, COUNT, COUNT, blobs(), OPTIONAL, OPTIONAL, OPTIONAL, OPTIONAL, st.booleans(), keep=COUNT, promise_rows=COUNT, names=OPTIONAL
    ),
    st.builds(StepDone, COUNT, COUNT, blobs(), FLOAT, FLOAT),
)


def comparable(message: Message) -> dict[str, Any]:
    found = {}
    for item in dataclasses.fields(message):  # type: ignore[arg-type]
        value = getattr(message, item.name)
        found[item.name] = (value.dtype, value.shape, value.codec, bytes(value.data)) if isinstance(value, Blob) else value
    return found


def decode(data: bytes) -> Message:
    decoder = FrameDecoder(FrameLimits())
    decoder.feed(data)
    frame = decoder.next_frame()
    assert frame is not None and decoder.at_boundary
    return decode_message(frame)


@given(MESSAGES)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    back = decode(b"".join(encode_message(message)))
    assert type(back) is type(message)
    assert comparable(back) == comparable(message)


@given(MESSAGES, st.data())
def test_a_damaged_message_is_a_message_or_a_typed_error(message: Message, data: st.DataObject) -> None:
    decoder = FrameDecoder(FrameLimits())
    decoder.feed(b"".join(encode_message(message)))
    frame = decoder.next_frame()
    assert frame is not None
    header = bytearray(frame.header)
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    payload = frame.payload[: data.draw(st.integers(0, len(frame.payload)))]
    with contextlib.suppress(ProtocolError, UnsupportedError):
        decode_message(Frame(bytes(header), payload))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=10) | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(-9, 2**64 - 1), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted(MESSAGE_TYPES)) | st.text(max_size=10)
FIELDS = st.dictionaries(
    st.sampled_from(["nonce", "code", "message", "keys", "record", "hidden", "step", "position", "mask", "x"]), JSON, max_size=5
)


@given(st.binary(max_size=60) | JSON.map(msgpack.packb) | st.tuples(NAMES, FIELDS, FIELDS).map(msgpack.packb), st.binary(max_size=40))
def test_any_header_is_a_message_or_a_typed_error(header: bytes, payload: bytes) -> None:
    with contextlib.suppress(ProtocolError, UnsupportedError):
        decode_message(Frame(header, bytearray(payload)))


def test_arrays_lie_where_tensors_may_lie() -> None:
    """Each array begins at an address from which any dtype can be read, whatever lies before it."""
    import numpy

    step = Step(
        1, 0, Blob("uint8", (3,), "raw", bytes(3)), mask=Blob("bool", (5,), "raw", bytes(5)), prompts=Blob("float32", (2,), "raw", bytes(8))
    )
    back = decode(b"".join(encode_message(step)))
    assert isinstance(back, Step) and back.prompts is not None
    for blob in (back.hidden, back.prompts):
        address = numpy.frombuffer(blob.data, dtype="uint8").ctypes.data
        assert address % 8 == 0
        assert not memoryview(blob.data).readonly


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (["nonsense", {}, {}], UnsupportedError),
        (["ping", {}, {}], ProtocolError),
        (["ping", {"nonce": -1}, {}], ProtocolError),
        (["ping", {"nonce": True}, {}], ProtocolError),
        (["ping", {"nonce": 1.0}, {}], ProtocolError),
        (["error", {"code": "busy", "message": "x", "retry_after_s": float("nan")}, {}], ProtocolError),
        (["error", {"code": "busy", "message": "x" * 1001}, {}], ProtocolError),
        (["find", {"key": bytes(33)}, {}], ProtocolError),
        (["step_done", {"step": 0, "position": 0}, {}], ProtocolError),
        (["step_done", {"step": 0, "position": 0}, {"output": ["float32", [-1], "raw"]}], ProtocolError),
        (["step_done", {"step": 0, "position": 0}, {"output": ["float32", [2**40], "raw"]}], ProtocolError),
        (["step_done", {"step": 0, "position": 0}, {"output": ["object", [1], "raw"]}], ProtocolError),
        (["step_done", {"step": 0, "position": 0}, {"output": ["int64", [1], "int8"]}], ProtocolError),
        (["step_done", {"step": 0, "position": 0}, {"output": ["float32", [1] * 7, "raw"]}], ProtocolError),
        (["step_done", {"step": 0, "position": 0}, {"output": "float32"}], ProtocolError),
        ({}, ProtocolError),
        (["ping", {"nonce": 1}], ProtocolError),
        (["attach", {}, {}], ProtocolError),
        (["attached", {"position": -1}, {}], ProtocolError),
        (["attached", {"position": 2**24 + 1}, {}], ProtocolError),
        (["session_opened", {"free_kv_tokens": 1, "shares_prefixes": 1}, {}], ProtocolError),
        (["error", {"code": "busy", "message": "x", "fits_tokens": -1}, {}], ProtocolError),
        (["step", {"step": 0, "position": 0, "keep": -2}, {"hidden": ["float32", [1, 0, 1], "raw"]}], ProtocolError),
        (["step", {"step": 0, "position": 0, "keep": 2**24 + 1}, {"hidden": ["float32", [1, 0, 1], "raw"]}], ProtocolError),
        (["step", {"step": 0, "position": 0, "promise_rows": "1"}, {"hidden": ["float32", [1, 0, 1], "raw"]}], ProtocolError),
        (["step", {"step": 0, "position": 0}, {"hidden": ["float32", [0], "raw"], "names": ["uint8", [2], "int8"]}], ProtocolError),
    ],
)
def test_what_is_wrong_is_refused_with_its_class(header: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        decode_message(Frame(msgpack.packb(header), bytearray()))


def test_bytes_that_belong_to_nothing_are_refused() -> None:
    with pytest.raises(ProtocolError, match="belong to no array"):
        decode_message(Frame(msgpack.packb(["ping", {"nonce": 1}, {}]), bytearray(3)))


def test_fields_of_a_later_version_are_ignored() -> None:
    assert decode_message(Frame(msgpack.packb(["ping", {"nonce": 1, "later": [1, 2]}, {}]), bytearray())) == Ping(1)


def test_errors_keep_their_class_on_the_wire() -> None:
    for error, expected in [
        (CallerError("too long"), CallerError),
        (BusyError("full", 2.5, 4711), BusyError),
        (TooLargeError("never"), TooLargeError),
        (ServerError("broken"), ServerError),
        (PeerLost("gone"), ServerError),
        (UnsupportedError("what"), UnsupportedError),
        (BusyError("full", 1e9), BusyError),
    ]:
        sent = Error.of(error)
        back = decode(b"".join(encode_message(sent)))
        assert isinstance(back, Error)
        raised = back.exception("peer")
        assert type(raised) is expected and str(error) in str(raised)
        if isinstance(error, BusyError) and isinstance(raised, BusyError):
            assert raised.retry_after_s == min(error.retry_after_s, 3600)
            assert raised.fits_tokens == error.fits_tokens


def test_a_peers_words_come_without_control_characters() -> None:
    told = Error("caller", "first\nsecond\x1b[2J\x00 ü").exception("peer")
    assert str(told) == "first second [2J  ü"
