"""When a server goes where: the waits and second looks around the rules of `routing.placement`, which says why they are as they are."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Protocol

import trio

from petalnet.errors import PetalnetError
from petalnet.routing.pace import refresh_every_s
from petalnet.routing.placement import Move, choose_span, find_moves, may_leave, reconsider, yields_to
from petalnet.routing.records import ServerRecord
from petalnet.routing.swarm import SwarmView, missing_blocks
from petalnet.threads import in_thread

logger = logging.getLogger(__name__)

TOLD_S = 2.0
"""Seconds after which everybody knows what a server announced: gossip takes a few round trips, a look-up asks those that it missed."""
LOOK_UP_WITHIN_S = 5.0
SECOND_LOOKS = 3
"""How often a newcomer may find that others chose the same blocks before it loads what it has chosen last."""
MOST_LOOKED_AFTER = 32
"""Servers at most of which a newcomer, or one that is about to go, finds out whether they are alive."""
CHECK_EVERY_S = 5.0
"""Seconds between two looks at whether each block has a server."""
LOOK_EVERY_S = 60.0
"""Seconds between two looks at whether the swarm would be better otherwise, as the mean of times drawn by chance: so that not all of them
look at the same moment (Petals: 120)."""
HOLE_PATIENCE_S = 10.0
"""For which a block has to be without a server before another moves for it: a process that was started again is back by then."""
HOLE_TURN_S = 15.0
TURN_S = 3 * LOOK_EVERY_S
"""Seconds after which a server that should go first, where there is a hole and otherwise, and does not, is not counted on."""
IDLE_S = 3600.0
"""For so long."""
DRAIN_COUNTS_S = 120.0
"""Seconds for which a server that drains keeps others from going: it may only be about to end, with hours for its sessions to do so too."""
UNLOADABLE_S = 3600.0
"""Seconds for which blocks that could not be loaded are not tried again: whoever tries gives up the ones it has."""
STAY_S = 180.0
"""How long a server that has loaded blocks keeps them, unless others have no server at all: loading is not for nothing."""


class Swarm(Protocol):
    """Where the other servers are known from (a `Peering`)."""

    view: SwarmView

    async def look_up(self, model: str | None = None) -> None: ...


class Placing:
    """The places of one server in a swarm.

    Args:
        swarm: knows the other servers.
        peer_id: the server's own.
        model: the key of the model that it serves.
        num_blocks: blocks of that model.
        is_alive: finds out within seconds whether a server answers.
        rng: draws the waits.
    """

    def __init__(
        self,
        swarm: Swarm,
        peer_id: str,
        model: str,
        num_blocks: int,
        *,
        is_alive: Callable[[ServerRecord], Awaitable[bool]],
        rng: random.Random | None = None,
    ) -> None:
        self._swarm = swarm
        self._peer_id = peer_id
        self._model = model
        self._num_blocks = num_blocks
        self._is_alive = is_alive
        self._random = rng or random.Random()
        self._known: list[str] = []
        self._gone: set[str] = set()
        self._first: tuple[str, float] | None = None
        self._idle: dict[str, float] = {}
        self._draining: dict[str, float] = {}  # since when
        self._unloadable: dict[tuple[int, int], float] = {}

    async def choose(self, count: int) -> tuple[int, int]:
        """The blocks to begin with."""
        await self._look_up()
        others = self._others(("joining", "online"))
        self._known = [record.peer_id for record in others]
        self._gone = await self._find_gone(others)
        return choose_span((other for other in others if other.peer_id not in self._gone), self._num_blocks, count, now=time.time())

    async def _find_gone(self, others: Sequence[ServerRecord]) -> set[str]:
        """Those of the servers that alone among them hold some block and cannot be reached: a dead server's record stays for a while, and
        who was not connected to it has not seen it die."""
        holders = Counter(block for record in others for block in range(*record.span))
        needed = [record for record in others if record.state == "online" and any(holders[block] == 1 for block in range(*record.span))]
        gone: set[str] = set()

        async def look(record: ServerRecord) -> None:
            if not await self._is_alive(record):
                logger.info("server %s, of blocks %d:%d, does not answer: not counting on it", record.peer_id, *record.span)
                gone.add(record.peer_id)

        async with trio.open_nursery() as nursery:
            for record in self._random.sample(needed, min(len(needed), MOST_LOOKED_AFTER)):
                nursery.start_soon(look, record)
        return gone

    async def reconsider(self, own: ServerRecord, *, again: bool = False) -> tuple[int, int] | None:
        """Other blocks to load than those that a joining server has announced, because others announced theirs at the same moment; None
        where it may load what it has announced.

        Args:
            again: not the first time: the others have reconsidered as well.
        """
        await trio.sleep(TOLD_S)
        await self._look_up()
        others = [other for other in self._others(("joining", "online")) if other.peer_id not in self._gone]
        span = reconsider(others, own, self._known, now=time.time(), again=again)
        return None if span == own.span else span

    async def next_move(self, own: Callable[[], ServerRecord]) -> Move:
        """Wait until it is this server's turn to go to other blocks.

        Args:
            own: gives the server's present record, whose blocks it has loaded just now.
        """
        loaded = trio.current_time()
        look_at, urgent_at = loaded + self._look_after_s(), loaded
        hole_since: float | None = None
        while True:
            await trio.sleep(CHECK_EVERY_S * self._random.uniform(0.8, 1.2))
            now = trio.current_time()
            hole_since = (now if hole_since is None else hole_since) if self._hole() else None
            urgent = hole_since is not None and now - hole_since >= HOLE_PATIENCE_S
            if now < (urgent_at if urgent else look_at):
                continue
            await self._look_up()
            look_at, urgent_at = now + self._look_after_s(), now + max(HOLE_PATIENCE_S, self._refresh_s / 4)
            move = await self._turn(own(), HOLE_TURN_S if urgent else TURN_S)
            if move is None or now < self._unloadable.get(move.span, now):
                continue
            if move.fills or now - loaded >= STAY_S:
                return move

    def could_not_load(self, span: tuple[int, int]) -> None:
        """These blocks are not to be had here."""
        self._unloadable[span] = trio.current_time() + UNLOADABLE_S

    async def clear_to_go(self, own: ServerRecord, move: Move) -> bool:
        """Whether a server that has announced that it drains may go; to be asked before its sessions are sent away."""
        await trio.sleep(TOLD_S)
        await self._look_up()
        if yields_to(self._with_movers(), own, now=time.time()) or not self.may_leave(own, move):
            return False
        stand_ins = [other for other in self._others(("online",)) if max(other.span[0], own.span[0]) < min(other.span[1], own.span[1])]
        gone = await self._find_gone(stand_ins)
        return self.may_leave(own, move, gone)

    def may_leave(self, own: ServerRecord, move: Move, gone: Collection[str] = ()) -> bool:
        """Whether others have what would be missed, as far as is known at this moment. A server that failed lately does not count, nor does
        one of `gone`."""
        view, now = self._swarm.view, time.time()
        online = [record for record in view.servers(self._model, now=now, blocked=gone) if not view.on_probation(record.peer_id)]
        return may_leave(online, own, move, now=now)

    def lacks(self, span: tuple[int, int]) -> bool:
        """Whether some of these blocks have no server."""
        return bool(missing_blocks(self._others(("joining", "online")), *span))

    def _hole(self) -> bool:
        view = self._swarm.view
        return bool(
            missing_blocks(
                view.servers(self._model, now=time.time(), states=("joining", "online"), include_failed=True), 0, self._num_blocks
            )
        )

    async def _turn(self, own: ServerRecord, turn_s: float) -> Move | None:
        """The server's own move, where it is its turn. Whoever does not take its turn within `turn_s` is passed over."""
        now = trio.current_time()
        self._idle = {peer_id: until for peer_id, until in self._idle.items() if until > now}
        moves = await self._moves(own)
        if not moves or moves[0].peer_id == own.peer_id:
            self._first = None
            return moves[0] if moves else None
        first = moves[0].peer_id
        if self._first is None or self._first[0] != first:
            self._first = (first, now)
        elif now - self._first[1] >= turn_s:
            self._idle[first] = now + IDLE_S
        return None

    async def _moves(self, own: ServerRecord) -> list[Move]:
        return await in_thread(partial(find_moves, self._with_movers(), own, now=time.time(), idle=frozenset(self._idle)))

    def _with_movers(self) -> list[ServerRecord]:
        """The other servers, and those that drain and may be about to go elsewhere."""
        now, draining = trio.current_time(), self._others(("draining",))
        self._draining = {record.peer_id: self._draining.get(record.peer_id, now) for record in draining}
        movers = [record for record in draining if now - self._draining[record.peer_id] < DRAIN_COUNTS_S]
        return [*self._others(("joining", "online")), *movers]

    def _others(self, states: tuple[str, ...]) -> list[ServerRecord]:
        """Servers that failed lately are among them: whether they are gone for good, the end of their records tells."""
        records = self._swarm.view.servers(self._model, now=time.time(), states=states, include_failed=True)
        return [record for record in records if record.peer_id != self._peer_id]

    async def _look_up(self) -> None:
        with trio.move_on_after(LOOK_UP_WITHIN_S):
            try:
                await self._swarm.look_up(self._model)
            except PetalnetError as error:
                logger.debug("the swarm could not be looked up: %s", error)

    def _look_after_s(self) -> float:
        return max(LOOK_EVERY_S, self._refresh_s) * self._random.uniform(0.5, 1.5)

    @property
    def _refresh_s(self) -> float:
        """How often the swarm may be asked for all its records: the more there are, the more each look-up costs."""
        return refresh_every_s(len(self._swarm.view))
