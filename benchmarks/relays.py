"""Distance on one machine without root: a relay for TCP before each host, which passes on late what comes, in both directions.

    python benchmarks/relays.py --rtt-ms 40 --mbit 100 4001:5001 4002:5002

listens at 127.0.0.1:4001 for a program at 127.0.0.1:5001, and so on; it prints a line once it listens. A node listens at the second port
and announces the first. Less of a long way than hosts of their own (`tests/nat/distance.py`): both ends of a connection see a short one,
so there is no slow start, and windows that grow with the distance stay small; and a rate is that of a connection, not of a host.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import selectors
import socket
import sys
from collections import deque

_PIECE_BYTES = 64 * 1024
_BUFFER_BYTES = 64 * 1024
"""What a connection may hold beyond what is under way, as a router on the way would."""
_UNBOUNDED_WAY_BYTES = 4 * 1024 * 1024


class Way:
    """One direction of a connection: what was read, and when it arrives."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float, bytes_per_s: float | None) -> None:
        self._reader, self._writer = reader, writer
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._bound = _BUFFER_BYTES + (_UNBOUNDED_WAY_BYTES if bytes_per_s is None else round(bytes_per_s * delay_s))
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        """Carry until one of the ends is gone."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take())
            tasks.create_task(self._deliver())

    async def _take(self) -> None:
        loop, free_at, data = asyncio.get_running_loop(), 0.0, b"x"
        while data:
            async with self._changed:
                await self._changed.wait_for(lambda: self._held < self._bound)
            try:
                data = await self._reader.read(_PIECE_BYTES if self._bytes_per_s is None else 4096)
            except OSError:
                data = b""
            sent_at = loop.time()
            if self._bytes_per_s is not None:
                sent_at = free_at = max(sent_at, free_at) + len(data) / self._bytes_per_s
            async with self._changed:
                self._pieces.append((sent_at + self._delay_s, data))
                self._held += len(data)
                self._changed.notify_all()

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._pieces)
                    due, data = self._pieces.popleft()
                    self._held -= len(data)
                    self._changed.notify_all()
                if (wait_s := due - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                if not data:
                    break
                self._writer.write(data)
                await self._writer.drain()
        with contextlib.suppress(OSError):
            self._writer.close()


async def relay(listening: int, target: int, delay_s: float, bytes_per_s: float | None) -> None:
    """Stand before the program at one port of this machine, at another."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        for end in (writer, other_writer):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = (Way(reader, other_writer, delay_s, bytes_per_s), Way(other_reader, writer, delay_s, bytes_per_s))
        await asyncio.gather(*(way.run() for way in ways))

    server = await asyncio.start_server(carry, "127.0.0.1", listening)
    await server.start_serving()


async def run(pairs: list[tuple[int, int]], rtt_ms: float, mbit: float | None) -> None:
    for listening, target in pairs:
        await relay(listening, target, rtt_ms / 2000, None if mbit is None else mbit * 125_000)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", type=float, required=True)
    parser.add_argument("--mbit", type=float)
    parser.add_argument("pairs", nargs="+", metavar="LISTENING:TARGET")
    options = parser.parse_args()
    pairs = [(int(listening), int(target)) for listening, _, target in (pair.partition(":") for pair in options.pairs)]
    # Not epoll, whose time-outs are whole milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(run(pairs, options.rtt_ms, options.mbit))


if __name__ == "__main__":
    main()
