"""What this client has asked servers for and has no answer to yet: whoever has less to do gets the next. On the portal's thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import trio

from petalnet.routing.routes import Hop


class UnderWay:
    """Passes that are waited for.

    Attributes:
        work: of each server that has some: tokens × blocks, by what they take in a forward pass.
    """

    def __init__(self) -> None:
        self.work: dict[str, float] = {}
        self._requests: dict[str, int] = {}
        self._choosing: WeakValueDictionary[tuple[str, int, int], trio.Lock] = WeakValueDictionary()

    def choosing(self, model: str, first: int, end: int) -> trio.Lock:
        """To be held by whoever chooses a server for blocks [first, end), until its request counts: of two that choose at once the second
        sees the first. Who chooses for other blocks does not wait: a search for missing ones takes seconds."""
        key = model, first, end
        lock = self._choosing.get(key)
        if lock is None:
            lock = self._choosing[key] = trio.Lock()
        return lock

    @contextmanager
    def at(self, hop: Hop, tokens: int, weight: float = 1.0) -> Iterator[None]:
        """A request to a hop's server is under way as long as this is open.

        Args:
            weight: what a token of it takes, in tokens of a forward pass.
        """
        peer_id, work = hop.peer_id, tokens * (hop.end - hop.first) * weight
        self.work[peer_id] = self.work.get(peer_id, 0.0) + work
        self._requests[peer_id] = self._requests.get(peer_id, 0) + 1
        try:
            yield
        finally:
            self.work[peer_id] -= work
            self._requests[peer_id] -= 1
            if not self._requests[peer_id]:
                del self._requests[peer_id], self.work[peer_id]
