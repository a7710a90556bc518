"""Distance between hosts: a public segment whose packets a thread of this process carries, each so late as the way is long.

Every host has a TUN device on the segment. A packet waits at its sender's uplink for its turn (rate), then travels (delay), and arrives in
order. Nothing in the kernel is needed beyond TUN: no `tc`. What a program on a host sees is TCP over a long way, with its slow start.

Delays are kept to some 0.1 ms, by a thread that comes before all others where the machine lets it: a wire is not late because the
processors are busy. `benchmarks/chains.py raw` measures what is really added.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x0001 | 0x1000
_IPV4_HEADER = 20
_LARGEST_PACKET = 65536
_PACKETS_AT_ONCE = 64
_LONGEST_WAIT_S = 0.5
"""An uplink at which packets would wait longer than this drops them, as a router's buffer does."""


@dataclass
class _Uplink:
    """A host's side of the segment."""

    tun: int
    bytes_per_s: float | None
    free_at: float = 0.0
    is_cut: bool = False


class Distance:
    """A segment on which hosts lie apart. Started and stopped by the lab that it belongs to.

    Args:
        rtt_ms: round trip between any two hosts.
        mbit: what each host can send, megabit/s; None for no bound.
    """

    def __init__(self, rtt_ms: float, mbit: float | None = None) -> None:
        self._rtt_ms = rtt_ms
        self._mbit = mbit
        self._of_pairs: dict[frozenset[str], float] = {}
        self._uplinks: dict[str, _Uplink] = {}  # by address
        self._wake, self._waker = os.pipe()
        self._stopping = False
        self._thread = threading.Thread(target=self._carry, name="distance", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No packet arrives any more."""
        self._stopping = True
        os.write(self._waker, b"x")
        self._thread.join()
        for descriptor in (self._wake, self._waker, *(uplink.tun for uplink in self._uplinks.values())):
            os.close(descriptor)

    def plug_in(self, netns: str, device: str, ip: str) -> None:
        """Give a namespace a device of this name on the segment, with this address."""
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        made = f"far{os.getpid() % 10**6}x{len(self._uplinks)}"
        try:
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", made.encode(), _IFF_TUN_NO_PI))
            _ip("link", "set", made, "netns", netns)
            _ip("-n", netns, "link", "set", made, "name", device)
            _ip("-n", netns, "addr", "add", f"{ip}/24", "dev", device)
            _ip("-n", netns, "link", "set", device, "up")
        except BaseException:
            os.close(tun)
            raise
        self._uplinks = {**self._uplinks, ip: _Uplink(tun, _bytes_per_s(self._mbit))}  # another dict: the thread may be reading this one
        os.write(self._waker, b"x")

    def set_rtt(self, rtt_ms: float, between: tuple[str, str] | None = None) -> None:
        """Another round trip from now on, between two addresses or everywhere (those of pairs set before aside)."""
        if between is None:
            self._rtt_ms = rtt_ms
        else:
            self._of_pairs[frozenset(between)] = rtt_ms

    def set_uplink(self, ip: str, mbit: float | None) -> None:
        """What the host of this address can send from now on."""
        self._uplinks[ip].bytes_per_s = _bytes_per_s(mbit)

    def cut(self, ip: str) -> None:
        """Everything from and to this address vanishes, as with a pulled cable."""
        self._uplinks[ip].is_cut = True

    def mend(self, ip: str) -> None:
        """The opposite of `cut`."""
        self._uplinks[ip].is_cut = False

    def _carry(self) -> None:
        with contextlib.suppress(OSError):  # not everybody may: then delays are as exact as the machine is quiet
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        under_way: list[tuple[float, int, _Uplink, _Uplink, bytes]] = []
        number = 0
        while not self._stopping:
            uplinks = self._uplinks
            by_tun = {uplink.tun: uplink for uplink in uplinks.values()}
            by_address = {bytes(map(int, ip.split("."))): (ip, uplink) for ip, uplink in uplinks.items()}
            waiting = [self._wake, *by_tun]
            while not self._stopping and uplinks is self._uplinks:
                now = time.monotonic()
                while under_way and under_way[0][0] <= now:
                    _, _, sender, receiver, packet = heapq.heappop(under_way)
                    if not (sender.is_cut or receiver.is_cut):
                        with contextlib.suppress(OSError):  # the receiver's queue is full: lost, as on a real way
                            os.write(receiver.tun, packet)
                timeout = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
                # Not epoll or poll, whose time-outs are whole milliseconds.
                for descriptor in select.select(waiting, (), (), timeout)[0]:
                    if descriptor == self._wake:
                        os.read(self._wake, 1)
                        continue
                    sender = by_tun[descriptor]
                    for packet in _read_packets(descriptor):
                        source, target = by_address.get(packet[12:16]), by_address.get(packet[16:20])
                        if source is None or target is None or source is target or sender.is_cut:
                            continue
                        sent_at = time.monotonic()
                        if sender.bytes_per_s is not None:
                            if sender.free_at - sent_at > _LONGEST_WAIT_S:
                                continue
                            sent_at = sender.free_at = max(sent_at, sender.free_at) + len(packet) / sender.bytes_per_s
                        delay_s = self._of_pairs.get(frozenset((source[0], target[0])), self._rtt_ms) / 2000
                        number += 1
                        heapq.heappush(under_way, (sent_at + delay_s, number, sender, target[1], packet))


def why_not() -> str | None:
    """Why no hosts can be set apart on this machine, or None where they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        _ip("netns", "list")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs `ip` and /dev/net/tun: {error}"
    return None


def _read_packets(tun: int) -> Sequence[bytes]:
    """The IPv4 packets that wait at a device, some of them where they are many."""
    packets: list[bytes] = []
    with contextlib.suppress(OSError):  # no more for now, or its namespace is gone
        while len(packets) < _PACKETS_AT_ONCE:
            packet = os.read(tun, _LARGEST_PACKET)
            if len(packet) >= _IPV4_HEADER and packet[0] >> 4 == 4:
                packets.append(packet)
    return packets


def _bytes_per_s(mbit: float | None) -> float | None:
    return None if mbit is None else mbit * 125_000


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)
