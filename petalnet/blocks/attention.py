"""One attention function for every family: new tokens of many sessions, side by side in one packed row, over the pages of each.

The function is registered with the library under `NAME`; a model whose configuration names it calls `paged_attention` in place of its own
attention. What a pass is about stands in a `Batch`: which columns of the packed row belong to which row of which session, and where that
row's keys and values lie. A `Backend` (see `backends`) does the arithmetic.

The rules, for a query at position q (counted in KV entries of its row, padding included) and a key at position k of the same row:
- k ≤ q, and k > q - window in a layer with a sliding window; in a chunked layer, k is in the chunk of q, where chunks are counted from the
  row's first entry that is not padding;
- k is not padding; only where nothing else is left, k = q is: what a query gets is finite, whatever is padding around it. (What comes
  out at padding is read, too, where an answer is written behind rows that are padded on the right.)
- nothing of another row is ever read, so that what is not finite in one session stays there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from petalnet.blocks.backends import Backend
    from petalnet.blocks.kv import KVStore

NAME = "petalnet_paged"
"""What a configuration's `_attn_implementation` says for its modules to call `paged_attention`."""

STATE = "petalnet_paged"
"""The attribute of attention modules that holds their `PagedState`."""


@dataclass(eq=False)
class Segment:
    """The new tokens of one row of one session in a packed pass.

    Attributes:
        start, end: its columns in the packed row.
        past: KV entries of the row before these tokens, padding included.
        pages: the row's pages, from position 0 on; those of the new tokens among them.
        run: slot of position 0 where the pages are consecutive, else None.
        first: entries before this one are padding (left padding).
        mask: bool [past + new], False where an entry is padding; None where there is none but that before `first`.
    """

    start: int
    end: int
    past: int
    pages: Sequence[int]
    run: int | None
    first: int = 0
    mask: Tensor | None = None

    @property
    def total(self) -> int:
        """Entries of the row when the pass is done."""
        return self.past + self.end - self.start


class Batch:
    """All segments of one pass.

    Attributes:
        segments: in the order of their columns, which follow one another from 0.
        slots: where the new entries go, one slot a column: a slice where they are consecutive, else int64 [tokens].
        prepared: what a backend computes once a pass for all blocks, by keys of its own.
    """

    def __init__(self, segments: Sequence[Segment], page_tokens: int, device: torch.device) -> None:
        """Raises ValueError for segments that do not cover the packed row one after the other, or whose pages do not suffice."""
        self.segments = segments
        self.page_tokens = page_tokens
        self.device = device
        self.prepared: dict[Hashable, Any] = {}
        self._tables: dict[int, Tensor] = {}
        slots: list[int] = []
        for segment in segments:
            if segment.start != len(slots) or segment.end <= segment.start:
                raise ValueError(f"a segment has columns {segment.start}:{segment.end} where {len(slots)}: is next")
            if segment.total > len(segment.pages) * page_tokens:
                raise ValueError(f"{segment.total} entries do not fit into {len(segment.pages)} pages of {page_tokens}")
            slots += slots_of(segment, page_tokens)
        first = slots[0]
        if slots[-1] - first == len(slots) - 1 and slots == list(range(first, first + len(slots))):
            self.slots: slice | Tensor = slice(first, first + len(slots))
        else:
            self.slots = torch.tensor(slots, device=device)

    def pages(self, segment: int) -> Tensor:
        """The page numbers of a segment, int64 on the device."""
        table = self._tables.get(segment)
        if table is None:
            table = self._tables[segment] = torch.tensor(self.segments[segment].pages, dtype=torch.long, device=self.device)
        return table


def slots_of(segment: Segment, page_tokens: int) -> Sequence[int]:
    """The slots of a segment's new entries."""
    if segment.run is not None:
        return range(segment.run + segment.past, segment.run + segment.total)
    pages = segment.pages
    return [pages[at // page_tokens] * page_tokens + at % page_tokens for at in range(segment.past, segment.total)]


@dataclass(eq=False)
class PagedState:
    """What the attention modules of a span share; each finds it as its attribute `STATE`.

    Attributes:
        windows: for each block of the store the width of its sliding window or of its chunks, None for full attention.
        chunked: for each block of the store whether that width is of chunks.
        batch: the pass that is under way.
        first_block: the block of the store that `layer_idx` 0 stands for, when the backbone shows only some of the span's blocks.
    """

    store: KVStore
    backend: Backend
    windows: Sequence[int | None]
    chunked: Sequence[bool]
    batch: Batch | None = None
    first_block: int = 0


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_over_padding: bool = False,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Write the keys and values of a packed pass to their slots and attend to all that their rows hold.

    Args:
        module: an attention module with a `layer_idx` and a `PagedState` whose `batch` is set.
        query: [1, heads, tokens, key size].
        key, value: [1, KV heads, tokens, key size or value size].
        attention_mask: not looked at; the batch knows.
        scaling: what scores are multiplied with; by default key size ** -0.5.
        softcap: scores s become softcap × tanh(s / softcap).
        s_aux: [heads], a further score in each head's softmax that has no value (attention sinks).
        alibi_slopes: [heads]; slope × the key's position is added to scores, where positions count what is not padding. The same tensor
            for all blocks, since what follows from it is computed once.
        alibi_over_padding: positions count padding, too.
        ignored: what the library passes on to attention functions in general. Windows come from the state.
    Returns:
        [1, tokens, heads, value size], and None for the weights.
    """
    state: PagedState = getattr(module, STATE)
    batch = state.batch
    if batch is None:
        raise RuntimeError("paged attention was called outside of a packed pass")
    index: Any = module.layer_idx
    block: int = state.first_block + index
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    attended = state.backend.attend(
        batch,
        state.store,
        block,
        query,
        key,
        value,
        scale=scaling,
        window=state.windows[block],
        chunked=state.chunked[block],
        softcap=softcap,
        sinks=s_aux,
        slopes=alibi_slopes,
        over_padding=alibi_over_padding,
    )
    return attended, None


AttentionInterface.register(NAME, paged_attention)
# Nothing is registered with `AttentionMaskInterface`: for a name that is unknown there, the library makes no mask at all.
