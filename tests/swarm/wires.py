"""Wires between the processes of a test, which can be cut and made slow: relays on loopback that every node is announced behind.

A cut wire is as a network that loses everything: nothing is closed, nothing is refused, what was sent is on its way until the wire is
mended. Each connection knows the processes at both its ends, so that one process can be cut off from all, or two from each other, whoever
called whom. Faults can be set to happen at a moment of the traffic: just before the next so many bytes are handed to a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import psutil

PIECE = 64 * 1024
CALLED_WITHIN_S = 20.0


@dataclass
class Fuse:
    """What happens once `left` more bytes have come for one of the processes; `victim` is the one then."""

    pids: Collection[int]
    left: int
    action: Callable[[int], None]
    victim: int | None = None
    fired: threading.Event = field(default_factory=threading.Event)


class Wires:
    """Relays for the nodes of a test, in a thread of their own; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._pids: dict[int, int] = {}
        """Of each relay's port the process behind it."""
        self._cut: set[frozenset[int]] = set()
        """Processes that are cut off, and pairs of them."""
        self._late: dict[int, float] = {}
        self._fuses: list[Fuse] = []
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Wires:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        async def end() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(CALLED_WITHIN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALLED_WITHIN_S)
        self._loop.close()

    # ---- for the test

    def open_port(self) -> int:
        """A port that is relayed to the process that is named by `lead` later."""

        async def listen() -> int:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            task = self._loop.create_task(server.serve_forever())
            self._tasks.add(task)
            port: int = server.sockets[0].getsockname()[1]
            return port

        return asyncio.run_coroutine_threadsafe(listen(), self._loop).result(CALLED_WITHIN_S)

    def lead(self, port: int, pid: int) -> None:
        """What comes to this relay is for this process, wherever it listens."""
        self._pids[port] = pid

    def cut(self, *pids: int) -> None:
        """Nothing comes through any more to and from this process, or between these two."""
        self._set(lambda: self._cut.add(frozenset(pids)))

    def mend(self, *pids: int) -> None:
        """Undo `cut` and `delay` of this process, or all of them."""

        def undo() -> None:
            self._cut = {cut for cut in self._cut if pids and not cut.intersection(pids)}
            for pid in pids or tuple(self._late):
                self._late.pop(pid, None)

        self._set(undo)

    def delay(self, pid: int, seconds: float) -> None:
        """Whatever goes to or comes from this process takes so much longer."""
        self._set(lambda: self._late.update({pid: seconds}))

    def when(self, pids: Collection[int], size: int, action: Callable[[int], None]) -> Fuse:
        """Carry out `action` with the process to which the next `size` bytes in all have come, before it gets the last of them.

        It is done on the thread of the wires, once, and must not wait.
        """
        fuse = Fuse(pids, size, action)
        self._set(lambda: self._fuses.append(fuse))
        return fuse

    def disarm(self) -> None:
        """Forget what has not happened."""
        self._set(self._fuses.clear)

    def _set(self, change: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:  # of an action
            self._change(change)
            return
        done = threading.Event()

        def run() -> None:
            self._change(change)
            done.set()

        self._loop.call_soon_threadsafe(run)
        if not done.wait(CALLED_WITHIN_S):
            raise RuntimeError("the thread of the wires hangs")

    def _change(self, change: Callable[[], None]) -> None:
        change()
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- on the thread

    def _is_cut(self, ends: frozenset[int]) -> bool:
        return any(cut <= ends for cut in self._cut)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        onward: asyncio.StreamWriter | None = None
        try:
            port = writer.get_extra_info("sockname")[1]
            callee, caller = self._pids[port], self._caller(writer.get_extra_info("peername")[1])
            ends = frozenset((caller, callee))
            while self._is_cut(ends):
                await self._changed.wait()
            answers, onward = await asyncio.open_connection("127.0.0.1", listening_port(callee))
            there = self._carry(reader, onward, ends, callee)
            back = self._carry(answers, writer, ends, caller)
            carrying = [asyncio.ensure_future(there), asyncio.ensure_future(back)]
            try:
                await asyncio.gather(*carrying)
            finally:
                for one in carrying:
                    one.cancel()
        except (OSError, EOFError, psutil.Error, LookupError):
            pass  # an end of it went away: so does the other
        finally:
            for end in (writer, onward):
                if end is not None:
                    with contextlib.suppress(OSError, RuntimeError):
                        end.close()  # what has come through already is still handed over

    def _caller(self, port: int) -> int:
        """The process whose end of a connection has this port. Raises LookupError."""
        for pid in {psutil.Process().pid, *self._pids.values(), *children()}:
            with contextlib.suppress(psutil.Error):
                if any(one.laddr and one.laddr.port == port for one in psutil.Process(pid).net_connections("tcp4") if one.raddr):
                    return pid
        raise LookupError("a caller that nobody knows")

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ends: frozenset[int], to: int) -> None:
        """One direction of a connection, until its end."""
        ahead: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def read() -> None:
            while data := await reader.read(PIECE):
                delay_s = sum(self._late.get(end, 0.0) for end in ends)
                await ahead.put((self._loop.time() + delay_s, data))
            await ahead.put((0.0, b""))

        reading = asyncio.ensure_future(read())
        try:
            while True:
                due, data = await ahead.get()
                if due > self._loop.time():
                    await asyncio.sleep(due - self._loop.time())
                self._burn(to, len(data))
                while self._is_cut(ends):
                    await self._changed.wait()
                if not data:
                    raise EOFError
                writer.write(data)
                await writer.drain()
        finally:
            reading.cancel()

    def _burn(self, to: int, size: int) -> None:
        for fuse in [fuse for fuse in self._fuses if to in fuse.pids]:
            fuse.left -= size
            if fuse.left <= 0:
                self._fuses.remove(fuse)
                fuse.victim = to
                fuse.action(to)
                fuse.fired.set()


def listening_port(pid: int) -> int:
    """Where this process takes connections. Raises LookupError, psutil.Error."""
    ports = [one.laddr.port for one in psutil.Process(pid).net_connections("tcp4") if one.status == psutil.CONN_LISTEN]
    if not ports:
        raise LookupError(f"process {pid} listens nowhere")
    return ports[0]


def children() -> Iterator[int]:
    """All processes that this one has started, and theirs."""
    for process in psutil.Process().children(recursive=True):
        yield process.pid
