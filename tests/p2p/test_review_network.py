"""What a review of the network found: each once ended a node, hindered others, or held memory for longer than it should."""

from __future__ import annotations

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status, StopMessage

from petalnet.errors import PeerUnreachable
from petalnet.p2p.circuit import STOP, read_protobuf, write_protobuf

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
