"""The half of an inference session that runs on the portal's thread: which chain of servers its steps take."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from petalnet.client.attempts import Busy, Full, Retries
from petalnet.client.chain import Chain
from petalnet.client.history import History
from petalnet.client.inputs import Inputs
from petalnet.client.lora import Lora
from petalnet.client.mending import NotMendable, mend
from petalnet.client.recovery import Recovery
from petalnet.client.requests import Target
from petalnet.client.trace import StepTimes, Trace
from petalnet.client.visit import Visit
from petalnet.errors import (
    CallerError,
    MissingBlocksError,
    PetalnetError,
    ServerError,
    SessionClosed,
    UnsupportedError,
    one_line,
)
from petalnet.models.frequencies import Frequencies
from petalnet.p2p.fields import Blob
from petalnet.routing.routes import Hop

if TYPE_CHECKING:
    from petalnet.routing.records import ServerRecord

logger = logging.getLogger(__name__)

MOST_MENDS = 2
"""Attempts to mend a chain, one after another, after which another one is opened and computes all entries: that always works."""


class Loss:
    """Servers that a session has lost, until it stands as before.

    Attributes:
        hops: the lost ones.
    """

    def __init__(self, failure: Exception, noticed_s: float) -> None:
        """
        Args:
            noticed_s: seconds from the beginning of the step under way until now.
        """
        self.hops: list[Hop] = []
        self._reason = one_line(str(failure))
        self._noticed_s = noticed_s
        self._began = time.perf_counter()

    def recovery(self, hops: Sequence[Hop], tokens: int, uploaded_bytes: int) -> Recovery:
        """What it took.

        Args:
            hops: that were found in their place, and maybe more.
        """
        lost = sorted(set(self.hops), key=lambda hop: hop.first)
        taking = [hop for hop in hops if any(hop.first < gone.end and gone.first < hop.end for gone in lost)]
        rebuilt_s = time.perf_counter() - self._began
        return Recovery(self._reason, tuple(lost), tuple(taking), tokens, self._noticed_s, rebuilt_s, uploaded_bytes)


class ServerSide:
    """Opens the chain ahead of the first step, and another one where a server fails, or is full before there is anything to lose.

    What the servers were given is on record (`history`), so what they have computed can be computed anew elsewhere.

    Attributes:
        recoveries: what was done to go on without servers that were lost.
    """

    def __init__(
        self,
        target: Target,
        max_length: int,
        promise_rows: int = 0,
        frequencies: Frequencies = Frequencies(),  # noqa: B008  # a value that never changes
        lora: Lora | None = None,
    ) -> None:
        """
        Args:
            promise_rows: rows for which servers set aside room as the chain is opened; 0 where they are not known before the first step.
            frequencies: of the model's rotary embeddings.
            lora: the client's LoRA parameters, which all servers run with.
        """
        self.chain: Chain | None = None
        self.recoveries: list[Recovery] = []
        self.trace = Trace(time.perf_counter())  # of the answer under way; of the last one until another step comes
        self._target = target
        self._max_length = max_length
        self._promise_rows = promise_rows
        self._lora = lora
        self._history = History(frequencies)
        self._begun_with: list[ServerRecord] = []  # what the servers had announced that computed the first entries
        self._loss: Loss | None = None
        self._mends = 0  # failed attempts in a row to mend the chain
        self._has_begun = False  # a step was asked for
        self._lock = trio.Lock()
        self._opening = trio.CancelScope()
        self._error: PetalnetError | None = None  # what `prepare` met; the first step raises it
        self._ended: str | None = None

    async def prepare(self) -> None:
        """Open the chain ahead of the first step."""
        async with self._lock:
            if self._has_begun:
                return
            with self._opening:
                try:
                    self._check_open()
                    await self._open()
                except PetalnetError as error:
                    self._error = error

    async def adapter(self) -> str:
        """The label of the adapter that servers apply; "" for none. Raises what opening the chain meets."""
        if self._target.settings.active_adapter is None:
            return ""
        async with self._lock:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self.chain is None:
                self._check_open()
                await self._open()
            return self._target.settings.active_adapter

    async def _open(self) -> None:
        """Raises as `Chain.open`; SessionClosed."""
        await self._use(await Chain.open(self._target, self._max_length, self._promise_rows, history=self._history, lora=self._lora))

    async def _use(self, chain: Chain) -> None:
        """The session goes on with a new chain. Raises SessionClosed where it has ended."""
        try:
            self._check_open()
        except SessionClosed:
            await chain.close()
            raise
        chain.trace_sink, chain.recoveries = self._note, self.recoveries
        if not self._history.position:
            self._begun_with = [record for _, record in chain.records]
        self.chain, self._target = chain, chain.target

    def _note(self, times: StepTimes) -> None:
        self.trace.add(times)

    def _check_open(self) -> None:
        if self._ended is not None:
            raise SessionClosed(f"this session cannot be used any more: {self._ended}")

    async def step(self, hidden: Blob, position: int, order: Blob | None, inputs: Inputs) -> list[Blob]:
        """`Chain.step`, on another chain where a server fails; after a wait where nobody else has room.

        Where it fails in the end, the session is what it was before this step.

        Raises: as `Chain.step`; BusyError when patience is at its end, TooLargeError where no server will ever have the room.
        """
        if self.trace.complete:
            self.trace = Trace(time.perf_counter())
        self.trace.visit_begins(time.perf_counter())
        try:
            return await self._step(Visit(hidden, position, order, inputs))
        finally:
            self.trace.visit_ends(time.perf_counter())

    async def _step(self, visit: Visit) -> list[Blob]:
        async with self._lock:
            self._has_begun = True
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            self._history.cut(visit.position)
            mark = self._history.mark()
            try:
                return await self._complete(visit)
            except Exception:
                if visit.order is not None:
                    self._abandon()  # some servers may have put their rows into the new order, others not
                self._history.restore(mark)
                raise
            except BaseException:
                await self._drop()
                self._ended = "a step was interrupted"
                raise

    async def _complete(self, visit: Visit) -> list[Blob]:
        """Have a step computed, whatever servers do meanwhile. Raises as `step`."""
        history, settings = self._history, self._target.settings
        full, retries = Full(settings), Retries(settings)
        rows = max(visit.hidden.shape[0], visit.inputs.promise_rows)
        while True:
            before = history.position
            began = time.perf_counter()
            try:
                chain = await self._standing(visit, full)
                if history.position and rows > chain.promised_rows:
                    await chain.reserve(rows)
                return await chain.step(visit)
            except Busy as busy:
                full.add(busy)
                retries.attempts.note(busy.peer_id, busy.error)
                if not history.position:
                    self._promise_rows = rows
                    self._abandon()
                elif self.chain is not None and self.chain.failure is None:
                    if visit.order is not None and rows <= self.chain.promised_rows:
                        raise busy.error from None  # the servers before that one have reordered their rows: not a second time
                    await full.wait()  # what was computed is there, and nowhere else
                else:
                    self._note_loss(busy.error, time.perf_counter() - began)
            except MissingBlocksError as missing:
                await retries.missing(missing, full, at_stake=history.position > 0)
            except (CallerError, ServerError) as failure:
                if self.chain.failure is None if self.chain is not None else isinstance(failure, CallerError):
                    raise  # the step was refused, and that is all
                self._note_loss(failure, time.perf_counter() - began)
                if history.position > before:
                    retries.progressed()
                lost = failure if isinstance(failure, ServerError) else ServerError(str(failure))
                await retries.after(lost, at_stake=history.position > 0)

    async def _standing(self, visit: Visit, full: Full) -> Chain:
        """A chain that has all entries: as it stands, mended, or a new one. Raises Busy, CallerError, MissingBlocksError, ServerError."""
        chain = self.chain
        if chain is not None and chain.failure is None and chain.drains:
            await chain.look_for_others()
        if chain is not None and chain.failure is not None:
            self._note_loss(chain.failure, 0.0)  # of those that were lost since the last step, or since that failed
            if self._history.position and self._mends < MOST_MENDS:
                await self._mend(chain, visit, full)
            else:
                self._abandon()
        if self.chain is not None:
            return self.chain
        self._check_open()
        like = self._begun_with if self._history.position else ()
        chain = await Chain.open_once(self._target, self._max_length, self._promise_rows, full.peers, self._history, like, self._lora)
        await self._use(chain)
        if self._history.position:
            await chain.rebuild()
            self._recovered(chain.hops, chain.exchange.uploaded_bytes)
        return chain

    async def _mend(self, chain: Chain, visit: Visit, full: Full) -> None:
        """Have the servers replaced that the chain has lost, or leave it where it cannot be mended. Raises as `_standing`."""
        before = chain.exchange.uploaded_bytes
        self._mends += 1
        try:
            hops = await mend(chain, visit, full.peers)
        except NotMendable as reason:
            logger.debug("the chain cannot be mended: %s", reason)
            self._abandon()
        except UnsupportedError:
            self._mends = MOST_MENDS  # a server of an older version, which goes on between the neighbours that it has or not at all
            raise
        except (Busy, MissingBlocksError):
            self._mends -= 1  # that says nothing against it
            raise
        else:
            self._mends = 0
            self._recovered(hops, chain.exchange.uploaded_bytes - before)

    def _note_loss(self, failure: Exception, noticed_s: float) -> None:
        """Servers were lost; or others, in an attempt to go on without them."""
        chain = self.chain
        if chain is not None and self._history.position:
            if self._loss is None:
                self._loss = Loss(failure, noticed_s)
            self._loss.hops += [link.hop for link in chain.exchange.links if link.lost is not None and link.is_built]
            self._promise_rows = max(self._promise_rows, chain.promised_rows)

    def _recovered(self, hops: Sequence[Hop], uploaded_bytes: int) -> None:
        """The session stands as before."""
        loss, self._loss = self._loss, None
        self._mends = 0
        if loss is not None and loss.hops:
            recovery = loss.recovery(hops, self._history.position if hops else 0, uploaded_bytes)
            self.recoveries.append(recovery)
            self.trace.recovered(recovery)
            logger.info("%s", recovery)

    def _abandon(self) -> None:
        """Leave the chain, without waiting for its servers."""
        chain, self.chain = self.chain, None
        self._mends = 0
        if chain is not None:
            if chain.exchange.cut:  # the next chain may have the same neighbours, and would have to find it out anew
                self._target = replace(self._target, settings=replace(self._target.settings, direct_chains=False))
            self._target.swarm.membership.start(chain.close)

    async def _drop(self) -> None:
        chain, self.chain = self.chain, None
        if chain is not None:
            await chain.close()

    async def close(self) -> None:
        self._ended = self._ended or "it was closed"
        self._opening.cancel()
        await self._drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> ServerSide:
        return self
