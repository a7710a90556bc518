"""What a review of the network found: each once ended a node, hindered others, or held memory for longer than it should."""

from __future__ import annotations

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status, StopMessage

from petalnet.errors import PeerUnreachable
from petalnet.p2p.circuit import STOP, read_protobuf, write_protobuf
from petalnet.p2p.hole_punching import HolePunching
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import Limits

from .test_relay import reserve, start_relay


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
