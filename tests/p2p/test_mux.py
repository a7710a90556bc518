"""The multiplexer between live hosts, and what becomes of a peer that speaks the stock one."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamReset
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from petalnet.errors import PeerLost
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.frames import FrameDecoder, FrameLimits
from petalnet.p2p.host import Host, Stream
from petalnet.p2p.messages import Ping, decode_message, encode_message
from petalnet.p2p.mux import MUX_ID, MuxConnection
from petalnet.p2p.mux_protocol import INITIAL_WINDOW
from petalnet.p2p.mux_stream import MuxStream
from petalnet.p2p.protocols import Limits, Protocol
from petalnet.p2p.session_messages import StepDone

BULK = Protocol("/petalnet/test-bulk/1.0.0", limits=FrameLimits(header=4096, payload=64 * 1024 * 1024), frame_timeout_s=5)
PATIENCE_S = 60
"""With a muxer that copies much, on a machine that is busy with other things."""


def array(size: int, seed: int = 0) -> StepDone:
    return StepDone(0, 0, Blob("uint8", (size,), "raw", random.Random(seed).randbytes(size)))


async def connection(source: Host, target: Host) -> MuxConnection:
    """The connection between two hosts, as its dialler has it."""
    await source.connect(target.peer_id, target.addrs)
    muxed = source._dialler.live(target.peer_id).muxed_conn
    assert isinstance(muxed, MuxConnection)
    return muxed


def other_side(source: Host, target: Host) -> MuxConnection:
    return target._dialler.live(source.peer_id).muxed_conn


async def test_nodes_agree_on_our_own_multiplexer(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    muxed = await connection(a, b)
    assert muxed.negotiated_muxer_protocol == MUX_ID
    assert [peer.muxer for peer in a.peers()] == [MUX_ID]


async def test_an_opened_stream_costs_no_round_trip(hosts) -> None:
    """Nothing is waited for until there is something to read."""
    a, b = await hosts.start(), await hosts.start()
    await connection(a, b)
    with trio.CancelScope() as scope:
        scope.cancel()  # whatever waits would raise
        with trio.CancelScope(shield=True, deadline=trio.current_time()):
            stream = await a.open_stream(b.peer_id, hosts.echo)
    await stream.send(Ping(1))
    assert await stream.receive() == Ping(1)
    await stream.close()


async def test_a_short_message_passes_the_long_ones_of_other_streams(hosts, nursery: trio.Nursery) -> None:
    """While four streams always have 8 MB to send, each short round trip is over before the long messages are."""
    a, b = await hosts.start(), await hosts.start()
    swallowed = []

    async def swallow(stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            swallowed.append(len(message.output.data))

    b.serve(BULK, swallow)
    async with trio.open_nursery() as bulk:

        async def push() -> None:
            async with await a.open_stream(b.peer_id, BULK, addrs=b.addrs) as stream:
                while True:
                    await stream.send(array(8 << 20))

        for _ in range(4):
            bulk.start_soon(push)
        async with await a.open_stream(b.peer_id, hosts.echo, addrs=b.addrs) as stream:
            behind = []
            for number in range(20):
                before = len(swallowed)
                await stream.send(Ping(number))
                assert await stream.receive() == Ping(number)
                behind.append(len(swallowed) - before)
        bulk.cancel_scope.cancel()
    # Behind the bulk it would wait for what all four have queued, four messages and more.
    assert sorted(behind)[len(behind) // 2] <= 2


async def test_a_stream_that_nobody_reads_holds_its_window_and_no_more(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    taken = trio.Event()
    streams = []

    async def ignore(stream: Stream) -> None:
        streams.append(stream)
        await taken.wait()

    b.serve(BULK, ignore)
    async with await a.open_stream(b.peer_id, BULK, addrs=b.addrs) as stream:
        with trio.move_on_after(0.5) as scope:
            await stream.send(array(8 << 20))
        assert scope.cancelled_caught
        assert streams[0]._raw.held <= INITIAL_WINDOW
    taken.set()


async def test_a_peer_that_exceeds_a_window_loses_its_connection(hosts, until) -> None:
    a, b = await hosts.start(), await hosts.start()
    hold = trio.Event()

    async def ignore(stream: Stream) -> None:
        await hold.wait()

    b.serve(BULK, ignore)
    muxed = await connection(a, b)
    stream = muxed.open(BULK.id)
    muxed.mux._streams[stream.number].credit += 1 << 16  # as if it had been granted
    with contextlib.suppress(MuxedStreamReset):
        await stream.send([bytes(INITIAL_WINDOW + 1)])
    await until(lambda: not b.connected_peers())
    assert len(b.admission.offences) == 1
    hold.set()
    await hosts.check_alive(b)


async def test_a_long_message_is_reserved_and_given_back(hosts, until) -> None:
    """What a message takes of the budget is free again once the next one is asked for."""
    limits = Limits(max_held_per_peer=20 << 20, max_held=20 << 20)
    a, b = await hosts.start(), await hosts.start(limits=limits)
    b.serve(BULK, _echo)
    async with await a.open_stream(b.peer_id, BULK, addrs=b.addrs) as stream:
        for seed in range(4):
            await stream.send(array(8 << 20, seed))
            answer = await stream.receive()
            assert bytes(answer.output.data) == array(8 << 20, seed).output.data
        assert 0 < b._budget.held <= 20 << 20
    await until(lambda: b._budget.held == 0)


async def test_a_message_that_is_read_ahead_counts_beside_the_one_in_use(hosts, until) -> None:
    a, b = await hosts.start(), await hosts.start()
    held = []

    async def read(stream: Stream) -> None:
        for ahead in (False, True, True, False):
            await stream.receive(ahead=ahead)
            held.append((b._budget.held - b.limits.busy_window) / (8 << 20))

    b.serve(BULK, read)
    async with await a.open_stream(b.peer_id, BULK, addrs=b.addrs) as stream:
        for seed in range(4):
            await stream.send(array(8 << 20, seed))
        await until(lambda: len(held) == 4)
    assert [round(messages, 2) for messages in held] == [1, 2, 2, 1]
    await until(lambda: b._budget.held == 0)


async def test_a_message_for_which_there_is_no_memory_is_refused_as_busy(hosts) -> None:
    small = Protocol(BULK.id, limits=BULK.limits, frame_timeout_s=0.2)
    a, b = await hosts.start(), await hosts.start(limits=Limits(max_held_per_peer=1 << 20, max_held=1 << 20))
    b.serve(small, _echo)
    async with await a.open_stream(b.peer_id, small, addrs=b.addrs) as stream:
        try:
            await stream.send(array(4 << 20))
        except PeerLost:
            pass  # the refusal came while it was sent
        else:
            assert (await stream.receive()).code == "busy"
    await hosts.check_alive(b)


async def test_streams_are_forgotten_whoever_ends_them_first(hosts, until) -> None:
    a, b = await hosts.start(), await hosts.start()
    muxed = await connection(a, b)
    there = other_side(a, b)
    idle = len(muxed.streams)
    for how in ("close", "reset", "close"):
        for _ in range(20):
            stream = await a.open_stream(b.peer_id, hosts.echo)
            await stream.send(Ping(1))
            await stream.receive()
            await getattr(stream, how)()
    await until(lambda: len(muxed.streams) <= idle + 1 and len(there.streams) <= idle + 1)  # a heartbeat may be under way
    assert len(muxed.mux._streams) == len(muxed.streams)


async def test_libp2p_s_view_of_a_stream(hosts, nursery: trio.Nursery) -> None:
    """Reads, half-closes and resets as libp2p's own protocols see them."""
    a, b = await hosts.start(), await hosts.start()
    to_serve, to_test = trio.open_memory_channel[NetStream](1)
    hold = trio.Event()

    async def serve(stream: NetStream) -> None:
        await to_serve.send(stream)
        await hold.wait()

    b.libp2p.set_stream_handler(TProtocol("/raw/1"), serve)
    muxed = await connection(a, b)
    stream = muxed.open("/raw/1")
    assert isinstance(stream, MuxStream)
    await stream.write(b"hello")
    served = await to_test.receive()
    assert await served.read(2) == b"he"
    assert await served.read(100) == b"llo"
    await served.write(b"answer")
    await served.close_write()
    assert await stream.read() == b"answer"
    with pytest.raises(MuxedStreamEOF):
        await stream.read()
    await stream.write(b"still open this way")
    assert await served.read() == b"still open this way"
    await stream.reset()
    with pytest.raises(MuxedStreamReset):
        await stream.write(b"more")
    hold.set()


async def _echo(stream: Stream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


@asynccontextmanager
async def stock_host() -> AsyncIterator[IHost]:
    keys = create_new_key_pair()
    noise = Transport(keys, noise_privkey=create_x25519_key_pair().private_key)
    host = new_host(key_pair=keys, sec_opt={NOISE_ID: noise}, muxer_opt={TProtocol("/yamux/1.0.0"): Yamux})
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host


async def read_message(stream: NetStream, decoder: FrameDecoder) -> Message:
    while (frame := decoder.next_frame()) is None:
        decoder.feed(await stream.read(65536))
    return decode_message(frame)


async def write(stream: NetStream, data: bytes) -> None:
    """Write no more at a time than the stock muxer's window takes: it waits five seconds for more, which a machine under load may need."""
    muxed: Any = stream.muxed_stream
    rest = memoryview(data)
    while rest:
        while not muxed.send_window:  # noqa: ASYNC110  # it tells nobody of a wider one
            await trio.sleep(0.001)
        count = min(muxed.send_window, len(rest))
        await stream.write(bytes(rest[:count]))
        rest = rest[count:]


async def test_a_stock_peer_is_served_over_yamux(hosts) -> None:
    b = await hosts.start()
    patient = dataclasses.replace(BULK, frame_timeout_s=PATIENCE_S)
    b.serve(patient, _echo)
    async with stock_host() as stock:
        await stock.connect(info_from_p2p_addr(Multiaddr(b.addrs[0])))
        stream = await stock.new_stream(info_from_p2p_addr(Multiaddr(b.addrs[0])).peer_id, [TProtocol(BULK.id)])
        decoder = FrameDecoder(BULK.limits)
        for size in (1, 5000, 3 << 20):
            with trio.fail_after(PATIENCE_S):
                await write(stream, b"".join(encode_message(array(size))))
                assert bytes((await read_message(stream, decoder)).output.data) == array(size).output.data
        assert {peer.muxer for peer in b.peers()} == {"/yamux/1.0.0"}
        await stream.close()
    await hosts.check_alive(b)


async def test_a_stock_peer_is_asked_over_yamux(hosts) -> None:
    a = await hosts.start()

    async def serve(stream: NetStream) -> None:
        decoder = FrameDecoder(BULK.limits)
        while True:
            await stream.write(b"".join(encode_message(await read_message(stream, decoder))))

    async with stock_host() as stock:
        stock.set_stream_handler(TProtocol(BULK.id), serve)
        peer_id = str(stock.get_id())
        async with await a.open_stream(peer_id, BULK, addrs=[str(addr).partition("/p2p/")[0] for addr in stock.get_addrs()]) as stream:
            for size in (1, 5000, 1 << 20):
                await stream.send(array(size))
                with trio.fail_after(20):
                    assert bytes((await stream.receive()).output.data) == array(size).output.data


async def test_a_stock_peer_cannot_fill_a_stream_without_end(hosts, until) -> None:
    b = await hosts.start()
    hold = trio.Event()

    async def ignore(stream: Stream) -> None:
        await hold.wait()

    b.serve(BULK, ignore)
    async with stock_host() as stock:
        target = info_from_p2p_addr(Multiaddr(b.addrs[0]))
        await stock.connect(target)
        stream = await stock.new_stream(target.peer_id, [TProtocol(BULK.id)])
        muxed = stream.muxed_stream
        with trio.move_on_after(20):
            while b.connected_peers():
                muxed.send_window = 1 << 30  # as if it had been granted
                try:
                    await muxed.write(bytes(1 << 16))
                except Exception:  # the victim has hung up, in whatever form the stock muxer tells
                    break
        await until(lambda: not b.connected_peers())
    hold.set()
    await hosts.check_alive(b)
