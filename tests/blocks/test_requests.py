"""What is read ahead on a stream, and how much of it."""

from __future__ import annotations

import trio
import trio.testing

from petalnet.blocks.requests import MOST_AHEAD_BYTES, Held, Requests
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.session_messages import MAX_HOPS, Step


class Flood:
    """A stream on which the same request comes for ever."""

    peer_id = "flooder"

    def __init__(self, request: Step) -> None:
        self.request = request

    async def receive(self, *, ahead: int = 0) -> Message:
        await trio.lowlevel.checkpoint()
        return self.request


async def test_steps_that_hold_no_array_are_counted_as_well() -> None:
    """Else whoever sends many of them has all of a server's memory."""
    entries = 3 * MAX_HOPS
    request = Step(1, 0, Blob("float32", (1, 0, 32), "raw", b""), spent=(0.5,) * entries)
    held = Held()
    requests = Requests(Flood(request), held)  # type: ignore[arg-type]  # what it needs of a stream
    async with trio.open_nursery() as nursery:
        assert await requests.next() is request
        requests.read_on(nursery)
        await trio.testing.wait_all_tasks_blocked()
        assert MOST_AHEAD_BYTES <= held.bytes < MOST_AHEAD_BYTES * 1.1
        assert held.bytes / (24 * entries) < 512  # each number takes 24 bytes at least
        assert await requests.next() is request
        requests.forget()
        assert held.bytes == 0
        nursery.cancel_scope.cancel()
