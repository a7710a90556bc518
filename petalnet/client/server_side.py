"""The half of an inference session that runs on the portal's thread: which chain of servers its steps take."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

import trio

from petalnet.client.chain import Chain, Inputs
from petalnet.client.requests import Busy, Full, Target
from petalnet.client.trace import Trace
from petalnet.errors import CallerError, MissingBlocksError, PetalnetError, ServerError, SessionClosed
from petalnet.p2p.messages import Blob

logger = logging.getLogger(__name__)


class ServerSide:
    """Opens the chain ahead of the first step, and another one where a server fails, or is full, before there is anything to lose."""

    def __init__(self, target: Target, max_length: int) -> None:
        self.chain: Chain | None = None
        self.trace = Trace(time.perf_counter())  # of the answer under way; of the last one until another step comes
        self._target = target
        self._max_length = max_length
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

    async def _open(self) -> Chain:
        self._check_open()
        if self.chain is None:
            self.chain = await self._unless_ended(await Chain.open(self._target, self._max_length))
        return self.chain

    async def _unless_ended(self, chain: Chain) -> Chain:
        """The chain that was just opened; closed where the session was meanwhile."""
        try:
            self._check_open()
        except SessionClosed:
            await chain.close()
            raise
        return chain

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
            retries = 0
            while True:
                chain = await self._open()
                try:
                    return await chain.step(hidden, position, order, inputs)
                except Busy as busy:
                    full.add(busy)
                    if position > 0 or not await self._go_round(full.peers):
                        await full.wait()
                        if full.peers and position == 0:  # too small for this step, as the present chain's server may be
                            await self._go_round(full.peers)
                except CallerError:
                    raise
                except ServerError as failure:
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

    async def _go_round(self, full: frozenset[str]) -> bool:
        """Take another chain, without the servers in `full`. False where there is none, or it does not open: then all is as before."""
        with suppress(Busy, CallerError, MissingBlocksError, ServerError):
            chain = await self._unless_ended(await Chain.open_once(self._target, self._max_length, full))
            await self._drop()
            self.chain = chain
            return True
        return False

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
