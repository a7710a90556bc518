"""Sessions and what they are promised: what is promised fits, and what is given back can be promised again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.blocks.pages import PagePool
from petalnet.blocks.promises import FIRST_LIFETIME_S
from petalnet.blocks.sessions import Session, SessionManager
from petalnet.blocks.span import Span
from petalnet.errors import BusyError, CallerError, MovedError
from petalnet.models.checkpoint import ModelSource

PAGE = 10


class Inbox:
    """A compute thread that does what it is asked when it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def call(self, work: Callable[..., Any], *args: Any) -> None:
        self.calls.append((work, args))

    def work(self) -> None:
        for work, args in self.calls:
            work(*args)
        self.calls.clear()


@pytest.fixture(scope="module")
def span(saved: Callable[..., Path]) -> Span:
    return Span.load(ModelSource.open(saved("llama")), 0, 3)


def managed(span: Span, *, pages: int = 10, **options: Any) -> tuple[SessionManager, Inbox]:
    inbox = Inbox()
    pool = PagePool(pages, PAGE)
    return SessionManager(span, pool, compute=inbox, release=lambda session: session.kv.release(), clock=lambda: 0.0, **options), inbox


def test_a_promise_and_its_end(span: Span) -> None:
    sessions, inbox = managed(span)
    first = sessions.open("a", 0, 3, 30)
    assert sessions.free_tokens == sessions.max_tokens == 100, "nothing is promised before the first step"
    sessions.admit(first, 2)
    assert (sessions.free_tokens, first.promise.pages) == (40, 6)
    sessions.admit(first, 2)
    sessions.admit(first, 1)
    assert sessions.free_tokens == 40, "what was promised covers the same rows and fewer"
    second = sessions.open("b", 0, 3, 50)
    with pytest.raises(BusyError, match="no room for 1 rows of 50 tokens: 40 tokens of KV cache are free") as caught:
        sessions.admit(second, 1)
    assert (caught.value.retry_after_s, caught.value.fits_tokens) == (FIRST_LIFETIME_S, 40)
    sessions.close(first)
    sessions.close(first)
    assert sessions.free_tokens == 100 and len(inbox.calls) == 1
    sessions.admit(second, 1)
    assert (sessions.free_tokens, len(sessions), list(sessions)) == (50, 1, [second])


def test_a_session_that_has_ended_is_promised_nothing(span: Span) -> None:
    """Nobody would take such a promise back."""
    sessions, _ = managed(span)
    session = sessions.open("a", 0, 3, 30)
    sessions.close(session)
    with pytest.raises(CallerError, match="the session has ended"):
        sessions.admit(session, 1)
    assert sessions.free_tokens == sessions.max_tokens


def test_promises_are_whole_pages(span: Span) -> None:
    sessions, _ = managed(span)
    sessions.admit(sessions.open("a", 0, 3, 31), 2)
    assert sessions.free_tokens == 20


def test_what_is_promised_can_be_taken(span: Span) -> None:
    """A session's pages are given back before those who are promised their room can take them."""
    sessions, inbox = managed(span)
    first = sessions.open("a", 0, 3, 100)
    sessions.admit(first, 1)
    inbox.call(first.kv.resize, 1)
    inbox.call(first.kv.prepare, 100)
    sessions.close(first)
    second = sessions.open("a", 0, 3, 50)
    sessions.admit(second, 2)
    inbox.call(second.kv.resize, 2)
    inbox.call(second.kv.prepare, 50)
    inbox.work()


def test_how_far_a_session_is_counts_for_those_who_wait(span: Span) -> None:
    inbox, now = Inbox(), 0.0
    sessions = SessionManager(span, PagePool(10, PAGE), compute=inbox, release=lambda session: None, clock=lambda: now)
    first = sessions.open("a", 0, 3, 100)
    sessions.admit(first, 1)
    now = 3.0
    sessions.reached(first, 1, 75)
    with pytest.raises(BusyError) as caught:
        sessions.admit(sessions.open("b", 0, 3, 10), 1)
    assert caught.value.retry_after_s == pytest.approx(1.0)


def test_what_can_never_fit_is_the_callers_fault(span: Span) -> None:
    sessions, _ = managed(span)
    with pytest.raises(CallerError, match="1 rows of max_length 101 exceed the 100 tokens"):
        sessions.open("a", 0, 3, 101)
    session = sessions.open("a", 0, 3, 60)
    with pytest.raises(CallerError, match="2 rows of max_length 60 exceed"):
        sessions.admit(session, 2)


@pytest.mark.parametrize(("blocks", "error"), [((0, 4), MovedError), ((2, 2), CallerError), ((3, 1), CallerError)])
def test_blocks_that_are_not_served(span: Span, blocks: tuple[int, int], error: type[Exception]) -> None:
    with pytest.raises(error, match="are not served here, only 0:3"):
        managed(span)[0].open("a", *blocks, 10)


def test_longer_than_the_model_knows(saved: Callable[..., Path]) -> None:
    span = Span.load(ModelSource.open(saved("opt")), 0, 1)
    with pytest.raises(CallerError, match="longer than the 40 positions that the model knows"):
        managed(span)[0].open("a", 0, 1, 41)


def test_too_many_sessions(span: Span) -> None:
    sessions, _ = managed(span, max_sessions=2)
    opened = [sessions.open("a", 0, 1, 1) for _ in range(2)]
    with pytest.raises(BusyError, match="all 2 sessions are taken") as caught:
        sessions.open("b", 0, 1, 1)
    assert caught.value.fits_tokens == 100 and caught.value.retry_after_s > 0
    sessions.close(opened[0])
    sessions.open("b", 0, 1, 1)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["open", "admit", "step", "close", "compute"]), st.integers(0, 5), st.integers(1, 60), st.integers(1, 4))
    )
)
def test_nobody_runs_out_of_what_was_promised(span: Span, steps: list[tuple[str, int, int, int]]) -> None:
    """Whatever sessions do within their promises, in whatever order the compute thread comes to it, pages suffice and none is lost."""
    sessions, inbox = managed(span)
    pool = sessions._pool
    known: list[Session] = []

    def grow(session: Session, rows: int, new: int) -> None:
        if not session.kv.length:
            session.kv.resize(rows)
        new = min(new, session.max_length - session.kv.length)
        session.kv.prepare(new)
        session.kv.advance(new)

    for kind, which, length, rows in steps:
        session = known[which % len(known)] if known else None
        if kind == "open":
            known.append(sessions.open(f"peer {which % 2}", which % 3, 3, length))
        elif kind == "compute":
            inbox.work()
        elif session is not None and kind == "close":
            sessions.close(session)
            known.remove(session)
        elif session is not None and kind == "step":
            promised = session.promise.pages // -(-session.max_length // PAGE)
            if promised:
                inbox.call(grow, session, min(rows, promised), length)
        elif session is not None:
            before = session.promise.pages
            try:
                sessions.admit(session, rows)
            except (BusyError, CallerError):
                assert session.promise.pages == before
            else:
                assert session.promise.pages * PAGE >= rows * session.max_length
        assert sessions.free_tokens == 100 - PAGE * sum(session.promise.pages for session in known) >= 0
    inbox.work()
    pool.check(table for session in known for table in session.kv.tables)
