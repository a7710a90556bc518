"""Passes without a session go on elsewhere when a server fails, each class of error as it should be, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from trio.testing import MockClock

from petalnet.client import pass_requests, passes
from petalnet.client.inputs import Inputs
from petalnet.client.kept_graphs import KeptGraphs
from petalnet.client.lora import Adapted, Pair, fold
from petalnet.client.lora_uploads import LoraUploads
from petalnet.client.micro_batches import MicroBatch
from petalnet.client.passes import Part, Passed, Path, Wanted
from petalnet.client.requests import Target
from petalnet.client.settings import ClientSettings
from petalnet.client.streams import IdleStreams
from petalnet.client.under_way import UnderWay
from petalnet.errors import CallerError, MissingBlocksError, PeerLost, PeerUnreachable, PetalnetError
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.messages import Error
from petalnet.p2p.pass_messages import Backward, BackwardDone, Forward, ForwardDone, LoraPut, PutLora
from petalnet.routing.routes import Hop

Answer = Callable[["Server", Forward | Backward], Awaitable[Message]]


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def works(server: Server, request: Forward | Backward) -> Message:
    """Adds one for each block to every byte, so that what comes out tells which blocks it went through."""
    data = bytes((byte + request.end - request.first) % 256 for byte in bytes(request.hidden.data))
    output = Blob(request.hidden.dtype, request.hidden.shape, "raw", data)
    return ForwardDone(output) if isinstance(request, Forward) else BackwardDone(grad_hidden=request.grad_output)


async def hangs(server: Server, request: Forward | Backward) -> Message:
    server.answers_pings = False
    return await trio.sleep_forever()


async def takes_a_minute(server: Server, request: Forward | Backward) -> Message:
    await trio.sleep(60)
    return await works(server, request)


async def hangs_for_a_minute(server: Server, request: Forward | Backward) -> Message:
    server.answers_pings = False
    answer = await takes_a_minute(server, request)
    server.answers_pings = True
    return answer


def answers(code: str) -> Answer:
    async def answer(server: Server, request: Forward | Backward) -> Message:
        return Error(code, "as it was told to")

    return answer


async def dies(server: Server, request: Forward | Backward) -> Message:
    raise PeerLost("the stream broke", server.peer_id)


async def keeps(server: Server, request: Forward | Backward) -> Message:
    """Works; a gradient comes back as it is, from a kept graph only."""
    if isinstance(request, Forward):
        done = await works(server, request)
        assert isinstance(done, ForwardDone)
        server.graphs.add(request.graph)
        return replace(done, kept=True)
    if request.hidden is None and request.graph not in server.graphs:
        return Error("graph_gone", "it is not here")
    server.graphs.discard(request.graph)
    return BackwardDone(grad_hidden=request.grad_output)


async def is_busy_at_first(server: Server, request: Forward | Backward) -> Message:
    server.times -= isinstance(request, Backward)
    return Error("busy", "later") if isinstance(request, Backward) and server.times >= 0 else await keeps(server, request)


async def answers_garbage(server: Server, request: Forward | Backward) -> Message:
    return ForwardDone(Blob("float32", (1, 1, 1), "raw", bytes(4)))


class Server:
    """One server; `answer` is what it does with a request, once `times` are over it works."""

    def __init__(self, peer_id: str, first: int, end: int, answer: Answer = works, times: int = 10**9) -> None:
        self.peer_id, self.first, self.end, self.answer, self.times = peer_id, first, end, answer, times
        self.answers_pings = True
        self.asked = 0
        self.graphs: set[int] = set()
        self.loras: list[str] = []


class FakeStream:
    def __init__(self, server: Server) -> None:
        self.server, self.peer_id = server, server.peer_id
        self.requests: list[Message] = []

    async def send(self, request: Message) -> None:
        self.requests.append(request)

    async def receive(self) -> Message:
        self.request: Any = self.requests.pop(0)
        if isinstance(self.request, PutLora):
            self.server.loras.append(self.request.version)
            return LoraPut(self.request.version)
        self.server.asked += 1
        if self.server.asked > self.server.times:
            return await works(self.server, self.request)
        return await self.server.answer(self.server, self.request)

    async def answer_all(self) -> Message:
        """As `receive`, of a server that never changes its ways."""
        return await self.server.answer(self.server, self.requests.pop(0))  # type: ignore[arg-type]

    async def reset(self) -> None:
        pass

    close = reset


class Membership:
    """Routes over servers in their order, without those that failed and with late ones last."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.marks: list[tuple[str, str]] = []
        self.worked: list[str] = []
        self.adapters: list[str | None] = []
        self.failed: set[str] = set()
        self.late: set[str] = set()
        self.idle_streams = IdleStreams()
        self.kept_graphs = KeptGraphs(self.tell)
        self.lora_uploads = LoraUploads()
        self.under_way = UnderWay()
        self.host = SimpleNamespace(ping=self.ping, round_trip_s=lambda peer_id: 0.01, bytes_s=lambda peer_id: None)

    async def tell(self, peer_id: str, message: Message) -> None:
        raise AssertionError("nothing is kept")

    async def ping(self, peer_id: str, timeout_s: float) -> float:
        if next(server for server in self.servers if server.peer_id == peer_id).answers_pings:
            return 0.01
        await trio.sleep(timeout_s)
        raise PeerUnreachable("no answer", peer_id)

    async def route(self, model: str, first: int, end: int, *, blocked: frozenset[str], adapter: str | None, **_: Any) -> list[Hop]:
        hops: list[Hop] = []
        self.adapters.append(adapter)
        label = "" if adapter is None else f"{adapter.split('@')[0]}@1"
        usable = [server for server in self.servers if server.peer_id not in blocked | self.failed]
        while first < end:
            fit = [server for server in usable if server.first <= first < server.end]
            if not fit:
                raise MissingBlocksError([first])
            server = min(fit, key=lambda server: server.peer_id in self.late)
            hops.append(Hop(server.peer_id, (), first, min(server.end, end), adapter=label))
            first = hops[-1].end
        return hops

    def mark_failed(self, peer_id: str, wrong: bool = False) -> None:
        self.marks.append(("wrong" if wrong else "lost", peer_id))
        self.failed.add(peer_id)

    def mark_late(self, peer_id: str) -> None:
        self.marks.append(("late", peer_id))
        self.late.add(peer_id)

    def mark_ok(self, peer_id: str) -> None:
        self.worked.append(peer_id)

    def observe(self, peer_id: str, **_: Any) -> None:
        pass


def swarm(monkeypatch: pytest.MonkeyPatch, *servers: Server, **settings: Any) -> tuple[Target, Membership]:
    membership = Membership(list(servers))

    async def open_stream(target: Target, hop: Hop, protocol: Any) -> FakeStream:
        return FakeStream(next(server for server in servers if server.peer_id == hop.peer_id))

    monkeypatch.setattr(pass_requests, "open_stream", open_stream)
    swarm = SimpleNamespace(membership=membership, portal=SimpleNamespace(call_soon=lambda function, *given: function(*given)))
    target = Target(swarm=swarm, model="m", first=0, end=8, settings=ClientSettings(**settings))  # type: ignore[arg-type]
    return target, membership


HIDDEN = Blob("float32", (1, 2, 1), "raw", bytes(8))


async def forward(target: Target) -> list[str]:
    """The servers that did it, in order; what came out has gone through all blocks, once."""
    (path,) = (await passes.forward(target, HIDDEN, Inputs())).paths
    assert bytes(path.outputs[-1].data) == bytes([target.end - target.first]) * 8
    return [part.hop.peer_id for part in path.parts]


async def test_a_server_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    target, membership = swarm(monkeypatch, Server("a", 0, 4), Server("b", 4, 8, hangs), Server("c", 4, 8))
    began = trio.current_time()
    assert await forward(target) == ["a", "c"]
    assert trio.current_time() - began < 10 and membership.marks == [("late", "b")] and membership.worked == ["a", "c"]
    target, membership = swarm(monkeypatch, Server("b", 0, 8, hangs), Server("c", 0, 8))
    passed = Passed([Path(MicroBatch(0, 1, HIDDEN, Inputs()), [Part(Hop("b", (), 0, 8), HIDDEN)], [])], membership.kept_graphs)
    (gradients,) = await passes.backward(target, passed, HIDDEN, Wanted())
    assert gradients.hidden == HIDDEN and membership.marks == [("late", "b")]


async def test_a_server_that_computes_is_waited_for(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    target, membership = swarm(monkeypatch, Server("a", 0, 8, takes_a_minute), Server("b", 0, 8))
    assert await forward(target) == ["a"] and trio.current_time() >= 60 and not membership.marks


async def test_a_server_that_hangs_and_is_the_only_one_is_waited_for(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    target, membership = swarm(monkeypatch, Server("a", 0, 4), Server("b", 4, 8, hangs_for_a_minute))
    assert await forward(target) == ["a", "b"] and not membership.marks
    target, membership = swarm(monkeypatch, Server("a", 0, 8, hangs), request_timeout=30, max_retries=0)
    with pytest.raises(PeerLost, match="no answer within 30 s"):
        await forward(target)
    assert membership.marks == [("lost", "a")], "the user's bound is over"


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        (dies, [("lost", "b")]),
        (answers("server"), [("wrong", "b")]),
        (answers("unheard of"), [("wrong", "b")]),
        (answers("graph_gone"), [("wrong", "b")]),
        (answers("lora_gone"), [("wrong", "b")]),
        (answers_garbage, [("wrong", "b")]),
        (answers("busy"), []),
        (answers("moved"), []),
        (answers("too_large"), []),
    ],
)
async def test_a_failed_hop_is_run_elsewhere(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, answer: Answer, marks: list[tuple[str, str]]
) -> None:
    first = Server("a", 0, 4)
    target, membership = swarm(monkeypatch, first, Server("b", 4, 8, answer), Server("c", 4, 6), Server("d", 6, 8))
    assert await forward(target) == ["a", "c", "d"]
    assert membership.marks == marks and first.asked == 1, "what was done is not done again"
    assert trio.current_time() == 0


async def test_the_callers_fault_is_raised_at_once(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    second = Server("b", 0, 8)
    target, membership = swarm(monkeypatch, Server("a", 0, 8, answers("caller")), second)
    with pytest.raises(CallerError, match="as it was told to"):
        await forward(target)
    assert not membership.marks and not second.asked and trio.current_time() == 0


async def test_full_servers_are_waited_for(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    target, membership = swarm(monkeypatch, Server("a", 0, 8, answers("busy"), times=3))
    assert await forward(target) == ["a"] and not membership.marks and trio.current_time() > 0


async def test_where_all_fail_each_answer_is_told(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    target, _ = swarm(monkeypatch, Server("a", 0, 4), Server("b-server", 4, 8, dies), Server("c-server", 4, 8, answers("server")))
    with pytest.raises(PetalnetError) as caught:
        await forward(target)
    assert isinstance(caught.value, MissingBlocksError) and caught.value.blocks == [4]
    assert caught.value.answers == {"b-server": "the stream broke", "c-server": "failed: as it was told to"}


async def test_a_full_server_keeps_its_graph(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    server = Server("a", 0, 8, is_busy_at_first, times=2)
    target, _ = swarm(monkeypatch, server)
    monkeypatch.setattr(FakeStream, "receive", FakeStream.answer_all)
    passed = await passes.forward(target, HIDDEN, Inputs(), for_gradients=True)
    (gradients,) = await passes.backward(target, passed, HIDDEN, Wanted())
    assert gradients.hidden == HIDDEN and trio.current_time() > 0 and not passed.graphs and not server.graphs


async def test_a_client_that_has_joined_anew_has_no_graphs(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    server = Server("a", 0, 8, keeps)
    target, membership = swarm(monkeypatch, server)
    passed = await passes.forward(target, HIDDEN, Inputs(), for_gradients=True)
    server.graphs.clear()  # they were another peer's
    membership.kept_graphs = KeptGraphs(membership.tell)
    (gradients,) = await passes.backward(target, passed, HIDDEN, Wanted())
    assert gradients.hidden == HIDDEN and server.asked == 2


async def test_lora_parameters_are_brought_once_and_once_more(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    adapted = [Adapted(block, "linear", (Pair(torch.ones(1, 2), torch.ones(3, 1), 2.0),)) for block in range(4)]
    lora, _ = fold(adapted, "m", 0, 8)
    first, second = Server("a", 0, 4), Server("b", 4, 8)
    target, membership = swarm(monkeypatch, first, second)
    for _ in range(2):
        await passes.forward(target, HIDDEN, Inputs(lora=lora))
    assert first.loras == [lora.version] and not second.loras, "the blocks of the second get nothing"

    async def has_dropped_it(server: Server, request: Forward | Backward) -> Message:
        return Error("lora_gone", "it is not here")

    first.answer, first.times = has_dropped_it, first.asked + 1
    await passes.forward(target, HIDDEN, Inputs(lora=lora))
    assert first.loras == [lora.version] * 2 and not membership.marks


async def test_a_pass_keeps_to_the_adapter_that_it_began_with(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    target, membership = swarm(monkeypatch, Server("a", 0, 4), Server("b", 4, 8), active_adapter="mine")
    passed = await passes.forward(target, HIDDEN, Inputs(), for_gradients=True)
    await passes.backward(target, passed, HIDDEN, Wanted())
    assert membership.adapters == ["mine", "mine@1", "mine@1", "mine@1"]
