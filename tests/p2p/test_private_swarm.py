"""Private swarms, lists of peers and bans between live hosts: who is admitted talks, who is not learns nothing but that."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport
from multiaddr import Multiaddr

from petalnet.errors import NotAdmitted, PeerUnreachable
from petalnet.p2p.admission import PRIVATE_NOISE_ID, Admission
from petalnet.p2p.host import Host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import Limits
from petalnet.p2p.swarm_key import SwarmKey

KEY, OTHER_KEY = SwarmKey(bytes(32)), SwarmKey(b"\1" * 32)


async def member(hosts, **options: object) -> Host:
    return await hosts.start(admission=Admission(swarm_key=KEY, **options))


async def talk(source: Host, target: Host, protocol) -> bool:
    from petalnet.p2p.messages import Ping

    with trio.fail_after(5):
        async with await source.open_stream(target.peer_id, protocol, addrs=target.addrs) as stream:
            await stream.send(Ping(7))
            return await stream.receive() == Ping(7)


async def refused(source: Host, target: Host) -> str:
    """The line that a person at `source` reads; `target` knows nothing of a connection afterwards, and serves nobody less."""
    with trio.fail_after(5), pytest.raises(NotAdmitted) as caught:
        await source.connect(target.peer_id, target.addrs)
    assert "\n" not in str(caught.value) and target.peer_id in str(caught.value)
    assert not source.is_connected(target.peer_id) and not target.is_connected(source.peer_id)
    return str(caught.value)


async def test_holders_of_the_key_talk(hosts) -> None:
    a, b, c = await member(hosts), await member(hosts), await member(hosts)
    assert await talk(a, b, hosts.echo) and await talk(c, b, hosts.echo) and await talk(b, a, hosts.echo)


async def test_without_the_key(hosts) -> None:
    inside, stranger = await member(hosts), await hosts.start()
    assert "is in a private swarm: give its key with --swarm-key FILE" in await refused(stranger, inside)
    assert await talk(await member(hosts), inside, hosts.echo)


async def test_with_another_key(hosts) -> None:
    inside, stranger = await member(hosts), await hosts.start(admission=Admission(swarm_key=OTHER_KEY))
    assert "another swarm key" in await refused(stranger, inside)
    assert "another swarm key" in await refused(inside, stranger)
    assert await talk(await member(hosts), inside, hosts.echo)


async def test_a_key_where_the_swarm_is_open(hosts) -> None:
    inside, outside = await member(hosts), await hosts.start()
    assert "is in no private swarm: leave out the swarm key" in await refused(inside, outside)


@asynccontextmanager
async def stock_host(security_id: str) -> AsyncIterator[IHost]:
    """A host as py-libp2p makes it, with no more of ours than the name of the secure channel."""
    keys = create_new_key_pair()
    noise = Transport(keys, noise_privkey=create_x25519_key_pair().private_key)
    host = new_host(key_pair=keys, sec_opt={TProtocol(security_id): noise})
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host


@pytest.mark.parametrize("security_id", [str(NOISE_ID), PRIVATE_NOISE_ID])
async def test_other_libp2p_programs_are_refused(hosts, security_id: str) -> None:
    """Also one that knows the channel's name: it has no key."""
    inside = await hosts.start(admission=Admission(swarm_key=KEY), limits=Limits(handshake_timeout=0.5))
    async with stock_host(security_id) as stock:
        target = info_from_p2p_addr(Multiaddr(inside.addrs[0]))
        with pytest.raises((BaseLibp2pError, OSError, trio.TooSlowError)), trio.fail_after(2):  # stock tries again and again
            await stock.get_network().dial_addr(target.addrs[0], target.peer_id)
        assert not stock.get_connected_peers()
        with trio.fail_after(10), pytest.raises(PeerUnreachable):
            await inside.connect(str(stock.get_id()), [str(addr) for addr in stock.get_addrs()], timeout_s=1.0)
        assert not inside.connected_peers()
    assert await talk(await member(hosts), inside, hosts.echo)


async def test_who_knows_the_channel_but_not_the_key_does_not_learn_whom_it_has_reached(hosts) -> None:
    """Not one byte of the handshake comes back: its second message would carry the peer id."""
    inside = await member(hosts)
    _, _, _, _, port, *_ = inside.addrs[0].split("/")
    for first in (bytes(32), secrets.token_bytes(48), b"", b"\xff" * 300):
        async with await trio.open_tcp_stream("127.0.0.1", int(port)) as stream:
            said = b""
            with trio.fail_after(5):
                for line in ("/multistream/1.0.0", PRIVATE_NOISE_ID):
                    await stream.send_all(bytes([len(line) + 1]) + line.encode() + b"\n")
                await stream.send_all(len(first).to_bytes(2, "big") + first)
                with contextlib.suppress(trio.BrokenResourceError):
                    while data := await stream.receive_some():
                        said += data
        assert said == b"\x13/multistream/1.0.0\n" + bytes([len(PRIVATE_NOISE_ID) + 1]) + PRIVATE_NOISE_ID.encode() + b"\n"
    assert await talk(await member(hosts), inside, hosts.echo)


async def test_an_open_swarm_still_takes_other_libp2p_programs(hosts) -> None:
    outside = await hosts.start()
    async with stock_host(str(NOISE_ID)) as stock:
        target = info_from_p2p_addr(Multiaddr(outside.addrs[0]))
        with trio.fail_after(10):
            await stock.get_network().dial_addr(target.addrs[0], target.peer_id)
        assert stock.get_id() in [ID.from_string(peer) for peer in outside.connected_peers()]


async def test_who_does_not_go_on_is_disconnected_in_time(hosts) -> None:
    """Silence where the handshake, or the proof, should come."""
    inside = await hosts.start(admission=Admission(swarm_key=KEY), limits=Limits(handshake_timeout=0.3))
    _, _, _, _, port, *_ = inside.addrs[0].split("/")
    async with await trio.open_tcp_stream("127.0.0.1", int(port)) as stream:
        with trio.fail_after(5):
            said = b""
            while data := await stream.receive_some():
                said += data
    assert said in (b"", b"\x13/multistream/1.0.0\n")
    assert await talk(await member(hosts), inside, hosts.echo)


async def test_a_blocked_peer_is_refused_whoever_dials(hosts) -> None:
    a = await hosts.start()
    b = await hosts.start(admission=Admission(blocked=[a.peer_id]))
    assert "does not admit this node" in await refused(a, b)
    assert f"peer {a.peer_id} is blocked by this node's --block-peers" in await refused(b, a)
    await hosts.check_alive(b)


async def test_the_log_says_who_was_refused_and_why(hosts, until, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "petalnet")
    blocked, keyless = await hosts.start(), await hosts.start()
    host = await hosts.start(admission=Admission(blocked=[blocked.peer_id]))
    private = await member(hosts)
    await refused(blocked, host)
    await refused(keyless, private)
    reasons = (f"peer {blocked.peer_id} is blocked by this node's --block-peers", "failed to negotiate the secure protocol (")
    for reason in reasons:
        await until(lambda: any("from 127.0.0.1 port" in line and reason in line for line in caplog.messages))  # noqa: B023


async def test_only_those_on_the_list_are_admitted(hosts) -> None:
    friend, stranger = Identity.generate(), await hosts.start()
    host = await hosts.start(admission=Admission(allowed=[friend.peer_id]))
    assert await talk(await hosts.start(identity=friend), host, hosts.echo)
    assert "does not admit this node" in await refused(stranger, host)
    assert "not among this node's --allow-peers" in await refused(host, stranger)


async def test_lists_hold_in_a_private_swarm_too(hosts) -> None:
    a = await member(hosts)
    b = await member(hosts, blocked=[a.peer_id])
    assert "its lists of peers keep this node out" in await refused(a, b)
    assert "--block-peers" in await refused(b, a)


async def test_who_breaks_rules_is_dropped_and_kept_away_for_a_while(hosts, until) -> None:
    good, bad = await hosts.start(), await hosts.start()
    host = await hosts.start()
    assert await talk(bad, host, hosts.echo) and await talk(good, host, hosts.echo)
    for _ in range(9):
        host.offence(bad.peer_id, "a rule")
    assert host.is_connected(bad.peer_id)
    host.offence(bad.peer_id, "a rule", weight=2.0)
    await until(lambda: not host.is_connected(bad.peer_id) and not bad.is_connected(host.peer_id))
    assert "does not admit this node" in await refused(bad, host)
    assert "kept away" in await refused(host, bad)
    assert await talk(good, host, hosts.echo)


async def through_relay(hosts, server: Host, relay: Host) -> list[str]:
    """Addresses at which the server is reached through the relay."""
    from petalnet.p2p.addresses import parse_peer
    from petalnet.p2p.relay import Relay

    Relay(relay)
    addrs = tuple(parse_peer(addr).addr for addr in relay.addrs)
    await server.connect(relay.peer_id, addrs)
    reservation = await server.circuits.reserve(relay.peer_id, addrs)
    server.circuits.reservations = {relay.peer_id: reservation}
    return list(reservation.addrs)


async def test_lists_hold_through_a_relay(hosts) -> None:
    friend, stranger, relay = await hosts.start(), await hosts.start(), await hosts.start()
    server = await hosts.start(listen=False, admission=Admission(blocked=[stranger.peer_id]))
    addrs = await through_relay(hosts, server, relay)
    await friend.connect(server.peer_id, addrs)
    with trio.fail_after(5), pytest.raises(NotAdmitted, match="does not admit this node"):
        await stranger.connect(server.peer_id, addrs)
    assert server.is_connected(friend.peer_id) and not server.is_connected(stranger.peer_id)


async def test_a_private_swarm_through_a_relay(hosts) -> None:
    """A relay of the swarm carries members only."""
    relay = await member(hosts)
    server = await hosts.start(listen=False, admission=Admission(swarm_key=KEY))
    addrs = await through_relay(hosts, server, relay)
    insider = await member(hosts)
    with trio.fail_after(5):
        await insider.connect(server.peer_id, addrs)
    statuses = {status.peer_id: (status.direction, status.path, status.relay) for status in insider.peers()}
    assert statuses == {server.peer_id: ("out", "relay", relay.peer_id), relay.peer_id: ("out", "direct", None)}
    with trio.fail_after(5), pytest.raises(NotAdmitted, match=f"{relay.peer_id} is in a private swarm"):
        await (await hosts.start()).connect(server.peer_id, addrs)
