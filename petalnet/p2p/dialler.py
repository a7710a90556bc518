"""Connections to peers: which are good, and how new ones are made.

libp2p's own dialling tries one address, waits a quarter of a second for nothing, and remembers a failure for a minute. Here all
addresses of a peer are tried, each a little after the one before, and the first that answers as that peer wins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import trio
from libp2p.abc import INetConn
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from multiaddr import Multiaddr

from petalnet.errors import PeerUnreachable, UsageError
from petalnet.p2p.addresses import parse_addr
from petalnet.p2p.identity import public_key_bytes
from petalnet.p2p.libp2p_host import Libp2pHost
from petalnet.p2p.security import NoiseSession

STAGGER_S = 0.25
"""Seconds after which the next address of a peer is tried beside the ones that have not answered yet (RFC 8305)."""
MAX_ADDRS = 16
ADDRS_LIFETIME_S = 3600
"""Seconds for which an address at which a peer answered is remembered."""


class Dialler:
    """The connections of one host."""

    def __init__(self, libp2p: Libp2pHost) -> None:
        self._libp2p = libp2p
        self._under_way: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)

    def all(self, peer_id: str) -> list[INetConn]:
        """Every connection to a peer, those that are about to end included, the oldest first."""
        return list(self._libp2p.swarm.connections.get(_key(peer_id), []))

    def live(self, peer_id: str) -> SwarmConn | None:
        """The newest good connection to a peer: where there are several, an older one may be left from its former life."""
        for connection in reversed(self.all(peer_id)):
            if isinstance(connection, SwarmConn) and is_good(connection):
                return connection
        return None

    def known_addrs(self, peer_id: str) -> list[str]:
        """The addresses of a peer that are known, without /p2p/."""
        try:
            found = self._libp2p.get_peerstore().addrs(_key(peer_id))
        except PeerStoreError:
            return []
        return list(dict.fromkeys(_plain(str(addr)) for addr in found))

    async def connection(self, peer_id: str, addrs: Sequence[str], timeout_s: float) -> SwarmConn:
        """A good connection to a peer, made where there is none; those who ask at once share it. Raises PeerUnreachable."""
        if peer_id == str(self._libp2p.get_id()):
            raise PeerUnreachable("this node does not connect to itself", peer_id)
        connection = self.live(peer_id)
        if connection is not None:
            return connection
        lock = self._under_way[peer_id]
        try:
            with trio.fail_after(timeout_s):
                async with lock:
                    return self.live(peer_id) or await self._dial(peer_id, addrs)
        except trio.TooSlowError:
            tried = ", ".join(self._candidates(peer_id, addrs)) or "no address"
            raise PeerUnreachable(f"peer {peer_id} did not answer within {timeout_s:g} s (tried {tried})", peer_id) from None
        finally:
            if not lock.locked():
                self._under_way.pop(peer_id, None)

    def _candidates(self, peer_id: str, addrs: Sequence[str]) -> list[str]:
        found = dict.fromkeys((*map(_plain, addrs), *self.known_addrs(peer_id)))
        return [addr for addr in found if _is_dialable(addr)][:MAX_ADDRS]

    async def _dial(self, peer_id: str, addrs: Sequence[str]) -> SwarmConn:
        candidates = self._candidates(peer_id, addrs)
        if not candidates:
            raise PeerUnreachable(f"no address of peer {peer_id} is known", peer_id)
        peer = _key(peer_id)
        failures: dict[str, str] = {}
        won: list[SwarmConn] = []

        async def dial(addr: str, over: trio.Event) -> None:
            try:
                connection = await self._libp2p.swarm.dial_addr(Multiaddr(addr), peer)
            except (BaseLibp2pError, OSError) as error:
                failures[addr] = reason_of(error)
            else:
                if isinstance(connection, SwarmConn):
                    won.append(connection)
                    self._libp2p.get_peerstore().add_addrs(peer, [Multiaddr(addr)], ADDRS_LIFETIME_S)
                    nursery.cancel_scope.cancel()
            finally:
                over.set()

        async with trio.open_nursery() as nursery:
            for addr in candidates:
                over = trio.Event()
                nursery.start_soon(dial, addr, over)
                with trio.move_on_after(STAGGER_S):
                    await over.wait()
        # The peer may have dialled us meanwhile.
        connection = won[0] if won else self.live(peer_id)
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


def reason_of(error: BaseException) -> str:
    """The innermost cause of an error in a few words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


@lru_cache(maxsize=4096)
def _key(peer_id: str) -> ID:
    if public_key_bytes(peer_id) is None:
        raise UsageError(f"{peer_id[:80]!r} is not a peer id")
    return ID.from_string(peer_id)


def _plain(addr: str) -> str:
    return addr.partition("/p2p/")[0]


def _is_dialable(addr: str) -> bool:
    try:
        parse_addr(addr)
    except UsageError:
        return False
    return True
