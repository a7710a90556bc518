"""Pages and page tables: what is read at a row's positions is what was written there, nothing is lost, and promises hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from petalnet.blocks.pages import SETTLED_TOKENS, OutOfPages, PagePool, Rows
from petalnet.blocks.prefixes import PrefixCache
from petalnet.p2p.session_messages import UNIT_TOKENS


def make(rows: int, max_length: int, pool: PagePool) -> Rows:
    made = Rows(pool, max_length)
    made.resize(rows)
    return made


def step(rows: Rows, new: int) -> list[tuple[int, int]]:
    copies = rows.prepare(new)
    rows.advance(new)
    return copies


# The pool.


def test_a_page_has_holders() -> None:
    pool = PagePool(2, 16)
    page = pool.take()
    pool.share(page)
    assert (pool.holders(page), pool.free) == (2, 1)
    pool.check([[page], [page]])
    pool.release(page)
    assert pool.free == 1
    pool.release(page)
    assert (pool.holders(page), pool.free) == (0, 2)
    with pytest.raises(RuntimeError, match="nobody holds it"):
        pool.release(page)
    with pytest.raises(RuntimeError, match="nobody holds it"):
        pool.share(page)
    pool.check([])


def test_all_pages_can_be_taken_and_no_more() -> None:
    pool = PagePool(5, 16)
    claim = pool.claim(3)
    assert {pool.take() for _ in range(5)} == set(range(5)), "claimed ones, too, when nothing else is left"
    assert claim is not None and len(claim) == 0
    with pytest.raises(OutOfPages):
        pool.take()


def test_claims_fit_best() -> None:
    pool = PagePool(12, 16)
    pages = [pool.take() for _ in range(12)]
    for page in (1, 2, 3, 4, 6, 7, 9, 10, 11):  # runs of four, two and three
        pool.release(page)
    wanted = [pool.claim(2), pool.claim(3), pool.claim(9)]
    assert [(claim.start, claim.end) for claim in wanted if claim] == [(6, 8), (9, 12), (1, 5)], "where none suffices, the longest"
    assert pool.claim(1) is None
    for claim in wanted:
        assert claim
        pool.unclaim(claim)
        pool.unclaim(claim)
    assert pool.claim(5, least=5) is None
    behind = pool.claim(5, after=5)
    assert behind and (behind.start, behind.end) == (6, 8)
    assert pool.claim(5, after=7) is None
    pool.check([[page for page in pages if pool.holders(page)]])


def test_the_end_of_a_claim_is_taken_last() -> None:
    pool = PagePool(8, 16)
    claim = pool.claim(6)
    assert [pool.take(), pool.take()] == [6, 7]
    assert [pool.take(), pool.take()] == [5, 4]
    assert [pool.take(claim), pool.take(claim, 0), pool.take(claim, 5)] == [0, 1, 2]
    pool.release(2, claim)
    pool.release(6, claim)
    assert claim and (claim.start, claim.end) == (2, 4), "what adjoins goes back to the claim"
    pool.check([[0, 1, 4, 5, 7]])


def test_the_check_tells_what_is_wrong() -> None:
    pool = PagePool(4, 16)
    page = pool.take()
    with pytest.raises(RuntimeError, match="page 0 is held by 0, counted as 1"):
        pool.check([])
    with pytest.raises(RuntimeError, match="page 0 is held by 2, counted as 1"):
        pool.check([[page], [page]])
    with pytest.raises(RuntimeError, match=r"there are no pages \[7\]"):
        pool.check([[page], [7]])
    pool.free = 4
    with pytest.raises(RuntimeError, match="3 pages are free and 0 only kept, counted as 4 of 3"):
        pool.check([[page]])
    pool.free = 3
    claim = pool.claim(2)
    assert claim
    claim.start = 0
    with pytest.raises(RuntimeError, match="claim of pages 0:3"):
        pool.check([[page]])
    claim.start = 2
    with pytest.raises(RuntimeError, match="the marks of the pages"):
        pool.check([[page]])


def test_a_pool_has_sense() -> None:
    with pytest.raises(ValueError, match="no pool"):
        PagePool(-1, 16)
    with pytest.raises(ValueError, match="no pool"):
        PagePool(1, 0)


# Rows.


def test_rows_grow_in_runs_of_their_own() -> None:
    pool = PagePool(20, 16)
    rows, others = make(2, 64, pool), make(1, 100, pool)
    for _ in range(64):
        step(rows, 1)
        step(others, 1)
    assert rows.tables == [[0, 1, 2, 3], [4, 5, 6, 7]] and others.tables == [[8, 9, 10, 11]]
    assert [rows.run(0), rows.run(1), others.run(0)] == [0, 64, 128]
    rows.release()
    rows.release()
    others.release()
    pool.check([])
    assert pool.free == 20 and len(rows) == 0 and rows.length == 0


def test_pages_are_taken_as_tokens_arrive() -> None:
    pool = PagePool(20, 16)
    rows = make(1, 200, pool)
    assert rows.run(0) is None and pool.free == 20
    step(rows, 0)
    step(rows, 16)
    assert pool.free == 19
    step(rows, 17)
    assert pool.free == 17


def test_lengths_are_checked() -> None:
    pool = PagePool(20, 16)
    rows = make(1, 40, pool)
    step(rows, 30)
    with pytest.raises(ValueError, match="41 positions are more than the 40"):
        rows.prepare(11)
    rows.prepare(1)
    with pytest.raises(ValueError, match="only 32 positions were prepared, not 33"):
        rows.advance(3)
    for length in (-1, 31):
        with pytest.raises(ValueError, match="cannot be set"):
            rows.truncate(length)
    with pytest.raises(ValueError, match="cannot be resized"):
        rows.resize(2)
    with pytest.raises(ValueError, match="cannot begin with"):
        rows.attach([[0]])
    with pytest.raises(ValueError, match="an order of rows"):
        rows.reorder([0, 1])
    empty = make(2, 40, pool)
    for pages in ([[0]], [[0], [0, 1]], [[0, 1, 0], [0, 1, 0]]):
        with pytest.raises(ValueError, match="cannot begin with"):
            empty.attach(pages)


def test_going_back_keeps_the_run() -> None:
    pool = PagePool(20, 16)
    rows, others = make(1, 100, pool), make(1, 100, pool)
    step(rows, 30)
    step(others, 20)
    step(rows, 20)
    rows.truncate(10)
    assert rows.tables == [[0]]
    step(others, 60)
    step(rows, 90)
    assert rows.run(0) == 0 and others.run(0) == 7 * 16
    rows.truncate(0)
    assert rows.tables == [[]] and rows.run(0) is None
    rows.resize(3)
    step(rows, 1)
    assert len(rows) == 3


def test_what_was_prepared_and_not_used_is_given_back() -> None:
    pool = PagePool(20, 16)
    rows = make(2, 100, pool)
    step(rows, 10)
    rows.prepare(60)
    assert pool.free == 10
    rows.truncate(10)
    assert pool.free == 18
    rows.prepare(60)
    rows.reorder([1, 0])
    assert pool.free == 18


def test_rows_are_shared_until_they_differ() -> None:
    pool = PagePool(40, 16)
    rows = make(1, 100, pool)
    step(rows, 40)
    rows.reorder([0, 0, 0])
    assert rows.tables == [[0, 1, 2]] * 3 and pool.holders(0) == 3
    copies = step(rows, 1)
    assert [source for source, _ in copies] == [2, 2] and len({target for _, target in copies}) == 2
    assert rows.tables[2] == [0, 1, 2] and [pool.holders(page) for page in (0, 1, 2)] == [3, 3, 1], "the last to write has it in place"
    rows.reorder([2, 2])
    rows.reorder([1])
    assert step(rows, 1) == [] and rows.tables == [[0, 1, 2]]
    pool.check(rows.tables)
    assert pool.free == 37


def test_rows_that_share_need_no_more_than_rows_that_do_not() -> None:
    pool = PagePool(3, 16)
    rows = make(1, 16, pool)
    step(rows, 10)
    rows.reorder([0, 0, 0])
    assert len(step(rows, 1)) == 2 and pool.free == 0


def test_rows_that_have_settled_are_brought_together() -> None:
    pool = PagePool(60, 16)
    rows = make(1, 160, pool)
    step(rows, 40)
    rows.reorder([0, 0, 0])
    copies = []
    for _ in range(SETTLED_TOKENS):
        copies += step(rows, 1)
    assert len(copies) == 2 and [rows.run(row) for row in range(3)] == [None, None, 0]
    assert len(step(rows, 1)) == 6, "all pages of two rows"
    assert [rows.run(row) is None for row in range(3)] == [False] * 3
    assert [step(rows, 1) for _ in range(100)] == [[]] * 100
    assert [rows.run(row) is None for row in range(3)] == [False] * 3


def test_a_long_beginning_that_several_rows_read_stays_shared() -> None:
    pool = PagePool(120, 16)
    rows = make(1, 560, pool)
    step(rows, 520)
    rows.reorder([0, 0, 0])
    assert sum(len(step(rows, 1)) for _ in range(40)) == 2, "only the page that is written"
    beginning = rows.tables[0][:32]
    assert all(table[:32] == beginning and rows.run(row) is None for row, table in enumerate(rows.tables[:2])) and rows.run(2) == 0
    assert all(table[33:] == list(range(table[33], table[33] + 2)) for table in rows.tables), "they go on in runs"
    rows.reorder([0])
    rows.truncate(540)
    copies = step(rows, 10)
    assert len(copies) == 34 and rows.run(0) is not None, "nobody else reads it any more"


def test_what_is_shared_is_copied_for_several_tokens_where_there_is_room() -> None:
    for pages, together in ((120, True), (64, False)):
        pool = PagePool(pages, 16)
        rows = make(1, 560, pool)
        step(rows, 520)
        rows.reorder([0, 0])
        copies = [len(step(rows, 5)) for _ in range(2)]
        assert copies == ([1, 33] if together else [1, 0]) and (rows.run(0) is not None) == together


def test_where_scattered_pages_are_read_as_fast_nothing_is_copied() -> None:
    pool = PagePool(60, 16, stretch_tokens=0)
    rows = make(1, 160, pool)
    step(rows, 40)
    rows.reorder([0, 0, 0])
    assert sum(len(step(rows, 1)) for _ in range(100)) == 2
    rows.reorder([0])
    assert step(rows, 20) == [] and rows.run(0) is None


def test_rows_of_a_beam_search_are_not_copied() -> None:
    pool = PagePool(100, 16)
    rows = make(1, 320, pool)
    step(rows, 100)
    rows.reorder([0] * 5)
    copies = []
    for i in range(60):
        copies += step(rows, 1)
        rows.reorder([0, 0, i % 5, 3, 4])
    assert len(copies) <= 2 * 60 + 5, "only the page that is written, of rows that were duplicated"


def test_too_few_pages_change_nothing() -> None:
    pool = PagePool(5, 16)
    rows = make(2, 100, pool)
    step(rows, 20)
    before = [list(table) for table in rows.tables]
    with pytest.raises(OutOfPages):
        rows.prepare(20)
    assert rows.tables == before and pool.free == 1
    pool.check(rows.tables)
    step(rows, 10)
    rows.release()
    rows = make(1, 100, pool)
    step(rows, 50)
    rows.reorder([0, 0, 0])
    with pytest.raises(OutOfPages):
        rows.prepare(1)
    assert rows.tables == [[0, 1, 2, 3]] * 3 and pool.free == 1
    pool.check(rows.tables)


def test_no_row_is_brought_together_with_pages_that_another_needs() -> None:
    pool = PagePool(11, 16)
    rows = make(1, 64, pool)
    step(rows, 32)
    rows.reorder([0, 0, 0, 0])
    step(rows, SETTLED_TOKENS)
    assert pool.free == 5
    assert step(rows, 13) == [] and pool.free == 1, "one of them would have found a run of four, and the last of them no page"
    pool.check(rows.tables)


def test_what_the_cache_shares_with_the_last_row_is_written_in_place_when_nothing_is_free() -> None:
    pool = PagePool(2, 64)
    cache = PrefixCache(pool)
    rows = make(1, 128, pool)
    step(rows, 128)
    cache.keep("", [b"one", b"two"], rows.tables[0])
    rows.truncate(100)
    assert step(rows, 20) == [] and rows.tables == [[0, 1]]


def test_a_prefix_is_continued_in_place_or_copied() -> None:
    pool = PagePool(40, 16)
    cache = PrefixCache(pool)
    first = make(1, 160, pool)
    step(first, 130)
    names = [b"one", b"two"]
    cache.keep("a", names, first.tables[0])
    first.release()
    second, third = make(1, 160, pool), make(1, 160, pool)
    second.attach([cache.find("a", names)])
    third.attach([cache.find("a", names)])
    assert second.length == 128 and second.run(0) == third.run(0) == 0
    assert step(second, 30) == [] and second.tables == [list(range(10))] and second.run(0) == 0
    copies = step(third, 1)
    assert [source for source, _ in copies] == list(range(8)) and third.run(0) == copies[0][1] * 16
    pool.check([*second.tables, *third.tables, *cache.held()])


def full_of_prefixes(pages: int) -> tuple[PagePool, PrefixCache]:
    """A pool whose pages are all kept, in beginnings of four pages of which the first is the oldest."""
    pool = PagePool(pages, 64)
    cache = PrefixCache(pool)
    held = [pool.take() for _ in range(pages)]
    for first in range(0, pages, 4):
        cache.keep("", [b"%d" % page for page in range(first, first + 4)], held[first : first + 4])
    for page in held:
        pool.release(page)
    return pool, cache


def test_a_claim_reaches_over_the_oldest_of_what_is_kept() -> None:
    pool, cache = full_of_prefixes(32)
    rows = make(1, 256, pool)
    cache.find("", [b"0"])
    step(rows, 64)
    assert rows.tables == [[8]], "0 and what followed it were used later than 8"
    assert len(cache) == 28 and pool.free == 3, "of what is kept only that goes which begins where the row is"
    step(rows, 192)
    assert rows.tables == [[8, 9, 10, 11]] and len(cache) == 28


def test_pages_that_come_into_use_end_a_claim() -> None:
    pool, cache = full_of_prefixes(16)
    rows, others = make(1, 1024, pool), make(1, 256, pool)
    step(rows, 64)
    assert rows.tables == [[0]] and cache.find("", [b"4", b"5", b"6", b"7"]) == [4, 5, 6, 7]
    others.attach([[4, 5, 6, 7]])
    pool.check([*rows.tables, *others.tables, *cache.held()])
    step(rows, 192)
    assert rows.tables == [[0, 1, 2, 3]]
    others.release()
    step(rows, 256)
    assert rows.run(0) is not None


# All of it against a plain model.


@dataclass
class Modelled:
    """A session, and what its rows must hold: a number for each position that depends on all before it, as keys and values do."""

    owner: str
    rows: Rows
    promised: int
    contents: list[list[int]] = field(default_factory=list)


class PagesMachine(RuleBasedStateMachine):
    """Sessions of a pool and a prefix cache; never is more promised than the pool has, and so never may pages run out."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[Modelled] = []

    @initialize(
        page_tokens=st.sampled_from([64, 32, 128, 16]),
        pages=st.sampled_from([1, 2, 3, 4, 6, 9, 24]),
        cached=st.none() | st.integers(0, 4),
    )
    def begin(self, page_tokens: int, pages: int, cached: int | None) -> None:
        self.page_tokens = page_tokens
        self.pool = PagePool(pages, page_tokens)
        self.cache = PrefixCache(self.pool, most_pages=cached)
        # Copies one after another, and all of a call at once: a store may do either.
        self.stores = [[[-1] * page_tokens for _ in range(pages)] for _ in range(2)]

    @property
    def unpromised(self) -> int:
        return self.pool.pages - sum(session.promised for session in self.sessions)

    def pick(self, data: st.DataObject) -> Modelled:
        return data.draw(st.sampled_from(self.sessions))

    def pages_of(self, length: int) -> int:
        return -(-length // self.page_tokens)

    def names(self, contents: Sequence[int]) -> list[bytes]:
        return [str(contents[end - 1]).encode() for end in range(UNIT_TOKENS, len(contents) + 1, UNIT_TOKENS)]

    @precondition(lambda self: self.unpromised > 0)
    @rule(data=st.data(), owner=st.sampled_from(["", "a"]))
    def open(self, data: st.DataObject, owner: str) -> None:
        rows = data.draw(st.integers(1, min(self.unpromised, 4)))
        most = self.unpromised // rows * self.page_tokens
        self.open_session(owner, rows, data.draw(st.sampled_from([most, most // 2 + 1]) | st.integers(1, most)))

    def open_session(self, owner: str, rows: int, max_length: int) -> None:
        promised = rows * self.pages_of(max_length)
        self.sessions.append(Modelled(owner, make(rows, max_length, self.pool), promised, [[] for _ in range(rows)]))
        assert sum(session.promised for session in self.sessions) <= self.pool.pages

    @rule(written=st.integers(0, 3), kept=st.booleans())
    def fill(self, written: int, kept: bool) -> None:
        """All that is promised is used: the moment when pages would run out."""
        if self.unpromised:
            self.open_session("", 1, self.unpromised * self.page_tokens)
        for session in self.sessions:
            new = session.rows.max_length - session.rows.length
            self.write(session, new, [written >> row & 1 for row in range(len(session.rows))], True)
            if kept:
                self.keep_rows_of(session)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), succeeds=st.sampled_from([True, True, True, False]), kept=st.booleans())
    def step(self, data: st.DataObject, succeeds: bool, kept: bool) -> None:
        session = self.pick(data)
        left = session.rows.max_length - session.rows.length
        new = data.draw(st.sampled_from([size for size in (left, 5, 64, 1, 128, 2, 30, 100, 0) if size <= left]))
        count = len(session.rows)
        self.write(session, new, data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)), succeeds)
        if succeeds and kept:
            self.keep_rows_of(session)

    def write(self, session: Modelled, new: int, tokens: list[int], succeeds: bool) -> None:
        """A step in which each row gets one token `new` times; one that fails has written, too, but does not count."""
        rows = session.rows
        copies = rows.prepare(new)
        for source, target in copies:
            self.stores[0][target] = list(self.stores[0][source])
        for target, content in [(target, list(self.stores[1][source])) for source, target in copies]:
            self.stores[1][target] = content
        for contents, table, token in zip(session.contents, rows.tables, tokens, strict=True):
            history = contents if succeeds else list(contents)
            for position in range(rows.length, rows.length + new):
                history.append(hash((history[-1] if history else 0, token)))
                page = table[position // self.page_tokens]
                assert self.pool.holders(page) == 1, "written while others read it"
                for store in self.stores:
                    store[page][position % self.page_tokens] = history[-1]
        if succeeds:
            rows.advance(new)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        session = self.pick(data)
        reached = session.rows.length
        length = data.draw(st.sampled_from([max(0, reached - 1), max(0, reached - 20), 0]) | st.integers(0, reached))
        session.rows.truncate(length)
        for contents in session.contents:
            del contents[length:]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        session = self.pick(data)
        each = self.pages_of(session.rows.max_length)
        most = min((session.promised + self.unpromised) // each, 6)
        order = data.draw(st.lists(st.integers(0, len(session.rows) - 1), min_size=1, max_size=most))
        session.promised = max(session.promised, len(order) * each)
        free = self.pool.free
        session.rows.reorder(order)
        assert self.pool.free >= free
        session.contents = [list(session.contents[row]) for row in order]

    @precondition(lambda self: any(session.rows.length == 0 for session in self.sessions))
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        """Empty rows begin with what is known of the beginning of what another session has written."""
        session = data.draw(st.sampled_from([one for one in self.sessions if one.rows.length == 0]))
        known = data.draw(st.sampled_from([contents for one in self.sessions for contents in one.contents]))
        most = session.rows.max_length // self.cache.unit_tokens * self.cache.unit_pages
        found = self.cache.find(session.owner, self.names(known))[:most]
        session.rows.attach([found] * len(session.rows))
        session.contents = [known[: len(found) * self.page_tokens] for _ in session.contents]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        self.keep_rows_of(self.pick(data))

    def keep_rows_of(self, session: Modelled) -> None:
        for contents, table in zip(session.contents, session.rows.tables, strict=True):
            self.cache.keep(session.owner, self.names(contents), table)
            found = self.cache.find(session.owner, self.names(contents))
            units = min(len(contents) // self.cache.unit_tokens, self.cache.most_pages // self.cache.unit_pages)
            assert len(found) == units * self.cache.unit_pages

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = self.pick(data)
        self.sessions.remove(session)
        session.rows.release()

    @invariant()
    def what_was_written_is_there(self) -> None:
        for session in self.sessions:
            rows = session.rows
            assert len(rows) == len(session.contents)
            for row, (table, contents) in enumerate(zip(rows.tables, session.contents, strict=True)):
                assert len(contents) == rows.length <= len(table) * self.page_tokens
                for store in self.stores:
                    assert [value for page in table for value in store[page]][: rows.length] == contents
                run = table and table == list(range(table[0], table[0] + len(table)))
                assert rows.run(row) == (table[0] * self.page_tokens if run else None)

    @invariant()
    def the_pool_is_sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check([table for session in self.sessions for table in session.rows.tables] + self.cache.held())
            assert len(self.cache) <= self.cache.most_pages

    def teardown(self) -> None:
        for session in self.sessions:
            session.rows.release()
        if hasattr(self, "pool"):
            assert self.cache.evict(self.pool.pages) + self.pool.free >= self.pool.pages
            self.pool.check([])
            assert self.cache.held() == [] and self.pool.claim(self.pool.pages, least=self.pool.pages)


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
