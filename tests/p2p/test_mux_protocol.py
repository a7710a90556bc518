"""The multiplexer's protocol, role against role without a socket: whatever is done in whatever order, and however the bytes are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from petalnet.p2p.mux_protocol import (
    CLOSE,
    DATA,
    DATA_SIZE,
    END,
    GRANT,
    HEADER,
    INITIAL_WINDOW,
    LONG_TURN_AFTER,
    MAX_CONTROL,
    MAX_DATA,
    MAX_NAME,
    MAX_WINDOW,
    OPEN,
    RESET,
    SHORT,
    Closed,
    Ended,
    Event,
    Mux,
    MuxError,
    Opened,
    Reason,
    Received,
    WasReset,
)

PATTERN = random.Random(1).randbytes(1 << 20)


def content(number: int, side: int, start: int, size: int) -> bytes:
    """What a side sends on a stream at this place: different for every stream and direction, so that a mix-up shows."""
    at = (number * 7919 + side * 104_729 + start) % len(PATTERN)
    data = PATTERN[at : at + size]
    while len(data) < size:
        data += PATTERN[: size - len(data)]
    return data


def frame(kind: int, number: int, length: int = 0, body: bytes = b"", code: int = 0, reserved: int = 0) -> bytes:
    return HEADER.pack(kind, code, reserved, number, length) + body


def joined(pieces: Sequence[bytes | bytearray | memoryview]) -> bytes:
    return b"".join(pieces)


def everything(mux: Mux) -> bytes:
    """All that a side has to send now."""
    sent = bytearray()
    while pieces := mux.output(1 << 20):
        sent += joined(pieces)
    return bytes(sent)


def frames_of(data: bytes) -> list[tuple[int, int, int, int]]:
    """(type, code, stream, length) of each frame."""
    found, position = [], 0
    while position < len(data):
        kind, code, _, number, length = HEADER.unpack_from(data, position)
        found.append((kind, code, number, length))
        position += HEADER.size + (length if kind in (OPEN, DATA) else 0)
    assert position == len(data)
    return found


def merged(events: list[Event]) -> list[Event]:
    """Events as they would be had all come at once: neighbouring pieces of one stream are one piece."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Received):
            last = found[-1] if found else None
            before = b""
            if isinstance(last, Received) and last.number == event.number:
                before = bytes(last.data)
                found.pop()
            event = Received(event.number, memoryview(before + bytes(event.data)))
        found.append(event)
    return found


# ---- the model


@dataclass
class Half:
    """What one side did with a stream and what it met there."""

    sent: int = 0
    ended: bool = False
    reset: bool = False
    granted: int = INITIAL_WINDOW
    received: int = 0
    saw_end: bool = False
    saw_reset: Reason | None = None


@dataclass
class Modelled:
    """A stream as its opener (`opener`, 0 or 1) made it; `announced` once the other side has heard of it."""

    opener: int
    protocol: str
    announced: bool = False
    halves: tuple[Half, Half] = field(default_factory=lambda: (Half(), Half()))

    def over(self, side: int) -> bool:
        """Whether the stream is over in the eyes of a side."""
        half = self.halves[side]
        return half.reset or half.saw_reset is not None or (half.ended and half.saw_end)


class TwoSides(RuleBasedStateMachine):
    """Two muxers, the bytes under way between them, and what every stream should have come to."""

    @initialize(most=st.integers(1, 6))
    def begin(self, most: int) -> None:
        self.most = most
        self.muxes = [Mux(initiator=True, max_streams=most), Mux(initiator=False, max_streams=most)]
        self.wires = [bytearray(), bytearray()]  # from side 0, from side 1
        self.streams: dict[int, Modelled] = {}

    def choose(self, side: int, chance: int) -> int | None:
        """A stream that the side knows, over or not."""
        known = [number for number, stream in self.streams.items() if stream.opener == side or stream.announced]
        return known[chance % len(known)] if known else None

    @rule(side=st.integers(0, 1), name=st.text(max_size=20))
    def open(self, side: int, name: str) -> None:
        number = self.muxes[side].open(name)
        assert number % 2 == (side == 0) and number not in self.streams
        self.streams[number] = Modelled(side, name)

    @rule(side=st.integers(0, 1), chance=st.integers(0, 100), sizes=st.lists(st.integers(0, 200_000), max_size=4))
    def send(self, side: int, chance: int, sizes: list[int]) -> None:
        if (number := self.choose(side, chance)) is None:
            return
        stream = self.streams[number]
        half = stream.halves[side]
        parts, start = [], half.sent
        for size in sizes:
            parts.append(content(number, side, start, size))
            start += size
        if half.ended or stream.over(side):
            with pytest.raises(ValueError):
                self.muxes[side].send(number, parts)
        else:
            self.muxes[side].send(number, parts)
            half.sent = start

    @rule(side=st.integers(0, 1), chance=st.integers(0, 100))
    def withdraw(self, side: int, chance: int) -> None:
        if (number := self.choose(side, chance)) is not None:
            self.streams[number].halves[side].sent -= self.muxes[side].pending(number)
            self.muxes[side].withdraw(number)
            assert self.muxes[side].pending(number) == 0

    @rule(side=st.integers(0, 1), chance=st.integers(0, 100))
    def end(self, side: int, chance: int) -> None:
        if (number := self.choose(side, chance)) is not None:
            self.muxes[side].end(number)
            if not self.streams[number].over(side):
                self.streams[number].halves[side].ended = True

    @rule(side=st.integers(0, 1), chance=st.integers(0, 100), reason=st.sampled_from(Reason))
    def reset(self, side: int, chance: int, reason: Reason) -> None:
        if (number := self.choose(side, chance)) is not None:
            alive = number in self.muxes[side]
            self.muxes[side].reset(number, reason)
            if alive:
                self.streams[number].halves[side].reset = True

    @rule(side=st.integers(0, 1), chance=st.integers(0, 100), size=st.one_of(st.integers(0, 500_000), st.just(MAX_WINDOW)))
    def grant(self, side: int, chance: int, size: int) -> None:
        if (number := self.choose(side, chance)) is not None:
            before = self.muxes[side].window(number)
            self.muxes[side].grant(number, size)
            self.streams[number].halves[side].granted += self.muxes[side].window(number) - before

    @rule(side=st.integers(0, 1), size=st.integers(1, 300_000))
    def put_out(self, side: int, size: int) -> None:
        self.wires[side] += joined(self.muxes[side].output(size))

    @precondition(lambda self: any(self.wires))
    @rule(side=st.integers(0, 1), share=st.floats(0, 1), cuts=st.lists(st.integers(1, 100_000), max_size=5))
    def deliver(self, side: int, share: float, cuts: list[int]) -> None:
        wire = self.wires[side]
        size = int(len(wire) * share)
        data = bytes(wire[:size])
        del wire[:size]
        for cut in cuts:
            self.take(1 - side, data[:cut])
            data = data[cut:]
        self.take(1 - side, data)

    def take(self, side: int, data: bytes) -> None:
        for event in self.muxes[side].receive(data):
            stream = self.streams[event.number]  # type: ignore[union-attr]  # no connection is closed here
            half, other = stream.halves[side], stream.halves[1 - side]
            assert not half.reset and half.saw_reset is None, "nothing is heard of a stream that is over"
            if isinstance(event, Opened):
                assert stream.opener != side and not stream.announced and event.protocol == stream.protocol
                stream.announced = True
            elif isinstance(event, Received):
                assert not half.saw_end and len(event.data)
                assert bytes(event.data) == content(event.number, 1 - side, half.received, len(event.data))
                half.received += len(event.data)
                assert half.received <= half.granted, "more than was granted"
            elif isinstance(event, Ended):
                assert not half.saw_end and other.ended and half.received == other.sent
                half.saw_end = True
            else:
                assert isinstance(event, WasReset)
                assert other.reset or event.reason is Reason.REFUSED
                half.saw_reset = event.reason

    @invariant()
    def both_sides_keep_what_is_not_over_and_nothing_else(self) -> None:
        if not hasattr(self, "muxes"):
            return
        for side, mux in enumerate(self.muxes):
            theirs = sum(stream.opener != side and stream.announced and number in mux for number, stream in self.streams.items())
            assert mux.remote_streams == theirs <= self.most
            for number, stream in self.streams.items():
                half = stream.halves[side]
                if stream.opener != side and not stream.announced or half.reset or half.saw_reset is not None:
                    assert number not in mux
                elif not (half.ended and half.saw_end):
                    assert number in mux
                assert mux.window(number) <= MAX_WINDOW
                assert mux.pending(number) == 0 or number in mux
                assert number not in mux or mux.window(number) <= half.granted - half.received

    def teardown(self) -> None:
        if not hasattr(self, "muxes"):
            return
        while True:  # everything arrives, and whoever receives goes on granting
            for side, mux in enumerate(self.muxes):
                self.wires[side] += everything(mux)
            if not any(self.wires):
                break
            for side in (0, 1):
                data = bytes(self.wires[side])
                self.wires[side].clear()
                self.take(1 - side, data)
                for number, stream in self.streams.items():
                    mux = self.muxes[1 - side]
                    if number in mux and mux.window(number) < INITIAL_WINDOW:
                        before = mux.window(number)
                        mux.grant(number, INITIAL_WINDOW)
                        stream.halves[1 - side].granted += mux.window(number) - before
        for number, stream in self.streams.items():
            if any(half.reset or half.saw_reset is not None for half in stream.halves):
                assert all(number not in mux for mux in self.muxes)
                continue
            assert stream.announced
            for side, half in enumerate(stream.halves):
                other = stream.halves[1 - side]
                assert half.received == other.sent, "every byte has arrived"
                assert half.saw_end == other.ended
            assert all((number in mux) != all(half.ended for half in stream.halves) for mux in self.muxes)


class TestTwoSides(TwoSides.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=120, stateful_step_count=70, deadline=None)


# ---- examples of the theory of operation


def pair(most: int = 100) -> tuple[Mux, Mux]:
    return Mux(initiator=True, max_streams=most), Mux(initiator=False, max_streams=most)


def test_a_stream_is_usable_at_once_and_names_its_protocol() -> None:
    here, there = pair()
    number = here.open("/echo")
    here.send(number, [b"hel", b"lo"])
    here.end(number)
    events = merged(there.receive(everything(here)))
    assert events == [Opened(number, "/echo"), Received(number, memoryview(b"hello")), Ended(number)]
    there.send(number, [b"hello"])
    there.end(number)
    assert merged(here.receive(everything(there))) == [Received(number, memoryview(b"hello")), Ended(number)]
    assert number not in here and number not in there


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_it_does_not_matter_how_the_bytes_are_cut(data: st.DataObject) -> None:
    here, whole = pair()
    for index in range(3):
        number = here.open("x" * index * 40)
        here.send(number, [content(number, 0, 0, 3000 * index)])
        here.grant(number, 5)
    here.end(1)
    here.reset(3)
    sent = everything(here)
    here.close()
    sent += everything(here)
    _, cut = pair()
    events: list[Event] = []
    positions = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=12)))
    for start, end in zip([0, *positions], [*positions, len(sent)], strict=True):
        events += cut.receive(sent[start:end])
    assert merged(events) == merged(whole.receive(sent))
    _, single = pair()
    assert merged([event for byte in sent for event in single.receive(bytes([byte]))]) == merged(events)


def test_a_window_is_used_to_the_last_byte_and_grows_by_grants() -> None:
    here, there = pair()
    number = here.open()
    here.send(number, [bytes(INITIAL_WINDOW + 1000)])
    there.receive(everything(here))
    assert here.pending(number) == 1000 and there.window(number) == 0
    assert everything(here) == b""
    there.grant(number, 400)
    here.receive(everything(there))
    there.receive(everything(here))
    assert here.pending(number) == 600
    there.grant(number, 10_000)
    here.receive(everything(there))
    there.receive(everything(here))
    assert here.pending(number) == 0 and there.window(number) == 9400


def test_grants_beyond_what_a_window_may_be_are_not_sent() -> None:
    here, there = pair()
    number = here.open()
    there.receive(everything(here))
    there.grant(number, MAX_WINDOW)
    assert there.window(number) == MAX_WINDOW
    there.grant(number, 1)
    here.receive(everything(there))  # nothing in it is a fault
    assert there.window(number) == MAX_WINDOW


def test_what_was_withdrawn_is_not_sent_and_an_end_still_is() -> None:
    here, there = pair()
    number = here.open()
    here.send(number, [b"x" * 10])
    here.end(number)
    here.withdraw(number)
    assert merged(there.receive(everything(here))) == [Opened(number, ""), Ended(number)]


def test_short_messages_pass_long_ones() -> None:
    here, _ = pair()
    long, short = here.open(), here.open()
    everything(here)
    here.send(long, [bytes(10 * SHORT)])
    first = here.output(1)
    here.send(short, [bytes(100)])
    assert [number for *_, number, _ in frames_of(joined(first))] == [long]
    assert [number for *_, number, _ in frames_of(joined(here.output(1)))] == [short]
    assert [number for *_, number, _ in frames_of(joined(here.output(1)))] == [long]


def test_long_messages_are_not_starved_by_short_ones() -> None:
    here, there = pair()
    long, *short = [here.open() for _ in range(9)]
    there.receive(everything(here))
    for number in (long, *short):
        there.grant(number, 100 * LONG_TURN_AFTER)
    here.receive(everything(there))
    here.send(long, [bytes(4 * SHORT)])
    sent_for_short = 0
    for _ in range(2000):
        for number in short:  # there is always a short message that waits
            if not here.pending(number):
                here.send(number, [bytes(20_000)])
        ((*_, number, length),) = frames_of(joined(here.output(1)))
        if number == long:
            break
        sent_for_short += length
    assert number == long and sent_for_short <= LONG_TURN_AFTER + SHORT


def test_streams_of_one_kind_take_turns() -> None:
    here, _ = pair()
    numbers = [here.open() for _ in range(4)]
    everything(here)
    for number in numbers:
        here.send(number, [bytes(4 * DATA_SIZE)])
    order = []
    while pieces := here.output(1):
        order += [number for *_, number, _ in frames_of(joined(pieces))]
    assert order[:8] == numbers * 2  # what is left of the first is short before the last has had its third turn


def test_control_frames_go_first_and_no_frame_is_long() -> None:
    here, _ = pair()
    number = here.open()
    here.send(number, [bytes(INITIAL_WINDOW)])
    other = here.open("/later")
    here.reset(other)
    kinds = [kind for kind, *_ in frames_of(joined(here.output(1)))]
    assert kinds == [OPEN, OPEN, RESET, DATA]
    assert all(length <= DATA_SIZE for _, _, _, length in frames_of(everything(here)))


def test_an_output_is_about_as_long_as_was_asked_for() -> None:
    here, _ = pair()
    number = here.open()
    everything(here)
    here.send(number, [bytes(INITIAL_WINDOW)])
    for size in (1, 1000, 100_000):
        assert 0 < len(joined(here.output(size))) <= size + DATA_SIZE + HEADER.size


def test_frames_that_cross_a_reset_are_ignored() -> None:
    here, there = pair()
    number = here.open()
    there.receive(everything(here))
    here.send(number, [bytes(1000)])
    here.grant(number, 7)
    here.end(number)
    crossing = everything(here)
    there.reset(number)
    assert there.receive(crossing) == []
    assert here.receive(everything(there)) == [WasReset(number, Reason.CANCELLED)]
    assert number not in here and number not in there


def test_a_reset_in_the_middle_of_a_frame_drops_the_rest_of_it() -> None:
    here, there = pair()
    number = here.open()
    here.send(number, [bytes(1000)])
    after = here.open("/after")
    del after
    data = everything(here)
    there.receive(data[:600])
    there.reset(number)
    rest = there.receive(data[600:])
    assert not any(isinstance(event, Received) for event in rest)
    here.receive(everything(there))
    number = here.open("/next")
    assert there.receive(everything(here)) == [Opened(number, "/next")]


def test_a_reset_gives_no_licence_to_send_for_ever() -> None:
    _, there = pair()
    there.receive(frame(OPEN, 1))
    there.reset(1)
    piece = frame(DATA, 1, MAX_DATA // 2, bytes(MAX_DATA // 2))
    for _ in range(INITIAL_WINDOW // (MAX_DATA // 2)):
        assert there.receive(piece) == []
    with pytest.raises(MuxError):
        there.receive(piece)


def test_more_streams_than_are_allowed_are_refused_and_room_is_given_back() -> None:
    here, there = pair(most=2)
    numbers = [here.open() for _ in range(3)]
    here.send(numbers[2], [b"too early to know"])
    assert there.receive(everything(here)) == [Opened(numbers[0], ""), Opened(numbers[1], "")]
    assert here.receive(everything(there)) == [WasReset(numbers[2], Reason.REFUSED)]
    here.reset(numbers[0])
    there.receive(everything(here))
    number = here.open()
    assert there.receive(everything(here)) == [Opened(number, "")]
    assert there.remote_streams == 2


def test_names_are_bounded() -> None:
    here, there = pair()
    with pytest.raises(ValueError):
        here.open("é" * MAX_NAME)
    number = here.open("n" * MAX_NAME)
    assert there.receive(everything(here)) == [Opened(number, "n" * MAX_NAME)]


def test_the_end_of_a_connection_carries_its_reason() -> None:
    here, there = pair()
    here.close(Reason.ERROR)
    assert there.receive(everything(here)) == [Closed(Reason.ERROR)]
    assert there.receive(frame(CLOSE, 0, code=200)) == [Closed(Reason.CANCELLED)]  # of a later version


def test_a_peer_that_provokes_answers_without_reading_any_is_cut_off() -> None:
    _, there = pair(most=1)
    with pytest.raises(MuxError):
        for number in range(1, 4 * MAX_CONTROL, 2):
            there.receive(frame(OPEN, number))


def held(mux: Mux) -> int:
    """How many streams a side keeps anything for."""
    return len(mux._streams) + len(mux._short) + len(mux._long) + len(mux._control)


def test_nothing_is_left_of_streams_that_are_over() -> None:
    here, there = pair(most=10)
    for turn in range(2000):
        number = here.open("/x")
        here.send(number, [bytes(10)])
        if turn % 3 == 0:
            here.reset(number)
        elif turn % 3 == 1:
            here.end(number)
        there.receive(everything(here))
        if turn % 3 == 1:
            there.end(number)
        elif turn % 3 == 2:
            there.reset(number)
        here.receive(everything(there))
    assert held(here) == held(there) == 0


# ---- what no honest peer sends

HONEST = frame(OPEN, 1, 2, b"/a") + frame(OPEN, 3) + frame(DATA, 1, 3, b"abc") + frame(END, 3)
"""What came before, on the side that answers: stream 1 is open, stream 3 has ended."""


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame(0, 1), id="a type below those that are"),
        pytest.param(frame(CLOSE + 1, 1), id="a type above those that are"),
        pytest.param(frame(255, 1, 2**32 - 1), id="a type far above, with a length"),
        pytest.param(frame(DATA, 1, 1, b"x", reserved=1), id="reserved bits"),
        pytest.param(frame(DATA, 1, 1, b"x", code=1), id="a code where none belongs"),
        pytest.param(frame(OPEN, 2), id="a stream of the wrong parity"),
        pytest.param(frame(OPEN, 0), id="stream 0"),
        pytest.param(frame(OPEN, 1), id="a stream that is open already"),
        pytest.param(frame(OPEN, 9) + frame(OPEN, 7), id="numbers that shrink"),
        pytest.param(frame(OPEN, 5, MAX_NAME + 1), id="a name that is too long"),
        pytest.param(frame(OPEN, 5, 2, b"\xff\xfe"), id="a name that is not UTF-8"),
        pytest.param(frame(DATA, 5, 1, b"x"), id="data for a stream that never was"),
        pytest.param(frame(DATA, 0, 1, b"x"), id="data for stream 0"),
        pytest.param(frame(DATA, 2, 1, b"x"), id="data for a stream that this side never opened"),
        pytest.param(frame(DATA, 1, 0), id="a frame without data"),
        pytest.param(frame(DATA, 1, MAX_DATA + 1), id="a frame that is too long"),
        pytest.param(frame(DATA, 1, 2**32 - 1), id="a frame of 4 GB"),
        pytest.param(frame(DATA, 3, 1, b"x"), id="data after the end"),
        pytest.param(frame(DATA, 1, MAX_DATA, bytes(MAX_DATA)) * 2, id="more than the window"),
        pytest.param(frame(END, 3), id="a second end"),
        pytest.param(frame(END, 1, 1), id="an end with a length"),
        pytest.param(frame(END, 5), id="the end of a stream that never was"),
        pytest.param(frame(GRANT, 1), id="a grant of nothing"),
        pytest.param(frame(GRANT, 1, MAX_WINDOW), id="a window beyond its limit"),
        pytest.param(frame(GRANT, 1, 2**32 - 1), id="a grant of 4 GB"),
        pytest.param(frame(GRANT, 5, 1), id="a grant for a stream that never was"),
        pytest.param(frame(GRANT, 0, 1), id="a grant for stream 0"),
        pytest.param(frame(RESET, 5), id="a reset of a stream that never was"),
        pytest.param(frame(RESET, 0), id="a reset of stream 0"),
        pytest.param(frame(RESET, 1, 1), id="a reset with a length"),
        pytest.param(frame(CLOSE, 1), id="an end of the connection that names a stream"),
        pytest.param(frame(CLOSE, 0, 4), id="an end of the connection with a length"),
    ],
)
@pytest.mark.parametrize("singly", [False, True], ids=["at once", "byte by byte"])
def test_violations_are_errors(data: bytes, singly: bool) -> None:
    _, there = pair()
    there.receive(HONEST)
    with pytest.raises(MuxError):
        if singly:
            for start in range(len(data)):
                there.receive(data[start : start + 1])
        else:
            there.receive(data)


def test_the_side_that_dialled_knows_its_parity_too() -> None:
    here, _ = pair()
    with pytest.raises(MuxError):
        here.receive(frame(OPEN, 3))
    here, _ = pair()
    number = here.open()
    assert here.receive(frame(OPEN, 2)) == [Opened(2, "")]
    assert here.receive(frame(DATA, number, 1, b"x")) == [Received(number, memoryview(b"x"))]
    with pytest.raises(MuxError):
        here.receive(frame(DATA, number + 2, 1, b"x"))
