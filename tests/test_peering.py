"""What a membership takes in, over real hosts on loopback."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from petalnet import peering as peering_module
from petalnet.errors import AddressInUse
from petalnet.p2p.circuit import HOP
from petalnet.p2p.identity import Identity
from petalnet.p2p.signed import sign
from petalnet.peering import Peering, _keep_going, open_peering, read_record
from petalnet.routing.records import RecordForged, ServerRecord

LISTEN = ["/ip4/127.0.0.1/tcp/0"]


def record_of(identity: Identity, sequence: int = 1, issued: float | None = None) -> bytes:
    now = time.time() if issued is None else issued
    record = ServerRecord(
        peer_id=identity.peer_id, addrs=("/ip4/127.0.0.1/tcp/1",), model="m", model_name="m", span=(0, 4), num_blocks=4,
        state="online", dtype="float32", sequence=sequence, issued=now, expires=now + 60,
    )  # fmt: skip
    return sign(identity, record.encode())


def open_record(data: bytes) -> ServerRecord:
    return read_record(data, now=time.time())


async def open_one(stack: AsyncExitStack) -> Peering:
    return await stack.enter_async_context(open_peering(Identity.generate(), initial_peers=(), listen=LISTEN, server=True))


async def test_gossip_takes_only_a_servers_own_record() -> None:
    async with AsyncExitStack() as stack:
        peering = await open_one(stack)
        other, third = Identity.generate(), Identity.generate()
        with pytest.raises(RecordForged):
            peering._accept(third.peer_id, record_of(other))
        assert peering.view.record(other.peer_id) is None
        assert peering._accept(other.peer_id, record_of(other))
        assert peering.view.record(other.peer_id) is not None


async def test_gossip_passes_each_record_on_once_and_no_more_than_its_author_may_say() -> None:
    async with AsyncExitStack() as stack:
        peering = await open_one(stack)
        server, chatterer = Identity.generate(), Identity.generate()
        peering._take(record_of(server))  # it was stored or looked up here before it came by gossip: others have not heard it yet
        assert peering._accept(server.peer_id, record_of(server))
        assert not peering._accept(server.peer_id, record_of(server))
        assert peering._accept(server.peer_id, record_of(server, sequence=2))
        taken = [peering._accept(chatterer.peer_id, record_of(chatterer, sequence=number)) for number in range(1, 100)]
        assert 0 < sum(taken) < 20
        assert not peering._accept(server.peer_id, record_of(server, sequence=3, issued=time.time() - 3600)), "a replay, or a wrong clock"


async def test_a_server_goes_on_from_the_number_that_is_remembered_of_it() -> None:
    async with AsyncExitStack() as stack:
        keeper = await open_one(stack)
        identity = Identity.generate()
        now = time.time()
        for ahead in (500.0, 0.0):  # the second time with its clock put right
            async with open_peering(identity, initial_peers=keeper.host.addrs, listen=LISTEN, server=True) as server:
                sequence = int((now + ahead) * 1000)
                record = open_record(record_of(identity, sequence=sequence))
                assert await server.announce(record) == 2
        known = keeper.view.record(identity.peer_id)
        assert known is not None and known.sequence == int((now + 500) * 1000) + 1


async def test_a_lost_peer_is_avoided_until_it_is_back() -> None:
    async with AsyncExitStack() as stack:
        peering = await open_one(stack)
        other = Identity.generate()
        peering._accept(other.peer_id, record_of(other))
        peering._on_peer_lost(other.peer_id)
        assert peering.view.servers("m", now=time.time()) == []
        peering._on_peer_found(other.peer_id)
        assert [server.peer_id for server in peering.view.servers("m", now=time.time())] == [other.peer_id]


async def test_a_start_that_is_cancelled_ends_whenever_that_is() -> None:
    """As by a signal to a node that is not ready yet: at none of the moments of a start may anything stay behind and be waited for."""
    async with AsyncExitStack() as stack:
        entry = await open_one(stack)
        for moment in range(0, 120, 6):
            with trio.fail_after(5), trio.move_on_after(moment / 1000) as scope:
                async with open_peering(Identity.generate(), initial_peers=entry.host.addrs, listen=LISTEN, server=True):
                    await trio.sleep_forever()
            assert scope.cancelled_caught


@pytest.mark.parametrize(("server", "relay"), [(True, False), (True, True), (False, True), (False, False)])
async def test_who_stands_in_for_others_finds_out_whether_it_is_reached_itself(server: bool, relay: bool) -> None:
    async with open_peering(Identity.generate(), initial_peers=(), listen=LISTEN, server=server, relay=relay) as peering:
        assert (peering.reachability is not None) == (server or relay)
        assert (HOP in peering.host.libp2p.multiselect.handlers) == relay


async def test_a_service_that_fails_is_started_again(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    runs = 0

    async def service() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise KeyError("a defect")
        await trio.sleep_forever()

    with trio.move_on_after(60):
        await _keep_going("the service", service)
    assert runs == 3
    assert [entry.getMessage() for entry in caplog.records] == ["the service failed and is started again"] * 2


async def test_a_servers_view_forgets_what_is_long_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers look nobody up all the time, as clients and bootstrap nodes do: the dead have to go all the same, and doubt has to end."""
    monkeypatch.setattr(peering_module, "TIDY_EVERY_S", 0.02)
    async with AsyncExitStack() as stack:
        peering = await open_one(stack)
        gone, doubted, an_hour_ago = Identity.generate(), Identity.generate().peer_id, time.time() - 3600
        record = open_record(record_of(gone))
        assert peering.view.add(record.received(an_hour_ago), now=an_hour_ago)
        peering.view.mark_failed(doubted, now=an_hour_ago)
        with trio.fail_after(5):
            while len(peering.view) or peering.view.on_probation(doubted):  # noqa: ASYNC110  (there is no sign of it)
                await trio.sleep(0.01)


async def test_who_is_told_of_a_peer_does_not_keep_others_from_it() -> None:
    async with AsyncExitStack() as stack:
        one, other = await open_one(stack), await open_one(stack)
        heard: list[str] = []

        def fail(peer_id: str) -> None:
            raise KeyError(peer_id)

        one.host.on_peer_found(fail)
        one.host.on_peer_found(heard.append)
        await one.host.connect(other.host.peer_id, other.host.addrs)
        assert heard == [other.host.peer_id]


async def test_where_the_usual_port_is_taken_the_next_free_one_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "petalnet")
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(peering_module, "DEFAULT_PORT", port)
        async with open_peering(Identity.generate(), initial_peers=(), listen=None, server=True) as peering:
            (used,) = {addr.split("/")[4] for addr in peering.host.plain_addrs}
            assert used != str(port) and f"port {port} is taken; listening on {used}" in caplog.text
        monkeypatch.setattr(peering_module, "PORTS_TRIED", 1)
        with pytest.RaisesGroup(pytest.RaisesExc(AddressInUse, match="are all taken: say --host-maddrs"), allow_unwrapped=True):
            async with open_peering(Identity.generate(), initial_peers=(), listen=None, server=True):
                pass


async def test_an_announcement_that_was_overtaken_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keepers know of then is this server's own newer one, not that of an earlier life."""
    async with AsyncExitStack() as stack:
        peering = await open_one(stack)
        identity, overtaken = peering.host.identity, trio.Event()
        told: list[int] = []

        async def announce(keys: Sequence[bytes], data: bytes) -> int:
            sequence = open_record(data).sequence
            told.append(sequence)
            if sequence == early.sequence:
                await overtaken.wait()
            peering.discovery.newest_own = max(told)
            peering.discovery.crowds = dict.fromkeys(keys, 1)
            return 2

        monkeypatch.setattr(peering.discovery, "announce", announce)
        now = int(time.time() * 1000)
        early, late = (open_record(record_of(identity, sequence=now + number)) for number in (0, 100))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peering.announce, early)
            await trio.testing.wait_all_tasks_blocked()
            await peering.announce(late)
            overtaken.set()
        assert told == [early.sequence, late.sequence]
