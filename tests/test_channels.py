"""What a membership knows when one of its ways to know is silent, and when clocks differ. Several members in one process, each with its own
clock."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar

import pytest
import trio

from petalnet.p2p.discovery import Discovery
from petalnet.p2p.gossip import Gossip
from petalnet.p2p.identity import Identity
from petalnet.peering import Peering, open_peering
from petalnet.routing.records import ServerRecord

AHEAD: ContextVar[float] = ContextVar("AHEAD", default=0.0)
"""Seconds by which the clock of the member is ahead to which the running task belongs: tasks hand it on to those that they start."""


@pytest.fixture
def start(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """`await start(*peers, ahead=0)` gives a member of a swarm whose clock is ahead by so many seconds."""
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + AHEAD.get())

    async def run(peers: tuple[str, ...], ahead: float, *, task_status: trio.TaskStatus[Peering]) -> None:
        AHEAD.set(ahead)
        async with open_peering(Identity.generate(), initial_peers=peers, listen=["/ip4/127.0.0.1/tcp/0"], server=True) as peering:
            task_status.started(peering)
            await trio.sleep_forever()

    async def one(*peers: str, ahead: float = 0.0) -> Peering:
        peering: Peering = await nursery.start(run, peers, ahead)
        return peering

    return one


async def announce(peering: Peering, *, ahead: float = 0.0) -> int:
    token = AHEAD.set(ahead)
    try:
        now = time.time()
        record = ServerRecord(
            peer_id=peering.host.peer_id, addrs=tuple(peering.host.plain_addrs), model="m", model_name="m", span=(0, 4), num_blocks=4,
            state="online", dtype="float32", sequence=int(now * 1000), issued=now, expires=now + 60,
        )  # fmt: skip
        return await peering.announce(record)
    finally:
        AHEAD.reset(token)


async def looked_up(peering: Peering, *, ahead: float = 0.0) -> set[str]:
    """The servers that a member knows of after a look-up."""
    token = AHEAD.set(ahead)
    try:
        await peering.look_up("m")
        return {record.peer_id for record in peering.view.servers("m", now=time.time())}
    finally:
        AHEAD.reset(token)


async def test_where_gossip_is_silent_look_ups_do(start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silence(self: Gossip, topic: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Gossip, "publish", silence)
    entry = await start()
    server, other = await start(*entry.host.addrs), await start(*entry.host.addrs)
    assert await announce(server) >= 2
    assert await looked_up(other) == {server.host.peer_id}


async def test_where_nobody_keeps_or_finds_records_gossip_does(start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def keeps_nothing(self: Discovery, keys: object, record: object) -> int:
        self.crowds |= dict.fromkeys(keys, 1)  # type: ignore[call-overload]
        await trio.lowlevel.checkpoint()
        return 1

    async def finds_nothing(self: Discovery, key: object, *, keepers: int = 0) -> list[object]:
        await trio.lowlevel.checkpoint()
        return []

    monkeypatch.setattr(Discovery, "announce", keeps_nothing)
    monkeypatch.setattr(Discovery, "find", finds_nothing)
    entry = await start()
    server, other = await start(*entry.host.addrs), await start(*entry.host.addrs)
    with trio.fail_after(10):
        while not other.view.servers("m", now=time.time()):
            await announce(server)  # at every beat
            await trio.sleep(0.2)
    assert [record.peer_id for record in other.view.servers("m", now=time.time())] == [server.host.peer_id]


@pytest.mark.parametrize("ahead", [-540.0, -300.0, 300.0, 540.0])
async def test_a_clock_that_is_minutes_off_harms_nobody(start, ahead: float, caplog: pytest.LogCaptureFixture) -> None:
    entry = await start()
    right, wrong = await start(*entry.host.addrs), await start(*entry.host.addrs, ahead=ahead)
    assert await announce(right) == 3
    assert await announce(wrong, ahead=ahead) == 3
    both = {right.host.peer_id, wrong.host.peer_id}
    assert await looked_up(entry) == both and await looked_up(right) == both
    assert await looked_up(wrong, ahead=ahead) == both
    assert not [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING and "clock" in entry.getMessage()]


@pytest.mark.parametrize(("ahead", "words"), [(-900.0, "15 min ahead of"), (900.0, "15 min behind")])
async def test_a_clock_that_is_further_off_is_told(start, ahead: float, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """By whoever has it: the others are many."""
    entry = await start()
    right, wrong = await start(*entry.host.addrs), await start(*entry.host.addrs, ahead=ahead)
    assert await announce(right) >= 2
    assert await looked_up(right) == {right.host.peer_id}
    assert await looked_up(wrong, ahead=ahead) == set()
    assert await looked_up(wrong, ahead=ahead) == set()
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert warning == (
        f"this machine's clock seems to be wrong: 1 of 1 servers that were found have clocks that are about {words} it, and are left out "
        "until it is set (up to 10 min do no harm)"
    )
    caplog.clear()
    assert await announce(wrong, ahead=ahead) == 1
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert "no peer keeps what this node announces" in warning and "if the clocks are right" in warning
