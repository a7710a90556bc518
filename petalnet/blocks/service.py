"""Answers peers that want blocks run: inference sessions on one protocol, stateless forward and backward passes on another.

Whatever arrives is checked here against the span and the session before it reaches the compute thread. A request that is wrong gets a
typed error and harms nobody else; the stream lives on where it makes sense.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import trio

from petalnet.blocks.engine import Engine
from petalnet.blocks.sessions import Session, SessionManager
from petalnet.blocks.span import Span
from petalnet.blocks.work import StepWork, run_backward, run_forward
from petalnet.errors import BusyError, CallerError, PeerLost, PetalnetError, UnsupportedError
from petalnet.p2p.messages import (
    FLOATS,
    MAX_TOKENS,
    NAME_BYTES,
    UNIT_TOKENS,
    Attach,
    Attached,
    Backward,
    BackwardDone,
    Blob,
    Error,
    Forward,
    ForwardDone,
    Message,
    OpenSession,
    SessionOpened,
    Step,
    StepDone,
    blob_size,
)
from petalnet.p2p.tensors import decode_tensor

if TYPE_CHECKING:
    from petalnet.p2p.streams import Stream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        rows: rows of a batch.
        chunk_tokens: a longer step is run in pieces of this many tokens, so that other sessions' steps come in between and the memory
            for attention scores stays small.
        forward_tokens: rows × length of a stateless pass, which cannot be cut into pieces.
        scores: attention scores (or entries of a mask) that may be in memory at once: longer steps are cut, longer passes refused. The
            default is 1 GiB in float32, of which there may be a few copies.
        prompt_tokens: length of deep prompts.
        idle_s: seconds without a step after which a session is closed.
    """

    rows: int = 1024
    chunk_tokens: int = 1024
    forward_tokens: int = 32768
    scores: int = 1 << 28
    prompt_tokens: int = 4096
    idle_s: float = 1800.0


class BlockService:
    """Serves one span. Register `handle_inference` and `handle_forward` for their protocols; `engine` must be running meanwhile.

    Attributes:
        draining: set by `drain`: open sessions go on, new work is refused as *busy*.
    """

    def __init__(self, span: Span, engine: Engine, sessions: SessionManager, *, model: str, limits: Limits | None = None) -> None:
        """
        Args:
            model: the discovery key of the model whose blocks these are; requests that name another are refused.
        """
        self.span = span
        self.engine = engine
        self.sessions = sessions
        self.model = model
        self.limits = limits or Limits()
        self.draining = False
        self._scopes: dict[str, set[trio.CancelScope]] = {}

    def drain(self) -> None:
        """Take no new sessions and no stateless passes from now on."""
        self.draining = True

    def peer_lost(self, peer_id: str) -> None:
        """Drop at once what a vanished peer had open here; to be called in the trio thread when its last connection is gone."""
        for scope in self._scopes.pop(peer_id, ()):
            scope.cancel()

    async def handle_inference(self, stream: Stream) -> None:
        """Serve one stream: an `OpenSession`, then `Step` after `Step`. The session ends with the stream."""
        await self._guarded(stream, self._serve_session)

    async def handle_forward(self, stream: Stream) -> None:
        """Serve one stream of `Forward` and `Backward` requests, each on its own."""
        await self._guarded(stream, self._serve_passes)

    async def _guarded(self, stream: Stream, serve: Callable[[Stream], Awaitable[None]]) -> None:
        peer_id = stream.peer_id
        with trio.CancelScope() as scope:
            self._scopes.setdefault(peer_id, set()).add(scope)
            try:
                await serve(stream)
            except PeerLost:
                log.debug("peer %s went away", peer_id)
            finally:
                scopes = self._scopes.get(peer_id, set())
                scopes.discard(scope)
                if not scopes:
                    self._scopes.pop(peer_id, None)

    async def _serve_session(self, stream: Stream) -> None:
        request = await self._receive(stream)
        if request is None:
            return
        try:
            if not isinstance(request, OpenSession):
                raise UnsupportedError(f"a session begins with open_session, not {request.name}")
            self._check_model(request.model)
            session = self.sessions.open(stream.peer_id, request.first, request.end, request.max_length)
        except PetalnetError as error:
            await stream.send(Error.of(error))
            return
        log.debug("session of %s on blocks %d:%d opened", stream.peer_id, session.first, session.end)
        try:
            await stream.send(SessionOpened(self.sessions.free_tokens))
            while (request := await self._receive(stream)) is not None:
                try:
                    if isinstance(request, Attach):
                        self._check_attach(session, request)
                        await stream.send(Attached(0))
                        continue
                    work = self._check_step(stream, session, request)
                except PetalnetError as error:
                    await stream.send(Error.of(error))
                    continue
                try:
                    answer = await self._run_step(work)
                except PetalnetError as error:
                    # Half a step may be done: nobody could go on from here, so the session ends.
                    await stream.send(Error.of(error))
                    return
                await stream.send(answer)
        finally:
            self.sessions.close(session)
            log.debug("session of %s on blocks %d:%d closed at position %d", stream.peer_id, session.first, session.end, session.position)

    async def _serve_passes(self, stream: Stream) -> None:
        while (request := await self._receive(stream)) is not None:
            try:
                answer: Message = await self._run_pass(self._check_pass(stream, request))
            except PetalnetError as error:
                answer = Error.of(error)
            await stream.send(answer)

    async def _receive(self, stream: Stream) -> Message | None:
        """The next message; None at the end of the stream, or when none came for so long that the stream is to be closed."""
        with trio.move_on_after(self.limits.idle_s):
            return await stream.receive()
        await stream.send(Error.of(CallerError(f"nothing came for {self.limits.idle_s:g} s; this stream is closed")))
        return None

    async def _run_step(self, work: StepWork) -> StepDone:
        """Run a checked step, in pieces where it is long."""
        request = work.request
        rows, new, _ = request.hidden.shape
        tokens = min(self.limits.chunk_tokens, self.limits.scores // (self.span.score_heads * max(request.position + new, 1)))
        piece = max(1, tokens // rows)
        if new <= piece:
            result = await self.engine.submit(work.whole)
            blob, queue_s, compute_s = result.value, result.queue_s, result.compute_s
        else:
            pieces, queue_s, compute_s = [], 0.0, 0.0
            for start in range(0, new, piece):
                part = await self.engine.submit(work.piece, start, min(new, start + piece))
                pieces.append(part.value)
                queue_s, compute_s = queue_s + part.queue_s, compute_s + part.compute_s
            blob = (await self.engine.submit(work.encode, pieces)).value
        return StepDone(request.step, request.position + new, blob, compute_s, queue_s)

    async def _run_pass(self, request: Forward | Backward) -> Message:
        answer: Message
        if isinstance(request, Forward):
            forward = await self.engine.submit(run_forward, self.span, request)
            answer = ForwardDone(forward.value, forward.compute_s, forward.queue_s)
        else:
            backward = await self.engine.submit(run_backward, self.span, request)
            answer = BackwardDone(*backward.value, backward.compute_s, backward.queue_s)
        return answer

    def _check_step(self, stream: Stream, session: Session, request: Message) -> StepWork:
        """What to compute for a step that fits its session, once the session has been promised the room for it."""
        if not isinstance(request, Step):
            raise UnsupportedError(f"a session takes step, not {request.name}")
        rows, new = self._check_hidden(request.hidden)
        position, blocks = request.position, session.end - session.first
        if position > session.position:
            raise CallerError(f"the step is at position {position}, but the session holds only {session.position}")
        if position + new > session.max_length:
            raise CallerError(f"{position} + {new} tokens exceed the session's max_length {session.max_length}")
        order = None
        if request.order is not None and position > 0:
            order = self._check_order(request.order, rows, session.rows)
        elif position > 0 and rows != session.rows:
            raise CallerError(f"the step has {rows} rows, the session {session.rows}")
        self._check_extras(request, blocks, position + new, session.max_length)
        if request.keep > new:
            raise CallerError(f"outputs of {request.keep} tokens are wanted of a step of {new}")
        if request.promise_rows > self.limits.rows:
            raise CallerError(f"a batch has 1 to {self.limits.rows} rows, not {request.promise_rows}")
        if request.names is not None:
            self._check_names(request.names, rows, (position + new) // UNIT_TOKENS - position // UNIT_TOKENS)
        self._check_answer(stream, request.hidden, blocks if request.all_hidden else 1, request.keep or new)
        self.sessions.admit(session, max(rows, request.promise_rows))
        return StepWork(self.span, session, request, order)

    def _check_attach(self, session: Session, request: Attach) -> None:
        """Raises CallerError, BusyError where a session cannot be attached to these units, or there is no room for it."""
        if session.rows:
            raise CallerError("a session is attached to units before its first step, not later")
        rows, units = request.names.shape[:2] if len(request.names.shape) == 3 else (0, 0)
        if not 1 <= rows <= self.limits.rows:
            raise CallerError(f"a batch has 1 to {self.limits.rows} rows, not {rows}")
        if not 1 <= units <= session.max_length // UNIT_TOKENS:
            raise CallerError(f"{units} units of {UNIT_TOKENS} tokens do not fit a session of max_length {session.max_length}")
        self._check_names(request.names, rows, units)
        self.sessions.admit(session, rows)

    def _check_pass(self, stream: Stream, request: Message) -> Forward | Backward:
        if not isinstance(request, (Forward, Backward)):
            raise UnsupportedError(f"this protocol takes forward and backward, not {request.name}")
        self._check_model(request.model)
        if not self.span.first <= request.first < request.end <= self.span.end:
            raise CallerError(f"blocks {request.first}:{request.end} are not served here, only {self.span.first}:{self.span.end}")
        rows, length = self._check_hidden(request.hidden)
        blocks = request.end - request.first
        if not 1 <= rows * length <= self.limits.forward_tokens:
            raise CallerError(f"a pass has 1 to {self.limits.forward_tokens} tokens, not {rows} × {length}")
        if rows * length * length * self.span.score_heads > self.limits.scores:
            raise CallerError(f"{rows} × {length} tokens at once need too much memory for attention: send fewer rows or shorter ones")
        self._check_extras(request, blocks, length, length)
        if isinstance(request, Forward):
            self._check_answer(stream, request.hidden, blocks if request.all_hidden else 1, length)
        elif request.grad_output.dtype not in FLOATS or request.grad_output.shape != request.hidden.shape:
            raise CallerError(f"the gradient {_describe(request.grad_output)} does not match the inputs {_describe(request.hidden)}")
        return request

    def _check_model(self, model: str) -> None:
        if model != self.model:
            raise CallerError("another model is served here")
        if self.draining:
            raise BusyError("the server is shutting down", 60.0)

    def _check_hidden(self, hidden: Blob) -> tuple[int, int]:
        """(rows, tokens) of hidden states that may be run."""
        if hidden.dtype not in FLOATS or len(hidden.shape) != 3 or hidden.shape[2] != self.span.hidden_size:
            raise CallerError(f"hidden states must be floats [rows, tokens, {self.span.hidden_size}], not {_describe(hidden)}")
        rows, tokens, _ = hidden.shape
        if not 1 <= rows <= self.limits.rows:
            raise CallerError(f"a batch has 1 to {self.limits.rows} rows, not {rows}")
        return rows, tokens

    def _check_extras(self, request: Step | Forward | Backward, blocks: int, total: int, longest: int) -> None:
        """Check mask, positions and prompts. `total`: positions, the past included; `longest`: what prompts may not exceed."""
        rows, new, _ = request.hidden.shape
        mask, positions, prompts = request.mask, request.position_ids, request.prompts
        if mask is not None and (mask.dtype != "bool" or mask.shape != (rows, total)):
            raise CallerError(f"the mask must be bool [{rows}, {total}], not {_describe(mask)}")
        limit = self.span.max_positions
        if positions is not None:
            if positions.dtype not in ("int32", "int64") or positions.shape != (rows, new):
                raise CallerError(f"position ids must be int32 [{rows}, {new}], not {_describe(positions)}")
            values = decode_tensor(positions)
            if new and not (values.min() >= 0 and values.max() < (limit or MAX_TOKENS)):
                raise CallerError(f"position ids must be from 0 to {(limit or MAX_TOKENS) - 1}")
        if limit is not None and total > limit:
            raise CallerError(f"{total} tokens are more than the {limit} positions that the model knows")
        if prompts is not None:
            expected = (blocks, rows, prompts.shape[2] if len(prompts.shape) == 4 else 0, self.span.hidden_size)
            if prompts.dtype not in FLOATS or prompts.shape != expected:
                raise CallerError(f"prompts must be floats [{blocks}, {rows}, length, {self.span.hidden_size}], not {_describe(prompts)}")
            if prompts.shape[2] > min(longest, self.limits.prompt_tokens):
                raise CallerError(f"prompts of {prompts.shape[2]} tokens are longer than {min(longest, self.limits.prompt_tokens)}")

    @staticmethod
    def _check_names(names: Blob, rows: int, units: int) -> None:
        if names.dtype != "uint8" or names.shape != (rows, units, NAME_BYTES):
            raise CallerError(f"names of units must be uint8 [{rows}, {units}, {NAME_BYTES}], not {_describe(names)}")

    @staticmethod
    def _check_answer(stream: Stream, hidden: Blob, blocks: int, tokens: int) -> None:
        size = blocks * blob_size(hidden.dtype, (hidden.shape[0], tokens, hidden.shape[2]), hidden.codec)
        if size > stream.protocol.limits.payload:
            raise CallerError(f"the answer would take {size} bytes, more than one message holds: ask for fewer tokens at a time")

    @staticmethod
    def _check_order(order: Blob, rows: int, session_rows: int) -> torch.Tensor:
        if order.dtype != "int64" or order.shape != (rows,):
            raise CallerError(f"the order must be int64 [{rows}], not {_describe(order)}")
        values = decode_tensor(order)
        if not (values.min() >= 0 and values.max() < session_rows):
            raise CallerError(f"the order must name rows 0 to {session_rows - 1}")
        return values


def _describe(blob: Blob) -> str:
    return f"{blob.dtype} {list(blob.shape)}"
