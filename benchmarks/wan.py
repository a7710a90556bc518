"""Hosts with a long way between them, for benchmarks: in network namespaces, or on loopback behind relays where nobody is root.

    with far_hosts(running, ["client", "a", "b"], rtt_ms=40, mbit=100) as hosts:
        hosts.node("a", path, "--serve", "0:12")         # `petalnet node` there
        client = hosts.start("client", [sys.executable, …])

`hosts.measure` is the reference for whatever is measured there: TCP without anything of ours, between two of the hosts.

    python benchmarks/wan.py --rtt-ms 40 --mbit 100 -- bash experiment.sh

runs a command with such hosts around it (namespaces only): `$WAN_client`, `$WAN_a` … are their addresses, and `ip netns exec $NETNS_a …`
starts a program on one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm_processes import Bench, local_addrs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from nat.distance import Distance, why_not
from nat.lab import Lab

PORT, ECHO_PORT = 4001, 4002
ROUND_TRIPS = 100
ROUND_TRIP_BYTES = 64


@dataclass(frozen=True)
class Raw:
    """What TCP alone does between two hosts: round trips of a few bytes, in milliseconds, and one transfer."""

    median_ms: float
    least_ms: float
    late_ms: float  # the 90th of a hundred
    transfer_s: float

    def __str__(self) -> str:
        return f"round trip {self.median_ms:.1f} ms (least {self.least_ms:.1f}, nine of ten within {self.late_ms:.1f})"


class FarHosts:
    """Hosts in namespaces; see `far_hosts`."""

    what = "hosts in network namespaces"

    def __init__(self, running: Bench, lab: Lab, names: Sequence[str]) -> None:
        self._running, self._lab = running, lab
        for name in names:
            lab.add_public(name)

    def start(self, host: str, command: Sequence[object], **options: Any) -> subprocess.Popen[bytes]:
        """A program on a host; it ends with the benchmark."""
        return self._running.start(self._lab.command(host, command), **options)

    def node(self, host: str, *arguments: object, peers: Sequence[str] = ()) -> list[str]:
        """A `petalnet node` on a host, once it is ready; the multiaddrs at which others reach it."""
        listen = ("--host-maddrs", f"/ip4/{self._lab.ip(host)}/tcp/{PORT}")
        _, ready, _ = self._running.node(*arguments, peers=peers, listen=listen, on=self._lab.command(host, []))
        return [addr for addr in local_addrs(ready) if self._lab.ip(host) in addr]

    def sent_bytes(self) -> dict[str, int] | None:
        """What each host has put on its wire so far, headers included; None where nobody counts."""
        return {name: self._lab.sent_bytes(name) for name in self._lab.names}

    def echo(self, host: str) -> tuple[str, int]:
        """The address of a program on a host that sends back what it gets."""
        ip = self._lab.ip(host)
        _start_echo(self, host, ip, ECHO_PORT)
        return ip, ECHO_PORT

    def measure(self, first: str, second: str, size: int = 0) -> Raw:
        """TCP from one host to another: a hundred round trips, then `size` bytes one way and a word back, in a connection that is new."""
        return _measure(self, first, second, size)


class NearHosts:
    """Programs of this machine, each behind a relay; see `far_hosts`."""

    what = "loopback behind relays (both ends see a short way: no slow start, small windows)"

    def __init__(self, running: Bench, names: Sequence[str], rtt_ms: float, mbit: float | None) -> None:
        self._running = running
        ports = _free_ports(4 * len(names))
        self._ports = {name: ports[4 * number : 4 * number + 4] for number, name in enumerate(names)}
        pairs = [f"{pair[way]}:{pair[way + 1]}" for pair in self._ports.values() for way in (0, 2)]
        command = [sys.executable, str(Path(__file__).with_name("relays.py")), "--rtt-ms", str(rtt_ms)]
        relays = running.start([*command, *([] if mbit is None else ["--mbit", str(mbit)]), *pairs], stdout=subprocess.PIPE)
        _wait_for_line(relays)

    def start(self, host: str, command: Sequence[object], **options: Any) -> subprocess.Popen[bytes]:
        return self._running.start([str(part) for part in command], **options)

    def node(self, host: str, *arguments: object, peers: Sequence[str] = ()) -> list[str]:
        outside, inside = self._ports[host][:2]
        listen = ("--host-maddrs", f"/ip4/127.0.0.1/tcp/{inside}", "--announce-maddrs", f"/ip4/127.0.0.1/tcp/{outside}")
        _, ready, _ = self._running.node(*arguments, peers=peers, listen=listen)
        return [addr for addr in local_addrs(ready) if f"/tcp/{outside}/" in addr]

    def sent_bytes(self) -> dict[str, int] | None:
        return None

    def echo(self, host: str) -> tuple[str, int]:
        outside, inside = self._ports[host][2:]
        _start_echo(self, host, "127.0.0.1", inside)
        return "127.0.0.1", outside

    def measure(self, first: str, second: str, size: int = 0) -> Raw:
        return _measure(self, first, second, size)


Hosts = FarHosts | NearHosts


@contextlib.contextmanager
def far_hosts(running: Bench, names: Sequence[str], *, rtt_ms: float, mbit: float | None = None, loopback: bool = False) -> Iterator[Hosts]:
    """Hosts of these names, the same round trip between any two of them. Programs on them are ended in the end.

    Args:
        mbit: what each host can send; on loopback, each connection each way.
        loopback: without namespaces; otherwise that takes root.
    """
    if loopback:
        try:
            yield NearHosts(running, names, rtt_ms, mbit)
        finally:
            running.stop()
        return
    if (reason := why_not()) is not None:
        raise SystemExit(f"hosts with a distance between them: this {reason}. Without: --loopback")
    with Lab(Distance(rtt_ms, mbit)) as lab:
        try:
            yield FarHosts(running, lab, names)
        finally:
            running.stop()  # before the ways between them are gone: so they end in order


def _start_echo(hosts: Hosts, host: str, ip: str, port: int) -> None:
    _wait_for_line(hosts.start(host, [sys.executable, __file__, "echo", ip, port], stdout=subprocess.PIPE))


def _measure(hosts: Hosts, first: str, second: str, size: int) -> Raw:
    process = hosts.start(first, [sys.executable, __file__, "measure", *hosts.echo(second), size], stdout=subprocess.PIPE)
    return Raw(**json.loads(_wait_for_line(process)))


def _wait_for_line(process: subprocess.Popen[bytes]) -> bytes:
    line = process.stdout.readline() if process.stdout is not None else b""
    if not line:
        raise SystemExit(f"a program of the benchmark ended ({process.wait()})")
    return line


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def _echo(ip: str, port: int) -> None:
    """Answers connections one after the other: what is at most `ROUND_TRIP_BYTES` long with the same, a transfer with its last byte."""
    with socket.create_server((ip, port)) as server:
        print("listening", flush=True)
        while True:
            connected, _ = server.accept()
            with connected:
                _tune(connected)
                size = int.from_bytes(_receive(connected, 8), "big")
                while size and (data := connected.recv(min(size, 1 << 20))):
                    size -= len(data)
                    if not size:
                        connected.sendall(b"x")
                while data := connected.recv(ROUND_TRIP_BYTES):
                    connected.sendall(data)


def _measure_from_here(ip: str, port: int, size: int) -> None:
    with socket.create_connection((ip, port)) as connected:
        _tune(connected)
        data = bytes(size)
        began = time.perf_counter()
        connected.sendall(size.to_bytes(8, "big") + data)
        if size:
            _receive(connected, 1)
        transfer_s = time.perf_counter() - began
        taken = []
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            connected.sendall(bytes(ROUND_TRIP_BYTES))
            _receive(connected, ROUND_TRIP_BYTES)
            taken.append((time.perf_counter() - began) * 1e3)
    late = statistics.quantiles(taken, n=10)[-1]
    print(
        json.dumps({"median_ms": statistics.median(taken), "least_ms": min(taken), "late_ms": late, "transfer_s": transfer_s}), flush=True
    )


def _tune(connected: socket.socket) -> None:
    """As petalnet's own connections are: nothing waits for more, and no pacing."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError, AttributeError):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


def _receive(connected: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connected.recv(size - len(data))
        if not more:
            raise SystemExit("the other side went away")
        data += more
    return data


def main() -> None:
    if sys.argv[1:2] == ["echo"]:
        _echo(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["measure"]:
        _measure_from_here(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--hosts", nargs="+", default=["client", "a", "b", "c"])
        parser.add_argument("--rtt-ms", type=float, default=40.0)
        parser.add_argument("--mbit", type=float)
        parser.add_argument("command", nargs="+")
        options = parser.parse_args()
        with Lab(Distance(options.rtt_ms, options.mbit)) as lab:
            for name in options.hosts:
                lab.add_public(name)
            names = {f"WAN_{name}": lab.ip(name) for name in options.hosts} | {f"NETNS_{name}": lab.netns(name) for name in options.hosts}
            sys.exit(subprocess.run(options.command, env=os.environ | names, check=False).returncode)


if __name__ == "__main__":
    main()
