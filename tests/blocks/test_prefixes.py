"""Kept beginnings: what is found is what was kept under those names, by that owner, and the least recently used goes first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from petalnet.blocks.pages import PagePool
from petalnet.blocks.prefixes import PrefixCache
from petalnet.p2p.session_messages import UNIT_TOKENS


def names(text: str) -> list[bytes]:
    """A name for each letter, which stands for it and all before it."""
    return [text[: i + 1].encode() for i in range(len(text))]


def row(pool: PagePool, cache: PrefixCache, owner: str, text: str) -> list[int]:
    """The pages of a row that wrote this, kept and given up."""
    pages = [pool.take() for _ in range(len(text) * UNIT_TOKENS // pool.page_tokens)]
    cache.keep(owner, names(text), pages)
    for page in pages:
        pool.release(page)
    return pages


@pytest.mark.parametrize(("page_tokens", "unit_pages", "unit_tokens"), [(16, 4, 64), (32, 2, 64), (64, 1, 64), (256, 1, 256)])
def test_units_are_whole_names_and_whole_pages(page_tokens: int, unit_pages: int, unit_tokens: int) -> None:
    pool = PagePool(32, page_tokens)
    cache = PrefixCache(pool)
    assert (cache.unit_pages, cache.unit_tokens) == (unit_pages, unit_tokens)
    pages = row(pool, cache, "me", "abcdefgh")
    assert cache.find("me", names("abcdefgh")) == pages
    assert cache.find("me", names("abcdefghijkl")) == pages
    assert cache.find("me", names("abcdxyz")) == pages[: 256 // page_tokens]
    assert cache.find("me", names("abc")) == pages[: 192 // unit_tokens * unit_pages], "no part of a unit"
    assert cache.find("me", names("xbcdefgh")) == [] == cache.find("me", [])
    assert len(cache) == len(pages)
    pool.check(cache.held())


def test_pages_of_an_odd_size_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        PrefixCache(PagePool(32, 48))


def test_owners_do_not_meet() -> None:
    pool = PagePool(32, 64)
    cache = PrefixCache(pool)
    pages = row(pool, cache, "me", "abc")
    assert cache.find("you", names("abc")) == []
    others = row(pool, cache, "you", "abc")
    assert not set(pages) & set(others)
    assert cache.find("me", names("abc")) == pages and cache.find("you", names("abc")) == others


def test_only_whole_units_that_are_named_and_given_are_kept() -> None:
    pool = PagePool(32, 32)
    cache = PrefixCache(pool)
    pages = [pool.take() for _ in range(5)]
    cache.keep("", names("abc"), pages)
    assert cache.find("", names("abc")) == pages[:4]
    cache.keep("", names("a"), pages)
    cache.keep("", names("abc"), [])
    assert [pool.holders(page) for page in pages] == [2, 2, 2, 2, 1]


def test_what_is_known_keeps_its_pages() -> None:
    pool = PagePool(32, 64)
    cache = PrefixCache(pool)
    pages = row(pool, cache, "", "ab")
    longer = row(pool, cache, "", "abc")
    assert cache.find("", names("abc")) == [*pages, longer[2]]
    assert pool.free == 29


def test_the_least_recently_used_end_goes_first() -> None:
    pool = PagePool(8, 64)
    cache = PrefixCache(pool)
    row(pool, cache, "", "abc")
    row(pool, cache, "", "xyz")
    cache.find("", names("ab"))
    assert cache.evict(1) == 1 and len(cache.find("", names("abc"))) == 2, "c was not used with ab"
    cache.find("", names("xyz"))
    assert cache.evict(1) == 1 and len(cache.find("", names("abc"))) == 1
    assert cache.evict(100) == 4 and cache.evict(100) == 0
    assert cache.find("", names("abc")) == []
    pool.check([])


def test_what_rows_hold_is_not_given_up_as_long_as_that_frees_nothing() -> None:
    pool = PagePool(4, 64)
    cache = PrefixCache(pool)
    pages = [pool.take(), pool.take()]
    cache.keep("", names("ab"), pages)
    row(pool, cache, "", "xy")
    assert cache.evict(2) == 2
    assert cache.find("", names("ab")) == pages and cache.find("", names("xy")) == []
    assert cache.evict(1) == 0 and cache.find("", names("ab")) == pages
    pool.release(pages[0])
    assert cache.evict(1) == 1 and cache.held() == [], "its end is held, but goes with it"
    pool.check([pages[1:]])


def test_what_follows_is_forgotten_with_it() -> None:
    pool = PagePool(8, 32)
    cache = PrefixCache(pool)
    pages = row(pool, cache, "", "abcd")
    cache.forget(pages[3])
    assert cache.find("", names("abcd")) == pages[:2]
    pool.check(cache.held())


def test_a_page_has_one_name() -> None:
    pool = PagePool(8, 64)
    cache = PrefixCache(pool)
    pages = [pool.take(), pool.take()]
    cache.keep("", names("ab"), pages)
    cache.keep("", names("xy"), pages)
    cache.keep("you", names("ab"), pages)
    assert cache.find("", names("ab")) == pages and cache.find("", names("xy")) == cache.find("you", names("ab")) == []
    pool.check([pages, *cache.held()])
    assert list(cache._roots) == [""], "nothing is remembered of an owner of whom nothing is kept"
    pool.release(pages[1])
    cache.evict(1)
    pool.release(pages[0])
    cache.evict(1)
    assert not cache._roots


def test_the_pool_asks_for_pages() -> None:
    pool = PagePool(4, 64)
    cache = PrefixCache(pool)
    row(pool, cache, "", "abcd")
    assert pool.free == 0
    pool.take()
    assert len(cache) == 3


def test_a_claim_takes_the_end_of_what_is_kept() -> None:
    pool = PagePool(32, 32)
    cache = PrefixCache(pool)
    row(pool, cache, "me", "abcdefghijklmnop")
    assert len(cache) == 32
    claim = pool.claim(1)
    assert claim is not None
    pool.take(claim)
    assert len(cache) == 30 and len(cache.find("me", names("abcdefghijklmnop"))) == 30
    claim = pool.claim(8, least=6)
    for _ in range(6):
        pool.take(claim)
    assert len(cache.find("me", names("abcdefghijklmnop"))) >= 22


@given(most=st.integers(0, 7), texts=st.lists(st.text("ab", min_size=1, max_size=8), max_size=8))
@settings(deadline=None)
def test_no_more_is_kept_than_allowed(most: int, texts: list[str]) -> None:
    pool = PagePool(16, 32)
    cache = PrefixCache(pool, most_pages=most)
    for text in texts:
        pages = row(pool, cache, "", text)
        assert len(cache) <= most
        assert len(cache.find("", names(text))) == min(len(pages), most // 2 * 2)
        pool.check(cache.held())


class PrefixMachine(RuleBasedStateMachine):
    """Rows of several owners, and whatever names they give them: also such as no client of ours would."""

    @initialize(most=st.none() | st.integers(0, 8))
    def begin(self, most: int | None) -> None:
        self.pool = PagePool(12, 32)
        self.cache = PrefixCache(self.pool, most_pages=most)
        self.rows: list[list[int]] = []
        self.kept: dict[tuple[str, tuple[bytes, ...]], set[tuple[int, ...]]] = {}

    @rule(pages=st.integers(1, 7))
    def take(self, pages: int) -> None:
        if self.pool.available >= pages:
            self.rows.append([self.pool.take() for _ in range(pages)])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), owner=st.sampled_from(["a", "b"]), letters=st.text("xy", max_size=4))
    def keep(self, data: st.DataObject, owner: str, letters: str) -> None:
        pages = data.draw(st.sampled_from(self.rows))
        given_names = [letter.encode() for letter in letters]  # not a chain: the same name again and again
        self.cache.keep(owner, given_names, pages)
        for i in range(min(len(letters), len(pages) // 2)):
            self.kept.setdefault((owner, tuple(given_names[: i + 1])), set()).add(tuple(pages[2 * i : 2 * i + 2]))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.rows))
        self.rows.remove(pages)
        for page in pages:
            self.pool.release(page)

    @rule(owner=st.sampled_from(["a", "b"]), letters=st.text("xy", max_size=4))
    def find(self, owner: str, letters: str) -> None:
        asked: Sequence[bytes] = [letter.encode() for letter in letters]
        pages = self.cache.find(owner, asked)
        assert len(pages) % 2 == 0 and len(pages) <= 2 * len(asked)
        for i in range(len(pages) // 2):
            assert tuple(pages[2 * i : 2 * i + 2]) in self.kept[owner, tuple(asked[: i + 1])]

    @rule(pages=st.integers(0, 12))
    def evict(self, pages: int) -> None:
        free, kept = self.pool.free, len(self.cache)
        freed = self.cache.evict(pages)
        assert freed == self.pool.free - free
        assert freed >= pages or self.pool.available == self.pool.free
        assert pages or len(self.cache) == kept

    @invariant()
    def all_is_accounted_for(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.rows + self.cache.held())
            assert len(self.cache) <= self.cache.most_pages


TestPrefixes = PrefixMachine.TestCase
TestPrefixes.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
