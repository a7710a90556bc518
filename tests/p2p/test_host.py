"""Hosts listen, dial, serve and part, over real TCP on loopback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import trio

from petalnet.errors import AddressInUse, BusyError, CallerError, PeerLost, PeerUnreachable, UnsupportedError, UsageError
from petalnet.p2p import heartbeat
from petalnet.p2p.fields import Blob
from petalnet.p2p.host import Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error, Ping, Pong
from petalnet.p2p.protocols import PING, Limits, Protocol
from petalnet.p2p.session_messages import StepDone

SOME = Protocol("/petalnet/test/1.0.0")


def numbered(number: int, size: int = 4096) -> StepDone:
    return StepDone(number, 0, Blob("uint8", (size,), "raw", bytes([number % 256]) * size))


async def test_messages_travel_both_ways_in_order(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    async with await a.open_stream(b.peer_id, hosts.echo, addrs=b.addrs) as stream:
        assert stream.peer_id == b.peer_id and not stream.served
        for number, size in enumerate([0, 1, 4096, 70_000, 3_000_000, 10]):
            await stream.send(numbered(number, size))
            back = await stream.receive()
            assert isinstance(back, StepDone) and back.step == number
            assert bytes(back.output.data) == bytes([number]) * size


async def test_both_directions_flow_at_once(hosts, nursery) -> None:
    """8 MB out while 8 MB come back: neither side waits for the other to read."""
    a, b = await hosts.start(), await hosts.start()
    async with await a.open_stream(b.peer_id, hosts.echo, addrs=b.addrs) as stream, trio.open_nursery() as inner:

        async def send() -> None:
            for number in range(8):
                await stream.send(numbered(number, 1 << 20))

        inner.start_soon(send)
        for number in range(8):
            back = await stream.receive()
            assert isinstance(back, StepDone) and back.step == number


async def test_connections_are_made_by_the_peer_id(hosts) -> None:
    a, b, c = await hosts.start(), await hosts.start(), await hosts.start()
    await a.connect(b.peer_id, b.addrs)
    assert a.connected_peers() == [b.peer_id] and a.is_connected(b.peer_id)
    assert set(a.known_addrs(b.peer_id)) >= {b.addrs[0].partition("/p2p/")[0]}
    with pytest.raises(PeerUnreachable, match=c.peer_id):
        await a.connect(c.peer_id, b.addrs)  # b answers there, and is not c
    await a.connect(c.peer_id, ["/ip4/127.0.0.1/tcp/9", *c.addrs])  # the first address refuses, the next one answers
    assert sorted(a.connected_peers()) == sorted([b.peer_id, c.peer_id])
    with pytest.raises(PeerUnreachable, match="itself"):
        await a.connect(a.peer_id, a.addrs)


async def test_who_cannot_be_reached_is_told_at_once_or_in_time(hosts) -> None:
    a = await hosts.start()
    nobody = Identity.generate().peer_id
    with pytest.raises(PeerUnreachable, match="no address"):
        await a.connect(nobody)
    with trio.fail_after(2), pytest.raises(PeerUnreachable, match="/ip4/127.0.0.1/tcp/9: "):
        await a.connect(nobody, ["/ip4/127.0.0.1/tcp/9"])
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]  # takes connections and never says a word
    port = listener.socket.getsockname()[1]
    with trio.fail_after(2), pytest.raises(PeerUnreachable, match=r"within 0\.3 s"):
        await a.connect(nobody, [f"/ip4/127.0.0.1/tcp/{port}"], timeout_s=0.3)
    await listener.aclose()


async def test_a_silent_address_does_not_hold_up_the_next_one(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    with trio.fail_after(3):
        await a.connect(b.peer_id, [f"/ip4/127.0.0.1/tcp/{port}", *b.addrs])
    await listener.aclose()


async def test_many_who_need_a_peer_share_one_connection(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(a.connect, b.peer_id, b.addrs)
    assert sum(len(found) for found in a.libp2p.swarm.connections.values()) == 1


async def test_a_busy_port_is_an_error_of_its_own(hosts) -> None:
    a = await hosts.start()
    addr = a.addrs[0].partition("/p2p/")[0]
    with pytest.raises(AddressInUse, match=addr):
        async with open_host(Identity.generate(), listen=[addr]):
            pass
    with pytest.raises(UsageError, match="cannot listen"):
        async with open_host(Identity.generate(), listen=["/ip4/203.0.113.7/tcp/0"]):
            pass
    with pytest.raises(UsageError, match="rubbish"):
        async with open_host(Identity.generate(), listen=["rubbish"]):
            pass


async def test_exceptions_of_the_body_come_out_bare() -> None:
    with pytest.raises(KeyError):
        async with open_host(Identity.generate()):
            raise KeyError("mine")


async def test_addresses_are_ones_that_others_can_use() -> None:
    async with open_host(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0"]) as host:
        assert host.addrs and all(addr.endswith(f"/p2p/{host.peer_id}") and "0.0.0.0" not in addr for addr in host.addrs)
    announced = "/dns4/example.org/tcp/443"
    async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"], announce=[announced]) as host:
        assert host.addrs == [f"{announced}/p2p/{host.peer_id}"]
    async with open_host(Identity.generate()) as host:
        assert host.addrs == []


async def test_a_host_closes_fast_with_peers_and_streams_open(hosts) -> None:
    a = await hosts.start()
    others = [await hosts.start() for _ in range(5)]
    streams = [await a.open_stream(other.peer_id, hosts.echo, addrs=other.addrs) for other in others]
    began = trio.current_time()
    await hosts.stop(a)
    assert trio.current_time() - began < 1
    with pytest.raises(PeerLost):
        await streams[0].receive()


# ---- peers that go


async def test_a_peer_that_leaves_is_noticed_by_all(hosts, until) -> None:
    a, b = await hosts.start(), await hosts.start()
    lost: list[str] = []
    a.on_peer_lost(lost.append)
    stream = await a.open_stream(b.peer_id, hosts.echo, addrs=b.addrs)
    await hosts.stop(b)
    with trio.fail_after(2), pytest.raises(PeerLost, match=b.peer_id):
        await stream.receive()
    await until(lambda: lost == [b.peer_id], within_s=2)
    assert a.connected_peers() == []
    with pytest.raises(PeerLost):
        await stream.send(Ping(1))


async def test_a_peer_comes_back_under_its_identity(hosts, until) -> None:
    a = await hosts.start()
    identity = Identity.generate()
    for _ in range(3):
        b = await hosts.start(identity=identity)
        async with await a.open_stream(b.peer_id, hosts.echo, addrs=b.addrs) as stream:  # right after the drop
            await stream.send(Ping(1))
            assert await stream.receive() == Ping(1)
        await hosts.stop(b)


async def test_disconnect_ends_streams_at_once(hosts, until) -> None:
    a, b = await hosts.start(), await hosts.start()
    lost: list[str] = []
    b.on_peer_lost(lost.append)
    stream = await a.open_stream(b.peer_id, hosts.echo, addrs=b.addrs)
    await a.disconnect(b.peer_id)
    with trio.fail_after(1), pytest.raises(PeerLost):
        await stream.receive()
    await until(lambda: lost == [a.peer_id])
    await a.disconnect(b.peer_id)  # once more does nothing


PEER_PROCESS = """
import sys, trio
from petalnet.p2p.host import open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import Protocol

async def echo(stream):
    while (message := await stream.receive()) is not None:
        await stream.send(message)

async def main():
    async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as host:
        host.serve(Protocol("/petalnet/test-echo/1.0.0"), echo)
        print(host.addrs[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture
def process():
    process = subprocess.Popen([sys.executable, "-c", PEER_PROCESS], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


async def read_addr(process: subprocess.Popen[str]) -> str:
    line: str = await trio.to_thread.run_sync(process.stdout.readline)
    return line.strip()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_process_that_dies_or_freezes_is_lost(hosts, until, monkeypatch, process, how: signal.Signals) -> None:
    """Killed, its sockets say so; frozen, only the heartbeats do."""
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.2)
    a = await hosts.start()
    addr = await read_addr(process)
    peer_id = addr.rpartition("/")[2]
    lost: list[str] = []
    a.on_peer_lost(lost.append)
    stream = await a.open_stream(peer_id, hosts.echo, addrs=[addr])
    await until(lambda: a.round_trip_s(peer_id) is not None)
    assert 0 < (a.round_trip_s(peer_id) or 0) < 1
    process.send_signal(how)
    with trio.fail_after(5), pytest.raises(PeerLost):
        await stream.receive()
    await until(lambda: lost == [peer_id], within_s=2)
    assert not a.is_connected(peer_id)
    assert a.round_trip_s(peer_id) is None


async def test_a_peer_that_is_only_busy_is_not_lost(hosts, monkeypatch) -> None:
    """Our own stall, however long, costs one missed answer at most."""
    import time

    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.05)
    a, b = await hosts.start(), await hosts.start()
    await a.connect(b.peer_id, b.addrs)
    for _ in range(3):
        await trio.sleep(0.1)
        time.sleep(0.4)  # noqa: ASYNC251 - the stall is the test
    await trio.sleep(0.2)
    assert a.is_connected(b.peer_id)


# ---- streams


async def test_the_end_of_a_stream_is_told_from_its_loss(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    ends: list[object] = []
    over = trio.Event()

    async def serve(stream: Stream) -> None:
        try:
            ends.append(await stream.receive())
            ends.append(await stream.receive())
        except PeerLost as error:
            ends.append(type(error))
        over.set()

    b.serve(SOME, serve)
    async with await a.open_stream(b.peer_id, SOME, addrs=b.addrs) as stream:
        await stream.send(Ping(1))
    await over.wait()
    assert ends == [Ping(1), None]

    ends.clear()
    over = trio.Event()
    with pytest.raises(KeyError):
        async with await a.open_stream(b.peer_id, SOME) as stream:
            await stream.send(Ping(2))
            raise KeyError
    await over.wait()
    assert ends[-1] is PeerLost


async def test_a_last_answer_is_read_though_its_sender_is_done(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()

    async def serve(stream: Stream) -> None:
        await stream.receive()
        await stream.send(numbered(1, 100_000))

    b.serve(SOME, serve)
    for _ in range(20):
        async with await a.open_stream(b.peer_id, SOME, addrs=b.addrs) as stream:
            await stream.send(Ping(1))
            await trio.sleep(0.005)
            assert isinstance(await stream.receive(), StepDone)
            assert await stream.receive() is None


async def test_streams_leave_nothing_behind(hosts, until) -> None:
    a, b = await hosts.start(), await hosts.start()

    async def serve(stream: Stream) -> None:
        """Returns without reading or closing."""

    b.serve(SOME, serve)
    for number in range(300):  # stock: the 257th stream that nobody closed blocks for ever
        with trio.fail_after(5):
            stream = await a.open_stream(b.peer_id, SOME, addrs=b.addrs)
            if number % 2:
                await stream.close()
            else:
                await stream.reset()
    [[mine]], [[theirs]] = a.libp2p.swarm.connections.values(), b.libp2p.swarm.connections.values()
    await until(lambda: len(mine.muxed_conn.streams) < 5 and len(theirs.muxed_conn.streams) < 5)
    await until(lambda: len(mine.streams) < 5 and len(theirs.streams) < 5)


async def test_cancelled_calls_lose_no_message(hosts) -> None:
    """Receives and sends that are cancelled at any moment: every message that was sent arrives, once, in order."""
    a, b = await hosts.start(), await hosts.start()
    stream = await a.open_stream(b.peer_id, hosts.echo, addrs=b.addrs)
    sent: list[int] = []
    received: list[int] = []
    for number in range(300):
        with trio.move_on_after(0.0001 * (number % 7)):
            await stream.send(numbered(number))
            sent.append(number)
        with trio.move_on_after(0.0003 * (number % 5)):
            while True:
                back = await stream.receive()
                assert isinstance(back, StepDone)
                received.append(back.step)
    await stream.send(numbered(1000))
    with trio.fail_after(5):
        while not received or received[-1] != 1000:
            back = await stream.receive()
            assert isinstance(back, StepDone)
            received.append(back.step)
    # A send whose cancellation came after its last step has sent and still counts as cancelled.
    assert received == sorted(set(received)) and set(sent) <= set(received)
    assert a.is_connected(b.peer_id)
    await stream.close()


async def test_a_long_message_cut_short_ends_its_stream_only(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    got: list[object] = []

    async def slow(stream: Stream) -> None:
        await trio.sleep(0.2)
        try:
            got.append(await stream.receive())
        except PeerLost:
            got.append(PeerLost)

    b.serve(SOME, slow)
    other = await a.open_stream(b.peer_id, hosts.echo, addrs=b.addrs)
    stream = await a.open_stream(b.peer_id, SOME)
    with trio.move_on_after(0.05) as scope:
        await stream.send(numbered(1, 20_000_000))
    assert scope.cancelled_caught
    with pytest.raises(PeerLost):
        await stream.send(Ping(1))
    await trio.sleep(0.3)
    assert got == [PeerLost]
    await other.send(Ping(5))
    assert await other.receive() == Ping(5)


async def test_a_reader_that_pauses_makes_the_writer_wait(hosts) -> None:
    """Longer than the muxer's own patience of 5 s, after which stock resets the stream."""
    a, b = await hosts.start(), await hosts.start()
    go = trio.Event()
    sizes: list[int] = []

    async def patient(stream: Stream) -> None:
        await go.wait()
        while (message := await stream.receive()) is not None:
            assert isinstance(message, StepDone)
            sizes.append(message.output.shape[0])
        await stream.send(Pong(1))

    b.serve(SOME, patient)
    stream = await a.open_stream(b.peer_id, SOME, addrs=b.addrs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, numbered(1, 4 << 20))
        await trio.sleep(5.5)
        go.set()
    await stream.send(numbered(2, 10))
    await stream.close()
    with trio.fail_after(5):
        while sizes != [4 << 20, 10]:  # noqa: ASYNC110
            await trio.sleep(0.01)


# ---- serving


async def test_errors_of_a_handler_are_told_by_class(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()

    async def serve(stream: Stream) -> None:
        message = await stream.receive()
        assert isinstance(message, Ping)
        raise [CallerError("too long"), BusyError("full", 2), KeyError("secret")][message.nonce]

    b.serve(SOME, serve)
    answers = []
    for number in range(3):
        async with await a.open_stream(b.peer_id, SOME, addrs=b.addrs) as stream:
            await stream.send(Ping(number))
            answers.append(await stream.receive())
            assert await stream.receive() is None
    assert answers == [Error("caller", "too long"), Error("busy", "full", 2.0), Error("server", "internal error")]
    await hosts.check_alive(b)


async def test_what_a_peer_does_not_serve_is_told(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    async with await a.open_stream(b.peer_id, SOME, addrs=b.addrs) as stream:
        await stream.send(Ping(1))
        with pytest.raises(UnsupportedError, match=SOME.id):
            await stream.receive()


async def test_streams_beyond_the_limit_are_refused_as_busy(hosts, until) -> None:
    a, b, c = await hosts.start(), await hosts.start(), await hosts.start()
    few = Protocol("/petalnet/few/1.0.0", max_streams_per_peer=2, max_streams=3)
    release = trio.Event()

    async def hold(stream: Stream) -> None:
        await release.wait()

    b.serve(few, hold)
    held = [await source.open_stream(b.peer_id, few, addrs=b.addrs) for source in (a, a)]
    third = await a.open_stream(b.peer_id, few)
    answer = await third.receive()
    assert isinstance(answer, Error) and answer.code == "busy"
    held.append(await c.open_stream(b.peer_id, few, addrs=b.addrs))
    fourth = await c.open_stream(b.peer_id, few)
    answer = await fourth.receive()
    assert isinstance(answer, Error) and answer.code == "busy"
    release.set()
    for stream in held:
        assert await stream.receive() is None
    async with await a.open_stream(b.peer_id, few) as stream:
        assert await stream.receive() is None


async def test_an_idle_stream_is_closed(hosts, until) -> None:
    a, b = await hosts.start(), await hosts.start()
    brief = Protocol("/petalnet/brief/1.0.0", idle_timeout_s=0.2)
    why: list[str] = []

    async def serve(stream: Stream) -> None:
        try:
            await stream.receive()
        except PeerLost as error:
            why.append(str(error))
            raise

    b.serve(brief, serve)
    stream = await a.open_stream(b.peer_id, brief, addrs=b.addrs)
    with trio.fail_after(2), pytest.raises(PeerLost):
        await stream.receive()
    await until(lambda: len(why) == 1)
    assert "silent for 0.2 s" in why[0]


async def test_a_node_takes_connections_all_its_life(hosts, until) -> None:
    """Stock counts every inbound connection of a lifetime against its limit and then refuses all."""
    b = await hosts.start(limits=Limits(max_connections=5))
    a = await hosts.start()
    for _ in range(12):
        await a.connect(b.peer_id, b.addrs)
        await a.disconnect(b.peer_id)
        await until(lambda: b.libp2p.swarm.get_connections() == [])
    friends = [await hosts.start() for _ in range(4)]
    for friend in friends:
        await friend.connect(b.peer_id, b.addrs)
    assert len(b.connected_peers()) == 4


async def test_pings_are_for_pinging(hosts) -> None:
    a, b = await hosts.start(), await hosts.start()
    async with await a.open_stream(b.peer_id, PING, addrs=b.addrs) as stream:
        await stream.send(Ping(3))
        assert await stream.receive() == Pong(3)
        await stream.send(Pong(3))
        answer = await stream.receive()
        assert isinstance(answer, Error) and answer.code == "unsupported"


def test_libp2p_is_quiet_on_the_terminal() -> None:
    """Neither import nor failing dials, rubbish and drops write a line, and the root logger stays the user's."""
    script = """
import logging, trio
from petalnet.errors import PeerUnreachable
from petalnet.p2p.host import open_host
from petalnet.p2p.identity import Identity

async def main():
    async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as a:
        async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as b:
            await a.connect(b.peer_id, b.addrs)
            try:
                await a.connect(Identity.generate().peer_id, ["/ip4/127.0.0.1/tcp/9", *b.addrs])
            except PeerUnreachable:
                pass
        stream = await trio.open_tcp_stream("127.0.0.1", int(a.addrs[0].split("/")[4]))
        await stream.send_all(b"GET / HTTP/1.0\\r\\n\\r\\n" + bytes(100))
        await stream.aclose()
        await trio.sleep(0.3)

trio.run(main)
assert logging.getLogger().handlers == []
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
