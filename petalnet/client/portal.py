"""The trio thread behind the synchronous API: one a process, started on first use.

Synchronous code hands coroutines over with `Portal.run` (waits) or `Portal.start` (does not). Any thread may do so at any time, also one
that already runs an event loop (a notebook's). A KeyboardInterrupt while waiting cancels the coroutine and returns at once. The thread is
a daemon: it keeps no script alive, and an exit handler winds it down within a bound. A forked child has no such thread, so it forgets
the parent's portal and starts its own if it ever needs one.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, TypeVarTuple

import trio

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

WIND_DOWN_S = 1.0
"""How long the exit handler waits for services to say goodbye to their peers."""


class Job(Generic[T]):
    """A coroutine that runs on the portal's thread, seen from outside."""

    def __init__(self, portal: Portal, function: Callable[..., Awaitable[T]], arguments: tuple[Any, ...]) -> None:
        self._portal = portal
        self._function = function
        self._arguments = arguments
        self._scope = trio.CancelScope()
        self._running = threading.Lock()  # held until there is a result; a lock is the cheapest event that one thread waits for
        self._running.acquire()
        self._value: T | None = None
        self._error: BaseException | None = None

    async def run(self) -> None:
        """On the portal's thread: run the coroutine and keep what comes out of it, exceptions included."""
        try:
            with self._scope:
                self._value = await self._function(*self._arguments)
            if self._scope.cancelled_caught:
                self._error = JobCancelled("the operation was cancelled")
        except trio.Cancelled:
            self._error = PortalClosed("the client's network thread is shutting down")
            raise
        except Exception as error:  # not swallowed: `result` raises it in the thread that asked
            self._error = error
        finally:
            self._running.release()

    def abandon(self, error: BaseException) -> None:
        self._error = error
        self._running.release()

    def cancel(self) -> None:
        """Ask the coroutine to stop; from any thread, returns at once."""
        self._portal.call_soon(self._scope.cancel)

    def result(self) -> T:
        """Wait for the coroutine and return its value or raise its exception."""
        self._running.acquire()
        self._running.release()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or its traceback and this frame would keep each other, and the session, alive
        return self._value  # type: ignore[return-value]


class JobCancelled(RuntimeError):
    """A coroutine was cancelled from another thread."""


class PortalClosed(RuntimeError):
    """The portal's thread has ended, or is about to."""


class Portal:
    """A thread that runs trio; see the module's docstring."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._started = threading.Event()
        self._closed = False
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="petalnet-portal", daemon=True)
        self._thread.start()

    async def _main(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._started.set()
            await trio.sleep_forever()

    @property
    def alive(self) -> bool:
        """True while coroutines can be run, and only in the process that made the portal."""
        return self._pid == os.getpid() and not self._closed and self._thread.is_alive()

    def run(self, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
        """Run `function(*arguments)` on the portal's thread and wait for it.

        Raises:
            PortalClosed: the portal's thread has ended.
            RuntimeError: called on the portal's own thread, where waiting would never end.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("the synchronous API was called from the client's own network thread")
        job: Job[T] = Job(self, function, arguments)
        try:
            self._hand_over(job)
            return job.result()
        except KeyboardInterrupt:  # wherever in here it came
            job.cancel()
            raise

    def start(self, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> Job[T]:
        """Run `function(*arguments)` on the portal's thread without waiting."""
        job: Job[T] = Job(self, function, arguments)
        self._hand_over(job)
        return job

    def _hand_over(self, job: Job[Any]) -> None:
        self._started.wait()
        if self.alive:
            self.call_soon(self._begin, job)
        else:
            job.abandon(PortalClosed("the client's network thread has ended"))

    def _begin(self, job: Job[Any]) -> None:
        try:
            self._nursery.start_soon(job.run)  # type: ignore[union-attr]
        except RuntimeError:  # the nursery was closed between the check and now
            job.abandon(PortalClosed("the client's network thread is shutting down"))

    def call_soon(self, function: Callable[[*Ts], object], *arguments: *Ts) -> None:
        """Call a plain function on the portal's thread, soon; nothing happens where that thread has ended."""
        if self._token is not None and self._pid == os.getpid():
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function, *arguments)

    def close(self, timeout_s: float = WIND_DOWN_S) -> None:
        """Cancel everything and wait at most `timeout_s` for the thread to end."""
        if not self.alive:
            return
        self._closed = True
        self._started.wait()
        self.call_soon(self._nursery.cancel_scope.cancel)  # type: ignore[union-attr]
        self._thread.join(timeout_s)


_lock = threading.Lock()
_portal: Portal | None = None


def get_portal() -> Portal:
    """This process's portal, started if there is none."""
    global _portal
    with _lock:
        if _portal is None or not _portal.alive:
            _portal = Portal()
        return _portal


def _forget() -> None:
    """In a forked child: its copies of the lock and the portal belong to threads that do not exist here."""
    global _lock, _portal
    _lock = threading.Lock()
    _portal = None


def _close_at_exit() -> None:
    if _portal is not None:
        _portal.close()


os.register_at_fork(after_in_child=_forget)
atexit.register(_close_at_exit)
