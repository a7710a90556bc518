"""Beginnings of rows that are kept after their session, so that a later one with the same beginning need not compute it again.

A beginning has a chain of names: each stands for `UNIT_TOKENS` more tokens and for all before them. What a name is made of is the client's
business; a server only finds pages by them, and only for the owner who named them. A kept page is held like a row holds one, in whole
units, and given up again, least recently used first, when a row needs it.

Like the pool, this belongs to the thread that computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from petalnet.blocks.pool import PagePool
from petalnet.p2p.session_messages import UNIT_TOKENS


class _Unit:
    """A node of the tree of beginnings: what follows its parent. A root has its owner for a name and no pages."""

    __slots__ = ("children", "name", "pages", "parent")

    def __init__(self, parent: _Unit | None, name: bytes, pages: Sequence[int]) -> None:
        self.parent = parent
        self.name = name
        self.pages = tuple(pages)
        self.children: dict[bytes, _Unit] = {}


class PrefixCache:
    """The pages of named beginnings, by owner.

    Attributes:
        unit_tokens: positions that are shared at a time: a name's, or a page's where that is longer.
        unit_pages: pages of so many positions.
        most_pages: the most pages that are kept.
    """

    def __init__(self, pool: PagePool, *, most_pages: int | None = None) -> None:
        """
        Args:
            pool: where the pages are from; the cache becomes its keeper.
            most_pages: the most pages to keep; None for any number.

        Raises:
            ValueError: the pool's pages are not a power of two of tokens.
        """
        if pool.page_tokens & (pool.page_tokens - 1):
            raise ValueError(f"pages of {pool.page_tokens} tokens cannot be named, only of a power of two")
        self.unit_tokens = max(UNIT_TOKENS, pool.page_tokens)
        self.unit_pages = self.unit_tokens // pool.page_tokens
        self.most_pages = pool.pages if most_pages is None else min(most_pages, pool.pages)
        self._names_per_unit = self.unit_tokens // UNIT_TOKENS
        self._pool = pool
        self._roots: dict[str, _Unit] = {}
        # Least recently used first. A use counts for a unit and then for all before it, so every unit stands before its parent.
        self._units: OrderedDict[_Unit, None] = OrderedDict()
        self._by_page: dict[int, _Unit] = {}
        self._uses = 0
        pool.keeper = self

    def __len__(self) -> int:
        """Pages that are kept."""
        return len(self._by_page)

    def find(self, owner: str, names: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning, which counts as used now. They are only safe until the pool is asked for pages.

        Args:
            owner: whose names these are.
            names: names[i] stands for tokens 0 … (i + 1) × UNIT_TOKENS - 1.
        """
        unit = self._roots.get(owner)
        if unit is None:
            return []
        pages: list[int] = []
        for name in self._unit_names(names):
            following = unit.children.get(name)
            if following is None:
                break
            unit = following
            pages.extend(unit.pages)
        self._use(unit)
        return pages

    def keep(self, owner: str, names: Sequence[bytes], pages: Sequence[int]) -> None:
        """Keep a beginning; of what is known already the pages stay those that are kept.

        Args:
            owner: whose names these are.
            names: as for `find`.
            pages: those of the row, in order; only whole units that are both named and given are kept.
        """
        size = self.unit_pages
        most = min(len(pages), self.most_pages) // size
        unit = root = self._roots.get(owner) or _Unit(None, owner.encode(), ())
        for i, name in enumerate(self._unit_names(names)[:most]):
            following = unit.children.get(name)
            if following is None:
                following = _Unit(unit, name, pages[i * size : (i + 1) * size])
                if not self._by_page.keys().isdisjoint(following.pages):
                    break  # no honest client has two names for the same positions of a row
                unit.children[name] = following
                self._units[following] = None
                self._by_page.update(dict.fromkeys(following.pages, following))
            unit = following
        if unit is root:
            return
        self._roots[owner] = root
        self._use(unit)
        while len(self) > self.most_pages:
            self._drop(next(iter(self._units)))

    def evict(self, pages: int) -> int:
        """Give up what was least recently used until at least so many pages became free; what would free nothing stays if it can.

        Returns:
            How many became free; fewer than asked for where only rows hold the others.
        """
        before = self._pool.free
        goal = before + min(pages, self._pool.available - before)
        while self._pool.free < goal:
            ends = (unit for unit in self._units if not unit.children and any(self._pool.holders(page) == 1 for page in unit.pages))
            self._drop(next(ends, None) or next(iter(self._units)))
        return self._pool.free - before

    def forget(self, page: int) -> None:
        """Give up the unit that a page belongs to, and all that follows it."""
        followers = [self._by_page[page]]
        for unit in followers:
            followers.extend(unit.children.values())
        for unit in reversed(followers):
            self._drop(unit)

    def held(self) -> list[list[int]]:
        """The pages of each unit, for `PagePool.check`."""
        return [list(unit.pages) for unit in self._units]

    def _unit_names(self, names: Sequence[bytes]) -> Sequence[bytes]:
        return names[self._names_per_unit - 1 :: self._names_per_unit]

    def _use(self, unit: _Unit) -> None:
        self._uses += 1
        step: _Unit = unit
        while step.parent is not None:
            self._units.move_to_end(step)
            for page in step.pages:
                self._pool.keep(page, self._uses)
            step = step.parent

    def _drop(self, unit: _Unit) -> None:
        """Give up a unit that nothing known follows."""
        del self._units[unit]
        for page in unit.pages:
            del self._by_page[page]
            self._pool.unkeep(page)
        parent = unit.parent
        if parent is not None:
            del parent.children[unit.name]
            if parent.parent is None and not parent.children:
                del self._roots[parent.name.decode()]
