"""What the compute thread does in a round: bring each session to where its part begins, run all parts in one pass, take the answers.

A round's parts share a pass where their keys are equal. What fails is found out part by part, so that only the request at fault hears of
it. Pages, page tables and kept prefixes belong to this thread, and to this module in it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import outcome
import torch

from petalnet.blocks.kept import KeptOutputs
from petalnet.blocks.kv import KVStore
from petalnet.blocks.pages import PagePool
from petalnet.blocks.passes import PassWork
from petalnet.blocks.prefixes import PrefixCache
from petalnet.blocks.scheduler import Part
from petalnet.blocks.sessions import Session
from petalnet.blocks.span import Span
from petalnet.blocks.work import StepWork
from petalnet.errors import CallerError
from petalnet.p2p.session_messages import UNIT_TOKENS

log = logging.getLogger(__name__)

Outcome = outcome.Outcome[Any]


class Runner:
    """Runs the rounds of one span. Everything here is for the compute thread."""

    def __init__(
        self,
        span: Span,
        store: KVStore,
        pool: PagePool,
        prefixes: PrefixCache,
        *,
        kept: KeptOutputs | None = None,
        share_prefixes: bool = False,
    ) -> None:
        """
        Args:
            store: what the span was attached to.
            kept: where the outputs of sessions that push are kept.
            share_prefixes: whether peers are given what other peers' sessions have named.
        """
        self._span = span
        self._store = store
        self._pool = pool
        self._prefixes = prefixes
        self._kept = kept
        self._share_prefixes = share_prefixes

    def run(self, parts: Sequence[Part]) -> list[Outcome | None]:
        """Run a round.

        Returns:
            For each part None where its task goes on, else the task's outcome: the answer's arrays, or what went wrong.
        """
        outcomes: dict[Part, Outcome | None] = {}
        packs: dict[Hashable, list[Part]] = {}
        for part in parts:
            work = part.task.work
            if not isinstance(work, StepWork):
                outcomes[part] = _captured(self._run_pass, part)
            elif not part.task.units:
                outcomes[part] = _captured(self._run_empty, work)
            else:
                try:
                    self._prepare(work, part)
                except Exception as error:  # the boundary of one request: its failure is its own
                    outcomes[part] = outcome.Error(error)
                else:
                    packs.setdefault(part.task.key if part.task.key is not None else part, []).append(part)
        for pack in packs.values():
            outcomes.update(self._run_pack(pack))
        return [outcomes[part] for part in parts]

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

    def _prepare(self, work: StepWork, part: Part) -> None:
        """Have the session where the part begins, with pages for its new tokens."""
        if part.start == 0:
            self._begin(work)
        session = work.session
        copies = session.kv.prepare(part.end - part.start)
        if copies:
            try:
                self._store.copy_pages(copies, session.first - self._span.first, session.end - self._span.first)
                if session.pushes and self._kept is not None:
                    self._kept.copy_pages(copies)
            except Exception:
                # Nobody may find the pages that the rows have now: they do not hold what was to be copied.
                session.names = [[] for _ in session.names]
                raise

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

    def _run_pack(self, pack: list[Part]) -> dict[Part, Outcome | None]:
        """Run parts that share a pass, or each by itself where that fails."""
        session = pack[0].task.work.session
        try:
            steps = [part.task.work.part(part.start, part.end) for part in pack]
            with torch.inference_mode():
                outputs = self._span.step(steps, session.first, session.end)
                wanted = [part.task.work.wanted(part.start, part.end, output) for part, output in zip(pack, outputs, strict=True)]
                pieces = _on_host(wanted)
        except Exception as error:  # the boundary of the compute thread: whose fault it is shows below
            traceback.clear_frames(error.__traceback__)  # what the pass had in memory may be what others lack
            if len(pack) == 1:
                return {pack[0]: outcome.Error(error)}
            log.warning("a pass of %d sessions failed (%s); each runs by itself", len(pack), type(error).__name__)
            return {part: result for part in pack for result in self._run_pack([part]).values()}
        return {part: _captured(self._finish, part, piece) for part, piece in zip(pack, pieces, strict=True)}

    def _finish(self, part: Part, piece: torch.Tensor | None) -> Any:
        """Account for a part that has run; the answer where it was the last of its task, else None."""
        work: StepWork = part.task.work
        session = work.session
        work.check(part.start, part.end, piece)
        if session.pushes and self._kept is not None and piece is not None:
            self._kept.write(session.kv, session.kv.length, piece[-1] if work.request.all_hidden else piece)
        session.kv.advance(part.end - part.start)
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

    def _run_pass(self, part: Part) -> Any:
        work: PassWork = part.task.work
        work.part(part.start, part.end)
        return work.answer() if part.end == part.task.units else None

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


def _on_host(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The tensors in the machine's memory; from a device they come in one transfer, which the device waits for once."""
    moved = [tensor for tensor in tensors if tensor is not None and tensor.device.type != "cpu"]
    if not moved:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in moved]).cpu().split([tensor.numel() for tensor in moved])
    parts = iter(flat)
    return [tensor if tensor is None or tensor.device.type == "cpu" else next(parts).view(tensor.shape) for tensor in tensors]


def _captured(work: Callable[..., Any], *args: Any) -> Outcome | None:
    try:
        value = work(*args)
    except Exception as error:  # the boundary of one request: its failure is its own
        return outcome.Error(error)
    return None if value is None else outcome.Value(value)
