"""Attacks that go on and on: afterwards memory, tasks and descriptors are what they were, and the node serves others all the while.

The victim is a process of its own with short deadlines. Single attacks of each kind are with the other tests, in test_attacks.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from multiaddr import Multiaddr

from petalnet.errors import PeerLost, PetalnetError
from petalnet.p2p.frames import PREFIX
from petalnet.p2p.host import open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Ping, Store, encode_message
from petalnet.p2p.mux_protocol import DATA, END, GRANT, INITIAL_WINDOW, MAX_DATA, OPEN, RESET
from petalnet.p2p.protocols import PING, Protocol

from .attackers import Attacker, Footprint, Stalled, Victim, frame, victim_process

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

MIB = 1024 * 1024
ECHO = Protocol("/petalnet/test-echo/1.0.0")
BUSY = "/petalnet/test-busy/1.0.0"
TALKER = "/petalnet/test-talker/1.0.0"
LIMITS = {"handshake_timeout": 1.0, "negotiation_timeout": 1.0, "linger": 0.5, "write_timeout": 1.0, "offence_threshold": 1e9}
"""No bans: the attackers of all tests share few addresses, and each attack is to be met by itself."""


@pytest.fixture(scope="module")
def victim_addr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with victim_process(LIMITS, tmp_path_factory.mktemp("victim") / "errors.log") as addr:
        yield addr


@pytest.fixture
async def victim(victim_addr: str) -> AsyncIterator[Victim]:
    """The victim, with an honest peer connected to it; it still serves when the test is over."""
    async with open_host(Identity.generate()) as friend:
        found = Victim(victim_addr, friend, ECHO)
        await found.serves()
        yield found
        await found.serves()


async def settled(victim: Victim) -> Footprint:
    """The footprint once nothing of earlier connections is left."""
    last = await victim.footprint()
    while True:
        await trio.sleep(0.3)
        now = await victim.footprint()
        if (now.tasks, now.descriptors, now.connections) == (last.tasks, last.descriptors, last.connections):
            return now
        last = now


def named(number: int, protocol: str) -> bytes:
    """The opening of a stream for a protocol."""
    return frame(OPEN, number, len(protocol), protocol.encode())


def data(number: int, body: bytes) -> bytes:
    return frame(DATA, number, len(body), body)


def whole(message: Any) -> bytes:
    return b"".join(encode_message(message))


# ---- connections


@pytest.mark.parametrize("count", [1000])
async def test_connections_that_come_and_go(victim: Victim, count: int) -> None:
    """By turns: a goodbye, a reset, silence after the handshakes, and the end before them."""

    async def one(turn: int) -> None:
        mallory = Attacker(victim.addr, source=f"127.0.1.{turn % 200 + 1}")
        if turn % 4 == 3:
            await (await mallory.wire()).close()
            return
        async with mallory.connected() as channel:
            if turn % 4 == 0:
                await channel.send(frame(6, 0))
            elif turn % 4 == 1:
                channel.wire.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def several(first: int, end: int) -> None:
        for start in range(first, end, 8):
            async with trio.open_nursery() as nursery:
                for turn in range(start, min(start + 8, end)):
                    nursery.start_soon(one, turn)

    await several(0, 24)  # fills what is cached
    before = await settled(victim)
    await several(24, 24 + count)
    await victim.is_back_to(before, more_bytes=1 * MIB + 600 * count)  # names of the last 4096 peers are kept ready


@pytest.mark.parametrize("count", [100])
async def test_stock_peers_that_come_and_go(victim: Victim, count: int) -> None:
    """Over yamux; one that stays is not hindered by the others, and does not count as one in its handshakes for ever."""
    peer_id = info_from_p2p_addr(Multiaddr(victim.addr)).peer_id

    @contextlib.asynccontextmanager
    async def stock() -> AsyncIterator[Any]:
        keys = create_new_key_pair()
        noise = Transport(keys, noise_privkey=create_x25519_key_pair().private_key)
        host = new_host(key_pair=keys, sec_opt={NOISE_ID: noise})
        async with host.run(listen_addrs=[]):
            await host.connect(info_from_p2p_addr(Multiaddr(victim.addr)))
            yield host
            await host.disconnect(peer_id)  # its end alone leaves the socket open

    async with stock() as stays:
        before = await settled(victim)
        for _ in range(count):
            async with stock():
                pass
        wires = [await Attacker(victim.addr).wire() for _ in range(40)]  # more than may be in their handshakes from one address
        stream = await stays.new_stream(peer_id, [ECHO.id])  # type: ignore[list-item]
        await stream.write(whole(Ping(3)))
        answer = b""
        with trio.fail_after(5):
            while len(answer) < len(whole(Ping(3))):
                answer += await stream.read(4096)
        assert answer == whole(Ping(3))
        await stream.close()
        for wire in wires:
            await wire.close()
        await victim.is_back_to(before, more_bytes=1 * MIB + 4000 * count)


async def handshake_sizes(victim: Victim) -> tuple[int, int]:
    """Bytes that a peer writes in all its handshakes: up to the secured channel, and up to the multiplexer."""
    mallory = Attacker(victim.addr)
    wire = await mallory.wire()
    await mallory.handshake(wire, muxer="")
    secured = wire.written
    await wire.close()
    async with mallory.connected() as channel:
        return secured, channel.wire.written


@pytest.mark.parametrize("count", [150])
async def test_slow_loris_on_every_step_of_the_handshakes(victim: Victim, count: int) -> None:
    """Whoever stops, at whatever byte, is gone after the handshakes' deadline."""
    secured, total = await handshake_sizes(victim)
    before = await settled(victim)
    places = {0, 1, 20, 21, 28, 29, 62, secured - 1, secured, secured + 1, total - 1}
    chance = random.Random(1)
    while len(places) < 11 + count:
        places.add(chance.randrange(total))
        if len(places) >= total:
            break

    async def stall(place: int) -> None:
        mallory = Attacker(victim.addr, source=f"127.0.2.{place % 200 + 1}")
        wire = await mallory.wire(most=place)
        with trio.fail_after(10):
            with pytest.raises(Stalled):
                await mallory.handshake(wire)
            await wire.wait_closed()
        await wire.close()

    for start in range(0, len(places), 30):
        async with trio.open_nursery() as nursery:
            for place in sorted(places)[start : start + 30]:
                nursery.start_soon(stall, place)
            await victim.serves()  # meanwhile
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [150])
async def test_a_handshake_that_drips_byte_by_byte(victim: Victim, count: int) -> None:
    """Each byte in time for a deadline of its own, and all of them too late for the one that there is."""
    before = await settled(victim)

    async def drip(turn: int) -> None:
        mallory = Attacker(victim.addr, source=f"127.0.3.{turn % 200 + 1}")
        wire = await mallory.wire()
        with trio.fail_after(10), contextlib.suppress(trio.BrokenResourceError):
            await wire.stream.send_all(b"\x13/multistream/1.0.0\n\x07/noise\n")
            for byte in bytes(2) * 1000:
                await wire.stream.send_all(bytes([byte | 1]))
                await trio.sleep(0.05)
        await wire.close()

    async with trio.open_nursery() as nursery:
        for turn in range(count):
            nursery.start_soon(drip, turn)
        await victim.serves()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [600])
async def test_half_open_handshakes_from_one_address(victim: Victim, count: int) -> None:
    """They crowd out one another, not those who come after them; not even from the same address."""
    before = await settled(victim)
    wires = []
    for turn in range(count):
        with contextlib.suppress(OSError):
            wires.append(await Attacker(victim.addr, source="127.0.0.1").wire())
        if turn % 50 == 49:
            await victim.serves()
    # The last of them wait in the victim for no more than their turn to be turned away.
    kept = replace(before, tasks=10**6, descriptors=before.descriptors + 40, connections=10**6)
    await victim.is_back_to(kept, more_bytes=MIB, within_s=0.9 * LIMITS["handshake_timeout"])
    for wire in wires:
        await wire.close()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [10])
async def test_words_of_four_gigabytes(victim: Victim, count: int) -> None:
    """A word of the negotiation that is announced as 4 GB long and sent as fast as it goes: nothing like it is held."""
    before = await settled(victim)
    announced = b"\xff\xff\xff\xff\x0f"
    most = 64 * MIB

    async def flood(step: str, turn: int) -> None:
        mallory = Attacker(victim.addr, source=f"127.0.4.{turn + 1}")
        with contextlib.suppress(trio.BrokenResourceError, BaseLibp2pError), trio.move_on_after(10):
            if step == "socket":
                wire = await mallory.wire()
                await wire.stream.send_all(announced)
                for _ in range(most // MIB):
                    await wire.stream.send_all(bytes(MIB))
                await wire.close()
                return
            async with mallory.connected(muxer={"channel": "", "stream": "/petalnet/mux/1.0.0", "yamux": str(YAMUX_ID)}[step]) as channel:
                if step == "channel":
                    await channel.send(announced)
                    await channel.flood(bytes(60_000), most)
                elif step == "yamux":
                    await channel.send(struct.pack("!BBHII", 0, 0, 1, 1, 2**32 - 1))
                    await channel.flood(bytes(60_000), most)
                else:
                    await channel.send(frame(OPEN, 1), data(1, announced))
                    sent = len(announced)
                    while sent < INITIAL_WINDOW - 50_000:  # what more there might be, only the victim's grants would allow
                        await channel.send(data(1, bytes(50_000)))
                        sent += 50_000
                    with trio.move_on_after(1.5):
                        while True:
                            granted = sum(length for kind, length in received(await channel.session.receive()) if kind == GRANT)
                            while granted > 0:
                                size = min(granted, 50_000)
                                await channel.send(data(1, bytes(size)))
                                granted, sent = granted - size, sent + size

    async with trio.open_nursery() as nursery:
        for turn in range(count):
            for step in ("socket", "channel", "stream", "yamux"):
                nursery.start_soon(flood, step, turn)
        await victim.serves()
    peak = (await victim.footprint()).peak - before.traced
    assert peak < (4 + 8 * count) * MIB, f"{peak / MIB:.0f} MiB were held"
    await victim.is_back_to(before, more_bytes=1 * MIB)


def received(pieces: list[bytes]) -> list[tuple[int, int]]:
    """(type, length) of frames that have no body, as a victim sends them that has nothing to say."""
    joined = b"".join(pieces)
    found = []
    position = 0
    while position + 12 <= len(joined):
        kind, _, _, _, length = struct.unpack_from("!BBHII", joined, position)
        found.append((kind, length))
        position += 12 + (length if kind in (OPEN, DATA) else 0)
    return found


# ---- streams


@pytest.mark.parametrize("count", [10_000])
async def test_streams_one_after_another(victim: Victim, count: int) -> None:
    """Used and closed, closed unused, reset, left for the victim to end, and asked for what nobody serves."""
    async with open_host(Identity.generate()) as mallory:
        peer_id = victim.addr.rpartition("/")[2]
        nobody = Protocol("/petalnet/test-nobody/1.0.0")

        async def one(turn: int) -> None:
            stream = await mallory.open_stream(peer_id, nobody if turn % 5 == 4 else ECHO, addrs=[victim.addr])
            if turn % 5 < 2:
                await stream.send(Ping(turn))
            if turn % 5 == 0:
                assert await stream.receive() == Ping(turn)
            with contextlib.suppress(PetalnetError):
                if turn % 5 == 4:
                    await stream.receive()
            await (stream.reset() if turn % 5 == 2 else stream.close())

        async def several(first: int, end: int) -> None:
            for start in range(first, end, 20):
                async with trio.open_nursery() as nursery:
                    for turn in range(start, min(start + 20, end)):
                        nursery.start_soon(one, turn)

        await several(0, 100)
        before = await settled(victim)
        await several(0, count)
        await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [1000])
async def test_streams_opened_and_never_used(victim: Victim, count: int) -> None:
    """Some that name a protocol and some that never say what they are for: refused above the limit, ended after a while below it."""
    before = await settled(victim)
    async with Attacker(victim.addr, source="127.0.5.1").connected() as channel:
        for turn in range(count):
            await channel.send(named(2 * turn + 1, ECHO.id if turn % 2 else ""))
        held = (await victim.footprint()).tasks - before.tasks
        assert held <= 2 * 256 + 20
        await victim.serves()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [100_000])
async def test_streams_that_are_reset_as_soon_as_they_are_open(victim: Victim, count: int) -> None:
    """The rapid reset of HTTP/2: nothing piles up, and others are served meanwhile."""
    before = await settled(victim)
    mallory, over = Attacker(victim.addr, source="127.0.5.2"), trio.Event()
    async with mallory.connected() as channel, trio.open_nursery() as nursery:

        async def reset_on() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                for turn in range(0, count, 50):
                    numbers = range(2 * turn + 1, 2 * turn + 101, 2)
                    await channel.send(*(named(number, ECHO.id) + frame(RESET, number) for number in numbers))
            over.set()

        nursery.start_soon(reset_on)
        for _ in range(3):
            await victim.serves()
        with trio.move_on_after(15):  # the victim reads no faster than streams may be opened
            await over.wait()
        nursery.cancel_scope.cancel()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [100_000])
async def test_openings_above_the_limit_whose_refusals_nobody_reads(victim: Victim, count: int) -> None:
    before = await settled(victim)
    async with Attacker(victim.addr, source="127.0.5.3").connected() as channel:
        with contextlib.suppress(trio.BrokenResourceError):
            for turn in range(0, count, 100):
                await channel.send(*(named(2 * number + 1, BUSY) for number in range(turn, turn + 100)))
        await victim.serves()
    peak = (await victim.footprint()).peak - before.traced
    assert peak < 24 * MIB, f"{peak / MIB:.0f} MiB were held"
    await victim.is_back_to(before, more_bytes=1 * MIB)


# ---- readers and writers


@pytest.mark.parametrize("count", [40])
async def test_a_reader_that_never_reads(victim: Victim, count: int) -> None:
    """The victim has much to say, the peer grants all it likes and takes nothing off its socket: it is given up, with little held."""
    before = await settled(victim)

    async def deaf(turn: int) -> None:
        async with Attacker(victim.addr, source=f"127.0.6.{turn + 1}").connected() as channel:
            for number in range(1, 17, 2):
                await channel.send(named(number, TALKER), frame(GRANT, number, 2**30), data(number, whole(Ping(1))))
            with trio.fail_after(20):  # nothing is read, so only a write tells that the victim has given up
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await channel.send(frame(GRANT, 1, 1))
                        await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        for turn in range(count):
            nursery.start_soon(deaf, turn)
        await victim.serves()
    peak = (await victim.footprint()).peak - before.traced
    assert peak < (2 + 2 * count) * MIB, f"{peak / MIB:.0f} MiB were held"
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [20])
async def test_a_writer_that_never_stops(victim: Victim, count: int) -> None:
    """To a handler that is busy: what comes above the window ends the connection, and no more than the window was held."""
    before = await settled(victim)

    async def talk(turn: int) -> None:
        async with Attacker(victim.addr, source=f"127.0.7.{turn + 1}").connected() as channel:
            await channel.send(named(1, BUSY), data(1, whole(Ping(1))))
            with trio.fail_after(20):
                sent = await channel.flood(data(1, bytes(60_000)))
            assert sent < 64 * MIB

    async with trio.open_nursery() as nursery:
        for turn in range(count):
            nursery.start_soon(talk, turn)
        await victim.serves()
    peak = (await victim.footprint()).peak - before.traced
    assert peak < (2 + 6 * count) * MIB, f"{peak / MIB:.0f} MiB were held"
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [10])
async def test_all_windows_filled_at_once(victim: Victim, count: int) -> None:
    """Each stream within its window, all of them unread: what a peer can make the victim hold is what the limits say."""
    before = await settled(victim)
    async with contextlib.AsyncExitStack() as stack:
        for turn in range(count):
            channel = await stack.enter_async_context(Attacker(victim.addr, source=f"127.0.8.{turn + 1}").connected())
            for number in range(1, 129, 2):
                await channel.send(named(number, BUSY), data(number, whole(Ping(1))))
                for _ in range(4):
                    await channel.send(data(number, bytes(60_000)))
        peak = (await victim.footprint()).peak - before.traced
        assert peak < (8 + 24 * count) * MIB, f"{peak / MIB:.0f} MiB were held"
        await victim.serves()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [2000])
async def test_small_pieces_of_a_message_do_not_hold_the_large_ones_around_them(victim: Victim, count: int) -> None:
    """Each message of the secure channel brings 2 KB of a long frame, and 60 KB for a stream that is over: only the former is kept."""
    before = await settled(victim)
    piece, filler = bytes(2100), bytes(30_000)
    async with Attacker(victim.addr, source="127.0.9.1").connected() as channel:
        await channel.send(named(1, ECHO.id), data(1, PREFIX.pack(1, 0, 0, 1000, 32 * MIB)))
        number = 3
        with trio.fail_after(120):
            for _ in range(count):
                # Opened, filled and ended: what came for it is held by nobody once it is over.
                await channel.send(
                    data(1, piece), named(number, "/nobody/1.0.0"), data(number, filler), data(number, filler), frame(END, number)
                )
                number += 2
            assert (await victim.footprint()).connections > before.connections, "the victim did not have to hold anything"
            # What waits for streams that nobody serves goes when their turn has come.
            allowed = MIB + 2 * count * len(piece)
            await victim.is_back_to(replace(before, tasks=10**6, descriptors=10**6, connections=10**6), more_bytes=allowed, within_s=5)
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [12])
async def test_bytes_that_drip_inside_a_frame(victim: Victim, count: int) -> None:
    """A byte now and then holds a stream for a bounded time, whichever frame it is in the middle of."""
    before = await settled(victim)
    start = whole(Store((), bytes(4000)))
    beginnings = {
        "prefix": start[: PREFIX.size - 3],
        "header": start[: PREFIX.size + 10],
        "payload": PREFIX.pack(1, 0, 0, 10, 100_000) + bytes(10),
        "frame of the multiplexer": b"",
        "message of the channel": b"",
    }

    async def drip(inside: str, turn: int) -> None:
        async with Attacker(victim.addr, source=f"127.0.10.{turn + 1}").connected() as channel:
            ended, drops = trio.Event(), iter(beginnings["payload"] + bytes(10_000))

            async def listen() -> None:
                with contextlib.suppress(BaseLibp2pError):
                    while True:
                        for kind, _ in received(await channel.session.receive()):
                            if kind in (END, RESET):
                                ended.set()
                ended.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(30):
                    if inside == "message of the channel":
                        await channel.wire.stream.send_all(struct.pack("!H", 60_000))
                    elif inside == "frame of the multiplexer":
                        sealed = bytes(channel.session.seal([named(1, ECHO.id), frame(DATA, 1, 60_000)]))
                        await channel.wire.stream.send_all(sealed)
                    else:
                        await channel.send(named(1, ECHO.id), data(1, beginnings[inside]))
                    while not ended.is_set():
                        if inside == "message of the channel":
                            await channel.wire.stream.send_all(b"x")
                        elif inside == "frame of the multiplexer":
                            await channel.send(bytes([next(drops)]))
                        else:
                            await channel.send(data(1, b"\0"))
                        with trio.move_on_after(0.2):
                            await ended.wait()
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for turn in range(count):
            for inside in beginnings:
                nursery.start_soon(drip, inside, turn)
        await victim.serves()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [100_000])
async def test_pings_without_end(victim: Victim, count: int) -> None:
    """A flood of requests is read at the pace that the protocol allows; others have their turn."""
    before = await settled(victim)
    async with Attacker(victim.addr, source="127.0.11.1").connected() as channel:
        await channel.send(named(1, PING.id))
        with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(5):
            for _ in range(0, count, 100):
                await channel.send(data(1, whole(Ping(1)) * 100))
        await victim.serves()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [200_000])
async def test_grants_and_single_bytes_without_end(victim: Victim, count: int) -> None:
    """Frames that cost the sender little: each is work, none is memory."""
    before = await settled(victim)
    async with Attacker(victim.addr, source="127.0.11.2").connected() as channel:
        await channel.send(named(1, BUSY), data(1, whole(Ping(1))))
        for _ in range(0, count, 500):
            with contextlib.suppress(trio.BrokenResourceError):
                await channel.send(frame(GRANT, 1, 1) * 500)
        for _ in range(0, min(count, 200_000), 500):
            with contextlib.suppress(trio.BrokenResourceError):
                await channel.send(data(1, b"x") * 500)
        peak = (await victim.footprint()).peak - before.traced
        assert peak < 8 * MIB, f"{peak / MIB:.0f} MiB were held"
        await victim.serves()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [300])
async def test_frames_that_break_the_rules(victim: Victim, count: int) -> None:
    """Rubbish and violations in the multiplexer end the connection that they come on."""
    before = await settled(victim)
    chance = random.Random(9)
    wrong = [frame(77, 1), frame(OPEN, 2), frame(DATA, 9, 5, b"abcde"), frame(GRANT, 0, 5), frame(DATA, 1, MAX_DATA + 1), b"\xff" * 40]
    for turn in range(count):
        async with Attacker(victim.addr, source=f"127.0.12.{turn % 200 + 1}").connected() as channel:
            await channel.send(named(1, ECHO.id), wrong[turn % len(wrong)] if turn % 3 else chance.randbytes(chance.choice((12, 50, 400))))
            with trio.fail_after(5):
                with trio.move_on_after(0.05 if turn % 3 == 0 else 5):  # what is random may be the beginning of a long frame
                    await channel.wire.wait_closed()
    await victim.is_back_to(before, more_bytes=1 * MIB)


@pytest.mark.parametrize("count", [60])
async def test_peers_that_fall_silent(victim: Victim, count: int) -> None:
    """Connected, and never heard of again: the heartbeats find out."""
    before = await settled(victim)
    async with contextlib.AsyncExitStack() as stack:
        for turn in range(count):
            await stack.enter_async_context(Attacker(victim.addr, source=f"127.0.13.{turn + 1}").connected())
        await victim.is_back_to(before, more_bytes=1 * MIB, within_s=30)


async def test_a_peer_lost_in_the_middle_of_a_message_is_an_error_of_that_stream(victim: Victim) -> None:
    """Seen from the other side: a victim that is attacked does not hang those who wait for it."""
    async with open_host(Identity.generate()) as host:
        peer_id = victim.addr.rpartition("/")[2]
        stream = await host.open_stream(peer_id, Protocol(BUSY), addrs=[victim.addr])
        await stream.send(Ping(1))
        await host.disconnect(peer_id)
        with pytest.raises(PeerLost):
            await stream.receive()
