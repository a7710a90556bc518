"""Which LoRA parameters lie on which servers, so that each of them gets a version once. On the portal's thread.

A server keeps what it was given for a while, also after the connection is gone, and may drop it at any time: then it answers a request that
names the version with `LoraGone`, and gets it again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from petalnet.client.lora import Lora
from petalnet.p2p.pass_messages import PutLora
from petalnet.routing.routes import Hop

MOST_REMEMBERED = 1024
"""Of what was put where the latest so many entries. A training step adds one for each server of its routes."""


class LoraUploads:
    """What servers were given, as far as is known."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._most = most
        self._there: OrderedDict[tuple[str, str], set[tuple[int, int]]] = OrderedDict()  # server and version: blocks [first, end)
        self._under_way: dict[tuple[str, str], trio.Event] = {}

    @asynccontextmanager
    async def bringing(self, hop: Hop, lora: Lora) -> AsyncIterator[PutLora | None]:
        """What has to be sent to a hop's server before a request that names the version; None where it has all that it needs.

        Inside, the caller sends it and receives `LoraPut`; a request may follow it on the same stream without waiting for that. Who else
        wants to bring the same waits meanwhile. When it is left by an exception the server counts as not having it.
        """
        entry = hop.peer_id, lora.version
        while entry in self._under_way:
            await self._under_way[entry].wait()
        if self.has(hop, lora):
            yield None
            return
        self._under_way[entry] = done = trio.Event()
        try:
            yield lora.message(hop.first, hop.end)
            self._there.setdefault(entry, set()).add((hop.first, hop.end))
            self._there.move_to_end(entry)
            while len(self._there) > self._most:
                self._there.popitem(last=False)
        finally:
            del self._under_way[entry]
            done.set()

    def has(self, hop: Hop, lora: Lora) -> bool:
        """Whether the hop's server was given what the hop needs; also where none of its blocks needs anything."""
        there = self._there.get((hop.peer_id, lora.version), ())
        return not lora.touches(hop.first, hop.end) or any(first <= hop.first and hop.end <= end for first, end in there)

    def forget(self, peer_id: str) -> None:
        """The server does not have anything any more, or not all of it."""
        for entry in [entry for entry in self._there if entry[0] == peer_id]:
            del self._there[entry]


def lora_version(lora: Lora | None, hop: Hop) -> str:
    """What a request to a hop's server names: "" where its blocks get nothing."""
    return lora.version if lora is not None and lora.touches(hop.first, hop.end) else ""
