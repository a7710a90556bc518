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
from petalnet.p2p.fields import (
    MESSAGE_TYPES,
    Blob,
    Message,
    array,
    decode_blob,
    flag,
    integer,
    many,
    message_type,
    number,
    octets,
    scalar,
    text,
)
from petalnet.p2p.frames import Buffer, Frame, encode_frame

MAX_BLOCKS = 4096
MAX_TOKENS = 1 << 24
UNIT_TOKENS = 64
"""Positions of a unit. A name stands for one unit of a row and all units before it, whose KV entries a server may keep for later."""
NAME_BYTES = 16
"""Bytes of a unit's name; the client's hash of what entered the session's blocks."""
KEEP_NONE = -1
"""`Step.keep` of a step whose outputs nobody wants: a prompt's chunks before the last."""
MAX_HOPS = 256
"""Servers of a chain whose times a step may carry."""


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


@message_type("open_session")
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

    session: str = scalar(text(64))
    model: str = scalar(text(128))
    first: int = scalar(integer(0, MAX_BLOCKS))
    end: int = scalar(integer(1, MAX_BLOCKS))
    max_length: int = scalar(integer(1, MAX_TOKENS))
    promise_rows: int = scalar(integer(0, MAX_TOKENS), 0)
    takes_from: str = scalar(text(128), "")
    pushes_to: str = scalar(text(128), "")


@message_type("session_opened")
@dataclass(frozen=True)
class SessionOpened(Message):
    """A session is open.

    Attributes:
        free_kv_tokens: KV tokens that no session has been promised.
        shares_prefixes: whether `Attach` finds what other peers' sessions have named; otherwise only what the same peer's have.
        dtype: what the server computes in: hidden states lose nothing on the way to and from it in a codec of that name.
        codecs: the codecs that the server reads and writes.
    """

    free_kv_tokens: int = scalar(integer(0, 2**53))
    shares_prefixes: bool = scalar(flag, False)
    dtype: str = scalar(text(20), "")
    codecs: tuple[str, ...] = scalar(many(text(20), 16), ("raw",))


@message_type("open_link")
@dataclass(frozen=True)
class OpenLink(Message):
    """From server to server: what follows are `Step`s of the session of this id whose blocks begin at `first`. Answered by `LinkOpened`
    once the receiver knows the session, and it names the sender in `takes_from`. The steps themselves are answered to the client."""

    session: str = scalar(text(64))
    first: int = scalar(integer(0, MAX_BLOCKS))


@message_type("link_opened")
@dataclass(frozen=True)
class LinkOpened(Message):
    """Steps may follow."""


@message_type("link_down")
@dataclass(frozen=True)
class LinkDown(Message):
    """To a session's client: the server that the outputs were to go to cannot be reached from here. From now on they come to the client.

    Attributes:
        reason: one line for a person.
        pushed: the last step whose output went to that server, which may have got it or not; 0 for none.
    """

    reason: str = scalar(text(1000))
    pushed: int = scalar(integer(0, 2**53), 0)


@message_type("reserve")
@dataclass(frozen=True)
class Reserve(Message):
    """Set aside KV room for at least so many rows of the session; answered by `Reserved`, or *busy*."""

    rows: int = scalar(integer(1, MAX_TOKENS))


@message_type("reserved")
@dataclass(frozen=True)
class Reserved(Message):
    """The room is there; KV tokens that no session has been promised."""

    free_kv_tokens: int = scalar(integer(0, 2**53))


@message_type("replay")
@dataclass(frozen=True)
class Replay(Message):
    """The outputs for KV entries [position, position + tokens) of all rows once more, of a session that pushes.

    Attributes:
        step: a number. Where they go to the client, their step's: the answer is a `StepDone` of that number, as soon as
            the step has been computed there and the session has come that far. Otherwise a new number, above that of all steps before.
        codec: as of a step.
        until: 0: they go to the client. Otherwise they go on as a `Step` of this number and this `until` to the server that the session
            pushes to, in the place of what a server before it has lost; to the client as a `StepDone` where that cannot be reached.
        mask, position_ids, prompts, reach: for that step.
    """

    step: int = scalar(integer(0, 2**53))
    position: int = scalar(integer(0, MAX_TOKENS))
    tokens: int = scalar(integer(1, MAX_TOKENS))
    codec: str = scalar(text(20), "raw")
    until: int = scalar(integer(0, MAX_BLOCKS), 0)
    reach: int = scalar(integer(0, MAX_TOKENS), 0)
    mask: Blob | None = array(optional=True)
    position_ids: Blob | None = array(optional=True)
    prompts: Blob | None = array(optional=True)


@message_type("resume")
@dataclass(frozen=True)
class Resume(Message):
    """A server of the chain was lost, and others take its place: what is under way is given up, and the session goes on from `position`
    between these neighbours. Answered by `Resumed`, or an error. May come at any time, also while a step is computed or waits.

    Attributes:
        step: the highest number that any step has been given: all of these are dropped from now on, whoever brings them.
        position: KV entries that stay.
        order: int64 [rows], and `order_step`, the number of the step that it came with: rows are put into this order unless that step has
            been computed here.
        takes_from, pushes_to: as in `OpenSession`, from now on. A link to the same server that is up stays; any other is closed.
    """

    step: int = scalar(integer(0, 2**53))
    position: int = scalar(integer(0, MAX_TOKENS))
    takes_from: str = scalar(text(128), "")
    pushes_to: str = scalar(text(128), "")
    order_step: int = scalar(integer(0, 2**53), 0)
    order: Blob | None = array(optional=True)


@message_type("resumed")
@dataclass(frozen=True)
class Resumed(Message):
    """The session stands between its new neighbours, at `position`, with so many rows."""

    position: int = scalar(integer(0, MAX_TOKENS))
    rows: int = scalar(integer(0, MAX_TOKENS))


@message_type("ask_progress")
@dataclass(frozen=True)
class AskProgress(Message):
    """How far is this session? Answered at once by `Progress` of the same nonce, also while a long step is computed."""

    nonce: int = scalar(integer(0, 2**53))


@message_type("progress")
@dataclass(frozen=True)
class Progress(Message):
    """The numbers of the last step that came, of the last one that was computed, and of the last one whose output was sent on."""

    nonce: int = scalar(integer(0, 2**53))
    taken: int = scalar(integer(0, 2**53))
    done: int = scalar(integer(0, 2**53))
    sent: int = scalar(integer(0, 2**53))


@message_type("draining")
@dataclass(frozen=True)
class Draining(Message):
    """To a session's client, unasked: this server takes no new sessions, and ends this one in so many seconds. It may go elsewhere."""

    grace_s: float = scalar(number(0, 1e6))


@message_type("attach")
@dataclass(frozen=True)
class Attach(Message):
    """Before a session's first step: its rows begin with the KV entries of named units, as far as they are known. Answered by `Attached`.

    Attributes:
        names: uint8 [rows, units, NAME_BYTES], each row's units in their order from position 0 on.
    """

    names: Blob = array()


@message_type("attached")
@dataclass(frozen=True)
class Attached(Message):
    """KV entries that each row of the session has now: whole units, the same for all rows; 0 where nothing was known.

    The first step may be at this position or, where other servers of the route know less, at a lower one.
    """

    position: int = scalar(integer(0, MAX_TOKENS))


@message_type("step")
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
        until: 0, or the end of the last blocks that the step goes through: the server whose blocks end there answers the client and sends
            nothing on. It rebuilds the KV entries of servers that have taken the place of lost ones.
        codec: what the outputs may be rounded to on their way, from server to server as well; "raw": nothing may be lost. A server that
            computes in less than the client's dtype sends what it has, which loses nothing.
        spent: for each server that the step has gone through on its way, in order: seconds in its queue, seconds of computation, and
            seconds from the step's arrival there until it was sent on.
    """

    step: int = scalar(integer(0, 2**53))
    position: int = scalar(integer(0, MAX_TOKENS))
    hidden: Blob = array()
    mask: Blob | None = array(optional=True)
    position_ids: Blob | None = array(optional=True)
    prompts: Blob | None = array(optional=True)
    order: Blob | None = array(optional=True)
    all_hidden: bool = scalar(flag, False)
    keep: int = scalar(integer(KEEP_NONE, MAX_TOKENS), 0)
    promise_rows: int = scalar(integer(0, MAX_TOKENS), 0)
    names: Blob | None = array(optional=True)
    codec: str = scalar(text(20), "raw")
    reach: int = scalar(integer(0, MAX_TOKENS), 0)
    until: int = scalar(integer(0, MAX_BLOCKS), 0)
    spent: tuple[float, ...] = scalar(many(number(0, 1e6), 3 * MAX_HOPS), ())


@message_type("step_done")
@dataclass(frozen=True)
class StepDone(Message):
    """The output of a step, [rows, kept, hidden], or [blocks, rows, kept, hidden] with all_hidden, which each server of a chain answers.

    Attributes:
        position: KV entries after the step.
        compute_s, queue_s, held_s: seconds of computation, in the queue, and from the step's arrival until this answer.
        spent: of the servers before, as the step brought it.
    """

    step: int = scalar(integer(0, 2**53))
    position: int = scalar(integer(0, MAX_TOKENS))
    output: Blob = array()
    compute_s: float = scalar(number(0, 1e6), 0.0)
    queue_s: float = scalar(number(0, 1e6), 0.0)
    held_s: float = scalar(number(0, 1e6), 0.0)
    spent: tuple[float, ...] = scalar(many(number(0, 1e6), 3 * MAX_HOPS), ())


@message_type("forward")
@dataclass(frozen=True)
class Forward(Message):
    """A stateless forward pass over blocks [first, end); fields as in `Step`, mask [rows, length]. Answered by `ForwardDone`."""

    model: str = scalar(text(128))
    first: int = scalar(integer(0, MAX_BLOCKS))
    end: int = scalar(integer(1, MAX_BLOCKS))
    hidden: Blob = array()
    mask: Blob | None = array(optional=True)
    position_ids: Blob | None = array(optional=True)
    prompts: Blob | None = array(optional=True)
    all_hidden: bool = scalar(flag, False)
    codec: str = scalar(text(20), "raw")


@message_type("forward_done")
@dataclass(frozen=True)
class ForwardDone(Message):
    output: Blob = array()
    compute_s: float = scalar(number(0, 1e6), 0.0)
    queue_s: float = scalar(number(0, 1e6), 0.0)


@message_type("backward")
@dataclass(frozen=True)
class Backward(Message):
    """Gradients of a stateless forward pass: its inputs again and the gradient of its output. Answered by `BackwardDone`."""

    model: str = scalar(text(128))
    first: int = scalar(integer(0, MAX_BLOCKS))
    end: int = scalar(integer(1, MAX_BLOCKS))
    hidden: Blob = array()
    grad_output: Blob = array()
    mask: Blob | None = array(optional=True)
    position_ids: Blob | None = array(optional=True)
    prompts: Blob | None = array(optional=True)


@message_type("backward_done")
@dataclass(frozen=True)
class BackwardDone(Message):
    """Gradients of the inputs and, where prompts were given, of the prompts."""

    grad_hidden: Blob = array()
    grad_prompts: Blob | None = array(optional=True)
    compute_s: float = scalar(number(0, 1e6), 0.0)
    queue_s: float = scalar(number(0, 1e6), 0.0)


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
