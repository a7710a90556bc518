"""Micro-batches over servers that compute one request after another, in virtual time; and into how many a pass is cut."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from petalnet.client import pass_requests, passes, spreading
from petalnet.client.inputs import Inputs
from petalnet.client.kept_graphs import KeptGraphs
from petalnet.client.lora_uploads import LoraUploads
from petalnet.client.micro_batches import Worker, best_count
from petalnet.client.passes import Wanted
from petalnet.client.requests import Target
from petalnet.client.settings import ClientSettings
from petalnet.client.streams import IdleStreams
from petalnet.client.under_way import UnderWay
from petalnet.errors import GraphGone, PeerLost
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.messages import Error
from petalnet.p2p.pass_messages import Backward, BackwardDone, DropGraphs, Forward, ForwardDone
from petalnet.routing.expected import Client
from petalnet.routing.records import ServerRecord
from petalnet.routing.routes import Hop, find_route

LENGTH = 64
TOKEN_S = 0.0005
"""Seconds a token and block in a forward pass, and ten times that for a block whatever is in it."""
BLOCKS = 8


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Server:
    """Computes one request after another; adds one for each block to every byte. A gradient that went back through a block has one more.

    Attributes:
        kept: numbers of the graphs that it keeps, and what entered.
        computed: (what, rows) in order.
    """

    def __init__(self, peer_id: str, first: int, end: int, *, slowness: float = 1.0, keeps: bool = True) -> None:
        self.peer_id, self.first, self.end, self.slowness, self.keeps = peer_id, first, end, slowness, keeps
        self.kept: dict[int, Blob] = {}
        self.computed: list[tuple[str, int]] = []
        self.alive = True
        self.dies_after = math.inf
        self._turn = trio.Lock()

    @property
    def record(self) -> ServerRecord:
        now, blocks = time.time(), self.end - self.first
        return ServerRecord(
            peer_id=self.peer_id, addrs=("/ip4/10.0.0.1/tcp/1",), model="m", model_name="m", span=(self.first, self.end), num_blocks=BLOCKS,
            state="online", dtype="float32", sequence=1, issued=now, expires=now + 90, decode_tokens_s=1 / (10 * TOKEN_S * blocks),
            prefill_tokens_s=1 / (TOKEN_S * blocks), forward_tokens_s=1 / (TOKEN_S * blocks),
        )  # fmt: skip

    async def answer(self, request: Forward | Backward) -> Message:
        if not self.alive:
            raise PeerLost("it is gone", self.peer_id)
        await trio.sleep(0.0005)
        given = request.hidden if isinstance(request, Forward) else request.grad_output
        weight = 1.0
        if isinstance(request, Backward):
            if request.hidden is None and request.graph not in self.kept:
                return Error.of(GraphGone("it is not kept"))
            weight = 3.0 if request.hidden is not None else 2.0
            self.kept.pop(request.graph, None)
        rows, length, _ = given.shape
        blocks = request.end - request.first
        async with self._turn:
            await trio.sleep(weight * self.slowness * TOKEN_S * blocks * (rows * length + 10))
        if len(self.computed) >= self.dies_after or not self.alive:
            self.alive = False
            raise PeerLost("it is gone", self.peer_id)
        self.computed.append((request.name, rows))
        moved = replace(given, data=bytes((byte + blocks) % 256 for byte in bytes(given.data)))
        if isinstance(request, Backward):
            return BackwardDone(grad_hidden=moved)
        if self.keeps and request.graph:
            self.kept[request.graph] = given
        return ForwardDone(moved, kept=self.keeps and bool(request.graph))


class FakeStream:
    def __init__(self, server: Server) -> None:
        self.server, self.peer_id = server, server.peer_id

    async def send(self, request: Message) -> None:
        if isinstance(request, DropGraphs):
            for number in request.graphs:
                self.server.kept.pop(number, None)
        else:
            self.request: Any = request

    async def receive(self) -> Message:
        return await self.server.answer(self.request)

    async def reset(self) -> None:
        pass

    close = reset


class Membership:
    """Real routes over the servers that have not failed."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = {server.peer_id: server for server in servers}
        self.failed: set[str] = set()
        self.idle_streams = IdleStreams()
        self.kept_graphs = KeptGraphs(self.tell)
        self.lora_uploads = LoraUploads()
        self.under_way = UnderWay()
        self.view = SimpleNamespace(servers=self.records)
        self.host = SimpleNamespace(
            ping=self.ping, round_trip_s=lambda peer_id: 0.001, bytes_s=lambda peer_id: None, is_connected=lambda peer_id: True
        )
        self.random = Random(1)

    def records(self, model: str, *, blocked: frozenset[str] = frozenset(), **_: Any) -> list[ServerRecord]:
        return [server.record for server in self.servers.values() if server.peer_id not in blocked | self.failed]

    def outlook(self, records: Any) -> Client:
        return Client(round_trip=lambda peer_id: 0.001, under_way=self.under_way.work)

    async def joined(self) -> None:
        pass

    async def tell(self, peer_id: str, message: DropGraphs) -> None:
        await FakeStream(self.servers[peer_id]).send(message)

    async def ping(self, peer_id: str, timeout_s: float) -> float:
        return 0.001

    async def route(self, model: str, first: int, end: int, *, blocked: frozenset[str], tokens: int, **_: Any) -> list[Hop]:
        records = self.records(model, blocked=blocked)
        rng = None if self.under_way.work else self.random
        return find_route(records, first, end, self.outlook(records), now=time.time(), work="forward", tokens=tokens, rng=rng)

    def mark_failed(self, peer_id: str, wrong: bool = False) -> None:
        assert not wrong
        self.failed.add(peer_id)

    def mark_ok(self, peer_id: str) -> None:
        pass

    def observe(self, peer_id: str, **_: Any) -> None:
        pass


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*servers: Server) -> Target:
        membership = Membership(list(servers))

        async def open_stream(target: Target, hop: Hop, protocol: Any) -> FakeStream:
            return FakeStream(membership.servers[hop.peer_id])

        monkeypatch.setattr(pass_requests, "open_stream", open_stream)
        together = SimpleNamespace(membership=membership, portal=SimpleNamespace(call_soon=lambda function, *given: function(*given)))
        return Target(swarm=together, model="m", first=0, end=BLOCKS, settings=ClientSettings())  # type: ignore[arg-type]

    return make


def hidden(rows: int) -> Blob:
    return Blob("float32", (rows, LENGTH, 1), "raw", bytes(range(rows)) * 4 * LENGTH)


async def step(target: Target, rows: int = 8) -> float:
    """A forward and a backward pass; virtual seconds that they took."""
    given, began = hidden(rows), trio.current_time()
    passed = await passes.forward(target, given, Inputs(), for_gradients=True)
    output = b"".join(bytes(path.outputs[-1].data) for path in passed.paths)
    assert output == bytes((byte + BLOCKS) % 256 for byte in bytes(given.data)), "in order, and each block once"
    gradients = await passes.backward(target, passed, given, Wanted())
    answered = b"".join(bytes(own.hidden.data) for own in gradients if own.hidden is not None)
    assert answered == output
    assert not target.swarm.membership.under_way.work
    return trio.current_time() - began


async def test_a_single_server_gets_all_at_once(swarm: Any, autojump_clock: MockClock) -> None:
    server = Server("a", 0, BLOCKS)
    await step(swarm(server))
    assert server.computed == [("forward", 8), ("backward", 8)] and not server.kept


async def test_two_servers_with_the_same_blocks(swarm: Any, autojump_clock: MockClock) -> None:
    alone = await step(swarm(Server("a", 0, BLOCKS)))
    for rows in (8, 4, 6):
        both = [Server("a", 0, BLOCKS), Server("b", 0, BLOCKS)]
        together = await step(swarm(*both), rows)
        assert alone * rows / 8 > 1.8 * together
        assert sum(count for _, count in both[0].computed) == rows


async def test_a_slower_one_gets_less(swarm: Any, autojump_clock: MockClock) -> None:
    alone = await step(swarm(Server("a", 0, BLOCKS)), 12)
    quick, slow = Server("a", 0, BLOCKS), Server("b", 0, BLOCKS, slowness=2.0)
    slow_record = slow.record
    membership = (target := swarm(quick, slow)).swarm.membership
    rates = {name: getattr(slow_record, name) / 2 for name in ("decode_tokens_s", "prefill_tokens_s", "forward_tokens_s")}
    membership.records = lambda model, **_: [quick.record, replace(slow_record, **rates)]
    membership.view.servers = membership.records
    together = await step(target, 12)
    assert alone > 1.2 * together
    assert quick.computed and slow.computed


async def test_stages_work_at_the_same_time(swarm: Any, autojump_clock: MockClock) -> None:
    alone = await step(swarm(Server("a", 0, BLOCKS)))
    chain = await step(swarm(Server("a", 0, 4), Server("b", 4, BLOCKS)))
    assert alone > 1.25 * chain
    helped = await step(swarm(Server("a", 0, BLOCKS), Server("b", 0, 4)))
    assert alone > 1.02 * helped
    wide = await step(swarm(Server("a", 0, 4), Server("b", 4, BLOCKS), Server("c", 0, 4), Server("d", 4, BLOCKS)))
    assert alone > 2 * wide


async def test_graphs_that_are_not_kept_are_computed_once_more(swarm: Any, autojump_clock: MockClock) -> None:
    forgetful = Server("a", 0, BLOCKS, keeps=False)
    assert await step(swarm(forgetful)) > 1.2 * await step(swarm(Server("a", 0, BLOCKS)))
    target = swarm(server := Server("a", 0, BLOCKS))
    passed = await passes.forward(target, hidden(2), Inputs(), for_gradients=True)
    server.kept.clear()
    (gradients,) = await passes.backward(target, passed, hidden(2), Wanted())
    assert gradients.hidden is not None and server.computed == [("forward", 2), ("backward", 2)]


@pytest.fixture
def seeds() -> Iterator[int]:
    return iter(range(12))


async def test_servers_that_die_at_any_moment(swarm: Any, autojump_clock: MockClock, seeds: Iterator[int]) -> None:
    for seed in seeds:
        chance = Random(seed)
        spans = [(0, 4), (4, 8), (0, 8), (0, 3), (3, 8)]
        servers = [Server(f"{'abcde'[place]}{number}", *span) for place, span in enumerate(spans) for number in (1, 2)]
        for server in chance.sample(servers, 5):
            if sum(other.dies_after == math.inf for other in servers if (other.first, other.end) == (server.first, server.end)) > 1:
                server.dies_after = chance.randrange(3)
        target = swarm(*servers)
        for _ in range(2):
            await step(target, rows=chance.randrange(1, 9))


async def test_what_nobody_needs_is_given_up(swarm: Any, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    server = Server("a", 0, BLOCKS)
    target = swarm(server)
    nursery.start_soon(target.swarm.membership.kept_graphs.run)
    passed = await passes.forward(target, hidden(1), Inputs(), for_gradients=True)
    assert len(server.kept) == 1
    del passed
    await trio.sleep(1.5)
    assert not server.kept


async def test_the_first_error_ends_all(swarm: Any, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    target = swarm(Server("a", 0, BLOCKS), Server("b", 0, BLOCKS))

    async def answer(self: Server, request: Message) -> Message:
        if self.peer_id == "a":
            return Error("caller", "no good")
        return await trio.sleep_forever()

    monkeypatch.setattr(Server, "answer", answer)
    with pytest.raises(ValueError, match="no good"):
        await passes.forward(target, hidden(8), Inputs())
    under_way = target.swarm.membership.under_way
    assert not under_way.work and not under_way.choosing(target.model, target.first, target.end).locked()


def workers(*spans: tuple[int, int], fixed_s: float = 0.01, token_s: float = 0.001, way_s: float = 0.002) -> list[Worker]:
    return [Worker(*span, way_s, fixed_s, token_s) for span in spans]


@pytest.mark.parametrize(
    ("rows", "spans", "expected"),
    [
        (8, [(0, 8)], [1]),
        (1, [(0, 8), (0, 8)], [1]),
        (8, [(0, 8), (0, 8)], [2]),
        (4, [(0, 8), (0, 8)], [2]),
        (9, [(0, 8)] * 3, [3]),
        (8, [(0, 4), (4, 8)], range(3, 9)),
        (8, [(0, 4), (0, 8)], range(2, 5)),
    ],
)
def test_how_many(rows: int, spans: list[tuple[int, int]], expected: Any) -> None:
    assert best_count(rows, 64, workers(*spans), first=0, end=8) in expected


def test_what_costs_more_than_it_gains_is_not_cut() -> None:
    pair = [(0, 8), (0, 8)]
    assert best_count(8, 4, workers(*pair, fixed_s=1.0, token_s=0.001), first=0, end=8) == 1
    assert best_count(8, 4, workers((0, 4), (4, 8), way_s=10.0), first=0, end=8) == 1
    assert best_count(8, 4, [], first=0, end=8, least=3) == 3
    assert best_count(8, 64, workers((0, 4)), first=0, end=8, least=2) == 2
    assert spreading.best_count is best_count


async def test_who_looks_for_missing_blocks_keeps_nobody_else_waiting(autojump_clock: MockClock) -> None:
    under_way, began = UnderWay(), trio.current_time()
    async with trio.open_nursery() as nursery:

        async def choose(first: int, end: int) -> None:
            async with under_way.choosing("m", first, end):
                await trio.sleep(5)

        nursery.start_soon(choose, 4, 8)
        nursery.start_soon(choose, 0, 4)
    assert trio.current_time() - began == 5
    async with trio.open_nursery() as nursery:
        nursery.start_soon(choose, 0, 8)
        nursery.start_soon(choose, 0, 8)
    assert trio.current_time() - began == 15  # for the same blocks one after another
