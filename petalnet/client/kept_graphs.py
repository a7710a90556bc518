"""Graphs of forward passes that servers keep for the backward passes to come: what they are called, and which nobody needs any more.

A graph is used up by its backward pass. Where none comes, since the output was forgotten or the pass has failed, the server is told: with
the next request to it, or else after a second. What it is not told, it drops by its own bounds.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Awaitable, Callable, Iterable

import trio

from petalnet.client.portal import Portal
from petalnet.errors import PetalnetError
from petalnet.p2p.pass_messages import MAX_GRAPHS, DropGraphs

logger = logging.getLogger(__name__)

TELL_AFTER_S = 1.0
MOST_UNTOLD = 4 * MAX_GRAPHS
"""Of one server; older ones are left to its own bounds."""

Graphs = set[tuple[str, int]]
"""Graphs by their server's id and their number."""


class KeptGraphs:
    """Of one client; on the portal's thread.

    Args:
        tell: sends such a message to a server, if that is connected. Errors: PetalnetError.
    """

    def __init__(self, tell: Callable[[str, DropGraphs], Awaitable[None]]) -> None:
        self._tell = tell
        self._numbers = itertools.count(1)
        self._untold: dict[str, list[int]] = {}
        self._some_untold = trio.Event()

    def new_number(self) -> int:
        """What a graph is to be called."""
        return next(self._numbers)

    def drop_with(self, owner: object, graphs: Graphs, portal: Portal) -> None:
        """When `owner` is forgotten, in whatever thread, nobody needs what is left in `graphs`."""
        weakref.finalize(owner, portal.call_soon, self.drop, graphs).atexit = False

    def drop(self, graphs: Iterable[tuple[str, int]]) -> None:
        """Nobody needs these any more."""
        for peer_id, number in graphs:
            numbers = self._untold.setdefault(peer_id, [])
            numbers.append(number)
            del numbers[:-MOST_UNTOLD]
        if self._untold:
            self._some_untold.set()

    def untold(self, peer_id: str) -> DropGraphs | None:
        """What the server is to be told before the next request; it counts as told from now on."""
        numbers = self._untold.get(peer_id)
        if not numbers:
            return None
        told, self._untold[peer_id] = numbers[:MAX_GRAPHS], numbers[MAX_GRAPHS:]
        if not self._untold[peer_id]:
            del self._untold[peer_id]
        return DropGraphs(tuple(told))

    async def run(self) -> None:
        """Tell servers of what no request has told them, until cancelled."""
        while True:
            await self._some_untold.wait()
            self._some_untold = trio.Event()
            await trio.sleep(TELL_AFTER_S)
            for peer_id in list(self._untold):
                while (message := self.untold(peer_id)) is not None:
                    try:
                        await self._tell(peer_id, message)
                    except PetalnetError as error:
                        logger.debug("a server was not told which graphs to drop: %s", error)
