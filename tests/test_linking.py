"""Whom a server opens links to: servers that their own records speak of, and nobody else."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from petalnet import linking
from petalnet.errors import PeerUnreachable
from petalnet.linking import Linking
from petalnet.p2p.host import Host, Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Ping
from petalnet.p2p.protocols import PUSH
from petalnet.routing.records import ServerRecord
from petalnet.routing.swarm import SwarmView

LISTEN = ["/ip4/127.0.0.1/tcp/0"]


class Swarm:
    """What a `Linking` needs of a membership. `hidden`: what only a look-up finds."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.view = SwarmView(host.peer_id)
        self.hidden: list[ServerRecord] = []
        self.look_ups = 0

    def knows(self, record: ServerRecord) -> None:
        self.view.add(record, now=time.time())

    async def look_up(self, model: str | None = None) -> None:
        self.look_ups += 1
        for record in self.hidden:
            self.knows(record)


class Others:
    """Other servers, that count the links to them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.heard: list[str] = []

    async def record(self, span: tuple[int, int] = (4, 8), state: str = "online", model: str = "m") -> ServerRecord:
        host = await self._stack.enter_async_context(open_host(Identity.generate(), listen=LISTEN))

        async def serve(stream: Stream) -> None:
            await stream.receive()
            self.heard.append(host.peer_id)

        host.serve(PUSH, serve)
        return record_of(host.peer_id, tuple(host.plain_addrs), span, state, model)


def record_of(
    peer_id: str, addrs: tuple[str, ...], span: tuple[int, int] = (4, 8), state: str = "online", model: str = "m"
) -> ServerRecord:
    now = time.time()
    return ServerRecord(
        peer_id=peer_id, addrs=addrs, model=model, model_name="m", span=span, num_blocks=12,
        state=state, dtype="float32", sequence=1, issued=now, expires=now + 60,
    )  # fmt: skip


@asynccontextmanager
async def surroundings() -> AsyncIterator[tuple[Swarm, Others]]:
    async with AsyncExitStack() as stack:
        yield Swarm(await stack.enter_async_context(open_host(Identity.generate(), listen=[]))), Others(stack)


async def eventually(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while True:
            if condition():
                return
            await trio.sleep(0.01)


async def test_a_link_goes_to_a_server_that_is_known() -> None:
    async with surroundings() as (swarm, others):
        known, sought = await others.record(), await others.record(state="draining")
        left, other = await others.record(state="left"), await others.record(model="n")
        for record in (known, left, other):
            swarm.knows(record)
        swarm.hidden = [sought]
        links = Linking(swarm, "m", 4)  # type: ignore[arg-type]
        for record, look_ups in ((known, 0), (sought, 1)):
            async with await links.open(record.peer_id) as stream:
                await stream.send(Ping(1))
                with trio.fail_after(10):
                    assert await stream.receive() is None
            assert swarm.look_ups == look_ups
        for peer_id in (left.peer_id, other.peer_id, "nobody", Identity.generate().peer_id):
            with pytest.raises(PeerUnreachable, match="of this model is known"):
                await links.open(peer_id)
        assert swarm.look_ups == 1, "names that clients make up cost the swarm nothing"
        assert others.heard == [known.peer_id, sought.peer_id]


async def test_who_holds_the_next_block_is_connected_ahead_of_need(monkeypatch: pytest.MonkeyPatch) -> None:
    async with surroundings() as (swarm, others):
        monkeypatch.setattr(linking, "REFRESH_EVERY_S", 0.02)
        follows, overlaps = await others.record((4, 8)), await others.record((2, 6))
        before, draining = await others.record((0, 4)), await others.record((4, 8), "draining")
        gone = record_of(Identity.generate().peer_id, ("/ip4/127.0.0.1/tcp/1",))
        for record in (follows, before, draining, gone):
            swarm.knows(record)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Linking(swarm, "m", 4).keep_warm)  # type: ignore[arg-type]
            await eventually(lambda: swarm.host.is_connected(follows.peer_id))
            swarm.knows(overlaps)  # one that comes later
            await eventually(lambda: swarm.host.is_connected(overlaps.peer_id))
            await eventually(lambda: swarm.host.round_trip_s(follows.peer_id) is not None)
            nursery.cancel_scope.cancel()
        assert set(swarm.host.connected_peers()) == {follows.peer_id, overlaps.peer_id}


async def test_no_more_are_connected_than_a_record_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async with surroundings() as (swarm, others):
        monkeypatch.setattr(linking, "REFRESH_EVERY_S", 0.02)
        monkeypatch.setattr(linking, "MAX_WARM", 2)
        for _ in range(4):
            swarm.knows(await others.record())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Linking(swarm, "m", 4).keep_warm)  # type: ignore[arg-type]
            await eventually(lambda: len(swarm.host.connected_peers()) >= 2)
            await trio.sleep(0.1)  # in which more would be, were they allowed to
            nursery.cancel_scope.cancel()
        assert len(swarm.host.connected_peers()) == 2


async def test_who_was_not_reached_a_moment_ago_is_not_dialled_again_for_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async with surroundings() as (swarm, others):
        record = await others.record()
        swarm.knows(record_of(record.peer_id, ("/ip4/127.0.0.1/tcp/1",)))
        links = Linking(swarm, "m", 4)  # type: ignore[arg-type]  # all that it needs
        with pytest.raises(PeerUnreachable):
            await links.open(record.peer_id)

        async def dial(*args: object, **options: object) -> Stream:
            raise AssertionError("it was dialled")

        with monkeypatch.context() as patched, pytest.raises(PeerUnreachable, match="a moment ago"):
            patched.setattr(swarm.host, "open_stream", dial)
            await links.open(record.peer_id)
        await swarm.host.connect(record.peer_id, record.addrs)  # it has come back, or has dialled itself
        await (await links.open(record.peer_id)).close()
