"""The half of an inference session that runs on the portal's thread: which chain of servers its steps take."""

from __future__ import annotations

import logging
import time
from typing import Any

import trio

from petalnet.client.chain import Chain
from petalnet.client.history import History
from petalnet.client.inputs import Inputs
from petalnet.client.recovery import Recovery
from petalnet.client.requests import FIRST_PAUSE_S, LONGEST_PAUSE_S, Busy, Full, Patience, Target
from petalnet.client.trace import StepTimes, Trace
from petalnet.client.visit import Visit
from petalnet.errors import BusyError, CallerError, MissingBlocksError, PetalnetError, ServerError, SessionClosed, one_line
from petalnet.models.frequencies import Frequencies
from petalnet.p2p.fields import Blob
from petalnet.routing.routes import Hop

logger = logging.getLogger(__name__)


class Loss:
    """A chain that broke in the middle of a session, until another one stands in its place."""

    def __init__(self, chain: Chain, failure: Exception, noticed_s: float) -> None:
        self.hops = chain.hops
        self.promised_rows = chain.promised_rows
        self.reason = one_line(str(failure))
        self.noticed_s = noticed_s
        self.began = time.perf_counter()
        self._peers = {getattr(failure, "peer_id", None)}

    def add(self, failure: Exception) -> None:
        """Another attempt has failed."""
        self._peers.add(getattr(failure, "peer_id", None))

    def recovery(self, chain: Chain, tokens: int) -> Recovery:
        """What it took, once a new chain stands."""
        lost = [hop for hop in self.hops if hop.peer_id in self._peers] or self.hops

        def overlaps(hop: Hop) -> bool:
            return any(hop.first < gone.end and gone.first < hop.end for gone in lost)

        taking = [hop for hop in chain.hops if overlaps(hop)]
        rebuilt_s = time.perf_counter() - self.began
        return Recovery(self.reason, tuple(lost), tuple(taking), tokens, self.noticed_s, rebuilt_s, chain.uploaded_bytes)


class ServerSide:
    """Opens the chain ahead of the first step, and another one where a server fails, or is full before there is anything to lose.

    What the servers were given is on record (`history`), so what they have computed can be computed anew elsewhere.

    Attributes:
        recoveries: what was done to go on without servers that were lost.
    """

    def __init__(self, target: Target, max_length: int, promise_rows: int = 0, frequencies: Frequencies = Frequencies()) -> None:  # noqa: B008  # a value that never changes
        """
        Args:
            promise_rows: rows for which servers set aside room as the chain is opened; 0 where they are not known before the first step.
            frequencies: of the model's rotary embeddings.
        """
        self.chain: Chain | None = None
        self.recoveries: list[Recovery] = []
        self.trace = Trace(time.perf_counter())  # of the answer under way; of the last one until another step comes
        self._target = target
        self._max_length = max_length
        self._promise_rows = promise_rows
        self._history = History(frequencies)
        self._loss: Loss | None = None
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
                    await self._open()
                except PetalnetError as error:
                    self._error = error

    async def _open(self, full: Full | None = None) -> Chain:
        self._check_open()
        if self.chain is None:
            chain = await Chain.open(self._target, self._max_length, self._promise_rows, full, self._history)
            try:
                self._check_open()
            except SessionClosed:
                await chain.close()
                raise
            chain.trace_sink, chain.recoveries = self._note, self.recoveries
            self.chain = chain
        return self.chain

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
        """Have a step computed, on one chain after another. Raises as `step`."""
        history, settings = self._history, self._target.settings
        full, patience = Full(settings), Patience(settings)
        rows = max(visit.hidden.shape[0], visit.inputs.promise_rows)
        failures = 0
        last: Exception | None = None
        while True:
            before = history.position
            began = time.perf_counter()
            try:
                chain = await self._open(full)
                if chain.is_new and history.position:
                    await chain.rebuild()
                    self._recovered(chain)
                if history.position and rows > chain.promised_rows:
                    await chain.reserve(rows)
                answers = await chain.step(visit)
            except Busy as busy:
                full.add(busy)
                if not history.position:
                    self._promise_rows = rows
                    self._abandon()
                elif self.chain is None or self.chain.failure is not None:
                    self._lose(busy.error, began)
                elif visit.order is not None and rows <= self.chain.promised_rows:
                    raise busy.error from None  # the servers before that one have reordered their rows: not a second time
                else:
                    await full.wait()  # what was computed is there, and nowhere else
            except MissingBlocksError as missing:
                if not history.position:
                    raise
                try:
                    await patience.wait(BusyError(str(missing)))
                except BusyError:
                    raise missing from last
            except (CallerError, ServerError) as failure:
                if self.chain.failure is None if self.chain is not None else isinstance(failure, CallerError):
                    raise  # the step was refused, and that is all
                self._lose(failure, began)
                failures, last = failures + 1, failure
                if history.position > before:
                    failures, patience = 1, Patience(settings)
                if settings.max_retries is not None and failures > settings.max_retries:
                    raise
                logger.info("trying again (%d): %s", failures, failure)
                if failures > 1:
                    await trio.sleep(min(FIRST_PAUSE_S * 2 ** (failures - 2), LONGEST_PAUSE_S))
            else:
                return answers

    def _lose(self, failure: Exception, began: float) -> None:
        """The chain cannot be used any more, or there was none."""
        if self._loss is not None:
            self._loss.add(failure)
        elif self.chain is not None and self._history.position:
            self._loss = Loss(self.chain, failure, time.perf_counter() - began)
            self._promise_rows = max(self._promise_rows, self.chain.promised_rows)
        self._abandon()

    def _recovered(self, chain: Chain) -> None:
        """A new chain has all entries."""
        loss, self._loss = self._loss, None
        if loss is not None:
            recovery = loss.recovery(chain, self._history.position)
            self.recoveries.append(recovery)
            self.trace.recovered(recovery)
            logger.info("%s", recovery)

    def _abandon(self) -> None:
        """Leave the chain, without waiting for its servers."""
        chain, self.chain = self.chain, None
        if chain is not None:
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
