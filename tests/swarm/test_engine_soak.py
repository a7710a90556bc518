"""Sessions and clients that come and go by the thousand, in good order and not: afterwards nothing of them is left on the server."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import trio

from petalnet.inspection import ask_nodes
from petalnet.p2p.fields import Blob
from petalnet.p2p.host import Host, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import INFERENCE
from petalnet.p2p.session_messages import NAME_BYTES, OpenSession, SessionOpened, Step, StepDone
from petalnet.p2p.streams import Stream

from .light_clients import ask, hidden_states, order_of
from .models import BLOCKS, connected, ids, load_local, save_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SESSIONS = 2000
AT_ONCE = 16
KILLED, KILLED_AT_ONCE = 50, 10
BACK_WITHIN_S = 30.0
HIDDEN = 64
POOL_TOKENS = 65536


@dataclass(frozen=True)
class Footprint:
    """What a server has open: of the system's things, and of its own. The fewer the better.

    `pages` counts KV positions in pages that are held, not kept of earlier prompts; `promised` those that are set aside for sessions.
    """

    descriptors: int
    threads: int
    connections: int
    streams: int
    sessions: int
    waiting: int
    promised: int
    pages: int

    def exceeds(self, before: Footprint) -> bool:
        return any(now > then for now, then in zip(astuple(self), astuple(before), strict=True))


@dataclass
class Server:
    """The server under test, and the client that looks at it."""

    node: Any
    path: Path
    host: Host
    model: str

    @asynccontextmanager
    async def session(self, max_length: int = 512) -> AsyncIterator[Stream]:
        """A stream with an open session."""
        async with await self.host.open_stream(self.node.peer_id, INFERENCE, addrs=self.node.addrs) as stream:
            await ask(stream, self.opening(max_length), SessionOpened)
            yield stream

    def opening(self, max_length: int) -> OpenSession:
        return OpenSession(secrets.token_hex(8), self.model, 0, BLOCKS["llama"], max_length)

    async def footprint(self) -> Footprint:
        """What is open now, as the system tells and the server tells its own user."""
        (report,) = await trio.to_thread.run_sync(ask_nodes)
        process = psutil.Process(self.node.process.pid)
        engine, peers = report["engine"], report["peers"]
        kv = engine["kv_tokens"]
        return Footprint(
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            connections=len(peers),
            streams=sum(peer["streams"] for peer in peers),
            sessions=engine["sessions"],
            waiting=engine["waiting"],
            promised=kv["all"] - kv["free"],
            pages=kv["held"] - kv["kept"],
        )

    async def settled(self) -> Footprint:
        """The footprint once nothing of earlier sessions is left and two looks see the same."""
        with trio.fail_after(BACK_WITHIN_S):
            last = None
            while (now := await self.footprint()) != last or now.sessions + now.waiting + now.promised + now.pages > 0:
                last = now
                await trio.sleep(0.3)
        return now

    async def is_back_to(self, before: Footprint) -> None:
        """Wait until no more is open than there was."""
        deadline = trio.current_time() + BACK_WITHIN_S
        while (now := await self.footprint()).exceeds(before):
            assert trio.current_time() < deadline, f"something is left:\n  before {before}\n  after  {now}\n{self.node.log()[-2000:]}"
            await trio.sleep(0.2)


@pytest.fixture(scope="module")
def started(module_nodes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    path = save_model("llama", tmp_path_factory.mktemp("llama"))
    options = ["--dtype", "float32", "--throughput", "100", "--attn-cache-tokens", POOL_TOKENS]
    return module_nodes.start(path, "--serve", f"0:{BLOCKS['llama']}", "--new-swarm", *options), path


@pytest.fixture
async def server(started: tuple[Any, Path], module_nodes, find_record, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    node, path = started
    monkeypatch.setenv("PETALNET_STATE_DIR", module_nodes.environment()["PETALNET_STATE_DIR"])
    async with open_host(Identity.generate()) as host:
        record = await find_record(host, node.peer_id, node.addrs)
        yield Server(node, path, host, record.model)


def names_of(number: int, units: int) -> Blob:
    return Blob("uint8", (1, units, NAME_BYTES), "raw", hashlib.shake_128(str(number).encode()).digest(units * NAME_BYTES))


async def live(server: Server, number: int) -> None:
    """A session's life, one of eight."""
    kind = number % 8
    async with server.session() as stream:
        if kind == 0:
            return  # nothing was ever sent
        rows, new = (3, 20) if kind in (1, 2) else (1, 130 if kind == 3 else 9)
        first = Step(1, 0, hidden_states(rows, new, HIDDEN), names=names_of(number % 40, 2) if kind == 3 else None)
        if kind == 4:
            await stream.send(first)
            await stream.reset()  # in the middle of the prompt
            return
        await ask(stream, first, StepDone)
        order = order_of([2, 2, 0, 1, 0]) if kind == 1 else None  # more rows than there were
        rows = 5 if kind == 1 else rows
        await ask(stream, Step(2, new, hidden_states(rows, 1, HIDDEN), order=order), StepDone)
        await ask(stream, Step(3, new // 2, hidden_states(rows, 4, HIDDEN)), StepDone)  # rolled back
        if kind == 5:
            with pytest.raises(RuntimeError, match="max_length"):
                await ask(stream, Step(4, 8, hidden_states(rows, 600, HIDDEN)), StepDone)
        elif kind == 6:
            await stream.send(Step(4, 5, hidden_states(rows, 300, HIDDEN)))
            await stream.reset()
        elif kind == 7:
            with trio.move_on_after(0):  # its asker is cancelled; what it waits for, is computed for nobody
                await ask(stream, Step(4, 5, hidden_states(rows, 300, HIDDEN)), StepDone)


async def live_all(server: Server, first: int, end: int) -> None:
    """Sessions first … end - 1, some at a time."""
    numbers = iter(range(first, end))

    async def one_after_another() -> None:
        for number in numbers:
            await live(server, number)

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(one_after_another)


async def test_sessions_that_come_and_go(server: Server) -> None:
    await live_all(server, 0, 10 * AT_ONCE)  # fills what is cached
    before = await server.settled()
    await live_all(server, 10 * AT_ONCE, 10 * AT_ONCE + SESSIONS)
    await server.is_back_to(before)
    await answers_as_ever(server)


async def test_clients_that_are_killed(server: Server, module_nodes) -> None:
    """In the middle of a prompt, between two tokens, with beams: by the system, without a word to the server."""
    await trio.to_thread.run_sync(kill_clients, server, module_nodes, KILLED_AT_ONCE)
    before = await server.settled()
    for _ in range(KILLED // KILLED_AT_ONCE):
        await trio.to_thread.run_sync(kill_clients, server, module_nodes, KILLED_AT_ONCE)
    await server.is_back_to(before)
    await answers_as_ever(server)


def kill_clients(server: Server, nodes: Any, count: int) -> None:
    """Let clients begin, and kill each as soon as it is in the middle of an answer."""
    task = {"addr": server.node.addrs[0], "model": server.model, "first": 0, "end": BLOCKS["llama"], "hidden": HIDDEN, "count": count}
    program = [sys.executable, "-m", "tests.swarm.light_clients"]
    with subprocess.Popen(program, env=nodes.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:
        assert clients.stdin is not None and clients.stdout is not None
        clients.stdin.write(json.dumps(task) + "\n")
        clients.stdin.close()
        killed = 0
        for line in clients.stdout:
            os.kill(int(line), signal.SIGKILL)
            killed += 1
        assert killed == count
    assert clients.returncode == 0


async def answers_as_ever(server: Server) -> None:
    """The server still writes what the local model writes, and has nothing to complain of."""

    def answer() -> None:
        with connected(server.path, server.node.addrs) as model:
            options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
            expected = load_local(server.path).generate(ids(2, 30, seed=1), **options)
            assert torch.equal(model.generate(ids(2, 30, seed=1), **options), expected)

    await trio.to_thread.run_sync(answer)
    assert "Traceback" not in server.node.log()
