"""What a request may ask for, and whether it makes sense: everything that can be said before any memory is taken or anything is computed.

A peer's request has well-formed fields when it comes here (see `messages`); whether they fit the span, the session and each other is
decided here, by functions that change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from petalnet.blocks.graphs import Graph
from petalnet.blocks.outputs import output_codec, wanted_tokens
from petalnet.blocks.sessions import Session
from petalnet.blocks.spread import AnySpan
from petalnet.errors import CallerError, GraphGone, MovedError, UnsupportedError
from petalnet.p2p.fields import CODECS, FLOATS, INT8_BLOCK, Blob, Message, blob_size
from petalnet.p2p.pass_messages import Backward, Forward
from petalnet.p2p.session_messages import MAX_BLOCKS, MAX_HOPS, MAX_TOKENS, NAME_BYTES, UNIT_TOKENS, Attach, Replay, Resume, Step
from petalnet.p2p.tensors import decode_tensor


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        rows: rows of a batch.
        chunk_tokens: a longer step is run in pieces of at most so many tokens (the scheduler makes them shorter where others wait), which
            bounds the memory for what is between layers.
        forward_tokens: rows × length of a stateless pass.
        scores: attention scores (or entries of a mask) that may be in memory at once: longer steps and larger passes are cut, passes of
            which a single row is too long are refused. The default is 1 GiB in float32, of which there may be a few copies.
        prompt_tokens: length of deep prompts.
        idle_s: seconds without a step after which a session is closed.
        idle_when_full_s: seconds without a step after which a session may be closed when others are refused for want of room: longer than
            a person usually thinks about an answer.
    """

    rows: int = 1024
    chunk_tokens: int = 1024
    forward_tokens: int = 32768
    scores: int = 1 << 28
    prompt_tokens: int = 4096
    idle_s: float = 1800.0
    idle_when_full_s: float = 300.0


class Checks:
    """The checks of requests to one span."""

    def __init__(self, span: AnySpan, limits: Limits) -> None:
        self._span = span
        self._limits = limits

    def rows(self, rows: int) -> None:
        """Raises CallerError where nobody may have so many rows."""
        if not 1 <= rows <= self._limits.rows:
            raise CallerError(f"a batch has 1 to {self._limits.rows} rows, not {rows}")

    def step(self, session: Session, request: Step, payload: int, *, pushes: bool = False) -> list[int] | None:
        """Which of the session's rows each row of a step continues (None: its own), where the step fits its session.

        Args:
            payload: bytes that the answer's message may hold.
            pushes: whether the step goes on to another server from here.
        Raises:
            CallerError: it does not fit.
        """
        rows, new = self._hidden(request.hidden)
        position, blocks = request.position, session.end - session.first
        if position > session.position:
            raise CallerError(f"the step is at position {position}, but the session holds only {session.position}")
        if position + new > session.max_length:
            raise CallerError(f"{position} + {new} tokens exceed the session's max_length {session.max_length}")
        order = None
        if request.order is not None and position > 0:
            order = _order(request.order, rows, session.rows)
        elif position > 0 and rows != session.rows:
            raise CallerError(f"the step has {rows} rows, the session {session.rows}")
        if request.until and request.until < session.end:
            raise CallerError(f"the step ends at block {request.until}, this session only at {session.end}")
        most = blocks if not session.pushes or request.until == session.end else MAX_BLOCKS
        self._extras(request, blocks, position + new, session.max_length, least=blocks + pushes, most=most)
        if pushes and len(request.spent) > 3 * (MAX_HOPS - 1):
            raise CallerError(f"a chain has at most {MAX_HOPS} servers")
        if request.keep > new:
            raise CallerError(f"outputs of {request.keep} tokens are wanted of a step of {new}")
        if request.promise_rows:
            self.rows(request.promise_rows)
        if request.names is not None:
            _names(request.names, rows, (position + new) // UNIT_TOKENS - position // UNIT_TOKENS)
        kept = new if session.pushes and request.until != session.end else wanted_tokens(request)
        self._answer(request, blocks if request.all_hidden else 1, kept, payload - (_extra_bytes(request) if pushes else 0))
        return order

    def resume(self, session: Session, request: Resume) -> list[int] | None:
        """The order into which a session's rows may have to be put, where it can go on as a `Resume` says.

        Raises:
            CallerError: it cannot.
        """
        if not session.rows:
            raise CallerError("a session that has had no step cannot be resumed")
        if request.position > session.position:
            raise CallerError(f"the session holds only {session.position} KV entries, not {request.position}")
        if request.pushes_to and not session.pushes:
            raise CallerError("only a session that was opened to push can do so")
        if request.order is None:
            return None
        self.rows(request.order.shape[0] if request.order.shape else 0)
        return _order(request.order, request.order.shape[0], self._limits.rows)

    def attach(self, session: Session, request: Attach) -> int:
        """For how many rows a session asks for units by their names.

        Raises:
            CallerError: the session has begun, or these are not names of units that it could hold.
        """
        if session.begun:
            raise CallerError("a session is attached to units before its first step, and once")
        shape = request.names.shape
        rows, units = shape[:2] if len(shape) == 3 else (0, 0)
        self.rows(rows)
        if not 1 <= units <= session.max_length // UNIT_TOKENS:
            raise CallerError(f"{units} units of {UNIT_TOKENS} tokens do not fit a session of max_length {session.max_length}")
        _names(request.names, rows, units)
        return rows

    def replay(self, session: Session, request: Replay) -> None:
        """Raises CallerError where a session can never have the outputs that are asked for once more, or should send on what it does not
        have."""
        if not session.pushes:
            raise CallerError("only a session that pushes keeps its outputs")
        if request.position + request.tokens > session.max_length:
            raise CallerError(f"{request.position} + {request.tokens} tokens exceed the session's max_length {session.max_length}")
        if request.until and request.until <= session.end:
            raise CallerError(f"outputs of blocks up to {session.end} are no use to blocks up to {request.until}")
        if request.until and request.position + request.tokens > session.position:
            raise CallerError(f"the session holds only {session.position} KV entries, not {request.position} + {request.tokens}")

    def replayed(self, step: Step, payload: int) -> None:
        """Raises CallerError where such a step, of whose hidden states only the form counts, is too long for one message."""
        self._answer(step, 1, step.hidden.shape[1], payload - _extra_bytes(step))

    def stateless(self, request: Message, payload: int, graph: Graph | None = None) -> Forward | Backward:
        """The request, as a pass that can be run; `payload` and errors as for `step`.

        Args:
            graph: what is kept here for the request.
        Raises:
            GraphGone: nothing is, and there are no inputs.
        """
        if not isinstance(request, (Forward, Backward)):
            raise UnsupportedError(f"this protocol takes forward and backward, not {request.name}")
        span = self._span
        if not span.first <= request.first < request.end <= span.end:
            refusal = MovedError if request.first < request.end else CallerError
            raise refusal(f"blocks {request.first}:{request.end} are not served here, only {span.first}:{span.end}")
        if graph is not None and isinstance(request, Backward):
            if (request.first, request.end) != (graph.first, graph.end):
                raise CallerError(f"graph {graph.number} is of blocks {graph.first}:{graph.end}, not {request.first}:{request.end}")
            _gradient(request.grad_output, graph.shape)
            return request
        if request.hidden is None:
            raise GraphGone("the graph of this pass is not kept here (any more)")
        rows, length = self._hidden(request.hidden)
        blocks = request.end - request.first
        if not 1 <= rows * length <= self._limits.forward_tokens:
            raise CallerError(f"a pass has 1 to {self._limits.forward_tokens} tokens, not {rows} × {length}")
        if not self.rows_at_once(length):
            raise CallerError(f"{length} tokens at once need too much memory for attention: send shorter rows")
        self._extras(request, blocks, length, length)
        if isinstance(request, Forward):
            self._answer(request, blocks if request.all_hidden else 1, length, payload)
        else:
            _gradient(request.grad_output, request.hidden.shape)
        return request

    def tokens_at_once(self, rows: int, total: int) -> int:
        """New tokens of each row of a step, up to position `total`, for which there is memory at once; at least 1."""
        tokens = min(self._limits.chunk_tokens, self._limits.scores // (self._span.score_heads * max(total, 1)))
        return max(1, tokens // rows)

    def rows_at_once(self, length: int) -> int:
        """Rows of a stateless pass for which there is memory at once; 0 where a single one is too long."""
        return self._limits.scores // (self._span.score_heads * length * length)

    def _hidden(self, hidden: Blob) -> tuple[int, int]:
        """(rows, tokens) of hidden states that may be run."""
        if hidden.dtype not in FLOATS or len(hidden.shape) != 3 or hidden.shape[2] != self._span.hidden_size:
            raise CallerError(f"hidden states must be floats [rows, tokens, {self._span.hidden_size}], not {_describe(hidden)}")
        rows, tokens, _ = hidden.shape
        self.rows(rows)
        return rows, tokens

    def _extras(
        self,
        request: Step | Forward | Backward,
        blocks: int,
        total: int,
        longest: int,
        *,
        least: int | None = None,
        most: int | None = None,
    ) -> None:
        """Check mask, positions and prompts.

        Args:
            total: positions, the past included.
            longest: what prompts may not exceed.
            least, most: blocks that prompts may be for, where the blocks' output goes on to others; these blocks alone where not given.
        """
        assert request.hidden is not None
        rows, new, _ = request.hidden.shape
        mask, positions, prompts = request.mask, request.position_ids, request.prompts
        if mask is not None and (mask.dtype != "bool" or mask.shape != (rows, total)):
            raise CallerError(f"the mask must be bool [{rows}, {total}], not {_describe(mask)}")
        limit = self._span.max_positions
        if positions is not None:
            if positions.dtype not in ("int32", "int64") or positions.shape != (rows, new):
                raise CallerError(f"position ids must be int32 [{rows}, {new}], not {_describe(positions)}")
            values = decode_tensor(positions)
            if new and not (values.min() >= 0 and values.max() < (limit or MAX_TOKENS)):
                raise CallerError(f"position ids must be from 0 to {(limit or MAX_TOKENS) - 1}")
        if limit is not None and total > limit:
            raise CallerError(f"{total} tokens are more than the {limit} positions that the model knows")
        if prompts is not None:
            size, longest = self._span.hidden_size, min(longest, self._limits.prompt_tokens)
            given = prompts.shape[0] if prompts.shape else 0
            least, most = least or blocks, most or blocks
            # In a pass, all rows may have the same.
            those = 1 if not isinstance(request, Step) and len(prompts.shape) == 4 and prompts.shape[1] == 1 else rows
            expected = (those, prompts.shape[2] if len(prompts.shape) == 4 else 0, size)
            if prompts.dtype not in FLOATS or not least <= given <= most or prompts.shape[1:] != expected:
                allowed = blocks if most == blocks else f"over {blocks}" if least > blocks else f"at least {blocks}"
                raise CallerError(f"prompts must be floats [{allowed}, {rows}, length, {size}], not {_describe(prompts)}")
            if given > blocks and prompts.codec == "int8" and blocks * math.prod(prompts.shape[1:]) % INT8_BLOCK:
                raise CallerError("prompts of these sizes cannot be cut in codec int8")
            if prompts.shape[2] > longest:
                raise CallerError(f"prompts of {prompts.shape[2]} tokens are longer than {longest}")

    def _answer(self, request: Step | Forward, blocks: int, tokens: int, payload: int) -> None:
        """Check that an output of so many blocks and tokens may be had, in the codec that is asked for, in one message."""
        if request.codec not in CODECS:
            raise CallerError(f"outputs are not to be had in codec {request.codec!r}")
        rows, _, hidden = request.hidden.shape
        shape = (blocks, rows, tokens, hidden)
        size = blob_size(request.hidden.dtype, shape, output_codec(request, shape, self._span.dtype))
        if size > payload:
            raise CallerError(f"the answer would take {size} bytes, more than one message holds: ask for fewer tokens at a time")


def split_names(names: Blob) -> list[list[bytes]]:
    """The names of units in an array that was checked, a list for each row."""
    rows, units, _ = names.shape
    data = bytes(names.data)
    each = [data[start : start + NAME_BYTES] for start in range(0, len(data), NAME_BYTES)]
    return [each[row * units : (row + 1) * units] for row in range(rows)]


def _gradient(gradient: Blob, shape: Sequence[int]) -> None:
    if gradient.dtype not in FLOATS or gradient.shape != tuple(shape):
        raise CallerError(f"the gradient must be floats {list(shape)} as the outputs, not {_describe(gradient)}")


def _extra_bytes(request: Step) -> int:
    """Bytes that go on to the next server beside an output."""
    extras = (request.mask, request.position_ids, request.prompts, request.order, request.names)
    return sum(len(blob.data) for blob in extras if blob is not None)


def _names(names: Blob, rows: int, units: int) -> None:
    if names.dtype != "uint8" or names.shape != (rows, units, NAME_BYTES):
        raise CallerError(f"names of units must be uint8 [{rows}, {units}, {NAME_BYTES}], not {_describe(names)}")


def _order(order: Blob, rows: int, session_rows: int) -> list[int]:
    if order.dtype != "int64" or order.shape != (rows,):
        raise CallerError(f"the order must be int64 [{rows}], not {_describe(order)}")
    values: list[int] = decode_tensor(order).tolist()
    if not (min(values) >= 0 and max(values) < session_rows):
        raise CallerError(f"the order must name rows 0 to {session_rows - 1}")
    return values


def _describe(blob: Blob) -> str:
    return f"{blob.dtype} {list(blob.shape)}"
