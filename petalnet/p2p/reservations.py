"""A server that cannot be reached keeps reservations at relays: found among its peers, renewed in time, replaced when a relay is gone."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable

import trio
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError

from petalnet.errors import PeerUnreachable
from petalnet.p2p.addresses import ip_of, relay_of
from petalnet.p2p.circuit import HOP, Reservation
from petalnet.p2p.host import Host

logger = logging.getLogger(__name__)

WANTED = 2
"""Relays at a time: one may vanish without anybody noticing, and more would be taken from others."""
LOOK_EVERY_S = 1.0
"""Seconds between looks for relays while there are too few; a peer tells what it serves a moment after it is connected."""
CHECK_EVERY_S = 15.0
REFUSED_FOR_S = 60.0
"""For which a relay that refused or did not answer is left alone."""
RENEW_AT = 0.5
"""Part of a reservation's time after which it is renewed."""
MOST_REMEMBERED = 16
RECONNECT_TIMEOUT_S = 5.0


class Reservations:
    """The reservations of one host, kept while `run` runs.

    Args:
        on_change: called whenever there are others than before.
        fits: whether those who are to reach this host reach a relay, by its peer id.
    """

    def __init__(self, host: Host, on_change: Callable[[], None], fits: Callable[[str], bool] = lambda _: True) -> None:
        self._host = host
        self._on_change = on_change
        self._fits = fits
        self._held: dict[str, Reservation] = {}
        self._renew_at: dict[str, float] = {}  # unix seconds
        self._left_alone: dict[str, float] = {}  # relay: trio time until which it is not asked
        self._remembered: dict[str, tuple[str, ...]] = {}  # relays that were met, and where
        self._changed = trio.Event()
        host.on_peer_lost(self._on_peer_lost)

    @property
    def held(self) -> tuple[Reservation, ...]:
        """The reservations that stand."""
        return tuple(self._held.values())

    async def run(self) -> None:
        """Keep `WANTED` reservations as far as there are relays, until cancelled; then there are none."""
        try:
            while True:
                self._drop_expired()
                await self._renew()
                if len(self._held) < WANTED:
                    await self._reserve_more()
                self._changed = trio.Event()
                with trio.move_on_after((CHECK_EVERY_S if len(self._held) >= WANTED else LOOK_EVERY_S) * random.uniform(0.9, 1.1)):
                    await self._changed.wait()
        finally:
            self._held.clear()
            self._told()

    def _on_peer_lost(self, peer_id: str) -> None:
        if self._held.pop(peer_id, None) is not None:
            del self._renew_at[peer_id]
            logger.info("relay %s is gone", peer_id)
            self._told()
            self._changed.set()

    def _told(self) -> None:
        self._host.circuits.reservations = dict(self._held)
        self._on_change()

    def _drop_expired(self) -> None:
        now = time.time()
        gone = [relay_id for relay_id, held in self._held.items() if held.expires <= now]
        for relay_id in gone:
            del self._held[relay_id], self._renew_at[relay_id]
        if gone:
            self._told()

    async def _renew(self) -> None:
        for relay_id in [relay_id for relay_id in self._held if self._renew_at[relay_id] <= time.time()]:
            if not await self._reserve(relay_id) and relay_id in self._held:
                self._renew_at[relay_id] = time.time() + REFUSED_FOR_S  # until it expires, there is time to try again

    async def _reserve_more(self) -> None:
        candidates = self._candidates()
        if not candidates and not self._held:
            await self._reconnect()
            candidates = self._candidates()
        for relay_id in candidates:
            if len(self._held) >= WANTED:
                return
            await self._reserve(relay_id)

    def _candidates(self) -> list[str]:
        """Connected peers that relay, the nearest first."""
        now = trio.current_time()
        self._left_alone = {peer_id: until for peer_id, until in self._left_alone.items() if until > now}
        found = [
            peer_id
            for peer_id in self._host.connected_peers()
            if peer_id not in self._held and peer_id not in self._left_alone and self._relays(peer_id)
        ]
        return sorted(found, key=lambda peer_id: self._host.round_trip_s(peer_id) or math.inf)

    def _relays(self, peer_id: str) -> bool:
        try:
            serves = self._host.libp2p.get_peerstore().supports_protocols(ID.from_string(peer_id), [HOP])
        except PeerStoreError:
            return False
        return bool(serves) and self._host.is_direct(peer_id) and self._fits(peer_id)

    async def _reserve(self, relay_id: str) -> bool:
        addrs = self._addrs_of(relay_id)
        try:
            reservation = await self._host.circuits.reserve(relay_id, addrs)
        except PeerUnreachable as error:
            logger.debug("%s", error)
            self._left_alone[relay_id] = trio.current_time() + REFUSED_FOR_S
            return False
        if not self._host.is_connected(relay_id):  # it went while it answered
            return False
        if relay_id not in self._held:
            logger.info("reachable through relay %s", relay_id)
        now = time.time()
        self._renew_at[relay_id] = now + (reservation.expires - now) * RENEW_AT
        self._remembered.pop(relay_id, None)
        self._remembered[relay_id] = addrs
        while len(self._remembered) > MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        if self._held.get(relay_id, reservation).addrs != reservation.addrs or relay_id not in self._held:
            self._held[relay_id] = reservation
            self._told()
        else:
            self._held[relay_id] = reservation
        return True

    def _addrs_of(self, relay_id: str) -> tuple[str, ...]:
        """Where the relay is for sure: at the address of the connection to it, among those that are known."""
        remote = self._host.remote_ip(relay_id)
        known = [addr for addr in self._host.known_addrs(relay_id) if relay_of(addr) is None]
        return tuple(addr for addr in known if str(ip_of(addr)) == remote)

    async def _reconnect(self) -> None:
        """Back to a relay that was lost, where no other is there."""
        for relay_id, addrs in reversed(self._remembered.items()):
            if not self._host.is_connected(relay_id) and self._left_alone.get(relay_id, 0.0) <= trio.current_time():
                try:
                    await self._host.connect(relay_id, addrs, timeout_s=RECONNECT_TIMEOUT_S)
                except PeerUnreachable as error:
                    logger.debug("%s", error)
                    self._left_alone[relay_id] = trio.current_time() + RECONNECT_TIMEOUT_S
                else:
                    return
