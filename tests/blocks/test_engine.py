"""The compute thread: rounds, order, errors, cancellation, an end in good order. Real threads that wait for events, nothing sleeps."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import outcome
import pytest
import torch
import trio
import trio.lowlevel
import trio.testing

from petalnet.blocks.costs import Costs
from petalnet.blocks.engine import Engine, Result
from petalnet.blocks.scheduler import Part, Scheduler, Task
from petalnet.errors import BusyError, CallerError, ServerError


class Runner:
    """Runs a task's `work`, where it is a function, when the task is complete. `rounds`: what it was given."""

    def __init__(self) -> None:
        self.rounds: list[list[Part]] = []
        self.threads: set[int] = set()
        self.gate: queue.SimpleQueue[None] | None = None
        self.began: queue.SimpleQueue[list[Part]] = queue.SimpleQueue()

    def __call__(self, parts: list[Part]) -> list[outcome.Outcome[Any] | None]:
        self.rounds.append(parts)
        self.threads.add(threading.get_ident())
        self.began.put(parts)
        if self.gate is not None:
            self.gate.get(timeout=10)
        return [None if part.end < part.task.units else outcome.capture(part.task.work) for part in parts]

    async def under_way(self) -> list[Part]:
        """The round that is under way, once there is one."""
        return await trio.to_thread.run_sync(lambda: self.began.get(timeout=10))


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
async def engine(runner: Runner) -> AsyncIterator[Engine]:
    engine = Engine(runner, Scheduler(Costs(10, 100)))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        yield engine
        if runner.gate is not None:
            for _ in range(100):
                runner.gate.put(None)
        nursery.cancel_scope.cancel()


def step(session: str, work: Callable[[], object] = lambda: None, *, units: int = 1, key: object = "steps", peer: str = "peer") -> Task:
    return Task(peer, session, key, units, 1, "step", 1 << 20, work)


async def test_what_came_during_a_round_shares_the_next(engine: Engine, runner: Runner) -> None:
    runner.gate = queue.SimpleQueue()
    answers: dict[int, Result[int]] = {}

    async def ask(number: int) -> None:
        answers[number] = await engine.submit(step(f"session {number}", lambda: number * 2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0)
        await runner.under_way()
        for number in range(1, 8):
            nursery.start_soon(ask, number)
        await trio.testing.wait_all_tasks_blocked()
        assert engine.queue_length == 8
        runner.gate.put(None)
        assert len(await runner.under_way()) == 7
        runner.gate.put(None)
    assert {number: answer.value for number, answer in answers.items()} == {number: number * 2 for number in range(8)}
    assert all(answer.compute_s > 0 and answer.queue_s >= 0 for answer in answers.values())
    assert answers[7].queue_s > 0
    assert len(runner.threads) == 1 and threading.get_ident() not in runner.threads
    assert (engine.queue_length, engine.jobs, engine.rounds.count, engine.rounds.tokens, engine.rounds.tasks) == (0, 8, 2, 8, 8)
    assert engine.busy_s == pytest.approx(engine.rounds.seconds) and engine.busy_s > 0


async def test_a_long_task_takes_several_rounds(engine: Engine, runner: Runner) -> None:
    result = await engine.submit(step("long", lambda: "whole", units=500))
    assert result.value == "whole"
    parts = [part for (part,) in runner.rounds]
    assert len(parts) > 1
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == 500


async def test_the_loop_goes_on_while_a_round_runs(engine: Engine, runner: Runner) -> None:
    runner.gate = queue.SimpleQueue()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.submit, step("session"))
        await runner.under_way()
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        runner.gate.put(None)


async def test_calls_come_after_the_round_under_way_and_before_later_tasks(engine: Engine, runner: Runner) -> None:
    order: list[object] = []
    runner.gate = queue.SimpleQueue()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.submit, step("first", lambda: order.append("first")))
        await runner.under_way()
        nursery.start_soon(engine.submit, step("second", lambda: order.append("second")))
        await trio.testing.wait_all_tasks_blocked()
        engine.call(lambda: order.append(threading.get_ident()))
        engine.call(fail, ValueError("unheard"))
        asked: list[str] = []

        async def ask() -> None:
            asked.append(await engine.ask("{}{}".format, "an", "swer"))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(engine.submit, step("third", lambda: order.append("third")))
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        runner.gate.put(None)
        await runner.under_way()
        assert order[0] == "first" and order[1] in runner.threads and len(order) == 2
        runner.gate.put(None)
    assert order[2:] == ["second", "third"]
    assert asked == ["answer"]


def fail(error: BaseException) -> None:
    raise error


async def test_errors_come_back_typed_and_the_thread_lives_on(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    async def failing(error: Exception) -> None:
        await engine.submit(step("session", lambda: fail(error)))

    for how in (failing, lambda error: engine.ask(fail, error)):
        with pytest.raises(CallerError, match="too long"):
            await how(CallerError("too long"))
        with pytest.raises(BusyError, match="out of memory"):
            await how(torch.OutOfMemoryError("no"))
        with pytest.raises(BusyError, match="out of memory"):
            await how(MemoryError())
        with pytest.raises(RuntimeError) as refused:
            torch.empty(1 << 60)
        with pytest.raises(BusyError, match="out of memory"):
            await how(refused.value)
        caplog.clear()
        with pytest.raises(ServerError, match="computation failed: ZeroDivisionError") as caught:
            await how(ZeroDivisionError())
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert "ZeroDivisionError" in caplog.text and "Traceback" in caplog.text
    assert (await engine.submit(step("session", lambda: 5))).value == 5


async def test_a_round_that_fails_as_a_whole_is_heard_of_by_all_of_it() -> None:
    def run(parts: list[Part]) -> list[outcome.Outcome[Any] | None]:
        if any(part.task.units > 1 for part in parts):
            raise CallerError("not this")
        return [outcome.Value(part.task.session) for part in parts]

    engine = Engine(run, Scheduler(Costs(10, 100)))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        with pytest.raises(CallerError, match="not this"):
            await engine.submit(step("long", units=500))
        assert (await engine.submit(step("short"))).value == "short"
        assert engine.queue_length == 0
        nursery.cancel_scope.cancel()


async def test_a_runner_without_an_answer_leaves_nobody_waiting() -> None:
    engine = Engine(lambda parts: [None] * len(parts), Scheduler(Costs(10, 100)))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        with pytest.raises(ServerError, match="computation failed: RuntimeError"):
            await engine.submit(step("session"))
        nursery.cancel_scope.cancel()


async def test_a_cancelled_asker_leaves_at_once_and_its_task_is_dropped(engine: Engine, runner: Runner) -> None:
    ran: list[str] = []
    runner.gate = queue.SimpleQueue()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.submit, step("first"))
        await runner.under_way()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(engine.submit, step("dropped", lambda: ran.append("dropped")))
                inner.start_soon(engine.ask, ran.append, "not asked any more")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        assert engine.queue_length == 1
        for _ in range(2):
            runner.gate.put(None)
    await engine.submit(step("kept", lambda: ran.append("kept")))
    assert ran == ["kept"]


async def test_cancelled_while_a_part_runs(engine: Engine, runner: Runner) -> None:
    runner.gate = queue.SimpleQueue()
    order: list[str] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.submit, step("long", units=500))
            await runner.under_way()
            scope.cancel()
    engine.call(order.append, "released")
    assert order == []  # not before the part under way has ended
    for _ in range(2):
        runner.gate.put(None)
    await engine.submit(step("other", lambda: order.append("other")))
    assert order == ["released", "other"]
    assert [part.task.session for parts in runner.rounds for part in parts] == ["long", "other"]


async def test_the_end(runner: Runner) -> None:
    engine = Engine(runner, Scheduler(Costs(10, 100)))
    interval, others = sys.getswitchinterval(), set(threading.enumerate())
    with pytest.raises(ServerError, match="shutting down"):
        await engine.submit(step("early"))
    runner.gate = queue.SimpleQueue()
    outcomes: list[str] = []

    async def ask(name: str, units: int = 1) -> None:
        try:
            await engine.submit(step(name, units=units))
            outcomes.append(name)
        except ServerError:
            outcomes.append(f"{name} refused")

    async def question() -> None:
        with pytest.raises(ServerError, match="shutting down"):
            await engine.ask(outcomes.append, "asked")

    async with trio.open_nursery() as askers, trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        assert sys.getswitchinterval() <= 0.0005
        askers.start_soon(ask, "under way")
        await runner.under_way()
        askers.start_soon(ask, "waiting")
        askers.start_soon(question)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()  # the engine knows of its end before the round under way goes on
        engine.call(outcomes.append, "late")
        runner.gate.put(None)
    assert sorted(outcomes) == ["under way", "waiting refused"]
    assert sys.getswitchinterval() == interval
    assert not any(thread.name == "petalnet-engine" for thread in set(threading.enumerate()) - others)
    engine.call(outcomes.append, "later")
    with pytest.raises(ServerError, match="shutting down"):
        await engine.submit(step("late"))
    assert engine.queue_length == 0


async def test_a_defect_of_the_scheduler_ends_the_engine_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Scheduler):
        def add(self, task: Task, now: float) -> None:
            raise KeyError("a defect")

    engine = Engine(lambda parts: [], Broken(Costs(10, 100)))
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            with pytest.raises(ServerError, match="shutting down"):
                await engine.submit(step("session"))
    (error,) = caught.value.exceptions
    assert isinstance(error, RuntimeError) and isinstance(error.__cause__, KeyError)
    assert "a defect" in caplog.text


async def test_stragglers_are_waited_for_and_wake_the_thread() -> None:
    """The scheduler's time to wait until is far away; what comes in meanwhile is run at once."""

    class Waiting(Scheduler):
        def next(self, now: float) -> list[Part] | float | None:
            return now + 3600.0 if len(self) == 1 else super().next(now)

    runner = Runner()
    engine = Engine(runner, Waiting(Costs(10, 100)))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        async with trio.open_nursery() as askers:
            askers.start_soon(engine.submit, step("first"))
            await trio.testing.wait_all_tasks_blocked()
            assert await engine.ask(lambda: 5) == 5
            assert runner.rounds == []
            askers.start_soon(engine.submit, step("second"))
        assert [len(parts) for parts in runner.rounds] == [2]
        nursery.cancel_scope.cancel()


async def test_the_loops_delay_is_seen(engine: Engine, runner: Runner) -> None:
    assert engine.loop_delay.worst_s == 0.0
    runner.gate = queue.SimpleQueue()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.submit, step("session"))
        await runner.under_way()
        await trio.testing.wait_all_tasks_blocked()
        threading.Event().wait(0.1)  # holds the loop up, as too much work in the trio thread would
        await trio.testing.wait_all_tasks_blocked()
        runner.gate.put(None)
    assert 0.05 < engine.loop_delay.worst_s < 5.0
    assert engine.loop_delay.median_s <= engine.loop_delay.worst_s
