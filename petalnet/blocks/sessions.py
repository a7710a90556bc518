"""The inference sessions of a server.

A session has two sides. What it is promised, and how far it has come, belongs to the trio thread: `SessionManager` answers for it. Its page
tables belong to the compute thread, in the order of what that thread is asked to do: a session's pages are given back there after the
last round that may touch them, and before any round of whoever is promised their room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from petalnet.blocks.adapters import Adapter
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.promises import SHORTEST_WAIT_S, NoRoom, Promise, Promises
from petalnet.blocks.spread import AnySpan
from petalnet.errors import BusyError, CallerError, MovedError, TooLargeError


@dataclass(eq=False)
class Session:
    """One client's session on blocks [first, end).

    Attributes:
        peer_id: the client.
        max_length: the most positions of a row.
        promise: the pages that are set aside for it.
        pushes: whether it was opened to send its outputs to another server; then they are kept.
        kv: the page tables of its rows; of the compute thread.
        adapters: LoRA that is applied to all of its tokens.
        adapted: what stands for these, among this server's and this peer's; "" where there are none.
        names: for each row the names of its units, as far as all from the first on are named; of the compute thread.
        ordered: the last step that has put its rows into another order, by its number; -1 for none; of the compute thread.
        begun: whether there was a first step, or an attempt to attach it to what is known.
        rows: rows that it has, as of the last step that was answered; 0 before its first step.
        position: KV entries of each row, likewise.
        waiting: cancelled where the session is given up while it waits for its client's next request; None while it is served.
        idle_since: since when it waits, by the manager's clock; infinite while a step of it is computed.
    """

    peer_id: str
    first: int
    end: int
    max_length: int
    promise: Promise
    kv: Rows
    pushes: bool = False
    adapters: tuple[Adapter, ...] = ()
    adapted: str = ""
    names: list[list[bytes]] = field(default_factory=list)
    ordered: int = -1
    begun: bool = False
    rows: int = 0
    position: int = 0
    waiting: trio.CancelScope | None = None
    idle_since: float = 0.0


class ComputeThread(Protocol):
    """What sessions need of the thread that computes (an `Engine`)."""

    def call(self, work: Callable[..., Any], *args: Any) -> None:
        """Run `work(*args)` there, before any task that is submitted later; does not wait for it."""


class SessionManager:
    """Opens and closes sessions and answers for what they are promised. Iterating gives those that are open."""

    def __init__(
        self,
        span: AnySpan,
        pool: PagePool,
        *,
        compute: ComputeThread,
        release: Callable[[Session], None],
        max_sessions: int = 1024,
        idle_s: float = math.inf,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """
        Args:
            span: what the sessions run on.
            pool: where their pages come from.
            compute: where `release` is run.
            release: gives a closed session's pages back.
            max_sessions: the most sessions at a time, with or without promises.
            idle_s: seconds for which a session may wait for its client while others are refused for want of room.
            clock: the present time in seconds.
        """
        self._span = span
        self._pool = pool
        self._compute = compute
        self._release = release
        self._clock = clock
        self.max_sessions = max_sessions
        self._idle_s = idle_s
        self._promises = Promises(pool.pages)
        self._sessions: dict[Session, None] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    @property
    def max_tokens(self) -> int:
        """Positions that the pool holds for each block of the span."""
        return self._pool.pages * self._pool.page_tokens

    @property
    def free_tokens(self) -> int:
        """Positions that no session has been promised."""
        return self._promises.free * self._pool.page_tokens

    def open(
        self,
        peer_id: str,
        first: int,
        end: int,
        max_length: int,
        *,
        pushes: bool = False,
        network: str = "",
        adapters: tuple[Adapter, ...] = (),
        adapted: str = "",
    ) -> Session:
        """A new session; nothing is promised to it yet.

        Args:
            pushes: whether its outputs go to another server.
            network: from which the peer is connected, by which it counts as well; "" where that is not known.
            adapters, adapted: see `Session`.
        Raises:
            MovedError: the blocks are not served here.
            CallerError: they are none, or the model knows no sessions of that length.
            TooLargeError: a single row of that length can never fit.
            BusyError: there are too many sessions.
        """
        if not self._span.first <= first < end <= self._span.end:
            refusal = MovedError if first < end else CallerError  # the record that the client chose this server by is out of date
            raise refusal(f"blocks {first}:{end} are not served here, only {self._span.first}:{self._span.end}")
        limit = self._span.max_positions
        if limit is not None and max_length > limit:
            raise CallerError(f"a session of max_length {max_length} is longer than the {limit} positions that the model knows")
        self._pages(1, max_length)
        if len(self._sessions) >= self.max_sessions:
            soon = self._give_up_idle(lambda gone: len(gone) >= 1)
            wait_s = SHORTEST_WAIT_S if soon else self._promises.next_end_s(self._clock())
            raise BusyError(f"all {self.max_sessions} sessions are taken", wait_s, self.free_tokens)
        rows = Rows(self._pool, max_length)
        session = Session(peer_id, first, end, max_length, Promise(peer_id, network), rows, pushes, adapters, adapted)
        self._sessions[session] = None
        return session

    def admit(self, session: Session, rows: int) -> None:
        """Promise a session room for this many rows; what it was promised for fewer counts.

        Raises:
            CallerError: the session has ended, while a step of it came from another server.
            TooLargeError: that many rows can never fit.
            BusyError: they do not fit now.
        """
        if session not in self._sessions:
            raise CallerError("the session has ended")
        pages = self._pages(rows, session.max_length)
        try:
            self._promises.extend(session.promise, pages, self._clock())
        except NoRoom as refused:
            missing = pages - refused.available
            soon = self._give_up_idle(lambda gone: sum(one.promise.pages for one in gone) >= missing)
            fits = refused.available * self._pool.page_tokens
            whose = " for a peer with other sessions" if refused.available < self._promises.free + session.promise.pages else ""
            message = f"no room for {rows} rows of {session.max_length} tokens: {fits} tokens of KV cache are free{whose}"
            raise BusyError(message, SHORTEST_WAIT_S if soon else refused.wait_s, fits) from None

    def reached(self, session: Session, rows: int, position: int) -> None:
        """A session has so many rows of so many KV entries now."""
        session.rows, session.position = rows, position
        session.promise.progress = position / session.max_length

    def close(self, session: Session) -> None:
        """Forget a session and take its promise back; closing twice is harmless."""
        if session in self._sessions:
            del self._sessions[session]
            self._promises.end(session.promise, self._clock())
            self._compute.call(self._release, session)

    def idle(self, session: Session) -> trio.CancelScope:
        """The scope in which a session waits for its client's next request; cancelled where it is given up for others' sake."""
        session.idle_since = self._clock()
        session.waiting = trio.CancelScope()
        return session.waiting

    def served(self, session: Session) -> None:
        """The session's next request is there."""
        session.waiting = None

    def idle_s(self, session: Session) -> float:
        """For how long no step of the session has been computed while it waited for its client; negative while one is."""
        return self._clock() - session.idle_since

    @contextmanager
    def computing(self, session: Session) -> Iterator[None]:
        """Within this context a step of the session is computed, whoever brought it."""
        session.idle_since = math.inf
        try:
            yield
        finally:
            session.idle_since = self._clock()

    def _give_up_idle(self, enough: Callable[[list[Session]], bool]) -> bool:
        """Give up sessions whose clients have been away for long, the longest first, until there is room for who is refused now and comes
        again: else anybody could hold all of a server by doing nothing. Whether that gives enough room."""
        before = self._clock() - self._idle_s
        gone: list[Session] = []
        for session in sorted(self._sessions, key=lambda session: session.idle_since):
            if session.idle_since > before or enough(gone):
                break
            if session.waiting is not None:
                session.waiting.cancel()
                gone.append(session)
        return enough(gone)

    def _pages(self, rows: int, max_length: int) -> int:
        """Pages for so many rows; raises TooLargeError where there are not so many in all."""
        pages = rows * -(-max_length // self._pool.page_tokens)
        if pages > self._pool.pages:
            raise TooLargeError(
                f"{rows} rows of max_length {max_length} exceed the {self.max_tokens} tokens of KV cache that this server has in all"
            )
        return pages
