"""Connections to peers: which are good, and how new ones are made.

libp2p's own dialling tries one address, waits a quarter of a second for nothing, and remembers a failure for a minute. Here all
addresses of a peer are tried, each a little after the one before, and the first that answers as that peer wins. Addresses that lead to
the peer itself come before those that lead through a relay, and where there are connections of both kinds, the direct one is used.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network

import trio
from libp2p.abc import INetConn
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from multiaddr import Multiaddr

from petalnet.errors import NotAdmitted, PeerUnreachable, UsageError
from petalnet.p2p.addresses import ip_of, own_interfaces, parse_addr, plain_addr, relay_of
from petalnet.p2p.admission import Admission
from petalnet.p2p.circuit import Circuits, is_relayed
from petalnet.p2p.identity import public_key_bytes
from petalnet.p2p.libp2p_host import Libp2pHost, reason_of
from petalnet.p2p.protocols import Limits
from petalnet.p2p.security import NoiseSession

logger = logging.getLogger(__name__)

STAGGER_S = 0.25
"""Seconds after which the next address of a peer is tried beside the ones that have not answered yet (RFC 8305)."""
MAX_ADDRS = 16
ADDRS_LIFETIME_S = 3600
"""Seconds for which an address at which a peer answered is remembered."""


RELAY_TIMEOUT_S = 5.0
"""Seconds in which a relay has to be connected, before the peer behind it is asked for."""


class Dialler:
    """The connections of one host.

    Attributes:
        circuits: those that lead through relays.
    """

    def __init__(self, libp2p: Libp2pHost, limits: Limits | None = None, admission: Admission | None = None) -> None:
        limits = limits or Limits()
        self._admission = admission or Admission()
        self.circuits = Circuits(libp2p, limits)
        self._libp2p = libp2p
        self._under_way: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self._dials = trio.CapacityLimiter(limits.max_dials)

    def all(self, peer_id: str) -> list[INetConn]:
        """Every connection to a peer, those that are about to end included, the oldest first."""
        return list(self._libp2p.swarm.connections.get(_key(peer_id), []))

    def live(self, peer_id: str) -> SwarmConn | None:
        """The newest good connection to a peer, a direct one if there is any; an older one may be left from the peer's former life."""
        relayed: SwarmConn | None = None
        for connection in reversed(self.all(peer_id)):
            if isinstance(connection, SwarmConn) and is_good(connection):
                if not is_relayed(connection):
                    return connection
                relayed = relayed or connection
        return relayed

    def is_direct(self, peer_id: str) -> bool:
        """Whether there is a good connection to a peer that leads through no relay."""
        connection = self.live(peer_id)
        return connection is not None and not is_relayed(connection)

    def remote_ip(self, peer_id: str) -> str | None:
        """The IP address at the other end of the direct connection to a peer; None where there is none."""
        connection = self.live(peer_id)
        if connection is None or is_relayed(connection):
            return None
        address = connection.muxed_conn.secured_conn.get_remote_address()  # type: ignore[attr-defined]
        return None if address is None else str(address[0]).removeprefix("::ffff:")

    def known_addrs(self, peer_id: str) -> list[str]:
        """The addresses of a peer that are known, without /p2p/."""
        try:
            found = self._libp2p.get_peerstore().addrs(_key(peer_id))
        except PeerStoreError:
            return []
        return list(dict.fromkeys(plain_addr(str(addr)) for addr in found))

    async def connection(self, peer_id: str, addrs: Sequence[str], timeout_s: float, *, direct: bool = False) -> SwarmConn:
        """A good connection to a peer, made where there is none; those who ask at once share it.

        Raises PeerUnreachable: NotAdmitted where one side does not admit the other.

        With `direct`, one that has to be made is not made through a relay: a relay behind a relay helps nobody.
        """
        if peer_id == str(self._libp2p.get_id()):
            raise PeerUnreachable("this node does not connect to itself", peer_id)
        connection = self.live(peer_id)
        if connection is not None:
            return connection
        self._admission.check_dial(peer_id)
        lock = self._under_way[peer_id]
        try:
            with trio.fail_after(timeout_s):
                async with lock:
                    return self.live(peer_id) or await self._dial(peer_id, self._candidates(peer_id, addrs, direct))
        except trio.TooSlowError:
            tried = ", ".join(self._candidates(peer_id, addrs, direct)) or "no address"
            raise PeerUnreachable(f"peer {peer_id} did not answer within {timeout_s:g} s (tried {tried})", peer_id) from None
        finally:
            if not lock.locked():
                self._under_way.pop(peer_id, None)

    def _candidates(self, peer_id: str, addrs: Sequence[str], direct: bool) -> list[str]:
        found = dict.fromkeys((*map(plain_addr, addrs), *self.known_addrs(peer_id)))
        dialable = [addr for addr in found if _is_dialable(addr)]
        if direct:
            return [addr for addr in dialable if relay_of(addr) is None][:MAX_ADDRS]
        if any(map(relay_of, dialable)):
            networks = [interface.network for interface in own_interfaces()]
            dialable.sort(key=lambda addr: _detour(addr, networks))
        return dialable[:MAX_ADDRS]

    async def _dial(self, peer_id: str, candidates: Sequence[str]) -> SwarmConn:
        if not candidates:
            raise PeerUnreachable(f"no address of peer {peer_id} is known", peer_id)
        peer = _key(peer_id)
        failures: dict[str, str] = {}
        refusals: list[NotAdmitted] = []
        won: list[SwarmConn] = []

        relays: dict[str, list[str]] = {}  # and their addresses: one circuit through each is enough
        for relay in filter(None, map(relay_of, candidates)):
            relays.setdefault(relay.peer_id, []).append(relay.addr)

        async def dial(addr: str, over: trio.Event) -> None:
            relay = relay_of(addr)
            try:
                if relay is None:
                    async with self._dials:
                        connection = await self._libp2p.swarm.dial_addr(Multiaddr(addr), peer)
                else:
                    await self.connection(relay.peer_id, relays[relay.peer_id], RELAY_TIMEOUT_S, direct=True)
                    connection = await self.circuits.dial(relay.peer_id, peer, addr)
            except (BaseLibp2pError, OSError, PeerUnreachable) as error:
                failures[addr] = reason_of(error)
                if (refusal := self._admission.explain(peer_id, error)) is not None:
                    refusals.append(refusal)
                logger.debug("dialling peer %s at %s failed: %s", peer_id, addr, refusal or failures[addr])
            else:
                if isinstance(connection, SwarmConn):
                    won.append(connection)
                    self._libp2p.get_peerstore().add_addrs(peer, [Multiaddr(addr)], ADDRS_LIFETIME_S)
                    nursery.cancel_scope.cancel()
            finally:
                over.set()

        async with trio.open_nursery() as nursery:
            for addr in candidates:
                through = relay_of(addr)
                if through is not None and through.addr != relays[through.peer_id][0]:
                    continue
                over = trio.Event()
                nursery.start_soon(dial, addr, over)
                with trio.move_on_after(STAGGER_S):
                    await over.wait()
        # The peer may have dialled us meanwhile.
        connection = won[0] if won else self.live(peer_id)
        if connection is None and refusals:
            raise refusals[0]
        if connection is None:
            reasons = "; ".join(f"{addr}: {why}" for addr, why in failures.items())
            raise PeerUnreachable(f"cannot reach peer {peer_id}: {reasons}", peer_id)
        return connection


def is_good(connection: SwarmConn) -> bool:
    """Whether streams can be opened on a connection, as far as this side knows."""
    muxed = connection.muxed_conn
    session = muxed.secured_conn  # type: ignore[attr-defined]  # an attribute of the muxers, not of their interface
    return not connection.is_closed and muxed.is_established and isinstance(session, NoiseSession) and not session.broken


async def abort(connection: INetConn) -> None:
    """End a connection at once, without a word to the peer."""
    session = connection.muxed_conn.secured_conn  # type: ignore[attr-defined]
    if isinstance(session, NoiseSession):
        await session.abort()


@lru_cache(maxsize=4096)
def _key(peer_id: str) -> ID:
    if public_key_bytes(peer_id) is None:
        raise UsageError(f"{peer_id[:80]!r} is not a peer id")
    return ID.from_string(peer_id)


def _detour(addr: str, networks: Sequence[IPv4Network | IPv6Network]) -> int:
    """In which turn an address is tried where one of them leads through a relay: what will hardly lead to the peer waits longest.

    A private address in none of our own `networks` is mostly one of a stranger's home; it may still work where networks are routed.
    """
    if relay_of(addr) is not None:
        return 1
    ip = ip_of(addr)
    return 0 if ip is None or not ip.is_private or any(ip in network for network in networks) else 2


def _is_dialable(addr: str) -> bool:
    try:
        parse_addr(addr)
    except UsageError:
        return False
    return True
