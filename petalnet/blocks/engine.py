"""One thread that computes, round after round.

The trio thread hands tasks over and goes on serving the network. The compute thread takes in what has come, asks the scheduler for the next
round, has it run, delivers what is finished, and goes on: it waits for the trio thread only when there is nothing to do. Whatever touches
the span, pages or the scheduler runs there, so none of it needs a lock.

Where a span goes over several devices, each has a thread of its own (`pipeline`) that runs what it has of a round, and several rounds are
under way. The compute thread still begins and finishes all of them, and asks for the next round whenever the first device is free. Whatever
else touches sessions and pages waits until no round is under way, so that nobody has to think of rounds that are half done.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import outcome
import torch
import trio

from petalnet.blocks.pipeline import Pipeline
from petalnet.blocks.rounds import Round
from petalnet.blocks.scheduler import Done, Kind, Part, Scheduler, Task
from petalnet.errors import BusyError, PetalnetError, ServerError

log = logging.getLogger(__name__)
T = TypeVar("T")
Run = Callable[[list[Part]], Sequence[outcome.Outcome[Any] | None]]

SWITCH_INTERVAL_S = 0.0005
"""How often Python's threads take turns while the engine runs. At the default of 5 ms, a message waits up to 5 ms for a busy compute
thread to let go; at this value 0.5 ms, and the computation does not slow measurably."""

LOOP_SAMPLE_S = 0.02
"""How often the trio loop's delay is sampled while something waits for the compute thread."""
ESTIMATE_GAP_S = 0.25
"""How often the expected wait is estimated anew."""
REMEMBERED_S = 60.0
"""How far back the figures of delays and rounds go."""


@dataclass(frozen=True)
class Result(Generic[T]):
    """What a task's runner answered, and the seconds that the task waited and that its rounds took."""

    value: T
    queue_s: float
    compute_s: float


@dataclass(frozen=True)
class LoopDelay:
    """How late the trio loop ran what was due, over the last minute in which there was work; seconds."""

    median_s: float = 0.0
    worst_s: float = 0.0


@dataclass(frozen=True)
class Rounds:
    """The rounds of the last minute: how many, their seconds, and their sums of tokens and of tasks that took part."""

    count: int = 0
    seconds: float = 0.0
    tokens: int = 0
    tasks: int = 0


@dataclass(eq=False)
class _Asker:
    """A task of the trio loop that waits for the compute thread."""

    trio_task: trio.lowlevel.Task
    submitted: float = field(default_factory=time.perf_counter)
    gone: bool = False
    compute_s: float = 0.0


@dataclass(frozen=True)
class Pipelined:
    """How rounds are run on several devices: `begin` and `finish` are the compute thread's, what is between them is the pipeline's."""

    begin: Callable[[list[Part]], Round]
    finish: Callable[[Round], Sequence[outcome.Outcome[Any] | None]]
    pipeline: Pipeline


@dataclass(frozen=True, slots=True)
class _Note:
    """Something for the compute thread to do: what may touch sessions and pages ("call"), what only puts tasks in or takes them out
    ("task"), and what finishes rounds or is about them ("round")."""

    work: Callable[[], None]
    kind: Literal["call", "task", "round"] = "call"


_MOVED = _Note(lambda: None, "round")


@dataclass(frozen=True)
class _RoundDone:
    ended: float
    seconds: float
    tokens: int
    tasks: int


class Engine:
    """The compute thread, run by rounds.

    `run` keeps it alive; the other methods belong to the same trio loop. What is submitted and called takes effect in that order: a call
    runs after the round under way and before any part of a task that was submitted after it.

    Attributes:
        busy_s: seconds of computation so far.
        jobs: tasks answered so far.
        expected_wait_s: seconds that all that waits is expected to take, as estimated in the last quarter of a second.
        done: all work so far, by its kind, as of then.
    """

    def __init__(self, run: Run, scheduler: Scheduler, *, pipelined: Pipelined | None = None) -> None:
        """
        Args:
            run: runs a round on the compute thread. For each part, what its task's asker gets to hear; None where the task goes on.
            scheduler: decides the rounds; belongs to the compute thread from now on (`call(scheduler.forget, session)`).
            pipelined: how rounds are run on several devices instead; None where there is one.
        """
        self._run_parts = run
        self._pipelined = pipelined
        self._scheduler = scheduler
        self._inbox: queue.SimpleQueue[_Note] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._closing = False
        self.busy_s = 0.0
        self.jobs = 0
        self.expected_wait_s = 0.0
        self.done: Mapping[Kind, Done] = {}
        # The trio thread's.
        self._askers: set[_Asker] = set()
        self._asked = trio.Event()
        self._over = trio.Event()
        self._delays: collections.deque[tuple[float, float]] = collections.deque()
        self._rounds: collections.deque[_RoundDone] = collections.deque()
        # The compute thread's.
        self._by_task: dict[Task, _Asker] = {}
        self._held: collections.deque[_Note] = collections.deque()  # what waits for the rounds under way
        self._stopped = False
        self._estimated = 0.0
        self._failure: BaseException | None = None

    @property
    def queue_length(self) -> int:
        """Tasks and questions that wait or run."""
        return len(self._askers)

    @property
    def loop_delay(self) -> LoopDelay:
        since = time.perf_counter() - REMEMBERED_S
        while self._delays and self._delays[0][0] < since:
            self._delays.popleft()
        delays = [delay for _, delay in self._delays]
        return LoopDelay(statistics.median(delays), max(delays)) if delays else LoopDelay()

    @property
    def rounds(self) -> Rounds:
        self._forget_rounds(time.perf_counter())
        rounds = self._rounds
        return Rounds(len(rounds), sum(r.seconds for r in rounds), sum(r.tokens for r in rounds), sum(r.tasks for r in rounds))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the compute thread until cancelled; then waits for the round under way, tells those who still wait and ends the thread."""
        self._token = trio.lowlevel.current_trio_token()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(min(interval, SWITCH_INTERVAL_S))
        thread = threading.Thread(target=self._compute, args=(self._token,), name="petalnet-engine", daemon=True)
        thread.start()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_loop)
                task_status.started()
                await self._over.wait()
                nursery.cancel_scope.cancel()
            raise RuntimeError("the compute thread has ended") from self._failure
        finally:
            self._closing = True
            self._inbox.put(_Note(self._stop))
            with trio.CancelScope(shield=True):
                await self._over.wait()
                await trio.to_thread.run_sync(thread.join)
            sys.setswitchinterval(interval)

    async def submit(self, task: Task) -> Result[Any]:
        """Have a task computed, in as many rounds as it takes.

        A caller that is cancelled stops waiting at once; its task is dropped, and a part of it that is under way runs to its end unheard.

        Raises:
            PetalnetError: as the runner raised it.
            BusyError: the task ran out of memory.
            ServerError: the task failed in another way (logged with its traceback), or the engine is not running.
        """
        asker = await self._new_asker()
        self._inbox.put(_Note(lambda: self._enter(asker, task), "task"))
        result: Result[Any] = await self._answer_to(asker, lambda: self._withdraw(task))
        return result

    async def ask(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work(*args)` on the compute thread, between rounds, and wait for what it returns.

        Raises as `submit` does. If the caller is cancelled before the function has begun, it is not run.
        """
        asker = await self._new_asker()

        def run() -> None:
            if not asker.gone and not self._closing:
                self._tell([(asker, _hearable(outcome.capture(work, *args)))])

        self._inbox.put(_Note(run))
        value: T = await self._answer_to(asker, None)
        return value

    def call(self, work: Callable[..., object], *args: Any) -> None:
        """Run `work(*args)` on the compute thread, between rounds; nobody waits for it. After the engine's end nothing happens."""

        def run() -> None:
            try:
                work(*args)
            except Exception:
                # Nobody hears of it, and the thread has others to serve.
                log.exception("a call to the compute thread failed")

        self._inbox.put(_Note(run))

    # In the trio thread

    async def _new_asker(self) -> _Asker:
        if self._token is None or self._closing:
            raise _shutting_down()
        await trio.lowlevel.checkpoint_if_cancelled()
        asker = _Asker(trio.lowlevel.current_task())
        self._askers.add(asker)
        self._asked.set()
        return asker

    async def _answer_to(self, asker: _Asker, withdraw: Callable[[], None] | None) -> Any:
        def abort(raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
            asker.gone = True
            self._askers.discard(asker)
            if withdraw is not None:
                self._inbox.put(_Note(withdraw, "task"))
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)

    def _deliver(self, answers: list[tuple[_Asker, outcome.Outcome[Any]]], done: _RoundDone | None) -> None:
        for asker, answer in answers:
            if not asker.gone:
                self._askers.discard(asker)
                trio.lowlevel.reschedule(asker.trio_task, answer)
        if done is not None:
            self.jobs += len(answers)
            self.busy_s += done.seconds
            self._rounds.append(done)
            self._forget_rounds(done.ended)

    def _forget_rounds(self, now: float) -> None:
        while self._rounds and self._rounds[0].ended < now - REMEMBERED_S:
            self._rounds.popleft()

    def _end(self) -> None:
        """The thread is over: whoever still waits hears of it."""
        self._closing = True
        for asker in self._askers:
            asker.gone = True
            trio.lowlevel.reschedule(asker.trio_task, outcome.Error(_shutting_down()))
        self._askers.clear()
        self._over.set()

    async def _watch_loop(self) -> None:
        """Note how late the loop is, while there is work."""
        while True:
            if not self._askers:
                self._asked = trio.Event()
                await self._asked.wait()
            began = time.perf_counter()
            await trio.sleep(LOOP_SAMPLE_S)
            now = time.perf_counter()
            self._delays.append((now, max(0.0, now - began - LOOP_SAMPLE_S)))
            while self._delays[0][0] < now - REMEMBERED_S:
                self._delays.popleft()

    # In the compute thread

    def _compute(self, token: trio.lowlevel.TrioToken) -> None:
        pipeline = None if self._pipelined is None else self._pipelined.pipeline
        try:
            if pipeline is not None:
                pipeline.begin(
                    lambda: self._inbox.put(_MOVED), lambda begun: self._inbox.put(_Note(partial(self._take_back, begun), "round"))
                )
            while not self._stopped:
                if self._held or (pipeline is not None and not pipeline.has_room):
                    self._wait(None)
                else:
                    self._decide()
                self._drain()
        except BaseException as error:
            # A defect of the scheduler or of this class: without the thread nobody is served, so `run` raises it.
            log.exception("the compute thread failed")
            self._failure = error
        finally:
            if pipeline is not None:
                pipeline.end()
            with contextlib.suppress(trio.RunFinishedError):  # the loop is gone, and with it whoever waited
                token.run_sync_soon(self._end)

    def _decide(self) -> None:
        """Run the next round, or wait for what comes in."""
        decision = self._scheduler.next(time.perf_counter())
        if not isinstance(decision, list):
            if decision is None and not self._rounds_under_way:
                self.expected_wait_s = 0.0
            self._wait(decision)
        elif self._pipelined is None:
            self._run_round(decision)
        else:
            self._start_round(self._pipelined, decision)

    @property
    def _rounds_under_way(self) -> int:
        return 0 if self._pipelined is None else self._pipelined.pipeline.under_way

    def _wait(self, until: float | None) -> None:
        """Wait for something to come in, at the longest until then."""
        if until is None:
            self._take(self._inbox.get())
            return
        with contextlib.suppress(queue.Empty):
            self._take(self._inbox.get(timeout=max(0.0, until - time.perf_counter())))

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while not self._stopped:
                self._take(self._inbox.get_nowait())

    def _take(self, note: _Note) -> None:
        """Do what came in, unless it has to wait for the rounds under way, or for something else that has."""
        if note.kind == "round":
            note.work()
        elif self._held or (note.kind == "call" and self._rounds_under_way):
            self._held.append(note)
        else:
            note.work()
        while self._held and not self._rounds_under_way and not self._stopped:
            self._held.popleft().work()

    def _run_round(self, parts: list[Part]) -> None:
        started = time.perf_counter()
        outcomes: Sequence[outcome.Outcome[Any] | None]
        try:
            outcomes = self._run_parts(parts)
        except Exception as error:
            # The boundary of the compute thread: a round's failure is for those to hear whose round it was, and must not end the thread.
            outcomes = [outcome.Error(error)] * len(parts)
        now = time.perf_counter()
        self._account(parts, outcomes, now - started, now)

    def _start_round(self, pipelined: Pipelined, parts: list[Part]) -> None:
        """Begin a round, and have its devices run it."""
        started = time.perf_counter()
        try:
            begun = pipelined.begin(parts)
        except Exception as error:  # as in `_run_round`
            now = time.perf_counter()
            self._account(parts, [outcome.Error(error)] * len(parts), now - started, now)
            return
        begun.seconds += time.perf_counter() - started
        pipelined.pipeline.start(begun)

    def _take_back(self, begun: Round) -> None:
        """A round was run by all of its devices."""
        assert self._pipelined is not None
        self._pipelined.pipeline.finished()
        started = time.perf_counter()
        outcomes: Sequence[outcome.Outcome[Any] | None]
        try:
            outcomes = self._pipelined.finish(begun)
        except Exception as error:  # as in `_run_round`
            outcomes = [outcome.Error(error)] * len(begun.parts)
        now = time.perf_counter()
        self._account(begun.parts, outcomes, begun.seconds + now - started, now)

    def _account(self, parts: Sequence[Part], outcomes: Sequence[outcome.Outcome[Any] | None], seconds: float, now: float) -> None:
        """A round was computed, in so many seconds: tell the scheduler, and whoever waits for what it has completed."""
        complete = self._scheduler.finished(parts, seconds, now)
        answers: list[tuple[_Asker, outcome.Outcome[Any]]] = []
        for part, result in zip(parts, outcomes, strict=True):
            asker = self._by_task.get(part.task)
            if asker is None:  # gone while the round was under way, or an earlier part has failed
                if isinstance(result, outcome.Error):
                    result.error.__traceback__ = None  # see `_hearable`
                continue
            asker.compute_s += seconds
            if result is None and part.task in complete:
                result = outcome.Error(RuntimeError("a task is complete, and its runner has no answer"))
            if result is None:
                continue
            self._leave(part.task)
            if isinstance(result, outcome.Value):
                there_s = now - asker.submitted
                compute_s = min(asker.compute_s, there_s)  # on several devices, rounds of one task overlap
                result = outcome.Value(Result(result.value, there_s - compute_s, compute_s))
            answers.append((asker, _hearable(result)))
        self._tell(answers, _RoundDone(now, seconds, sum(map(_tokens, parts)), len(parts)))
        if now - self._estimated > ESTIMATE_GAP_S:
            self._estimated = now
            self.expected_wait_s = self._scheduler.expected_wait()
            self.done = self._scheduler.done()

    def _enter(self, asker: _Asker, task: Task) -> None:
        if not asker.gone:
            self._by_task[task] = asker
            self._scheduler.add(task, asker.submitted)

    def _leave(self, task: Task) -> None:
        if self._by_task.pop(task, None) is not None:
            self._scheduler.drop(task)

    def _withdraw(self, task: Task) -> None:
        """Nobody waits for a task any more. A part of it may be under way: what is asked later begins after that."""
        if self._rounds_under_way:
            self._held.append(_Note(lambda: None))
        self._leave(task)

    def _stop(self) -> None:
        self._stopped = True

    def _tell(self, answers: list[tuple[_Asker, outcome.Outcome[Any]]], done: _RoundDone | None = None) -> None:
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._deliver, answers, done)


def _tokens(part: Part) -> int:
    """Of a step, all that are done; of a pass, which goes through the blocks in several rounds, a share of them."""
    return round(part.tokens * part.weight) if part.task.kind == "pass" else part.tokens


def _shutting_down() -> ServerError:
    return ServerError("the server is shutting down")


def _hearable(result: outcome.Outcome[Any]) -> outcome.Outcome[Any]:
    """A result as its asker may hear of it: errors of other kinds than ours are logged, and told without their details.

    Errors lose their tracebacks. The compute thread's frames in them refer to the outcome, so to the error again, and to the task with all
    of its arrays: cycles that stay until the collector looks at them, which does not know how large they are.
    """
    if not isinstance(result, outcome.Error):
        return result
    error = result.error
    if isinstance(error, PetalnetError):
        error.__traceback__ = None
        return result
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator: can't allocate" in str(error):
        error.__traceback__ = None
        log.warning("a task did not fit into memory")
        return outcome.Error(BusyError("the server ran out of memory for this request"))
    log.error("a task of the compute thread failed", exc_info=error)
    error.__traceback__ = None
    failure = ServerError(f"computation failed: {type(error).__name__}")
    failure.__cause__ = error
    return outcome.Error(failure)
