"""Circuits through a relay, on loopback: servers that are known by their circuit addresses only."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.relay.circuit_v2.config import RelayConfig
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as PeerIdMessage
from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
from libp2p.relay.circuit_v2.transport import CircuitV2Transport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from petalnet.errors import PeerLost, PeerUnreachable
from petalnet.p2p.addresses import circuit_addr, parse_peer
from petalnet.p2p.circuit import HOP, STOP, Reservation, read_protobuf, write_protobuf
from petalnet.p2p.fields import Blob
from petalnet.p2p.host import Host
from petalnet.p2p.messages import Ping
from petalnet.p2p.pass_messages import ForwardDone
from petalnet.p2p.protocols import Limits
from petalnet.p2p.relay import Relay
from petalnet.p2p.reservations import Reservations
from petalnet.p2p.streams import Stream

from .conftest import LOOPBACK, Hosts

Until = Callable[..., Awaitable[None]]
MIB = 1024 * 1024


async def start_relay(hosts: Hosts, **limits: float) -> tuple[Host, Relay]:
    host = await hosts.start(limits=Limits(**limits))  # type: ignore[arg-type]
    return host, Relay(host)


async def reserve(server: Host, relay: Host) -> Reservation:
    """A reservation of `server` at `relay`."""
    addrs = tuple(parse_peer(addr).addr for addr in relay.addrs)
    await server.connect(relay.peer_id, addrs)
    reservation = await server.circuits.reserve(relay.peer_id, addrs)
    server.circuits.reservations = {**server.circuits.reservations, relay.peer_id: reservation}
    return reservation


async def echoes(stream: Stream, number: int = 1) -> bool:
    await stream.send(Ping(number))
    return await stream.receive() == Ping(number)


def bulk(size: int) -> ForwardDone:
    return ForwardDone(Blob("uint8", (size,), "raw", bytes(range(256)) * (size // 256)))


class TestCircuit:
    async def test_a_server_that_only_dials_is_reached_through_a_relay(self, hosts: Hosts) -> None:
        host, relay = await start_relay(hosts)
        server, client = await hosts.start(listen=False), await hosts.start(listen=False)
        reservation = await reserve(server, host)
        assert time.time() < reservation.expires <= time.time() + Limits().relay_reservation
        assert reservation.addrs == tuple(circuit_addr(parse_peer(addr)) for addr in host.addrs)
        with trio.fail_after(5):
            async with await client.open_stream(server.peer_id, hosts.echo, addrs=reservation.addrs) as stream:
                assert await echoes(stream)
            # The server reaches back over the same circuit.
            async with await server.open_stream(client.peer_id, hosts.echo) as stream:
                assert await echoes(stream)
        assert client.is_connected(server.peer_id) and not client.is_direct(server.peer_id)
        assert client.is_direct(host.peer_id) and not server.is_direct(client.peer_id)
        assert relay.circuits == 1 and relay.reservations == [server.peer_id]
        status = next(status for status in client.peers() if status.peer_id == server.peer_id)
        assert (status.path, status.relay, status.direction) == ("relay", host.peer_id, "out")

    async def test_bulk_goes_through_whole_while_others_are_served(self, hosts: Hosts) -> None:
        host, relay = await start_relay(hosts)
        server, client = await hosts.start(listen=False), await hosts.start(listen=False)
        reservation = await reserve(server, host)
        message = bulk(16 * MIB)
        with trio.fail_after(20):
            async with await client.open_stream(server.peer_id, hosts.echo, addrs=reservation.addrs) as stream:

                async def send() -> None:
                    await stream.send(message)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send)
                    await hosts.check_alive(host)
                    answer = await stream.receive()
        assert isinstance(answer, ForwardDone) and bytes(answer.output.data) == message.output.data
        assert relay.bytes_relayed > 32 * MIB

    async def test_the_end_of_either_side_ends_the_circuit(self, hosts: Hosts, until: Until) -> None:
        host, relay = await start_relay(hosts)
        server, client, other = [await hosts.start(listen=False) for _ in range(3)]
        reservation = await reserve(server, host)
        for visitor in (client, other):
            await visitor.connect(server.peer_id, reservation.addrs)
        assert relay.circuits == 2
        await hosts.stop(client)
        await until(lambda: relay.circuits == 1 and not server.is_connected(client.peer_id))
        await hosts.stop(server)
        await until(lambda: relay.circuits == 0 and not other.is_connected(server.peer_id))
        assert relay.reservations == []

    async def test_the_relays_death_ends_the_connection(self, hosts: Hosts, until: Until) -> None:
        host, _ = await start_relay(hosts)
        server, client = await hosts.start(listen=False), await hosts.start(listen=False)
        reservation = await reserve(server, host)
        async with await client.open_stream(server.peer_id, hosts.echo, addrs=reservation.addrs) as stream:
            assert await echoes(stream)
            await hosts.stop(host)
            with pytest.raises(PeerLost), trio.fail_after(5):
                await stream.receive()
        await until(lambda: not client.is_connected(server.peer_id))

    async def test_direct_addresses_are_tried_first(self, hosts: Hosts) -> None:
        host, relay = await start_relay(hosts)
        server, client = await hosts.start(), await hosts.start(listen=False)
        reservation = await reserve(server, host)
        await client.connect(server.peer_id, [*reservation.addrs, *server.addrs])
        assert client.is_direct(server.peer_id) and relay.circuits == 0

    async def test_a_relay_cannot_pass_another_peer_off_as_the_one_wanted(self, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
        host, relay = await start_relay(hosts)
        server, impostor, client = [await hosts.start(listen=False) for _ in range(3)]
        reservation = await reserve(server, host)
        await reserve(impostor, host)
        honest = relay._open_onward
        monkeypatch.setattr(relay, "_open_onward", lambda source, target: honest(source, ID.from_string(impostor.peer_id)))
        with pytest.raises(PeerUnreachable), trio.fail_after(10):
            await client.connect(server.peer_id, reservation.addrs)
        assert not client.is_connected(server.peer_id) and not client.is_connected(impostor.peer_id)


class TestBounds:
    async def test_who_has_no_reservation_is_not_reached(self, hosts: Hosts) -> None:
        host, _ = await start_relay(hosts)
        server, client = await hosts.start(listen=False), await hosts.start(listen=False)
        await server.connect(host.peer_id, host.addrs)
        with pytest.raises(PeerUnreachable, match="no reservation"):
            await client.connect(server.peer_id, [circuit_addr(parse_peer(host.addrs[0]))])

    async def test_a_node_that_does_not_relay_refuses(self, hosts: Hosts) -> None:
        host, server = await hosts.start(), await hosts.start(listen=False)
        with pytest.raises(PeerUnreachable, match="refused"):
            await reserve(server, host)

    async def test_a_relay_that_nobody_reaches_takes_nobody_in(self, hosts: Hosts) -> None:
        host, server = await hosts.start(), await hosts.start(listen=False)
        reachable = False
        Relay(host, is_reachable=lambda: reachable)
        with pytest.raises(PeerUnreachable, match="reservation refused"):
            await reserve(server, host)
        reachable = True
        await reserve(server, host)

    async def test_reservations_are_counted_by_address(self, hosts: Hosts, until: Until) -> None:
        host, relay = await start_relay(hosts, max_reservations_per_address=2)
        servers = [await hosts.start(listen=False) for _ in range(3)]
        for server in servers[:2]:
            await reserve(server, host)
            await reserve(server, host)  # renewed: no second place
        with pytest.raises(PeerUnreachable, match="reservation refused"):
            await reserve(servers[2], host)
        await hosts.stop(servers[0])
        await until(lambda: len(relay.reservations) == 1)
        await reserve(servers[2], host)

    async def test_an_ipv6_customer_is_one_caller_whatever_its_address(self, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
        host, _ = await start_relay(hosts, max_reservations_per_address=2, max_circuits_per_address=1)
        servers = [await hosts.start(listen=False) for _ in range(3)]
        numbers = {server.peer_id: number for number, server in enumerate(servers)}
        monkeypatch.setattr(host, "remote_ip", lambda peer_id: f"2a00:1450:4001::{numbers[peer_id]:x}")
        reserved = [await reserve(server, host) for server in servers[:2]]
        with pytest.raises(PeerUnreachable, match="reservation refused"):
            await reserve(servers[2], host)
        await servers[2].connect(servers[0].peer_id, reserved[0].addrs)
        with pytest.raises(PeerUnreachable, match="resource limit exceeded"):
            await servers[0].connect(servers[1].peer_id, reserved[1].addrs)

    async def test_circuits_are_counted_by_peer(self, hosts: Hosts) -> None:
        host, relay = await start_relay(hosts, max_circuits_per_peer=1)
        server, one, two = [await hosts.start(listen=False) for _ in range(3)]
        reservation = await reserve(server, host)
        await one.connect(server.peer_id, reservation.addrs)
        with pytest.raises(PeerUnreachable, match="resource limit exceeded"):
            await two.connect(server.peer_id, reservation.addrs)
        assert one.is_connected(server.peer_id) and relay.circuits == 1

    async def test_circuits_are_counted_by_address(self, hosts: Hosts, until: Until) -> None:
        host, relay = await start_relay(hosts, max_circuits_per_address=2)
        servers = [await hosts.start(listen=False) for _ in range(3)]
        client = await hosts.start(listen=False)
        reserved = [await reserve(server, host) for server in servers]
        for server, reservation in zip(servers[:2], reserved, strict=False):
            await client.connect(server.peer_id, reservation.addrs)
        with pytest.raises(PeerUnreachable, match="resource limit exceeded"):
            await client.connect(servers[2].peer_id, reserved[2].addrs)
        await client.disconnect(servers[0].peer_id)
        await until(lambda: relay.circuits == 1)
        await client.connect(servers[2].peer_id, reserved[2].addrs)

    async def test_a_circuit_ends_when_it_has_carried_its_share(self, hosts: Hosts, until: Until) -> None:
        host, relay = await start_relay(hosts, circuit_bytes=4 * MIB)
        server, client = await hosts.start(listen=False), await hosts.start(listen=False)
        reservation = await reserve(server, host)
        with pytest.raises(PeerLost), trio.fail_after(10):
            async with await client.open_stream(server.peer_id, hosts.echo, addrs=reservation.addrs) as stream:
                await stream.send(bulk(8 * MIB))
                await stream.receive()
        await until(lambda: relay.circuits == 0)
        assert relay.bytes_relayed <= 4 * MIB
        with trio.fail_after(5):  # and another is to be had
            async with await client.open_stream(server.peer_id, hosts.echo, addrs=reservation.addrs) as stream:
                assert await echoes(stream)

    async def test_a_circuit_ends_when_its_time_is_over(self, hosts: Hosts, until: Until) -> None:
        host, relay = await start_relay(hosts, circuit_lifetime=0.3)
        server, client = await hosts.start(listen=False), await hosts.start(listen=False)
        reservation = await reserve(server, host)
        await client.connect(server.peer_id, reservation.addrs)
        await until(lambda: relay.circuits == 0 and not client.is_connected(server.peer_id))

    async def test_who_reads_nothing_holds_up_its_circuit_only(self, hosts: Hosts) -> None:
        host, relay = await start_relay(hosts)
        server, lazy, writer, client = [await hosts.start(listen=False) for _ in range(4)]
        reservation = await reserve(server, host)
        await reserve(lazy, host)

        async def accept_and_sleep(stream: INetStream) -> None:
            await read_protobuf(stream, StopMessage)  # type: ignore[arg-type]
            await write_protobuf(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))  # type: ignore[arg-type]
            await trio.sleep_forever()

        lazy.libp2p.set_stream_handler(STOP, accept_and_sleep)
        await writer.connect(host.peer_id, host.addrs)
        raw = await writer.libp2p.new_stream(ID.from_string(host.peer_id), [HOP])
        peer = PeerIdMessage(id=ID.from_string(lazy.peer_id).to_bytes())
        await write_protobuf(raw, HopMessage(type=HopMessage.CONNECT, peer=peer))
        assert (await read_protobuf(raw, HopMessage)).status == Status.OK
        sent = 0
        with trio.move_on_after(1):
            while True:
                await raw.write(bytes(64 * 1024))
                sent += 64 * 1024
        assert relay.bytes_relayed < 2 * Limits.circuit_window and sent < 4 * Limits.circuit_window
        with trio.fail_after(5):
            async with await client.open_stream(server.peer_id, hosts.echo, addrs=reservation.addrs) as stream:
                assert await echoes(stream)

    @pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 40, b"\x05\x08\x07\x12\x00\x00", b"\x90\x4e" + bytes(100)])
    async def test_garbage_is_refused_and_the_relay_serves_on(self, hosts: Hosts, data: bytes) -> None:
        host, _ = await start_relay(hosts, relay_step=1.0)
        server, stranger = await hosts.start(listen=False), await hosts.start(listen=False)
        await stranger.connect(host.peer_id, host.addrs)
        raw = await stranger.libp2p.new_stream(ID.from_string(host.peer_id), [HOP])
        await raw.write(data)
        await raw.close_write()
        await reserve(server, host)
        await hosts.check_alive(host)

    async def test_circuits_come_only_from_relays_that_were_asked(self, hosts: Hosts) -> None:
        host, relay = await start_relay(hosts)
        server, client = await hosts.start(listen=False), await hosts.start(listen=False)
        reservation = await reserve(server, host)
        server.circuits.reservations = {}
        with pytest.raises(PeerUnreachable, match="connection failed"):
            await client.connect(server.peer_id, reservation.addrs)


class TestReservations:
    async def test_two_relays_are_kept_and_one_that_is_lost_is_replaced(self, hosts: Hosts, nursery: trio.Nursery, until: Until) -> None:
        relays = [await start_relay(hosts) for _ in range(3)]
        server = await hosts.start(listen=False)
        changes = 0

        def changed() -> None:
            nonlocal changes
            changes += 1

        reservations = Reservations(server, changed)
        nursery.start_soon(reservations.run)
        for host, _ in relays:
            await server.connect(host.peer_id, host.addrs)
        await until(lambda: len(reservations.held) == 2)
        assert server.circuits.reservations.keys() == {held.relay_id for held in reservations.held}
        lost = reservations.held[0].relay_id
        await hosts.stop(next(host for host, _ in relays if host.peer_id == lost))
        await until(lambda: len(reservations.held) == 2 and lost not in {held.relay_id for held in reservations.held})
        assert changes == 4  # two, one less, another
        nursery.cancel_scope.cancel()

    async def test_a_relay_that_helps_nobody_gets_no_place(self, hosts: Hosts, nursery: trio.Nursery, until: Until) -> None:
        (near, at_near), (far, _) = await start_relay(hosts), await start_relay(hosts)
        server = await hosts.start(listen=False)
        reservations = Reservations(server, lambda: None, fits=lambda peer_id: peer_id != near.peer_id)
        await server.connect(near.peer_id, near.addrs)
        nursery.start_soon(reservations.run)
        await server.connect(far.peer_id, far.addrs)
        await until(lambda: [held.relay_id for held in reservations.held] == [far.peer_id])
        assert not at_near.reservations
        nursery.cancel_scope.cancel()


class TestStockPeers:
    """py-libp2p's own implementation at the other end."""

    async def test_a_stock_relay_relays_for_us(self, hosts: Hosts) -> None:
        server, client = await hosts.start(listen=False), await hosts.start(listen=False)
        async with stock_host() as (stock, _):
            addr = f"{stock.get_addrs()[0]}"
            relay = parse_peer(addr)
            await server.connect(relay.peer_id, [relay.addr])
            reservation = await server.circuits.reserve(relay.peer_id, (relay.addr,))
            server.circuits.reservations = {relay.peer_id: reservation}
            with trio.fail_after(10):
                async with await client.open_stream(server.peer_id, hosts.echo, addrs=[circuit_addr(relay)]) as stream:
                    assert await echoes(stream)
            assert not client.is_direct(server.peer_id)

    async def test_a_stock_client_comes_through_our_relay(self, hosts: Hosts) -> None:
        host, relay = await start_relay(hosts)
        server = await hosts.start(listen=False)
        await reserve(server, host)
        async with stock_host() as (stock, protocol):
            transport = CircuitV2Transport(stock, protocol, RelayConfig())
            await stock.connect(info_from_p2p_addr(Multiaddr(host.addrs[0])))
            with trio.fail_after(20):
                await transport.dial(Multiaddr(f"{host.addrs[0]}/p2p-circuit/p2p/{server.peer_id}"))
            assert relay.circuits == 1 and server.is_connected(str(stock.get_id()))
            assert not server.is_direct(str(stock.get_id()))


@asynccontextmanager
async def stock_host() -> AsyncIterator[tuple[IHost, CircuitV2Protocol]]:
    stock = new_host()
    async with stock.run([Multiaddr(LOOPBACK)]):
        protocol = CircuitV2Protocol(stock, allow_hop=True)
        async with background_trio_service(protocol):
            await protocol.event_started.wait()
            yield stock, protocol
