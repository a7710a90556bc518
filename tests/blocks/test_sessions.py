"""Promises of KV memory: what is promised fits, and what is given back can be promised again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.blocks.sessions import Session, SessionManager
from petalnet.blocks.span import Span
from petalnet.errors import BusyError, CallerError
from petalnet.models.checkpoint import ModelSource


@pytest.fixture(scope="module")
def span(saved: Callable[..., Path]) -> Span:
    return Span.load(ModelSource.open(saved("llama")), 0, 3)


def test_a_promise_and_its_end(span: Span) -> None:
    sessions = SessionManager(span, max_tokens=100)
    first = sessions.open("a", 0, 3, 30)
    assert sessions.free_tokens == 100, "nothing is promised before the first step"
    sessions.admit(first, 2)
    assert (sessions.free_tokens, first.promised) == (40, 180)
    sessions.admit(first, 2)
    sessions.admit(first, 1)
    assert sessions.free_tokens == 40, "what was promised covers the same rows and fewer"
    second = sessions.open("b", 0, 3, 50)
    with pytest.raises(BusyError, match="no room for 1 rows of 50 tokens: 40 tokens of KV cache are free") as caught:
        sessions.admit(second, 1)
    assert caught.value.retry_after_s > 0
    sessions.close(first)
    sessions.close(first)
    assert sessions.free_tokens == 100
    sessions.admit(second, 1)
    assert (sessions.free_tokens, len(sessions)) == (50, 1)


def test_a_session_on_fewer_blocks_is_promised_less(span: Span) -> None:
    sessions = SessionManager(span, max_tokens=100)
    sessions.admit(sessions.open("a", 1, 2, 300), 1)
    assert sessions.free_tokens == 0
    sessions = SessionManager(span, max_tokens=100)
    sessions.admit(sessions.open("a", 1, 2, 30), 1)
    assert sessions.free_tokens == 90


def test_what_can_never_fit_is_the_callers_fault(span: Span) -> None:
    sessions = SessionManager(span, max_tokens=100)
    with pytest.raises(CallerError, match="1 rows of max_length 101 exceed the 100 tokens"):
        sessions.open("a", 0, 3, 101)
    session = sessions.open("a", 0, 3, 60)
    with pytest.raises(CallerError, match="2 rows of max_length 60 exceed"):
        sessions.admit(session, 2)


@pytest.mark.parametrize("blocks", [(0, 4), (2, 2), (3, 1)])
def test_blocks_that_are_not_served(span: Span, blocks: tuple[int, int]) -> None:
    with pytest.raises(CallerError, match="are not served here, only 0:3"):
        SessionManager(span, max_tokens=100).open("a", *blocks, 10)


def test_longer_than_the_model_knows(saved: Callable[..., Path]) -> None:
    span = Span.load(ModelSource.open(saved("opt")), 0, 1)
    with pytest.raises(CallerError, match="longer than the 40 positions that the model knows"):
        SessionManager(span, max_tokens=100).open("a", 0, 1, 41)


def test_too_many_sessions(span: Span) -> None:
    sessions = SessionManager(span, max_tokens=100, max_sessions=2)
    opened = [sessions.open("a", 0, 1, 1) for _ in range(2)]
    with pytest.raises(BusyError, match="all 2 sessions are taken"):
        sessions.open("b", 0, 1, 1)
    sessions.close(opened[0])
    sessions.open("b", 0, 1, 1)


@given(steps=st.lists(st.tuples(st.sampled_from(["open", "admit", "close"]), st.integers(0, 5), st.integers(1, 60), st.integers(1, 4))))
def test_promises_always_fit(span: Span, steps: list[tuple[str, int, int, int]]) -> None:
    sessions = SessionManager(span, max_tokens=100)
    known: list[Session] = []
    for kind, which, length, rows in steps:
        session = known[which % len(known)] if known else None
        if kind == "open":
            known.append(sessions.open("a", which % 3, 3, length))
        elif session is not None and kind == "close":
            sessions.close(session)
            known.remove(session)
        elif session is not None:
            before = session.promised
            try:
                sessions.admit(session, rows)
            except (BusyError, CallerError):
                assert session.promised == before
            else:
                assert session.promised >= rows * session.max_length * (session.end - session.first)
        promised = sum(session.promised for session in known)
        assert promised <= 300
        assert sessions.free_tokens == (300 - promised) // 3
