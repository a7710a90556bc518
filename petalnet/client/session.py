"""An inference session: a KV cache that lies on the servers of a route, seen as one object that takes tokens.

`InferenceSession` is what a user holds: synchronous, checks everything before it is sent, and knows what the servers know of each row (how
many entries, which are padding) and what they do not (the token ids). `ServerSide` is its half on the portal's thread.

Rows that begin alike (beams, several answers to one prompt) are sent once, with room promised for all; the order of the next step makes
them many.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from petalnet.client.inputs import Inputs, Names
from petalnet.client.prefix import Prefix, first_name
from petalnet.client.server_side import ServerSide
from petalnet.client.speculation import Lookup
from petalnet.client.trace import Trace
from petalnet.errors import SessionClosed
from petalnet.p2p.fields import Blob
from petalnet.p2p.session_messages import UNIT_TOKENS
from petalnet.p2p.tensors import decode_tensor, encode_tensor

if TYPE_CHECKING:
    from petalnet.client.cache import SessionCache
    from petalnet.client.recovery import Recovery
    from petalnet.client.remote import RemoteSequential
    from petalnet.routing.routes import Hop


class InferenceSession:
    """A KV cache on servers, for a range of blocks; made by `inference_session` of a model or of blocks.

    As a context manager it is also the session that calls of its model or blocks use inside the `with`, in the same thread, without being
    given one.

    Attributes:
        max_length: the most KV entries that a row may take.
        prompt_entries: KV entries before each row's first token that a model's trained prompts take; 0 until they are there.
        drafted, accepted: tokens that were guessed and computed along with others so far, and those of them that were right.
    """

    def __init__(self, blocks: RemoteSequential, max_length: int, promise_rows: int = 0) -> None:
        """
        Args:
            promise_rows: rows that it will have, where that is known: servers set aside room for them as it is opened.
        """
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length needs a number of tokens above 0; got {max_length!r}")
        self.max_length = max_length
        self.drafted = self.accepted = self.prompt_entries = 0
        self._rows: int | None = None  # as the servers hold them
        self._blocks = blocks
        self._position = 0
        self._mask: torch.Tensor | None = None  # bool [rows, position]; None where nothing is padding
        self._pieces: list[torch.Tensor] = []  # ids [rows, any] of entries, and of those that are yet to be computed
        self._noted = 0  # columns of these
        self._order: torch.Tensor | None = None  # which of the servers' rows the next step's rows continue
        self._prefixes: list[Prefix] = []  # of each row, as far as its beginning can be named
        self._ahead: tuple[int, list[Prefix]] | None = None  # position and prefixes with the entries that were set aside
        self.lookup = Lookup()  # the row's ids as the last answer left them, for guesses in the next one
        self._closed: str | None = None
        self._lock = threading.RLock()
        self._portal = blocks.target.swarm.portal
        self._lora_mark = blocks.lora_fingerprint()
        lora = None if self._lora_mark is None else blocks.lora()
        self._lora = None if lora is None else lora[0]
        self._server_side = ServerSide(blocks.target, max_length, promise_rows, blocks.frequencies, self._lora)
        self._portal.start(self._server_side.prepare)
        # Not at exit: then the portal winds down as a whole.
        self._finalizer = weakref.finalize(self, self._portal.start, self._server_side.close)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"<InferenceSession of {self._blocks} at {self._position} of {self.max_length}{', closed' if self.closed else ''}>"

    @property
    def rows(self) -> int | None:
        """Rows of the cache, None before the first step."""
        return self._rows if self._order is None else len(self._order)

    @property
    def position(self) -> int:
        """KV entries of each row so far, trained prompts included.

        May be set back, though not into the midst of the prompts: what comes after is forgotten; at 0 also how many rows there were.
        """
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise ValueError(f"position can be set back to 0 … {self._position}; got {position}")
        if 0 < position < self.prompt_entries:
            raise ValueError(f"position cannot be {position}: the first {self.prompt_entries} entries are the model's trained prompts")
        if position < self._position:
            self._ahead = None
            self._position = position
            self._mask = None if self._mask is None or not position else self._mask[:, :position]
            self.prompt_entries = self.prompt_entries if position else 0
            self._set_tokens([ids[:, : self.tokens] for ids in self._joined_tokens()] if position else [])
            self._prefixes = [prefix.cut(position) for prefix in self._prefixes]

    @property
    def tokens(self) -> int:
        """Tokens of each row so far: `position` without trained prompts."""
        return self._position - self.prompt_entries

    @property
    def ahead(self) -> int:
        """KV entries beyond `position` that `confirm` can make part of it."""
        return 0 if self._ahead is None else self._ahead[0] - self._position

    def set_aside(self, count: int) -> None:
        """The last `count` entries are guesses: they do not count for now. With whatever else is done to the session they are forgotten."""
        ahead = self._position, self._prefixes
        self._position -= count
        if count:
            self._prefixes = [prefix.cut(self._position) for prefix in ahead[1]]
        self._ahead = ahead if count else None

    def confirm(self) -> None:
        """The first of the entries that were set aside counts after all."""
        if self._ahead is None or not self.ahead:
            raise ValueError("there is no entry that was set aside")
        self._position += 1
        self._prefixes = [prefix.cut(self._position) for prefix in self._ahead[1]]

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

    @property
    def recoveries(self) -> list[Recovery]:
        """What was done so far to go on without servers that were lost."""
        return list(self._server_side.recoveries)

    @property
    def trace(self) -> Trace:
        """Where the time went: of the answer under way or, until another step, of the last one; of steps by hand, of all since then."""
        return self._server_side.trace

    def begin_trace(self) -> Trace:
        """From now on steps are of another answer. Returns its trace."""
        trace = self._server_side.trace = Trace(time.perf_counter())
        return trace

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
            MissingBlocksError, ServerError: servers failed, and nobody took their place within the bounds of the settings; the session is
                as it was before, for another try.
        """
        if hypo_ids is not None:
            self.reorder(hypo_ids)
        return self.run(hidden_states, prompts=prompts)[-1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i of the next step goes on from row `rows[i]` (int64 [rows]); rows may be repeated and left out."""
        self.require_open()
        self._ahead = None
        present = self.rows
        rows = rows.detach().to("cpu", torch.int64, copy=True)
        if self._position == 0 and not self._pieces:
            return
        if rows.ndim != 1 or len(rows) == 0 or (present is not None and (int(rows.min()) < 0 or int(rows.max()) >= present)):
            raise ValueError(f"rows must be numbers of the {present} present rows; got {rows.tolist()}")
        self._order = rows if self._order is None else self._order[rows]
        self._mask = None if self._mask is None else self._mask[rows]
        self._set_tokens([tokens[rows] for tokens in self._joined_tokens()])
        self._prefixes = [self._prefixes[row] for row in rows.tolist()] if self._prefixes else []

    def run(
        self,
        hidden_states: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        all_hidden: bool = False,
        keep: int = 0,
        prompt_entries: int = 0,
    ) -> list[torch.Tensor]:
        """`step` with all that a model's `forward` knows.

        Args:
            mask: [rows, position + new] or [rows, new], 0 or False where a token is padding; None: no new token is.
            position_ids: [rows or 1, new]; None for position … position + new - 1.
            all_hidden: return the output of every block, first to last, not only of the last.
            keep: only the outputs of the last `keep` tokens matter, the others may be zeros; 0 where all matter.
            prompt_entries: how many of these, from the first on, are no tokens but trained prompts; only where position is 0.
        """
        with self._lock:
            self.require_open()
            self._ahead = None
            blocks, position = self._blocks, self._position
            blocks.check_hidden(hidden_states)
            self._check_lora()
            rows, new = hidden_states.shape[:2]
            if position and rows != self.rows:
                raise ValueError(f"the session holds {self.rows} rows and was given {rows}")
            if position + new > self.max_length:
                what = f"{position} so far, {new} new{f', {prompt_entries} of them trained prompts' if prompt_entries else ''}"
                raise ValueError(f"{position + new} KV entries ({what}) exceed the session's max_length of {self.max_length}")
            full_mask = self._full_mask(mask, rows, new)
            positions = unusual_positions(position_ids, position, rows, new)
            prompts = None if prompts is None else blocks.check_prompts(prompts, hidden_states)
            if prompts is not None and not bool(prompts.isfinite().all()):
                raise ValueError("prompts must be finite numbers: servers take others for the fault of the one that brought them")
            alike = None
            if rows > 1 and new and not position:
                by_row = None if prompts is None else prompts.transpose(0, 1)
                alike = alike_rows([tensor for tensor in (hidden_states, full_mask, positions, by_row) if tensor is not None])
            sent = encode_tensor(_some_rows(hidden_states, alike))
            prefixes = self._extended_prefixes(sent, usual=full_mask is None and positions is None and prompts is None)
            inputs = Inputs(
                mask=None if full_mask is None else encode_tensor(_some_rows(full_mask, alike)),
                position_ids=None if positions is None else encode_tensor(_some_rows(positions, alike)),
                prompts=None if prompts is None else encode_tensor(prompts if alike is None else prompts[:, alike[0]]),
                all_hidden=all_hidden,
                keep=keep if keep < new and not all_hidden else 0,
                promise_rows=0 if alike is None else rows,
                names=_completed(prefixes, position, position + new),
            )
            order = None if self._order is None or not position else encode_tensor(self._order)
            try:
                outputs = self._portal.run(self._server_side.step, sent, position, order, inputs)
            except BaseException as error:
                if not isinstance(error, Exception):  # the step may yet arrive at some servers
                    self.close(f"a step was interrupted ({type(error).__name__})")
                raise
            self._rows, self._order, self._mask, self._position = sent.shape[0], None, full_mask, position + new
            self._prefixes = prefixes
            self.prompt_entries = self.prompt_entries if position else prompt_entries
            answers = [decode_tensor(output) for output in outputs]
            if not hidden_states.is_cpu:
                answers = [answer.to(hidden_states.device) for answer in answers]
            if alike is not None:
                self._order = torch.tensor(alike[1])
                self._prefixes = [prefixes[like] for like in alike[1]] if prefixes else []
                answers = [answer.index_select(-3, self._order.to(answer.device)) for answer in answers]
            if inputs.keep:
                whole = answers[-1].new_zeros(hidden_states.shape)
                whole[:, -inputs.keep :] = answers[-1]
                return [whole]
            return [boundary for answer in answers for boundary in answer] if all_hidden else answers

    def _extended_prefixes(self, sent: Blob, usual: bool) -> list[Prefix]:
        """What is known of the rows' beginnings once the tokens in `sent` are computed; nothing new where they are not usual ones."""
        rows, new, _ = sent.shape
        if not self._position:
            if self.max_length < 2 * UNIT_TOKENS:
                return []  # too little for anybody to ask for later
            target = self._blocks.target
            adapted = self._portal.run(self._server_side.adapter) if target.settings.active_adapter is not None else ""
            version = "" if self._lora is None else self._lora.version
            origin = first_name(target.model, sent.dtype, target.first, target.settings.wire_precision, (adapted, version))
            self._prefixes = [Prefix(origin)] * rows
        if not usual or not self._prefixes or self._prefixes[0].length < self._position:
            return self._prefixes
        data, size = memoryview(sent.data), len(sent.data) // rows
        return [prefix.extended(data[row * size : (row + 1) * size], new) for row, prefix in enumerate(self._prefixes)]

    def _check_lora(self) -> None:
        """Raises ValueError where the blocks' LoRA parameters are not those any more with which the session began."""
        mark = self._blocks.lora_fingerprint()
        if mark == self._lora_mark:
            return
        present, begun = self._blocks.lora(), self._lora
        if (None if present is None else present[0].version) != (None if begun is None else begun.version):
            raise ValueError("the LoRA parameters of the remote blocks have changed since this session began: begin another one")
        self._lora_mark = mark

    def known_tokens(self, filler: int) -> torch.Tensor | None:
        """Ids of the tokens so far and of ones yet to be computed, int64 [rows, at least `tokens`]; None where there are none at all.

        Tokens whose ids are not known (they came as hidden states) are given as `filler`.
        """
        known = self._joined_tokens()
        if self._noted < self.tokens:
            known = [*known, torch.full((self.rows or 1, self.tokens - self._noted), filler, dtype=torch.int64)]
        return torch.cat(known, dim=1) if known else None

    def note_tokens(self, ids: torch.Tensor, start: int, filler: int = 0) -> None:
        """The tokens from `start` on, and maybe some yet to be computed, have these ids [rows, any]."""
        ids = ids.detach().to("cpu", torch.int64, copy=True)
        if start == self._noted and start:
            self._pieces.append(ids)  # joined when somebody asks: this is on the way of each token
            self._noted += ids.shape[1]
            return
        before = None if start == 0 else self.known_tokens(filler)
        self._set_tokens([ids] if before is None else [before[:, :start], ids])

    def _set_tokens(self, pieces: list[torch.Tensor]) -> None:
        self._pieces, self._noted = pieces, sum(piece.shape[1] for piece in pieces)

    def _joined_tokens(self) -> list[torch.Tensor]:
        """The noted ids as one piece, if there are any."""
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces, dim=1)]
        return self._pieces

    def known_mask(self, length: int) -> torch.Tensor | None:
        """bool [rows, length], False for padding, for the tokens so far and ones beyond; None where nothing is padding."""
        mask = self._mask_of_entries(self.prompt_entries + length)
        return None if mask is None else mask[:, self.prompt_entries :]

    def _mask_of_entries(self, length: int) -> torch.Tensor | None:
        return None if self._mask is None else torch.nn.functional.pad(self._mask, (0, length - self._mask.shape[1]), value=True)

    def _full_mask(self, mask: torch.Tensor | None, rows: int, new: int) -> torch.Tensor | None:
        total = self._position + new
        if mask is None:
            return self._mask_of_entries(total)
        mask = as_mask(mask, rows)
        if mask.shape[1] == total:
            return None if bool(mask.all()) else mask
        if mask.shape[1] != new:
            raise ValueError(f"attention_mask has {mask.shape[1]} columns; {total} (all entries) or {new} (the new ones) are needed")
        before = self._mask_of_entries(self._position)
        if before is None:
            if bool(mask.all()):
                return None
            before = torch.ones(rows, self._position, dtype=torch.bool)
        return torch.cat([before, mask], dim=1)

    def close(self, reason: str = "it was closed") -> None:
        """End the session and free the servers' memory. Does not wait for them. May be called again."""
        if self._closed is None:
            self._closed, self._ahead = reason, None
            self._finalizer()

    def require_open(self) -> None:
        """Raises SessionClosed where the session cannot be used any more."""
        if self._closed is not None:
            raise SessionClosed(f"this session cannot be used any more: {self._closed}")

    def __enter__(self) -> InferenceSession:
        self.require_open()
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


def unusual_positions(position_ids: torch.Tensor | None, position: int, rows: int, new: int) -> torch.Tensor | None:
    """Position ids [rows or 1, new] as int32 [rows, new] on the CPU; None where they are position … position + new - 1 in every row."""
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
    return None if usual else position_ids.to("cpu", torch.int32).expand(rows, new)


def alike_rows(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]] | None:
    """Rows that are equal in all of the tensors [rows, tokens, …], the first of which tells most of them apart.

    Returns:
        the first row of each kind, and for each row the number of its kind; None where no two rows are alike.
    """
    last = encode_tensor(tensors[0][:, -1])
    rows, size = last.shape[0], len(last.data) // last.shape[0]
    firsts: list[int] = []
    kinds: list[int] = []
    candidates: dict[bytes, list[int]] = {}  # kinds by their last tokens
    for row in range(rows):
        similar = candidates.setdefault(bytes(last.data[row * size : (row + 1) * size]), [])
        kind = next((kind for kind in similar if all(torch.equal(tensor[row], tensor[firsts[kind]]) for tensor in tensors)), None)
        if kind is None:
            kind = len(firsts)
            firsts.append(row)
            similar.append(kind)
        kinds.append(kind)
    return (firsts, kinds) if len(firsts) < rows else None


def _some_rows(tensor: torch.Tensor, alike: tuple[list[int], list[int]] | None) -> torch.Tensor:
    """Of rows that are alike the first ones."""
    return tensor if alike is None else tensor[alike[0]]


def _completed(prefixes: list[Prefix], position: int, end: int) -> Names | None:
    """Names of the units that tokens position … end - 1 complete; None where they complete none, or these have no names."""
    start, stop = position // UNIT_TOKENS, end // UNIT_TOKENS
    if start == stop or not prefixes or prefixes[0].length < end:
        return None
    return tuple(prefix.names[start:stop] for prefix in prefixes)
