"""The half of an inference session that runs on the portal's thread: which chain of servers its steps take."""

from __future__ import annotations

import logging
import time
from typing import Any

import trio

from petalnet.client.chain import Chain
from petalnet.client.inputs import Inputs
from petalnet.client.requests import Busy, Full, Target
from petalnet.client.trace import StepTimes, Trace
from petalnet.errors import CallerError, PetalnetError, ServerError, SessionClosed
from petalnet.p2p.fields import Blob

logger = logging.getLogger(__name__)


class ServerSide:
    """Opens the chain ahead of the first step, and another one where a server fails, or is full, before there is anything to lose."""

    def __init__(self, target: Target, max_length: int, promise_rows: int = 0) -> None:
        """
        Args:
            promise_rows: rows for which servers set aside room as the chain is opened; 0 where they are not known before the first step.
        """
        self.chain: Chain | None = None
        self.trace = Trace(time.perf_counter())  # of the answer under way; of the last one until another step comes
        self._target = target
        self._max_length = max_length
        self._promise_rows = promise_rows
        self._lock = trio.Lock()
        self._opening = trio.CancelScope()
        self._error: PetalnetError | None = None  # what `prepare` met; the first step raises it
        self._ended: str | None = None

    async def prepare(self) -> None:
        """Open the chain ahead of the first step."""
        async with self._lock:
            with self._opening:
                try:
                    await self._open()
                except PetalnetError as error:
                    self._error = error

    async def _open(self, full: Full | None = None) -> Chain:
        self._check_open()
        if self.chain is None:
            chain = await Chain.open(self._target, self._max_length, self._promise_rows, full)
            try:
                self._check_open()
            except SessionClosed:
                await chain.close()
                raise
            chain.trace_sink = self._note
            self.chain = chain
        return self.chain

    def _note(self, times: StepTimes) -> None:
        self.trace.add(times)

    def _check_open(self) -> None:
        if self._ended is not None:
            raise SessionClosed(f"this session cannot be used any more: {self._ended}")

    async def step(self, hidden: Blob, position: int, order: Blob | None, inputs: Inputs) -> list[Blob]:
        """`Chain.step`; on another chain where a server fails, or has no room, and the caches are empty anyway; after a wait where nobody
        else has room either.

        Raises: as `Chain.step`; BusyError when patience is at its end, TooLargeError where no server will ever have the room.
        """
        if self.trace.complete:
            self.trace = Trace(time.perf_counter())
        self.trace.visit_begins(time.perf_counter())
        try:
            return await self._step(hidden, position, order, inputs)
        finally:
            self.trace.visit_ends(time.perf_counter())

    async def _step(self, hidden: Blob, position: int, order: Blob | None, inputs: Inputs) -> list[Blob]:
        async with self._lock:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            full = Full(self._target.settings)
            rows = max(hidden.shape[0], inputs.promise_rows)
            retries = 0
            while True:
                chain = await self._open(full)
                try:
                    if position > 0 and rows > chain.promised_rows:
                        await chain.reserve(rows)
                    return await chain.step(hidden, position, order, inputs)
                except Busy as busy:
                    full.add(busy)
                    if position > 0 and chain.failure is not None:
                        await self._drop()  # it had no memory for a message, say, and closed the session: there is nothing to wait for
                        self._ended = str(busy)
                        raise busy.error from None
                    if position > 0:
                        if order is not None and rows <= chain.promised_rows:
                            raise busy.error from None  # the servers before that one have reordered their rows: not a second time
                        await full.wait()  # what was computed is there, and nowhere else
                    else:
                        self._promise_rows = rows
                        await self._drop()
                except (CallerError, ServerError) as failure:
                    if chain.failure is None:
                        raise  # the step was refused, and that is all
                    await self._drop()
                    if position > 0:
                        self._ended = str(failure)
                        raise
                    limit = self._target.settings.max_retries
                    if limit is not None and retries >= limit:
                        raise
                    retries += 1
                    logger.info("trying again (%d): %s", retries, failure)
                except BaseException:
                    await self._drop()
                    self._ended = "a step was interrupted"
                    raise

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
