"""What attackers of the tests are made of: connections that stop anywhere in the handshakes, and peers that speak the multiplexer freely.

    mallory = Attacker(victim.addrs[0])
    async with mallory.connected() as channel:      # proved who it is, agreed on the multiplexer
        await channel.send(frame(OPEN, 1, 5, b"/echo"))

`Victim` is a node in a process of its own, whose memory is not the attacker's, and which tells its footprint to an honest peer.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from petalnet.p2p.admission import Admission
from petalnet.p2p.host import Host, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error, Ping
from petalnet.p2p.mux import MUX_ID
from petalnet.p2p.mux_protocol import HEADER
from petalnet.p2p.protocols import Limits, Protocol
from petalnet.p2p.security import Noise, NoiseSession

FOOTPRINT = Protocol("/petalnet/test-footprint/1.0.0")


def frame(kind: int, number: int, length: int = 0, body: bytes = b"", code: int = 0) -> bytes:
    """A frame of the multiplexer, whatever it says."""
    return HEADER.pack(kind, code, 0, number, length) + body


class Stalled(Exception):
    """An attacker has written as much as it wanted to."""


class Wire(ReadWriteCloser):
    """A TCP connection on which only `most` bytes are written; whoever wants to write more gets `Stalled`, and the peer gets nothing."""

    def __init__(self, stream: trio.SocketStream, most: int | None = None) -> None:
        self.stream = stream
        self.most = most
        self.written = 0

    async def write(self, data: bytes) -> None:
        if self.most is not None and self.written + len(data) > self.most:
            await self.stream.send_all(data[: self.most - self.written])
            self.written = self.most
            raise Stalled
        self.written += len(data)
        await self.stream.send_all(data)

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self.stream.receive_some(n))

    async def close(self) -> None:
        await trio.aclose_forcefully(self.stream)

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    async def wait_closed(self) -> None:
        """Until the other side has ended the connection."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self.stream.receive_some(65536):
                pass


class Channel:
    """A connection to a victim that went through all handshakes: bytes for the multiplexer, encrypted and sent as they are."""

    def __init__(self, wire: Wire, session: NoiseSession) -> None:
        self.wire = wire
        self.session = session

    async def send(self, *pieces: bytes) -> None:
        """Send bytes of the multiplexer, as one message of the secure channel where they fit. Raises trio.BrokenResourceError."""
        await self.wire.stream.send_all(self.session.seal(pieces))

    async def flood(self, data: bytes, most: int = 2**40) -> int:
        """Send the same again and again until the victim ends the connection; the bytes that were sent."""
        sent = 0
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while sent < most:
                await self.send(data)
                sent += len(data)
        return sent


class Attacker:
    """A peer with an identity of its own.

    Args:
        addr: the victim's multiaddr.
        source: the address to come from, another one of loopback's.
        admission: of a private swarm whose key it has.
    """

    def __init__(self, addr: str, *, source: str | None = None, admission: Admission | None = None) -> None:
        parts = addr.split("/")
        self.target = parts[2], int(parts[4])
        self.victim = ID.from_string(parts[-1])
        self.source = source
        self.identity = Identity.generate()
        private = Ed25519PrivateKey.from_bytes(self.identity.private_bytes)
        self._admission = admission or Admission()
        self._noise = Noise(KeyPair(private, private.get_public_key()), self._admission, Limits())

    async def wire(self, most: int | None = None) -> Wire:
        """A TCP connection."""
        return Wire(await trio.open_tcp_stream(*self.target, local_address=self.source), most)

    async def handshake(self, wire: Wire, muxer: str = MUX_ID) -> NoiseSession:
        """All that comes before the multiplexer."""
        raw = RawConnection(wire, True)
        client = MultiselectClient()
        await client.select_one_of([TProtocol(self._admission.security_id)], MultiselectCommunicator(raw))
        session = await self._noise.secure_outbound(raw, self.victim)
        assert isinstance(session, NoiseSession)
        if muxer:
            await client.select_one_of([TProtocol(muxer)], MultiselectCommunicator(session))
        return session

    async def answer(self, wire: Wire) -> NoiseSession:
        """All that comes before the multiplexer, as the side that was dialled."""
        raw = RawConnection(wire, False)
        await Multiselect({TProtocol(self._admission.security_id): None}).negotiate(MultiselectCommunicator(raw))
        session = await self._noise.secure_inbound(raw)
        assert isinstance(session, NoiseSession)
        await Multiselect({TProtocol(MUX_ID): None}).negotiate(MultiselectCommunicator(session))
        return session

    @asynccontextmanager
    async def connected(self, *, muxer: str = MUX_ID) -> AsyncIterator[Channel]:
        """A connection that is through with its handshakes; with `muxer=""` without agreement on one."""
        wire = await self.wire()
        try:
            yield Channel(wire, await self.handshake(wire, muxer))
        finally:
            await wire.close()


@dataclass(frozen=True)
class Footprint:
    """What a process takes: resident bytes, traced bytes now and at most since the last question, tasks, descriptors, connections."""

    resident: int
    traced: int
    peak: int
    tasks: int
    descriptors: int
    connections: int


class Victim:
    """A node in a process of its own, as an honest peer sees it."""

    def __init__(self, addr: str, friend: Host, echo: Protocol) -> None:
        self.addr = addr
        self.friend = friend
        self._peer_id = addr.rpartition("/")[2]
        self._echo = echo

    async def footprint(self) -> Footprint:
        """Asks the victim, which has to answer in time."""
        with trio.fail_after(10):
            async with await self.friend.open_stream(self._peer_id, FOOTPRINT, addrs=[self.addr]) as stream:
                await stream.send(Ping(1))
                answer = await stream.receive()
        assert isinstance(answer, Error)
        return Footprint(**json.loads(answer.message))

    async def serves(self) -> None:
        """It takes a stranger's connection, and serves the honest peer that was there all the time."""
        async with open_host(Identity.generate()) as stranger:
            for host in (self.friend, stranger):
                with trio.fail_after(10):
                    async with await host.open_stream(self._peer_id, self._echo, addrs=[self.addr]) as stream:
                        await stream.send(Ping(7))
                        assert await stream.receive() == Ping(7)

    async def is_back_to(self, before: Footprint, *, more_bytes: int, within_s: float = 20.0) -> Footprint:
        """Wait until nothing is left of an attack but `more_bytes` of traced memory at most; the footprint then."""
        with trio.move_on_after(within_s):
            while True:
                now = await self.footprint()
                if (
                    now.tasks <= before.tasks
                    and now.descriptors <= before.descriptors
                    and now.connections <= before.connections
                    and now.traced <= before.traced + more_bytes
                ):
                    return now
                await trio.sleep(0.1)
        raise AssertionError(f"something is left:\n  before {before}\n  after  {await self.footprint()}")


VICTIM = """
import gc, json, os, sys, tracemalloc
import psutil, trio
from petalnet.p2p.discovery import Discovery
from petalnet.p2p.frames import FrameLimits
from petalnet.p2p.gossip import Gossip
from petalnet.p2p.host import open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error, Store
from petalnet.p2p.protocols import Limits, Protocol
from petalnet.errors import PeerLost

FOOTPRINT = Protocol("/petalnet/test-footprint/1.0.0")
MIB = 1024 * 1024
limits = FrameLimits(header=64 * 1024, payload=64 * MIB)
ECHO = Protocol("/petalnet/test-echo/1.0.0", limits=limits, frame_timeout_s=1.0, idle_timeout_s=5.0)
BUSY = Protocol("/petalnet/test-busy/1.0.0", limits=limits, frame_timeout_s=1.0, idle_timeout_s=5.0)
TALKER = Protocol("/petalnet/test-talker/1.0.0", limits=limits, frame_timeout_s=1.0, idle_timeout_s=5.0)

async def echo(stream):
    while (message := await stream.receive()) is not None:
        await stream.send(message)

async def busy(stream):
    await stream.receive()
    await trio.sleep(1.5)  # works on it, and reads nothing meanwhile

async def talk(stream):
    while True:
        await stream.send(Store((), bytes(8000)))

def tasks_of(task):
    found, left = 0, [task]
    while left:
        found += 1
        left += [child for nursery in left.pop().child_nurseries for child in nursery.child_tasks]
    return found

async def main():
    process = psutil.Process()
    async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"], limits=Limits(**json.loads(sys.argv[1]))) as host:
        async def footprint(stream):
            await stream.receive()
            gc.collect()
            traced, peak = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            await stream.send(Error("server", json.dumps({
                "resident": process.memory_info().rss, "traced": traced, "peak": peak,
                "tasks": tasks_of(trio.lowlevel.current_root_task()),
                "descriptors": process.num_fds(), "connections": len(host.libp2p.swarm.connections)})))
        for protocol, handler in ((ECHO, echo), (BUSY, busy), (TALKER, talk), (FOOTPRINT, footprint)):
            host.serve(protocol, handler)
        async with trio.open_nursery() as nursery:
            gossip = Gossip(host)
            gossip.subscribe("petalnet/test/1", lambda author, data: True, lambda author, data: None)
            await nursery.start(gossip.run)
            await nursery.start(Discovery(host, server=True, on_record=lambda data: None).run, [])
            tracemalloc.start()
            print(host.addrs[0], flush=True)
            await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()

trio.run(main)
"""


@contextlib.contextmanager
def victim_process(limits: dict[str, float], log: Path) -> Iterator[str]:
    """Starts a victim that writes its errors to `log`, and yields its multiaddr; a victim that has ended by itself is a failure."""
    command = [sys.executable, "-c", VICTIM, json.dumps(limits)]
    with log.open("w") as errors, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            assert process.stdout is not None
            addr = process.stdout.readline().decode().strip()
            assert addr, f"the victim did not start:\n{log.read_text()[-4000:]}"
            yield addr
            assert process.poll() is None and not log.read_text(), f"the victim has ended, or complains:\n{log.read_text()[-6000:]}"
        finally:
            process.kill()
