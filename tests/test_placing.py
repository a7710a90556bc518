"""Servers that place themselves, in virtual time: each has a view of its own, and hears of the others after a delay."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import trio

from petalnet import placing
from petalnet.placing import SECOND_LOOKS, TOLD_S, Placing
from petalnet.routing.placement import Move
from petalnet.routing.records import ServerRecord
from petalnet.routing.strength import places_of, strengths
from petalnet.routing.swarm import SwarmView

BLOCKS = 12
LOAD_S = 30.0
DRAIN_S = 10.0
HOUR_S = 3600.0


def record_of(peer_id: str, span: tuple[int, int], state: str = "online", **changes: object) -> ServerRecord:
    now = time.time()
    values: dict[str, object] = {
        "peer_id": peer_id, "addrs": (), "model": "m", "model_name": "m", "span": span, "num_blocks": BLOCKS, "state": state,
        "dtype": "float32", "sequence": 1, "issued": now, "expires": now + HOUR_S, "decode_tokens_s": 10.0, "movable": True,
    }  # fmt: skip
    return ServerRecord(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock would jump while a thread computes."""

    async def at_once(function, *arguments):
        return function(*arguments)

    monkeypatch.setattr(placing, "in_thread", at_once)


class Member:
    """One server and what it knows."""

    def __init__(self, swarm: Simulated, record: ServerRecord) -> None:
        self.view = SwarmView(record.peer_id)
        self.record = record
        self._swarm = swarm
        self.placing = Placing(self, record.peer_id, "m", BLOCKS, is_alive=swarm.is_alive, rng=swarm.rng)
        self.moves: list[Move] = []

    async def look_up(self, model: str | None = None) -> None:
        pass

    async def say(self, state: str, span: tuple[int, int] | None = None) -> None:
        self.record = replace(self.record, state=state, span=span or self.record.span, sequence=self.record.sequence + 1)
        self._swarm.spread(self.record)

    async def join(self, count: int) -> None:
        await self.say("joining", await self.placing.choose(count))
        for look in range(SECOND_LOOKS):
            span = await self.placing.reconsider(self.record, again=look > 0)
            if span is None:
                break
            await self.say("joining", span)
        await trio.sleep(LOAD_S)
        await self.say("online")

    async def live(self) -> None:
        while True:
            move = await self.placing.next_move(lambda: self.record)
            if not self.placing.may_leave(self.record, move):
                continue
            await self.say("draining")
            cleared = await self.placing.clear_to_go(self.record, move)
            if cleared:
                await trio.sleep(DRAIN_S)
                cleared = self.placing.may_leave(self.record, move)
            if not cleared:
                await self.say("online")
                continue
            self.moves.append(move)
            before = self._swarm.online()
            await self.say("joining", move.span)
            self._swarm.holes_opened += 0 not in before and 0 in self._swarm.online()
            await trio.sleep(LOAD_S)
            await self.say("online")


class Simulated:
    """A swarm whose news take up to `late_s` to each other member."""

    def __init__(self, nursery: trio.Nursery, seed: int, late_s: float = 0.9 * TOLD_S) -> None:
        self.rng = random.Random(seed)
        self.members: dict[str, Member] = {}
        self._nursery = nursery
        self._late_s = late_s
        self.holes_opened = 0

    def add(self, record: ServerRecord) -> Member:
        member = self.members[record.peer_id] = Member(self, record)
        for other in self.members.values():
            other.view.add(record, now=time.time())
            member.view.add(other.record, now=time.time())
        return member

    def spread(self, record: ServerRecord) -> None:
        for member in self.members.values():
            late = 0.0 if member.record.peer_id == record.peer_id else self.rng.uniform(0, self._late_s)
            self._nursery.start_soon(self._deliver, member, record, late)

    async def _deliver(self, member: Member, record: ServerRecord, late: float) -> None:
        await trio.sleep(late)
        member.view.add(record, now=time.time())

    def online(self) -> list[int]:
        """How many servers that answer hold each block."""
        counts = [0] * BLOCKS
        for member in self.members.values():
            if member.record.state in ("online", "draining"):
                for block in range(*member.record.span):
                    counts[block] += 1
        return counts

    async def is_alive(self, record: ServerRecord) -> bool:
        return record.peer_id in self.members

    def remove(self, peer_id: str) -> None:
        """A server dies, and its record has run out everywhere."""
        del self.members[peer_id]
        for member in self.members.values():
            member.view.forget(peer_id)

    @property
    def moves(self) -> int:
        return sum(len(member.moves) for member in self.members.values())

    def weakest(self) -> int:
        return min(strengths(places_of([member.record for member in self.members.values()], BLOCKS, now=time.time()), BLOCKS))


async def test_newcomers_at_the_same_moment_spread(autojump_clock) -> None:
    for seed in range(5):
        async with trio.open_nursery() as nursery:
            swarm = Simulated(nursery, seed)
            async with trio.open_nursery() as joining:
                for peer_id in "ABCDEF":
                    member = swarm.add(record_of(peer_id, (0, 1), state="left"))
                    joining.start_soon(member.join, 4)
        assert sorted(swarm.online()) == [2] * BLOCKS


async def test_a_newcomer_does_not_count_on_a_dead_server_that_is_still_listed(autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        swarm = Simulated(nursery, 1)
        for peer_id, span in {"A": (0, 4), "B": (4, 8), "C": (8, 12)}.items():
            swarm.add(record_of(peer_id, span, decode_tokens_s=20.0 if peer_id == "B" else 10.0))
        late = swarm.add(record_of("D", (0, 1), state="left"))
        del swarm.members["B"]
        await late.join(4)
        assert late.record.span == (4, 8)


async def test_a_spare_server_fills_a_hole_and_only_one_of_them(autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        swarm = Simulated(nursery, 1)
        for peer_id, span in {"A": (0, 4), "B": (4, 8), "C": (8, 12), "D": (0, 4), "E": (4, 8)}.items():
            nursery.start_soon(swarm.add(record_of(peer_id, span)).live)
        await trio.sleep(60)
        assert swarm.moves == 0
        swarm.remove("C")
        await trio.sleep(25 + DRAIN_S + LOAD_S)
        assert 0 not in swarm.online()
        await trio.sleep(HOUR_S / 2)
        assert swarm.moves == 1 and swarm.holes_opened == 0
        nursery.cancel_scope.cancel()


async def test_nobody_goes_in_reliance_on_a_dead_server_that_is_still_listed(autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        swarm = Simulated(nursery, 1)
        mover = swarm.add(record_of("B", (0, 6)))
        swarm.add(record_of("C", (0, 6)))
        assert await mover.placing.clear_to_go(mover.record, Move("B", (6, 12), True, (0, 1)))
        del swarm.members["C"]
        assert mover.placing.may_leave(mover.record, Move("B", (6, 12), True, (0, 1))), "nobody has heard of it"
        assert not await mover.placing.clear_to_go(mover.record, Move("B", (6, 12), True, (0, 1)))


async def test_who_does_not_take_its_turn_is_passed_over(autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        swarm = Simulated(nursery, 1)
        for peer_id, span in {"A": (0, 6), "B": (0, 6)}.items():
            member = swarm.add(record_of(peer_id, span))
            if peer_id == "B":  # A's record is all that there is of it
                nursery.start_soon(member.live)
        await trio.sleep(120)
        assert swarm.members["B"].record.span == (6, 12)
        nursery.cancel_scope.cancel()


async def test_a_server_that_drains_for_hours_keeps_nobody_from_filling_a_hole(autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        swarm = Simulated(nursery, 1)
        swarm.add(record_of("9", (0, 6), state="draining"))  # its peer id is the smallest
        for peer_id in "AB":
            nursery.start_soon(swarm.add(record_of(peer_id, (0, 6))).live)
        await trio.sleep(30)
        assert swarm.moves == 0, "it may be about to go there itself"
        await trio.sleep(150 + DRAIN_S + LOAD_S)
        assert 0 not in swarm.online()
        nursery.cancel_scope.cancel()


async def test_blocks_that_could_not_be_loaded_are_not_tried_again_and_again(autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        swarm = Simulated(nursery, 1)
        first, _ = (swarm.add(record_of(peer_id, (0, 6))) for peer_id in "AB")
        move = await first.placing.next_move(lambda: first.record)
        assert move.span == (6, 12)
        first.placing.could_not_load(move.span)
        with trio.move_on_after(HOUR_S / 2) as patience:
            await first.placing.next_move(lambda: first.record)
        assert patience.cancelled_caught, "nobody gets anything from a server that unloads its blocks every minute"
        assert (await first.placing.next_move(lambda: first.record)).span == (6, 12), "but it may work later"


async def test_a_swarm_that_stands_badly_settles_and_then_rests(autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        swarm = Simulated(nursery, 1)
        for index in range(12):
            nursery.start_soon(swarm.add(record_of(f"P{'ABCDEFGHJKLM'[index]}", (0, 6) if index < 9 else (6, 12))).live)
        await trio.sleep(HOUR_S / 2)
        assert swarm.moves == 3 and swarm.holes_opened == 0
        assert swarm.weakest() == 60_000
        await trio.sleep(HOUR_S)
        assert swarm.moves == 3
        nursery.cancel_scope.cancel()


async def test_two_that_would_leave_the_same_blocks_at_the_same_moment_do_not_both_go(autojump_clock) -> None:
    went: list[str] = []

    async def leave(member: Member, move: Move) -> None:
        await member.say("draining")
        if await member.placing.clear_to_go(member.record, move):
            went.append(member.record.peer_id)
            await member.say("joining", move.span)
        else:
            await member.say("online")

    for seed in range(20):
        went.clear()
        async with trio.open_nursery() as nursery:
            swarm = Simulated(nursery, seed)
            a, b = (swarm.add(record_of(peer_id, (0, 6))) for peer_id in "AB")
            swarm.add(record_of("C", (0, 6)))
            swarm.remove("C") if seed % 2 else None
            async with trio.open_nursery() as leaving:
                leaving.start_soon(leave, a, Move("A", (6, 12), True, (0, 1)))
                await trio.sleep(swarm.rng.uniform(0, 3))
                leaving.start_soon(leave, b, Move("B", (6, 12), True, (0, 1)))
        assert len(went) <= 1 if seed % 2 else len(went) <= 2
        assert min(swarm.online()[:6]) >= 1
