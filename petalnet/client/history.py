"""What the first server of a session was given for the KV entries that there are: from it they can be computed anew on any other servers.
Pure: steps come in, steps come out.

The record keeps what was sent in the form in which it went, so that what was rounded on its way is the same the second time, and joins the
many small arrays of decoded tokens now and then. Going back cuts it. How rows were reordered is noted beside the entries that came
next, and looked up backwards when the record is read: beams cost a few numbers a step, and rows that are alike up to an entry are computed
once up to there.

Entries are put together as far as nothing about them changes by that: their mask, what they may be rounded to, and the frequencies of
rotary embeddings that depend on how long the sequence was when they were computed first (see `models.frequencies`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from petalnet.client.inputs import columns
from petalnet.models.frequencies import Frequencies
from petalnet.p2p.fields import Blob, blob_size
from petalnet.p2p.session_messages import KEEP_NONE, UNIT_TOKENS, Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor

SMALL_TOKENS = UNIT_TOKENS
"""Entries that came with fewer tokens are joined, as soon as there are so many of them."""

Cut = Callable[[int, int, int], Sequence[int]]
"""From rows, tokens and position to the ends of the chunks in which these are sent, as `chunks.chunk_ends` gives them."""


class Mark(NamedTuple):
    """A moment of a record, to which it can be set back as long as only tokens were added since."""

    pieces: int
    position: int
    rows: int
    order: list[int] | None


@dataclass(eq=False, slots=True)
class _Mask:
    """The mask of entries that came one after another: bool [rows, all of them], for the rows of each of them."""

    blob: Blob


@dataclass(eq=False, slots=True)
class _Piece:
    """Entries [start, end) that came with one step.

    Attributes:
        hidden: [rows, at least these tokens, hidden].
        order: which rows of the piece before the rows of this one continue; None for each its own.
        mask: None where nothing was padding.
        codec: as of the step.
        position_ids, prompts: as of the step.
        reach: one past the last position of what belonged together; with `position_ids` as of the step, see `_reach`.
    """

    start: int
    end: int
    hidden: Blob
    order: list[int] | None
    mask: _Mask | None
    codec: str
    position_ids: Blob | None
    prompts: Blob | None
    reach: int


class Part(NamedTuple):
    """Entries to be computed anew as one step: everything of it but hidden states.

    Attributes:
        position, end: entries [position, end).
        rows: which rows of the session, as it is now, are computed.
        order: which of the rows of the part before each of these continues; None for each its own.
        mask, position_ids, prompts, reach, codec: as of a step.
    """

    position: int
    end: int
    rows: Sequence[int]
    order: list[int] | None
    mask: Blob | None
    position_ids: Blob | None
    prompts: Blob | None
    reach: int
    codec: str


class History:
    """The record of one session.

    Attributes:
        position: KV entries of each row that all servers have.
        rows: of the session; 0 where nothing came yet.
    """

    def __init__(self, frequencies: Frequencies = Frequencies()) -> None:  # noqa: B008  # a value that never changes
        """
        Args:
            frequencies: of the model's rotary embeddings.
        """
        self.position = 0
        self.rows = 0
        self._frequencies = frequencies
        self._pieces: list[_Piece] = []
        self._order: list[int] | None = None  # which rows of the last piece the session's rows continue
        self._joined = 0  # pieces from the first on that stay as they are

    @property
    def hidden_size(self) -> int:
        """Features of the hidden states; 0 where nothing came yet."""
        return self._pieces[0].hidden.shape[2] if self._pieces else 0

    # ---- what happens

    def note(self, step: Step, hidden: Blob, codec: str) -> None:
        """A step has gone through all servers.

        Args:
            step: with the prompts for all blocks.
            hidden, codec: its hidden states and its codec in the form in which the first server got them.
        """
        position, (rows, new, _) = step.position, hidden.shape
        if position != self.position:
            self.cut(position)
        order = None if step.order is None or not position else _rows_of(step.order)
        if self._order is not None:
            order = self._order if order is None else [self._order[row] for row in order]
        self.rows = rows
        if not new:
            self._order = order
            return
        self._order = None
        # Copies: the arrays that were sent may be memory of the caller's, who may write there once the step is done.
        hidden = _copy(hidden)
        position_ids = None if step.position_ids is None else _copy(step.position_ids)
        prompts = None if step.prompts is None else _copy(step.prompts)
        mask = None if step.mask is None else self._mask_of(_copy(step.mask), position, rows, order)
        end = position + new
        reach = max(end, step.reach) if step.position_ids is None else step.reach  # with positions it may be less than the entries
        self._pieces.append(_Piece(position, end, hidden, order, mask, codec, position_ids, prompts, reach))
        self.position = end

    def reorder(self, order: Blob) -> None:
        """The rows were put into an order without a step."""
        rows = _rows_of(order)
        self._order = rows if self._order is None else [self._order[row] for row in rows]
        self.rows = len(rows)

    def cut(self, position: int) -> None:
        """Forget the entries from `position` on; rows stay in the order that they have, except at 0, where nothing is left."""
        pieces = self._pieces
        if not position:
            pieces.clear()
            self._order, self.rows = None, 0
        while pieces and pieces[-1].start >= position:
            order = pieces.pop().order
            if order is not None:
                self._order = order if self._order is None else [order[row] for row in self._order]
        if pieces and pieces[-1].end > position:
            pieces[-1].end = position
        self.position = min(self.position, position)
        self._joined = min(self._joined, len(pieces))

    def mark(self) -> Mark:
        """The present moment; tokens that come are whole steps after it."""
        if len(self._pieces) - self._joined >= SMALL_TOKENS:
            self._join()
        return Mark(len(self._pieces), self.position, self.rows, self._order)

    def restore(self, mark: Mark) -> None:
        """Forget what came after a moment, orders included."""
        del self._pieces[mark.pieces :]
        self.position, self.rows, self._order = mark.position, mark.rows, mark.order
        self._joined = min(self._joined, len(self._pieces))

    def _mask_of(self, given: Blob, position: int, rows: int, order: list[int] | None) -> _Mask:
        """A step's mask, put in the place of the one before where it only goes on."""
        last = self._pieces[-1].mask if self._pieces else None
        if last is not None and last.blob.shape[0] == rows:
            before, after = _leading(last.blob, position), _leading(given, position)
            if before == after and (order is None or before == [before[row] for row in order]):
                last.blob = given
                return last
        return _Mask(given)

    def _join(self) -> None:
        """Join pieces of few tokens; each is copied once."""
        pieces = self._pieces[self._joined :]
        del self._pieces[self._joined :]
        for group in _grouped(pieces, self._is_joined):
            self._pieces.append(group[0] if len(group) == 1 else self._one_of(group))
        self._joined = len(self._pieces)

    def _is_joined(self, before: _Piece, piece: _Piece) -> bool:
        small = max(before.hidden.shape[1], piece.hidden.shape[1]) < SMALL_TOKENS
        alike = before.hidden.codec == piece.hidden.codec != "int8" and before.hidden.dtype == piece.hidden.dtype
        return small and alike and (before.position_ids is None) == (piece.position_ids is None) and self._belongs(before, piece)

    def _belongs(self, before: _Piece, piece: _Piece) -> bool:
        """Whether a piece may be computed along with the one before."""
        return (
            before.mask is piece.mask
            and before.codec == piece.codec
            and before.prompts is None
            and piece.prompts is None
            and (self._frequencies.alike is None or self._regime(before) == self._regime(piece))
        )

    def _regime(self, piece: _Piece) -> Hashable:
        return self._frequencies.regime(self._reach(piece))

    def _reach(self, piece: _Piece) -> int:
        """One past the last position that the piece's frequencies were for."""
        if piece.position_ids is None or self._frequencies.alike is None:
            return piece.reach
        return max(int(decode_tensor(piece.position_ids).max()) + 1, piece.reach)

    def _one_of(self, group: Sequence[_Piece]) -> _Piece:
        """The pieces as one, with the rows of the last."""
        maps, order = _maps_of(group, range(group[-1].hidden.shape[0]))
        first, last = group[0], group[-1]
        tokens = [piece.end - piece.start for piece in group]
        position_ids = None
        if first.position_ids is not None:
            position_ids = _joined([piece.position_ids for piece in group if piece.position_ids is not None], maps, tokens)
        hidden = _joined([piece.hidden for piece in group], maps, tokens)
        changed = any(piece.order is not None for piece in group)
        reach = max(piece.reach for piece in group)
        return _Piece(first.start, last.end, hidden, order if changed else None, last.mask, last.codec, position_ids, None, reach)

    # ---- reading

    def parts(self, cut: Cut, number: int) -> list[Step]:
        """The same as `steps` for all rows, also where several are alike, without hidden states: these only tell shape and dtype."""
        size, dtype = self.hidden_size, self._pieces[0].hidden.dtype if self._pieces else "float32"
        read = self._read(cut, all_rows=True, with_hidden=False)
        return [
            _step(part, Blob(dtype, (len(part.rows), part.end - part.position, size), "raw", b""), number + count)
            for count, (part, _) in enumerate(read)
        ]

    def steps(self, cut: Cut, number: int) -> list[Step]:
        """The steps that compute all entries anew, in a session that has none, and leave its rows as they are.

        Args:
            number: of the first one; the others count on.
        Returns:
            steps whose outputs nobody wants, with the prompts for all blocks.
        """
        read = self._read(cut, all_rows=False, with_hidden=True)
        return [_step(part, hidden, number + count) for count, (part, hidden) in enumerate(read) if hidden is not None]

    def _read(self, cut: Cut, all_rows: bool, *, with_hidden: bool) -> Iterator[tuple[Part, Blob | None]]:
        pieces = self._pieces
        maps, _ = _maps_of(pieces, range(self.rows) if self._order is None else self._order)
        kinds = [[0] * self.rows]  # for each piece which rows are alike up to its end, by numbers
        for rows in maps:
            numbers: dict[tuple[int, int], int] = {}
            kinds.append([numbers.setdefault((kind, row), len(numbers)) for kind, row in zip(kinds[-1], rows, strict=True)])
        start, before = 0, [0] * self.rows
        for group in _grouped(pieces, self._belongs):
            for run in self._split(group, kinds[start + 1 :], all_rows):
                stop = start + len(run)
                is_last = stop == len(pieces)
                after = list(range(self.rows)) if all_rows or is_last else kinds[stop]
                chosen = [after.index(kind) for kind in range(max(after) + 1)]
                order = [before[row] for row in chosen] if start else None
                if order == list(range(max(before) + 1)):
                    order = None
                yield from self._run(run, [[rows[row] for row in chosen] for rows in maps[start:stop]], chosen, order, cut, with_hidden)
                start, before = stop, after

    def _split(self, group: Sequence[_Piece], kinds: Sequence[Sequence[int]], all_rows: bool) -> Iterator[list[_Piece]]:
        """Parts of a group: where many tokens could be computed for fewer rows than those that follow."""
        run: list[_Piece] = []
        tokens = before = 0
        for piece, kind in zip(group, kinds, strict=False):
            rows = max(kind) + 1
            if run and not all_rows and (rows - before) * tokens >= SMALL_TOKENS:
                yield run
                run, tokens = [], 0
            run.append(piece)
            tokens += piece.end - piece.start
            before = rows
        yield run

    def _run(
        self,
        run: Sequence[_Piece],
        maps: Sequence[Sequence[int]],
        chosen: list[int],
        order: list[int] | None,
        cut: Cut,
        with_hidden: bool,
    ) -> Iterator[tuple[Part, Blob | None]]:
        """Pieces that belong together, in chunks.

        Args:
            maps: for each piece which of its rows are computed.
            chosen: the same for the session's rows.
            order: of the first chunk.
        """
        start, end, last = run[0].start, run[-1].end, run[-1]
        hidden = positions = prompts = mask = None
        if with_hidden:
            hidden = encode_tensor(_tensors([piece.hidden for piece in run], maps, run))
        if any(piece.position_ids is not None for piece in run):
            positions = encode_tensor(_tensors([_positions_of(piece) for piece in run], maps, run))
        if last.prompts is not None:
            prompts = encode_tensor(decode_tensor(last.prompts)[:, list(maps[-1])].contiguous())
        if last.mask is not None:
            mask = encode_tensor(decode_tensor(last.mask.blob)[list(maps[-1])].contiguous())
        reach = max(self._reach(piece) for piece in run)
        at = 0
        for stop in cut(len(chosen), end - start, start):
            part = Part(
                start + at,
                start + stop,
                chosen,
                None if at else order,
                None if mask is None else columns(mask, 0, start + stop),
                None if positions is None else columns(positions, at, stop),
                prompts if prompts is not None and start + at < prompts.shape[2] else None,
                reach,
                last.codec,
            )
            yield part, None if hidden is None else columns(hidden, at, stop)
            at = stop


def _step(part: Part, hidden: Blob, number: int) -> Step:
    """A step whose outputs nobody wants."""
    return Step(
        step=number,
        position=part.position,
        hidden=hidden,
        mask=part.mask,
        position_ids=part.position_ids,
        prompts=part.prompts,
        order=None if part.order is None else encode_tensor(torch.tensor(part.order)),
        keep=KEEP_NONE,
        codec=part.codec,
        reach=part.reach,
    )


def _copy(blob: Blob) -> Blob:
    return Blob(blob.dtype, blob.shape, blob.codec, bytearray(blob.data))


def _rows_of(order: Blob) -> list[int]:
    rows: list[int] = decode_tensor(order).tolist()
    return rows


def _maps_of(pieces: Sequence[_Piece], rows: Sequence[int]) -> tuple[list[Sequence[int]], list[int]]:
    """For some rows of the last of these pieces the rows of each that they go on from, and the rows before the first one."""
    maps: list[Sequence[int]] = []
    for piece in reversed(pieces):
        maps.append(rows)
        if piece.order is not None:
            rows = [piece.order[row] for row in rows]
    return maps[::-1], list(rows)


def _grouped(pieces: Sequence[_Piece], belongs: Callable[[_Piece, _Piece], bool]) -> Iterator[list[_Piece]]:
    """Neighbours that belong together."""
    group: list[_Piece] = []
    for piece in pieces:
        if group and not belongs(group[-1], piece):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _leading(mask: Blob, length: int) -> list[bytes]:
    """The first columns of each row of a mask."""
    rows, width = mask.shape
    data = bytes(mask.data)
    return [data[row * width : row * width + length] for row in range(rows)]


def _joined(blobs: Sequence[Blob], maps: Sequence[Sequence[int]], tokens: Sequence[int]) -> Blob:
    """Arrays [rows, tokens, …] one after another along the tokens.

    Args:
        maps: for each array its rows.
        tokens: how many of each array's tokens count.
    """
    first = blobs[0]
    size = blob_size(first.dtype, first.shape[2:], first.codec)
    rows = len(maps[0])
    data = bytearray().join(
        [
            memoryview(blob.data)[chosen[row] * blob.shape[1] * size : (chosen[row] * blob.shape[1] + count) * size]
            for row in range(rows)
            for blob, chosen, count in zip(blobs, maps, tokens, strict=True)
        ]
    )
    return Blob(first.dtype, (rows, sum(tokens), *first.shape[2:]), first.codec, data)


def _tensors(blobs: Sequence[Blob], maps: Sequence[Sequence[int]], run: Sequence[_Piece]) -> torch.Tensor:
    """The same as tensors, whatever codecs the arrays are in."""
    parts = []
    for blob, rows, piece in zip(blobs, maps, run, strict=True):
        tensor = decode_tensor(blob)[:, : piece.end - piece.start]
        parts.append(tensor if list(rows) == list(range(blob.shape[0])) else tensor[list(rows)])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _positions_of(piece: _Piece) -> Blob:
    """A piece's positions, also where they are the usual ones."""
    if piece.position_ids is not None:
        return piece.position_ids
    rows, tokens = piece.hidden.shape[:2]
    return encode_tensor(torch.arange(piece.start, piece.start + tokens, dtype=torch.int32).expand(rows, tokens).contiguous())
