"""The caches that the library's own attention is given in a session's step, where a family does not take an attention function of ours.

Keys and values live in pages; a layer gets a view of them, or a copy where a row's pages are not consecutive. What this costs beside
attention over the pages themselves is that copy, and that sessions run one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from petalnet.blocks.attention import Batch, Segment
from petalnet.blocks.kv import KVShape, KVStore
from petalnet.blocks.pages import PageTables
from petalnet.errors import ModelError

_WINDOWED = ("sliding_attention", "chunked_attention")


class _SessionCache(Cache):
    """A cache whose blocks are all of one length, which answers what the library asks without a walk over its layers at every step.

    Attributes:
        length: positions that are there, before the pass.
    """

    def __init__(self, layers: Sequence[_SessionLayer]) -> None:
        super().__init__(layers=list(layers))
        self.length = 0
        self._sliding = [layer.window is not None for layer in layers]
        self._no = [False] * len(layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def is_sliding(self) -> list[bool]:
        return self._sliding

    @property
    def is_linear(self) -> list[bool]:
        return self._no

    @property
    def is_dummy(self) -> list[bool]:
        return self._no

    @property
    def is_compileable(self) -> bool:
        return False


class _SessionLayer(CacheLayerMixin):
    """One block's share of a session's cache. With a sliding window, the library is shown only positions that new ones may attend to."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.cache: _SessionCache

    @property
    def first_visible(self) -> int:
        """The first position that the next one may attend to."""
        return 0 if self.window is None else max(0, self.cache.length - self.window + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self.first_visible
        return self.cache.length + query_length - first, first

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True


class PagedCache(_SessionCache):
    """Keys and values of one session after the other, written to pages and read from them. `begin` says whose step comes next."""

    def __init__(self, store: KVStore, windows: Sequence[int | None]) -> None:
        """`windows`: for each block of the store the width of its attention window, None for full attention."""
        layers = [_PagedLayer(self, block, window) for block, window in enumerate(windows)]
        super().__init__(layers)
        self.store = store
        self.batch: Batch

    def begin(self, rows: PageTables, new: int) -> None:
        """The next pass is a step of these rows, which are prepared for `new` more tokens."""
        self.length = past = rows.length
        segments = [Segment(row * new, (row + 1) * new, past, table, rows.run(row)) for row, table in enumerate(rows.tables)]
        self.batch = Batch(segments, self.store.page_tokens, self.store.device)


class _PagedLayer(_SessionLayer):
    def __init__(self, cache: PagedCache, block: int, window: int | None) -> None:
        super().__init__(window)
        self.cache: PagedCache = cache
        self.block = block

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new positions [rows, heads, new, size]; returns all that they may attend to, [rows, heads, positions, size]."""
        store, batch, block = self.cache.store, self.cache.batch, self.block
        store.write_heads(block, batch.slots, _side_by_side(key_states), _side_by_side(value_states))
        first, end = self.first_visible, self.cache.length + key_states.shape[2]
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for row, segment in enumerate(batch.segments):
            if segment.run is None:
                found.append(store.gather(block, batch.pages(row), first, end))
            else:
                start, count = segment.run + first, end - first
                found.append((store.head_keys[block].narrow(2, start, count), store.head_values[block].narrow(2, start, count)))
        if len(found) == 1:
            return found[0]
        return torch.cat([keys for keys, _ in found]), torch.cat([values for _, values in found])


def _side_by_side(states: torch.Tensor) -> torch.Tensor:
    """[rows, heads, new, size] → [1, heads, rows × new, size]"""
    return states if states.shape[0] == 1 else states.transpose(0, 1).flatten(1, 2).unsqueeze(0)


class ShapeCache(_SessionCache):
    """A cache that keeps nothing, and notes which shapes keys and values have.

    Attributes:
        shapes: for each block what one position takes; None for those that did not run.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__([_ShapeLayer(self, window) for window in windows])

    @property
    def shapes(self) -> list[KVShape | None]:
        return [layer.shape for layer in self.layers]


class _ShapeLayer(_SessionLayer):
    def __init__(self, cache: ShapeCache, window: int | None) -> None:
        super().__init__(window)
        self.cache = cache
        self.shape: KVShape | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shape = KVShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return key_states, value_states


def chunked_layers(config: PreTrainedConfig) -> list[bool]:
    """For each layer of a model whether the width of its attention window is that of chunks, which do not slide."""
    return [kind == "chunked_attention" for kind in get_layer_types_and_kwargs(config)[0]]


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """For each layer of a model the width of its attention window, None for full attention.

    Raises:
        ModelError: a layer keeps another state than keys and values (linear attention, shared keys and values).
    """
    types, options = get_layer_types_and_kwargs(config)
    windows: list[int | None] = []
    for kind, option in zip(types, options, strict=True):
        if kind == "full_attention":
            windows.append(None)
        elif kind in _WINDOWED and option.get("sliding_window"):
            windows.append(option["sliding_window"])
        else:
            raise ModelError(f"a {config.model_type} model cannot be served: its {kind} layers keep a state that cannot be split yet")
    return windows
