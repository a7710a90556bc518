from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import RecordRejected
from petalnet.routing.records import (
    CLOCK_TOLERANCE,
    DIGEST_CHARS,
    MAX_LIFETIME,
    MAX_RECORD_BYTES,
    STATES,
    SWARM_KEY,
    RecordForged,
    RecordOutOfTime,
    ServerRecord,
    discovery_key,
    next_sequence,
)
from petalnet.version import PROTOCOL

Build = Callable[..., ServerRecord]

labels = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=20)
tokens = st.text(string.ascii_letters + string.digits + "-._/", max_size=20)
peers = st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=1, max_size=52)
rates = st.floats(0, 1e9)


@st.composite
def records(draw: st.DrawFn) -> ServerRecord:
    num_blocks = draw(st.integers(1, 60))
    first = draw(st.integers(0, num_blocks - 1))
    end = draw(st.integers(first + 1, num_blocks))
    digests = st.lists(st.binary(min_size=16, max_size=32).map(bytes.hex), min_size=end - first, max_size=end - first)
    issued = draw(st.floats(0, 4e9))
    return ServerRecord(
        peer_id=draw(peers),
        addrs=tuple(draw(st.lists(tokens.map(lambda text: f"/{text}x"), max_size=4))),
        model=draw(tokens.map(lambda text: f"m{text}")),
        model_name=draw(labels),
        span=(first, end),
        num_blocks=num_blocks,
        state=draw(st.sampled_from(STATES)),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        quantization=draw(st.sampled_from(["none", "int8", "nf4"])),
        adapters=tuple(draw(st.lists(labels, max_size=3))),
        version=draw(tokens),
        public_name=draw(st.none() | labels),
        block_digests=tuple(draw(st.just([]) | digests)),
        decode_tokens_s=draw(rates),
        prefill_tokens_s=draw(rates),
        forward_tokens_s=draw(rates),
        free_kv_tokens=draw(st.integers(0, 2**53)),
        queue=draw(st.integers(0, 10**6)),
        next_round_trips=tuple(draw(st.lists(st.tuples(peers, st.floats(0, 3600)), max_size=4))),
        sequence=draw(st.integers(0, 2**63 - 1)),
        issued=issued,
        expires=issued + draw(st.integers(1, 3599)),
    )


@given(records())
def test_a_record_survives_its_coding(record: ServerRecord) -> None:
    data = record.encode()
    assert len(data) <= MAX_RECORD_BYTES
    assert ServerRecord.decode(data) == record


@given(st.binary(max_size=300))
def test_rubbish_is_rejected(data: bytes) -> None:
    with pytest.raises(RecordRejected):
        ServerRecord.decode(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_a_record_with_any_field_replaced_is_read_as_valid_or_rejected(data: st.DataObject) -> None:
    record = data.draw(records())
    fields = msgpack.unpackb(record.encode())
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(values)
    try:
        read = ServerRecord.decode(msgpack.packb(fields))
    except RecordRejected:
        return
    assert 0 <= read.span[0] < read.span[1] <= read.num_blocks
    assert len(read.block_digests) in (0, read.span[1] - read.span[0])
    assert ServerRecord.decode(read.encode()) == read


@given(st.data())
def test_a_record_cut_short_is_rejected(data: st.DataObject) -> None:
    encoded = data.draw(records()).encode()
    with pytest.raises(RecordRejected):
        ServerRecord.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peer_id", ""),
        ("peer_id", "0OIl"),
        ("peer_id", "P" * 65),
        ("peer_id", 7),
        ("addrs", ("127.0.0.1",)),
        ("addrs", ("/ip4/ 1",)),
        ("addrs", ("/a",) * 17),
        ("addrs", "/ip4"),
        ("model", ""),
        ("model", "a b"),
        ("model_name", "\x1b[2J"),
        ("public_name", "\u202eevil"),
        ("public_name", "x" * 65),
        ("span", (3, 3)),
        ("span", (-1, 2)),
        ("num_blocks", 3),
        ("span", (0, True)),
        ("span", (0, 1, 2)),
        ("num_blocks", 0),
        ("num_blocks", 1 << 40),
        ("state", "dead"),
        ("state", ["online"]),
        ("decode_tokens_s", math.nan),
        ("prefill_tokens_s", math.inf),
        ("forward_tokens_s", -1.0),
        ("decode_tokens_s", True),
        ("free_kv_tokens", -1),
        ("free_kv_tokens", 1.5),
        ("queue", 2**40),
        ("block_digests", ("ab" * 16,)),
        ("block_digests", ("zz" * 16,) * 4),
        ("block_digests", ("ab" * 15,) * 4),
        ("next_round_trips", (("P2", math.nan),)),
        ("next_round_trips", ("P2",)),
        ("sequence", -1),
        ("issued", math.nan),
        ("expires", 0.0),
        ("expires", 1_800_000_000.0 + MAX_LIFETIME + 1),
    ],
)
def test_fields_out_of_range_are_rejected(record: Build, field: str, value: Any) -> None:
    with pytest.raises(RecordRejected):
        record(**{field: value})


def test_fields_that_a_later_version_adds_are_left_out(record: Build) -> None:
    fields = msgpack.unpackb(record().encode())
    assert ServerRecord.decode(msgpack.packb(fields | {"colour": "green"})) == record()


@pytest.mark.parametrize("field", ["peer_id", "span", "state", "expires"])
def test_a_missing_field_is_named(record: Build, field: str) -> None:
    fields = msgpack.unpackb(record().encode())
    del fields[field]
    with pytest.raises(RecordRejected, match=field):
        ServerRecord.decode(msgpack.packb(fields))


def test_a_server_of_an_earlier_version_does_not_move(record: Build) -> None:
    fields = msgpack.unpackb(record(movable=True).encode())
    assert ServerRecord.decode(msgpack.packb(fields)).movable
    del fields["movable"]
    assert not ServerRecord.decode(msgpack.packb(fields)).movable
    with pytest.raises(RecordRejected, match="movable"):
        ServerRecord.decode(msgpack.packb(fields | {"movable": 1}))


def test_digests_are_cut_to_what_is_announced(record: Build) -> None:
    digests = tuple(f"{n:064x}"[::-1] for n in range(1, 5))
    assert record(block_digests=digests).block_digests == tuple(digest[:DIGEST_CHARS] for digest in digests)


def test_the_whole_of_a_large_model_fits_and_too_much_is_refused(record: Build) -> None:
    digest = "ab" * 32
    assert len(record(span=(0, 126), block_digests=(digest,) * 126).encode()) <= MAX_RECORD_BYTES
    with pytest.raises(RecordRejected, match="too long"):
        record(adapters=("a" * 128,) * 32).encode()
    with pytest.raises(RecordRejected, match="too long"):
        ServerRecord.decode(b"\0" * (MAX_RECORD_BYTES + 1))


def test_check_holds_the_signer_and_the_times_against_the_record(record: Build, now: float) -> None:
    own = record("P1")
    own.check(signer="P1", now=now)
    own.check(signer="P1", now=now - 600)
    own.check(signer="P1", now=now + 90 + 599)
    with pytest.raises(RecordForged, match="signed by P2"):
        own.check(signer="P2", now=now)
    with pytest.raises(RecordOutOfTime, match="future"):
        own.check(signer="P1", now=now - 601)
    with pytest.raises(RecordOutOfTime, match="expired"):
        own.check(signer="P1", now=now + 90 + 600)
    with pytest.raises(RecordOutOfTime, match="sequence"):
        record("P1", sequence=int((now + 2000) * 1000)).check(signer="P1", now=now)


@given(skew=st.floats(-CLOCK_TOLERANCE, CLOCK_TOLERANCE), age=st.floats(0, 80), life=st.floats(1, MAX_LIFETIME))
def test_a_record_is_valid_for_as_long_as_its_server_said_whatever_the_clocks_say(
    record: Build, skew: float, age: float, life: float
) -> None:
    """The server's clock is ahead of ours by `skew`; the record left it `age` seconds ago."""
    now = 1_800_000_000.0
    issued = now + skew - age
    own = record("P1", issued=issued, expires=min(issued + life, issued + MAX_LIFETIME))
    if age < life:
        own.check(signer="P1", now=now)
    received = own.received(now, age)
    assert received.expires == pytest.approx(now - age + life)
    assert received.issued == pytest.approx(now - age)
    assert received.sequence == own.sequence


@given(last=st.integers(0, 2**62), told=st.integers(0, 2**62))
def test_a_number_grows_unless_that_would_take_it_out_of_all_time(last: int, told: int) -> None:
    now = 1_800_000_000.0
    number = next_sequence(last, now, told=told)
    assert int(now * 1000) <= number <= int((now + 2 * CLOCK_TOLERANCE) * 1000)
    for known in (last, told):
        assert number > known or known >= int((now + 2 * CLOCK_TOLERANCE) * 1000)


def test_keys_are_distinct_and_fixed() -> None:
    keys = {discovery_key("aa"), discovery_key("ab"), discovery_key(""), SWARM_KEY}
    assert len(keys) == 4 and {len(key) for key in keys} == {32}
    # What other versions of petalnet look for must not move.
    assert discovery_key("aa").hex().startswith("432fef5a88e3284f") and SWARM_KEY.hex().startswith("0b0be8e07a704954")


def test_a_record_of_another_release_is_understood(record: Build) -> None:
    """It may have fields that are not known here, and lack those that its release did not have."""
    fields = msgpack.unpackb(record(protocol=1).encode())
    for name in ("protocol", "block_digests", "next_round_trips", "public_name", "queue"):
        del fields[name]
    old = ServerRecord.decode(msgpack.packb(fields | {"mood": "good"}))
    assert (old.protocol, old.block_digests, old.public_name, old.queue) == (1, (), None, 0)


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, PROTOCOL - 1])
def test_a_record_of_another_version_of_the_protocols_is_not_believed(record: Build, now: float, protocol: int) -> None:
    with pytest.raises(RecordRejected, match=f"speaks version {protocol} of petalnet's protocols; this is version {PROTOCOL}"):
        record(protocol=protocol).check(signer="P1", now=now)
