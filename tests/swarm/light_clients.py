"""Clients that speak a server's inference protocol without a model: `python light_clients.py` reads JSON, one line on standard input.

    {"addr": multiaddr, "model": key, "first": 0, "end": 3, "hidden": 64, "count": 10}

It parts into that many processes, each a peer with a session that goes on until it is killed. Each prints its process id and a newline when
it is in the middle of an answer, and ends should the server ever end its session. The status is 0 where all were killed.
"""

from __future__ import annotations

import array
import json
import multiprocessing
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from typing import Any

import trio

from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.host import open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import INFERENCE
from petalnet.p2p.session_messages import OpenSession, SessionOpened, Step, StepDone
from petalnet.p2p.streams import Stream


def hidden_states(rows: int, tokens: int, size: int, *, value: float = 0.01) -> Blob:
    """Some hidden states, [rows, tokens, size] in float32."""

    return Blob("float32", (rows, tokens, size), "raw", array.array("f", [value]).tobytes() * (rows * tokens * size))


def order_of(rows: Sequence[int]) -> Blob:
    """The rows that a step's rows continue, int64."""
    return Blob("int64", (len(rows),), "raw", b"".join(row.to_bytes(8, "little") for row in rows))


async def ask(stream: Stream, request: Message, expected: type[Message]) -> Any:
    """One request; an answer of another type is an error."""
    await stream.send(request)
    answer = await stream.receive()
    if not isinstance(answer, expected):
        raise RuntimeError(f"answered {answer} instead of {expected.name}")
    return answer


def tell() -> None:
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()


async def go_on(stream: Stream, task: dict[str, Any], number: int) -> None:
    """One of four ways to be in the middle of an answer."""
    size, kind = task["hidden"], number % 4
    await ask(stream, OpenSession(secrets.token_hex(8), task["model"], task["first"], task["end"], 2048), SessionOpened)
    if kind == 0:  # a prompt that is being computed
        await stream.send(Step(1, 0, hidden_states(2, 1500, size)))
        tell()
        await stream.receive()
        await trio.sleep_forever()
    rows, position, step = (3 if kind == 1 else 1), 40, 1
    await ask(stream, Step(1, 0, hidden_states(rows, position, size)), StepDone)
    if kind == 3:  # idle between two tokens
        tell()
        await trio.sleep_forever()
    while True:
        step += 1
        if step == 6:
            tell()
        if position > 200:
            position -= 150  # rolled back, so that it never ends
        order = order_of([0, 0, 2]) if kind == 1 else None
        await ask(stream, Step(step, position, hidden_states(rows, 1, size), order=order), StepDone)
        position += 1


async def run_client(task: dict[str, Any], number: int) -> None:
    async with open_host(Identity.generate()) as host:
        peer_id = task["addr"].rpartition("/")[2]
        async with await host.open_stream(peer_id, INFERENCE, addrs=[task["addr"]]) as stream:
            await go_on(stream, task, number)


def begin(task: dict[str, Any], number: int) -> None:
    try:
        trio.run(run_client, task, number)
    finally:
        os._exit(3)  # without the parent's clean-up


def main() -> int:
    task = json.loads(sys.stdin.readline())
    forking = multiprocessing.get_context("fork")
    processes = [forking.Process(target=begin, args=(task, number)) for number in range(task["count"])]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return int(any(process.exitcode != -signal.SIGKILL for process in processes))


if __name__ == "__main__":
    sys.exit(main())
