"""The tasks of a chain, against servers that take and give one message at a time: whoever waits for whom, all goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from petalnet.client.exchange import Exchange
from petalnet.client.inputs import Inputs, steps_of
from petalnet.client.links import Link
from petalnet.client.pipeline import Pending
from petalnet.errors import PeerLost, PetalnetError
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.session_messages import LinkDown, Replay, SessionOpened, Step, StepDone
from petalnet.routing.routes import Hop

REQUEST_TIMEOUT_S = 20.0


class Line:
    """The client's end of a stream on which one message each way is on its way at most."""

    def __init__(self) -> None:
        self._send, self.sent = trio.open_memory_channel[Message](1)
        self.answers, self._receive = trio.open_memory_channel[Message](0)
        self._lock = trio.Lock()

    async def send(self, message: Message) -> None:
        async with self._lock:
            await self._send.send(message)

    async def receive(self) -> Message | None:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise PeerLost("gone") from None


def hidden(tokens: int) -> Blob:
    return Blob("float32", (1, tokens, 1), "raw", bytes(4 * tokens))


async def ping(peer_id: str, within_s: float) -> float:
    return 0.0


def exchange_of(lines: list[Line]) -> Exchange:
    settings = SimpleNamespace(direct_chains=True, request_timeout=REQUEST_TIMEOUT_S, wire_precision="exact")
    host = SimpleNamespace(round_trip_s=lambda peer_id: 0.0, connected_peers=lambda: [], ping=ping)
    ignored = {name: lambda *_, **__: None for name in ("mark_failed", "mark_late", "mark_ok", "observe_step")}
    membership = SimpleNamespace(**ignored, host=host)
    target: Any = SimpleNamespace(settings=settings, swarm=SimpleNamespace(membership=membership))
    opened = SessionOpened(0, dtype="float32")
    return Exchange(target, [Link(Hop(f"peer {i}", (), i, i + 1), line, opened) for i, line in enumerate(lines)])  # type: ignore[arg-type]


async def run(exchange: Exchange, requests: list[Step]) -> list[Pending]:
    return await exchange.run(exchange.pipeline.begin(requests))


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_a_link_breaks_while_a_long_prompt_is_sent(autojump_clock: MockClock) -> None:
    """The first server gives its outputs to the client and reads no further until they are taken; what was lost is asked for behind what
    is being sent to it."""
    first, last = Line(), Line()
    lost = 3
    taken: list[int] = []

    async def serve_first() -> None:
        async for message in first.sent:
            if isinstance(message, Replay) or message.step > lost:  # type: ignore[attr-defined]
                if isinstance(message, Step) and message.step == lost + 1:
                    await first.answers.send(LinkDown("it broke", lost))
                await first.answers.send(StepDone(message.step, 0, hidden(2)))  # type: ignore[attr-defined]

    async def serve_last() -> None:
        async for message in last.sent:
            assert isinstance(message, Step)
            taken.append(message.step)
            await last.answers.send(StepDone(message.step, 0, hidden(2)))

    exchange = exchange_of([first, last])
    requests = steps_of(hidden(32), 0, None, Inputs(), number=1, ends=list(range(2, 33, 2)))
    async with trio.open_nursery() as nursery:
        for task in (serve_first, serve_last, exchange.run_links):
            nursery.start_soon(task)
        with trio.fail_after(REQUEST_TIMEOUT_S / 2):
            finished = await run(exchange, requests)
        nursery.cancel_scope.cancel()
    assert len(finished) == 16 and taken == list(range(1, 17))


async def test_the_last_server_goes_while_a_long_prompt_is_sent(autojump_clock: MockClock) -> None:
    """Nobody waits for the rest of a prompt to be taken that is lost anyway."""
    first, last = Line(), Line()

    async def serve_first() -> None:
        await first.sent.receive()
        await trio.sleep(1)  # in which as much is sent as goes on the way
        await last.answers.aclose()
        await trio.sleep_forever()

    exchange = exchange_of([first, last])
    requests = steps_of(hidden(32), 0, None, Inputs(), number=1, ends=list(range(2, 33, 2)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_first)
        nursery.start_soon(exchange.run_links)
        with trio.fail_after(REQUEST_TIMEOUT_S / 2), pytest.raises(PetalnetError, match="gone"):
            await run(exchange, requests)
        nursery.cancel_scope.cancel()


async def test_answers_that_were_there_before_do_not_keep_anybody_waiting(autojump_clock: MockClock) -> None:
    first, last = Line(), Line()

    async def serve_last() -> None:
        while True:
            await trio.sleep(REQUEST_TIMEOUT_S / 2)
            await last.answers.send(StepDone(7, 0, hidden(1)))

    exchange = exchange_of([first, last])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_last)
        nursery.start_soon(exchange.run_links)
        with trio.fail_after(5 * REQUEST_TIMEOUT_S), pytest.raises(PeerLost, match="no answer within"):
            await run(exchange, steps_of(hidden(1), 0, None, Inputs(), number=8, ends=[1]))
        nursery.cancel_scope.cancel()
