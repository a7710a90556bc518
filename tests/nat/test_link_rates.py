"""What a connection says of its link's speed, over links whose speed is known."""

from __future__ import annotations

import sys

import pytest

from .distance import Distance, why_not
from .lab import Lab

pytestmark = [pytest.mark.nat, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

PORT = 4001
_SINK = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("listening", flush=True)
connected, _ = server.accept()
while connected.recv(65536):
    pass
"""
_SEND = """
import sys, trio
from petalnet.p2p.transport import TcpStream, tune

async def main():
    connected = trio.socket.socket()
    tune(connected)
    await connected.connect((sys.argv[1], int(sys.argv[2])))
    stream = TcpStream(connected)
    await stream.write(bytes(1000))
    print(stream.bytes_s())
    for _ in range(16):
        await stream.write(bytes(128 * 1024))
    print(stream.bytes_s())
    for _ in range(5):
        await trio.sleep(0.05)
        await stream.write(bytes(1000))
    print(stream.bytes_s())
    await stream.close()

trio.run(main)
"""


@pytest.mark.parametrize("mbit", [8, 40])
def test_a_connection_knows_the_speed_of_its_link(mbit: int) -> None:
    with Lab(Distance(rtt_ms=20, mbit=mbit)) as lab:
        lab.add_public("a")
        lab.add_public("b")
        sink = lab.popen("b", [sys.executable, "-c", _SINK, PORT], stdout=-1)
        assert sink.stdout is not None and sink.stdout.readline()
        with sink.stdout:
            done = lab.run("a", [sys.executable, "-c", _SEND, lab.ip("b"), PORT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, then, later = done.stdout.split()
    assert first == "None"
    assert 0.7 < float(then) / (mbit * 1e6 / 8) < 1.2
    assert float(later) >= 0.9 * float(then)  # a few small messages say nothing about the link
