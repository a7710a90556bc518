"""The pages of the KV store: how many hold each, which are free, and which are set aside for whom.

A page is `page_tokens` positions of one row in every block of a span; the store that holds the tensors knows nothing of rows, and this
module knows nothing of tensors.

Rows are read fastest where their pages are one consecutive run. So a row **claims** a run as long as it may become before it takes the
first page of it: others take those pages only where nothing else is left.

One holder is special: the **keeper** can do without its pages. A page that only the keeper holds is as good as a free one: claims reach
over such pages, of the least recently used where there is a choice, and the keeper gives each up when it is taken.

All of it belongs to one thread, the one that computes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

_CLAIMED, _KEPT, _HELD = 1, 2, 4
"""Marks of a page; a free one that nobody has claimed has none. A claimed page is free or only kept: it is set aside, not held."""

_FREE_RUNS = re.compile(rb"\x00+")
_OPEN_RUNS = re.compile(rb"[\x00\x02]+")
_TO_CLAIMED = bytes.maketrans(b"\x00\x02", b"\x01\x03")
_TO_UNCLAIMED = bytes.maketrans(b"\x01\x03", b"\x00\x02")


_STRIDE = 8
"""Every how many pages a run over kept pages may begin: looking at each of them would take milliseconds in a large pool."""


class OutOfPages(Exception):
    """No page is left; cannot happen while the sum of rows × pages of `max_length`, over all sessions, fits the pool."""


class Keeper(Protocol):
    """Who holds pages that nobody needs, until somebody does."""

    def evict(self, pages: int) -> int:
        """Give up what was least recently used until so many pages became free; how many did, fewer only where no more could."""

    def forget(self, page: int) -> None:
        """Give this page up, and what is of no use without it."""


class Claim:
    """Pages start … end - 1, free or kept, set aside for a row that will grow into them; others take them where nothing else is left."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end

    def __len__(self) -> int:
        return self.end - self.start


class PagePool:
    """Pages 0 … `pages` - 1, how many hold each of them, and which are set aside for whom.

    Attributes:
        pages: how many there are.
        page_tokens: positions of a page.
        stretch_tokens: how many positions the stretches of a row's consecutive pages must have on the average for attention to read them
            where they lie; 0 where scattered pages are read as fast.
        free: pages that nobody holds; claimed ones count.
        available: pages that nobody holds or only the keeper: as many as can be taken.
        keeper: who holds pages by `keep`; None for nobody.
    """

    def __init__(self, pages: int, page_tokens: int, *, stretch_tokens: int = 128) -> None:
        if pages < 0 or page_tokens < 1:
            raise ValueError(f"no pool of {pages} pages of {page_tokens} tokens")
        self.pages = pages
        self.page_tokens = page_tokens
        self.stretch_tokens = stretch_tokens
        self.free = self.available = pages
        self.keeper: Keeper | None = None
        self._holders = [0] * pages
        self._used = [0] * pages  # when the keeper's page was last used; 0 where the keeper does not hold it
        self._marks = bytearray(pages)
        self._claims: dict[Claim, None] = {}

    def holders(self, page: int) -> int:
        """How many hold a page, the keeper included."""
        return self._holders[page]

    def is_kept(self, page: int) -> bool:
        """Whether the keeper is among those who hold a page."""
        return self._used[page] > 0

    def claim(self, pages: int, *, after: int | None = None, over_kept: bool = True, least: int = 1) -> Claim | None:
        """Set aside a run of pages that are free or only kept and that nobody has claimed, for a row that will grow to that many.

        Args:
            pages: how many are wanted, at least 1. Where it takes kept pages, half of what they exceed `least` by will do: what is kept is
                worth more than room that most rows never use.
            after: the run has to begin right behind this page; None: anywhere, see `_fitting`.
            over_kept: whether the run may have kept pages in it.
            least: a shorter run is of no use.

        Returns:
            At least `least` and at most `pages` pages; None where there is no such run.
        """
        if after is None:
            start, found = self._fitting(pages, (pages + least) // 2, over_kept)
        else:
            start = after + 1
            run = (_OPEN_RUNS if over_kept else _FREE_RUNS).match(self._marks, start)
            found = 0 if run is None else run.end() - start
        found = min(found, pages)
        if found < max(least, 1):
            return None
        claim = Claim(start, start + found)
        self._claims[claim] = None
        self._marks[start : claim.end] = self._marks[start : claim.end].translate(_TO_CLAIMED)
        return claim

    def unclaim(self, claim: Claim) -> None:
        """Give a claim up; what is left of it is anybody's. Harmless where that was done before."""
        if claim in self._claims:
            self._cut(claim, claim.start)
            del self._claims[claim]

    def take(self, claim: Claim | None = None, after: int | None = None) -> int:
        """A page that nobody holds or only the keeper, with one holder from now on: where there is a choice the next of the claim that
        follows page `after`, else that which follows `after`, else the next of the claim, else one that is free and that nobody has
        claimed, else a free one of the longest claim, else the keeper's least recently used.

        Raises:
            OutOfPages: there is none.
        """
        follower = -1 if after is None else after + 1
        if claim is not None and claim.start < claim.end and (claim.start == follower or not self._unclaimed(follower)):
            page = claim.start
            claim.start += 1
            self._marks[page] &= ~_CLAIMED
            if self._marks[page] and self.keeper is not None:
                self.keeper.forget(page)
        elif not self.free and (self.keeper is None or not self.keeper.evict(1)):
            raise OutOfPages(f"all {self.pages} pages are held")
        elif self._unclaimed(follower):
            page = follower
        else:
            page = self._marks.find(0)
            if page < 0:
                page = self._from_a_claim()
        self._marks[page] = _HELD
        self._holders[page] = 1
        self.free -= 1
        self.available -= 1
        return page

    def share(self, page: int) -> None:
        """One more holds a page."""
        if not self._holders[page]:
            raise RuntimeError(f"page {page} is shared, but nobody holds it")
        self._holders[page] += 1
        mark = self._marks[page]
        if mark & _KEPT:
            if mark & _CLAIMED:
                self._cut(next(claim for claim in self._claims if claim.start <= page < claim.end), page)
            self._marks[page] = _HELD
            self.available -= 1

    def release(self, page: int, claim: Claim | None = None) -> None:
        """One less holds a page. Where only the keeper is left, or nobody, and it lies right before `claim`, it becomes part of that."""
        left = self._holders[page] - 1
        if left < self.is_kept(page):
            raise RuntimeError(f"page {page} is released, but nobody holds it")
        self._holders[page] = left
        if left == self.is_kept(page):
            self.free += not left
            self.available += 1
            self._marks[page] = _KEPT if left else 0
            if claim is not None and claim.start == page + 1 and claim in self._claims:
                claim.start = page
                self._marks[page] |= _CLAIMED

    def keep(self, page: int, used: int) -> None:
        """The keeper holds a page that others hold, too; or used one, that it holds already, later than any other.

        Args:
            page: which.
            used: when, counted from 1.
        """
        if not self._used[page]:
            if not self._holders[page]:
                raise RuntimeError(f"page {page} is kept, but nobody holds it")
            self._holders[page] += 1
        self._used[page] = used

    def unkeep(self, page: int) -> None:
        """The keeper holds a page no more."""
        if not self._used[page]:
            raise RuntimeError(f"page {page} is given up, but was not kept")
        self._used[page] = 0
        self._holders[page] -= 1
        if not self._holders[page]:
            self._marks[page] &= _CLAIMED
            self.free += 1

    def check(self, held: Iterable[Iterable[int]]) -> None:
        """Raise RuntimeError, with what is wrong, unless the accounts are exactly those of the given holders.

        Args:
            held: a list of pages for each holder: all rows of all sessions, and each of what the keeper has.
        """
        wrong = []
        counted = Counter(page for pages in held for page in pages)
        for page, expected in enumerate(self._holders):
            if counted[page] != expected:
                wrong.append(f"page {page} is held by {counted[page]}, counted as {expected}")
        unknown = [page for page in counted if not 0 <= page < self.pages]
        if unknown:
            wrong.append(f"there are no pages {unknown}")
        marks = bytearray(
            0 if not count else _KEPT if count == 1 and used else _HELD for count, used in zip(self._holders, self._used, strict=True)
        )
        if (self.free, self.available) != (marks.count(0), marks.count(0) + marks.count(_KEPT)):
            wrong.append(f"{marks.count(0)} pages are free and {marks.count(_KEPT)} only kept, counted as {self.free} of {self.available}")
        for claim in self._claims:
            claimed = marks[claim.start : claim.end]
            if not 0 <= claim.start <= claim.end <= self.pages or claimed.strip(b"\x00\x02"):
                wrong.append(f"the claim of pages {claim.start}:{claim.end} has pages in it that are held or claimed by others")
            else:
                marks[claim.start : claim.end] = claimed.translate(_TO_CLAIMED)
        if marks != self._marks:
            wrong.append("the marks of the pages are not those of their holders and claims")
        if wrong:
            raise RuntimeError("the page pool is not sound: " + "; ".join(wrong))

    def _unclaimed(self, page: int) -> bool:
        return 0 <= page < self.pages and not self._marks[page]

    def _cut(self, claim: Claim, end: int) -> None:
        self._marks[end : claim.end] = self._marks[end : claim.end].translate(_TO_UNCLAIMED)
        claim.end = end

    def _from_a_claim(self) -> int:
        """A free page where all free ones are claimed: the last of the longest claim that has any."""
        for claim in sorted(self._claims, key=len, reverse=True):
            page = self._marks.rfind(_CLAIMED, claim.start, claim.end)
            if page >= 0:
                self._cut(claim, page)
                return page
        raise RuntimeError("the page pool is not sound: pages are free that are neither claimed nor unclaimed")

    def _fitting(self, pages: int, enough: int, over_kept: bool) -> tuple[int, int]:
        """Where a run begins that nobody has claimed, and how long it is.

        That is the shortest of as many free pages as are wanted; else the longest of free pages, if it is long enough; else, of all runs
        of free and kept pages that are just long enough, the one whose latest use is longest ago, and of these the last: what is kept of a
        row ends there, and is of use without its end; else the longest of such pages.
        """
        best_start = best = longest_start = longest = 0
        for run in _FREE_RUNS.finditer(self._marks):
            start, end = run.span()
            if end - start >= pages and (not best or end - start < best):
                best_start, best = start, end - start
            if end - start > longest:
                longest_start, longest = start, end - start
        if best:
            return best_start, best
        if longest >= enough or not over_kept:
            return longest_start, longest
        oldest = 0
        for run in _OPEN_RUNS.finditer(self._marks):
            first, end = run.span()
            if end - first > longest:
                longest_start, longest = first, end - first
            if end - first >= enough:
                for start in (*range(first, end - enough, max(_STRIDE, enough // 4)), end - enough):
                    used = max(self._used[start : start + enough])
                    if not best or used <= oldest:
                        best_start, best, oldest = start, enough, used
        return (best_start, best) if best else (longest_start, longest)
