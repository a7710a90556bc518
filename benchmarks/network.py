"""What the network costs: round trips and bulk transfer of raw TCP, of stock py-libp2p and of petalnet, in the same run.

    python benchmarks/network.py

Two processes on loopback for each stack, which take turns in every round; the table has the medians over rounds (of the p50 of a
round, for round trips).

    raw TCP         trio's sockets, no encryption: what the machine allows
    stock libp2p    `new_host()` as it comes: Noise and yamux
    muxed stream    petalnet's transport, session and muxer, without messages
    petalnet        the same by the public API: `Host.open_stream`, `Stream.send` and `Stream.receive` of messages with an array

A round trip sends the bytes and gets the same back; bulk goes one way and is over when the other side says that it has all of it.
"beside bulk" is a round trip of 1 KB while four more streams of the same connection send as fast as they can; raw TCP has a
connection for each stream there. A stack that fails or takes too long is started anew, and the table says how often.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import selectors
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from swarm_processes import Bench, bench, print_table

KILO, MEGA = 1024, 1024 * 1024
STACKS = {"tcp": "raw TCP", "stock": "stock libp2p", "muxed": "muxed stream", "petalnet": "petalnet"}
ROUND_TRIPS = {"64 B": (64, 300), "28 KB": (28 * KILO, 100), "1 MB": (MEGA, 20)}
BULK_BYTES, BULK_PIECE, BULK_STREAMS = 64 * MEGA, MEGA, 4
BESIDE_BYTES, BESIDE_COUNT, BESIDE_AFTER_S = KILO, 60, 0.2
START_WITHIN_S, MEASURED_WITHIN_S = 30.0, 60.0

HEAD = struct.Struct("!BI")
ECHO, TAKE, SETTLE = range(3)


# ---- the stacks, each with one way to be served and one to connect


class Bytes:
    """One stream of a stack that carries plain bytes; the other side runs `serve_bytes`."""

    def __init__(self, read: Callable[[int], Awaitable[bytes]], write: Callable[[bytes], Awaitable[None]]) -> None:
        self._read = read
        self._write = write

    def prepare(self, data: bytes, *, echo: bool) -> bytes:
        return HEAD.pack(ECHO if echo else TAKE, len(data)) + data

    async def round_trip(self, prepared: bytes) -> Any:
        await self._write(prepared)
        return await read_exactly(self._read, len(prepared) - HEAD.size)

    async def push(self, prepared: bytes) -> None:
        await self._write(prepared)

    async def settle(self) -> None:
        """Until the other side has taken all that was pushed."""
        await self._write(HEAD.pack(SETTLE, 0))
        await read_exactly(self._read, 1)


async def serve_bytes(read: Callable[[int], Awaitable[bytes]], write: Callable[[bytes], Awaitable[None]]) -> None:
    while True:
        what, size = HEAD.unpack(await read_exactly(read, HEAD.size))
        if what == ECHO:
            await write(await read_exactly(read, size))
        elif what == TAKE:
            while size:
                size -= len(await some(read, min(size, 256 * KILO)))
        else:
            await write(b"\0")


async def read_exactly(read: Callable[[int], Awaitable[bytes]], size: int) -> bytes | bytearray:
    data = await some(read, size)
    if len(data) == size:
        return data
    gathered = bytearray(data)
    while len(gathered) < size:
        gathered += await some(read, size - len(gathered))
    return gathered


async def some(read: Callable[[int], Awaitable[bytes]], size: int) -> bytes:
    data = await read(size)
    if not data:
        raise EOFError
    return data


class Messages:
    """One stream of petalnet's, used as its parts use it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def prepare(self, data: bytes, *, echo: bool) -> bytes:
        return data

    async def round_trip(self, prepared: bytes) -> Any:
        await self._stream.send(self._message(prepared))
        return (await self._stream.receive()).output.data

    async def push(self, prepared: bytes) -> None:
        await self._stream.send(self._message(prepared, step=TAKE))

    async def settle(self) -> None:
        from petalnet.p2p.messages import Ping, Pong

        await self._stream.send(Ping(1))
        if not isinstance(await self._stream.receive(), Pong):
            raise EOFError

    @staticmethod
    def _message(data: bytes, step: int = ECHO) -> Any:
        from petalnet.p2p.fields import Blob
        from petalnet.p2p.session_messages import StepDone

        return StepDone(step=step, position=0, output=Blob("uint8", (len(data),), "raw", data))


async def serve_messages(stream: Any) -> None:
    from petalnet.p2p.messages import Ping, Pong

    while (message := await stream.receive()) is not None:
        if isinstance(message, Ping):
            await stream.send(Pong(message.nonce))
        elif message.step == ECHO:
            await stream.send(message)


Open = Callable[[], Awaitable[Bytes | Messages]]
"""Opens one more stream to the server."""


@asynccontextmanager
async def serve_tcp() -> AsyncIterator[list[str]]:
    async def serve(stream: trio.SocketStream) -> None:
        try:
            await serve_bytes(lambda size: stream.receive_some(size), stream.send_all)
        except (EOFError, trio.BrokenResourceError):
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        yield [str(listeners[0].socket.getsockname()[1])]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connect_tcp(address: list[str]) -> AsyncIterator[Open]:
    async def open_one() -> Bytes:
        stream = await trio.open_tcp_stream("127.0.0.1", int(address[0]))
        return Bytes(lambda size: stream.receive_some(size), stream.send_all)

    yield open_one


@asynccontextmanager
async def stock_host(listen: bool) -> AsyncIterator[Any]:
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from multiaddr import Multiaddr

    logging.disable(logging.CRITICAL)  # as petalnet does for itself: stock logs several lines for each frame
    host = new_host(key_pair=create_new_key_pair())
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")] if listen else []):
        yield host


@asynccontextmanager
async def serve_stock() -> AsyncIterator[list[str]]:
    from libp2p.custom_types import TProtocol
    from libp2p.exceptions import BaseLibp2pError

    async def serve(stream: Any) -> None:
        try:
            await serve_bytes(stream.read, stream.write)
        except (EOFError, BaseLibp2pError):
            return  # an exception that escapes from here ends the host

    async with stock_host(listen=True) as host:
        host.set_stream_handler(TProtocol("/bench/1.0.0"), serve)
        yield [str(addr) for addr in host.get_addrs()]


@asynccontextmanager
async def connect_stock(address: list[str]) -> AsyncIterator[Open]:
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    async with stock_host(listen=False) as host:
        info = info_from_p2p_addr(Multiaddr(address[0]))
        await host.connect(info)

        async def open_one() -> Bytes:
            stream = await host.new_stream(info.peer_id, [TProtocol("/bench/1.0.0")])
            return Bytes(stream.read, stream.write)

        yield open_one


def bench_protocol() -> Any:
    from petalnet.p2p.frames import FrameLimits
    from petalnet.p2p.protocols import Protocol

    # A stream has nothing to do while the other stacks have their turn, which may take a while where one of them fails.
    return Protocol("/petalnet/bench/1.0.0", limits=FrameLimits(header=4096, payload=64 * MEGA), idle_timeout_s=3600.0)


@asynccontextmanager
async def petalnet_host(listen: bool) -> AsyncIterator[Any]:
    from petalnet.p2p.host import open_host
    from petalnet.p2p.identity import Identity

    async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"] if listen else []) as host:
        yield host


@asynccontextmanager
async def serve_petalnet() -> AsyncIterator[list[str]]:
    async with petalnet_host(listen=True) as host:
        host.serve(bench_protocol(), serve_messages)
        yield host.addrs


@asynccontextmanager
async def connect_petalnet(address: list[str]) -> AsyncIterator[Open]:
    async with petalnet_host(listen=False) as host:

        async def open_one() -> Messages:
            return Messages(await host.open_stream(address[0].rpartition("/")[2], bench_protocol(), addrs=address))

        yield open_one


MUXED_ID = "/petalnet/bench-muxed/1.0.0"


@asynccontextmanager
async def serve_muxed() -> AsyncIterator[list[str]]:
    from libp2p.custom_types import TProtocol
    from libp2p.exceptions import BaseLibp2pError

    async def serve(stream: Any) -> None:
        try:
            await serve_bytes(stream.muxed_stream.read, stream.muxed_stream.write)
        except (EOFError, BaseLibp2pError):
            return

    async with petalnet_host(listen=True) as host:
        host.libp2p.set_stream_handler(TProtocol(MUXED_ID), serve)
        yield host.addrs


@asynccontextmanager
async def connect_muxed(address: list[str]) -> AsyncIterator[Open]:
    from libp2p.custom_types import TProtocol

    async with petalnet_host(listen=False) as host:

        async def open_one() -> Bytes:
            peer_id = address[0].rpartition("/")[2]
            stream = (await host._new_stream(peer_id, [TProtocol(MUXED_ID)], address, START_WITHIN_S)).muxed_stream
            return Bytes(stream.read, stream.write)

        yield open_one


SERVE: dict[str, Callable[[], AbstractAsyncContextManager[list[str]]]] = {
    "tcp": serve_tcp,
    "stock": serve_stock,
    "muxed": serve_muxed,
    "petalnet": serve_petalnet,
}
CONNECT: dict[str, Callable[[list[str]], AbstractAsyncContextManager[Open]]] = {
    "tcp": connect_tcp,
    "stock": connect_stock,
    "muxed": connect_muxed,
    "petalnet": connect_petalnet,
}


# ---- what a client process measures when it is told to; seconds


async def round_trips(stream: Bytes | Messages, size: int, count: int) -> list[float]:
    data = os.urandom(size)
    prepared = stream.prepare(data, echo=True)
    if bytes(await stream.round_trip(prepared)) != data:
        raise ValueError("other bytes came back than were sent")
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await stream.round_trip(prepared)
        taken.append(time.perf_counter() - began)
    return taken


async def bulk(stream: Bytes | Messages, size: int) -> list[float]:
    piece = stream.prepare(os.urandom(BULK_PIECE), echo=False)
    await stream.push(piece)
    await stream.settle()
    began = time.perf_counter()
    for _ in range(size // BULK_PIECE):
        await stream.push(piece)
    await stream.settle()
    return [time.perf_counter() - began]


async def beside_bulk(stream: Bytes | Messages, others: list[Bytes | Messages], count: int) -> tuple[list[float], float]:
    """The round trips, and the bytes a second that the others sent altogether."""
    stop, pushed = False, 0

    async def keep_pushing(other: Bytes | Messages) -> None:
        nonlocal pushed
        piece = other.prepare(os.urandom(BULK_PIECE), echo=False)
        while not stop:
            await other.push(piece)
            pushed += BULK_PIECE
        await other.settle()

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for other in others:
            nursery.start_soon(keep_pushing, other)
        await trio.sleep(BESIDE_AFTER_S)  # until the others are at full speed
        taken = await round_trips(stream, BESIDE_BYTES, count)
        stop = True
    return taken, pushed / (time.perf_counter() - began)


async def run_client(stack: str, address: list[str]) -> None:
    async with CONNECT[stack](address) as open_one:
        stream = await open_one()
        others = [await open_one() for _ in range(BULK_STREAMS)]
        say({"ready": True})
        while command := await trio.to_thread.run_sync(sys.stdin.readline):
            wanted = json.loads(command)
            if wanted["what"] == "bulk":
                say({"seconds": await bulk(stream, wanted["size"])})
            elif wanted["what"] == "beside":
                taken, rate = await beside_bulk(stream, others, wanted["count"])
                say({"seconds": taken, "rate": rate})
            else:
                say({"seconds": await round_trips(stream, wanted["size"], wanted["count"])})


async def run_server(stack: str) -> None:
    async with SERVE[stack]() as address:
        say({"address": address})
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)  # its end is the server's


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


# ---- the process that conducts


class Failed(Exception):
    """A process of a stack ended or was silent for too long."""


class Pair:
    """The server and the client process of one stack."""

    def __init__(self, running: Bench, stack: str) -> None:
        self._running = running
        self._stack = stack
        self._processes: list[subprocess.Popen[bytes]] = []
        self.failures = 0

    def measure(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What the client measures: "seconds", and "rate" beside bulk. Raises Failed; the pair is started anew the next time."""
        try:
            if not self._processes:
                self._start()
            client = self._processes[1]
            if client.stdin is None:
                raise Failed
            client.stdin.write(json.dumps(wanted).encode() + b"\n")
            client.stdin.flush()
            return answer_of(client, MEASURED_WITHIN_S)
        except (Failed, BrokenPipeError):
            self.failures += 1
            self.stop()
            raise Failed from None

    def _start(self) -> None:
        self._spawn("--run-server")
        address = answer_of(self._processes[0], START_WITHIN_S)["address"]
        self._spawn("--run-client", *address)
        answer_of(self._processes[1], START_WITHIN_S)

    def _spawn(self, *arguments: str) -> None:
        command = [sys.executable, __file__, "--stacks", self._stack, *arguments]
        with (self._running.folder / f"{self._stack}{arguments[0]}.log").open("ab") as log:
            self._processes.append(self._running.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log))

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def last_words(self) -> str:
        logs = sorted(self._running.folder.glob(f"{self._stack}--run-*.log"))
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in logs)


def answer_of(process: subprocess.Popen[bytes], within_s: float) -> dict[str, Any]:
    """The next line that a process prints."""
    if process.stdout is None:
        raise Failed
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(within_s):
            raise Failed
    line = process.stdout.readline()
    if not line:
        raise Failed
    answer: dict[str, Any] = json.loads(line)
    return answer


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def measure_all(running: Bench, stacks: list[str], rounds: int, progress: bool) -> tuple[dict[str, dict[str, float]], dict[str, Pair]]:
    """For each stack the median over rounds of everything that is measured, by its name in the table."""
    pairs = {stack: Pair(running, stack) for stack in stacks}
    found: dict[str, dict[str, list[float]]] = {stack: {} for stack in stacks}

    def note(stack: str, name: str, value: float) -> None:
        found[stack].setdefault(name, []).append(value)

    jobs: list[tuple[str, dict[str, Any]]] = [
        (f"{name} p50 ms", {"what": "round trips", "size": size, "count": count}) for name, (size, count) in ROUND_TRIPS.items()
    ]
    jobs += [("64 MB, MB/s", {"what": "bulk", "size": BULK_BYTES}), ("beside", {"what": "beside", "count": BESIDE_COUNT})]
    for number in range(-1, rounds):  # the first one warms up
        for name, wanted in jobs:
            turn = max(number, 0) % len(stacks)
            for stack in stacks[turn:] + stacks[:turn]:
                try:
                    measured = pairs[stack].measure(wanted)
                except Failed:
                    continue
                if number < 0:
                    continue
                seconds = measured["seconds"]
                if name == "beside":
                    note(stack, "1 KB beside bulk p50 ms", statistics.median(seconds) * 1e3)
                    note(stack, "p90 ms", quantile(seconds, 0.9) * 1e3)
                    note(stack, "that bulk MB/s", measured["rate"] / 1e6)
                elif wanted["what"] == "bulk":
                    note(stack, name, BULK_BYTES / 1e6 / seconds[0])
                else:
                    note(stack, name, statistics.median(seconds) * 1e3)
        if progress:
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    medians = {stack: {name: statistics.median(values) for name, values in found[stack].items()} for stack in stacks}
    return medians, pairs


def print_results(medians: dict[str, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for found in medians.values() for name in found))
    rows: list[list[object]] = [[STACKS[stack], *(found.get(name, "–") for name in names)] for stack, found in medians.items()]
    print_table(["", *names], rows)
    for reference in ("tcp", "stock"):
        if reference not in medians:
            continue
        print(f"\ntimes as good as {STACKS[reference]} (round trips: its time over theirs; bulk: their rate over its)")
        rows = []
        for stack, found in medians.items():
            if stack == reference:
                continue
            cells: list[object] = [STACKS[stack]]
            for name in names:
                own, other = found.get(name), medians[reference].get(name)
                better = own is not None and other is not None and (own / other if name.endswith("MB/s") else other / own)
                cells.append(better or "–")
            rows.append(cells)
        print_table(["", *names], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stacks", nargs="+", choices=list(STACKS), default=list(STACKS), help="which to compare (all)")
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    parser.add_argument("--run-server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run-client", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_server:
        trio.run(run_server, options.stacks[0])
        return
    if options.run_client:
        trio.run(run_client, options.stacks[0], options.run_client)
        return
    with bench() as running:
        print(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
            f"trio {trio.__version__}, libp2p {importlib.metadata.version('libp2p')}; {options.rounds} rounds"
        )
        medians, pairs = measure_all(running, options.stacks, options.rounds, progress=sys.stderr.isatty())
        print_results(medians)
        failed = {STACKS[stack]: pair for stack, pair in pairs.items() if pair.failures}
        for name, pair in failed.items():
            print(f"\n{name} failed {pair.failures} times and was started anew; its last words:\n{pair.last_words()}")
        if options.json is not None:
            options.json.write_text(json.dumps({"rounds": options.rounds, "medians": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
