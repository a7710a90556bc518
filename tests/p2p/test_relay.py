"""Circuits through a relay, on loopback: a server that is known by its circuit address only."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import trio

from petalnet.p2p.addresses import circuit_addr, parse_peer
from petalnet.p2p.circuit import Reservation
from petalnet.p2p.host import Host
from petalnet.p2p.messages import Ping
from petalnet.p2p.protocols import Limits
from petalnet.p2p.relay import Relay

from .conftest import Hosts

Until = Callable[..., Awaitable[None]]


async def _count(stream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


async def reserve(server: Host, relay: Host) -> Reservation:
    """A reservation of `server` at `relay`."""
    addrs = tuple(parse_peer(addr).addr for addr in relay.addrs)
    await server.connect(relay.peer_id, addrs)
    reservation = await server.circuits.reserve(relay.peer_id, addrs)
    server.circuits.reservations = {relay.peer_id: reservation}
    return reservation


class TestCircuit:
    async def test_a_server_that_only_dials_is_reached_through_a_relay(self, hosts: Hosts) -> None:
        relay, server, client = await hosts.start(), await hosts.start(listen=False), await hosts.start(listen=False)
        Relay(relay)
        reservation = await reserve(server, relay)
        assert time.time() < reservation.expires <= time.time() + Limits().relay_reservation
        assert reservation.addrs == tuple(circuit_addr(parse_peer(addr)) for addr in relay.addrs)
        with trio.fail_after(5):
            async with await client.open_stream(server.peer_id, hosts.echo, addrs=reservation.addrs) as stream:
                await stream.send(Ping(1))
                assert await stream.receive() == Ping(1)
        assert client.is_connected(server.peer_id) and not client.is_direct(server.peer_id)
        assert client.is_direct(relay.peer_id) and not server.is_direct(client.peer_id)
        # The server reaches back over the same circuit.
        client.serve(hosts.echo, _count)
        async with await server.open_stream(client.peer_id, hosts.echo) as stream:
            await stream.send(Ping(2))
            assert await stream.receive() == Ping(2)
