"""Attention over pages by the library's fused kernels, row by row: exact, on every device.

A pass is taken apart into pieces (some new tokens of one row) and rows of one new token each. Keys and values are read where they lie if
the row's pages are consecutive, and copied together if they are not. What is the same for all blocks of a pass, such as masks, is computed
once, in a `Plan`.

What the choices rest on was measured on a CPU with one thread:
- One new token of grouped heads is put to the kernel as a few queries of each KV head, which needs neither a mask nor repeated keys.
  The same pays for some more tokens (`GROUPED_QUERIES`), though these need a mask; beyond, the kernel's own way is faster.
- A mask of numbers that is made once a pass costs less than one of truth values, which the kernel converts in each block. Attending to the
  past and to the new tokens apart, so as to need no mask for the past, is no faster.
- One new token attends to a few long stretches of pages apart, and what it saw is put together by the kernel's sums, for less than copying
  them costs. Rows that share a stretch (beams, a prompt in common) read it once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from petalnet.blocks.attention import Batch, Segment
from petalnet.blocks.kv import KVStore

GROUPED_QUERIES = 64
"""Up to so many queries of a KV head (new tokens × heads that share it) are attended as one group."""

LEAST_EXTENT = 384 << 10
"""Bytes of keys and values that the stretches of a row's consecutive pages must have on the average for the row to be attended where it
lies, stretch by stretch; copying so much costs what a further call of the kernel does."""

MOST_QUERIES = 256
"""New tokens in a piece, where a piece needs less than all keys of its row or memory for each query and key."""

MOST_SCORES = 1 << 22
"""Scores in memory at once, where they differ between heads and are kept."""


@dataclass(eq=False, slots=True)
class _Piece:
    """Some new tokens of one row, and the keys that they attend to.

    Attributes:
        start, tokens: its columns in the packed row.
        first, end: positions of the keys.
        slot: the slot of the first key where the row's pages are consecutive, else None.
        pages: the row's pages where they are not.
        grouped: whether the heads that share a KV head are its queries: [1, KV heads, group × tokens, size].
        bias: what is added to scores, -inf where nothing is to be seen; broadcasts over [1, heads, tokens, keys], or when grouped
            [1, KV heads, group × tokens, keys].
        causal: the kernel's own causal mask does instead.
        blind: nothing but padding, which sees nothing: its output is zero.
    """

    start: int
    tokens: int
    first: int = 0
    end: int = 0
    slot: int | None = None
    pages: Tensor | None = None
    grouped: bool = True
    bias: Tensor | None = None
    causal: bool = False
    blind: bool = False


@dataclass(frozen=True)
class _Extent:
    """Consecutive slots that hold consecutive positions of a row: `shift` is the first one's position, counted from the first key."""

    slot: int
    count: int
    shift: int


@dataclass(eq=False, slots=True)
class _Rows:
    """Rows with one new token each, one after the other in the packed row, whose keys are read where they lie.

    Attributes:
        start, rows: the columns in the packed row.
        calls: (first row, rows, slot, keys, bias): rows that attend to the same slots do it together.
        parts: int64 [rows, parts]: which of the results of all calls (counted by rows) make up a row's; the number of results where there
            is none. None when each row has one result, in order.
    """

    start: int
    rows: int
    calls: list[tuple[int, int, int, int, Tensor | None]]
    parts: Tensor | None


class SlopeTables:
    """slope × position for each head: computed once, as long as the longest row was."""

    def __init__(self) -> None:
        self._tables: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def of(self, slopes: Tensor, positions: int, like: Tensor) -> Tensor:
        """slope × position, [heads, at least `positions`], in the dtype of `like`, as the library rounds it."""
        name = (id(slopes), like.dtype)
        known = self._tables.get(name)
        if known is None or known[1].shape[1] < positions:
            room = 1 << max(positions - 1, 1023).bit_length()
            table = slopes.to(like.device)[:, None] * torch.arange(room, device=like.device)
            known = self._tables[name] = (slopes, table.to(like.dtype))
        return known[1]


class Plan:
    """Takes a pass apart, once for all blocks that are alike."""

    def __init__(
        self,
        tables: SlopeTables,
        batch: Batch,
        segments: Sequence[int],
        store: KVStore,
        block: int,
        query: Tensor,
        window: int | None,
        slopes: Tensor | None,
        softcap: float | None,
        sinks: Tensor | None,
        chunked: bool = False,
        over_padding: bool = False,
    ) -> None:
        """
        Args:
            segments: which of the batch's segments, in order; `attend` returns their new tokens one after the other.
            store, block, query: of any block that is alike; only their shapes count.
            window, chunked, slopes, over_padding: see `Backend.attend`.
        """
        self._kernel = _kernel_for(query, store.head_values[block], softcap, sinks)
        self._batch = batch
        self._heads, self._kv_heads, self._device = query.shape[1], store.shapes[block].heads, query.device
        self._bytes = store.shapes[block].bytes(store.dtype)
        self._window, self._chunked, self._slopes = window, chunked, slopes
        self._biases = _Biases(tables, query, self._kv_heads, window, slopes, over_padding)
        self._parts = self._take_apart(segments)
        only = self._parts[0]
        # A single stream in mid-answer: a pass of one token whose row is in consecutive pages.
        self._only = only.calls[0] if query.shape[2] == 1 and isinstance(only, _Rows) and only.parts is None else None

    def attend(self, store: KVStore, block: int, query: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attend to what the store holds.

        Returns:
            [1, tokens, KV heads, group, value size] for a query [1, heads, all tokens of the pass, key size].
        """
        if self._only is not None:
            _, _, slot, count, bias = self._only
            return F.scaled_dot_product_attention(
                query.view(1, self._kv_heads, -1, query.shape[3]),
                store.head_keys[block].narrow(2, slot, count),
                store.head_values[block].narrow(2, slot, count),
                attn_mask=bias,
                scale=scale,
            ).unsqueeze(1)
        outputs = [
            _attend_rows(part, store, block, query, scale)
            if isinstance(part, _Rows)
            else _attend_piece(part, store, block, query, scale, softcap, sinks, self._kernel)
            for part in self._parts
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _take_apart(self, segments: Sequence[int]) -> list[_Piece | _Rows]:
        """The pieces in the order of their columns; rows with one new token each together where that is possible."""
        parts: list[_Piece | _Rows] = []
        rows: list[tuple[Segment, list[_Extent]]] = []
        following = -1
        for index in segments:
            segment = self._batch.segments[index]
            if rows and segment.start != following:  # others stand in between
                parts.append(self._rows(rows))
                rows = []
            following = segment.end
            extents = self._extents(segment)
            if extents is not None:
                rows.append((segment, extents))
                continue
            if rows:
                parts.append(self._rows(rows))
                rows = []
            parts += self._pieces(index, segment)
        if rows:
            parts.append(self._rows(rows))
        return parts

    def _extents(self, segment: Segment) -> list[_Extent] | None:
        """Where the keys of a row's one new token lie; None where it is not one, or where copying them together is better."""
        if (
            segment.end - segment.start > 1
            or segment.mask is not None
            or segment.first > segment.past
            or self._kernel not in ("any", "sums")
        ):
            return None
        first = max(segment.first, self._first_seen(segment, segment.past))
        shift = first - segment.first
        if segment.run is not None:
            return [_Extent(segment.run + first, segment.total - first, shift)]
        if self._kernel == "any":
            return None
        size = self._batch.page_tokens
        extents: list[_Extent] = []
        at = first
        while at < segment.total:
            page = at // size
            last = page
            while (last + 1) * size < segment.total and segment.pages[last + 1] == segment.pages[last] + 1:
                last += 1
            end = min((last + 1) * size, segment.total)
            extents.append(_Extent(segment.pages[page] * size + at % size, end - at, shift + at - first))
            at = end
        return extents if len(extents) * LEAST_EXTENT <= (segment.total - first) * self._bytes else None

    def _rows(self, rows: list[tuple[Segment, list[_Extent]]]) -> _Rows:
        calls: list[tuple[int, int, _Extent]] = []
        latest: dict[_Extent, int] = {}  # the call that the row before took part in
        for row, (_, extents) in enumerate(rows):
            before, latest = latest, {}
            for extent in extents:
                call = before.get(extent)
                if call is None:
                    call = len(calls)
                    calls.append((row, 0, extent))
                calls[call] = (calls[call][0], calls[call][1] + 1, extent)
                latest[extent] = call
        parts = None
        if any(len(extents) > 1 for _, extents in rows):
            of_row: list[list[int]] = [[] for _ in rows]
            result = 0
            for first, count, _ in calls:
                for row in range(first, first + count):
                    of_row[row].append(result)
                    result += 1
            most = max(len(results) for results in of_row)
            parts = torch.tensor([results + [result] * (most - len(results)) for results in of_row], device=self._device)
        with_bias = [(first, count, e.slot, e.count, self._biases.of_extent(e.shift, e.count, count)) for first, count, e in calls]
        return _Rows(rows[0][0].start, len(rows), with_bias, parts)

    def _first_seen(self, segment: Segment, query: int) -> int:
        """The first entry that a query at some entry of a row sees by its window or chunk; it may be before the row's first."""
        if self._window is None:
            return 0
        if self._chunked:
            return query - (query - segment.first) % self._window
        return query - self._window + 1

    def _pieces(self, index: int, segment: Segment) -> list[_Piece]:
        """Take a segment apart."""
        pieces = []
        plain, window, slopes, group = self._kernel == "plain", self._window, self._slopes, self._heads // self._kv_heads
        first_query = segment.past
        if segment.mask is None and segment.first > segment.past:
            first_query = min(segment.first, segment.total)
            pieces.append(_Piece(segment.start, first_query - segment.past, blind=True))
        while first_query < segment.total:
            first = 0 if segment.mask is not None else segment.first
            tokens = segment.total - first_query
            if window is not None or slopes is not None or plain or segment.mask is not None:
                tokens = min(tokens, MOST_QUERIES)
            if plain or slopes is not None:
                tokens = min(tokens, max(1, MOST_SCORES // (self._heads * segment.total)))
            if window is not None:
                seen = self._first_seen(segment, first_query)
                first = max(first, seen)
                if self._chunked:  # a piece that is within one chunk needs no other mask
                    tokens = min(tokens, seen + window - first_query)
            piece = _Piece(segment.start + first_query - segment.past, tokens, first, first_query + tokens)
            if segment.run is not None:
                piece.slot = segment.run + first
            else:
                piece.pages = self._batch.pages(index)
            piece.grouped = plain or tokens * group <= max(group, GROUPED_QUERIES)
            alone = segment.mask is None and slopes is None and (window is None or tokens <= window)
            if alone and tokens > 1 and first == first_query and not plain:
                piece.causal, piece.grouped = True, False
            elif tokens > 1 or not alone:
                piece.bias = self._biases.of(piece, segment, first_query)
            pieces.append(piece)
            first_query += tokens
        return pieces


class _Biases:
    """Makes the biases of a pass's pieces, each kind once."""

    def __init__(
        self, tables: SlopeTables, query: Tensor, kv_heads: int, window: int | None, slopes: Tensor | None, over_padding: bool
    ) -> None:
        self._tables = tables
        self._like = query
        self._heads, self._kv_heads = query.shape[1], kv_heads
        self._window = window
        self._slopes = slopes
        self._over_padding = over_padding
        self._made: dict[Hashable, Tensor] = {}

    def of(self, piece: _Piece, segment: Segment, first_query: int) -> Tensor:
        """The bias of a piece whose first query is at position `first_query`."""
        if segment.mask is not None:
            return self._make(piece, segment, first_query)
        kind = (piece.tokens, piece.grouped, first_query - piece.first, piece.first - segment.first if self._slopes is not None else None)
        bias = self._made.get(kind)
        if bias is None:
            bias = self._made[kind] = self._make(piece, segment, first_query)
        return bias

    def of_extent(self, shift: int, count: int, rows: int) -> Tensor | None:
        """What is added to the scores of some rows' one token each with the keys of an extent: [1, KV heads, rows × group, keys]."""
        if self._slopes is None:
            return None
        bias = self._tables.of(self._slopes, shift + count, self._like)[:, shift : shift + count]
        return bias.view(1, self._kv_heads, 1, -1, count).expand(-1, -1, rows, -1, -1).flatten(2, 3)

    def _make(self, piece: _Piece, segment: Segment, first_query: int) -> Tensor:
        device = self._like.device
        bias = None
        group, keys = self._heads // self._kv_heads, piece.end - piece.first
        if self._slopes is not None:
            bias = self._slope_bias(piece, segment)[None, :, None]
        hidden = self._hidden(piece, segment, first_query)
        if hidden is not None:
            zero = torch.zeros((), dtype=self._like.dtype, device=device) if bias is None else bias
            bias = torch.where(hidden, torch.full((), -torch.inf, dtype=self._like.dtype, device=device), zero)
        assert bias is not None
        if not piece.grouped:
            return bias
        if bias.shape[1] == 1:
            return bias.repeat(1, 1, group, 1)
        return bias.reshape(1, self._kv_heads, group * piece.tokens, keys)

    def _hidden(self, piece: _Piece, segment: Segment, first_query: int) -> Tensor | None:
        """bool [1, 1, tokens, keys]: what a query does not see; None where it sees all."""
        if piece.tokens == 1 and segment.mask is None:
            return None
        device = self._like.device
        queries = torch.arange(first_query, piece.end, device=device)[:, None]
        keys = torch.arange(piece.first, piece.end, device=device)
        hidden = keys > queries
        if self._window is not None:
            hidden |= keys <= queries - self._window
        if segment.mask is not None:
            hidden |= ~segment.mask[piece.first : piece.end].to(device)
            hidden &= ~hidden.all(dim=1, keepdim=True) | (keys != queries)
        return hidden[None, None]

    def _slope_bias(self, piece: _Piece, segment: Segment) -> Tensor:
        """[heads, keys]"""
        assert self._slopes is not None
        table = self._tables.of(self._slopes, segment.total, self._like)
        if segment.mask is None:
            return table[:, piece.first - segment.first : piece.end - segment.first]
        if self._over_padding:
            return table[:, piece.first : piece.end]
        mask = segment.mask.to(self._like.device)
        positions = ((mask.cumsum(0) - 1) * mask)[piece.first : piece.end]
        return table.index_select(1, positions)


def _kernel_for(query: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None) -> str:
    """What computes a pass: "any" fused kernel; "sums", the one that also returns the logarithms of its sums, from which the share of a
    sink or of other keys follows; "plain", the formula written out."""
    if softcap is not None or query.shape[3] != value.shape[3]:  # for other values than keys, what is fused elsewhere is not
        return "plain"
    sums = query.is_cpu
    if sinks is not None:
        return "sums and sinks" if sums else "plain"
    return "sums" if sums else "any"


def _with_sums(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithms of the sums that its softmax divided by: [1, heads, queries]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)


def _attend_rows(part: _Rows, store: KVStore, block: int, query: Tensor, scale: float) -> Tensor:
    """[1, rows, KV heads, group, value size]"""
    keys, values = store.head_keys[block], store.head_values[block]
    rows, kv_heads = part.rows, keys.shape[1]
    if rows != query.shape[2]:
        query = query.narrow(2, part.start, rows)
    queries = query.transpose(1, 2).reshape(rows, kv_heads, -1, query.shape[3])
    if part.parts is None:
        outputs = [
            F.scaled_dot_product_attention(row, keys.narrow(2, slot, count), values.narrow(2, slot, count), attn_mask=bias, scale=scale)
            for row, (_, _, slot, count, bias) in zip(queries.split(1) if rows > 1 else (queries,), part.calls, strict=True)
        ]
        return (outputs[0] if rows == 1 else torch.cat(outputs)).unsqueeze(0)
    group = queries.shape[2]
    results, sums = [], []
    for first, count, slot, length, bias in part.calls:
        some = queries.narrow(0, first, count)
        if count > 1:
            some = some.transpose(0, 1).reshape(1, kv_heads, count * group, -1)
        output, total = _with_sums(some, keys.narrow(2, slot, length), values.narrow(2, slot, length), bias, scale)
        results.append(output.view(kv_heads, count, group, -1).transpose(0, 1))
        sums.append(total.view(kv_heads, count, group).transpose(0, 1))
    # One result more, of no weight, for rows that have fewer parts than others.
    results.append(results[0].new_zeros(1, kv_heads, group, values.shape[3]))
    sums.append(sums[0].new_full((1, kv_heads, group), -torch.inf))
    weights = torch.softmax(torch.cat(sums)[part.parts], 1)
    return (torch.cat(results)[part.parts] * weights.unsqueeze(-1)).sum(1).to(query.dtype).unsqueeze(0)


def _attend_piece(
    piece: _Piece, store: KVStore, block: int, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None, kernel: str
) -> Tensor:
    """[1, tokens, KV heads, group, value size]"""
    heads, size = query.shape[1], query.shape[3]
    keys, values = store.head_keys[block], store.head_values[block]
    kv_heads = keys.shape[1]
    group, tokens = heads // kv_heads, piece.tokens
    if piece.blind:
        return query.new_zeros(1, tokens, kv_heads, group, values.shape[3])
    if piece.slot is not None:
        count = piece.end - piece.first
        keys, values = keys.narrow(2, piece.slot, count), values.narrow(2, piece.slot, count)
    else:
        assert piece.pages is not None
        keys, values = store.gather(block, piece.pages, piece.first, piece.end)
    queries = query if tokens == query.shape[2] else query.narrow(2, piece.start, tokens)
    if piece.grouped:
        queries = queries.reshape(1, kv_heads, group * tokens, size)
    if kernel == "plain":
        further = None if sinks is None else _per_query(sinks, kv_heads, tokens)
        output = _plain(queries, keys, values, piece.bias, scale, softcap, further)
    elif sinks is not None:
        output, sums = _with_sums(queries, keys, values, piece.bias, scale, piece.causal)
        further = _per_query(sinks, kv_heads, tokens) if piece.grouped else sinks[:, None]
        output = output * torch.sigmoid(sums - further.to(sums.dtype)).unsqueeze(-1).to(output.dtype)
    else:
        output = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=piece.bias,
            is_causal=piece.causal,
            scale=scale,
            enable_gqa=group > 1 and not piece.grouped,
        )
    if tokens == 1:
        return output.unsqueeze(1)
    if piece.grouped:
        return output.view(1, kv_heads, group, tokens, -1).permute(0, 3, 1, 2, 4)
    return output.transpose(1, 2).unflatten(2, (kv_heads, group))


def _per_query(sinks: Tensor, kv_heads: int, tokens: int) -> Tensor:
    """A sink for each query of a KV head, [KV heads, group × tokens]."""
    return sinks.reshape(kv_heads, -1).repeat_interleave(tokens, dim=1)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention written out, for what the fused kernel does not know. The softmax is taken in float32, as the library does."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if sinks is None:
        weights = torch.softmax(scores, -1, dtype=torch.float32)
    else:
        scores = torch.cat([scores, sinks[None, :, :, None].to(scores.dtype)], -1)
        weights = torch.softmax(scores, -1, dtype=torch.float32)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)
