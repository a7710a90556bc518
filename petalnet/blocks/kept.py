"""The outputs that sessions have pushed, kept in the machine's memory so that they can be had once more.

They lie in pages of the same numbers as the keys and values that they belong to: one more layer, which is written when a part has run. So
what holds for those pages (sharing, copies, going back, beginnings that are kept) holds for the outputs in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from petalnet.blocks.kv import allocate
from petalnet.blocks.pages import PageTables


class KeptOutputs:
    """Outputs [hidden] for each position of `pages` pages. For the thread that computes.

    Attributes:
        page_tokens: positions of a page.
        bytes: memory that it takes; a CPU's only as pages are first written.
    """

    def __init__(self, *, pages: int, page_tokens: int, hidden_size: int, dtype: torch.dtype, beside: int = 0) -> None:
        """
        Args:
            dtype: of the outputs.
            beside: bytes of the machine's memory that are promised to others and not taken yet.
        Raises:
            MemoryError: there is less memory than that.
        """
        self.page_tokens = page_tokens
        slots = pages * page_tokens
        self.bytes = slots * hidden_size * dtype.itemsize
        self._slots = allocate(slots * hidden_size, dtype, torch.device("cpu"), "kept outputs", beside).view(slots, hidden_size)

    def write(self, rows: PageTables, start: int, outputs: torch.Tensor) -> None:
        """Keep outputs [rows, new, hidden] of positions `start` … `start` + new - 1, for which there are pages."""
        end = start + outputs.shape[1]
        for row, output in enumerate(outputs):
            done = 0
            for slot, count in self._stretches(rows, row, start, end):
                self._slots.narrow(0, slot, count).copy_(output.narrow(0, done, count))
                done += count

    def read(self, rows: PageTables, start: int, end: int) -> torch.Tensor:
        """The outputs of positions [start, end) of all rows: a copy [rows, end - start, hidden]."""
        found = self._slots.new_empty((len(rows), end - start, self._slots.shape[1]))
        for row, output in enumerate(found):
            done = 0
            for slot, count in self._stretches(rows, row, start, end):
                output.narrow(0, done, count).copy_(self._slots.narrow(0, slot, count))
                done += count
        return found

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target), in this order."""
        size = self.page_tokens
        for source, target in copies:
            self._slots.narrow(0, target * size, size).copy_(self._slots.narrow(0, source * size, size))

    def _stretches(self, rows: PageTables, row: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Where positions [start, end) of a row lie: slots and how many follow each other there."""
        run, size = rows.run(row), self.page_tokens
        if run is not None:
            yield run + start, end - start
            return
        table = rows.tables[row]
        while start < end:
            offset = start % size
            count = min(size - offset, end - start)
            yield table[start // size] * size + offset, count
            start += count
