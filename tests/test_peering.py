"""What a membership takes in, over real hosts on loopback."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack

import trio

from petalnet.p2p.identity import Identity
from petalnet.p2p.signed import sign
from petalnet.peering import Peering, open_peering
from petalnet.routing.records import ServerRecord

LISTEN = ["/ip4/127.0.0.1/tcp/0"]


def record_of(identity: Identity) -> bytes:
    now = time.time()
    record = ServerRecord(
        peer_id=identity.peer_id, addrs=("/ip4/127.0.0.1/tcp/1",), model="m", model_name="m", span=(0, 4), num_blocks=4,
        state="online", dtype="float32", sequence=1, issued=now, expires=now + 60,
    )  # fmt: skip
    return sign(identity, record.encode())


async def open_one(stack: AsyncExitStack) -> Peering:
    return await stack.enter_async_context(open_peering(Identity.generate(), initial_peers=(), listen=LISTEN, server=True))


async def test_gossip_takes_only_a_servers_own_record() -> None:
    async with AsyncExitStack() as stack:
        peering = await open_one(stack)
        other, third = Identity.generate(), Identity.generate()
        assert not peering._accept(third.peer_id, record_of(other))
        assert peering.view.record(other.peer_id) is None
        assert peering._accept(other.peer_id, record_of(other))
        assert peering.view.record(other.peer_id) is not None


async def test_a_lost_peer_is_avoided_until_it_is_back() -> None:
    async with AsyncExitStack() as stack:
        peering = await open_one(stack)
        other = Identity.generate()
        peering._accept(other.peer_id, record_of(other))
        peering._on_peer_lost(other.peer_id)
        assert peering.view.servers("m", now=time.time()) == []
        peering._on_peer_found(other.peer_id)
        assert [server.peer_id for server in peering.view.servers("m", now=time.time())] == [other.peer_id]


async def test_a_start_that_is_cancelled_ends_whenever_that_is() -> None:
    """As by a signal to a node that is not ready yet: at none of the moments of a start may anything stay behind and be waited for."""
    async with AsyncExitStack() as stack:
        entry = await open_one(stack)
        for moment in range(0, 120, 6):
            with trio.fail_after(5), trio.move_on_after(moment / 1000) as scope:
                async with open_peering(Identity.generate(), initial_peers=entry.host.addrs, listen=LISTEN, server=True):
                    await trio.sleep_forever()
            assert scope.cancelled_caught
