"""The typed messages that peers exchange, and their coding as frame headers. Sans-IO and free of torch.

A message is a frozen dataclass. Scalar fields travel in a msgpack map, arrays (`Blob`) as raw bytes in the frame's payload, in the
order of their fields. Whatever is decoded was checked field by field (type, range, length, sizes that add up); a field that is
missing or wrong is a `ProtocolError`, an unknown message type an `UnsupportedError`, and unknown extra fields are ignored, so that a
later minor version may add some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import msgpack

from petalnet.errors import PetalnetError, ProtocolError, UnsupportedError, from_wire, to_wire
from petalnet.p2p.frames import Buffer, Frame, encode_frame

MAX_DIMENSIONS = 6
MAX_DIMENSION = 1 << 31
MAX_BLOCKS = 4096
MAX_TOKENS = 1 << 24
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
FLOATS = ("float32", "float16", "bfloat16")
CODECS = ("raw", "bfloat16", "float16", "int8")
INT8_BLOCK = 64
"""Elements that share one scale in the blockwise int8 codec (64 as in QLoRA's smallest block, arXiv:2305.14314)."""
UNIT_TOKENS = 64
"""Positions of a unit. A name stands for one unit of a row and all units before it, whose KV entries a server may keep for later."""
NAME_BYTES = 16
"""Bytes of a unit's name; the client's hash of what entered the session's blocks."""
KEEP_NONE = -1
"""`Step.keep` of a step whose outputs nobody wants: a prompt's chunks before the last."""
MAX_HOPS = 256
"""Servers of a chain whose times a step may carry."""


@dataclass(frozen=True, slots=True)
class Blob:
    """An array as it lies on the wire.

    Attributes:
        dtype: what the receiver gets, one of `ITEM_SIZES`.
        shape: its dimensions.
        codec: "raw" (the bytes of dtype, little-endian, C order), "bfloat16" or "float16" (rounded), or "int8" (blockwise: one float32
            scale for each `INT8_BLOCK` elements of the flattened array, all scales first, then the int8 values).
        data: the bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    codec: str
    data: Buffer


def blob_size(dtype: str, shape: Sequence[int], codec: str) -> int:
    """Bytes that an array of this description takes on the wire. Raises ProtocolError where the description makes no sense."""
    if dtype not in ITEM_SIZES or codec not in CODECS:
        raise ProtocolError(f"unknown array type {dtype!r} or codec {codec!r}")
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < MAX_DIMENSION for n in shape):
        raise ProtocolError("an array has too many or impossible dimensions")
    count = math.prod(shape)
    if codec == "raw":
        return count * ITEM_SIZES[dtype]
    if dtype not in FLOATS:
        raise ProtocolError(f"codec {codec} is for floating-point arrays, not {dtype}")
    return count + 4 * -(-count // INT8_BLOCK) if codec == "int8" else 2 * count


Check = Callable[[Any], Any]


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high} is needed")
        return value

    return check


def number(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
            raise ValueError(f"a number from {low} to {high} is needed")
        return float(value)

    return check


def text(longest: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > longest:
            raise ValueError(f"a text of at most {longest} characters is needed")
        return value

    return check


def octets(longest: int) -> Check:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) > longest:
            raise ValueError(f"at most {longest} bytes are needed")
        return value

    return check


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false is needed")
    return value


def many(check: Check, most: int) -> Check:
    def check_all(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) > most:
            raise ValueError(f"a list of at most {most} entries is needed")
        return tuple(check(entry) for entry in value)

    return check_all


def _is(check: Check, default: Any = MISSING) -> Any:
    return field(metadata={"check": check}) if default is MISSING else field(default=default, metadata={"check": check})


def _blob(optional: bool = False) -> Any:
    metadata = {"blob": True}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


_REGISTRY: dict[str, type[Message]] = {}
M = TypeVar("M", bound="type[Message]")


class Message:
    """Base of all messages.

    Attributes:
        name: the type's name on the wire.
        layout: its fields in their order: the name, the check of a scalar (None for an array), and whether it may not be missing.
    """

    name: ClassVar[str]
    layout: ClassVar[tuple[tuple[str, Callable[[Any], Any] | None, bool], ...]]
    __slots__ = ()


def _message(name: str) -> Callable[[M], M]:
    def register(cls: M) -> M:
        cls.name = name
        cls.layout = tuple(
            (item.name, None if "blob" in item.metadata else item.metadata["check"], item.default is MISSING)
            for item in fields(cls)  # type: ignore[arg-type]
        )
        _REGISTRY[name] = cls
        return cls

    return register


@_message("error")
@dataclass(frozen=True)
class Error(Message):
    """The answer to a request that failed: the error's class, one line for a person, and for *busy* when to try again (seconds) and how
    many KV tokens (rows × max_length) would fit now (0 where that is not known). `step`: the number of the step that failed; 0 where it
    was another request."""

    code: str = _is(text(20))
    message: str = _is(text(1000))
    retry_after_s: float = _is(number(0, 3600), 0.0)
    fits_tokens: int = _is(integer(0, 2**53), 0)
    step: int = _is(integer(0, 2**53), 0)

    @classmethod
    def of(cls, error: PetalnetError, step: int = 0) -> Error:
        code, message, retry_after_s, fits_tokens = to_wire(error)
        return cls(code, message, min(max(retry_after_s, 0.0), 3600.0), fits_tokens, step)

    def exception(self, peer_id: str) -> PetalnetError:
        return from_wire(self.code, self.message, self.retry_after_s, self.fits_tokens, peer_id)


@_message("ping")
@dataclass(frozen=True)
class Ping(Message):
    """A heartbeat; answered by a `Pong` of the same nonce."""

    nonce: int = _is(integer(0, 2**63 - 1))


@_message("pong")
@dataclass(frozen=True)
class Pong(Message):
    nonce: int = _is(integer(0, 2**63 - 1))


@_message("dial_back")
@dataclass(frozen=True)
class DialBack(Message):
    """Can this node be reached, at the IP address where you see it, at these TCP ports? Answered by `DialBackDone`."""

    ports: tuple[int, ...] = _is(many(integer(1, 65535), 4))


@_message("dial_back_done")
@dataclass(frozen=True)
class DialBackDone(Message):
    """The IP address at which the asker is seen, and those of the ports at which it answered there, as itself."""

    observed: str = _is(text(64))
    ports: tuple[int, ...] = _is(many(integer(1, 65535), 4))


@_message("store")
@dataclass(frozen=True)
class Store(Message):
    """Keep this signed server record under these keys (32 bytes each); answered by `Stored`."""

    keys: tuple[bytes, ...] = _is(many(octets(32), 64))
    record: bytes = _is(octets(8192))


@_message("stored")
@dataclass(frozen=True)
class Stored(Message):
    """The record is kept, or a newer one of the same server is.

    Attributes:
        newest: the highest sequence number that is remembered of the server: above the record's own, the record was not taken in.
        counts: how many records are kept under each of the keys.
    """

    newest: int = _is(integer(0, 2**63 - 1), 0)
    counts: tuple[int, ...] = _is(many(integer(0, 2**53), 64), ())


@_message("find")
@dataclass(frozen=True)
class Find(Message):
    """Which records are kept under this key; answered by `Records`."""

    key: bytes = _is(octets(32))


@_message("records")
@dataclass(frozen=True)
class Records(Message):
    """Records under a key: all of them, or a sample where they are many.

    Attributes:
        ages: for each record the seconds since it came from its server, or none at all where they are not known.
        count: records that there are under the key: more than these where they are a sample.
    """

    records: tuple[bytes, ...] = _is(many(octets(8192), 1024))
    ages: tuple[float, ...] = _is(many(number(0, 1e9), 1024), ())
    count: int = _is(integer(0, 2**53), 0)


@_message("open_session")
@dataclass(frozen=True)
class OpenSession(Message):
    """Begin an inference session on blocks [first, end) of a model; answered by `SessionOpened`.

    Attributes:
        session: a random id that the client gives to all servers of a chain.
        max_length: the most KV entries that a row will take.
        promise_rows: set aside KV room for so many rows at once, which may be answered by *busy*; 0: the first step asks for it.
        takes_from: the peer, if any, whose `OpenLink` may bring steps for this session; nobody else's may, the client aside.
        pushes_to: the server, if any, that runs the blocks from `end` on: the outputs of steps go there as the inputs of its steps, and
            only to the client where it cannot be reached. A session that pushes keeps its outputs (see `Replay`).
    """

    session: str = _is(text(64))
    model: str = _is(text(128))
    first: int = _is(integer(0, MAX_BLOCKS))
    end: int = _is(integer(1, MAX_BLOCKS))
    max_length: int = _is(integer(1, MAX_TOKENS))
    promise_rows: int = _is(integer(0, MAX_TOKENS), 0)
    takes_from: str = _is(text(128), "")
    pushes_to: str = _is(text(128), "")


@_message("session_opened")
@dataclass(frozen=True)
class SessionOpened(Message):
    """A session is open.

    Attributes:
        free_kv_tokens: KV tokens that no session has been promised.
        shares_prefixes: whether `Attach` finds what other peers' sessions have named; otherwise only what the same peer's have.
        dtype: what the server computes in: hidden states lose nothing on the way to and from it in a codec of that name.
        codecs: the codecs that the server reads and writes.
    """

    free_kv_tokens: int = _is(integer(0, 2**53))
    shares_prefixes: bool = _is(flag, False)
    dtype: str = _is(text(20), "")
    codecs: tuple[str, ...] = _is(many(text(20), 16), ("raw",))


@_message("open_link")
@dataclass(frozen=True)
class OpenLink(Message):
    """From server to server: what follows are `Step`s of the session of this id whose blocks begin at `first`. Answered by `LinkOpened`
    once the receiver knows the session, and it names the sender in `takes_from`. The steps themselves are answered to the client."""

    session: str = _is(text(64))
    first: int = _is(integer(0, MAX_BLOCKS))


@_message("link_opened")
@dataclass(frozen=True)
class LinkOpened(Message):
    """Steps may follow."""


@_message("link_down")
@dataclass(frozen=True)
class LinkDown(Message):
    """To a session's client: the server that the outputs were to go to cannot be reached from here. From now on they come to the client.

    Attributes:
        reason: one line for a person.
        pushed: the last step whose output went to that server, which may have got it or not; 0 for none.
    """

    reason: str = _is(text(1000))
    pushed: int = _is(integer(0, 2**53), 0)


@_message("reserve")
@dataclass(frozen=True)
class Reserve(Message):
    """Set aside KV room for at least so many rows of the session; answered by `Reserved`, or *busy*."""

    rows: int = _is(integer(1, MAX_TOKENS))


@_message("reserved")
@dataclass(frozen=True)
class Reserved(Message):
    """The room is there; KV tokens that no session has been promised."""

    free_kv_tokens: int = _is(integer(0, 2**53))


@_message("replay")
@dataclass(frozen=True)
class Replay(Message):
    """The outputs for KV entries [position, position + tokens) of all rows once more, of a session that pushes; answered by a `StepDone`
    of the same number as soon as that step has been computed there and the session has come that far. `codec`: as of a step."""

    step: int = _is(integer(0, 2**53))
    position: int = _is(integer(0, MAX_TOKENS))
    tokens: int = _is(integer(1, MAX_TOKENS))
    codec: str = _is(text(20), "raw")


@_message("attach")
@dataclass(frozen=True)
class Attach(Message):
    """Before a session's first step: its rows begin with the KV entries of named units, as far as they are known. Answered by `Attached`.

    Attributes:
        names: uint8 [rows, units, NAME_BYTES], each row's units in their order from position 0 on.
    """

    names: Blob = _blob()


@_message("attached")
@dataclass(frozen=True)
class Attached(Message):
    """KV entries that each row of the session has now: whole units, the same for all rows; 0 where nothing was known.

    The first step may be at this position or, where other servers of the route know less, at a lower one.
    """

    position: int = _is(integer(0, MAX_TOKENS))


@_message("step")
@dataclass(frozen=True)
class Step(Message):
    """Run new tokens through the session's blocks. The answer is a `StepDone` to the client; in a session that pushes, the step goes on
    to the next server instead, with the output in place of `hidden` and `prompts` for the blocks that are left.

    Attributes:
        step: a number above that of all steps before, which the answer repeats. A step whose number has been taken is dropped: it came both
            from the server before and from the client.
        position: KV entries before this step; lower than what the server has means: roll back to it first.
        hidden: [rows, new, hidden], a float dtype; new may be 0.
        mask: bool [rows, position + new], False where a token is padding; absent when nothing is.
        position_ids: int32 [rows, new]; absent when they are position … position + new - 1 in every row.
        reach: where the step is only a part of what belongs together, one past the last position of the whole; 0 where it is all of it.
            Some models turn keys by angles that depend on it.
        prompts: [blocks, rows, prompt length, hidden], added to each block's input at its first positions; for the session's blocks and,
            where it pushes, all that follow in the chain.
        order: int64 [rows], which of the session's rows each row continues (beams); absent for each its own.
        all_hidden: answer with the outputs of every block instead of the last one's.
        keep: answer with the outputs of the last `keep` new tokens only; 0 for all of them, `KEEP_NONE` for none. A session that pushes
            passes on all of them, whatever this says.
        promise_rows: set aside KV room for at least so many rows: a client may send rows that are alike as one and have it repeated by a
            later step's `order`.
        names: uint8 [rows, units, NAME_BYTES], names of the units that this step completes, in their order. Where a step completes units
            and names none, the session's later units cannot be named any more.
        codec: what the outputs may be rounded to on their way, from server to server as well; "raw": nothing may be lost. A server that
            computes in less than the client's dtype sends what it has, which loses nothing.
        spent: for each server that the step has gone through on its way, in order: seconds in its queue, seconds of computation, and
            seconds from the step's arrival there until it was sent on.
    """

    step: int = _is(integer(0, 2**53))
    position: int = _is(integer(0, MAX_TOKENS))
    hidden: Blob = _blob()
    mask: Blob | None = _blob(optional=True)
    position_ids: Blob | None = _blob(optional=True)
    prompts: Blob | None = _blob(optional=True)
    order: Blob | None = _blob(optional=True)
    all_hidden: bool = _is(flag, False)
    keep: int = _is(integer(KEEP_NONE, MAX_TOKENS), 0)
    promise_rows: int = _is(integer(0, MAX_TOKENS), 0)
    names: Blob | None = _blob(optional=True)
    codec: str = _is(text(20), "raw")
    reach: int = _is(integer(0, MAX_TOKENS), 0)
    spent: tuple[float, ...] = _is(many(number(0, 1e6), 3 * MAX_HOPS), ())


@_message("step_done")
@dataclass(frozen=True)
class StepDone(Message):
    """The output of a step, [rows, kept, hidden], or [blocks, rows, kept, hidden] with all_hidden, which each server of a chain answers.

    Attributes:
        position: KV entries after the step.
        compute_s, queue_s, held_s: seconds of computation, in the queue, and from the step's arrival until this answer.
        spent: of the servers before, as the step brought it.
    """

    step: int = _is(integer(0, 2**53))
    position: int = _is(integer(0, MAX_TOKENS))
    output: Blob = _blob()
    compute_s: float = _is(number(0, 1e6), 0.0)
    queue_s: float = _is(number(0, 1e6), 0.0)
    held_s: float = _is(number(0, 1e6), 0.0)
    spent: tuple[float, ...] = _is(many(number(0, 1e6), 3 * MAX_HOPS), ())


@_message("forward")
@dataclass(frozen=True)
class Forward(Message):
    """A stateless forward pass over blocks [first, end); fields as in `Step`, mask [rows, length]. Answered by `ForwardDone`."""

    model: str = _is(text(128))
    first: int = _is(integer(0, MAX_BLOCKS))
    end: int = _is(integer(1, MAX_BLOCKS))
    hidden: Blob = _blob()
    mask: Blob | None = _blob(optional=True)
    position_ids: Blob | None = _blob(optional=True)
    prompts: Blob | None = _blob(optional=True)
    all_hidden: bool = _is(flag, False)
    codec: str = _is(text(20), "raw")


@_message("forward_done")
@dataclass(frozen=True)
class ForwardDone(Message):
    output: Blob = _blob()
    compute_s: float = _is(number(0, 1e6), 0.0)
    queue_s: float = _is(number(0, 1e6), 0.0)


@_message("backward")
@dataclass(frozen=True)
class Backward(Message):
    """Gradients of a stateless forward pass: its inputs again and the gradient of its output. Answered by `BackwardDone`."""

    model: str = _is(text(128))
    first: int = _is(integer(0, MAX_BLOCKS))
    end: int = _is(integer(1, MAX_BLOCKS))
    hidden: Blob = _blob()
    grad_output: Blob = _blob()
    mask: Blob | None = _blob(optional=True)
    position_ids: Blob | None = _blob(optional=True)
    prompts: Blob | None = _blob(optional=True)


@_message("backward_done")
@dataclass(frozen=True)
class BackwardDone(Message):
    """Gradients of the inputs and, where prompts were given, of the prompts."""

    grad_hidden: Blob = _blob()
    grad_prompts: Blob | None = _blob(optional=True)
    compute_s: float = _is(number(0, 1e6), 0.0)
    queue_s: float = _is(number(0, 1e6), 0.0)


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
    cls = _REGISTRY.get(name)
    if cls is None:
        raise UnsupportedError(f"message type {name[:40]!r} is not known")
    values: dict[str, Any] = {}
    payload, offset = memoryview(frame.payload), 0
    for field_name, check, required in cls.layout:
        if check is None:
            description = blobs.get(field_name)
            if description is not None:
                values[field_name], offset = _decode_blob(description, payload, offset)
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


def _decode_blob(description: Any, payload: memoryview, offset: int) -> tuple[Blob, int]:
    if (
        type(description) is not list
        or len(description) != 3
        or type(description[0]) is not str
        or type(description[1]) is not list
        or type(description[2]) is not str
    ):
        raise ProtocolError("the description of an array is malformed")
    dtype, shape, codec = description
    size = blob_size(dtype, shape, codec)
    if offset + size > len(payload):
        raise ProtocolError("an array is larger than the payload that should hold it")
    data = payload[offset : offset + size]
    if offset % 16:  # the payload itself is aligned; what does not begin at a multiple of 16 is moved to where tensors may lie
        data = memoryview(bytearray(data))
    return Blob(dtype, tuple(shape), codec, data), offset + size
