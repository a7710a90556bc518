"""The inference sessions of a server, and the promises of KV memory that it has made to them.

A session is promised room for rows × max_length positions at its first step, and more when it gets more rows; the sum of all promises
fits the pool, so no session runs out of memory in mid-answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from petalnet.blocks.cache import SpanCache
from petalnet.blocks.span import Span
from petalnet.errors import BusyError, CallerError

BUSY_RETRY_S = 2.0
"""What a client is told to wait when the pool is full: about a short answer's time."""


@dataclass(eq=False)
class Session:
    """One client's session on blocks [first, end).

    Attributes:
        peer_id: the client.
        max_length: the most positions of a row.
        rows: rows that it has now; 0 before its first step.
        promised: pool units (positions × blocks) that are set aside for it.
        cache: its keys and values; belongs to the compute thread while a step runs.
    """

    peer_id: str
    first: int
    end: int
    max_length: int
    cache: SpanCache
    rows: int = 0
    promised: int = 0

    @property
    def position(self) -> int:
        """KV entries of each row so far."""
        return self.cache.length


class SessionManager:
    """Opens and closes sessions and keeps account of the KV pool."""

    def __init__(self, span: Span, *, max_tokens: int, max_sessions: int = 1024) -> None:
        """
        Args:
            span: what the sessions run on.
            max_tokens: positions that the pool holds for each block of the span.
            max_sessions: the most sessions at a time, with or without promises.
        """
        self._span = span
        self.max_tokens = max_tokens
        self.max_sessions = max_sessions
        self._pool = max_tokens * len(span)
        self._promised = 0
        self._sessions: set[Session] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def free_tokens(self) -> int:
        """Positions, over all blocks of the span, that no session has been promised."""
        return (self._pool - self._promised) // len(self._span)

    def open(self, peer_id: str, first: int, end: int, max_length: int) -> Session:
        """A new session; nothing is promised to it yet.

        Raises:
            CallerError: the blocks are not served here, or a single row of that length can never fit.
            BusyError: there are too many sessions.
        """
        if not self._span.first <= first < end <= self._span.end:
            raise CallerError(f"blocks {first}:{end} are not served here, only {self._span.first}:{self._span.end}")
        limit = self._span.max_positions
        if limit is not None and max_length > limit:
            raise CallerError(f"a session of max_length {max_length} is longer than the {limit} positions that the model knows")
        self._check_possible(1, max_length, end - first)
        if len(self._sessions) >= self.max_sessions:
            raise BusyError(f"all {self.max_sessions} sessions are taken", BUSY_RETRY_S)
        session = Session(peer_id, first, end, max_length, self._span.new_cache(max_length))
        self._sessions.add(session)
        return session

    def admit(self, session: Session, rows: int) -> None:
        """Promise a session room for this many rows; what it was promised for fewer counts.

        Raises:
            CallerError: that many rows can never fit.
            BusyError: they do not fit now.
        """
        blocks = session.end - session.first
        needed = rows * session.max_length * blocks
        if needed > session.promised:
            self._check_possible(rows, session.max_length, blocks)
            free = self._pool - self._promised + session.promised
            if needed > free:
                raise BusyError(
                    f"no room for {rows} rows of {session.max_length} tokens: {free // blocks} tokens of KV cache are free", BUSY_RETRY_S
                )
            self._promised += needed - session.promised
            session.promised = needed

    def close(self, session: Session) -> None:
        """Forget a session and take its promise back; closing twice is harmless."""
        if session in self._sessions:
            self._sessions.remove(session)
            self._promised -= session.promised
            session.promised = 0

    def _check_possible(self, rows: int, max_length: int, blocks: int) -> None:
        most = self._pool // blocks
        if rows * max_length > most:
            raise CallerError(f"{rows} rows of max_length {max_length} exceed the {most} tokens of KV cache that this server has in all")
