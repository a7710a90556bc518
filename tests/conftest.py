"""What tests of several parts share."""

from __future__ import annotations

import signal
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest

from petalnet.routing.records import SWARM_KEY, ServerRecord


def pytest_configure(config: pytest.Config) -> None:
    # A shell that runs the tests in the background has them ignore Ctrl-C, and so would all that they start: some tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def find_record() -> Callable[..., Awaitable[ServerRecord]]:
    """`await find_record(host, peer_id, addrs)`: what a server keeps about itself."""

    async def find(host, peer_id: str, addrs: Sequence[str]) -> ServerRecord:  # type: ignore[no-untyped-def]
        from petalnet.p2p.messages import Find, Records
        from petalnet.p2p.protocols import RECORDS
        from petalnet.peering import read_record

        async with await host.open_stream(peer_id, RECORDS, addrs=addrs) as stream:
            await stream.send(Find(SWARM_KEY))
            answer = await stream.receive()
        assert isinstance(answer, Records)
        records = [read_record(data, now=time.time()) for data in answer.records]
        return next(record for record in records if record.peer_id == peer_id)

    return find
