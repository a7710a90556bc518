"""An inference session: a KV cache that lies on the servers of a route, seen as one object that takes tokens.

`InferenceSession` is what a user holds: synchronous, checks everything before it is sent, and knows what the servers know of each row (how
many entries, which are padding) and what they do not (the token ids). `_ServerSide` is its half on the portal's thread: it opens the
chain of servers ahead of the first step, and opens another one when a server fails before there is anything to lose.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
import trio

from petalnet.client.chain import LONGEST_PAUSE_S, Chain, Inputs, Target
from petalnet.errors import BusyError, CallerError, PetalnetError, ServerError, SessionClosed
from petalnet.p2p.messages import Blob
from petalnet.p2p.tensors import decode_tensor, encode_tensor

if TYPE_CHECKING:
    from petalnet.client.cache import SessionCache
    from petalnet.client.remote import RemoteSequential
    from petalnet.routing.routes import Hop

logger = logging.getLogger(__name__)


class InferenceSession:
    """A KV cache on servers, for a range of blocks; made by `inference_session` of a model or of blocks.

    As a context manager it is also the session that calls of its model or blocks use inside the `with`, in the same thread, without being
    given one.

    Attributes:
        max_length: the most KV entries that a row may take.
        rows: rows of the cache, None before the first step.
    """

    def __init__(self, blocks: RemoteSequential, max_length: int) -> None:
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length needs a number of tokens above 0; got {max_length!r}")
        self.max_length = max_length
        self.rows: int | None = None
        self._blocks = blocks
        self._position = 0
        self._mask: torch.Tensor | None = None  # bool [rows, position]; None where nothing is padding
        self._tokens: torch.Tensor | None = None  # ids of [rows, position] entries, and of those that are yet to be computed
        self._order: torch.Tensor | None = None  # which rows the next step's rows continue
        self._closed: str | None = None
        self._lock = threading.RLock()
        self._portal = blocks.target.swarm.portal
        self._server_side = _ServerSide(blocks.target, max_length)
        self._portal.start(self._server_side.prepare)
        # Not at exit: then the portal winds down as a whole.
        self._finalizer = weakref.finalize(self, self._portal.start, self._server_side.close)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"<InferenceSession of {self._blocks} at {self._position} of {self.max_length}{', closed' if self.closed else ''}>"

    @property
    def position(self) -> int:
        """KV entries of each row so far. May be set back: what comes after is forgotten."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise ValueError(f"position can be set back to 0 … {self._position}; got {position}")
        if position < self._position:
            self._position = position
            self._mask = None if self._mask is None else self._mask[:, :position]
            self._tokens = None if self._tokens is None else self._tokens[:, :position]

    @property
    def closed(self) -> bool:
        return self._closed is not None

    @property
    def cache(self) -> SessionCache:
        """The session in the form in which `transformers` hands KV caches around (`past_key_values`)."""
        from petalnet.client.cache import SessionCache

        return SessionCache(self)

    @property
    def hops(self) -> list[Hop]:
        """The route in use; empty before the first step."""
        chain = self._server_side.chain
        return [] if chain is None else chain.hops

    def step(self, hidden_states: torch.Tensor, prompts: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Run new tokens through the blocks and append them to the cache.

        Args:
            hidden_states: [rows, new, hidden], new ≥ 0.
            prompts: [blocks, rows, prompt length, hidden], added to each block's input at the first positions of this step.
            hypo_ids: int64 [rows], which of the present rows each row goes on from; None for each its own.
        Returns:
            [rows, new, hidden], of the dtype and on the device of `hidden_states`, without gradient.
        Raises:
            ValueError: wrong shape or dtype, or more than `max_length` entries; nothing was sent.
            ServerError: a server failed in mid-session; the session is over.
        """
        if hypo_ids is not None:
            self.reorder(hypo_ids)
        return self.run(hidden_states, prompts=prompts)[-1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i of the next step goes on from row `rows[i]` (int64 [rows]); rows may be repeated and left out."""
        self._check_open()
        present = len(self._order) if self._order is not None else self.rows
        rows = rows.detach().to("cpu", torch.int64)
        if self._position == 0 and self._tokens is None:
            return
        if rows.ndim != 1 or len(rows) == 0 or (present is not None and (int(rows.min()) < 0 or int(rows.max()) >= present)):
            raise ValueError(f"rows must be numbers of the {present} present rows; got {rows.tolist()}")
        self._order = rows if self._order is None else self._order[rows]
        self._mask = None if self._mask is None else self._mask[rows]
        self._tokens = None if self._tokens is None else self._tokens[rows]

    def run(
        self,
        hidden_states: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        all_hidden: bool = False,
    ) -> list[torch.Tensor]:
        """`step` with all that a model's `forward` knows.

        Args:
            mask: [rows, position + new] or [rows, new], 0 or False where a token is padding; None: no new token is.
            position_ids: [rows or 1, new]; None for position … position + new - 1.
            all_hidden: return the output of every block, first to last, not only of the last.
        """
        with self._lock:
            self._check_open()
            blocks, position = self._blocks, self._position
            blocks.check_hidden(hidden_states)
            rows, new = hidden_states.shape[:2]
            present = len(self._order) if self._order is not None else self.rows
            if position and rows != present:
                raise ValueError(f"the session holds {present} rows and was given {rows}")
            if position + new > self.max_length:
                raise ValueError(
                    f"{position + new} KV entries ({position} so far, {new} new) exceed the session's max_length of {self.max_length}"
                )
            full_mask = self._full_mask(mask, rows, new)
            inputs = Inputs(
                mask=None if full_mask is None else encode_tensor(full_mask),
                position_ids=encode_positions(position_ids, position, rows, new),
                prompts=None if prompts is None else encode_tensor(blocks.check_prompts(prompts, hidden_states)),
                all_hidden=all_hidden,
            )
            order = None if self._order is None or not position else encode_tensor(self._order)
            try:
                outputs = self._portal.run(self._server_side.step, encode_tensor(hidden_states), position, order, inputs)
            except BaseException as error:
                # An interrupted step may yet arrive at some servers; and a reordering that some have done must not be done again.
                if not isinstance(error, Exception) or (order is not None and not isinstance(error, SessionClosed)):
                    self.close(f"a step was interrupted ({type(error).__name__})")
                raise
            self.rows, self._order, self._mask, self._position = rows, None, full_mask, position + new
            decoded = [decode_tensor(output).to(hidden_states.device) for output in outputs]
            return [boundary for output in decoded for boundary in output] if all_hidden else decoded

    def known_tokens(self, filler: int) -> torch.Tensor | None:
        """Ids of the cache's entries and of tokens yet to be computed, int64 [rows, at least position]; None where there are none at all.

        Entries whose ids are not known (they came as hidden states) are given as `filler`.
        """
        known = 0 if self._tokens is None else self._tokens.shape[1]
        if known >= self._position:
            return self._tokens
        rows = len(self._order) if self._order is not None else self.rows
        unknown = torch.full((rows or 1, self._position - known), filler, dtype=torch.int64)
        return unknown if self._tokens is None else torch.cat([self._tokens, unknown], dim=1)

    def note_tokens(self, ids: torch.Tensor, start: int, filler: int = 0) -> None:
        """The entries from `start` on, and maybe some yet to be computed, have these ids [rows, any]."""
        before = None if start == 0 else self.known_tokens(filler)
        ids = ids.detach().to("cpu", torch.int64)
        self._tokens = ids if before is None else torch.cat([before[:, :start], ids], dim=1)

    def known_mask(self, length: int) -> torch.Tensor | None:
        """bool [rows, length], False for padding, for the cache's entries and ones beyond; None where nothing is padding."""
        if self._mask is None:
            return None
        return torch.nn.functional.pad(self._mask, (0, length - self._mask.shape[1]), value=True)

    def _full_mask(self, mask: torch.Tensor | None, rows: int, new: int) -> torch.Tensor | None:
        total = self._position + new
        if mask is None:
            return self.known_mask(total)
        mask = as_mask(mask, rows)
        if mask.shape[1] == total:
            return None if bool(mask.all()) else mask
        if mask.shape[1] != new:
            raise ValueError(f"attention_mask has {mask.shape[1]} columns; {total} (all entries) or {new} (the new ones) are needed")
        before = self.known_mask(self._position)
        if before is None:
            if bool(mask.all()):
                return None
            before = torch.ones(rows, self._position, dtype=torch.bool)
        return torch.cat([before, mask], dim=1)

    def close(self, reason: str = "it was closed") -> None:
        """End the session and free the servers' memory. Does not wait for them. May be called again."""
        if self._closed is None:
            self._closed = reason
            self._finalizer()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise SessionClosed(f"this session cannot be used any more: {self._closed}")

    def __enter__(self) -> InferenceSession:
        self._check_open()
        self._blocks.activate(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._blocks.deactivate(self)
        self.close()


def as_mask(mask: torch.Tensor, rows: int) -> torch.Tensor:
    """An attention mask as bool [rows, columns] on the CPU. Raises ValueError where it has another form."""
    if mask.ndim != 2 or mask.shape[0] not in (1, rows):
        raise ValueError(f"attention_mask must have the shape [{rows}, length]; got {list(mask.shape)}")
    return mask.detach().to("cpu", torch.bool).expand(rows, -1)


def encode_positions(position_ids: torch.Tensor | None, position: int, rows: int, new: int) -> Blob | None:
    """The wire form of position ids [rows or 1, new]; None where they are the default, position … position + new - 1."""
    if position_ids is None or new == 0:
        return None
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != new:
        raise ValueError(f"position_ids must have the shape [{rows}, {new}]; got {list(position_ids.shape)}")
    if new == 1:
        usual = all(row == [position] for row in position_ids.tolist())
    else:
        usual = bool((position_ids == torch.arange(position, position + new, device=position_ids.device)).all())
    return None if usual else encode_tensor(position_ids.to("cpu", torch.int32).expand(rows, new))


class _ServerSide:
    """The half of a session that runs on the portal's thread."""

    def __init__(self, target: Target, max_length: int) -> None:
        self.chain: Chain | None = None
        self._target = target
        self._max_length = max_length
        self._lock = trio.Lock()
        self._opening = trio.CancelScope()
        self._error: PetalnetError | None = None  # what `prepare` met; the first step raises it
        self._ended: str | None = None

    async def prepare(self) -> None:
        """Open the chain ahead of the first step."""
        async with self._lock:
            with self._opening:
                try:
                    await self._open()
                except PetalnetError as error:
                    self._error = error

    async def _open(self) -> Chain:
        self._check_open()
        if self.chain is None:
            chain = await Chain.open(self._target, self._max_length)
            try:
                self._check_open()
            except SessionClosed:
                await chain.close()
                raise
            self.chain = chain
        return self.chain

    def _check_open(self) -> None:
        if self._ended is not None:
            raise SessionClosed(f"this session cannot be used any more: {self._ended}")

    async def step(self, hidden: Blob, position: int, order: Blob | None, inputs: Inputs) -> list[Blob]:
        """`Chain.step`, on another chain where a server fails and the caches are empty anyway, and again where a server had no room."""
        async with self._lock:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            retries = 0
            failure: BusyError | ServerError
            while True:
                chain = await self._open()
                try:
                    return await chain.step(hidden, position, order, inputs)
                except BusyError as busy:
                    pause, failure = min(busy.retry_after_s, LONGEST_PAUSE_S), busy
                except CallerError:
                    raise
                except ServerError as error:
                    await self._drop()
                    if position > 0:
                        self._ended = str(error)
                        raise
                    pause, failure = 0.0, error
                except BaseException:
                    await self._drop()
                    self._ended = "a step was interrupted"
                    raise
                limit = self._target.settings.max_retries
                if limit is not None and retries >= limit:
                    raise failure
                retries += 1
                logger.info("trying again (%d): %s", retries, failure)
                await trio.sleep(pause)

    async def _drop(self) -> None:
        chain, self.chain = self.chain, None
        if chain is not None:
            await chain.close()

    async def close(self) -> None:
        self._ended = self._ended or "it was closed"
        self._opening.cancel()
        await self._drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> _ServerSide:
        return self
