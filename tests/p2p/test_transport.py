"""The TCP transport: who is let in, and how sockets are set up."""

from __future__ import annotations

import socket

import pytest
import trio
from libp2p.io.exceptions import ConnectionClosedError

from petalnet.p2p.protocols import Limits
from petalnet.p2p.transport import Callers, TcpStream, tune


async def pair() -> tuple[TcpStream, TcpStream]:
    """Both ends of a connection on loopback."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        dialled = trio.socket.socket()
        tune(dialled)
        await dialled.connect(listener.socket.getsockname())
        accepted = await listener.accept()
    return TcpStream(dialled), TcpStream(accepted.socket)


async def test_bytes_go_both_ways_and_the_end_is_seen() -> None:
    a, b = await pair()
    await a.write(b"there")
    assert await b.read(100) == b"there"
    await b.write(b"back")
    buffer = bytearray(10)
    assert await a.receive_into(memoryview(buffer)) == 4
    assert buffer.startswith(b"back")
    await a.close()
    assert await b.read(1) == b""
    await b.close()
    await b.close()
    with pytest.raises(ConnectionClosedError):
        await b.read(1)
    with pytest.raises(ConnectionClosedError):
        b.try_send(b"x")


async def test_what_the_kernel_does_not_take_is_for_later(nursery: trio.Nursery) -> None:
    a, b = await pair()
    piece, sent = bytes(1 << 20), 0
    while now := a.try_send(piece):
        sent += now
    assert a.try_send(piece) == 0

    async def drain() -> None:
        received, buffer = 0, memoryview(bytearray(1 << 20))
        while size := await b.receive_into(buffer):
            received += size
        assert received == sent
        over.set()

    over = trio.Event()
    nursery.start_soon(drain)
    sent += await a.send_some(piece)
    await a.close()
    with trio.fail_after(5):
        await over.wait()


async def test_closing_wakes_whoever_reads(nursery: trio.Nursery) -> None:
    a, b = await pair()
    async with trio.open_nursery() as readers:

        async def read() -> None:
            with pytest.raises(ConnectionClosedError):
                await a.read(1)

        readers.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await a.close()
    await b.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the kernel tells no round trips")
async def test_sockets_are_set_up_for_short_messages() -> None:
    a, b = await pair()
    await a.write(b"x")
    await b.read(1)
    for end in (a, b):
        assert end._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert a._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 8).rstrip(b"\0") == b"cubic"
    round_trip_s = a.round_trip_s()
    assert round_trip_s is not None
    assert 0 < round_trip_s < 0.1
    await a.close()
    await b.close()
    assert a.round_trip_s() is None


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the kernel tells no rates")
async def test_what_a_link_carries_is_known_once_there_was_more_than_it_took(nursery: trio.Nursery) -> None:
    a, b = await pair()

    async def read() -> None:
        while await b.read(1 << 20):
            pass
        await b.close()

    nursery.start_soon(read)
    for _ in range(3):
        await a.write(b"x" * 1000)
    assert a.bytes_s() is None  # that was no measure of it
    for _ in range(32):
        await a.write(bytes(1 << 20))
    assert (a.bytes_s() or 0) > 10e6
    await a.write(b"x")
    assert (a.bytes_s() or 0) > 10e6  # what comes later takes nothing away
    await a.close()
    assert a.bytes_s() is not None


async def test_who_holds_up_handshakes_makes_room_for_who_comes_later() -> None:
    callers = Callers(Limits(max_connections_per_address=5, max_handshakes_per_address=2, max_handshakes=3))
    streams = [end for _ in range(5) for end in await pair()]
    slow, slower, honest, other, more, last, *_ = streams
    assert callers.arrived(slow, "10.0.0.1") is None
    assert callers.arrived(slower, "10.0.0.1") is None
    assert callers.arrived(honest, "10.0.0.1") is slow  # the oldest of the address
    callers.left(slow)
    callers.established(honest)
    assert callers.arrived(other, "10.0.0.2") is None
    assert callers.arrived(more, "10.0.0.3") is None
    assert callers.arrived(last, "10.0.0.4") is slower  # the oldest of all
    for stream in streams:
        await stream.close()


async def test_connections_of_one_address_are_bounded() -> None:
    callers = Callers(Limits(max_connections_per_address=2, max_handshakes_per_address=9))
    streams = [end for _ in range(2) for end in await pair()]
    first, second, third, _ = streams
    for stream in (first, second):
        assert callers.arrived(stream, "10.0.0.1") is None
        callers.established(stream)
    assert callers.arrived(third, "10.0.0.1") is third
    assert callers.arrived(third, "10.0.0.2") is None
    callers.left(first)
    assert callers.arrived(first, "10.0.0.1") is None
    for stream in streams:
        await stream.close()


async def test_a_few_addresses_do_not_keep_all_others_out() -> None:
    callers = Callers(Limits(max_connections=9, max_connections_per_address=6))  # 8 places for callers
    streams = [end for _ in range(6) for end in await pair()]
    crowd, friends = streams[:6], streams[6:]
    for stream in crowd:
        assert callers.arrived(stream, "10.0.0.1") is None
        callers.established(stream)
    for number, friend in enumerate(friends):
        evicted = callers.arrived(friend, f"10.0.1.{number}")
        callers.established(friend)
        assert evicted is (None if number < 2 else crowd[7 - number])  # the latest of the crowd
    callers.left(crowd[5])  # its task ends after it was evicted: it is not counted twice
    assert sum(callers._connections.values()) == 8
    for stream in streams:
        await stream.close()
