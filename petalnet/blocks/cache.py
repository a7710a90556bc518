"""The keys and values of one session, in buffers that grow in place.

The library's dynamic cache concatenates at every token; this one keeps room at the end of its buffers, so a token costs a copy of its
own keys and values only, going back to an earlier position is a change of one number, and layers see views.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from petalnet.errors import ModelError

SMALLEST_ROOM = 64
"""Positions that a buffer has room for when it is made; room doubles when it is used up."""

_WINDOWED = ("sliding_attention", "chunked_attention")


class SpanCache(Cache):
    """Keys and values of one session, for all blocks of a span (a session that uses only some of them fills only those).

    Attributes:
        length: positions that are valid, the same for every block. `advance` moves it on after a step, `set_length` back.
    """

    def __init__(self, windows: Sequence[int | None], max_length: int) -> None:
        """
        Args:
            windows: for each block of the span the width of its sliding attention window, None for full attention (see `windows_of`).
            max_length: the most positions that will be used; bounds the growth of the buffers.
        """
        super().__init__(layers=[_Layer(self, window) for window in windows])
        self.length = 0
        self.max_length = max_length
        self._sliding = [window is not None for window in windows]
        self._no = [False] * len(windows)

    def advance(self, new: int) -> None:
        """Make valid the `new` positions that a step has written."""
        self.length += new

    def set_length(self, length: int) -> None:
        """Go back to an earlier length; what came after it will be overwritten. Raises ValueError for one that was never reached."""
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} positions, it cannot be set to {length}")
        self.length = length

    def clear(self) -> None:
        """Empty the cache and give its buffers back; the next step may have another number of rows."""
        self.length = 0
        for layer in self.layers:
            layer.key_buffer = layer.value_buffer = None

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i continue what row `rows[i]` held; `rows` (int64, one dimension) may repeat, drop and add rows."""
        for layer in self.layers:
            layer.reorder_cache(rows)

    @property
    def bytes(self) -> int:
        """Memory that the buffers take."""
        return sum(buffer.nbytes for layer in self.layers for buffer in (layer.key_buffer, layer.value_buffer) if buffer is not None)

    # What the library asks of a cache, answered without a walk over the layers at every step.

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


class _Layer(CacheLayerMixin):
    """One block's share of a cache: buffers [rows, heads, room, head size], of which the first `cache.length` positions are valid."""

    def __init__(self, cache: SpanCache, window: int | None) -> None:
        super().__init__()
        self.cache = cache
        self.window = window
        self.is_sliding = window is not None
        self.key_buffer: torch.Tensor | None = None
        self.value_buffer: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new positions after the valid ones; returns views of all that the new positions may attend to."""
        new = key_states.shape[-2]
        start, end = self.cache.length, self.cache.length + new
        keys, values = self.key_buffer, self.value_buffer
        if keys is None or values is None or keys.shape[2] < end:
            keys, values = self._grow(key_states, value_states, end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        first = 0 if self.window is None else max(0, start - self.window + 1)
        return keys[:, :, first:end], values[:, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.cache.length
        first = 0 if self.window is None else max(0, length - self.window + 1)
        return length + query_length - first, first

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.key_buffer = self._reordered(self.key_buffer, beam_idx)
        self.value_buffer = self._reordered(self.value_buffer, beam_idx)

    def _reordered(self, buffer: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
        if buffer is None:
            return None
        length = self.cache.length
        kept = buffer[:, :, :length].index_select(0, rows.to(buffer.device))
        if len(rows) != buffer.shape[0]:
            buffer = buffer.new_empty((len(rows), *buffer.shape[1:]))
        buffer[:, :, :length] = kept
        return buffer

    def _grow(self, key_states: torch.Tensor, value_states: torch.Tensor, needed: int) -> tuple[torch.Tensor, torch.Tensor]:
        room = SMALLEST_ROOM
        while room < needed:
            room *= 2
        room = max(needed, min(room, self.cache.max_length))
        self.key_buffer = self._wider(self.key_buffer, key_states, room)
        self.value_buffer = self._wider(self.value_buffer, value_states, room)
        return self.key_buffer, self.value_buffer

    def _wider(self, buffer: torch.Tensor | None, states: torch.Tensor, room: int) -> torch.Tensor:
        rows, heads, _, size = states.shape
        wider = states.new_empty((rows, heads, room, size))
        if buffer is not None:
            length = self.cache.length
            wider[:, :, :length] = buffer[:, :, :length]
        return wider


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
