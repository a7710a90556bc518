"""A single ping tells within the time that it is given whether a peer is alive, whatever that peer's other threads do."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import trio

from petalnet.errors import PeerUnreachable
from petalnet.p2p.host import Stream
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Ping, Pong
from petalnet.p2p.protocols import PING

BUSY_PEER = """
import sys, threading, trio
from petalnet.p2p.host import open_host
from petalnet.p2p.identity import Identity

sys.setswitchinterval(0.0005)  # as a server does

def compute():
    while True:
        sum(i * i for i in range(100_000))

async def main():
    async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as host:
        threading.Thread(target=compute, daemon=True).start()
        print(host.addrs[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture
def busy_peer() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", BUSY_PEER], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


async def test_a_busy_process_answers_and_a_stopped_one_does_not(hosts, busy_peer: subprocess.Popen[str]) -> None:
    a = await hosts.start()
    assert busy_peer.stdout is not None
    addr = (await trio.to_thread.run_sync(busy_peer.stdout.readline)).strip()
    peer_id = addr.rpartition("/")[2]
    await a.connect(peer_id, [addr])
    for _ in range(5):
        assert 0 < await a.ping(peer_id, 2.0) < 2.0
    busy_peer.send_signal(signal.SIGSTOP)
    began = trio.current_time()
    with pytest.raises(PeerUnreachable, match=r"did not answer a ping within 0\.4 s"):
        await a.ping(peer_id, 0.4)
    assert trio.current_time() - began >= 0.4
    assert a.is_connected(peer_id), "it is for whoever asked to decide what follows"
    busy_peer.send_signal(signal.SIGCONT)
    assert await a.ping(peer_id, 2.0) < 2.0, "a ping that was not answered leaves nothing in the way of the next one"


async def test_who_is_not_connected_does_not_answer_and_is_not_dialled(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    with pytest.raises(PeerUnreachable):
        await a.ping(b.peer_id, 5.0)
    with pytest.raises(PeerUnreachable):
        await a.ping(Identity.generate().peer_id, 5.0)
    assert a.connected_peers() == []


async def test_many_at_a_time_share_one(hosts) -> None:
    """A hundred sessions through one server may doubt it at once; it has four streams for pings of one peer, and a pace for them."""
    a, b = await hosts.start(), await hosts.start()
    await a.connect(b.peer_id, b.addrs)
    served: list[Stream] = []

    async def answer_late(stream: Stream) -> None:
        served.append(stream)
        message = await stream.receive()
        assert isinstance(message, Ping)
        await trio.sleep(0.1)
        await stream.send(Pong(message.nonce))

    b.serve(PING, answer_late)
    taken: list[float] = []

    async def ask() -> None:
        taken.append(await a.ping(b.peer_id, 3.0))

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask)
    assert len(taken) == 100 and len(served) <= 2, "one of which may be the heartbeat's"


async def test_many_one_after_another_keep_a_pace(hosts) -> None:
    """Else the peer reads them more slowly, and whoever waits for an answer in vain takes it for dead."""
    a, b = await hosts.start(), await hosts.start()
    await a.connect(b.peer_id, b.addrs)
    count = 0

    async def answer(stream: Stream) -> None:
        nonlocal count
        while isinstance(message := await stream.receive(), Ping):
            count += 1
            await stream.send(Pong(message.nonce))

    b.serve(PING, answer)

    async def ask() -> None:
        while True:
            await a.ping(b.peer_id, 2.0)

    with trio.move_on_after(1.0):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(ask)
    assert 3 <= count <= 13, "about ten times, for all of them at once"


async def test_whoever_waits_for_longer_asks_again(hosts) -> None:
    """Of two that share a ping the one with more time is not bound by the other's."""
    a, b = await hosts.start(), await hosts.start()
    await a.connect(b.peer_id, b.addrs)
    heard = trio.Event()

    async def answer_when_told(stream: Stream) -> None:
        message = await stream.receive()
        assert isinstance(message, Ping)
        await heard.wait()
        await stream.send(Pong(message.nonce))

    b.serve(PING, answer_when_told)
    outcomes: dict[str, float | None] = {}

    async def ask(name: str, timeout_s: float) -> None:
        try:
            outcomes[name] = await a.ping(b.peer_id, timeout_s)
        except PeerUnreachable:
            outcomes[name] = None
            heard.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "hasty", 0.2)
        await trio.sleep(0.02)
        nursery.start_soon(ask, "patient", 5.0)
    assert outcomes["hasty"] is None and outcomes["patient"] is not None


async def test_a_stall_of_our_own_blames_nobody(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    await a.connect(b.peer_id, b.addrs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.ping, b.peer_id, 0.4)
        await trio.lowlevel.checkpoint()
        time.sleep(0.6)  # noqa: ASYNC251 - the stall is the test
