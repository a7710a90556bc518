"""What a review of the network found: each once ended a node, hindered others, or held memory for longer than it should."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest
import trio
import trio.testing
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status, StopMessage
from libp2p.stream_muxer.exceptions import MuxedStreamReset
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID

from petalnet.errors import PeerLost, PeerUnreachable
from petalnet.p2p import stock_streams
from petalnet.p2p.admission import Admission
from petalnet.p2p.circuit import STOP, read_protobuf, write_protobuf
from petalnet.p2p.frames import PREFIX
from petalnet.p2p.hole_punching import HolePunching
from petalnet.p2p.host import Host, Stream
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error, Ping
from petalnet.p2p.mux import MuxConnection
from petalnet.p2p.mux_protocol import INITIAL_WINDOW, Mux
from petalnet.p2p.mux_stream import MuxStream
from petalnet.p2p.protocols import Limits, Protocol
from petalnet.p2p.swarm_key import SwarmKey
from petalnet.p2p.transport import caller_of

from .attackers import Attacker
from .conftest import serve_echo
from .test_mux import array
from .test_relay import reserve, start_relay


async def connection(source: Host, target: Host) -> MuxConnection:
    await source.connect(target.peer_id, target.addrs)
    muxed = source._dialler.live(target.peer_id).muxed_conn
    assert isinstance(muxed, MuxConnection)
    return muxed


@pytest.mark.parametrize(
    "answer",
    [
        bytes(50),  # a handshake message of no length
        b"\x00\x05hello",  # too short for a key
        b"\x00\x60" + bytes(96),  # a key that no key exchange takes
        b"\x00\x60" + bytes(range(96)),  # a good key, and nothing that it decrypts
        b"",
    ],
)
async def test_rubbish_in_a_handshake_through_a_relay_is_an_unreachable_peer(hosts, answer: bytes) -> None:
    """Whoever dials is told so in one way, whatever a stranger's bytes make of the libraries beneath."""
    host, _ = await start_relay(hosts)
    server, client = await hosts.start(listen=False), await hosts.start(listen=False)
    reservation = await reserve(server, host)

    async def mock(stream: INetStream) -> None:
        await read_protobuf(stream, StopMessage)
        await write_protobuf(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
        await stream.read(20)
        await stream.write(b"\x13/multistream/1.0.0\n\x07/noise\n")
        await stream.read(100)
        await stream.write(answer)

    server.libp2p.set_stream_handler(STOP, mock)
    with trio.fail_after(15), pytest.raises(PeerUnreachable):
        await client.connect(server.peer_id, reservation.addrs)


@pytest.mark.parametrize("answer", [b"", b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(32)])
async def test_a_hole_behind_which_nobody_shakes_hands(hosts, monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    """One who says nothing, or nonsense, where two dials have met: the search for a hole is over, and not the node."""
    host = await hosts.start(limits=Limits(handshake_timeout=0.3))
    punching = HolePunching(host)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        silent = await trio.open_tcp_stream(*listener.socket.getsockname())
        met = await listener.accept()
        await silent.send_all(answer)

        class Port:
            async def dial(self, targets: object) -> trio.socket.SocketType:
                return met.socket

        async def connect(peer_id: str) -> bool:
            return await punching._connect(peer_id, Port(), [], initiator=False)  # type: ignore[arg-type]

        monkeypatch.setattr(punching, "_try", connect)
        with trio.fail_after(5):
            await punching._lead(Identity.generate().peer_id)
        await silent.aclose()
    await hosts.check_alive(host)


async def test_a_message_that_drips_does_not_hold_memory_for_hours(hosts, until) -> None:
    """A byte now and then is not enough, though the message as a whole may take long at the slowest rate."""
    a, b = await hosts.start(), await hosts.start()
    stream = (await connection(a, b)).open(hosts.echo.id)
    await stream.send([PREFIX.pack(1, 0, 0, 1000, 60 << 20)])
    await until(lambda: b._budget.held == 1000 + (60 << 20))
    with trio.fail_after(3), contextlib.suppress(MuxedStreamReset):
        while True:
            await stream.send([b"x"])
            await trio.sleep(0.05)
    await until(lambda: b._budget.held == 0)


async def test_an_answer_that_is_read_in_drips_does_not_hold_memory_for_hours(hosts) -> None:
    a, b = await hosts.start(), await hosts.start(echo=False)
    failure: list[PeerLost] = []
    over = trio.Event()

    async def answer(stream: Stream) -> None:
        try:
            await stream.send(array(8 << 20))
        except PeerLost as error:
            failure.append(error)
        over.set()

    b.serve(hosts.echo, answer)
    stream = (await connection(a, b)).open(hosts.echo.id)
    await stream.wait(1)
    with trio.fail_after(3):
        while not over.is_set():
            stream.muxed_conn.mux.grant(stream.number, 1)
            stream.muxed_conn.pump()
            await trio.sleep(0.05)
    assert failure


async def test_a_sender_that_is_cancelled_takes_nobody_else_s_bytes_back(hosts) -> None:
    """Of two tasks that send on one stream, the one that goes on either sends all, or is told that it did not."""
    a, b = await hosts.start(), await hosts.start()
    hold = trio.Event()

    async def ignore(stream: INetStream) -> None:
        await hold.wait()

    b.libp2p.set_stream_handler(TProtocol("/raw/1"), ignore)
    stream = (await connection(a, b)).open("/raw/1")
    await stream.send([bytes(INITIAL_WINDOW)])
    outcome: list[str] = []

    async def send() -> None:
        try:
            await stream.send([b"first"])
        except MuxedStreamReset:
            outcome.append("reset")
        else:
            outcome.append("sent")

    with trio.fail_after(3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked(0.01)
            with trio.move_on_after(0.05):
                await stream.send([b"second"])
    assert outcome == ["reset"]
    hold.set()


async def test_bytes_are_read_in_any_pieces(hosts, until) -> None:
    """As libp2p's readers do it, who take lengths byte by byte."""
    chance = random.Random(1)
    a, b = await hosts.start(), await hosts.start()
    served: list[INetStream] = []
    hold = trio.Event()

    async def keep(stream: INetStream) -> None:
        served.append(stream)
        await hold.wait()

    b.libp2p.set_stream_handler(TProtocol("/raw/1"), keep)
    stream = (await connection(a, b)).open("/raw/1")
    text = chance.randbytes(200_000)
    read = bytearray()
    sent = 0
    while len(read) < len(text):
        if sent < len(text) and chance.random() < 0.3:
            size = chance.choice([1, 30, 3000, 30_000])
            await stream.send([text[sent : sent + size]])
            sent = min(sent + size, len(text))
            await until(lambda: bool(served))
        elif len(read) < sent:
            piece = await served[0].read(chance.choice([1, 2, 100, 5000, 100_000]))
            assert piece
            read += piece
            raw = served[0].muxed_stream  # type: ignore[attr-defined]
            assert isinstance(raw, MuxStream) and raw.held == sum(map(len, raw._chunks))
    assert read == text
    hold.set()


async def test_streams_that_come_and_go_leave_no_task_each(hosts, until) -> None:
    a, b = await hosts.start(), await hosts.start()
    await connection(a, b)

    def tasks() -> int:
        found, left = 0, [trio.lowlevel.current_root_task()]
        while left:
            task = left.pop()
            found += 1
            left += [child for nursery in task.child_nurseries for child in nursery.child_tasks] if task is not None else []
        return found

    before = tasks()
    for number in range(50):
        async with await a.open_stream(b.peer_id, hosts.echo) as stream:
            await stream.send(Ping(number))
            await stream.receive()
    await until(lambda: tasks() <= before + 10, within_s=1)  # well before what lingers would have been reset


async def test_streams_that_are_refused_count_as_opened() -> None:
    """Else a peer that opens more than it may would be read as fast as it likes."""
    ours, theirs = Mux(initiator=False, max_streams=2), Mux(initiator=True, max_streams=2)
    for _ in range(5):
        theirs.open("/x")
    ours.receive(b"".join(theirs.output(1 << 20)))
    assert (ours.openings, ours.remote_streams) == (5, 2)


@pytest.mark.parametrize(
    ("ip", "caller"),
    [
        ("203.0.114.7", "203.0.114.7"),
        ("::ffff:203.0.114.7", "203.0.114.7"),  # the same machine, on a socket for both
        ("2a01:4f8:1:2::3", "2a01:4f8:1::/48"),
        ("2a01:4f8:1:ffff::9", "2a01:4f8:1::/48"),
        ("fd00:1:2:3::4", "fd00:1:2:3::4"),
        ("fe80::1%eth0", "fe80::1"),
        ("::1", "::1"),
    ],
)
def test_a_customer_s_ipv6_addresses_are_one_caller(ip: str, caller: str) -> None:
    """Who has 2^80 of them would fill all places, few from each."""
    assert caller_of((ip, 31330)) == caller


async def test_a_peer_that_opens_streams_of_libp2p_s_protocols_without_end_waits_by_itself(hosts, until) -> None:
    """Each costs a millisecond: one peer that asked for `identify` again and again made all others wait for seconds."""
    b = await hosts.start(limits=Limits(max_libp2p_streams=10))
    mallory, friend = await hosts.start(), await hosts.start()
    served: list[str] = []

    async def count(stream: INetStream) -> None:
        served.append(str(stream.muxed_conn.peer_id))

    b.libp2p.set_stream_handler(TProtocol("/raw/1"), count)
    theirs, ours = await connection(mallory, b), await connection(friend, b)
    for _ in range(100):
        theirs.open("/raw/1").muxed_conn.pump()
    await trio.sleep(0.5)
    assert 1 < served.count(mallory.peer_id) <= 20 + 10  # a burst and what half a second allows
    ours.open("/raw/1").muxed_conn.pump()
    await until(lambda: friend.peer_id in served, within_s=1)
    await hosts.check_alive(b)


async def test_a_stream_that_is_over_when_its_turn_comes_is_not_served(hosts) -> None:
    b = await hosts.start(limits=Limits(max_libp2p_streams=4))
    mallory = await hosts.start()
    served = 0

    async def count(stream: INetStream) -> None:
        nonlocal served
        served += 1

    b.libp2p.set_stream_handler(TProtocol("/raw/1"), count)
    theirs = await connection(mallory, b)
    for _ in range(30):
        await theirs.open("/raw/1").reset()
    await trio.sleep(2)
    assert served <= 8


async def test_idle_streams_of_one_address_make_room_for_another(hosts, until, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identities cost nothing: a few of them could hold all places of a protocol for as long as a stream may be idle."""
    protocol = Protocol("/petalnet/test-places/1.0.0", max_streams=6, max_streams_per_peer=3)
    b = await hosts.start(echo=False)
    b.serve(protocol, serve_echo)
    mallory, friend = [await hosts.start() for _ in range(3)], await hosts.start()
    # All come from this machine: where from is what the multiplexer says.
    monkeypatch.setattr(
        MuxStream, "get_remote_address", lambda self: ("10.0.0.2" if str(self.muxed_conn.peer_id) == friend.peer_id else "10.0.0.1", 1)
    )

    async def opened(host: Host) -> Stream:
        stream = await host.open_stream(b.peer_id, protocol, addrs=b.addrs)
        await stream.send(Ping(1))
        assert await stream.receive() == Ping(1)
        return stream

    held = [await opened(host) for host in mallory[:2] for _ in range(3)]
    refused = await mallory[2].open_stream(b.peer_id, protocol, addrs=b.addrs)
    answer = await refused.receive()
    assert isinstance(answer, Error) and answer.code == "busy"  # none of its own makes room for it

    streams = [await opened(friend) for _ in range(3)]
    for number in range(3):
        with pytest.raises(PeerLost):
            await held[number].receive()  # those that were idle for longest had to go
    for stream in (*held[3:], *streams):
        await stream.send(Ping(2))
        assert await stream.receive() == Ping(2)
        await stream.close()
    await until(lambda: b.libp2p._inbound.total() <= 8)


async def test_streams_of_one_address_are_bounded(hosts, until) -> None:
    b = await hosts.start(limits=Limits(max_streams_per_address=20, linger=0.1), echo=False)
    mallory, other = await hosts.start(), await hosts.start()
    hold = trio.Event()

    async def keep(stream: Stream) -> None:
        await hold.wait()

    b.serve(hosts.echo, keep)
    for host in (mallory, other):
        for _ in range(30):
            (await connection(host, b)).open(hosts.echo.id).muxed_conn.pump()
    await until(lambda: b.libp2p._inbound.total() == 20)
    await trio.sleep(0.2)
    assert b.libp2p._inbound.total() == 20
    hold.set()
    await until(lambda: b.libp2p._inbound.total() < 10 and len(b.libp2p._inbound_from) <= 1)


async def test_words_of_the_stock_multiplexer_do_not_rule_alone(hosts, nursery: trio.Nursery) -> None:
    """It reads 12 bytes at a time, of which thousands come in one piece: nobody else had a turn, and one peer's pings hung the node."""
    b = await hosts.start()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with Attacker(b.addrs[0]).connected(muxer=YAMUX_ID) as channel:
        session = channel.session
        session._plain = bytearray(random.Random(1).randbytes(12_000))  # as if it had just been decrypted
        expected = bytes(session._plain)
        nursery.start_soon(other)
        assert b"".join([await session.read(12) for _ in range(1000)]) == expected
        assert turns > 30
        assert session.unread == 0


async def test_stock_peers_share_what_they_may_leave_unread(hosts, until, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is granted for each stream, and nothing else bounds how many peers fill them."""
    monkeypatch.setattr(stock_streams, "MAX_HELD_BY_ALL", 2 << 20)
    b = await hosts.start()
    hold = trio.Event()

    async def keep(stream: INetStream) -> None:
        await hold.wait()

    b.libp2p.set_stream_handler(TProtocol("/raw/1"), keep)
    words = b"\x13/multistream/1.0.0\n\x07/raw/1\n"
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(Attacker(b.addrs[0]).connected(muxer=YAMUX_ID)) for _ in range(4)]
        await until(lambda: b._stock_connections() == 4)
        with contextlib.suppress(trio.BrokenResourceError):
            for number in range(1, 9, 2):
                await channels[0].send(struct.pack("!BBHII", 0, 1, 1, number, 0), struct.pack("!BBHII", 0, 0, 0, number, len(words)), words)
                for _ in range(6):
                    await channels[0].send(struct.pack("!BBHII", 0, 0, 0, number, 40_000), bytes(40_000))
        await until(lambda: b._stock_connections() == 3)
    hold.set()
    await hosts.check_alive(b)


async def test_who_does_not_prove_its_key_is_waited_for_no_longer_than_a_handshake(hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    key = SwarmKey.generate()
    server = await hosts.start(admission=Admission(swarm_key=key))
    client = await hosts.start(admission=Admission(swarm_key=key), limits=Limits(handshake_timeout=0.3))

    async def say_nothing(session: object, handshake_hash: bytes, *, initiator: bool) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(server.admission, "prove", say_nothing)
    with trio.fail_after(5), pytest.raises(PeerUnreachable):
        await client.connect(server.peer_id, server.addrs, timeout_s=60)


async def test_a_stream_that_its_peer_never_ends_is_not_kept_for_ever(hosts, until) -> None:
    """What libp2p's own protocols ask a peer and close was kept as long as its connection, where the peer left its side open."""
    a, b = await hosts.start(limits=Limits(linger=0.05)), await hosts.start()
    hold = trio.Event()

    async def answer(stream: INetStream) -> None:
        await stream.read(1)
        await trio.sleep(0.1)
        await stream.write(b"late")
        await hold.wait()

    b.libp2p.set_stream_handler(TProtocol("/raw/1"), answer)
    muxed = await connection(a, b)
    idle = len(muxed.streams)
    closed, half = [[await a._new_stream(b.peer_id, [TProtocol("/raw/1")], (), 5) for _ in range(5)] for _ in range(2)]
    for stream in (*closed, *half):
        await stream.write(b"x")
    for stream in closed:
        await stream.close()
    for stream in half:
        await stream.close_write()
    for stream in (*closed, *half):
        assert await stream.read() == b"late"  # a closed one can still be read
    await until(lambda: len(muxed.streams) <= idle + len(half) + 1, within_s=3)
    assert all(not stream.muxed_stream.is_over for stream in half)
    hold.set()
