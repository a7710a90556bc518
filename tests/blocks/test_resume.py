"""Sessions that go on when a server of their chain is lost: real services and hosts, and the client's part by hand."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petalnet.blocks import hop
from petalnet.blocks.span import Span
from petalnet.blocks.work import StepWork
from petalnet.errors import PeerLost
from petalnet.p2p.fields import Message
from petalnet.p2p.host import Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error
from petalnet.p2p.protocols import PUSH
from petalnet.p2p.session_messages import (
    KEEP_NONE,
    AskProgress,
    Draining,
    LinkDown,
    LinkOpened,
    OpenLink,
    Progress,
    Replay,
    Resume,
    Resumed,
    SessionOpened,
    Step,
    StepDone,
)
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.chained import HIDDEN, LOOPBACK, Chain, ClientSession, Server, chain_of, eventually, receive
from tests.blocks.spans import DEVICES

pytestmark = DEVICES

X = torch.randn(3, 160, HIDDEN, generator=torch.Generator().manual_seed(3))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
async def three(saved: Callable[..., Path]) -> AsyncIterator[Chain]:
    """A chain of three, and another server for the blocks of each."""
    async with chain_of(saved("llama"), (1, 3), spares=((0, 1), (1, 3), (3, 4))) as chain:
        yield chain


@pytest.fixture
async def alone(saved: Callable[..., Path]) -> AsyncIterator[Chain]:
    """A chain of three, and nobody else."""
    async with chain_of(saved("llama"), (1, 3)) as chain:
        yield chain


async def answer_to(stream: Stream, kind: type[Message]) -> Any:
    """The first message of its kind; what came before is of former times."""
    while True:
        message = await receive(stream)
        if isinstance(message, kind):
            return message
        assert isinstance(message, (LinkDown, StepDone)) or (isinstance(message, Error) and message.step), message


class Mending:
    """What a client does when it has lost servers: by the book, one thing after the other."""

    def __init__(self, chain: Chain, session: ClientSession) -> None:
        self.chain = chain
        self.session = session
        self.hops = list(chain.servers)

    async def replace(self, lost: int, by: Sequence[Server], position: int, source: torch.Tensor, **pending: Any) -> None:
        """Have others take a server's place, with KV entries [0, position) rebuilt.

        Args:
            source: what went into the chain's first block, [rows, at least position, hidden].
            pending: `order` and `order_step` of the step that was not answered.
        """
        session, hops = self.session, self.hops
        await session.streams[lost].reset()
        first, end = by[0].service.span.first, by[-1].service.span.end
        hops[lost : lost + 1] = by
        peers = ["", *(server.peer_id for server in hops), ""]
        streams: list[Stream] = []
        for index in range(lost, lost + len(by)):
            stream = await self.chain.begin(
                hops[index], session.id, takes_from=peers[index], pushes_to=peers[index + 2], promise_rows=len(source)
            )
            assert isinstance(await receive(stream), SessionOpened)
            streams.append(stream)
        session.streams[lost : lost + 1] = streams
        for index in range(len(hops)):
            if index not in range(lost, lost + len(by)):
                resume = Resume(session.steps, position, peers[index], peers[index + 2], **pending)
                await session.streams[index].send(resume)
        for index in range(len(hops)):
            if index not in range(lost, lost + len(by)):
                resumed = await answer_to(session.streams[index], Resumed)
                assert resumed == Resumed(position, len(source))
        for start in range(0, position, 64):
            stop = min(start + 64, position)
            if first:
                session.steps += 1
                await session.streams[lost - 1].send(Replay(session.steps, start, stop - start, until=end))
            else:
                step = session.step(source[:, start:stop], start, keep=KEEP_NONE, until=end)
                await session.streams[0].send(step)
            done = await answer_to(session.streams[lost + len(by) - 1], StepDone)
            assert (done.step, done.position, done.output.shape[1]) == (session.steps, stop, 0)


@pytest.mark.parametrize("lost", [0, 1, pytest.param(2, marks=pytest.mark.long)])
async def test_another_server_takes_the_place_of_one(three: Chain, lost: int) -> None:
    expected = three.whole(X)[-1]
    async with three.session() as session:
        for a, b in [(0, 100), (100, 101)]:
            close(await session.run(X[:, a:b], a), expected[:, a:b])
        await Mending(three, session).replace(lost, [three.spares[lost]], 101, X)
        for a, b in [(101, 110), (110, 111), (111, 160)]:
            close(await session.run(X[:, a:b], a), expected[:, a:b])
        spare, survivors = three.spares[lost].service, [s.service for s in three.servers if s is not three.servers[lost]]
        assert spare.describe()["recovery"] == {"resumed": 0, "replayed_tokens": 0, "rebuilt_tokens": 303}
        assert [service.recovery.resumed for service in survivors] == [1, 1]
        assert sum(service.recovery.replayed_tokens for service in survivors) == (303 if lost else 0)
        assert three.servers[0].links["relayed_steps"] == 0


@pytest.mark.long
async def test_two_servers_take_the_place_of_one_and_then_one_of_them_is_lost(saved: Callable[..., Path]) -> None:
    async with chain_of(saved("llama"), (1, 3), spares=((1, 2), (2, 3), (1, 2), (2, 3))) as chain, chain.session() as session:
        expected = chain.whole(X)[-1]
        close(await session.run(X[:, :100], 0), expected[:, :100])
        mending = Mending(chain, session)
        await mending.replace(1, chain.spares[:2], 100, X)
        close(await session.run(X[:, 100:110], 100), expected[:, 100:110])
        await mending.replace(2, chain.spares[3:], 110, X)
        close(await session.run(X[:, 110:120], 110), expected[:, 110:120])
        await mending.replace(1, chain.spares[2:3], 120, X)
        close(await session.run(X[:, 120:], 120), expected[:, 120:])


async def test_a_mask_positions_and_prompts_of_what_is_rebuilt(three: Chain) -> None:
    mask = torch.ones(3, 100, dtype=torch.bool)
    mask[0, :30] = mask[1, :1] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0).int()
    prompts = torch.randn(4, 3, 6, HIDDEN)
    expected = three.whole(X[:, :100], attention_mask=mask, position_ids=positions, prompts=prompts)[-1]
    async with three.session() as session:
        await session.run(X[:, :80], 0, mask=mask[:, :80], position_ids=positions[:, :80], prompts=prompts)
        mending = Mending(three, session)
        await mending.replace(1, three.spares[1:2], 0, X)
        await session.streams[2].send(Resume(session.steps, 80, three.spares[1].peer_id))
        refused = await answer_to(session.streams[2], Error)
        assert "holds only 0" in refused.message  # it was told to go back to the beginning before
        ids, arrays = positions[:, :80], prompts[1:3]
        await session.streams[0].send(Resume(session.steps, 0, "", three.spares[1].peer_id))
        assert await answer_to(session.streams[0], Resumed) == Resumed(0, 3)
        request = session.step(X[:, :80], 0, mask=mask[:, :80], position_ids=ids, prompts=prompts, keep=1)
        await session.streams[0].send(request)
        await session.answer(request)
        await three.servers[0].service.check()
        # What the first kept goes on once more, with what belongs to it, to a server whose blocks are the last that it is for.
        session.steps += 1
        replay = Replay(
            session.steps, 0, 80, until=3, mask=encode_tensor(mask[:, :80]), position_ids=encode_tensor(ids), prompts=encode_tensor(arrays)
        )
        await session.streams[0].send(replay)
        assert (await answer_to(session.streams[1], StepDone)).output.shape[1] == 0
        found = await session.run(X[:, 80:100], 80, mask=mask, position_ids=positions[:, 80:])
        close(found, expected[:, 80:])


async def test_rows_are_put_in_order_once(three: Chain) -> None:
    """A step with an order is computed by the first and lost on its way to the third."""
    order = torch.tensor([2, 0, 2])
    expected = three.whole(X[order])[-1]
    async with three.session() as session:
        await session.run(X[:, :100], 0)
        step = session.step(X[order, 100:101], 100, order=order)
        await session.streams[1].reset()
        await eventually(lambda: not len(three.servers[1].service.sessions))
        await session.streams[0].send(step)
        await answer_to(session.streams[0], StepDone)
        mending = Mending(three, session)
        beginning = torch.cat([X[order, :100], X[order, 100:]], 1)
        await mending.replace(1, three.spares[1:2], 100, beginning, order=encode_tensor(order), order_step=step.step)
        for server, peers in ((0, ("", three.spares[1].peer_id)), (2, (three.spares[1].peer_id, ""))):  # told again, it does no harm
            resume = Resume(session.steps, 100, *peers, order=encode_tensor(order), order_step=step.step)
            await session.streams[server].send(resume)
            assert await answer_to(session.streams[server], Resumed) == Resumed(100, 3)
        close(await session.run(X[order, 100:101], 100), expected[:, 100:101])
        close(await session.run(X[order, 101:], 101), expected[:, 101:])


async def test_an_order_that_another_one_followed_cannot_be_told_apart(alone: Chain) -> None:
    order = torch.tensor([1, 2, 0])
    async with alone.session() as session:
        await session.run(X[:, :100], 0)
        for position in (100, 101):
            await session.run(X[:, position : position + 1], position, order=order)
        resume = Resume(session.steps, 100, "", alone.servers[1].peer_id, 2, encode_tensor(order))
        assert "into another order by step 3, after step 2" in await refusal(session.streams[0], resume)


async def open_to(chain: Chain, server: Server, **options: Any) -> ClientSession:
    """A session on one server."""
    stream = await chain.begin(server, "s", **options)
    assert isinstance(await receive(stream), SessionOpened)
    return ClientSession("s", [stream])


async def deaf_server(chain: Chain, stack: Any) -> str:
    """A server that takes a link and then nothing more; its id."""

    async def take_nothing(stream: Stream) -> None:
        assert isinstance(await stream.receive(), OpenLink)
        await stream.send(LinkOpened())
        await trio.sleep_forever()

    deaf = await stack.enter_async_context(open_host(Identity.generate(), listen=LOOPBACK))
    deaf.serve(PUSH, take_nothing)
    chain.servers[0].knows[deaf.peer_id] = deaf.addrs
    return str(deaf.peer_id)


@pytest.mark.parametrize("tokens", [4, pytest.param(100, marks=pytest.mark.long)])
async def test_a_hop_whose_steps_are_stuck_before_a_hung_neighbour(saved: Callable[..., Path], tokens: int) -> None:
    """As many steps as the client can send: some were sent on, two wait, one is about to be computed, the others wait to be read."""
    wide = X[:1, :tokens].expand(16, tokens, HIDDEN)
    async with chain_of(saved("llama"), pool=32768) as chain, contextlib.AsyncExitStack() as stack:
        first, second = chain.servers
        deaf = await deaf_server(chain, stack)
        session = await open_to(chain, first, pushes_to=deaf, promise_rows=16, max_length=1600)
        stream = await stack.enter_async_context(session.streams[0])
        await stream.send(session.step(wide, 0))
        await eventually(lambda: first.links["pushed_steps"] == 1)
        for number in range(1, 60 if tokens == 4 else 13):
            await stream.send(session.step(wide, number * tokens))
        engine = first.service.engine
        await eventually(lambda: first.service.read_ahead.bytes > 0 and engine.jobs >= (3 if tokens == 100 else 4))
        jobs = engine.jobs
        assert jobs < session.steps
        await stream.send(AskProgress(7))
        progress = await answer_to(stream, Progress)
        assert progress.nonce == 7 and progress.sent <= progress.done == jobs <= progress.taken < session.steps
        last = await stack.enter_async_context(await chain.begin(second, "s", takes_from=first.peer_id, promise_rows=16, max_length=1600))
        assert isinstance(await receive(last), SessionOpened)
        await stream.send(Resume(session.steps, tokens, "", second.peer_id))
        assert await answer_to(stream, Resumed) == Resumed(tokens, 16)
        await eventually(lambda: first.service.read_ahead.bytes == 0)
        await stream.send(Replay(session.steps + 1, 0, tokens, until=4))
        assert isinstance(await receive(last), StepDone)
        session.steps += 1
        request = session.step(X[:1, tokens : tokens + 5].expand(16, 5, HIDDEN), tokens)
        await stream.send(request)
        done = await receive(last)
        assert isinstance(done, StepDone)
        close(decode_tensor(done.output)[:1], chain.whole(X[:1, : tokens + 5])[-1][:, tokens:])
        assert engine.jobs == jobs + 1
        assert first.links["open"] == 1


class Gate:
    """Holds up a server's computation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, span: Span) -> None:
        self.entered, self.free = threading.Event(), threading.Event()
        last = span.stages[-1]
        step = last.step

        def held(*args: Any) -> Any:
            self.entered.set()
            assert self.free.wait(10)
            return step(*args)

        monkeypatch.setattr(last, "step", held)


async def test_a_replay_of_any_number_gives_way_to_a_resume(alone: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    first = alone.servers[0]
    async with alone.session() as session, alone.session() as other:
        await session.run(X[:1, :100], 0)
        gate = Gate(monkeypatch, first.service.span)
        await other.streams[0].send(other.step(X[:1, :1], 0))
        await eventually(gate.entered.is_set)
        await session.streams[0].send(Replay(1000, 0, 50, until=3))  # has the session's turn, and waits for the compute thread
        await eventually(lambda: first.service.engine.queue_length == 2)
        await session.streams[0].send(Resume(10, 100, "", "nobody"))
        await eventually(lambda: not first.links["open"] or first.links["failed"] > 0)
        gate.free.set()
        assert await answer_to(session.streams[0], Resumed) == Resumed(100, 1)
        assert isinstance(await receive(session.streams[0]), LinkDown)
        await session.streams[0].send(AskProgress(1))
        assert await receive(session.streams[0]) == Progress(1, 1, 1, 0)  # nothing of the replay came before


async def test_numbers_that_a_neighbour_makes_up_hold_nobody_up(alone: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone.whole(X)
    first, second, third = alone.servers
    async with alone.session() as session:
        close(await session.run(X[:, :100], 0), expected[-1][:, :100])
        gate = Gate(monkeypatch, second.service.span)
        step = session.step(decode_tensor(encode_tensor(expected[0][:, 100:101])), 100, step=10)
        async with contextlib.AsyncExitStack() as stack:
            for number in (10, 2**53):  # one is computed, the other waits for the session's turn
                stream = await stack.enter_async_context(await first.host.open_stream(second.peer_id, PUSH, addrs=second.host.addrs))
                await stream.send(OpenLink(session.id, 1))
                assert await receive(stream) == LinkOpened()
                await stream.send(replace(step, step=number))
                await eventually(gate.entered.is_set)
            await session.streams[1].send(AskProgress(1))
            await trio.sleep(0.05)
            await session.streams[1].send(Resume(10, 100, first.peer_id, "nobody"))
            await eventually(lambda: second.links["failed"] > 0)
            gate.free.set()
            assert await answer_to(session.streams[1], Progress)
            assert await answer_to(session.streams[1], Resumed) == Resumed(100, 3)
            assert isinstance(await receive(session.streams[1]), LinkDown)
            await session.streams[1].send(AskProgress(2))
            assert await receive(session.streams[1]) == Progress(2, 10, 1, 0)
        session.steps = 10
        peers = ["", *(server.peer_id for server in alone.servers), ""]
        for index, stream in enumerate(session.streams):
            await stream.send(Resume(10, 100, peers[index], peers[index + 2]))
            assert await answer_to(stream, Resumed) == Resumed(100, 3)
        close(await session.run(X[:, 100:], 100), expected[-1][:, 100:])


@pytest.mark.parametrize(
    ("server", "tokens"), [(1, 60), *(pytest.param(*case, marks=pytest.mark.long) for case in ((0, 1), (0, 60), (1, 1)))]
)
async def test_a_hop_that_computes(three: Chain, monkeypatch: pytest.MonkeyPatch, server: int, tokens: int) -> None:
    expected = three.whole(X)[-1]
    async with three.session() as session:
        close(await session.run(X[:, :100], 0), expected[:, :100])
        with monkeypatch.context() as slow:
            gate = Gate(slow, three.servers[server].service.span)
            await session.streams[0].send(session.step(X[:, 100 : 100 + tokens], 100))
            await eventually(gate.entered.is_set)
            stream = session.streams[server]
            began = trio.current_time()
            await stream.send(AskProgress(1))
            progress = await receive(stream)
            assert progress == Progress(1, taken=2, done=1, sent=1)
            assert trio.current_time() - began < 2
            threading.Timer(0.2, gate.free.set).start()
            await Mending(three, session).replace(2, three.spares[2:], 100, X)
        close(await session.run(X[:, 100:], 100), expected[:, 100:])


async def test_a_prompt_in_chunks_of_which_some_were_computed(three: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = three.whole(X)[-1]
    async with three.session() as session:
        with monkeypatch.context() as slow:
            gate = Gate(slow, three.servers[1].service.span)
            chunks = [session.step(X[:, a : a + 40], a, keep=KEEP_NONE) for a in range(0, 160, 40)]
            for chunk in chunks[:2]:
                await session.streams[0].send(chunk)
            await eventually(gate.entered.is_set)
            gate.free.set()
            for chunk in chunks[:2]:
                await session.answer(chunk)
            gate.free.clear()
            for chunk in chunks[2:]:
                await session.streams[0].send(chunk)
            await eventually(lambda: three.servers[0].service.engine.jobs == 4)
            gate.free.set()
            await Mending(three, session).replace(2, three.spares[2:], 80, X)
        close(await session.run(X[:, 80:], 80), expected[:, 80:])


async def test_a_link_to_the_same_server_stays(alone: Chain) -> None:
    expected = alone.whole(X)[-1]
    peers = ["", *(server.peer_id for server in alone.servers), ""]
    async with alone.session() as session:
        close(await session.run(X[:, :100], 0), expected[:, :100])
        for _ in range(3):
            for index, stream in enumerate(session.streams):
                await stream.send(Resume(session.steps, 90, peers[index], peers[index + 2]))
                assert await receive(stream) == Resumed(90, 3)
        for stream in session.streams[:2]:
            await stream.send(session.step(X, 0, step=1))  # which is of former times
        close(await session.run(X[:, 90:], 90), expected[:, 90:])
        assert [server.links["open"] for server in alone.servers] == [1, 1, 0]
        assert not any(server.links["failed"] for server in alone.servers)


async def test_what_a_former_neighbour_brings_is_of_no_use(three: Chain) -> None:
    """A server that was taken for lost goes on: its link was closed, and it cannot have another."""
    expected = three.whole(X)[-1]
    first, second, third = three.servers
    async with three.session() as session:
        close(await session.run(X[:, :100], 0), expected[:, :100])
        former = session.streams[1]
        session.streams[1] = await three.begin(three.spares[1], "another", takes_from="nobody")
        await Mending(three, session).replace(1, three.spares[1:2], 100, X)
        await former.send(session.step(X[:, 100:], 100, step=1000))
        await trio.sleep(0.05)
        close(await session.run(X[:, 100:], 100, step=session.steps), expected[:, 100:])
        async with await second.host.open_stream(third.peer_id, PUSH, addrs=third.host.addrs) as stream:
            with trio.move_on_after(0.1):
                await stream.send(OpenLink(session.id, 3))
                assert isinstance(await stream.receive(), Error)
        await former.close()


async def test_the_newest_link_of_a_server_counts(alone: Chain) -> None:
    first, second, _ = alone.servers
    async with alone.session() as session:
        await session.run(X[:, :60], 0)
        async with await first.host.open_stream(second.peer_id, PUSH, addrs=second.host.addrs) as stream:
            await stream.send(OpenLink(session.id, 1))
            assert await receive(stream) == LinkOpened()
            down = await receive(session.streams[0])
            assert isinstance(down, LinkDown)
            await stream.send(session.step(decode_tensor(encode_tensor(alone.whole(X)[0][:, 60:])), 60))
            done = await receive(session.streams[2])
            assert isinstance(done, StepDone)
            close(decode_tensor(done.output), alone.whole(X)[-1][:, 60:])


@pytest.mark.long  # the shorter part: `test_what_cannot_be_resumed`
async def test_outputs_for_a_server_that_cannot_be_reached_go_through_the_client(three: Chain) -> None:
    three.servers[0].knows.pop(three.spares[1].peer_id)
    async with three.session() as session:
        await session.run(X[:, :100], 0)
        await Mending(three, session).replace(1, three.spares[1:2], 0, X)
        await session.streams[0].send(Resume(session.steps, 0, "", three.spares[1].peer_id))
        await answer_to(session.streams[0], Resumed)
        down = await receive(session.streams[0])
        assert isinstance(down, LinkDown) and down.pushed == 0 and "is not known" in down.reason


async def test_a_hop_that_pushes_nowhere_any_more_answers_its_client(alone: Chain) -> None:
    expected = alone.whole(X)
    async with alone.session() as session:
        await session.run(X[:, :100], 0)
        await session.streams[0].send(Resume(session.steps, 100))
        assert await receive(session.streams[0]) == Resumed(100, 3)
        request = session.step(X[:, 100:], 100, keep=1)
        await session.streams[0].send(request)
        close(decode_tensor((await session.answer(request, 0)).output), expected[0][:, 100:])
        await session.streams[0].send(Replay(50, 50, 100, until=3))
        done = await receive(session.streams[0])
        assert isinstance(done, StepDone) and (done.step, done.position) == (50, 150)
        close(decode_tensor(done.output), expected[0][:, 50:150])


async def refusal(stream: Stream, request: Message) -> str:
    """What a server says to a request that it refuses."""
    await stream.send(request)
    answer = await receive(stream)
    assert isinstance(answer, Error) and answer.code in ("caller", "too_large", "busy"), answer
    return f"{answer.code}: {answer.message}"


def rows(*order: int) -> Any:
    return encode_tensor(torch.tensor(order, dtype=torch.int64))


async def test_what_cannot_be_resumed(alone: Chain) -> None:
    peers = [server.peer_id for server in alone.servers]
    async with alone.session() as session:
        first, second, third = session.streams
        assert "has had no step" in await refusal(first, Resume(0, 0))
        await session.run(X[:, :100], 0)
        assert "holds only 100 KV entries, not 101" in await refusal(first, Resume(1, 101, "", peers[1]))
        assert "only a session that was opened to push" in await refusal(third, Resume(1, 100, peers[1], peers[0]))
        assert "must be int64" in await refusal(first, Resume(1, 100, "", peers[1], 2, encode_tensor(torch.zeros(3, 1))))
        assert "1 to 1024 rows, not 1025" in await refusal(first, Resume(1, 100, "", peers[1], 2, rows(*[0] * 1025)))
        assert "rows 0 to 1023" in await refusal(first, Resume(1, 100, "", peers[1], 2, rows(0, 1, 5000)))
        assert "rows 0 to 2" in await refusal(first, Resume(1, 100, "", peers[1], 2, rows(0, 1, 3)))
        assert "too_large: 6 rows" in await refusal(first, Resume(1, 100, "", peers[1], 2, rows(*[0] * 6)))
        assert "holds only 100 KV entries, not 50 + 51" in await refusal(first, Replay(9, 50, 51, until=3))
        assert "no use to blocks up to 1" in await refusal(first, Replay(9, 50, 50, until=1))
        assert "ends at block 2" in await refusal(second, session.step(X[:, :1], 100, until=2))
        await first.send(Resume(session.steps, 100, "", peers[0]))  # to itself
        assert await receive(first) == Resumed(100, 3)
        assert isinstance(await receive(first), LinkDown)
        await first.send(Resume(session.steps, 100, "", "nobody"))
        assert await receive(first) == Resumed(100, 3)
        assert isinstance(await receive(first), LinkDown)
        await first.send(Resume(session.steps, 100, "", peers[1]))
        await second.send(Resume(session.steps, 100, peers[0], peers[2]))
        await third.send(Resume(session.steps, 100, peers[1]))
        for stream in session.streams:
            assert await receive(stream) == Resumed(100, 3)
        close(await session.run(X[:, 100:], 100), alone.whole(X)[-1][:, 100:])


async def test_nobody_gets_room_by_resuming(saved: Callable[..., Path]) -> None:
    async with chain_of(saved("llama"), pool=1500) as chain, chain.session() as session:
        await session.run(X[:2, :100], 0)
        async with await chain.begin(chain.servers[0], "t", promise_rows=2) as other:
            assert isinstance(await receive(other), SessionOpened)
            resume = Resume(session.steps, 100, "", chain.servers[1].peer_id, 9, rows(*[0, 1] * 3))
            assert "busy: no room for 6 rows" in await refusal(session.streams[0], resume)
        close(await session.run(X[:2, 100:], 100), chain.whole(X[:2])[-1][:, 100:])


async def test_a_flood_of_requests_that_may_not_wait(alone: Chain) -> None:
    peers = [server.peer_id for server in alone.servers]
    async with alone.session() as session:
        await session.run(X[:, :100], 0)
        stream, began = session.streams[0], trio.current_time()
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                for nonce in range(500):
                    await stream.send(AskProgress(nonce))
                for number in range(4):
                    await stream.send(Resume(session.steps, 100, "", (peers[1], peers[2])[number % 2]))

            nursery.start_soon(ask)
            for nonce in range(500):
                assert await receive(stream) == Progress(nonce, 1, 1, 1)
            for _ in range(4):
                await answer_to(stream, Resumed)
        assert trio.current_time() - began > 3 * hop.RESUME_EVERY_S
        assert alone.servers[0].service.describe()["recovery"]["resumed"] == 4


async def test_numbers_that_are_not_finite_are_blamed_on_who_brought_them(two_of_bloom: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, check = two_of_bloom, StepWork.check
    first = chain.servers[0]
    expected = chain.whole(X)[-1]
    async with chain.session() as session:
        await session.run(X[:, :100], 0)
        broken = X[:, 100:101].clone()
        broken[1, 0, 5] = torch.nan
        await session.streams[0].send(session.step(broken, 100))
        await session.refused(0, 2, "caller", "the inputs of step 2 are not finite")
        close(await session.run(X[:, 100:101], 100), expected[:, 100:101])
        with monkeypatch.context() as lying:
            lying.setattr(StepWork, "check", lambda work, *args: check(work, *args) if work.brought_by else None)
            await session.streams[0].send(session.step(broken, 100))
            await session.refused(
                1, session.steps, "server", f"server {first.peer_id} brought step {session.steps} with numbers that are not"
            )
            await session.streams[0].send(session.step(broken, 100, keep=KEEP_NONE))
            await session.refused(
                1, session.steps, "server", f"server {first.peer_id} brought step {session.steps} with numbers that are not"
            )
            padded = torch.ones(3, 101, dtype=torch.bool)
            padded[1, 100] = False
            await session.run(broken, 100, mask=padded)
        close(await session.run(X[:, 100:101], 100), expected[:, 100:101])
    async with chain.session() as session:
        prompts = torch.zeros(len(chain.whole(X)), 3, 1, X.shape[-1])
        prompts[-1] = torch.nan
        await session.streams[0].send(session.step(X[:, :2], 0, prompts=prompts))
        await session.refused(1, session.steps, "server", f"server {first.peer_id} brought step {session.steps} with numbers")


@pytest.fixture
async def two_of_bloom(saved: Callable[..., Path]) -> AsyncIterator[Chain]:
    async with chain_of(saved("bloom")) as chain:
        yield chain


async def test_outputs_that_are_not_finite_are_the_servers_own_fault(two_of_bloom: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = two_of_bloom
    expected = chain.whole(X)[-1]
    async with chain.session() as session:
        await session.run(X[:, :100], 0)
        for index, server in enumerate(chain.servers):
            with monkeypatch.context() as broken:
                span = server.service.span.stages[-1]
                step = span.step
                broken.setattr(span, "step", lambda *args, step=step: [[output / 0 for output in outputs] for outputs in step(*args)])
                await session.streams[0].send(session.step(X[:, 100:], 100))
                await session.refused(index, session.steps, "server", f"the outputs of step {session.steps} here are not finite")
        close(await session.run(X[:, 100:], 100), expected[:, 100:])


async def test_draining_tells_every_client(alone: Chain) -> None:
    service = alone.servers[1].service
    with trio.fail_after(1):
        await service.empty()
    async with alone.session() as session, alone.session() as other:
        service.drain(30.0)
        for stream in (session.streams[1], other.streams[1]):
            assert await receive(stream) == Draining(30.0)
        async with await alone.begin(alone.servers[1], "new") as refused:
            answer = await receive(refused)
            assert isinstance(answer, Error) and answer.code == "busy"
        close(await session.run(X, 0), alone.whole(X)[-1])
        is_empty = False

        async def wait() -> None:
            nonlocal is_empty
            await service.empty()
            is_empty = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await session.streams[1].close()
            await eventually(lambda: len(service.sessions) == 1)
            assert not is_empty
            await other.streams[1].close()
        assert is_empty and not len(service.sessions)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
async def test_whatever_a_client_says_its_session_leaves_nothing(alone: Chain, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Requests without rhyme or reason, on all streams at once."""
    monkeypatch.setattr(hop, "RESUME_EVERY_S", 0.0)
    chance = random.Random(seed)
    peers = ["", "nobody", *(server.peer_id for server in (*alone.servers, *alone.spares))]

    def any_request() -> Message:
        nonlocal latest
        latest += 1
        number = max(latest - chance.choice((0, 0, 0, 1, 20)), 0)
        position, tokens = chance.choice((0, 10, 40, 60, 150)), chance.choice((1, 5, 70, 300))
        order = chance.choice((None, rows(0, 0, 0), rows(2, 1), rows(7, 7, 7)))
        kind = chance.randrange(5)
        if kind == 0:
            return AskProgress(number)
        if kind == 1:
            return Resume(number, position, chance.choice(peers), chance.choice(peers), number + chance.choice((-5, 0, 5)), order)
        if kind == 2:
            return Replay(number, position, tokens, until=chance.choice((0, 1, 2, 3, 4, 9)), reach=chance.choice((0, 5)))
        hidden = encode_tensor(X[: chance.choice((2, 3, 3)), : min(tokens, 90)])
        return Step(number, position, hidden, order=order, until=chance.choice((0, 0, 1, 3, 4, 9)), keep=chance.choice((-1, 0, 1)))

    latest = 100
    async with alone.session() as session, trio.open_nursery() as nursery:
        await session.run(X[:, :60], 0)

        async def read(stream: Stream) -> None:
            with contextlib.suppress(PeerLost), trio.fail_after(10):
                while (message := await stream.receive()) is not None:
                    assert not isinstance(message, Error) or message.code in ("caller", "too_large"), message
                    if isinstance(message, Progress) and message.nonce == 0:
                        return

        async def talk(stream: Stream) -> None:
            with contextlib.suppress(PeerLost):
                for _ in range(60):
                    await stream.send(any_request())
                await stream.send(AskProgress(0))

        for stream in session.streams:
            nursery.start_soon(read, stream)
            nursery.start_soon(talk, stream)
    await alone.nothing_is_left()
    async with alone.session() as session:
        close(await session.run(X, 0), alone.whole(X)[-1])
