"""A session in the form in which `transformers` hands KV caches around.

The library asks a cache for its length, crops it (assisted decoding), and reorders its rows (beams); the keys and values themselves are
on servers, so the one layer here holds none. `generate` deals in tokens and sees no trained prompts in front of them; a backbone's
`forward`, which computes positions, is to see them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from petalnet.client.session import InferenceSession


class SessionLayer(CacheLayerMixin):
    """The one layer of a `SessionCache`."""

    is_sliding = False
    is_croppable = True

    def __init__(self, session: InferenceSession, *, with_prompts: bool) -> None:
        super().__init__()
        self.session = session
        self.is_initialized = True
        self._with_prompts = with_prompts

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        return

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the keys and values of this cache are on servers; a local layer cannot add to them")

    def get_seq_length(self) -> int:
        return self.session.position if self._with_prompts else self.session.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.session.position = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of entries to remove as a negative number; got {tokens_to_remove}")
        self.session.position += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.session.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.session.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.session.rows is not None:
            self.session.reorder(torch.arange(self.session.rows).repeat_interleave(repeats))

    def offload(self) -> None:
        return

    def prefetch(self) -> None:
        return


class SessionCache(Cache):
    """`past_key_values` of a distributed model: it knows the session and nothing else.

    Attributes:
        session: where the keys and values are.
    """

    def __init__(self, session: InferenceSession, *, with_prompts: bool = False) -> None:
        """
        Args:
            with_prompts: whether its length counts trained prompts.
        """
        super().__init__(layers=[SessionLayer(session, with_prompts=with_prompts)])
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionCache:
        raise ValueError("a KV cache on servers cannot be copied; go back to an earlier state with session.position")
