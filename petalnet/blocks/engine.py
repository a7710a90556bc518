"""One thread that computes, fed by tasks that wait.

The trio thread hands a function over and goes on serving the network; the compute thread runs the functions one by one, in the order
in which they came. Whatever touches the span or a cache runs there, so none of it needs a lock.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import outcome
import torch
import trio

from petalnet.errors import BusyError, PetalnetError, ServerError

log = logging.getLogger(__name__)
T = TypeVar("T")

SWITCH_INTERVAL_S = 0.0005
"""How often Python's threads take turns while the engine runs. At the default of 5 ms, a message waits up to 5 ms for a busy compute
thread to let go; at this value 0.5 ms, and the computation does not slow measurably."""


@dataclass(frozen=True)
class Result(Generic[T]):
    """What a job returned, and the seconds that it waited in the queue and ran."""

    value: T
    queue_s: float
    compute_s: float


@dataclass(eq=False)
class _Job:
    work: Callable[[], Any]
    task: trio.lowlevel.Task
    submitted: float = field(default_factory=time.perf_counter)
    abandoned: bool = False


class Engine:
    """The compute thread. `run` keeps it alive; `submit` may be awaited by any task of the same trio loop meanwhile.

    Attributes:
        busy_s: seconds of computation so far.
        jobs: jobs finished so far.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._closing = False
        self._waiting = 0
        self.busy_s = 0.0
        self.jobs = 0

    @property
    def queue_length(self) -> int:
        """Jobs that wait or run."""
        return self._waiting

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the compute thread until cancelled; then waits for the job under way, drops the others and ends the thread."""
        self._token = trio.lowlevel.current_trio_token()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(min(interval, SWITCH_INTERVAL_S))
        thread = threading.Thread(target=self._loop, args=(self._token,), name="petalnet-engine", daemon=True)
        thread.start()
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            self._closing = True
            self._queue.put(None)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(thread.join)
            sys.setswitchinterval(interval)

    async def submit(self, work: Callable[..., T], *args: Any) -> Result[T]:
        """Run `work(*args)` on the compute thread.

        A caller that is cancelled stops waiting at once; its job is dropped if it has not begun, and otherwise runs to its end unheard.

        Raises:
            PetalnetError: as the job raised it.
            BusyError: the job ran out of memory.
            ServerError: the job failed in another way (logged with its traceback), or the engine is not running.
        """
        if self._token is None or self._closing:
            raise ServerError("the server is shutting down")
        await trio.lowlevel.checkpoint_if_cancelled()
        job = _Job(lambda: work(*args), trio.lowlevel.current_task())
        self._waiting += 1
        self._queue.put(job)

        def abort(raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
            job.abandoned = True
            return trio.lowlevel.Abort.SUCCEEDED

        result: Result[T] = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    def _loop(self, token: trio.lowlevel.TrioToken) -> None:
        while (job := self._queue.get()) is not None:
            started = time.perf_counter()
            result = outcome.Error(ServerError("the server is shutting down")) if self._closing else _capture(job, started)
            with contextlib.suppress(trio.RunFinishedError):  # the loop is gone, and with it whoever waited
                token.run_sync_soon(self._finish, job, result, time.perf_counter() - started)

    def _finish(self, job: _Job, result: outcome.Outcome[Any], seconds: float) -> None:
        """Account for a job and wake the task that waits for it; runs in the trio thread."""
        self._waiting -= 1
        self.jobs += 1
        self.busy_s += seconds
        if not job.abandoned:
            trio.lowlevel.reschedule(job.task, result)


def _capture(job: _Job, started: float) -> outcome.Outcome[Any]:
    if job.abandoned:
        return outcome.Value(None)
    try:
        value = job.work()
    except PetalnetError as error:
        return outcome.Error(error)
    except (MemoryError, torch.OutOfMemoryError):
        log.warning("a job did not fit into memory")
        return outcome.Error(BusyError("the server ran out of memory for this request"))
    except Exception as error:
        # The boundary of the compute thread: a job's failure is its caller's to hear of, and must not end the thread.
        log.exception("a job of the compute thread failed")
        failure = ServerError(f"computation failed: {type(error).__name__}")
        failure.__cause__ = error
        return outcome.Error(failure)
    return outcome.Value(Result(value, started - job.submitted, time.perf_counter() - started))
