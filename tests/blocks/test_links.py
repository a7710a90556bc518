"""Chains of services over real hosts: steps go from server to server, and by the client wherever they cannot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from petalnet.blocks.hop import MOST_REPLAYS
from petalnet.p2p.messages import KEEP_NONE, LinkDown, Replay, StepDone
from petalnet.p2p.tensors import decode_tensor
from tests.blocks.chained import HIDDEN, Chain, chain_of, receive

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
        await first.send(Replay(7, 60, 30))  # before the session has come so far
        await session.run(X[:, :70], 0, keep=KEEP_NONE)
        await session.run(X[:, 70:90], 70)
        again = await receive(first)
        assert isinstance(again, StepDone) and (again.step, again.position) == (7, 90)
        close(decode_tensor(again.output), expected[0, :, 60:90])
        await session.run(X[order, 80:], 80, order=order)
        await session.streams[1].send(Replay(8, 0, 100))
        again = await receive(session.streams[1])
        assert isinstance(again, StepDone)
        close(decode_tensor(again.output), expected[2][order])


async def test_replays_that_are_refused(two: Chain) -> None:
    async with two.session() as session:
        first, last = session.streams
        await session.run(X, 0)
        await last.send(Replay(3, 0, 1))
        await session.refused(1, 3, "caller", "only a session that pushes keeps its outputs")
        await first.send(Replay(4, 190, 11))
        await session.refused(0, 4, "caller", "190 + 11 tokens exceed the session's max_length 200")
        await first.send(Replay(5, 0, 1, codec="zip"))
        await session.refused(0, 5, "caller", "codec 'zip'")
        for number in range(MOST_REPLAYS + 1):
            await first.send(Replay(number, 100, 10))
        await session.refused(0, MOST_REPLAYS, "caller", "replays at a time")
        await session.run(X[:, :5], 100)
        await session.run(X[:, 5:10], 105)
        for _ in range(MOST_REPLAYS):
            assert isinstance(await receive(first), StepDone)
