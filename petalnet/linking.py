"""From a server to those that hold the blocks after its own: streams for its sessions' outputs, and connections that stand before the first
of them is needed.

Only servers are dialled that announced themselves in signed records, at the addresses that these name; a client names another server by its
peer id and by nothing else.
"""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING

import trio

from petalnet.errors import PeerUnreachable, PetalnetError
from petalnet.p2p.protocols import PUSH
from petalnet.routing.records import MAX_ROUND_TRIPS, ServerRecord

if TYPE_CHECKING:
    from petalnet.p2p.host import Host
    from petalnet.p2p.streams import Stream
    from petalnet.peering import Peering

logger = logging.getLogger(__name__)

OPEN_WITHIN_S = 5.0
"""For a connection to another server, and likewise for asking the swarm about one that is not known."""
LOOK_UP_EVERY_S = 5.0
"""Seconds between two look-ups for servers that clients name and nobody here knows: anybody can make up names."""
REFRESH_EVERY_S = 5.0
AGAIN_AFTER_S = 30.0
"""Seconds until a server that could not be connected to is tried again. Sessions that begin meanwhile go through their client at once: a
router that drops what it is sent would have the first token of each wait for the end of the attempt."""
AT_ONCE = 4
MAX_WARM = MAX_ROUND_TRIPS
"""Servers that are kept connected: as many as a record tells the distance of."""


class Linking:
    """The servers that may follow one server in a chain."""

    def __init__(self, peering: Peering, model: str, end: int) -> None:
        """
        Args:
            model: the key of the model that is served.
            end: the block after the server's last.
        """
        self._peering = peering
        self._model = model
        self._end = end
        self._looked_up_at = float("-inf")
        self._failed_at: dict[str, float] = {}

    async def open(self, peer_id: str) -> Stream:
        """A stream for steps to another server of the model.

        Raises:
            PeerUnreachable: no record of such a server is known, even after asking the swarm, or it cannot be connected to, or could not a
                moment ago.
        """
        record = self._record(peer_id)
        if record is None and trio.current_time() - self._looked_up_at >= LOOK_UP_EVERY_S:
            self._looked_up_at = trio.current_time()
            with trio.move_on_after(OPEN_WITHIN_S):
                await self._peering.look_up(self._model)
            record = self._record(peer_id)
        if record is None:
            raise PeerUnreachable(f"no server {peer_id} of this model is known", peer_id)
        if not self._host.is_connected(peer_id) and trio.current_time() - self._failed_at.get(peer_id, float("-inf")) < AGAIN_AFTER_S:
            raise PeerUnreachable(f"server {peer_id} could not be connected to a moment ago", peer_id)
        try:
            return await self._host.open_stream(peer_id, PUSH, addrs=record.addrs, timeout_s=OPEN_WITHIN_S)
        except PeerUnreachable:
            self._failed_at[peer_id] = trio.current_time()
            raise

    async def keep_warm(self) -> None:
        """Have connections to servers that hold the next block, until cancelled: a link then opens in one round trip, and the server's own
        record tells how far they are."""
        limit = trio.CapacityLimiter(AT_ONCE)
        while True:
            async with trio.open_nursery() as nursery:
                for record in self._missing():
                    nursery.start_soon(self._connect, record, limit)
            await trio.sleep(REFRESH_EVERY_S * random.uniform(0.8, 1.2))

    @property
    def _host(self) -> Host:
        return self._peering.host

    def _record(self, peer_id: str) -> ServerRecord | None:
        record = self._peering.view.record(peer_id)
        usable = record is not None and record.model == self._model and record.expires > time.time() and record.state != "left"
        return record if usable else None

    def _missing(self) -> list[ServerRecord]:
        """Servers to connect to now, chosen by chance where there are many."""
        candidates = [
            record
            for record in self._peering.view.servers(self._model, now=time.time())
            if record.holds(self._end) and record.peer_id != self._host.peer_id
        ]
        now = trio.current_time()
        known = {record.peer_id for record in candidates}
        self._failed_at = {peer_id: at for peer_id, at in self._failed_at.items() if peer_id in known and now - at < AGAIN_AFTER_S}
        connected = sum(self._host.is_connected(record.peer_id) for record in candidates)
        others = [record for record in candidates if record.peer_id not in self._failed_at and not self._host.is_connected(record.peer_id)]
        random.shuffle(others)
        return others[: max(MAX_WARM - connected, 0)]

    async def _connect(self, record: ServerRecord, limit: trio.CapacityLimiter) -> None:
        async with limit:
            try:
                await self._host.connect(record.peer_id, record.addrs, timeout_s=OPEN_WITHIN_S)
            except PetalnetError as error:
                self._failed_at[record.peer_id] = trio.current_time()
                logger.debug("server %s, which holds our next block, is not reached: %s", record.peer_id, error)
