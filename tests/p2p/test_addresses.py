from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import UsageError
from petalnet.p2p.addresses import (
    PeerAddress,
    circuit_addr,
    listen_target,
    parse_addr,
    parse_peer,
    plain_addr,
    reachable_addrs,
    read_peer_list,
    relay_of,
)
from petalnet.p2p.identity import Identity

PEER = Identity(bytes(32)).peer_id
OTHER = Identity(bytes([1]) * 32).peer_id


@pytest.mark.parametrize("addr", ["/ip4/10.0.0.1/tcp/31330", "/ip6/::1/tcp/1", "/dns4/example.org/tcp/443", "/dns/example.org/tcp/443"])
def test_a_full_multiaddr_is_taken_apart(addr: str) -> None:
    assert parse_peer(f" {addr}/p2p/{PEER}\n") == PeerAddress(PEER, addr)
    assert str(parse_peer(f"{addr}/p2p/{PEER}")) == f"{addr}/p2p/{PEER}"


def test_an_address_may_lead_through_one_relay() -> None:
    relay = f"/ip4/203.0.113.2/tcp/31330/p2p/{OTHER}"
    found = parse_peer(f"{relay}/p2p-circuit/p2p/{PEER}")
    assert found == PeerAddress(PEER, f"{relay}/p2p-circuit")
    assert relay_of(found.addr) == parse_peer(relay) and circuit_addr(parse_peer(relay)) == found.addr
    assert relay_of("/ip4/203.0.113.2/tcp/31330") is None
    assert plain_addr(str(found)) == plain_addr(found.addr) == found.addr
    assert plain_addr(relay) == "/ip4/203.0.113.2/tcp/31330" == plain_addr("/ip4/203.0.113.2/tcp/31330")
    with pytest.raises(UsageError):
        listen_target(found.addr)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rubbish",
        "10.0.0.1:31330",
        "/ip4/10.0.0.1/tcp/31330",
        f"/ip4/10.0.0.1/p2p/{PEER}",
        f"/ip4/10.0.0.1/udp/1/quic-v1/p2p/{PEER}",
        f"/ip4/10.0.0.999/tcp/1/p2p/{PEER}",
        f"/ip4/10.0.0.1/tcp/70000/p2p/{PEER}",
        f"/ip4/10.0.0.1/tcp/1/p2p-circuit/p2p/{PEER}",
        f"/p2p/{OTHER}/p2p-circuit/p2p/{PEER}",
        f"/ip4/10.0.0.1/tcp/1/p2p/{OTHER}/p2p-circuit/p2p/{OTHER}/p2p-circuit/p2p/{PEER}",
        "/ip4/10.0.0.1/tcp/1/p2p/QmWrong",
        f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}x",
        f"/p2p/{PEER}",
    ],
)
def test_what_cannot_be_dialled_is_refused_in_one_line_that_names_it(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_peer(text)
    message = str(caught.value)
    assert text[:100] in message and "\n" not in message


@given(st.text(max_size=300))
def test_no_text_breaks_the_reading_of_an_address(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_peer(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    try:
        parse_addr(text)
    except UsageError as error:
        assert "\n" not in str(error)


def test_lists_of_peers_come_from_values_and_files(tmp_path) -> None:
    one, two, three = (f"/ip4/10.0.0.{n}/tcp/31330/p2p/{PEER}" for n in (1, 2, 3))
    four = f"/ip4/10.0.0.4/tcp/31330/p2p/{OTHER}"
    path = tmp_path / "peers.txt"
    path.write_text(f"# our peers\n\n{three}   # the third\n{one}\n")
    assert read_peer_list([f"{one},{two}  {one}", f"@{path}", four]) == [one, two, three, four]
    assert read_peer_list([]) == [] == read_peer_list(["", " , "])


def test_a_list_of_rubbish_is_refused(tmp_path) -> None:
    path = tmp_path / "peers.txt"
    path.write_text("not a peer at all\n")
    with pytest.raises(UsageError, match=r"peers.txt, line 1: .*not a peer at all"):
        read_peer_list([f"@{path}"])
    with pytest.raises(UsageError, match=r"cannot read the list of peers .*missing\.txt"):
        read_peer_list([f"@{tmp_path / 'missing.txt'}"])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        read_peer_list([f"@{path}"])


def test_listening_everywhere_is_announced_as_real_addresses() -> None:
    found = reachable_addrs("/ip4/0.0.0.0/tcp/31330")
    assert "/ip4/127.0.0.1/tcp/31330" in found
    assert not any("0.0.0.0" in addr for addr in found)
    assert found[-1].startswith("/ip4/127.")  # loopback reaches least
    assert reachable_addrs("/ip4/10.1.2.3/tcp/5") == ["/ip4/10.1.2.3/tcp/5"]


def test_a_node_listens_on_ip_addresses() -> None:
    assert listen_target("/ip6/::/tcp/0") == ("::", 0)
    with pytest.raises(UsageError, match="IP address"):
        listen_target("/dns4/example.org/tcp/1")
