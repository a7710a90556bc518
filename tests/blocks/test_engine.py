"""The compute thread: order, errors, cancellation, an end in good order."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncIterator

import pytest
import torch
import trio
import trio.lowlevel

from petalnet.blocks.engine import Engine
from petalnet.errors import BusyError, CallerError, ServerError


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        yield engine
        nursery.cancel_scope.cancel()


async def test_jobs_run_one_by_one_in_order(engine: Engine) -> None:
    done: list[int] = []
    threads: set[int] = set()

    def work(number: int) -> int:
        threads.add(threading.get_ident())
        done.append(number)
        return number * 2

    results: dict[int, int] = {}

    async def ask(number: int) -> None:
        result = await engine.submit(work, number)
        assert result.compute_s >= 0
        assert result.queue_s >= 0
        results[number] = result.value

    hold = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.submit, hold.wait)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(20):
            nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
        assert engine.queue_length == 21
        hold.set()
    assert done == list(range(20))
    assert results == {number: number * 2 for number in range(20)}
    assert threads and threading.get_ident() not in threads and len(threads) == 1
    assert (engine.queue_length, engine.jobs) == (0, 21)
    assert engine.busy_s > 0


async def test_the_loop_goes_on_while_a_job_runs(engine: Engine) -> None:
    release = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.submit, release.wait)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        release.set()


def fail(error: BaseException) -> None:
    raise error


async def test_errors_come_back_typed_and_the_thread_lives_on(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CallerError, match="too long"):
        await engine.submit(fail, CallerError("too long"))
    with pytest.raises(BusyError, match="out of memory"):
        await engine.submit(fail, torch.OutOfMemoryError("no"))
    with pytest.raises(BusyError, match="out of memory"):
        await engine.submit(fail, MemoryError())
    with pytest.raises(ServerError, match="computation failed: ZeroDivisionError") as caught:
        await engine.submit(lambda: 1 // 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "ZeroDivisionError" in caplog.text
    assert (await engine.submit(lambda: 5)).value == 5


async def test_a_cancelled_caller_leaves_at_once_and_its_job_is_dropped(engine: Engine) -> None:
    ran: list[str] = []
    release = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.submit, release.wait)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(engine.submit, ran.append, "dropped")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        release.set()
    await engine.submit(ran.append, "kept")
    assert ran == ["kept"]


async def test_cancelled_while_its_job_runs(engine: Engine) -> None:
    began, release, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        release.wait()
        ended.set()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.submit, work)
            await trio.to_thread.run_sync(began.wait)
            scope.cancel()
    assert not ended.is_set()
    release.set()
    assert (await engine.submit(lambda: 1)).value == 1
    assert ended.is_set()


async def test_the_end() -> None:
    engine = Engine()
    interval = sys.getswitchinterval()
    with pytest.raises(ServerError, match="shutting down"):
        await engine.submit(lambda: 1)
    began, release = threading.Event(), threading.Event()
    outcomes: list[str] = []

    def work() -> None:
        began.set()
        release.wait()

    async def ask(name: str) -> None:
        try:
            await engine.submit(work)
            outcomes.append(name)
        except ServerError:
            outcomes.append(f"{name} refused")

    async with trio.open_nursery() as askers, trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        assert sys.getswitchinterval() <= 0.0005
        askers.start_soon(ask, "under way")
        await trio.to_thread.run_sync(began.wait)
        askers.start_soon(ask, "waiting")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()  # the engine knows of its end before the job under way goes on
        release.set()
    assert sorted(outcomes) == ["under way", "waiting refused"]  # both are told in the same turn of the loop, in any order
    assert sys.getswitchinterval() == interval
    assert not any(thread.name == "petalnet-engine" for thread in threading.enumerate())
    with pytest.raises(ServerError, match="shutting down"):
        await engine.submit(lambda: 1)
