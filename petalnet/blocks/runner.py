"""What the compute thread does for a round: bring each session to where its part begins, and take the answers once it was run (`rounds`).

A round's parts share a pass where their keys are equal. What fails is found out part by part, so that only the request at fault hears of
it. Page tables, kept prefixes and kept outputs belong to this thread, and to this module in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import outcome
import torch

from petalnet.blocks.kept import KeptOutputs
from petalnet.blocks.pages import PagePool
from petalnet.blocks.prefixes import PrefixCache
from petalnet.blocks.rounds import Entry, Outcome, Round
from petalnet.blocks.scheduler import Part
from petalnet.blocks.sessions import Session
from petalnet.blocks.spread import AnySpan
from petalnet.blocks.work import StepWork
from petalnet.errors import CallerError
from petalnet.p2p.session_messages import UNIT_TOKENS


class Runner:
    """Runs the rounds of one span. Everything here is for the compute thread."""

    def __init__(
        self,
        span: AnySpan,
        pool: PagePool,
        prefixes: PrefixCache,
        *,
        kept: KeptOutputs | None = None,
        share_prefixes: bool = False,
    ) -> None:
        """
        Args:
            span: has a store of the pool's pages.
            kept: where the outputs of sessions that push are kept.
            share_prefixes: whether peers are given what other peers' sessions have named.
        """
        self._span = span
        self._pool = pool
        self._prefixes = prefixes
        self._kept = kept
        self._share_prefixes = share_prefixes

    def run(self, parts: Sequence[Part]) -> list[Outcome | None]:
        """Run a round from its beginning to its end.

        Returns:
            as `finish`.
        """
        begun = self.begin(parts)
        for visit in range(len(begun.devices)):
            begun.run(visit)
        return self.finish(begun)

    def begin(self, parts: Sequence[Part]) -> Round:
        """Bring each session to where its part begins. Once its visits were run, the round is to be given to `finish`, in the order of
        beginning; sessions may have several rounds under way, which run through their devices in that order too."""
        begun = Round(parts, self._span.stages)
        for part in parts:
            work = part.task.work
            if not isinstance(work, StepWork):
                begun.add_pass(part)
            elif not part.task.units:
                begun.outcomes[part] = _captured(self._run_empty, work)
            else:
                try:
                    begun.add(self._prepare(work, part))
                except Exception as error:  # the boundary of one request: its failure is its own
                    begun.outcomes[part] = outcome.Error(error)
                    self._give_up(work, work.request.position)  # parts before it may be under way
        return begun

    def finish(self, begun: Round) -> list[Outcome | None]:
        """Account for a round that was run.

        Returns:
            For each part None where its task goes on, else the task's outcome: the answer's arrays, or what went wrong.
        """
        outcomes = begun.outcomes
        for entry in begun.entries:
            self._finish_copies(entry)
        for entry in begun.entries:
            result = outcome.Error(entry.error) if entry.error is not None else _captured(self._finish, entry)
            if isinstance(result, outcome.Error):
                self._give_up(entry.work, entry.step.rows.length)
            outcomes[entry.part] = result
        return [outcomes[part] for part in begun.parts]

    def attach(self, session: Session, names: Sequence[Sequence[bytes]]) -> int:
        """Let a fresh session's rows begin with what is kept under their names; the KV entries that each row has then."""
        if not self._span.computes_alike(session.max_length):
            return 0
        owner = self._owner(session)
        found = [self._prefixes.find(owner, row) for row in names]
        pages = min(map(len, found))
        if not pages:
            return 0
        kv = session.kv
        kv.resize(len(names))
        kv.attach([row[:pages] for row in found])
        session.names = [list(row[: kv.length // UNIT_TOKENS]) for row in names]
        return kv.length

    def outputs(self, session: Session, start: int, end: int) -> torch.Tensor | None:
        """The outputs of a session that pushes once more, for positions [start, end): [rows, end - start, hidden]; None where it has not
        come that far, or went back."""
        if self._kept is None or session.kv.length < end:
            return None
        return self._kept.read(session.kv, start, end)

    def resume(self, session: Session, position: int, order: list[int] | None, order_step: int) -> tuple[int, int]:
        """Bring a session back to `position`, and its rows into an order unless the step that this came with has done so.

        Returns:
            its rows and its KV entries; less than `position` where it does not have so many, and then its order is as it was.
        Raises:
            CallerError: the order names rows that there are not, or the rows were put into yet another one since.
        """
        kv = session.kv
        if kv.length < position:
            return len(kv), kv.length
        if order is not None and position and session.ordered > order_step:
            raise CallerError(f"the rows were put into another order by step {session.ordered}, after step {order_step}")
        self._go_back(session, position)
        if order is not None and position and session.ordered < order_step:
            if not all(0 <= row < len(kv) for row in order):
                raise CallerError(f"the order must name rows 0 to {len(kv) - 1}")
            self._reorder(session, order, order_step)
        return len(kv), kv.length

    def release(self, session: Session) -> None:
        """Give a session's pages back; what is named of them is kept for later, as long as nobody needs the room."""
        try:
            self._keep(session)
        finally:
            session.kv.release()
            session.names = []

    def check(self, sessions: Iterable[Session]) -> None:
        """Raise RuntimeError unless these sessions and the kept prefixes hold exactly the pages that the pool counts as held."""
        self._pool.check([*(table for session in sessions for table in session.kv.tables), *self._prefixes.held()])

    @property
    def kept_tokens(self) -> int:
        """Positions that are kept of earlier prompts."""
        return len(self._prefixes) * self._pool.page_tokens

    @property
    def held_tokens(self) -> int:
        """Positions of all pages that sessions hold or that are kept."""
        return (self._pool.pages - self._pool.free) * self._pool.page_tokens

    def _prepare(self, work: StepWork, part: Part) -> Entry:
        """Have the session where the part begins, with pages for its new tokens, which count as there from now on."""
        if part.start == 0:
            self._begin(work)
        kv = work.session.kv
        step = work.part(part.start, part.end)
        copies = kv.prepare(part.end - part.start)
        step.rows = kv.snapshot()
        kv.advance(part.end - part.start)
        return Entry(part, step, copies)

    def _finish_copies(self, entry: Entry) -> None:
        """Copy among the kept outputs what was copied on the devices. Nobody may find the pages that the rows have where that failed: they
        do not hold what was to be copied."""
        session = entry.session
        if not entry.copies:
            return
        if session.pushes and self._kept is not None:
            try:
                self._kept.copy_pages(entry.copies)
            except Exception as error:  # the boundary of one request: its failure is its own
                entry.error, entry.copied = entry.error or error, False
        if not entry.copied:
            session.names = [[] for _ in session.names]

    def _give_up(self, work: StepWork, position: int) -> None:
        """A part has failed, and with it its step: the session goes back to `position`. Other parts of the step may be under way."""
        if not work.failed:
            work.failed = True
            self._go_back(work.session, position)

    def _begin(self, work: StepWork) -> None:
        """Bring the session to where the step begins."""
        session, position, rows = work.session, work.request.position, work.request.hidden.shape[0]
        self._go_back(session, position)
        if position == 0 and len(session.kv) != rows:
            session.kv.resize(rows)
        if work.order is not None:
            self._reorder(session, work.order, work.request.step)
        if len(session.names) != rows:
            session.names = [[] for _ in range(rows)]

    def _go_back(self, session: Session, position: int) -> None:
        if session.kv.length > position:
            session.kv.truncate(position)
            session.names = [names[: position // UNIT_TOKENS] for names in session.names]

    def _reorder(self, session: Session, order: list[int], step: int) -> None:
        session.kv.reorder(order)
        session.names = [session.names[row].copy() for row in order]
        session.ordered = step

    def _finish(self, entry: Entry) -> Any:
        """Account for a part that has run; the answer where it was the last of its task, else None."""
        work, part, piece, session = entry.work, entry.part, entry.piece, entry.session
        if work.failed:
            return None  # by a part before this one, of which the asker has heard
        work.check(part.start, part.end, piece)
        if session.pushes and self._kept is not None and piece is not None:
            rows = entry.step.rows
            self._kept.write(rows, rows.length, piece[-1] if work.request.all_hidden else piece)
        work.take(piece)
        if part.end < part.task.units:
            return None
        if work.names is not None and all(len(names) == work.request.position // UNIT_TOKENS for names in session.names):
            for names, more in zip(session.names, work.names, strict=True):
                names += more
            if work.names[0]:
                self._keep(session)
        return work.answer()

    def _run_empty(self, work: StepWork) -> Any:
        self._begin(work)
        return work.answer()

    def _keep(self, session: Session) -> None:
        if not self._span.computes_alike(session.max_length):
            return  # where the angles of keys depend on how long the session becomes, another may need others
        owner = self._owner(session)
        for names, table in zip(session.names, session.kv.tables, strict=True):
            if names:
                self._prefixes.keep(owner, names, table[: len(names) * UNIT_TOKENS // self._pool.page_tokens])

    def _owner(self, session: Session) -> str:
        """Who may find what the session names. A page has entries in those blocks only that its session goes through, and outputs only if
        that pushes; what an adapter has changed is of no use without it."""
        whose = "" if self._share_prefixes else session.peer_id
        return f"{whose} {session.first}:{session.end}{' pushed' * session.pushes} {session.adapted}"


def _captured(work: Callable[..., Any], *args: Any) -> Outcome | None:
    try:
        value = work(*args)
    except Exception as error:  # the boundary of one request: its failure is its own
        return outcome.Error(error)
    return None if value is None else outcome.Value(value)
