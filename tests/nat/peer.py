"""A small peer without a model, to be run on hosts of the lab: it serves an echo, or visits one and prints what it finds, as JSON.

python peer.py serve ENTRY           a server that joins through ENTRY, until it is ended
python peer.py visit ENTRY ADDR...   a client that joins through ENTRY and visits the server at one of its addresses
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time

import trio

from petalnet.errors import PeerLost
from petalnet.p2p.addresses import parse_peer
from petalnet.p2p.fields import Blob
from petalnet.p2p.frames import FrameLimits
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Ping
from petalnet.p2p.pass_messages import ForwardDone
from petalnet.p2p.protocols import Protocol
from petalnet.p2p.streams import Stream
from petalnet.peering import Peering, open_peering

ECHO = Protocol("/petalnet/test-echo/1.0.0", limits=FrameLimits(header=4096, payload=64 * 1024 * 1024))
DIRECT_WITHIN_S = 15.0
BULK_BYTES = 16 * 1024 * 1024


async def serve(entry: str) -> None:
    async with open_peering(Identity.generate(), initial_peers=[entry], listen=["/ip4/0.0.0.0/tcp/31330"], server=True) as peering:
        peering.host.serve(ECHO, echo)
        print(json.dumps({"peer_id": peering.host.peer_id}), flush=True)
        told: list[str] = []
        while True:
            if told != peering.host.plain_addrs:
                told = peering.host.plain_addrs
                print(json.dumps({"addrs": told}), flush=True)
            await trio.sleep(0.05)


async def echo(stream: Stream) -> None:
    while (message := await stream.receive()) is not None:
        # A bulk message is answered by its length only.
        await stream.send(Ping(len(message.output.data)) if isinstance(message, ForwardDone) else message)


async def visit(entry: str, *addrs: str) -> None:
    targets = [parse_peer(addr) for addr in addrs]
    target = targets[0]
    async with open_peering(Identity.generate(), initial_peers=[entry], listen=(), server=False) as peering:
        began = time.perf_counter()
        await peering.host.connect(target.peer_id, [target.addr for target in targets])
        found = {"connected_s": time.perf_counter() - began, "direct_at_first": peering.host.is_direct(target.peer_id)}
        found["first"] = await measure(peering, target.peer_id)
        with trio.move_on_after(DIRECT_WITHIN_S):
            while not peering.host.is_direct(target.peer_id):  # noqa: ASYNC110  (nothing tells when)
                await trio.sleep(0.02)
            found["direct_s"] = time.perf_counter() - began
        found["direct"] = peering.host.is_direct(target.peer_id)
        found["then"] = await measure(peering, target.peer_id)
        print(json.dumps(found), flush=True)


async def measure(peering: Peering, peer_id: str) -> dict[str, float]:
    """Milliseconds for an echo of little and of a step's 28 KB, and the rate of bulk in MB/s."""
    async with await peering.host.open_stream(peer_id, ECHO) as stream:

        async def milliseconds(size: int) -> float:
            message = Ping(1) if not size else ForwardDone(Blob("uint8", (size,), "raw", bytes(size)))
            taken = []
            for _ in range(50):
                began = time.perf_counter()
                await stream.send(message)
                if await stream.receive() is None:
                    raise PeerLost("the echo has ended")
                taken.append(time.perf_counter() - began)
            return 1000 * statistics.median(taken)

        small, step = await milliseconds(0), await milliseconds(28 * 1024)
        began = time.perf_counter()
        await stream.send(ForwardDone(Blob("uint8", (BULK_BYTES,), "raw", bytes(BULK_BYTES))))
        await stream.receive()
        return {"echo_ms": small, "step_ms": step, "bulk_mb_s": BULK_BYTES / (time.perf_counter() - began) / 1e6}


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("petalnet").setLevel(logging.DEBUG)
    trio.run({"serve": serve, "visit": visit}[sys.argv[1]], *sys.argv[2:])
