"""Hosts that lie apart: what other tests and the benchmarks take for a long way must be one."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from .distance import Distance, why_not
from .lab import Lab

pytestmark = [pytest.mark.nat, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

PORT = 4001
_ECHO = """
import socket
server = socket.create_server(("0.0.0.0", int(__import__("sys").argv[1])))
print("listening", flush=True)
while True:
    connected, _ = server.accept()
    while data := connected.recv(65536):
        connected.sendall(data)
"""
_ROUND_TRIPS = """
import socket, sys, time
connected = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
size, count = int(sys.argv[3]), int(sys.argv[4])
taken = []
for _ in range(count):
    began = time.perf_counter()
    connected.sendall(bytes(size))
    left = size
    while left:
        left -= len(connected.recv(min(left, 65536)))
    taken.append(time.perf_counter() - began)
print(min(taken))
"""


@pytest.fixture
def far() -> Iterator[Lab]:
    """Hosts "a" and "b", where "b" echoes."""
    with Lab(Distance(rtt_ms=30)) as lab:
        lab.add_public("a")
        lab.add_public("b")
        server = lab.popen("b", [sys.executable, "-c", _ECHO, PORT], stdout=-1)
        assert server.stdout is not None and server.stdout.readline()
        with server.stdout:
            yield lab


def round_trip_s(lab: Lab, size: int = 64, count: int = 5) -> float:
    """The shortest time from "a" to "b" and back."""
    done = lab.run("a", [sys.executable, "-c", _ROUND_TRIPS, lab.ip("b"), PORT, size, count], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_way_is_as_long_as_told_and_can_be_made_longer(far: Lab) -> None:
    assert 0.030 <= round_trip_s(far) < 0.060
    assert far.distance is not None
    far.distance.set_rtt(80, between=(far.ip("a"), far.ip("b")))
    assert round_trip_s(far) >= 0.080


def test_an_uplink_sends_no_more_than_told(far: Lab) -> None:
    assert far.distance is not None
    far.distance.set_uplink(far.ip("a"), 8)
    before = far.sent_bytes("a")
    assert round_trip_s(far, size=500_000, count=1) > 0.45
    assert 500_000 < far.sent_bytes("a") - before < 700_000


def test_nothing_comes_through_a_cut(far: Lab) -> None:
    assert far.distance is not None
    far.distance.cut(far.ip("b"))
    command = [sys.executable, "-c", "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=0.5)"]
    assert far.run("a", [*command, far.ip("b"), PORT], capture_output=True, timeout=60).returncode
    far.distance.mend(far.ip("b"))
    assert round_trip_s(far) >= 0.030
