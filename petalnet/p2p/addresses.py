"""Addresses of peers: multiaddrs as people type them, lists of bootstrap peers, and the addresses that a listening node has."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from multiaddr import Multiaddr

from petalnet.errors import UsageError
from petalnet.p2p.identity import public_key_bytes
from petalnet.p2p.lists import entries_of

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")
_EXAMPLE = "/ip4/10.0.0.1/tcp/31330/p2p/12D3Koo…"
_CIRCUIT = "/p2p-circuit"


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A peer and one address of it.

    Attributes:
        peer_id: base58.
        addr: the multiaddr without the /p2p/ part at its end, such as "/ip4/10.0.0.1/tcp/31330", or for a peer behind a relay
            "/ip4/203.0.113.2/tcp/31330/p2p/<the relay's id>/p2p-circuit".
    """

    peer_id: str
    addr: str

    def __str__(self) -> str:
        return f"{self.addr}/p2p/{self.peer_id}"


def parse_peer(multiaddr: str, *, whole: str | None = None) -> PeerAddress:
    """The parts of a full multiaddr.

    Raises UsageError, whose one line names the text (or `whole`), where it is none that can be dialled.
    """
    text = multiaddr.strip()
    whole = text if whole is None else whole
    head, mark, peer_id = text.rpartition("/p2p/")
    if not mark:
        raise UsageError(f"peer address {_shown(whole)} lacks the peer's id at its end; it should look like {_EXAMPLE}")
    if public_key_bytes(peer_id) is None:
        raise UsageError(f"peer address {_shown(whole)} does not end with a valid peer id; it should look like {_EXAMPLE}")
    return PeerAddress(peer_id, parse_addr(head, whole=whole))


def parse_addr(addr: str, *, whole: str | None = None) -> str:
    """The normal form of a multiaddr without the peer's id: TCP, or through a relay that is reached by TCP.

    Raises UsageError; `whole` is the text that its message names.
    """
    whole = addr if whole is None else whole
    shown = _shown(whole)
    if addr.endswith(_CIRCUIT):
        relay = addr.removesuffix(_CIRCUIT)
        if _CIRCUIT in relay:
            raise UsageError(f"{shown} leads through more than one relay")
        return circuit_addr(parse_peer(relay, whole=whole))
    try:
        parsed = Multiaddr(addr)
        names = [protocol.name for protocol in parsed.protocols()]
    except ValueError as error:  # every error of the multiaddr package is one
        raise UsageError(f"{shown} is not a multiaddr; it should look like {_EXAMPLE}") from error
    if len(names) != 2 or names[0] not in _HOSTS or names[1] != "tcp":
        raise UsageError(f"{shown} is not a TCP address; it should look like {_EXAMPLE}")
    return str(parsed)


def plain_addr(addr: str) -> str:
    """The multiaddr without the /p2p/ part at its end, if it has one; nothing is checked."""
    head, mark, tail = addr.rpartition("/p2p/")
    return head if mark and "/" not in tail else addr


def relay_of(addr: str) -> PeerAddress | None:
    """The relay through which an address (as `parse_addr` gives it) leads, None where it leads to the peer itself."""
    return parse_peer(addr.removesuffix(_CIRCUIT)) if addr.endswith(_CIRCUIT) else None


def circuit_addr(relay: PeerAddress) -> str:
    """The address, without the peer's own id, of a peer that can be reached through `relay`."""
    return f"{relay}{_CIRCUIT}"


def ip_of(addr: str) -> IpAddress | None:
    """The IP address in a direct address; None where that is a name or the address leads through a relay."""
    if relay_of(addr) is not None:
        return None
    kind, host, _ = _split(addr)
    return ipaddress.ip_address(host) if kind in ("ip4", "ip6") else None


def port_of(addr: str) -> int:
    """The TCP port of a direct address."""
    return _split(addr)[2]


def read_peer_list(values: Sequence[str]) -> list[str]:
    """Full multiaddrs of all peers that `values` name, in their order and each once.

    See `entries_of` for the forms of a value. Raises UsageError, whose one line names the text that is wrong.
    """
    found: dict[str, None] = {}
    for text, where in entries_of(values, "peers"):
        try:
            found[str(parse_peer(text))] = None
        except UsageError as error:
            raise UsageError(f"{where}{error}") from error
    return list(found)


def _shown(text: str) -> str:
    """The text as a message may show it: one line, without control characters, of bounded length."""
    return repr(text if len(text) <= 120 else f"{text[:119]}…")


def reachable_addrs(addr: str) -> list[str]:
    """The addresses under which others reach a listener bound to `addr`, those that reach farthest first.

    Where it listens on every interface (0.0.0.0 or ::), that is one for each interface that is up: public and local-network
    addresses, then loopback. Link-local addresses are left out, since a peer cannot know by which of its links to use them.
    """
    kind, host, port = _split(addr)
    if kind not in ("ip4", "ip6") or not ipaddress.ip_address(host).is_unspecified:
        return [addr]
    version = 4 if kind == "ip4" else 6
    usable = [interface.ip for interface in own_interfaces() if interface.version == version]
    usable.sort(key=lambda ip: (ip.is_loopback, ip.is_private, ip.packed))
    return [f"/{kind}/{ip}/tcp/{port}" for ip in usable]


def own_interfaces() -> list[ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
    """The addresses of this machine's interfaces that are up, with the networks that they are in; no link-local ones."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = {
        ipaddress.ip_interface((entry.address.partition("%")[0], _prefix_length(entry.netmask)))
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    return [interface for interface in found if not interface.ip.is_link_local and not interface.ip.is_multicast]


def _prefix_length(netmask: str | None) -> int:
    """24 of "255.255.255.0"; where the system tells no netmask, as if the address were a network of its own (IPv4's longest prefix)."""
    return 32 if netmask is None else int(ipaddress.ip_address(netmask)).bit_count()


def _split(addr: str) -> tuple[str, str, int]:
    """("ip4", "10.0.0.1", 31330) of "/ip4/10.0.0.1/tcp/31330"."""
    _, kind, host, _, port = addr.split("/")
    return kind, host, int(port)


def listen_target(addr: str) -> tuple[str, int]:
    """Host and port of a listening address. Raises UsageError for anything that names no interface of this machine."""
    parsed = parse_addr(addr)
    kind, host, port = ("", "", 0) if relay_of(parsed) else _split(parsed)
    if kind not in ("ip4", "ip6"):
        raise UsageError(f"{_shown(addr)} cannot be listened on: give an IP address, such as /ip4/0.0.0.0/tcp/31330")
    return host, port
