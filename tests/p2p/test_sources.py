from __future__ import annotations

import pytest

from petalnet.p2p.sources import network_of, source_of


@pytest.mark.parametrize(
    ("ip", "source"),
    [
        ("8.8.8.8", "8.8.8.0/24"),
        ("8.8.8.200", "8.8.8.0/24"),
        ("::ffff:8.8.8.8", "8.8.8.0/24"),
        ("2606:4700:4700::1111", "2606:4700:4700::/48"),
        ("127.0.0.1", "127.0.0.1"),
        ("192.168.1.7", "192.168.1.7"),
        ("fe80::1%eth0", "fe80::1"),
        ("example.org", ""),
        (None, ""),
    ],
)
def test_public_addresses_are_grouped_by_network_and_private_ones_are_machines(ip: str | None, source: str) -> None:
    assert source_of(ip) == source
    if ip is not None:
        assert network_of(ip) == (source if "/" in source else "")


def test_a_network_is_its_own_network() -> None:
    """Callers with an IPv6 address are told by their network."""
    assert network_of("2606:4700:4700::/48") == "2606:4700:4700::/48"
