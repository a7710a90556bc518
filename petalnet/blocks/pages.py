"""Which pages of the KV store hold which positions of which row: the page tables of a session.

Rows that begin alike share pages; a row that writes into a page which others read too gets a copy of it first. Attention reads a row in
place, without gathering, where its pages are one consecutive **run**, and nearly so where they are a few long ones. So a row claims a run
as long as it may become when it begins, goes on right behind a prefix that it shares where there is room, and is otherwise brought together
by copying its pages once: that costs about what gathering them for a single token costs. Only what several rows read stays where it is.

All of it belongs to one thread, the one that computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from petalnet.blocks.pool import Claim, OutOfPages, PagePool

__all__ = ["SETTLED_TOKENS", "OutOfPages", "PagePool", "PageTables", "Rows", "RowsSnapshot"]

SETTLED_TOKENS = 4
"""How many tokens rows that were duplicated must have gone on before scattered ones are copied to runs of their own: rows of a beam search
are duplicated at nearly every token, and copying them each time would cost more than gathering does."""


class PageTables(Protocol):
    """Where the positions of some rows lie: what whoever reads or writes them has to know (`Rows`, `RowsSnapshot`)."""

    @property
    def length(self) -> int:
        """Positions that are valid in every row."""

    @property
    def tables(self) -> Sequence[Sequence[int]]:
        """The pages of each row."""

    def __len__(self) -> int: ...

    def run(self, row: int) -> int | None:
        """The slot of position 0 of a row whose pages are consecutive."""


@dataclass(frozen=True, eq=False)
class RowsSnapshot:
    """The page tables of some rows as they were at one time, for threads that use them while the rows themselves change."""

    length: int
    tables: Sequence[Sequence[int]]
    runs: Sequence[int | None]

    def __len__(self) -> int:
        return len(self.tables)

    def run(self, row: int) -> int | None:
        """As of `Rows`."""
        return self.runs[row]


class Rows:
    """The page tables of a session's rows, which all have the same length.

    A step goes `prepare`, copies of pages as that says, writing, `advance`. Between the two `tables` reach beyond `length`.

    Attributes:
        pool: where the pages come from.
        max_length: positions that no row will exceed.
        length: positions that are valid in every row.
        tables: a list of pages for each row; page i of it holds positions i × page_tokens and following. To be read only.
    """

    def __init__(self, pool: PagePool, max_length: int) -> None:
        self.pool = pool
        self.max_length = max_length
        self.length = 0
        self.tables: list[list[int]] = []
        self._claims: list[Claim | None] = []
        self._runs: list[int | None] = []  # what `run` answers
        self._ready = 0  # positions before this one can be written in every row without another look at the tables
        self._settled = 0  # from this length on scattered rows are brought together

    def __len__(self) -> int:
        return len(self.tables)

    def run(self, row: int) -> int | None:
        """The slot (page × page_tokens + offset) of position 0 of a row whose pages are consecutive; None where they are not, or none."""
        return self._runs[row]

    def snapshot(self) -> RowsSnapshot:
        """What the tables are now, prepared positions included."""
        return RowsSnapshot(self.length, [table.copy() for table in self.tables], self._runs.copy())

    def resize(self, rows: int) -> None:
        """Have that many empty rows. Raises ValueError unless `length` is 0."""
        if self.length:
            raise ValueError(f"rows of {self.length} positions cannot be resized")
        self.release()
        self.tables = [[] for _ in range(rows)]
        self._claims = [None] * rows
        self._runs = [None] * rows

    def attach(self, pages: Sequence[Sequence[int]]) -> None:
        """Begin the rows with pages that somebody else holds, too: as many for each row; `length` becomes pages × page_tokens.

        Raises:
            ValueError: the rows are not empty, or the pages are not as many for each row, or more than `max_length` allows.
        """
        count = len(pages[0]) if pages else 0
        length = count * self.pool.page_tokens
        if self.length or len(pages) != len(self.tables) or any(len(one) != count for one in pages) or length > self.max_length:
            raise ValueError(f"{len(self.tables)} rows of {self.length} positions cannot begin with {[len(one) for one in pages]} pages")
        self.resize(len(pages))
        for table, shared in zip(self.tables, pages, strict=True):
            for page in shared:
                self.pool.share(page)
            table.extend(shared)
        self._runs = [self._run_of(table) for table in self.tables]
        self.length = self._ready = length

    def prepare(self, new: int) -> list[tuple[int, int]]:
        """Make positions `length` … `length` + new - 1 of every row writable.

        Returns:
            Whole pages to be copied, (source, target) each: in this order, before anything else is written and before the copies of any
            later call, because a source may be free from now on.

        Raises:
            ValueError: `max_length` would be exceeded.
            OutOfPages: too few pages are left; the rows are as before.
        """
        end = self.length + new
        if end <= self._ready:
            return []
        if end > self.max_length:
            raise ValueError(f"{end} positions are more than the {self.max_length} of this session")
        return self._prepare(end)

    def advance(self, new: int) -> None:
        """Make valid the `new` positions that were prepared and have been written. Raises ValueError for more than were prepared."""
        length = self.length + new
        if length > self._ready:
            raise ValueError(f"only {self._ready} positions were prepared, not {length}")
        self.length = length

    def truncate(self, length: int) -> None:
        """Go back to an earlier length; pages beyond it are given back. Raises ValueError for a length that was never reached."""
        if not 0 <= length <= self.length:
            raise ValueError(f"rows of {self.length} positions cannot be set to {length}")
        kept, inside = self._pages(length), length % self.pool.page_tokens
        self.length = length
        self._settled = min(self._settled, length + SETTLED_TOKENS)
        self._ready = kept * self.pool.page_tokens
        for row, table in enumerate(self.tables):
            if len(table) > kept:
                claim = self._claims[row]
                while len(table) > kept:
                    self.pool.release(table.pop(), claim)
                if not kept or self._runs[row] is None:
                    self._runs[row] = self._run_of(table)
            if inside and self.pool.holders(table[-1]) > 1:
                self._ready = length

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i continue what row `order[i]` holds; rows may be repeated, dropped and added, at the cost of no page.

        Raises:
            ValueError: a row is named that there is not.
        """
        if any(not 0 <= row < len(self.tables) for row in order):
            raise ValueError(f"an order of rows {list(order)} where there are {len(self.tables)}")
        self.truncate(self.length)  # pages that are only prepared are not worth sharing
        seen: set[int] = set()
        tables: list[list[int]] = []
        claims: list[Claim | None] = []
        for row in reversed(order):
            table = self.tables[row]
            if row in seen:
                for page in table:
                    self.pool.share(page)
                tables.append(table.copy())
                claims.append(None)
            else:  # the last to continue a row goes on in place, when all others have left its last page (see `_is_shared`)
                seen.add(row)
                tables.append(table)
                claims.append(self._claims[row])
        self._runs = [self._runs[row] for row in order]
        for row in range(len(self.tables)):
            if row not in seen:
                self._drop(row)
        self.tables, self._claims = tables[::-1], claims[::-1]
        if len(seen) < len(order):
            self._ready, self._settled = self.length, self.length + SETTLED_TOKENS

    def release(self) -> None:
        """Give everything back; there are no rows afterwards. Harmless where that was done before."""
        for row in range(len(self.tables)):
            self._drop(row)
        self.tables, self._claims, self._runs = [], [], []
        self.length = self._ready = self._settled = 0

    def _drop(self, row: int) -> None:
        for page in self.tables[row]:
            self.pool.release(page)
        claim = self._claims[row]
        if claim is not None:
            self.pool.unclaim(claim)

    def _prepare(self, end: int) -> list[tuple[int, int]]:
        pool = self.pool
        pages = self._pages(end)
        needed = self._needed(pages)
        if needed > pool.available:
            self._unshare()
            needed = self._needed(pages)
        if needed > pool.available:
            raise OutOfPages(f"{needed} pages are needed, {pool.available} of {pool.pages} are available")
        copies: list[tuple[int, int]] = []
        settled, several = self.length >= self._settled, end > self.length + 1
        scattered = False
        for row, table in enumerate(self.tables):
            kept = len(table) - self._is_shared(table)
            missing = pages - kept
            if missing or self._runs[row] is None:
                needed -= missing
                goes_on = self._goes_on(row, kept, missing, over_kept=False)
                if settled:
                    stretches = 1 + sum(page != before + 1 for before, page in pairwise(table[:kept])) + (not goes_on and kept > 0)
                    if stretches > 1 and self._bring_together(row, pages, stretches, several, pool.available - needed, copies):
                        continue
                    if not goes_on:
                        self._goes_on_elsewhere(row, kept, missing)
                self._extend(row, kept, missing, copies)
                scattered = scattered or self._runs[row] is None
        self._ready = pages * pool.page_tokens
        if scattered and not settled:
            self._ready = max(end, min(self._ready, self._settled))  # the next look at the tables is due then
        return copies

    def _unshare(self) -> None:
        """Have the keeper give up the pages that are written next: where no other holds them, they need not be copied."""
        for table in self.tables:
            if self._is_shared(table) and self.pool.is_kept(table[-1]) and self.pool.keeper is not None:
                self.pool.keeper.forget(table[-1])

    def _needed(self, pages: int) -> int:
        """Pages that it takes for every row to have so many, with nobody else holding the one that is written next."""
        needed = 0
        leaving: Counter[int] = Counter()
        for table in self.tables:
            needed += pages - len(table)
            if self._is_shared(table) and leaving[table[-1]] < self.pool.holders(table[-1]) - 1:  # the last holder may stay
                leaving[table[-1]] += 1
                needed += 1
        return needed

    def _is_shared(self, table: list[int]) -> bool:
        """Whether the next position of this row lies in a page that others hold, too."""
        inside = self.length % self.pool.page_tokens
        return inside > 0 and self.pool.holders(table[self.length // self.pool.page_tokens]) > 1

    def _goes_on(self, row: int, kept: int, missing: int, *, over_kept: bool) -> bool:
        """Whether a row, of which so many pages stay, can have so many more right behind them; claims these, and room to grow."""
        if not missing:
            return True
        after, claim = self.tables[row][kept - 1] if kept else None, self._claims[row]
        if claim is not None:
            if len(claim) >= missing and (after is None or claim.start == after + 1):
                return True
            self.pool.unclaim(claim)
        wanted = self._pages(self.max_length) - kept
        self._claims[row] = claim = self.pool.claim(wanted, after=after, over_kept=over_kept, least=missing)
        return claim is not None

    def _goes_on_elsewhere(self, row: int, kept: int, missing: int) -> None:
        """Claim a run that a row goes on in, of which so many pages stay; if there is none, what is kept behind these pages will do."""
        self._claims[row] = self.pool.claim(self._pages(self.max_length) - kept, least=missing)
        if self._claims[row] is None:
            self._goes_on(row, kept, missing, over_kept=True)

    def _bring_together(self, row: int, pages: int, stretches: int, several: bool, spare: int, copies: list[tuple[int, int]]) -> bool:
        """Copy a row that lies in so many stretches to one run of so many pages and room to grow, if that pays and the spare pages suffice.

        What other rows read, too, stays shared where it lies in long stretches: one token of each is attended there for nearly the same,
        and the room is worth more. For several tokens it would be gathered, so then it is copied if pages are free.
        """
        former = self.tables[row]
        readers = self.pool.holders(former[0]) - self.pool.is_kept(former[0])
        apart = readers == 1 or stretches * self.pool.stretch_tokens > self.length
        if not self.pool.stretch_tokens or pages > spare or not (apart or several):
            return False
        claim = self.pool.claim(self._pages(self.max_length), over_kept=apart, least=pages)
        if claim is None:
            return False
        table = [self.pool.take(claim) for _ in range(pages)]
        copies.extend(zip(former[: self._pages(self.length)], table, strict=False))
        self._drop(row)
        self.tables[row], self._claims[row], self._runs[row] = table, claim, table[0] * self.pool.page_tokens
        return True

    def _extend(self, row: int, kept: int, missing: int, copies: list[tuple[int, int]]) -> None:
        """Give a row so many more pages behind those that stay; one that others hold, too, is replaced by a copy."""
        table, claim = self.tables[row], self._claims[row]
        leaves = table[kept:]
        del table[kept:]
        for _ in range(missing):
            table.append(self.pool.take(claim, table[-1] if table else None))
        for page in leaves:
            copies.append((page, table[kept]))
            self.pool.release(page)
        self._runs[row] = self._run_of(table)

    def _pages(self, positions: int) -> int:
        return -(-positions // self.pool.page_tokens)

    def _run_of(self, table: list[int]) -> int | None:
        if not table or table != list(range(table[0], table[0] + len(table))):
            return None
        return table[0] * self.pool.page_tokens
