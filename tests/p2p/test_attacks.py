"""Whatever a peer sends, the node lives on and serves others.

Each attack is made by a real host over an authenticated connection, or by a bare socket; afterwards the victim must still take a
stranger's connection and serve it. A host that dies fails the test through the nursery that runs it.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import msgpack
import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair as create_ed25519_key_pair
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID as PLAINTEXT_ID
from libp2p.security.insecure.transport import InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport
from libp2p.security.tls.transport import PROTOCOL_ID as TLS_ID
from libp2p.security.tls.transport import TLSTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr

from petalnet.errors import PeerLost, PetalnetError
from petalnet.p2p.admission import PROOF_SIZE, Admission
from petalnet.p2p.discovery import Discovery
from petalnet.p2p.frames import PREFIX, FrameDecoder, FrameLimits, encode_frame
from petalnet.p2p.gossip import Gossip
from petalnet.p2p.host import Host, Stream
from petalnet.p2p.messages import Error, Ping, Store, decode_message, encode_message
from petalnet.p2p.mux import MUX_ID
from petalnet.p2p.protocols import PING, RECORDS, Limits, Protocol
from petalnet.p2p.security import TAG
from petalnet.p2p.swarm_key import SwarmKey

from .attackers import Attacker, Stalled, Wire
from .conftest import round_trip

MESHSUB = "/meshsub/1.1.0"
KADEMLIA = "/ipfs/kad/1.0.0"
LIBP2P_PROTOCOLS = [MESHSUB, KADEMLIA, "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"]
TOPIC = "petalnet/test/1"


@pytest.fixture
async def victim(hosts, nursery) -> Host:
    """A host that serves everything that a node serves."""
    host: Host = await hosts.start()
    gossip = Gossip(host)
    gossip.subscribe(TOPIC, lambda author, data: True, lambda author, data: None)
    await nursery.start(gossip.run)
    discovery = Discovery(host, server=True, on_record=lambda data: None)
    await nursery.start(discovery.run, [])
    return host


async def raw_stream(source: Host, target: Host, protocol: str | None) -> NetStream:
    """A stream of libp2p's, negotiated to `protocol`, or not at all."""
    await source.connect(target.peer_id, target.addrs)
    connection = source._dialler.live(target.peer_id)
    stream = await connection.new_stream()
    if protocol is not None:
        await source.libp2p.multiselect_client.select_one_of([TProtocol(protocol)], MultiselectCommunicator(stream))
    return stream


async def drain(stream: NetStream, seconds: float = 0.3) -> bytes:
    """What the victim answers, until it ends the stream or goes silent."""
    answer = b""
    with trio.move_on_after(seconds):
        try:
            while data := await stream.read(65536):
                answer += data
        except BaseLibp2pError:
            pass
    return answer


def junk(seed: int) -> list[bytes]:
    chance = random.Random(seed)
    return [
        b"",
        bytes(1),
        b"\xff" * 40,
        chance.randbytes(3),
        chance.randbytes(200),
        chance.randbytes(70_000),
        encode_varint_prefixed(chance.randbytes(100)),
        encode_varint_prefixed(b""),
        b"\xff\xff\xff\xff\x0f" + chance.randbytes(50),  # says that 4 GB follow
    ]


@pytest.mark.parametrize("protocol", [*LIBP2P_PROTOCOLS, RECORDS.id, PING.id, "/petalnet/test-echo/1.0.0"])
async def test_rubbish_on_every_protocol(hosts, victim: Host, protocol: str) -> None:
    for seed in range(3):
        mallory = await hosts.start()
        for data in junk(seed):
            try:
                stream = await raw_stream(mallory, victim, protocol)
                await stream.write(data)
                await drain(stream, 0.02)
                await (stream.close() if seed % 2 else stream.reset())
            except (BaseLibp2pError, PetalnetError):
                continue  # the victim has ended the stream or the connection, as it may
        await hosts.stop(mallory)
    await hosts.check_alive(victim)


@pytest.mark.parametrize(
    "negotiation",
    [
        b"\x06\xff\xfe\xfd\xfc\x80\n",  # not UTF-8
        b"\x13/multistream/1.0.0\n\x06\xff\xfe\xfd\xfc\x80\n",
        b"\x13/multistream/1.0.0\n\x01\n",
        b"\x13/multistream/1.0.0\n" + b"\x03ls\n" * 50,
        b"\x13/multistream/1.0.0\n" + b"\x05/nix\n" * 500,
        b"\xff" * 100,
        b"\x13/multistream/9.9.9\n",
        b"",
    ],
)
async def test_rubbish_in_the_negotiation_of_a_stream(hosts, victim: Host, negotiation: bytes) -> None:
    mallory = await hosts.start()
    stream = await raw_stream(mallory, victim, None)
    await stream.write(negotiation)
    await drain(stream)
    await stream.close()
    await hosts.check_alive(victim)
    assert mallory.is_connected(victim.peer_id)


async def test_rubbish_on_bare_sockets(hosts, victim: Host) -> None:
    port = int(victim.addrs[0].split("/")[4])
    for seed, data in enumerate([*junk(1), b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n\x07/noise\n" + bytes(300)]):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        try:
            await stream.send_all(data)
            if seed % 2:
                stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, struct.pack("ii", 1, 0))  # end by a reset
        except trio.BrokenResourceError:
            pass
        await stream.aclose()
    half_open = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(50)]
    await hosts.check_alive(victim)
    for stream in half_open:
        await stream.aclose()


@pytest.mark.parametrize("muxer", [MUX_ID, YAMUX_ID])
async def test_rubbish_in_the_encrypted_channel(hosts, victim: Host, muxer: str) -> None:
    """Frames of the muxer that make no sense, from peers that have proved who they are."""
    chance = random.Random(5)
    frames = [chance.randbytes(chance.choice([12, 13, 400])) for _ in range(20)]
    frames += [
        struct.pack("!BBHII", first, second, third, number, length)
        for first, second, third in ((0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 3, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (6, 9, 0), (9, 0, 0))
        for number, length in ((0, 0), (2, 2**32 - 1), (1, 70_000))
    ]
    for data in frames:
        async with Attacker(victim.addrs[0]).connected(muxer=muxer) as channel:
            with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(0.02):
                await channel.send(data)
                await channel.wire.wait_closed()
    await hosts.check_alive(victim)


async def test_messages_that_gossip_cannot_take(hosts, victim: Host) -> None:
    """A junk key ended the whole service; a topic list without end, a huge or unsigned message are dropped."""
    mallory = await hosts.start()
    stream = await raw_stream(mallory, victim, MESHSUB)
    me = ID.from_string(mallory.peer_id).to_bytes()
    messages = [
        rpc_pb2.Message(from_id=me, seqno=b"1", data=b"x", topicIDs=[TOPIC], key=b"junk", signature=b"junk"),
        rpc_pb2.Message(from_id=b"junk", seqno=b"2", data=b"x", topicIDs=[TOPIC], key=b"junk", signature=b"junk"),
        rpc_pb2.Message(from_id=b"", seqno=b"", data=b"x", topicIDs=[TOPIC], key=b"\x08\x09\x12\x01a", signature=b"junk"),
        rpc_pb2.Message(from_id=me, seqno=b"3", data=bytes(10_000), topicIDs=[TOPIC] * 500),
        rpc_pb2.Message(),
    ]
    for message in messages:
        await stream.write(encode_varint_prefixed(rpc_pb2.RPC(publish=[message]).SerializeToString()))
    control = rpc_pb2.ControlMessage(
        graft=[rpc_pb2.ControlGraft(topicID="nix")] * 50,
        prune=[rpc_pb2.ControlPrune(topicID=TOPIC)] * 50,
        ihave=[rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=[b"junk"] * 50)],
        iwant=[rpc_pb2.ControlIWant(messageIDs=[b"junk", b""] * 50)],
    )
    await stream.write(encode_varint_prefixed(rpc_pb2.RPC(control=control).SerializeToString()))
    subscriptions = [rpc_pb2.RPC.SubOpts(subscribe=True, topicid=f"topic {number}") for number in range(1000)]
    await stream.write(encode_varint_prefixed(rpc_pb2.RPC(subscriptions=subscriptions).SerializeToString()))
    await drain(stream)

    # The victim's gossip still works.
    got: list[bytes] = []
    friend = await hosts.start()
    gossip = Gossip(friend)
    gossip.subscribe(TOPIC, lambda author, data: True, lambda author, data: got.append(data))
    relay = await hosts.start()
    other = Gossip(relay)
    other.subscribe(TOPIC, lambda author, data: True, lambda author, data: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(gossip.run)
        await nursery.start(other.run)
        await friend.connect(victim.peer_id, victim.addrs)
        await relay.connect(victim.peer_id, victim.addrs)
        with trio.fail_after(10):
            while not got:
                await other.publish(TOPIC, b"hello")
                await trio.sleep(0.1)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (PREFIX.pack(9, 0, 0, 0, 0), "unsupported"),
        (PREFIX.pack(1, 7, 7, 0, 0), "server"),
        (PREFIX.pack(1, 0, 0, 2**32 - 1, 0), "server"),
        (PREFIX.pack(1, 0, 0, 10, 2**32 - 1), "server"),
        (b"".join(encode_frame(b"\xc1 no msgpack")), "server"),
        (b"".join(encode_frame(msgpack.packb(["later", {}, {}]))), "unsupported"),
        (b"".join(encode_frame(msgpack.packb(["ping", {"nonce": "one"}, {}]))), "server"),
        (b"".join(encode_frame(msgpack.packb(["ping", {"nonce": 1}, {}]), [b"more"])), "server"),
    ],
)
async def test_bad_frames_are_answered_by_an_error_frame(hosts, victim: Host, frame: bytes, code: str) -> None:
    mallory = await hosts.start()
    for protocol in (hosts.echo, PING, RECORDS):
        stream = await raw_stream(mallory, victim, protocol.id)
        await stream.write(frame)
        decoder = FrameDecoder(FrameLimits())
        decoder.feed(await drain(stream, 2))
        answer = decoder.next_frame()
        assert answer is not None
        error = decode_message(answer)
        assert isinstance(error, Error) and error.code == code
        await stream.close()
    await hosts.check_alive(victim)


async def test_half_a_frame_does_not_hold_a_stream_for_ever(hosts, victim: Host) -> None:
    mallory = await hosts.start()
    whole = b"".join(encode_message(Ping(1)))
    for size in (1, PREFIX.size, len(whole) - 1):
        stream = await raw_stream(mallory, victim, hosts.echo.id)
        await stream.write(whole[:size])
        began = trio.current_time()
        with pytest.raises(BaseLibp2pError):
            await stream.read(1)
        assert trio.current_time() - began < 2
    await hosts.check_alive(victim)


async def test_a_stream_cut_in_the_middle_of_a_frame(hosts, victim: Host) -> None:
    mallory = await hosts.start()
    for end in ("close", "reset"):
        stream = await raw_stream(mallory, victim, hosts.echo.id)
        await stream.write(b"".join(encode_message(Ping(1)))[:-1])
        await getattr(stream, end)()
    stream = await raw_stream(mallory, victim, hosts.echo.id)
    await stream.write(b"".join(encode_message(Ping(1)))[:-1])
    await mallory.disconnect(victim.peer_id)
    await hosts.check_alive(victim)


async def test_a_handler_that_fails_ends_its_stream_only(hosts, victim: Host) -> None:
    faulty = Protocol("/petalnet/faulty/1.0.0")

    async def fail(stream: Stream) -> None:
        await stream.receive()
        raise RuntimeError("a bug")

    victim.serve(faulty, fail)

    async def fail_raw(stream: object) -> None:
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "a bug in libp2p")

    victim.libp2p.set_stream_handler(TProtocol("/raw/1.0.0"), fail_raw)
    mallory = await hosts.start()
    for _ in range(5):
        async with await mallory.open_stream(victim.peer_id, faulty, addrs=victim.addrs) as stream:
            await stream.send(Ping(1))
            answer = await stream.receive()
            assert isinstance(answer, Error) and "bug" not in answer.message
        with contextlib.suppress(BaseLibp2pError):  # the reset may come while the protocol is agreed on
            await drain(await raw_stream(mallory, victim, "/raw/1.0.0"), 1)
    assert mallory.is_connected(victim.peer_id)
    await hosts.check_alive(victim)


@pytest.mark.parametrize("ticks", range(4))
async def test_a_handler_that_returns_while_its_connection_ends(hosts, victim: Host, ticks: int) -> None:
    """In whichever moment of the end: once, one of them ended the node."""
    returned = trio.Event()

    async def return_at_the_end(stream: NetStream) -> None:
        stream.muxed_conn._scope.cancel()  # type: ignore[attr-defined]  # what the end of the connection does first
        for _ in range(ticks):
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
        returned.set()

    victim.libp2p.set_stream_handler(TProtocol("/end/1.0.0"), return_at_the_end)
    mallory = await hosts.start()
    for _ in range(40):
        with contextlib.suppress(BaseLibp2pError, PetalnetError):
            await raw_stream(mallory, victim, "/end/1.0.0")
    with trio.fail_after(5):
        await returned.wait()
    await hosts.check_alive(victim)


async def test_a_peer_that_opens_all_streams_it_can_hinders_itself_only(hosts, victim: Host) -> None:
    mallory = await hosts.start()
    streams = []
    with trio.move_on_after(3):
        for _ in range(Limits.max_streams_per_peer + 50):
            streams.append(await raw_stream(mallory, victim, None))  # and never says what they are for
    assert len(streams) >= 250
    await hosts.check_alive(victim)


async def test_a_peer_that_floods_with_records_of_no_worth_is_dropped(hosts, victim: Host) -> None:
    mallory = await hosts.start()
    refused = 0
    with contextlib.suppress(PetalnetError):
        async with await mallory.open_stream(victim.peer_id, RECORDS, addrs=victim.addrs) as stream:
            for number in range(300):
                await stream.send(Store((struct.pack("!32s", b"%d" % number),), random.Random(number).randbytes(4000)))
                assert isinstance(await stream.receive(), Error)
                refused += 1
    assert 0 < refused < 100
    assert not victim.is_connected(mallory.peer_id)
    with pytest.raises(PetalnetError):
        await mallory.connect(victim.peer_id, victim.addrs)
        await round_trip(mallory, victim, hosts.echo)
    await hosts.check_alive(victim)


async def test_a_peer_whose_identity_is_no_ed25519_key_is_turned_away(hosts, victim: Host) -> None:
    keys = create_secp256k1_key_pair()
    stranger = new_host(key_pair=keys, sec_opt={NOISE_ID: Transport(keys, noise_privkey=create_x25519_key_pair().private_key)})
    async with stranger.run(listen_addrs=[]):
        with trio.move_on_after(5), contextlib.suppress(BaseLibp2pError):
            await stranger.connect(info_from_p2p_addr(Multiaddr(victim.addrs[0])))
        assert victim.connected_peers() == []
        await hosts.check_alive(victim)


async def test_a_peer_that_never_reads_its_answers_is_given_up(hosts, victim: Host) -> None:
    deaf = Protocol("/deaf/1.0.0", limits=FrameLimits(header=64 * 1024, payload=0), frame_timeout_s=0.2)
    over = trio.Event()

    async def answer_for_ever(stream: Stream) -> None:
        try:
            while True:
                await stream.send(Store((), bytes(8000)))
        except PeerLost as error:
            assert "took nothing" in str(error)
            over.set()

    victim.serve(deaf, answer_for_ever)
    mallory = await hosts.start()
    async with await mallory.open_stream(victim.peer_id, deaf, addrs=victim.addrs):
        with trio.fail_after(10):
            await over.wait()
    await hosts.check_alive(victim)


async def test_slow_loris_with_the_proof_of_a_swarm_key(hosts) -> None:
    """Whoever stops in the middle of its proof, or waits for the other side's, is gone after the handshakes' deadline."""
    key = SwarmKey.generate()
    victim = await hosts.start(admission=Admission(swarm_key=key), limits=Limits(handshake_timeout=0.4))
    member = Attacker(victim.addrs[0], admission=Admission(swarm_key=key))
    wire = await member.wire()
    await member.handshake(wire, muxer="")
    total = wire.written
    proof = PROOF_SIZE + 2 + TAG
    for most in (total - proof, total - proof + 1, total - proof // 2, total - 1):
        stalling = await member.wire(most=most)
        with pytest.raises(Stalled):
            await member.handshake(stalling)
        with trio.fail_after(5):
            await stalling.wait_closed()
    with trio.fail_after(5):
        await wire.wait_closed()  # it never said which multiplexer it wants
    friend = await hosts.start(admission=Admission(swarm_key=key))
    assert await round_trip(friend, victim, hosts.echo)
    assert victim.connected_peers() == [friend.peer_id]


@asynccontextmanager
async def listening(serve: Callable[[trio.SocketStream], Awaitable[object]]) -> AsyncIterator[str]:
    """The multiaddr of a port where connections get what `serve` does with them."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def test_whom_we_dial_may_stall_at_any_byte(hosts) -> None:
    """The dial fails in time, wherever in its handshakes the other side stops."""
    host = await hosts.start(limits=Limits(handshake_timeout=0.3))
    liar = Attacker(host.addrs[0])
    written: list[int] = []

    async def answer(stream: trio.SocketStream, most: int | None) -> None:
        wire = Wire(stream, most)
        with contextlib.suppress(Stalled, BaseLibp2pError, trio.BrokenResourceError):
            await liar.answer(wire)
        written.append(wire.written)
        await wire.wait_closed()

    async with listening(partial(answer, most=None)) as addr:
        await host.connect(liar.identity.peer_id, [addr])
        await host.disconnect(liar.identity.peer_id)
    (total,) = written
    for most in {*range(0, total, total // 12), total - 1}:
        async with listening(partial(answer, most=most)) as addr:
            with trio.fail_after(5), pytest.raises(PetalnetError):
                await host.connect(liar.identity.peer_id, [addr], timeout_s=1)
    assert host.connected_peers() == []
    await hosts.check_alive(host)


async def test_whom_we_dial_may_announce_words_of_four_gigabytes(hosts) -> None:
    host = await hosts.start(limits=Limits(handshake_timeout=5.0))
    liar = Attacker(host.addrs[0])
    sent = 0

    async def flood(stream: trio.SocketStream) -> None:
        nonlocal sent
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"\xff\xff\xff\xff\x0f")
            while True:
                await stream.send_all(bytes(65536))
                sent += 65536

    async with listening(flood) as addr:
        with trio.fail_after(4), pytest.raises(PetalnetError):
            await host.connect(liar.identity.peer_id, [addr])
    assert sent < 64 * 1024 * 1024
    await hosts.check_alive(host)


@pytest.mark.parametrize("channel", ["plaintext", "tls"])
async def test_only_noise_is_spoken(hosts, victim: Host, channel: str) -> None:
    keys = create_ed25519_key_pair()
    channels = {"plaintext": (PLAINTEXT_ID, InsecureTransport(keys)), "tls": (TLS_ID, TLSTransport(keys))}
    name, transport = channels[channel]
    stranger = new_host(key_pair=keys, sec_opt={TProtocol(name): transport})
    async with stranger.run(listen_addrs=[]):
        with trio.move_on_after(5), contextlib.suppress(BaseLibp2pError):
            await stranger.connect(info_from_p2p_addr(Multiaddr(victim.addrs[0])))
        assert victim.connected_peers() == []
    await hosts.check_alive(victim)


async def test_gossip_of_a_size_that_nobody_honest_sends(hosts, victim: Host) -> None:
    """Messages so long that libp2p's own writes of them come apart: they are neither taken nor passed on."""
    mallory, witness = await hosts.start(), await hosts.start()
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:
        gossip = Gossip(witness)
        gossip.subscribe(TOPIC, lambda author, data: True, lambda author, data: got.append(data))
        await nursery.start(gossip.run)
        await witness.connect(victim.peer_id, victim.addrs)
        for size in (70_000, 250_000, 3_000_000):
            with contextlib.suppress(BaseLibp2pError, PetalnetError):
                stream = await raw_stream(mallory, victim, MESHSUB)
                me = ID.from_string(mallory.peer_id).to_bytes()
                message = rpc_pb2.Message(from_id=me, seqno=b"1", data=bytes(size), topicIDs=[TOPIC])
                with trio.move_on_after(2):
                    await stream.write(encode_varint_prefixed(rpc_pb2.RPC(publish=[message]).SerializeToString()))
                await drain(stream, 0.1)
        await hosts.check_alive(victim)
        assert witness.is_connected(victim.peer_id) and got == []
        nursery.cancel_scope.cancel()
