"""Where a peer comes from, as far as that cannot be made up: the network of the address at the other end of its connection.

Identities cost nothing, addresses do. Whatever is shared fairly among strangers (room in a store, streams, requests) is shared among
sources, not among peer ids.
"""

from __future__ import annotations

import ipaddress

IPV4_PREFIX = 24
IPV6_PREFIX = 48
"""What one customer of a provider gets with ease: 256 addresses of the old kind, a /48 of the new."""


def source_of(ip: str | None) -> str:
    """The source of a connection from an IP address; "" where there is none (a relayed connection).

    Public addresses are grouped by their network. In a private network each address is a machine of its own.
    """
    if ip is None:
        return ""
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not address.is_global:
        return str(address)
    prefix = IPV4_PREFIX if address.version == 4 else IPV6_PREFIX
    return str(ipaddress.ip_network((address, prefix), strict=False))


def network_of(ip: str) -> str:
    """The public network that an IP address is in, or that is given as such; "" for one that is not public, or none."""
    if "/" in ip:
        return ip
    source = source_of(ip)
    return source if "/" in source else ""
