"""What may come in between while a chain is mended: answers of survivors that are early, and survivors that go after they have answered."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from petalnet.client.inputs import Inputs
from petalnet.client.server_side import ServerSide
from petalnet.errors import PeerLost
from petalnet.p2p.fields import Message
from petalnet.p2p.session_messages import LinkDown, Resume
from petalnet.routing.records import ServerRecord
from petalnet.routing.routes import Hop
from tests.client.simulated import Caches, Hosted, Machine, Simulated, blob_of, rows_of


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Lived:
    """A session among simulated servers, and what it ought to compute."""

    def __init__(self, swarm: Simulated) -> None:
        self.swarm, self.side = swarm, ServerSide(swarm.target(), 4096, 1)
        self.reference, self.position = Caches(0, swarm.blocks), 0

    async def step(self, values: list[int]) -> None:
        with trio.fail_after(20.0):  # far less than the time-out of a request
            outputs = await self.side.step(blob_of([values]), self.position, None, Inputs())
        assert rows_of(outputs[0]) == self.reference.take(self.position, [values], None)
        self.position += len(values)

    def machine(self, place: int) -> Machine:
        chain = self.side.chain
        assert chain is not None
        return self.swarm.machine(chain.hops[place].peer_id)


def swarm_of(nursery: trio.Nursery) -> Simulated:
    return Simulated(6, [Machine(f"{copy} {first}", first, first + 2) for first in (0, 2, 4) for copy in "ab"], Random(0), nursery)


async def test_a_survivor_goes_after_it_has_resumed(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        lived = Lived(swarm_of(nursery))
        await lived.step([3, 1, 4])
        survivor, lost = lived.machine(0), lived.machine(1)
        newcomer = next(one for one in lived.swarm.machines if one.first == lost.first and one is not lost)
        newcomer.set("hung")
        lost.set("dead")

        async def meanwhile() -> None:
            await trio.sleep(1.0)
            survivor.set("dead")
            await trio.sleep(1.0)
            newcomer.set("well")

        nursery.start_soon(meanwhile)
        await lived.step([1])
        await lived.step([5])
        await lived.side.close()
        nursery.cancel_scope.cancel()


async def test_a_survivor_does_not_reach_the_newcomer_and_says_so_at_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    blamed: list[str] = []
    serve_one = Hosted.serve_one

    def resumed(hosted: Hosted, message: Message) -> None:
        serve_one(hosted, message)
        if isinstance(message, Resume) and hosted.pushes_to == newcomer.peer_id:
            hosted.is_down = True
            hosted.stream.tell(LinkDown("connection refused", 0))

    def mark_failed(peer_id: str, **options: Any) -> None:
        blamed.append(peer_id)

    async with trio.open_nursery() as nursery:
        lived = Lived(swarm_of(nursery))
        await lived.step([3, 1, 4])
        lost = lived.machine(1)
        newcomer = next(one for one in lived.swarm.machines if one.first == lost.first and one is not lost)
        monkeypatch.setattr(Hosted, "serve_one", resumed)
        monkeypatch.setattr(lived.swarm, "mark_failed", mark_failed)
        newcomer.set("hung")
        lost.set("dead")

        async def meanwhile() -> None:
            await trio.sleep(1.0)
            newcomer.set("well")

        nursery.start_soon(meanwhile)
        await lived.step([1])
        await lived.step([5])
        assert set(blamed) == {lost.peer_id} and len(lived.side.recoveries) == 1
        await lived.side.close()
        nursery.cancel_scope.cancel()


async def test_who_reads_a_stream_that_was_closed_stops(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a stream fails at once, without a pause in which anybody else would have a turn."""

    async def receive() -> Message | None:
        raise PeerLost("the stream is closed", "somebody")

    async with trio.open_nursery() as nursery:
        lived = Lived(swarm_of(nursery))
        await lived.step([3, 1, 4])
        chain = lived.side.chain
        assert chain is not None
        await lived.side.close()
        for link in chain.exchange.links:
            monkeypatch.setattr(link.stream, "receive", receive)
            link.lost, link.scope = None, trio.CancelScope()
            link.scope.cancel()
        with trio.fail_after(1.0):
            await chain.exchange.run_links()
        nursery.cancel_scope.cancel()


async def test_a_new_chain_goes_on_with_servers_like_the_first(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(peer_id: str) -> ServerRecord:
        dtype = "bfloat16" if peer_id.startswith("short") else "float32"
        return ServerRecord(
            peer_id=peer_id, addrs=("/ip4/127.0.0.1/tcp/1",), model="model", model_name="test", span=(0, 8), num_blocks=8, state="online",
            dtype=dtype, sequence=1, issued=1.0, expires=600.0,
        )  # fmt: skip

    async def route(model: str, first: int, end: int, *, blocked: Any = (), like: Any = None, **_: Any) -> list[Hop]:
        wanted = None if like is None else [(one.span, one.dtype) for one in like]
        asked.append(wanted)
        names = ["First", "short", "Third"] if wanted is None else ["First", "Third"]
        return [Hop(next(name for name in names if lived.swarm.machine(name).state == "well"), (), first, end)]

    asked: list[Any] = []
    async with trio.open_nursery() as nursery:
        machines = [Machine(name, 0, 6) for name in ("First", "short", "Third")]
        lived = Lived(Simulated(6, machines, Random(0), nursery))
        monkeypatch.setattr(lived.swarm, "record", record)
        monkeypatch.setattr(lived.swarm, "route", route)
        await lived.step([3, 1, 4])
        machines[0].set("dead")
        await lived.step([1])
        assert lived.machine(0) is machines[2]
        assert asked[0] is None and asked[-1] == [((0, 6), "float32")]
        await lived.side.close()
        nursery.cancel_scope.cancel()


async def test_a_survivor_goes_while_others_are_looked_for(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def route(*place: Any, **options: Any) -> list[Hop]:
        await trio.sleep(1.0)
        return await known(*place, **options)

    async with trio.open_nursery() as nursery:
        lived = Lived(swarm_of(nursery))
        await lived.step([3, 1, 4])
        survivor, lost = lived.machine(0), lived.machine(1)
        known = lived.swarm.route
        monkeypatch.setattr(lived.swarm, "route", route)
        lost.set("dead")
        await trio.sleep(0.1)

        async def meanwhile() -> None:
            await trio.sleep(0.5)
            survivor.set("dead")

        nursery.start_soon(meanwhile)
        began = trio.current_time()
        await lived.step([1])
        assert trio.current_time() - began < 5.0  # two looks, and nobody was waited for who had gone
        await lived.side.close()
        nursery.cancel_scope.cancel()


async def test_newcomers_that_once_did_not_reach_each_other_try_it_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    blamed: list[str] = []

    def mark_failed(peer_id: str, **options: Any) -> None:
        blamed.append(peer_id)

    async with trio.open_nursery() as nursery:
        lived = Lived(swarm_of(nursery))
        await lived.step([3, 1, 4])
        lost = [lived.machine(1), lived.machine(2)]
        one, other = (next(new for new in lived.swarm.machines if new.first == old.first and new is not old) for old in lost)
        assert lived.side.chain is not None
        lived.side.chain.exchange.cut.add((one.peer_id, other.peer_id))
        monkeypatch.setattr(lived.swarm, "mark_failed", mark_failed)
        for machine in lost:
            machine.set("dead")
        await trio.sleep(0.1)
        await lived.step([1])
        await lived.step([5, 9, 2])
        assert set(blamed) <= {machine.peer_id for machine in lost}
        await lived.side.close()
        nursery.cancel_scope.cancel()
