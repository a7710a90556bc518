"""Several rounds under way on a span over two devices: they do overlap, and no session notices. Threads that wait for events; where threads
sleep, it is for moments drawn by chance that nothing depends on."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing

from petalnet.blocks.scheduler import Task
from petalnet.blocks.service import BlockService
from petalnet.blocks.sessions import Session
from petalnet.blocks.span import Span
from petalnet.blocks.spread import SpreadSpan
from petalnet.blocks.work import InputsNotFinite, StepWork
from petalnet.errors import ServerError
from petalnet.models.checkpoint import ModelSource
from petalnet.p2p.session_messages import UNIT_TOKENS, Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor

HIDDEN = 32
X = torch.randn(2, 150, HIDDEN, generator=torch.Generator().manual_seed(3))
WITHIN_S = 10.0


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


class Served:
    """A service of four blocks on two devices, without a network, and the blocks on one device to compare with."""

    def __init__(self, folder: Path, pages: int, share_prefixes: bool) -> None:
        source = ModelSource.open(folder)
        self.twin = Span.load(source, 0, 4)
        span = SpreadSpan.load(source, 0, 4, devices=["cpu", "cpu"], counts=[2, 2])
        assert isinstance(span, SpreadSpan)
        self.span = span
        tokens = pages * span.backend.page_tokens
        self.service = BlockService(span, model="m", kv_tokens=tokens, share_prefixes=share_prefixes)
        self.engine, self.runner = self.service.engine, self.service.runner

    def open(self, first: int = 0, end: int = 4, *, rows: int = 1, pushes: bool = False, peer: str = "peer") -> Session:
        session = self.service.sessions.open(peer, first, end, 160, pushes=pushes)
        self.service.sessions.admit(session, rows)
        return session

    async def step(self, session: Session, hidden: torch.Tensor, position: int, *, most: int = 10**9, **options: Any) -> torch.Tensor:
        """A step's outputs. `most`: the most tokens a row in a round."""
        order, names = options.pop("order", None), options.pop("names", None)
        request = Step(step=0, position=position, hidden=encode_tensor(hidden))
        rows, new, _ = hidden.shape
        key = (session.first, session.end, self.span.batch_key(position + new, session))
        task = Task(session.peer_id, session, key, new, rows, "step", most, StepWork(session, request, order, names))
        return decode_tensor((await self.engine.submit(task)).value)

    def whole(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.twin.forward(hidden, **options)[-1]

    def on_step(self, device: int, before: Callable[[list[Any]], None]) -> None:
        """Have something called on a device's thread before each of its steps."""
        stage = self.span.stages[device]
        step = stage.step

        def stepped(steps: Any, *blocks: int) -> Any:
            before(list(steps))
            return step(steps, *blocks)

        stage.__dict__["step"] = stepped


@asynccontextmanager
async def serving(folder: Path, pages: int = 64, *, share_prefixes: bool = False) -> AsyncIterator[Served]:
    served = Served(folder, pages, share_prefixes)
    async with trio.open_nursery() as nursery:
        await nursery.start(served.engine.run)
        with trio.fail_after(60):
            yield served
            for session in list(served.service.sessions):
                served.service.sessions.close(session)
            await served.service.check()
        nursery.cancel_scope.cancel()


@pytest.fixture
async def served(saved: Callable[..., Path]) -> AsyncIterator[Served]:
    async with serving(saved("llama")) as served:
        yield served


class Gate:
    """Lets threads wait until another has come by so many times."""

    def __init__(self) -> None:
        self.passed = 0
        self._changed = threading.Condition()

    def open(self) -> None:
        with self._changed:
            self.passed += 1
            self._changed.notify_all()

    def wait(self, times: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.passed >= times, WITHIN_S), "nothing else ran meanwhile"


async def test_while_one_device_is_at_a_round_the_other_takes_the_next(served: Served) -> None:
    began, threads = Gate(), set[int]()
    served.on_step(0, lambda steps: began.open())

    def second(steps: list[Any]) -> None:
        threads.add(threading.get_ident())
        began.wait(2)

    served.on_step(1, second)
    async with trio.open_nursery() as nursery:
        for session in (served.open(), served.open()):
            nursery.start_soon(served.step, session, X[:1, :8], 0)
            await trio.to_thread.run_sync(began.wait, 1)
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert served.engine.rounds.count == 2


async def test_the_next_piece_of_a_prompt_follows_on_the_heels_of_the_one_before(served: Served) -> None:
    began = Gate()
    served.on_step(0, lambda steps: began.open())
    first = True

    def second(steps: list[Any]) -> None:
        nonlocal first
        if first:
            began.wait(2)
        first = False

    served.on_step(1, second)
    close(await served.step(served.open(), X[:1], 0, most=30), served.whole(X[:1]))
    assert began.passed >= 5


async def test_calls_come_after_the_rounds_under_way_and_before_later_tasks(served: Served) -> None:
    order: list[str] = []
    began, may_go = Gate(), Gate()
    served.on_step(0, lambda steps: began.open())

    def second(steps: list[Any]) -> None:
        may_go.wait(1)
        order.append("round")

    served.on_step(1, second)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.step, served.open(), X[:1, :8], 0)
        await trio.to_thread.run_sync(began.wait, 1)
        served.engine.call(order.append, "call")
        nursery.start_soon(served.step, served.open(), X[:1, :8], 0)
        await trio.testing.wait_all_tasks_blocked()
        assert await trio.to_thread.run_sync(lambda: list(order)) == [] and began.passed == 1
        may_go.open()
    assert order == ["round", "call", "round"]


async def test_a_task_that_is_withdrawn_runs_to_its_end_before_what_is_asked_later(served: Served) -> None:
    """A session that ends while its prompt is computed, and another that then needs its pages; a call in between."""
    order: list[str] = []
    began, may_go = Gate(), Gate()
    served.on_step(0, lambda steps: began.open())

    def second(steps: list[Any]) -> None:
        may_go.wait(1)
        order.append("round")

    served.on_step(1, second)
    session, other = served.open(), served.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.step, session, X[:1], 0)
        await trio.to_thread.run_sync(began.wait, 1)
        nursery.cancel_scope.cancel()
    served.service.sessions.close(session)
    served.engine.call(order.append, "call")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.step, other, X[:1, :8], 0)
        await trio.testing.wait_all_tasks_blocked()
        assert order == [] and began.passed <= 2
        may_go.open()
    call = order.index("call")
    assert order[:call] == ["round"] * call and 1 <= call <= 2 and order[call + 1 :] == ["round"]
    assert served.runner.held_tokens == served.span.backend.page_tokens


async def test_a_failure_on_the_second_device_is_the_fault_of_one(served: Served) -> None:
    good, bad = served.open(), served.open(pushes=True)

    def failing(steps: list[Any]) -> None:
        if any(not bool(step.hidden.isfinite().all()) for step in steps):
            raise ZeroDivisionError

    served.on_step(1, failing)
    await served.step(bad, X[:1, :8], 0)
    outputs: list[torch.Tensor] = []

    async def run() -> None:
        outputs.append(await served.step(good, X[:1, :8], 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        with pytest.raises(ServerError, match="ZeroDivisionError"):
            await served.step(bad, X[:1, 8:40].log(), 8, most=8)
    close(outputs[0], served.whole(X[:1, :8]))
    assert bad.kv.length == 8
    close(await served.step(bad, X[:1, 8:40], 8), served.whole(X[:1, :40])[:, 8:])


async def test_a_session_goes_on_after_numbers_that_are_not_finite(served: Served) -> None:
    session = served.open(pushes=True)
    await served.step(session, X[:1, :8], 0)
    spoilt = X[:1, 8:100].clone()
    spoilt[:, 3] = torch.nan
    with pytest.raises(InputsNotFinite):
        await served.step(session, spoilt, 8, most=10)
    await served.service.check()
    assert session.kv.length == 8
    assert await served.engine.ask(served.runner.outputs, session, 0, 9) is None
    close(await served.step(session, X[:1, 8:], 8, most=10), served.whole(X[:1])[:, 8:])
    kept = await served.engine.ask(served.runner.outputs, session, 0, 150)
    assert kept is not None
    close(kept, served.whole(X[:1]))


class Client:
    """A client that does what clients do, as chance has it, and compares all that it gets."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served = served
        self.peer = f"peer {seed}"
        self.chance = random.Random(seed)
        self.blocks = self.chance.choice(((0, 4), (0, 4), (0, 2), (2, 4), (1, 3)))

    async def run(self, sessions: int) -> None:
        for _ in range(sessions):
            await self.use(self.served.open(*self.blocks, rows=2, pushes=self.chance.random() < 0.5, peer=self.peer))

    async def use(self, session: Session) -> None:
        served, chance, (first, end) = self.served, self.chance, self.blocks
        text = X[[chance.randrange(2)]] if chance.random() < 0.5 else torch.randn(1, 150, HIDDEN)
        named = None if text.shape[0] != 1 or not any(torch.equal(text[0], row) for row in X) else int(torch.equal(text[0], X[1]))
        done = 0
        if named is not None:
            done = await served.engine.ask(served.runner.attach, session, [[bytes([named, unit]) * 8 for unit in range(2)]])
        history = text[:, :done]
        for number in range(chance.randrange(2, 9)):
            position, order, names = history.shape[1], None, None
            rows = len(history)
            if position and chance.random() < 0.2:
                position = chance.randrange(max(0, position - 40), position) or 1
            if position and chance.random() < 0.3:
                order = [chance.randrange(rows) for _ in range(chance.randrange(1, 3))]
                rows = len(order)
            new = min(chance.choice((1, 1, 1, 5, 60, 150)), 150 - position)
            if not new:
                break
            if number or named is None:
                hidden = torch.randn(rows, new, HIDDEN)
            else:
                hidden = text[:, position : position + new]
                order = None
                names = [[bytes([named, unit]) * 8 for unit in range(position // UNIT_TOKENS, (position + new) // UNIT_TOKENS)]]
            before = history[:, :position]
            history = torch.cat([before if order is None else before[order], hidden], 1)
            found = await served.step(session, hidden, position, most=chance.choice((7, 40, 1000)), order=order, names=names)
            expected = served.whole(history, first=first, end=end)
            close(found, expected[:, position:])
            if session.pushes and chance.random() < 0.3:
                kept = await served.engine.ask(served.runner.outputs, session, 0, history.shape[1])
                close(kept, expected)
            if chance.random() < 0.1:
                await served.service.check()
        served.service.sessions.close(session)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gptj", {"n_positions": 160})], ids=["packed", "one by one"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 8))])
async def test_sessions_do_not_notice(saved: Callable[..., Path], family: str, options: dict[str, Any], seed: int) -> None:
    """With little room, so that pages change hands all the time. Threads are held up now and then, so that they meet in many ways."""
    async with serving(saved(family, **options), pages=44, share_prefixes=True) as served:
        chance = random.Random(seed)
        for device in (0, 1):
            served.on_step(device, lambda steps: time.sleep(chance.choice((0.0, 0.0, 0.002))))
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(Client(served, 10 * seed + number).run, 4)
        assert served.engine.rounds.count > 30
