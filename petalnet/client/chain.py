"""The servers of one inference session, and what a session asks of all of them together.

Runs on the portal's thread. A chain has one long-lived stream to each server of its route, opened in parallel (`links`); what goes over
them and comes back is the business of `exchange`. A chain that has lost servers can be mended (`mending`), as long as others hold their
blocks; whoever has the chain decides about that.

A first step whose beginning the servers may have computed for an earlier session asks for that first (`Attach`), all of them at once, and
then sends only what the least of them lacks.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from petalnet.client.attempts import Full
from petalnet.client.chunks import chunk_ends, stages_of
from petalnet.client.exchange import Exchange
from petalnet.client.history import History
from petalnet.client.inputs import Inputs, Names, columns, encode_names
from petalnet.client.links import Link, Session, open_links
from petalnet.client.lora import Lora
from petalnet.client.pipeline import Pending
from petalnet.client.recovery import Recovery
from petalnet.client.replacements import has_stand_in, own_record
from petalnet.client.requests import Target, describe_route, find_hops, retrying
from petalnet.client.trace import HopTimes, StepTimes
from petalnet.client.visit import Visit
from petalnet.errors import ProtocolError
from petalnet.p2p.fields import Blob, blob_size
from petalnet.p2p.session_messages import UNIT_TOKENS, Attach, Attached, Reserve, Reserved, Step
from petalnet.routing.routes import Hop

if TYPE_CHECKING:
    from petalnet.routing.records import ServerRecord

logger = logging.getLogger(__name__)

LEAST_UNITS_TO_ATTACH = 2
"""Whole units of a prompt from which on asking for them is worth a round trip."""
FEW_TOKENS = 16
"""New tokens up to which a step takes as long on the network as one of a single token."""
REMEMBERED_STEPS = 8
"""Such steps, of which the least network time counts."""

LOOK_EVERY_S = 2.0
"""Between two looks for somebody who could replace a server that is about to leave."""


@dataclass(frozen=True)
class Counts:
    """What went through the client.

    Attributes:
        relayed_steps: since the chain was opened or mended, outputs that it carried from one server to the next.
        replays: likewise, outputs that it asked for once more because they may have been lost on the way.
        recoveries: in all of the session, how often servers that were lost had to be replaced.
        rebuilt_tokens: KV entries of a row that others computed anew for that.
        uploaded_bytes: what the client sent for it: arrays, without headers.
    """

    relayed_steps: int
    replays: int
    recoveries: int = 0
    rebuilt_tokens: int = 0
    uploaded_bytes: int = 0


class Chain:
    """The links of one session, first block to last; `open` makes one.

    Attributes:
        target: what it runs; of an adapter it has the label instead of the name.
        exchange: what goes over the links.
        session: what all servers know of it.
        history: what the session's KV entries were computed from.
        promised_rows: rows for which all servers have set aside room.
        number: of the last step that was given.
        order, ordering: an order of rows that servers may lack, None where all have it; and the number of the step that was to bring the
            one of the visit under way, 0 where none was.
        avoided: peers that were lost since the chain stood last.
        records: what the servers had announced that the chain was opened with, of the blocks that it uses of theirs, where that is known.
        is_new: whether no server has had a step.
        recoveries: of the session, so far.
        trace_sink: is told of each step that is complete.
    """

    def __init__(
        self, target: Target, links: Sequence[Link], session: Session, promised_rows: int = 0, history: History | None = None
    ) -> None:
        """
        Args:
            promised_rows: that the sessions were opened with.
            history: is kept up to date.
        """
        self.target = target
        self.exchange = Exchange(target, links)
        self.session = session
        self.history = history or History()
        self.promised_rows = promised_rows
        self.number = 0
        self.order: Blob | None = None
        self.ordering = 0
        self.avoided: set[str] = set()
        self.records = [(link.hop, record) for link in links if (record := own_record(link)) is not None]
        self.is_new = True
        self.recoveries: Sequence[Recovery] = ()
        self.trace_sink: Callable[[StepTimes], None] | None = None
        self._look_again_at = 0.0
        self._network_s: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    @classmethod
    async def open(
        cls,
        target: Target,
        max_length: int,
        promise_rows: int = 0,
        full: Full | None = None,
        history: History | None = None,
        lora: Lora | None = None,
    ) -> Chain:
        """Find a route and open a session of `max_length` KV entries a row on each of its servers, with room for `promise_rows` rows.

        Args:
            promise_rows: 0 to ask for room with the first step.
            full: servers that have no room, as far as that is known.
            history: what the session's entries were computed from, in another chain; it is kept up to date.
            lora: what all servers are to run with.
        Raises: as `retrying`.
        """

        async def attempt(peers: frozenset[str]) -> Chain:
            return await cls.open_once(target, max_length, promise_rows, peers, history, lora=lora)

        return await retrying(target, attempt, full)

    @classmethod
    async def open_once(
        cls,
        target: Target,
        max_length: int,
        promise_rows: int,
        full: frozenset[str],
        history: History | None = None,
        like: Sequence[ServerRecord] = (),
        lora: Lora | None = None,
    ) -> Chain:
        """`open`, without the servers in `full`, and without another try.

        Args:
            like: records of servers whose work is to be gone on with, or the session would have other numbers from then on.
        Raises: Busy, CallerError, MissingBlocksError, ServerError.
        """
        hops = await find_hops(target, full, kv_tokens=max(promise_rows, 1) * max_length, like=like)
        if target.settings.active_adapter is not None:  # from now on just this one, whatever others of its name turn up
            target = replace(target, settings=replace(target.settings, active_adapter=hops[0].adapter))
        session = Session(max_length, lora)
        links = await open_links(target, hops, session, promise_rows)
        chain = cls(target, links, session, promise_rows, history)
        target.swarm.membership.start(chain.exchange.run_links)
        if target.settings.show_route:
            logger.info("route: %s", describe_route(hops))
        return chain

    @property
    def hops(self) -> list[Hop]:
        """The servers."""
        return self.exchange.hops

    @property
    def failure(self) -> Exception | None:
        """What broke the chain, None while it can be used."""
        return self.exchange.failure

    @property
    def drains(self) -> bool:
        """Whether a server has said that it is about to leave."""
        return any(link.drains for link in self.exchange.links)

    async def look_for_others(self) -> None:
        """Break the chain where servers that are about to leave can be replaced; otherwise they are used until they end."""
        now = trio.current_time()
        if now < self._look_again_at:
            return
        self._look_again_at = now + LOOK_EVERY_S
        for link in self.exchange.links:
            if link.drains and await has_stand_in(self.target, link):
                self.exchange.part_with(link)

    @property
    def counts(self) -> Counts:
        """What went through the client."""
        pipeline, recoveries = self.exchange.pipeline, self.recoveries
        tokens, uploaded = sum(recovery.tokens for recovery in recoveries), sum(recovery.uploaded_bytes for recovery in recoveries)
        return Counts(sum(pipeline.relayed_steps), pipeline.replays, len(recoveries), tokens, uploaded)

    @property
    def round_trip_s(self) -> float | None:
        """Expected seconds that a step of one token spends on the network, through the whole chain and back; None before the first one."""
        return min(self._network_s, default=None)

    async def step(self, visit: Visit) -> list[Blob]:
        """Run new tokens through all blocks, from where the history ends on.

        Returns:
            as `Visit.outputs`; what the servers have answered is noted there and in the history also where others fail.
        Raises:
            CallerError, Busy: a server refused; the chain goes on, and servers before it roll back with the next step.
            ServerError: the chain is broken; mend or `close` it.
        """
        exchange, history = self.exchange, self.history
        exchange.require_whole()
        if self.is_new:
            self.is_new = False
            if visit.inputs.names is not None and not history.position:
                await self._attach(visit, visit.inputs.names)
        began = time.perf_counter()
        hidden, inputs = visit.rest(history.position)
        requests = visit.steps(history.position, self.number + 1, self._ends(hidden, history.position, inputs))
        self.number = requests[-1].step
        self.ordering = requests[0].step if requests[0].order is not None else 0
        try:
            await exchange.run(exchange.pipeline.begin(requests))
        finally:
            exchange.pipeline.abandon()
            finished = exchange.pipeline.finished
            for pending in finished:
                sent = pending.sent or pending.request
                history.note(pending.request, sent.hidden, sent.codec)
                visit.answered([pending.answers[hop] for hop in sorted(pending.answers)])
        self.ordering = 0
        self.promised_rows = max(self.promised_rows, hidden.shape[0], inputs.promise_rows)
        membership = self.target.swarm.membership
        for link in exchange.links:
            membership.mark_ok(link.hop.peer_id)
            for row in visit.inputs.names or ():
                membership.sent_names.note(link.hop.peer_id, row)
        self._note_times(finished, hidden.shape, time.perf_counter() - began)
        return visit.outputs()

    async def rebuild(self) -> None:
        """Have the servers of a new chain compute all entries of the history. Raises as `step`."""
        self.is_new = False
        requests = self.history.steps(self.cut, self.number + 1)
        self.number = requests[-1].step
        for link in self.exchange.links:
            link.is_built = False
        await self.exchange.run_again(self.exchange.pipeline.begin(requests))
        for link in self.exchange.links:
            link.is_built = True

    def cut(self, rows: int, new: int, position: int) -> list[int]:
        """Where to cut what is computed anew."""
        return self._ends(Blob("float32", (rows, new, self.history.hidden_size), "raw", b""), position, Inputs())

    def _ends(self, hidden: Blob, position: int, inputs: Inputs) -> list[int]:
        """Where to cut a step into chunks: one past the last token of each."""
        rows, new, size = hidden.shape
        if new <= UNIT_TOKENS:
            return [new]
        host = self.target.swarm.membership.host
        token_bytes = blob_size(hidden.dtype, (size,), hidden.codec)
        stages = stages_of(self.hops, [host.round_trip_s(hop.peer_id) for hop in self.hops], token_bytes)
        prompt_length = 0 if inputs.prompts is None else inputs.prompts.shape[2]
        return chunk_ends(new, rows, stages, token_bytes=token_bytes, position=position, first=prompt_length)

    def _note_times(self, finished: list[Pending], shape: tuple[int, ...], wall_s: float) -> None:
        exchange, (rows, new, _) = self.exchange, shape
        spent = [pending.spent[pending.last] for pending in finished]
        exchange.lateness.note(rows * new, wall_s)
        if len(spent) == 1 and new <= FEW_TOKENS:
            self._network_s.append(max(wall_s - sum(spent[0][2::3]), 0.0))
        sums = spent[0] if len(spent) == 1 else [sum(times) for times in zip(*spent, strict=True)]
        hops = []
        for index, hop in enumerate(exchange.pipeline.hops):
            direct = exchange.pipeline.is_up(index) and not any(index in pending.carried for pending in finished)
            queue_s, compute_s, held_s = sums[3 * index : 3 * index + 3]
            hops.append(HopTimes(hop.peer_id, hop.first, hop.end, queue_s, compute_s, held_s, direct))
        step = StepTimes(new, len(finished), wall_s, tuple(hops))
        self.target.swarm.membership.observe_step(step, rows=rows)
        if self.trace_sink is not None:
            self.trace_sink(step)

    async def reserve(self, rows: int) -> None:
        """Have all servers set aside room for so many rows, where they have not yet; before a step with more rows than ever.

        Raises:
            CallerError, Busy: a server has no room; the chain goes on.
            ServerError: the chain is broken.
        """
        self.exchange.require_whole()
        if rows > self.promised_rows:
            await self.exchange.ask_all(Reserve(rows), Reserved)
            self.promised_rows = rows

    async def _attach(self, visit: Visit, named: Names) -> None:
        """Have the servers begin the session with what they know of the named rows; the history begins with what all of them have then.

        Asks only where every server may know something, and never for tokens whose outputs are wanted.
        """
        exchange, hidden, keep = self.exchange, visit.hidden, visit.inputs.keep
        units = (hidden.shape[1] - keep) // UNIT_TOKENS
        if not keep or units < LEAST_UNITS_TO_ATTACH:
            return
        rows = [row[:units] for row in named]
        sent = self.target.swarm.membership.sent_names
        for link in exchange.links:
            if not link.opened.shares_prefixes:
                units = min(units, *(sent.known(link.hop.peer_id, row) for row in rows))
        if units < LEAST_UNITS_TO_ATTACH:
            return
        rows = [row[:units] for row in rows]
        replies = await exchange.ask_all(Attach(encode_names(tuple(rows))), Attached)
        for link, reply in zip(exchange.links, replies, strict=True):
            if reply.position % UNIT_TOKENS or reply.position > units * UNIT_TOKENS:
                exchange.fail(link, ProtocolError(f"attached {reply.position} tokens where {units} units were named", link.hop.peer_id))
                exchange.require_whole()
            for row in rows:
                sent.forget(link.hop.peer_id, row[reply.position // UNIT_TOKENS :])
        attached = min(reply.position for reply in replies)
        if attached:
            step = exchange.on_the_wire(exchange.links[0], Step(0, 0, columns(hidden, 0, attached), reach=visit.end))
            self.history.note(step, step.hidden, step.codec)

    async def close(self) -> None:
        """Say goodbye to every server, which frees the KV there. Bounded; never raises for a dead server."""
        await self.exchange.close()
