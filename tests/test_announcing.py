"""When a server speaks about itself, in virtual time."""

from __future__ import annotations

import dataclasses
import time

import pytest
import trio
from trio.testing import MockClock

from petalnet.announcing import BEAT_S, LIFETIME_S, LOAD_GAP_S, Announcer, Load, Rates
from petalnet.routing.pace import LEFT_LIFETIME_S
from petalnet.routing.records import ServerRecord
from petalnet.routing.swarm import SwarmView


class Listener:
    """Takes announcements in, as the swarm would."""

    def __init__(self) -> None:
        self.view = SwarmView()
        self.beat_s = BEAT_S
        self.heard: list[tuple[float, ServerRecord]] = []
        self.stored = 3

    async def announce(self, record: ServerRecord) -> int:
        await trio.lowlevel.checkpoint()
        self.heard.append((trio.current_time(), ServerRecord.decode(record.encode())))
        return self.stored


def make_record(peer_id: str = "A", span: tuple[int, int] = (0, 4)) -> ServerRecord:
    now = time.time()
    return ServerRecord(
        peer_id=peer_id, addrs=("/ip4/127.0.0.1/tcp/1",), model="m", model_name="m", span=span, num_blocks=12,
        state="joining", dtype="float32", sequence=0, issued=now, expires=now + 60,
    )  # fmt: skip


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_beat_and_change(autojump_clock: MockClock) -> None:
    listener, load = Listener(), Load(1000, 0)
    announcer = Announcer(listener, make_record(), lambda: load, lambda peer_id: None)
    began = trio.current_time()
    announcer.change(state="online")
    await announcer.tell()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run)
        await trio.sleep(BEAT_S * 4 + 1)
        assert [round(at - began) for at, _ in listener.heard] == [0, 15, 30, 45, 60]
        load = Load(950, 1)  # nothing that anyone would act on
        await trio.sleep(BEAT_S - 2)
        assert len(listener.heard) == 5
        load = Load(500, 0)
        await trio.sleep(4)
        assert len(listener.heard) == 6 and listener.heard[-1][1].free_kv_tokens == 500
        nursery.cancel_scope.cancel()


async def test_load_that_flutters_is_told_no_faster_than_the_gap(autojump_clock: MockClock) -> None:
    listener, loads = Listener(), [Load(0, 9), Load(1000, 0)]

    def load() -> Load:
        loads.reverse()
        return loads[0]

    announcer = Announcer(listener, make_record(), load, lambda peer_id: None)
    with trio.move_on_after(60):
        await announcer.run()
    times = [at for at, _ in listener.heard]
    assert len(times) > 10 and min(b - a for a, b in zip(times, times[1:], strict=False)) >= 3


async def test_what_nobody_took_in_is_told_again_soon(autojump_clock: MockClock) -> None:
    listener = Listener()
    listener.stored = 1
    announcer = Announcer(listener, make_record(), lambda: Load(5, 2), lambda peer_id: None)
    await announcer.tell()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run)
        await trio.sleep(LOAD_GAP_S + 0.5)
        assert len(listener.heard) == 2
        listener.stored = 2
        await trio.sleep(LOAD_GAP_S)
        listener.heard.clear()
        await trio.sleep(BEAT_S - LOAD_GAP_S)
        nursery.cancel_scope.cancel()
    assert not listener.heard, "somebody has it: the next beat will do"


async def test_times_and_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    announcer = Announcer(listener, make_record(), lambda: Load(5, 2), lambda peer_id: None)
    clock = [1.7e9, 1.7e9 - 500.0]  # set back in between
    monkeypatch.setattr(time, "time", lambda: clock.pop(0))
    await announcer.tell()
    announcer.change(state="left")
    await announcer.tell()
    first, second = (record for _, record in listener.heard)
    assert second.sequence > first.sequence and second.state == "left"
    assert first.expires - first.issued == LIFETIME_S and (first.free_kv_tokens, first.queue) == (5, 2)
    assert second.expires - second.issued == LEFT_LIFETIME_S, "no copy of an earlier record outlives the one that says that it left"


async def test_where_many_servers_speak_each_speaks_less_often(autojump_clock: MockClock) -> None:
    listener = Listener()
    listener.beat_s = 100.0
    announcer = Announcer(listener, make_record(), lambda: Load(5, 2), lambda peer_id: None)
    await announcer.tell()
    with trio.move_on_after(205):
        await announcer.run()
    assert [round(at - listener.heard[0][0]) for at, _ in listener.heard] == [0, 100, 200]
    assert listener.heard[-1][1].expires - listener.heard[-1][1].issued == pytest.approx(200)


async def test_round_trips_to_those_who_hold_the_next_block() -> None:
    listener = Listener()
    for peer_id, span in {"B": (4, 8), "C": (3, 5), "D": (5, 8), "E": (4, 5)}.items():
        record = make_record(peer_id, span)
        listener.view.add(ServerRecord(**{name: getattr(record, name) for name in record.__slots__} | {"state": "online"}), now=time.time())
    seconds = {"B": 0.05, "C": 0.01, "D": 0.001}
    announcer = Announcer(listener, make_record(span=(0, 4)), lambda: Load(0, 0), seconds.get)
    await announcer.tell()
    assert listener.heard[0][1].next_round_trips == (("C", 0.01), ("B", 0.05))


async def test_a_record_that_would_be_too_long_goes_without_digests() -> None:
    listener = Listener()
    long = dataclasses.replace(make_record(), span=(0, 400), num_blocks=400)
    announcer = Announcer(listener, long, lambda: Load(0, 0), lambda peer_id: None)
    announcer.change(block_digests=tuple(f"{block:032x}" for block in range(400)))
    await announcer.tell()
    assert listener.heard[0][1].block_digests == () and listener.heard[0][1].span == (0, 400)
    assert len(announcer.record.block_digests) == 400


async def test_a_machine_that_slept_speaks_at_once(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it slept its monotonic clock stood, so no beat is due by that one; its record has expired all the same."""
    listener = Listener()
    announcer = Announcer(listener, make_record(), lambda: Load(5, 2), lambda peer_id: None)
    await announcer.tell()
    now = time.time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run)
        for step in (3600.0, -7200.0):  # it slept for an hour; and a clock that was set back
            heard, now = len(listener.heard), now + step
            monkeypatch.setattr(time, "time", lambda now=now: now)
            await trio.sleep(1.5)
            assert len(listener.heard) == heard + 1 and listener.heard[-1][1].issued == now
            await trio.sleep(5)
            assert len(listener.heard) == heard + 1
        nursery.cancel_scope.cancel()


async def test_rates_follow_real_work_and_are_told_when_they_differ_enough(autojump_clock: MockClock) -> None:
    listener = Listener()
    done = {"decode_tokens_s": (0.0, 0.0), "forward_tokens_s": (0.0, 0.0)}
    announcer = Announcer(listener, make_record(), lambda: Load(1000, 0), lambda peer_id: None, done=lambda: done)

    async def work(seconds: int, rate: float, kind: str = "decode_tokens_s") -> list[tuple[float, ServerRecord]]:
        """Half of the time it computes. Returns what was announced."""
        began, told = trio.current_time(), len(listener.heard)
        for _ in range(seconds):
            await trio.sleep(1)
            done[kind] = done[kind][0] + rate / 2, done[kind][1] + 0.5
        return [(at - began, record) for at, record in listener.heard[told:]]

    announcer.change(state="online", decode_tokens_s=100.0, prefill_tokens_s=1000.0)
    await announcer.tell()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run)
        assert {record.decode_tokens_s for _, record in await work(60, 95.0)} == {100.0}
        for rate in (60.0, 97.0):  # a bad moment
            assert all(record.decode_tokens_s > 80 for _, record in await work(6 if rate == 60.0 else 60, rate))
        slower = [(at, record.decode_tokens_s) for at, record in await work(200, 20.0) if record.decode_tokens_s < 70]
        assert slower[0][0] < 30 and 19 <= slower[-1][1] <= 23, "another program takes most of the device"
        await work(100, 300.0, "forward_tokens_s")
        last = listener.heard[-1][1]
        assert (last.decode_tokens_s, last.prefill_tokens_s, last.forward_tokens_s) == (slower[-1][1], 1000.0, 300.0)
        announcer.change(span=(4, 8), decode_tokens_s=50.0)  # other blocks, measured anew
        done = {}
        await announcer.tell()
        assert listener.heard[-1][1].decode_tokens_s == 50.0
        nursery.cancel_scope.cancel()


def test_smoothing_counts_seconds_of_work_and_not_of_the_clock() -> None:
    told = {"decode_tokens_s": 100.0}
    rates = Rates()
    for _ in range(1000):
        rates.note({"decode_tokens_s": (0.0, 0.0)}, told)
    assert not rates.differing(told, 1.01), "it did nothing"
    rates.note({"decode_tokens_s": (2000.0, 5.0)}, told)
    assert 110 < rates.differing(told, 1.01)["decode_tokens_s"] < 130
    assert not rates.differing(told, 1.4)


async def test_what_links_to_the_next_servers_carry_is_told_beside_their_round_trips() -> None:
    listener = Listener()
    for peer_id in ("B", "C"):
        listener.view.add(dataclasses.replace(make_record(peer_id, (4, 8)), state="online"), now=time.time())
    trips, rates = {"B": 0.05, "C": 0.01}, {"B": 12_345_678.0}
    announcer = Announcer(listener, make_record(span=(0, 4)), lambda: Load(0, 0), trips.get, bytes_s=rates.get)
    await announcer.tell()
    told = listener.heard[-1][1]
    assert told.next_round_trips == (("C", 0.01), ("B", 0.05)) and told.next_bytes_s == (0.0, 12_000_000.0)
    rates.clear()
    await announcer.tell()
    assert listener.heard[-1][1].next_bytes_s == ()
