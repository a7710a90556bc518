"""Chains of services over real hosts: steps go from server to server, and by the client wherever they cannot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petalnet.blocks import links, service
from petalnet.blocks.checks import Limits
from petalnet.blocks.replays import MOST_REPLAYS
from petalnet.p2p.fields import Message
from petalnet.p2p.host import Host, Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error
from petalnet.p2p.protocols import INFERENCE, PUSH
from petalnet.p2p.session_messages import (
    KEEP_NONE,
    NAME_BYTES,
    Attach,
    Attached,
    LinkDown,
    LinkOpened,
    OpenLink,
    OpenSession,
    Replay,
    Reserve,
    Reserved,
    SessionOpened,
    Step,
    StepDone,
)
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.chained import HIDDEN, LOOPBACK, MODEL, Chain, chain_of, eventually, receive
from tests.blocks.spans import DEVICES

pytestmark = DEVICES

X = torch.randn(3, 100, HIDDEN, generator=torch.Generator().manual_seed(3))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
async def two(saved: Callable[..., Path]) -> AsyncIterator[Chain]:
    async with chain_of(saved("llama")) as chain:
        yield chain


@pytest.fixture
async def three(saved: Callable[..., Path]) -> AsyncIterator[Chain]:
    async with chain_of(saved("llama"), (1, 3)) as chain:
        yield chain


async def test_steps_go_from_server_to_server(three: Chain) -> None:
    expected = three.whole(X)[-1]
    async with three.session() as session:
        found = [await session.run(X[:, a:b], a) for a, b in [(0, 90), (90, 91), (91, 99), (99, 100)]]
        close(torch.cat(found, 1), expected)
        first, second, third = (server.links for server in three.servers)
        assert first == second | {"pushed_bytes": first["pushed_bytes"]}
        assert (first["open"], first["pushed_steps"], first["relayed_steps"], first["failed"]) == (1, 4, 0, 0)
        assert first["pushed_bytes"] == 3 * 100 * HIDDEN * 4
        assert third["pushed_steps"] == 0
    await three.nothing_is_left()


async def test_a_prompt_in_chunks_of_which_only_the_last_is_answered(three: Chain) -> None:
    async with three.session() as session:
        requests = [session.step(X[:, a : a + 20], a, keep=KEEP_NONE if a < 80 else 1) for a in range(0, 100, 20)]
        for request in requests:
            await session.streams[0].send(request)
        answers = [await session.answer(request) for request in requests]
        assert [answer.output.shape[1] for answer in answers] == [0, 0, 0, 0, 1]
        close(decode_tensor(answers[-1].output), three.whole(X)[-1][:, -1:])
        for answer in answers:
            assert len(answer.spent) == 6 and all(seconds >= 0 for seconds in answer.spent)
            assert all(held >= queue + compute for queue, compute, held in (answer.spent[:3], answer.spent[3:]))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": 80}),
        (
            "phi3",
            {
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
                "original_max_position_embeddings": 80,
                "max_position_embeddings": 400,
            },
        ),
    ],
)
async def test_chunks_get_the_angles_of_the_whole_prompt(saved: Callable[..., Path], family: str, options: dict[str, Any]) -> None:
    async with chain_of(saved(family, **options)) as chain, chain.session() as session:
        await session.run(X[:, :64], 0, reach=100)
        close(await session.run(X[:, 64:], 64, reach=100), chain.whole(X)[-1][:, 64:])


async def test_rows_in_another_order_and_back_again(two: Chain) -> None:
    order = torch.tensor([2, 0, 2, 1])
    async with two.session() as session:
        await session.run(X[:, :70], 0)
        found = await session.run(X[order, 70:], 70, order=order)
        close(found, two.whole(X[order])[-1][:, 70:])
        found = await session.run(X[order, 60:], 60)
        close(found, two.whole(X[order])[-1][:, 60:])
        assert (await session.run(X[:2, :0], 60, order=torch.tensor([1, 0]))).shape == (2, 0, HIDDEN)
        close(await session.run(X[[0, 2], 60:], 60), two.whole(X[[0, 2]])[-1][:, 60:])


async def test_masks_positions_and_prompts_of_all_blocks(three: Chain) -> None:
    mask = torch.ones(3, 100, dtype=torch.bool)
    mask[0, :30] = mask[1, :1] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0).int()
    prompts = torch.randn(4, 3, 6, HIDDEN)
    expected = three.whole(X, attention_mask=mask, position_ids=positions, prompts=prompts)[-1]
    async with three.session() as session:
        found = await session.run(X[:, :80], 0, mask=mask[:, :80], position_ids=positions[:, :80], prompts=prompts)
        close(found[mask[:, :80]], expected[:, :80][mask[:, :80]])
        found = await session.run(X[:, 80:], 80, mask=mask, position_ids=positions[:, 80:])
        close(found, expected[:, 80:])


async def test_outputs_of_every_block(three: Chain) -> None:
    expected = three.whole(X)
    async with three.session() as session:
        request = session.step(X, 0, all_hidden=True, keep=5)
        await session.streams[0].send(request)
        answers = [await session.answer(request, server) for server in range(3)]
        found = [decode_tensor(answer.output) for answer in answers]
        assert [tuple(part.shape) for part in found] == [(1, 3, 100, HIDDEN), (2, 3, 100, HIDDEN), (1, 3, 5, HIDDEN)]
        close(torch.cat(found[:2]), expected[:3])
        close(found[2], expected[3:, :, -5:])


async def test_a_link_that_cannot_be_opened(three: Chain) -> None:
    three.servers[0].knows.clear()
    expected = three.whole(X)[-1]
    async with three.session() as session:
        for a, b in [(0, 90), (90, 91), (91, 100)]:
            request = session.step(X[:, a:b], a)
            await session.streams[0].send(request)
            if not a:
                down = await receive(session.streams[0])
                assert isinstance(down, LinkDown) and down.pushed == 0 and "is not known" in down.reason
            relayed = await session.answer(request, 0)
            await session.streams[1].send(session.step(decode_tensor(relayed.output), a, step=request.step))
            session.steps = request.step
            answer = await session.answer(request)
            close(decode_tensor(answer.output), expected[:, a:b])
        first, second, _ = (server.links for server in three.servers)
        assert (first["failed"], first["pushed_steps"], first["relayed_steps"]) == (1, 0, 3)
        assert (second["failed"], second["pushed_steps"], second["relayed_steps"]) == (0, 3, 0)


async def test_outputs_that_were_pushed_can_be_had_once_more(three: Chain) -> None:
    expected = three.whole(X)
    order = torch.tensor([2, 0, 2, 1])
    async with three.session() as session:
        first = session.streams[0]
        await first.send(Replay(2, 60, 30))  # before the session has come so far
        await session.run(X[:, :70], 0, keep=KEEP_NONE)
        await session.run(X[:, 70:90], 70)
        again = await receive(first)
        assert isinstance(again, StepDone) and (again.step, again.position) == (2, 90)
        close(decode_tensor(again.output), expected[0, :, 60:90])
        await session.streams[1].send(Replay(3, 80, 10))  # there was something at these positions before, which is not what is meant
        await session.run(X[order, 80:], 80, order=order)
        again = await receive(session.streams[1])
        assert isinstance(again, StepDone)
        close(decode_tensor(again.output), expected[2][order, 80:90])
        await session.streams[1].send(Replay(0, 0, 100))
        again = await receive(session.streams[1])
        assert isinstance(again, StepDone)
        close(decode_tensor(again.output), expected[2][order])


async def test_replays_are_made_one_by_one(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 800 KB each: who asks for many and takes none has a server hold one."""
    wide = X[:1].expand(64, 100, HIDDEN)
    async with chain_of(saved("llama"), pool=16384) as chain, chain.session() as session:
        await session.run(wide, 0, keep=KEEP_NONE)
        runner, made = chain.servers[0].service.runner, []
        read = runner.outputs
        monkeypatch.setattr(runner, "outputs", lambda *args: made.append(args) or read(*args))
        for _ in range(MOST_REPLAYS):
            await session.streams[0].send(Replay(1, 0, 100))
        await eventually(lambda: bool(made))
        await trio.sleep(0.2)  # in which more would be made, were they not to wait
        assert len(made) == 1
        for _ in range(MOST_REPLAYS):
            assert isinstance(await receive(session.streams[0]), StepDone)


async def test_replays_that_are_refused(two: Chain) -> None:
    async with two.session() as session:
        first, last = session.streams
        await session.run(X, 0)
        await last.send(Replay(3, 0, 1))
        await session.refused(1, 3, "caller", "only a session that pushes keeps its outputs")
        await first.send(Replay(4, 190, 11))
        await session.refused(0, 4, "caller", "190 + 11 tokens exceed the session's max_length 200")
        await first.send(Replay(1, 0, 1, codec="zip"))
        await session.refused(0, 1, "caller", "codec 'zip'")
        for _ in range(MOST_REPLAYS):
            await first.send(Replay(1, 100, 10))
        await first.send(Replay(6, 100, 10))
        await session.refused(0, 6, "caller", "replays at a time")
        await session.run(X[:, :5], 100)
        await session.run(X[:, 5:10], 105)
        for _ in range(MOST_REPLAYS):
            assert isinstance(await receive(first), StepDone)


async def test_a_link_that_breaks_in_mid_session(three: Chain) -> None:
    expected = three.whole(X)[-1]
    async with three.session() as session:
        close(await session.run(X[:, :60], 0), expected[:, :60])
        await three.servers[1].host.disconnect(three.servers[0].peer_id)
        down = await receive(session.streams[0])  # noticed though nothing was sent
        assert isinstance(down, LinkDown) and down.pushed == 1
        await session.streams[0].send(Replay(1, 0, 60))
        again = await receive(session.streams[0])
        assert isinstance(again, StepDone)
        await session.streams[1].send(session.step(decode_tensor(again.output), 0, step=1))  # it has come before, and is dropped
        request = session.step(X[:, 60:], 60, step=2)
        await session.streams[0].send(request)
        relayed = await session.answer(request, 0)
        await session.streams[1].send(session.step(decode_tensor(relayed.output), 60, step=2))
        close(decode_tensor((await session.answer(request)).output), expected[:, 60:])
        assert three.servers[0].links["open"] == 0 and three.servers[1].links["pushed_steps"] == 2


async def test_a_step_that_comes_both_ways_is_run_once(two: Chain) -> None:
    expected = two.whole(X)[-1]
    async with two.session() as session:
        await session.run(X[:, :60], 0)
        for number in (0, 1):
            await session.streams[1].send(session.step(torch.zeros(3, 60, HIDDEN), 0, step=number))
        session.steps = 1
        close(await session.run(X[:, 60:], 60), expected[:, 60:])
        assert two.servers[1].service.engine.jobs == 2


async def test_a_wrong_step_is_told_to_the_client_whoever_brought_it(two: Chain) -> None:
    async with two.session() as session:
        await session.run(X[:, :60], 0)
        await session.streams[0].send(session.step(X, 70))
        await session.refused(0, 2, "caller", "at position 70, but the session holds only 60")
        await session.streams[0].send(session.step(X[:, :20], 30, keep=21))
        await session.refused(0, 3, "caller", "outputs of 21 tokens")
        await session.streams[0].send(session.step(X[:, :20], 50))  # a follower of what was refused must not find what was there before
        await session.refused(0, 4, "caller", "at position 50, but the session holds only 30")
        await session.streams[0].send(session.step(X[:, 30:60], 30, promise_rows=6))
        await session.refused(0, 5, "too_large", "6 rows of max_length 200 exceed")
        two.servers[1].service.sessions.reached(next(iter(two.servers[1].service.sessions)), 3, 10)
        await session.streams[0].send(session.step(X[:, 30:60], 30))
        await session.refused(1, 6, "caller", "at position 30, but the session holds only 10")
        close(await session.run(X, 0), two.whole(X)[-1])


async def test_a_failed_computation_ends_the_session_and_its_links(two: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two.session() as session:
        await session.run(X[:, :60], 0)
        with monkeypatch.context() as broken:
            broken.setattr(two.servers[1].service.span.stages[-1], "step", lambda *args, **kwargs: 1 // 0)
            await session.streams[0].send(session.step(X[:, 60:], 60))
            await session.refused(1, 2, "server", "computation failed: ZeroDivisionError")
            assert await session.streams[1].receive() is None
        down = await receive(session.streams[0])
        assert isinstance(down, LinkDown) and down.pushed == 2


async def test_room_at_the_opening_and_ahead_of_a_step(two: Chain) -> None:
    async with two.session(promise_rows=2) as session:
        last = two.servers[1].service
        assert last.sessions.free_tokens <= 1024 - 2 * 200
        await session.streams[1].send(Reserve(4))
        reserved = await receive(session.streams[1])
        assert isinstance(reserved, Reserved) and reserved.free_kv_tokens == last.sessions.free_tokens <= 1024 - 4 * 200
        await session.streams[1].send(Reserve(6))
        refused = await receive(session.streams[1])
        assert isinstance(refused, Error) and refused.code == "too_large"
        for rows, code in ((2, "busy"), (6, "too_large"), (1025, "caller")):
            async with await two.client.open_stream(two.servers[1].peer_id, INFERENCE) as other:
                await other.send(OpenSession("t", MODEL, 2, 4, 200, rows))
                refused = await receive(other)
                assert isinstance(refused, Error) and refused.code == code, refused
                assert await other.receive() is None
                assert len(last.sessions) == 1
        await session.run(X[:1], 0)
        await session.run(X[[0, 0, 0, 0], :2], 100, order=torch.zeros(4, dtype=torch.int64))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a link or its session."""
    for module in (links, service):
        monkeypatch.setattr(module, "LINK_TIMEOUT_S", 0.3)


async def ask_for_link(chain: Chain, opening: OpenLink, host: Host | None = None, server: int = 1) -> Message:
    """What a server answers somebody who would bring it steps."""
    to = chain.servers[server]
    async with await (host or chain.client).open_stream(to.peer_id, PUSH, addrs=to.host.addrs) as stream:
        await stream.send(opening)
        return await receive(stream)


@pytest.mark.usefixtures("soon")
async def test_nobody_else_brings_steps(three: Chain) -> None:
    first, second, third = three.servers
    async with three.session() as session:
        await session.run(X[:, :60], 0)
        for host in (three.client, third.host):
            answer = await ask_for_link(three, OpenLink(session.id, 1), host)
            assert isinstance(answer, Error) and "no session here takes steps from this peer" in answer.message
        for opening in (OpenLink(session.id, 2), OpenLink("other", 1)):
            answer = await ask_for_link(three, opening, first.host)
            assert isinstance(answer, Error) and "no session here takes steps from this peer" in answer.message
        async with await three.client.open_stream(second.peer_id, PUSH) as stream:
            await stream.send(session.step(X, 0))
            answer = await receive(stream)
            assert isinstance(answer, Error) and "a link begins with open_link" in answer.message
        session.steps = 1
        close(await session.run(X[:, 60:], 60), three.whole(X)[-1][:, 60:])


async def test_who_brings_something_else_than_steps_brings_nothing_any_more(two: Chain) -> None:
    first, second = two.servers
    async with await two.client.open_stream(second.peer_id, INFERENCE, addrs=second.host.addrs) as client:
        await client.send(OpenSession("s", MODEL, 2, 4, 200, takes_from=first.peer_id))
        assert isinstance(await receive(client), SessionOpened)
        async with await first.host.open_stream(second.peer_id, PUSH, addrs=second.host.addrs) as stream:
            await stream.send(OpenLink("s", 2))
            assert await receive(stream) == LinkOpened()
            await stream.send(Step(1, 0, encode_tensor(X[:, :60])))
            assert isinstance(await receive(client), StepDone)
            await stream.send(Reserve(3))
            answer = await receive(stream)
            assert isinstance(answer, Error) and "a link takes step, not reserve" in answer.message
        await client.send(Step(2, 60, encode_tensor(X[:, 60:])))
        assert isinstance(await receive(client), StepDone)
        async with await first.host.open_stream(second.peer_id, INFERENCE) as other:
            await other.send(OpenSession("s", MODEL, 2, 4, 200, takes_from=first.peer_id))
            answer = await receive(other)
            assert isinstance(answer, Error) and answer.code == "busy"  # not "caller": whoever was told the id could end others' requests
            assert "a session of this id is open" in answer.message
        async with await two.client.open_stream(second.peer_id, INFERENCE) as other:  # the same client takes the former to be over
            await other.send(OpenSession("s", MODEL, 2, 4, 200, takes_from=first.peer_id))
            assert isinstance(await receive(other), SessionOpened)
            assert await client.receive() is None
            await eventually(lambda: len(second.service.sessions) == 1)


async def test_a_link_may_come_before_its_session(two: Chain) -> None:
    first, second = two.servers
    opened = OpenSession("s", MODEL, 0, 2, 200, pushes_to=second.peer_id)
    async with (
        await two.client.open_stream(first.peer_id, INFERENCE, addrs=first.host.addrs) as one,
        await two.client.open_stream(second.peer_id, INFERENCE, addrs=second.host.addrs) as other,
    ):
        await one.send(opened)
        assert isinstance(await receive(one), SessionOpened)
        await one.send(Step(1, 0, encode_tensor(X)))
        await eventually(lambda: second.service.incoming_links.waiting == 1 and first.service.engine.jobs == 1)
        await other.send(OpenSession("s", MODEL, 2, 4, 200, takes_from=first.peer_id))
        assert isinstance(await receive(other), SessionOpened)
        answer = await receive(other)
        assert isinstance(answer, StepDone)
        close(decode_tensor(answer.output), two.whole(X)[-1])
        assert second.service.incoming_links.waiting == 0


@pytest.mark.usefixtures("soon")
async def test_links_wait_for_their_sessions_in_bounded_numbers(two: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LINK_TIMEOUT_S", 1.5)
    monkeypatch.setattr(links, "MOST_WAITING_PER_PEER", 2)
    incoming = two.servers[1].service.incoming_links
    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(ask_for_link, two, OpenLink(str(number), 2))
        await eventually(lambda: incoming.waiting == 2)
        answer = await ask_for_link(two, OpenLink("2", 2))
        assert isinstance(answer, Error) and answer.code == "busy"
        monkeypatch.setattr(links, "MOST_WAITING", 2)
        answer = await ask_for_link(two, OpenLink("3", 2), two.servers[0].host)
        assert isinstance(answer, Error) and answer.code == "busy"
        monkeypatch.setattr(links, "MOST_WAITING", 3)
        answer = await ask_for_link(two, OpenLink("0", 2), two.servers[0].host, server=1)
        assert isinstance(answer, Error)
        nursery.cancel_scope.cancel()
    await eventually(lambda: incoming.waiting == 0)


async def test_computing_stops_while_nobody_reads(saved: Callable[..., Path]) -> None:
    """Outputs of 200 KB each: one fits the window of a new stream, the next is being sent, and one more waits."""
    wide = X[:1].expand(16, 100, HIDDEN)
    async with chain_of(saved("llama"), pool=8192) as chain, open_host(Identity.generate(), listen=LOOPBACK) as deaf:
        first, reading, steps = chain.servers[0], trio.Event(), []

        async def read_late(stream: Stream) -> None:
            assert isinstance(await stream.receive(), OpenLink)
            await stream.send(LinkOpened())
            await reading.wait()
            while (step := await stream.receive()) is not None:
                steps.append(step)

        deaf.serve(PUSH, read_late)
        first.knows[deaf.peer_id] = deaf.addrs
        async with await chain.client.open_stream(first.peer_id, INFERENCE, addrs=first.host.addrs) as stream:
            await stream.send(OpenSession("s", MODEL, 0, 2, 200, 16, pushes_to=deaf.peer_id))
            assert isinstance(await receive(stream), SessionOpened)
            await eventually(lambda: first.links["open"] == 1)
            async with trio.open_nursery() as nursery:

                async def send_all() -> None:
                    for number in range(1, 9):
                        await stream.send(Step(number, 0, encode_tensor(wide)))

                nursery.start_soon(send_all)
                await eventually(lambda: first.service.engine.jobs == 3)
                await trio.sleep(0.1)  # in which another would be computed, were it allowed to
                assert first.service.engine.jobs == 3 and first.links["pushed_steps"] == 1
                reading.set()
                await eventually(lambda: len(steps) == 8)
            assert [step.step for step in steps] == list(range(1, 9))


@pytest.mark.usefixtures("soon")
async def test_outputs_that_waited_for_a_link_that_never_opened_go_to_the_client(saved: Callable[..., Path]) -> None:
    async def say_nothing(stream: Stream) -> None:
        await trio.sleep_forever()

    async with chain_of(saved("llama")) as chain, open_host(Identity.generate(), listen=LOOPBACK) as mute:
        mute.serve(PUSH, say_nothing)
        first = chain.servers[0]
        first.knows[mute.peer_id] = mute.addrs
        async with await chain.client.open_stream(first.peer_id, INFERENCE, addrs=first.host.addrs) as stream:
            await stream.send(OpenSession("s", MODEL, 0, 2, 200, pushes_to=mute.peer_id))
            assert isinstance(await receive(stream), SessionOpened)
            for number in range(4):
                await stream.send(Step(number + 1, 20 * number, encode_tensor(X[:, 20 * number : 20 * number + 20])))
            down = await receive(stream)
            assert isinstance(down, LinkDown) and down.pushed == 0 and "was not open within" in down.reason
            for number in range(4):
                answer = await receive(stream)
                assert isinstance(answer, StepDone) and answer.step == number + 1
                close(decode_tensor(answer.output), chain.whole(X)[1, :, 20 * number : 20 * number + 20])
                assert answer.held_s >= answer.compute_s


async def test_a_beginning_is_shared_between_sessions_that_push(two: Chain) -> None:
    """And never with one that does not, which keeps no outputs."""
    first = two.servers[0]
    units = encode_tensor(torch.arange(NAME_BYTES).view(1, 1, NAME_BYTES).to(torch.uint8))
    async with two.session() as session:
        await session.run(X[:1], 0, names=decode_tensor(units))
    async with two.session() as session:
        for stream in session.streams:
            await stream.send(Attach(units))
            assert await receive(stream) == Attached(64)
        await session.streams[0].send(Replay(0, 0, 64))
        again = await receive(session.streams[0])
        assert isinstance(again, StepDone)
        close(decode_tensor(again.output), two.whole(X[:1])[1, :, :64])
        close(await session.run(X[:1, 64:], 64), two.whole(X[:1])[-1, :, 64:])
    async with await two.client.open_stream(first.peer_id, INFERENCE) as stream:
        await stream.send(OpenSession("s", MODEL, 0, 2, 200))
        assert isinstance(await receive(stream), SessionOpened)
        await stream.send(Attach(units))
        assert await receive(stream) == Attached(0)


async def test_a_client_that_vanishes_leaves_nothing(three: Chain) -> None:
    async with three.session() as session:
        await session.run(X[:, :60], 0)
        await session.streams[0].send(session.step(X[:, 60:], 60))
        for server in three.servers:
            await server.host.disconnect(three.client.peer_id)
        await three.nothing_is_left()


async def test_a_session_that_is_fed_by_a_link_is_not_idle(saved: Callable[..., Path]) -> None:
    async with chain_of(saved("llama"), limits=Limits(idle_s=1.5)) as chain, chain.session() as session:
        until = trio.current_time() + 2.5
        while trio.current_time() < until:
            await session.run(X[:, :2], 0)
        answer = await receive(session.streams[1])
        assert isinstance(answer, Error) and "nothing came for 1.5 s" in answer.message


async def test_draining_lets_chains_go_on(two: Chain) -> None:
    async with two.session() as session:
        await session.run(X[:, :60], 0)
        for server in two.servers:
            server.service.drain()
        close(await session.run(X[:, 60:], 60), two.whole(X)[-1][:, 60:])


@pytest.mark.parametrize("codec", ["raw", "bfloat16", "int8"])
def test_prompts_are_cut_as_they_came(codec: str) -> None:
    prompts = torch.randn(5, 2, 3, HIDDEN)
    whole, rest = encode_tensor(prompts, codec), links.without_first(encode_tensor(prompts, codec), 2)
    assert (rest.dtype, rest.shape, rest.codec) == ("float32", (3, 2, 3, HIDDEN), codec)
    assert torch.equal(decode_tensor(rest), decode_tensor(whole)[2:])


async def test_prompts_that_no_link_can_carry(two: Chain) -> None:
    async with two.session() as session:
        request = session.step(X[:1], 0)
        await session.streams[0].send(replace(request, prompts=encode_tensor(torch.randn(2, 1, 3, HIDDEN))))
        await session.refused(0, 1, "caller", "prompts must be floats [over 2, 1, length, 32], not float32 [2, 1, 3, 32]")
        await session.streams[0].send(replace(session.step(X[:1], 0, step=2), spent=(0.0,) * 3 * 256))
        await session.refused(0, 2, "caller", "a chain has at most 256 servers")
