"""Servers are found through whoever is left."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import trio

from petalnet.errors import RecordRejected
from petalnet.p2p import discovery as module
from petalnet.p2p.discovery import Discovery
from petalnet.p2p.host import Host, Stream
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error, Find, Ping, Records, Store, Stored
from petalnet.p2p.protocols import RECORDS
from petalnet.p2p.record_store import Kept, RecordStore
from petalnet.p2p.replication import MAX_PER_NETWORK
from petalnet.p2p.signed import open_signed, sign
from petalnet.routing.records import SWARM_KEY, ServerRecord, discovery_key

KEY = discovery_key("some-model")


def record(
    host: Host, *, sequence: int = 1, state: str = "online", life: float = 60.0, issued: float | None = None, peer_id: str = ""
) -> bytes:
    issued = time.time() if issued is None else issued
    payload = ServerRecord(
        peer_id=peer_id or host.peer_id,
        addrs=tuple(addr.partition("/p2p/")[0] for addr in host.addrs),
        model="some-model",
        model_name="some model",
        span=(0, 4),
        num_blocks=8,
        state=state,
        dtype="float32",
        sequence=sequence,
        issued=issued,
        expires=issued + life,
    )
    return sign(host.identity, payload.encode())


def read(data: Sequence[bytes | Kept]) -> dict[str, tuple[int, str]]:
    found = {}
    for entry in data:
        signer, payload = open_signed(entry.data if isinstance(entry, Kept) else entry)
        value = ServerRecord.decode(payload)
        found[signer] = (value.sequence, value.state)
    return found


CLOCKS: dict[str, float] = {}


class Node:
    def __init__(self, host: Host, discovery: Discovery, stored: list[bytes]) -> None:
        self.host, self.discovery, self.stored = host, discovery, stored

    def set_clock(self, ahead: float) -> None:
        """What this node's clock shows beyond the true time."""
        CLOCKS[self.host.peer_id] = ahead

    async def found(self, key: bytes = KEY) -> dict[str, tuple[int, str]]:
        with trio.fail_after(2):
            return read(await self.discovery.find(key))


@pytest.fixture
def join(hosts, nursery):
    async def start(*through: Node | str, server: bool = True) -> Node:
        host = await hosts.start(listen=server)
        stored: list[bytes] = []
        clock = lambda: time.time() + CLOCKS.get(host.peer_id, 0.0)  # noqa: E731
        discovery = Discovery(host, server=server, on_record=stored.append, clock=clock)
        addrs = [addr for one in through for addr in ([one] if isinstance(one, str) else one.host.addrs)]
        await nursery.start(discovery.run, addrs)
        return Node(host, discovery, stored)

    return start


async def test_a_record_is_found_at_once_by_those_who_join_before_and_after(join) -> None:
    boot = await join()
    early = await join(boot)
    server = await join(boot)
    assert await server.discovery.announce([KEY, SWARM_KEY], record(server.host)) == 3
    late = await join(boot)
    client = await join(boot, server=False)
    for node in (boot, early, server, late, client):
        assert await node.found() == {server.host.peer_id: (1, "online")} == await node.found(SWARM_KEY)
        assert await node.found(discovery_key("other")) == {}
    assert read(early.stored) == {server.host.peer_id: (1, "online")}  # handed on to whoever runs the node


async def test_a_newer_record_replaces_the_older_one_everywhere(join) -> None:
    boot = await join()
    one, two = await join(boot), await join(boot)
    for server in (one, two):
        await server.discovery.announce([KEY], record(server.host))
    assert await boot.found() == {one.host.peer_id: (1, "online"), two.host.peer_id: (1, "online")}
    await one.discovery.announce([KEY], record(one.host, sequence=5, state="left"))
    await one.discovery.announce([KEY], record(one.host, sequence=4))  # late
    for node in (boot, one, two):
        assert await node.found() == {one.host.peer_id: (5, "left"), two.host.peer_id: (1, "online")}


async def test_the_swarm_outlives_its_bootstrap_node(join, hosts, until) -> None:
    boot = await join()
    one, two = await join(boot), await join(boot)
    await one.discovery.announce([KEY], record(one.host))
    await hosts.stop(boot.host)
    newcomer = await join(*[addr for addr in boot.host.addrs], two)
    assert await newcomer.found() == {one.host.peer_id: (1, "online")}
    assert await two.found() == {one.host.peer_id: (1, "online")}
    # Those who knew each other still do, and learn of the newcomer.
    await newcomer.discovery.announce([KEY], record(newcomer.host))
    for node in (one, two):
        assert set(await node.found()) == {one.host.peer_id, newcomer.host.peer_id}
    await one.discovery.announce([KEY], record(one.host, sequence=2))
    assert (await newcomer.found())[one.host.peer_id] == (2, "online")


async def test_a_server_that_dies_is_not_named_for_long_though_its_record_is_still_valid(join, hosts, until) -> None:
    boot = await join()
    server, client = await join(boot), await join(boot, server=False)
    await server.discovery.announce([KEY], record(server.host))
    assert set(await client.found()) == {server.host.peer_id}
    await hosts.stop(server.host)

    async def gone() -> bool:
        return await client.found() == {}

    await until(gone, within_s=2)


async def test_a_server_whose_connection_breaks_is_still_named(join) -> None:
    boot = await join()
    server = await join(boot)
    await server.discovery.announce([KEY], record(server.host))
    for _ in range(3):
        await boot.host.disconnect(server.host.peer_id)
        await trio.sleep(0.1)
        assert set(await boot.found()) == {server.host.peer_id}


async def test_a_record_expires_where_nobody_notices_that_its_server_is_gone(join, monkeypatch) -> None:
    boot = await join()
    server, client = await join(boot), await join(boot, server=False)
    await server.discovery.announce([KEY], record(server.host))
    assert set(await client.found()) == {server.host.peer_id}
    for node in (boot, server, client):
        node.set_clock(61)
    assert await client.found() == {}


@pytest.mark.parametrize("ahead", [-590.0, 590.0])
async def test_a_clock_that_is_ten_minutes_off_does_no_harm(join, ahead: float) -> None:
    boot = await join()
    server, client = await join(boot), await join(boot, server=False)
    for node in (boot, client):
        node.set_clock(ahead)
    assert await server.discovery.announce([KEY], record(server.host)) == 2
    assert set(await client.found()) == {server.host.peer_id}
    for node in (boot, client, server):
        node.set_clock(CLOCKS.get(node.host.peer_id, 0.0) + 61)
    assert await client.found() == {}


async def test_a_server_whose_clock_is_wrong_is_told_so_once(join, caplog) -> None:
    boot = await join()
    server = await join(boot)
    server.set_clock(3600)
    for sequence in (1, 2):
        data = record(server.host, sequence=sequence, issued=time.time() + 3600)
        assert await server.discovery.announce([KEY], data) == 1
    warnings = [entry.message for entry in caplog.records if entry.levelname == "WARNING" and "petalnet" in entry.name]
    assert len(warnings) == 1 and "in the future" in warnings[0]


async def test_a_server_whose_clock_was_ahead_is_told_the_number_to_go_on_from(join) -> None:
    boot = await join()
    server = await join(boot)
    assert await server.discovery.announce([KEY], record(server.host, sequence=900)) == 2
    again = await join(boot)  # as the same server after a restart: it has forgotten its numbers
    again.discovery._store = RecordStore(server.host.peer_id)
    server.discovery._store = RecordStore(server.host.peer_id)
    assert await server.discovery.announce([KEY], record(server.host, sequence=5)) < 3
    assert server.discovery.newest_own == 900
    assert await server.discovery.announce([KEY], record(server.host, sequence=901)) == 3


async def test_isolated_nodes_find_back(join, until, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAINTAIN_EVERY_S", 0.1)
    boot = await join()
    one = await join(boot)
    await boot.host.disconnect(one.host.peer_id)
    await until(lambda: one.host.is_connected(boot.host.peer_id) and boot.host.is_connected(one.host.peer_id))


async def test_neighbours_replace_those_that_are_gone(join, hosts, until, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAINTAIN_EVERY_S", 0.1)
    boot = await join()
    nodes = [await join(boot) for _ in range(4)]
    await hosts.stop(boot.host)
    for node in nodes:
        await until(lambda node=node: len(node.host.connected_peers()) >= 3)


async def test_joining_is_bounded_and_says_whether_it_worked(join, monkeypatch) -> None:
    monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 0.5)
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]  # takes connections and never says a word
    silent = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}/p2p/{Identity.generate().peer_id}"
    refuses = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
    with trio.fail_after(3):
        assert not (await join(silent, refuses)).discovery.joined
        boot = await join()
        assert boot.discovery.joined
        node = await join(silent, refuses, boot)
    assert node.discovery.joined
    await listener.aclose()


async def test_a_storer_that_is_silent_costs_one_deadline_once(join, hosts) -> None:
    boot = await join()
    server, client = await join(boot), await join(boot, server=False)
    await server.discovery.announce([KEY], record(server.host))
    silent = await hosts.start()

    async def never(stream: Stream) -> None:
        await trio.sleep_forever()

    silent.serve(RECORDS, never)
    await silent.connect(boot.host.peer_id, boot.host.addrs)
    await client.host.connect(silent.peer_id, silent.addrs)
    began = trio.current_time()
    assert set(await client.found()) == {server.host.peer_id}
    assert trio.current_time() - began > 0.9
    assert silent.peer_id not in client.discovery._table.peers()
    # Neither does it come back by connecting anew, nor by being named by others.
    await silent.disconnect(client.host.peer_id)
    await client.host.connect(silent.peer_id, silent.addrs)
    await client.discovery._table.refresh()
    await trio.sleep(0.1)
    assert silent.peer_id not in client.discovery._table.peers()
    began = trio.current_time()
    assert set(await client.found()) == {server.host.peer_id}
    assert trio.current_time() - began < 0.5


async def test_the_only_neighbour_is_asked_again_though_it_was_silent_once(join, hosts) -> None:
    keeper, slow = await hosts.start(), True

    async def serve(stream: Stream) -> None:
        while await stream.receive() is not None:
            if slow:
                await trio.sleep_forever()
            await stream.send(Records((record(keeper),), (0.0,), 1))

    keeper.serve(RECORDS, serve)
    client = await join(*keeper.addrs, server=False)
    assert await client.found() == {}
    slow = False
    assert await client.found() == {keeper.peer_id: (1, "online")}


async def test_who_claims_to_be_elsewhere_still_counts_for_the_network_it_is_in(join, hosts, monkeypatch) -> None:
    """Ids near to a key are cheap to make, so of one network only a few are keepers, whichever addresses they tell."""
    asked = set()
    client = await join(server=False)
    monkeypatch.setattr(client.host, "remote_ip", lambda peer_id: "8.8.4.4")

    for _ in range(2 * MAX_PER_NETWORK):
        keeper = await hosts.start()

        async def serve(stream: Stream, name: str = keeper.peer_id) -> None:
            while await stream.receive() is not None:
                asked.add(name)
                await stream.send(Records((), (), 0))

        keeper.serve(RECORDS, serve)
        await client.host.connect(keeper.peer_id, keeper.addrs)
    assert await client.found() == {}
    assert len(asked) == MAX_PER_NETWORK


async def test_a_server_that_comes_and_goes_is_checked_once_at_a_time(join, until, monkeypatch) -> None:
    boot = await join()
    server = await join(boot)
    await server.discovery.announce([KEY], record(server.host))
    under_way = 0

    async def take_long(*_: object, **__: object) -> None:
        nonlocal under_way
        under_way += 1
        await trio.sleep_forever()

    monkeypatch.setattr(boot.host, "connect", take_long)
    monkeypatch.setattr(boot.discovery, "_checks", trio.CapacityLimiter(1))
    boot.discovery._on_peer_lost(server.host.peer_id)
    await until(lambda: under_way == 1)
    nursery = boot.discovery._nursery
    before = len(nursery.child_tasks)
    for _ in range(50):
        boot.discovery._on_peer_lost(server.host.peer_id)
    assert len(nursery.child_tasks) == before + 1


async def test_strangers_store_only_what_is_their_own_and_true(join, hosts) -> None:
    boot = await join()
    mallory = await hosts.start()
    now = time.time()
    victim = Identity.generate()
    forged = sign(mallory.identity, open_signed(record(mallory, peer_id=victim.peer_id))[1])
    theirs = await join(boot)
    await theirs.discovery.announce([KEY], record(theirs.host))
    async with await mallory.open_stream(boot.host.peer_id, RECORDS, addrs=boot.host.addrs) as stream:

        async def ask(request):
            await stream.send(request)
            return await stream.receive()

        for bad in (
            Store((KEY,), b"rubbish"),
            Store((KEY,), forged),
            Store((KEY,), record(theirs.host, sequence=9)),
            Store((KEY,), record(mallory, issued=now - 700, life=50)),
            Store((KEY,), record(mallory, issued=now + 3600)),
            Store((KEY,), record(mallory, sequence=2**62)),
            Store((discovery_key("another-model"),), record(mallory)),
            Store((), record(mallory)),
            Store((b"short",), record(mallory)),
        ):
            answer = await ask(bad)
            assert isinstance(answer, Error) and answer.code in ("caller", "server"), bad
        assert await ask(Store((KEY, SWARM_KEY), record(mallory))) == Stored(newest=1, counts=(2, 1))
        answer = await ask(Find(KEY))
        assert isinstance(answer, Records)
        assert read(list(answer.records)) == {theirs.host.peer_id: (1, "online"), mallory.peer_id: (1, "online")}
        answer = await ask(Ping(1))
        assert isinstance(answer, Error) and answer.code == "unsupported"
    with pytest.raises(RecordRejected):
        await boot.discovery.announce([KEY], record(theirs.host))


async def test_a_storer_that_lies_is_not_believed_and_not_asked_again(join, hosts) -> None:
    liar = await hosts.start()
    forged = sign(liar.identity, open_signed(record(liar, peer_id=Identity.generate().peer_id))[1])
    elsewhere = sign(liar.identity, open_signed(record(liar))[1].replace(b"some-model", b"your-model"))
    long_past = record(liar, issued=time.time() - 700, life=50)
    requests = 0

    async def lie(stream: Stream) -> None:
        nonlocal requests
        while await stream.receive() is not None:
            requests += 1
            await stream.send(Records((elsewhere, long_past, record(liar), forged, record(liar, sequence=2))))

    liar.serve(RECORDS, lie)
    client = await join(*liar.addrs, server=False)
    assert await client.found() == {liar.peer_id: (1, "online")}
    assert await client.found() == {} and requests == 1


async def test_a_copy_does_not_bring_back_a_server_that_left(join, hosts) -> None:
    boot = await join()
    server = await join(boot)
    old = record(server.host)
    await server.discovery.announce([KEY], old)
    await server.discovery.announce([KEY], record(server.host, sequence=2, state="left", life=1500))
    replayer = await hosts.start()

    async def replay(stream: Stream) -> None:
        while await stream.receive() is not None:
            await stream.send(Records((old,), (0.0,), 1))

    replayer.serve(RECORDS, replay)
    newcomer = await join(boot, *replayer.addrs)
    assert await newcomer.found() == {server.host.peer_id: (2, "left")}


async def test_many_nodes_find_many_records(join, monkeypatch) -> None:
    """More nodes than replicas: records are where those who look for them ask."""
    monkeypatch.setattr(module, "REPLICAS", 5)
    monkeypatch.setattr(module, "LOOK_UP_FROM", 5)
    for deadline in ("QUERY_TIMEOUT_S", "LOOK_UP_TIMEOUT_S", "ROUND_TIMEOUT_S"):  # all nodes share one thread here
        monkeypatch.setattr(module, deadline, 10.0)
    boot = await join()
    nodes = [await join(boot) for _ in range(9)]
    for node in nodes:
        await node.discovery.announce([KEY], record(node.host))
    client = await join(nodes[3], server=False)
    expected = {node.host.peer_id for node in nodes}
    for node in (boot, nodes[0], nodes[8], client):
        assert set(read(await node.discovery.find(KEY))) == expected
