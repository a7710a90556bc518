"""Blocks that are coming in: their files while they are filled, and what becomes of one when all of its chunks are there."""

from __future__ import annotations

import errno
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from petalnet.errors import PetalnetError
from petalnet.models.block_file import BlockFile, filling_block, key_of_block
from petalnet.models.weight_cache import WeightCache, full_disk

if TYPE_CHECKING:
    from petalnet.models.assembly import Ask, Assembly
    from petalnet.models.manifest import BlockEntry
    from petalnet.sharing import Sharing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Brought:
    """A block that is here: its file, a safetensors file of canonical names, what it holds, and which peers gave how many bytes of it."""

    path: Path
    entry: BlockEntry
    givers: Mapping[str, int]


@dataclass
class _Open:
    """A block that is under way: its file, what closes that, and what came.

    Attributes:
        written: chunks that are in the file.
        writing: how many are about to be.
        givers: bytes by peer.
        lock: held by whoever changes the file.
    """

    file: BlockFile
    closing: ExitStack
    written: set[int]
    writing: int
    givers: Counter[str]
    lock: trio.Lock


class Incoming:
    """The files of the blocks of one assembly. What has come of a block is given to others right away.

    Attributes:
        assembly: which decides what is asked from whom.
        blocks: those that are whole and right, by their names.
        nbytes: that have come.
        changed_at: trio time at which anything last came.
        over: set when all blocks are there, or something keeps them from being written.
        failure: what that is.
    """

    def __init__(self, assembly: Assembly, cache: WeightCache, sharing: Sharing, *, blame: Callable[[str, str], None]) -> None:
        """
        Args:
            blame: is told of peers (and why) whose list turned out to be wrong.
        """
        self.assembly = assembly
        self.blocks: dict[str, Brought] = {}
        self.nbytes = 0
        self.changed_at = trio.current_time()
        self.over = trio.Event()
        self.failure: PetalnetError | None = None
        self._cache = cache
        self._sharing = sharing
        self._send_whole, self._whole = trio.open_memory_channel[str](math.inf)
        self._blame = blame
        self._open: dict[str, _Open] = {}
        self._opening: dict[str, trio.Lock] = {}
        self._waits = trio.CapacityLimiter(math.inf)
        self._opening_or_closing = threading.Lock()
        self._closed = False

    @property
    def nbytes_held(self) -> int:
        """Of blocks that are whole, and of what is there of the others."""
        held = sum(brought.entry.nbytes for brought in self.blocks.values())
        for opened in self._open.values():
            for start, end in map(opened.file.entry.chunk_range, opened.written):
                held += end - start
        return held

    async def run(self) -> None:
        """Look at blocks when all of their chunks are there, one at a time, until cancelled."""
        async for name in self._whole:
            await self._finish(name)

    async def use_list(self, name: str, entry: BlockEntry) -> None:
        """Put a block together by this list, in its file, which is opened here. Waits where another node of this machine is at it."""
        async with self._opening.setdefault(name, trio.Lock()):
            opened = self._open.get(name)
            try:
                if opened is None:
                    # Not of the threads that others need meanwhile: another node may be at any number of blocks, for as long as it takes.
                    opened = await trio.to_thread.run_sync(self._open_file, name, entry, abandon_on_cancel=True, limiter=self._waits)
                async with opened.lock:
                    opened.file.entry = entry
                    opened.written = await trio.to_thread.run_sync(opened.file.held)
            except PetalnetError as error:
                self._fail(error)
                return
            except OSError as error:
                self._fail(self._write_error(error))
                return
        self.assembly.use_list(name, entry)
        self.assembly.restore(name, opened.written)
        self._sharing.share(entry, opened.file.payload, lambda: opened.written)
        self._look_at(name)

    def _open_file(self, name: str, entry: BlockEntry) -> _Open:
        closing = ExitStack()
        opened = _Open(closing.enter_context(filling_block(self._cache, entry)), closing, set(), 0, Counter(), trio.Lock())
        with self._opening_or_closing:
            if self._closed:  # it took so long that nobody waits any more
                self._let_go(name, opened)
            else:
                self._open[name] = opened
        return opened

    async def write(self, peer: str, ask: Ask, data: bytes) -> None:
        """Put a chunk, which is what was asked for, into its block's file."""
        opened = self._open[ask.block]
        opened.writing += 1
        try:
            async with opened.lock:
                await trio.to_thread.run_sync(opened.file.write, ask.index, data)
        except OSError as error:
            self._fail(self._write_error(error))
            return
        finally:
            opened.writing -= 1
        opened.written.add(ask.index)
        opened.givers[peer] += len(data)
        self.nbytes += len(data)
        self.changed_at = trio.current_time()
        self._look_at(ask.block)

    def _look_at(self, name: str) -> None:
        """See whether a block is whole."""
        if self.assembly.is_complete(name) and not self._open[name].writing:
            self._send_whole.send_nowait(name)

    async def _finish(self, name: str) -> None:
        """All chunks of a block are there: it is what it should be, or somebody lied, or the disk did."""
        opened = self._open.get(name)
        if opened is None:
            return
        async with opened.lock:
            if not self.assembly.is_complete(name):
                return
            try:
                right = await trio.to_thread.run_sync(opened.file.digest) == opened.file.entry.digest
                if not right:
                    opened.written = await trio.to_thread.run_sync(opened.file.held)
                    self._begin_anew(name, opened)
                    return
                path = await trio.to_thread.run_sync(opened.file.commit)
                await trio.to_thread.run_sync(opened.closing.close)
            except OSError as error:
                self._fail(self._write_error(error))
                return
        del self._open[name]
        self.assembly.finish(name)
        self._sharing.share(opened.file.entry, opened.file.payload)
        self.blocks[name] = Brought(path, opened.file.entry, opened.givers)
        self.changed_at = trio.current_time()
        if not self.assembly.open_blocks:
            self.over.set()

    def _begin_anew(self, name: str, opened: _Open) -> None:
        lost = set(range(opened.file.entry.num_chunks)) - opened.written
        if lost:
            logger.warning("%d chunks of a block are not on the disk as they were written: getting them again", len(lost))
            self.assembly.lose(name, lost)
            return
        self._sharing.withhold(opened.file.entry)
        for peer in self.assembly.give_up_list(name):
            self._blame(peer, "its list of chunks does not give the block")

    def _write_error(self, error: OSError) -> PetalnetError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return full_disk(self._cache.folder)
        return PetalnetError(f"weights cannot be written to {self._cache.folder}: {error.strerror or error}")

    def _fail(self, error: PetalnetError) -> None:
        self.failure = error
        self.over.set()

    def close(self) -> None:
        """Let go of what is not whole: it stays for the next time, except where it cannot be written. Blocks."""
        with self._opening_or_closing:
            self._closed = True
        for name, opened in self._open.items():
            self._sharing.withhold(opened.file.entry)
            self._let_go(name, opened)
        if self.failure is not None:
            for name in self.assembly.open_blocks:
                self._cache.discard(key_of_block(name))

    def _let_go(self, name: str, opened: _Open) -> None:
        with suppress(OSError) if self.failure is not None else nullcontext():
            opened.closing.close()
        if self.failure is not None:
            self._cache.discard(key_of_block(name))
