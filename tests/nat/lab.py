"""A small internet of network namespaces: a public segment, and hosts behind routers of their own that masquerade.

    with Lab() as lab:
        lab.add_public("relay")                 # 203.0.113.2 on the public segment
        lab.add_nated("alice")                  # 192.168.1.2 behind a router whose public side is 203.0.113.11
        process = lab.popen("alice", ["petalnet", "node", ...])

    with Lab(Distance(rtt_ms=40, mbit=100)) as lab: ...   # the same, with hosts (and routers) that lie apart

The routers do what routers at home do: they let answers in and drop whatever else comes from outside.
Everything lies in namespaces that are made here and taken down at the end, processes included; the machine's own network is not touched.
Needs root and `ip`; hosts behind routers need `nft`, too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from .distance import Distance

PUBLIC_NET = "203.0.113"
_END_WITHIN_S = 10.0
_ROUTER_RULES = """
table ip nat {{
    chain prerouting {{ type nat hook prerouting priority dstnat; {forwards} }}
    chain postrouting {{ type nat hook postrouting priority srcnat; oifname "wan" masquerade {ports}; }}
}}
table ip filter {{
    chain input {{ type filter hook input priority filter; iifname "wan" ct state new drop; }}
    chain forward {{ type filter hook forward priority filter; ct status dnat accept; iifname "wan" ct state new drop; }}
}}
"""


def why_not() -> str | None:
    """Why no lab with routers can be made on this machine, or None where it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [program for program in ("ip", "nft") if shutil.which(program) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    name = f"petalnet-probe-{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "exec", name, "nft", "-f", "-", stdin=_ROUTER_RULES.format(forwards="", ports=""))
    except subprocess.CalledProcessError as error:
        return f"cannot make network namespaces with NAT here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)
    return None


def _run(*command: str, stdin: str | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin, timeout=30).stdout


@dataclass
class _Host:
    netns: str
    ip: str
    router: str | None = None
    public_ip: str = ""
    keeps_ports: bool = True
    forwards: list[str] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)


class Lab:
    """See the module's docstring.

    Args:
        distance: what the public segment is; None for one without delays. The lab stops it in the end.
    """

    def __init__(self, distance: Distance | None = None) -> None:
        self.distance = distance
        self._prefix = f"petalnet-{os.getpid()}-{time.monotonic_ns() % 10**6}-"
        self._segment = self._prefix + "public"
        self._made: list[str] = []
        self._hosts: dict[str, _Host] = {}

    def __enter__(self) -> Lab:
        if self.distance is not None:
            return self
        try:
            self._make_netns(self._segment)
            _run("ip", "-n", self._segment, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._segment, "link", "set", "bridge", "up")
        except BaseException:
            self._destroy()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        processes = [process for host in self._hosts.values() for process in host.processes]
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _END_WITHIN_S
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._destroy()

    # ---- what there is

    def add_public(self, name: str) -> str:
        """A host on the public segment; returns its address."""
        ip = f"{PUBLIC_NET}.{2 + len(self._hosts)}"
        self._hosts[name] = _Host(self._make_netns(self._prefix + name), ip, public_ip=ip)
        self._plug_in(self._prefix + name, "eth", ip)
        return ip

    def add_nated(self, name: str, *, neighbour: str | None = None, keeps_ports: bool = True) -> str:
        """A host behind a router of its own, or behind the one of `neighbour`; returns its (private) address.

        Args:
            keeps_ports: whether connections leave the router from the port that they have inside, or from any.
        """
        netns = self._make_netns(self._prefix + name)
        number = len(self._hosts)
        if neighbour is None:
            router = self._make_netns(f"{netns}-router")
            public_ip = f"{PUBLIC_NET}.{100 + number}"
            self._plug_in(router, "wan", public_ip)
            _run("ip", "-n", router, "link", "add", "lan", "type", "bridge")
            _run("ip", "-n", router, "addr", "add", f"192.168.{number}.1/24", "dev", "lan")
            _run("ip", "-n", router, "link", "set", "lan", "up")
            _run("ip", "netns", "exec", router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            ip = f"192.168.{number}.2"
        else:
            beside = self._hosts[neighbour]
            if beside.router is None:
                raise ValueError(f"{neighbour} is not behind a router")
            router, public_ip = beside.router, beside.public_ip
            ip = f"{beside.ip.rpartition('.')[0]}.{10 + number}"
        _run("ip", "link", "add", "eth", "netns", netns, "type", "veth", "peer", "name", f"to{number}", "netns", router)
        _run("ip", "-n", router, "link", "set", f"to{number}", "master", "lan", "up")
        _run("ip", "-n", netns, "addr", "add", f"{ip}/24", "dev", "eth")
        _run("ip", "-n", netns, "link", "set", "eth", "up")
        _run("ip", "-n", netns, "route", "add", "default", "via", f"{ip.rpartition('.')[0]}.1")
        self._hosts[name] = _Host(netns, ip, router, public_ip, keeps_ports)
        if neighbour is None:
            self._set_rules(self._hosts[name])
        return ip

    def forward(self, name: str, port: int) -> None:
        """Open a TCP port on the host's router, as its owner would."""
        host = self._hosts[name]
        host.forwards.append(f'iifname "wan" tcp dport {port} dnat to {host.ip}:{port};')
        self._set_rules(host)

    def ip(self, name: str) -> str:
        """The host's own address."""
        return self._hosts[name].ip

    def public_ip(self, name: str) -> str:
        """The address at which others see the host."""
        return self._hosts[name].public_ip

    @property
    def names(self) -> list[str]:
        """All hosts, in the order in which they were added."""
        return list(self._hosts)

    def netns(self, name: str) -> str:
        """The host's namespace."""
        return self._hosts[name].netns

    def command(self, name: str, command: Sequence[object]) -> list[str]:
        """What runs a command on a host."""
        return ["ip", "netns", "exec", self._hosts[name].netns, *map(str, command)]

    def popen(self, name: str, command: Sequence[object], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program on a host; it is ended with the lab at the latest."""
        process = subprocess.Popen(self.command(name, command), **options)
        self._hosts[name].processes.append(process)
        return process

    def run(self, name: str, command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a program on a host to its end."""
        return subprocess.run(self.command(name, command), check=False, **options)

    def wire_bytes(self, name: str) -> int:
        """Bytes that the host has sent and received so far."""
        return self._count(name, "rx") + self.sent_bytes(name)

    def sent_bytes(self, name: str) -> int:
        """Bytes that the host has sent so far, with the headers of packets."""
        return self._count(name, "tx")

    def _count(self, name: str, way: str) -> int:
        return int(_run("ip", "netns", "exec", self._hosts[name].netns, "cat", f"/sys/class/net/eth/statistics/{way}_bytes"))

    # ---- how it is made

    def _make_netns(self, name: str) -> str:
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _plug_in(self, netns: str, device: str, ip: str) -> None:
        """Connect a namespace to the public segment."""
        if self.distance is not None:
            self.distance.plug_in(netns, device, ip)
            return
        port = f"port{len(self._made)}"
        _run("ip", "link", "add", device, "netns", netns, "type", "veth", "peer", "name", port, "netns", self._segment)
        _run("ip", "-n", self._segment, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", netns, "addr", "add", f"{ip}/24", "dev", device)
        _run("ip", "-n", netns, "link", "set", device, "up")

    def _set_rules(self, host: _Host) -> None:
        if host.router is None:
            raise ValueError("a host on the public segment has no router")
        rules = _ROUTER_RULES.format(
            forwards=" ".join(host.forwards),
            ports="" if host.keeps_ports else "fully-random",
        )
        _run("ip", "netns", "exec", host.router, "nft", "-f", "-", stdin=f"flush ruleset\n{rules}")

    def _destroy(self) -> None:
        if self.distance is not None:
            self.distance.stop()
        for name in reversed(self._made):
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)
        self._made.clear()
