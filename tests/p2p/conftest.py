"""Hosts on loopback, each a task of the test's nursery, so that a host that dies fails the test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import hypothesis
import pytest
import trio

from petalnet.p2p.frames import FrameLimits
from petalnet.p2p.host import Host, Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import Protocol

hypothesis.settings.register_profile("petalnet", deadline=None)  # the machine's load is nobody's bug
hypothesis.settings.load_profile("petalnet")

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class Hosts:
    """Starts and stops hosts."""

    echo = Protocol("/petalnet/test-echo/1.0.0", limits=FrameLimits(header=4096, payload=64 * 1024 * 1024), frame_timeout_s=0.3)

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._running: dict[str, tuple[trio.CancelScope, trio.Event]] = {}

    async def start(self, *, identity: Identity | None = None, listen: bool = True, echo: bool = True, **options: object) -> Host:
        """A new host; it echoes what comes on `Hosts.echo`. The options are those of `open_host`."""
        run = partial(self._run, listen=[LOOPBACK] if listen else [], **options)
        host: Host = await self._nursery.start(run, identity or Identity.generate())
        if echo:
            host.serve(self.echo, serve_echo)
        return host

    async def stop(self, host: Host) -> None:
        """Shut a host down and wait until it is."""
        scope, over = self._running[host.peer_id]
        scope.cancel()
        await over.wait()

    async def check_alive(self, host: Host) -> None:
        """The host still takes a stranger's connection and serves it."""
        friend = await self.start()
        with trio.fail_after(5):
            assert await round_trip(friend, host, self.echo)
        await self.stop(friend)

    async def _run(self, identity: Identity, *, task_status: trio.TaskStatus[Host], **options: object) -> None:
        over = trio.Event()
        try:
            with trio.CancelScope() as scope:
                async with open_host(identity, **options) as host:  # type: ignore[arg-type]
                    self._running[host.peer_id] = scope, over
                    task_status.started(host)
                    await trio.sleep_forever()
        finally:
            over.set()


async def serve_echo(stream: Stream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


async def round_trip(source: Host, target: Host, protocol: Protocol) -> bool:
    from petalnet.p2p.messages import Ping

    async with await source.open_stream(target.peer_id, protocol, addrs=target.addrs) as stream:
        await stream.send(Ping(7))
        return await stream.receive() == Ping(7)


async def eventually(condition: Callable[[], bool | Awaitable[bool]], *, within_s: float = 5.0) -> None:
    """Wait until a condition holds; the test fails where it does not in time."""
    with trio.fail_after(within_s):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await trio.sleep(0.01)


@pytest.fixture
def hosts(nursery: trio.Nursery) -> Hosts:
    return Hosts(nursery)


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    return eventually
