"""Fuzzing of everything that reads a stranger's bytes: mutations of valid traffic, from fixed seeds.

Whatever comes in, only the errors come out that the readers promise, what they hold stays bounded, and what they accept is what was
meant: it survives being encoded and read again. A small share runs with the other tests; all of it (a million inputs for the multiplexer, a
million for the messages of each protocol, and some more for what is signed or proved) in the long ones.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import fields
from typing import Any

import msgpack
import pytest
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Reservation, Status, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr

from petalnet.errors import NotAdmitted, PetalnetError, ProtocolError, RecordRejected, UnsupportedError, UsageError
from petalnet.p2p import messages
from petalnet.p2p.addresses import parse_addr, parse_peer
from petalnet.p2p.admission import Admission
from petalnet.p2p.circuit import peer_of, read_protobuf
from petalnet.p2p.fields import MESSAGE_TYPES, Blob, Message, blob_size
from petalnet.p2p.frames import PREFIX, Frame, FrameDecoder, FrameLimits, encode_frame
from petalnet.p2p.hole_punching import MAX_TARGETS, _targets
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import decode_message, encode_message
from petalnet.p2p.mux_protocol import (
    CLOSE,
    DATA,
    END,
    GRANT,
    HEADER,
    INITIAL_WINDOW,
    MAX_CONTROL,
    MAX_DATA,
    MAX_NAME,
    MAX_WINDOW,
    OPEN,
    RESET,
    Ended,
    Mux,
    MuxError,
    Opened,
    Received,
    WasReset,
)
from petalnet.p2p.protocols import PROTOCOLS, Limits, Protocol
from petalnet.p2p.record_keeper import RecordKeeper
from petalnet.p2p.record_store import RecordStore, read_kept
from petalnet.p2p.signed import sign
from petalnet.p2p.swarm_key import SwarmKey
from petalnet.p2p.tensors import decode_tensor
from petalnet.routing.records import ServerRecord, discovery_key

SMALL, LARGE = 3000, 1_000_000
WIDE = FrameLimits(header=4 << 20, payload=1 << 30)

INTERESTING = [0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    2**31,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
    0.5,
    math.nan,
    math.inf,
    "",
    "\x00",
    "é" * 300,
    "x" * 17_000,
    b"",
    b"\xff" * 300,
    b"x" * 17_000,
    [],
    {},
    [[]] * 3000,
    {"a": {"b": {}}},
    msgpack.ExtType(5, b"odd"),
    msgpack.Timestamp(2**33, 5),
]


def sized(small: int, large: int) -> Any:
    """Runs a test with a small number of inputs, and with a large one in the long suite."""
    return pytest.mark.parametrize("count", [small, pytest.param(large, marks=[pytest.mark.long, pytest.mark.timeout(900)])])


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The bytes with one to four things wrong with them."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(8):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(changed):
                changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xC1, 0xFF))
            case 2:
                changed[at:at] = chance.randbytes(chance.choice((1, 2, 16)))
            case 3:
                del changed[at : at + chance.choice((1, 2, 16, 1000))]
            case 4:
                changed[at:at] = changed[chance.randrange(len(changed) + 1) :][: chance.choice((1, 8, 64))]
            case 5:
                changed[at : at + 4] = chance.choice(INTERESTING).to_bytes(4, "big")
            case 6:
                changed[at : at + 9] = bytes([chance.choice((0xCF, 0xD3, 0xCB, 0xC6, 0xDD, 0xDF, 0xDB))]) + chance.randbytes(8)
            case _:
                changed[at:at] = b"\x91" * chance.choice((1, 40, 2000))
    return bytes(changed)


def mutated_value(chance: random.Random, value: Any) -> Any:
    """A value of msgpack's kinds with something in it replaced, left out or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        match chance.randrange(4):
            case 0:
                return {name: entry for name, entry in value.items() if name != key}
            case 1:
                return value | {chance.choice(("later", 5, "step", "", "hidden")): chance.choice(ODD_VALUES)}
            case _:
                return value | {key: mutated_value(chance, value[key])}
    if isinstance(value, list | tuple) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        match chance.randrange(5):
            case 0:
                return [*value[:at], *value[at + 1 :]]
            case 1:
                return [*value] * chance.choice((2, 3, 100))
            case _:
                return [*value[:at], mutated_value(chance, value[at]), *value[at + 1 :]]
    if isinstance(value, bytes) and chance.random() < 0.5:
        return mutated(chance, value)
    if type(value) is int and chance.random() < 0.5:
        return chance.choice((value + 1, -value, value << 8, chance.choice(INTERESTING)))
    return chance.choice(ODD_VALUES)


# ---- the multiplexer


class MuxFuzzer:
    """A peer that speaks the multiplexer's protocol nearly as it should, and a side that has streams of its own meanwhile."""

    MOST = 20

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.begin()

    def begin(self) -> None:
        initiator = self.chance.random() < 0.5
        self.mux = Mux(initiator=initiator, max_streams=self.MOST)
        self.next = 2 if initiator else 1
        self.known: list[int] = []
        self.windows: dict[int, int] = {}
        self.over: set[int] = set()
        self.ended: set[int] = set()  # by the peer

    def number(self) -> int:
        """A stream for the next frame: nearly always one that the peer may still send on."""
        if self.chance.random() < 0.997:
            for _ in range(4):
                number = self.chance.choice(self.known[-30:]) if self.known else 0
                if number not in self.ended:
                    return number
        return self.chance.choice((0, 1, 2, 3, self.next, self.next + 1, 2**32 - 1))

    def frame(self) -> bytes:
        chance = self.chance
        kind = chance.choices((OPEN, DATA, GRANT, END, RESET, CLOSE), (20, 50, 15, 5, 5, 1))[0] if self.known else OPEN
        code, length, number, body = 0, 0, self.number(), b""
        if kind == OPEN:
            body = chance.choice((b"", b"/echo", b"/petalnet/records/1.0.0", b"n" * MAX_NAME))
            number, length = self.next, len(body)
            self.next += chance.choice((2, 2, 2, 8))
        elif kind == DATA:
            length = chance.choice((1, 2, 100, 100, 5000, 60_000))
            if chance.random() < 0.997:
                length = max(min(length, self.windows.get(number, 0)), 1)
            else:
                length = chance.choice((0, MAX_DATA, MAX_DATA + 1))
            body = bytes(min(length, MAX_DATA))
        elif kind == GRANT:
            length = chance.choice((1, 1000, 65_536, 2**20)) if chance.random() < 0.997 else chance.choice(INTERESTING)
        elif kind in (RESET, CLOSE):
            code = chance.choice((0, 1, 2, 3, 77))
            number = number if kind == RESET else 0
        if kind in (END, RESET):
            self.ended.add(number)
        data = HEADER.pack(kind, code, 0, number, length) + body
        if chance.random() < 0.01:
            data = mutated(chance, data[:600]) + data[600:]
        return data

    def act(self) -> None:
        """What the user of this side does now and then."""
        chance, mux = self.chance, self.mux
        number = chance.choice(self.known) if self.known else 0
        match chance.randrange(6):
            case 0:
                if len(self.known) < 200:
                    self.known.append(opened := mux.open("/here"))
                    self.windows[opened] = INITIAL_WINDOW
            case 1 if number in mux:
                before = mux.window(number)
                mux.grant(number, chance.choice((1, 100_000, MAX_WINDOW)))
                self.windows[number] += mux.window(number) - before
            case 2:
                mux.end(number)
            case 3:
                mux.reset(number)
                self.over.add(number)
            case 4 if number in mux and mux.pending(number) < 10**6:
                with contextlib.suppress(ValueError):  # it has ended its side already
                    mux.send(number, [bytes(chance.choice((1, 70_000)))])
            case _:
                mux.output(chance.choice((1, 10**6)))

    def feed(self, data: bytes) -> None:
        for event in self.mux.receive(data):
            if isinstance(event, Opened):
                assert event.number not in self.windows and len(event.protocol.encode()) <= MAX_NAME
                self.known.append(event.number)
                self.windows[event.number] = INITIAL_WINDOW
            elif isinstance(event, Received):
                self.windows[event.number] -= len(event.data)
                assert self.windows[event.number] >= 0, "more than its window"
            if isinstance(event, Received | Ended | WasReset):
                assert event.number not in self.over, "an event of a stream that is over"
            if isinstance(event, WasReset):
                self.over.add(event.number)

    def check(self) -> None:
        mux = self.mux
        assert mux.remote_streams <= self.MOST
        assert len(mux._streams) <= self.MOST + 200
        assert len(mux._short) + len(mux._long) <= 2 * len(self.known)
        assert len(mux._control) <= MAX_CONTROL + 64
        assert len(mux._part) < HEADER.size and len(mux._name or b"") <= MAX_NAME and mux._missing <= MAX_DATA
        assert all(0 <= stream.window <= MAX_WINDOW and 0 <= stream.credit <= MAX_WINDOW for stream in mux._streams.values())


@sized(SMALL, LARGE)
def test_the_multiplexer(count: int) -> None:
    chance = random.Random(21)
    fuzzer = MuxFuzzer(chance)
    sessions, rest = 1, b""
    for turn in range(count):
        data = rest + fuzzer.frame()
        rest = b""
        if chance.random() < 0.2:
            cut = chance.randrange(len(data) + 1)
            data, rest = data[:cut], data[cut:]
        try:
            fuzzer.feed(data)
        except MuxError:
            fuzzer.begin()
            sessions, rest = sessions + 1, b""
        if chance.random() < 0.3:
            fuzzer.act()
        if turn % 16 == 0:
            fuzzer.check()
    assert count // 1000 < sessions < count // 20, "the traffic is too wild, or too tame"


@sized(SMALL, 100_000)
def test_the_multiplexer_on_bytes_without_sense(count: int) -> None:
    chance = random.Random(22)
    for _ in range(count):
        mux = Mux(initiator=chance.random() < 0.5, max_streams=4)
        with pytest.raises(MuxError):
            for _ in range(2000):
                mux.receive(chance.randbytes(chance.choice((1, 12, 50))))


# ---- frames and messages


def blob(chance: random.Random, dtype: str, *shape: int, codec: str = "raw") -> Blob:
    return Blob(dtype, shape, codec, chance.randbytes(blob_size(dtype, shape, codec)))


def valid_messages(chance: random.Random) -> dict[str, Message]:
    """One message at least of every type that is known, by the type's name."""
    hidden = blob(chance, "float32", 2, 3, 8)
    extras = {
        "mask": blob(chance, "bool", 2, 5),
        "position_ids": blob(chance, "int32", 2, 3),
        "prompts": blob(chance, "float16", 4, 2, 1, 8, codec="float16"),
    }
    names = blob(chance, "uint8", 2, 3, 16)
    pass_ = {"model": "m" * 40, "first": 0, "end": 4, "hidden": blob(chance, "bfloat16", 2, 3, 64, codec="int8"), **extras}
    given: dict[str, dict[str, Any]] = {
        "error": {"code": "busy", "message": "no room", "retry_after_s": 2.5},
        "store": {"keys": (bytes(32), b"k" * 32), "record": chance.randbytes(300)},
        "find": {"key": bytes(32)},
        "records": {"records": (chance.randbytes(200), chance.randbytes(100)), "ages": (1.0, 2.0), "count": 2},
        "open_session": {"session": "s" * 16, "model": "m" * 40, "first": 0, "end": 4, "max_length": 128},
        "attach": {"names": names},
        "step": {"step": 1, "position": 2, "hidden": hidden, **extras, "order": blob(chance, "int64", 2), "keep": 1, "names": names},
        "step_done": {"step": 1, "position": 5, "output": hidden, "compute_s": 0.1, "queue_s": 0.2, "spent": (0.1, 0.2, 0.3)},
        "forward": pass_,
        "forward_done": {"output": hidden},
        "backward": {**pass_, "grad_output": hidden},
        "backward_done": {"grad_hidden": hidden, "grad_prompts": extras["prompts"]},
        "put_lora": {
            "model": "m" * 40, "first": 0, "end": 2, "version": "v" * 32, "modules": ("attention.query", "dense"),
            "ranks": blob(chance, "int32", 2, 2), "weights": blob(chance, "float32", 96),
        },
        "manifest_found": {"manifest": blob(chance, "uint8", 300)},
        "which_chunks": {"blocks": (bytes(16), b"b" * 16)},
        "chunks_held": {"lists": (bytes(32), b""), "held": (b"\x05", b"")},
        "get_chunk_list": {"block": b"b" * 16},
        "chunk_list": {"entry": blob(chance, "uint8", 200)},
        "get_chunk": {"block": b"b" * 16, "index": 3, "digest": bytes(32)},
        "chunk": {"data": blob(chance, "uint8", 500)},
    }  # fmt: skip
    found: dict[str, Message] = {}
    for name, cls in MESSAGE_TYPES.items():
        values = given.get(name)
        if values is None:
            values = {item.name: example(item.metadata) for item in fields(cls) if "check" in item.metadata}  # type: ignore[arg-type]
        found[name] = cls(**values)
    return found


def example(metadata: Any) -> Any:
    """A value that a field accepts."""
    candidates: tuple[Any, ...] = (1, 0.5, "/ip4/1.2.3.4/tcp/5", b"x" * 32, False, (), (1,), ("a",), (b"a",), ((1, "a"),), 0, None)
    for candidate in candidates:
        try:
            metadata["check"](candidate)
        except ValueError:
            continue
        return candidate
    raise LookupError(f"no example for a field with {metadata}")


OF_PROTOCOL = {
    "/petalnet/inference/1.0.0": {
        "open_session",
        "session_opened",
        "attach",
        "attached",
        "reserve",
        "reserved",
        "step",
        "step_done",
        "replay",
        "link_down",
    },
    "/petalnet/push/1.0.0": {"open_link", "link_opened", "step"},
    "/petalnet/forward/1.0.0": {"forward", "forward_done", "backward", "backward_done"},
    "/petalnet/records/1.0.0": {"store", "stored", "find", "records"},
    "/petalnet/ping/1.0.0": {"ping", "pong"},
    "/petalnet/weights/1.0.0": {
        "get_manifest",
        "manifest_found",
        "which_chunks",
        "chunks_held",
        "get_chunk_list",
        "chunk_list",
        "get_chunk",
        "chunk",
    },
}


def wrong_message(chance: random.Random, message: Message) -> bytes:
    """A frame that says nearly what the message does."""
    whole = b"".join(encode_message(message))
    if chance.random() < 0.4:
        return mutated(chance, whole)
    size = PREFIX.unpack_from(whole)[3]
    header, payload = whole[PREFIX.size : PREFIX.size + size], whole[PREFIX.size + size :]
    changed = mutated_value(chance, msgpack.unpackb(header)) if chance.random() < 0.8 else msgpack.unpackb(header)
    if chance.random() < 0.2:
        payload = mutated(chance, payload)
    try:
        packed = msgpack.packb(changed)
    except (ValueError, OverflowError):
        packed = mutated(chance, header)  # it cannot be written down
    return b"".join(encode_frame(packed, [payload]))


def read_frames(decoder: FrameDecoder, protocol: Protocol, pieces: Iterator[bytes]) -> Iterator[Frame]:
    for piece in pieces:
        decoder.feed(piece)
        while (frame := decoder.next_frame()) is not None:
            assert len(frame.header) <= protocol.limits.header and len(frame.payload) <= protocol.limits.payload
            yield frame
        assert 0 < decoder.wanted <= protocol.limits.header + protocol.limits.payload + PREFIX.size


def cut(chance: random.Random, data: bytes) -> Iterator[bytes]:
    while data:
        size = chance.choice((1, 12, 100, len(data)))
        yield data[:size]
        data = data[size:]


def read_whole(message: Message) -> None:
    """What was accepted means the same when it is sent on, and its arrays can be had or are refused."""
    decoder = FrameDecoder(WIDE)
    decoder.feed(b"".join(encode_message(message)))
    frame = decoder.next_frame()
    assert frame is not None and decoder.at_boundary
    again = decode_message(frame)
    assert again == message
    for item in fields(again):  # type: ignore[arg-type]
        value = getattr(again, item.name)
        if isinstance(value, Blob):
            try:
                tensor = decode_tensor(value)
            except ProtocolError:
                continue
            assert tuple(tensor.shape) == value.shape and str(tensor.dtype) == f"torch.{value.dtype}"


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.id)
@sized(SMALL, LARGE)
def test_the_messages_of_a_protocol(protocol: Protocol, count: int) -> None:
    chance = random.Random(protocol.id)
    corpus = valid_messages(chance)
    chosen = [corpus[name] for name in sorted(OF_PROTOCOL.get(protocol.id, corpus.keys()))] + [corpus["error"]]
    for message in chosen:
        read_whole(message)
    accepted = 0
    for _ in range(count):
        data = wrong_message(chance, chance.choice(chosen))
        try:
            for frame in read_frames(FrameDecoder(protocol.limits), protocol, cut(chance, data)):
                message = decode_message(frame)
                accepted += 1
                if accepted % 4 == 0:
                    read_whole(message)
        except (ProtocolError, UnsupportedError):
            continue
    assert count // 50 < accepted < count, "the mutations are too wild, or too tame"


@sized(SMALL, 100_000)
def test_frames_after_one_another(count: int) -> None:
    """Many frames on one stream, a few of them wrong: those before are read as they were meant."""
    chance = random.Random(23)
    corpus = list(valid_messages(chance).values())
    protocol, done = PROTOCOLS[0], 0
    while done < count:
        sent = [chance.choice(corpus) for _ in range(10)]
        frames = [b"".join(encode_message(message)) for message in sent]
        wrong = chance.randrange(len(frames))
        frames[wrong] = wrong_message(chance, sent[wrong])
        done += len(frames)
        got: list[Message] = []
        try:
            for frame in read_frames(FrameDecoder(protocol.limits), protocol, cut(chance, b"".join(frames))):
                got.append(decode_message(frame))
        except (ProtocolError, UnsupportedError):
            pass
        assert got[:wrong] == sent[:wrong]


# ---- records

NOW = 1_800_000_000.0


def valid_record(identity: Identity) -> ServerRecord:
    return ServerRecord(
        peer_id=identity.peer_id,
        addrs=("/ip4/10.0.0.1/tcp/31330",),
        model="m" * 64,
        model_name="bloom",
        span=(0, 4),
        num_blocks=24,
        state="online",
        dtype="float32",
        sequence=1,
        issued=NOW - 1,
        expires=NOW + 59,
        block_digests=("0123456789abcdef" * 2,) * 4,
        next_round_trips=((identity.peer_id, 0.01),),
    )


@sized(SMALL, 250_000)
def test_records(count: int) -> None:
    """Wrong in the envelope, wrong in what is signed, and what was signed for another purpose."""
    chance = random.Random(24)
    identity = Identity.generate()
    record = valid_record(identity)
    payload, keys = record.encode(), [discovery_key(record.model)]
    envelope = sign(identity, payload)
    assert read_kept(envelope, keys, now=NOW).peer_id == identity.peer_id
    accepted = 0
    for _ in range(count):
        if chance.random() < 0.5:
            data = mutated(chance, envelope)
        else:
            try:
                wrong = (
                    msgpack.packb(mutated_value(chance, msgpack.unpackb(payload))) if chance.random() < 0.8 else mutated(chance, payload)
                )
                data = sign(identity, wrong)
            except (ValueError, OverflowError, RecordRejected):
                continue
        try:
            kept = read_kept(data, keys, now=NOW)
        except RecordRejected:
            continue
        accepted += 1
        assert kept.peer_id == identity.peer_id and len(kept.data) <= 4096
    assert 0 < accepted < count // 2


@sized(SMALL, 250_000)
def test_the_keeper_of_records(count: int) -> None:
    """Whole requests, from a peer that signs what it likes: an answer that fits, or an error that can be told."""
    chance = random.Random(25)
    identity = Identity.generate()
    record = valid_record(identity)
    store = RecordStore(Identity.generate().peer_id, max_peers=50)
    keeper = RecordKeeper(store, on_record=lambda data: None, limits=Limits())
    requests = valid_messages(chance)
    valid = messages.Store((discovery_key(record.model),), sign(identity, record.encode()))
    corpus = [valid, messages.Find(discovery_key(record.model)), requests["find"], requests["store"]]
    now, answered = NOW, 0
    for _ in range(count):
        now += 0.1  # within what a peer may ask; the record expires meanwhile, and is stored again
        if now > record.expires - 10:
            record = valid_record(identity).received(now, 0.0)
            corpus[0] = messages.Store(valid.keys, sign(identity, record.encode()))
        data = wrong_message(chance, chance.choice(corpus)) if chance.random() < 0.7 else b"".join(encode_message(chance.choice(corpus)))
        decoder = FrameDecoder(WIDE)
        decoder.feed(data)
        try:
            frame = decoder.next_frame()
            if frame is not None:
                answer = keeper.answer(decode_message(frame), peer_id=identity.peer_id, source="10.0.0.0/24", now=now)
                encode_message(answer)
                answered += 1
        except PetalnetError as error:
            encode_message(messages.Error.of(error))
        assert len(store) <= 50
    assert count // 50 < answered < count


# ---- handshakes and small protocols


def finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("it waits")


class Bytes:
    """A channel or stream from which a peer's bytes are read."""

    def __init__(self, data: bytes, peer: ID) -> None:
        self.data = data
        self.peer = peer
        self.muxed_conn = self
        self.peer_id = peer
        self.written = b""

    async def read(self, n: int | None = None) -> bytes:
        size = len(self.data) if n is None else n
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    async def write(self, data: bytes) -> None:
        self.written += data

    def get_remote_peer(self) -> ID:
        return self.peer


@sized(SMALL, 100_000)
def test_proofs_of_a_swarm_key(count: int) -> None:
    """No bytes but the proof itself pass for one, and a responder says nothing to anybody else."""
    chance = random.Random(26)
    key, peer = SwarmKey.generate(), ID.from_pubkey(create_new_key_pair().public_key)
    admission, hashed = Admission(swarm_key=key), bytes(range(32))

    def talk(data: bytes, *, initiator: bool) -> bytes:
        channel = Bytes(data, peer)
        finished(admission.prove(channel, hashed, initiator=initiator))
        return channel.written

    class Waiting(Bytes):
        async def read(self, n: int | None = None) -> bytes:
            raise BaseLibp2pError("nothing comes")

    asked = Waiting(b"", peer)
    with pytest.raises(NotAdmitted):
        finished(admission.prove(asked, hashed, initiator=True))
    proof = asked.written
    counter_proof = talk(proof, initiator=False)
    assert talk(counter_proof, initiator=True) == proof
    for initiator in (True, False):
        good = counter_proof if initiator else proof
        for _ in range(count // 2):
            source = chance.choice((proof, counter_proof, proof + counter_proof, b""))
            data = mutated(chance, source)
            if data[:32] == good:
                continue
            channel = Bytes(data, peer)
            with pytest.raises(NotAdmitted):
                finished(admission.prove(channel, hashed, initiator=initiator))
            assert channel.written == (proof if initiator else b"")


@sized(SMALL, 250_000)
def test_messages_of_circuits_and_hole_punching(count: int) -> None:
    chance = random.Random(27)
    peer = ID.from_pubkey(create_new_key_pair().public_key)
    named = PeerId(id=peer.to_bytes(), addrs=[Multiaddr("/ip4/8.8.8.8/tcp/31330").to_bytes()])
    corpus = [
        HopMessage(type=HopMessage.RESERVE),
        HopMessage(type=HopMessage.CONNECT, peer=named),
        HopMessage(type=HopMessage.STATUS, status=Status.OK, reservation=Reservation(expire=10**10, addrs=list(named.addrs))),
        StopMessage(type=StopMessage.CONNECT, peer=named),
        StopMessage(type=StopMessage.STATUS, status=Status.OK),
        HolePunch(type=HolePunch.CONNECT, ObsAddrs=list(named.addrs)),
        HolePunch(type=HolePunch.SYNC),
    ]
    for _ in range(count):
        message = chance.choice(corpus)
        data = message.SerializeToString()
        wrong = encode_varint_prefixed(mutated(chance, data)) if chance.random() < 0.6 else mutated(chance, encode_varint_prefixed(data))
        try:
            # The readers' callers take these three for a peer that does not speak the protocol.
            got = finished(read_protobuf(Bytes(wrong, peer), type(message)))  # type: ignore[arg-type]
        except (ProtocolError, BaseLibp2pError, ValueError):
            continue
        try:
            if isinstance(got, HolePunch):
                assert len(_targets(got, HolePunch.CONNECT)) <= MAX_TARGETS
            else:
                assert len(peer_of(got.peer).to_bytes()) <= 64
        except ProtocolError:
            continue


@sized(SMALL, 100_000)
@pytest.mark.parametrize("parse", [parse_peer, parse_addr], ids=lambda parse: parse.__name__)
def test_addresses_that_others_tell(parse: Callable[[str], object], count: int) -> None:
    chance = random.Random(28)
    peer_id = Identity.generate().peer_id
    corpus = [
        f"/ip4/10.0.0.1/tcp/31330/p2p/{peer_id}",
        f"/ip6/2001:db8::1/tcp/31330/p2p/{peer_id}",
        f"/dns4/example.org/tcp/31330/p2p/{peer_id}",
        f"/ip4/10.0.0.1/tcp/31330/p2p/{peer_id}/p2p-circuit/p2p/{peer_id}",
        "/ip4/10.0.0.1/tcp/31330",
    ]
    for _ in range(count):
        text = mutated(chance, chance.choice(corpus).encode()).decode("utf-8", chance.choice(("replace", "ignore", "backslashreplace")))
        try:
            parse(text)
        except UsageError as error:
            assert len(str(error)) < 600 and "\n" not in str(error)
