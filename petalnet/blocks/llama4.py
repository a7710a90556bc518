"""Llama 4's attention over pages.

Layers without rotary embeddings scale a query by how far into its row it is, and take that from the cache, which in a packed pass there is
not: the segments of the pass know it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, apply_rotary_emb

from petalnet.blocks.adapted import is_packed
from petalnet.blocks.attention import STATE, PagedState, paged_attention


class PagedLlama4Attention(Llama4TextAttention):
    """The library's module, made to attend over pages in packed passes."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not is_packed(self):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        tokens = hidden_states.shape[1]
        query = self.q_proj(hidden_states).view(1, tokens, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(1, tokens, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(1, tokens, -1, self.head_dim)
        if self.use_rope:
            query, key = apply_rotary_emb(query, key, position_embeddings.to(query.device))
        if hasattr(self, "qk_norm"):
            query, key = self.qk_norm(query), self.qk_norm(key)
        if self.attn_temperature_tuning and not self.use_rope:
            # "Scalable-Softmax Is Superior for Attention" (Nakanishi, 2025, arXiv:2501.19399), in the form that the library has.
            places = self._places() + 1.0
            scales = torch.log1p(torch.floor(places / self.floor_scale)) * self.attn_scale + 1.0
            query = (query * scales[:, None, None]).to(query.dtype)
        output, _ = paged_attention(self, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, scaling=self.scaling)
        return self.o_proj(output.reshape(1, tokens, -1)), None

    def _places(self) -> torch.Tensor:
        """float32 [tokens]: the entry of its row that each token of the pass becomes, from 0."""
        state: PagedState = self.__dict__[STATE]
        assert state.batch is not None
        prepared = state.batch.prepared
        if "places" not in prepared:
            ranges = [torch.arange(segment.past, segment.total, dtype=torch.float32) for segment in state.batch.segments]
            prepared["places"] = torch.cat(ranges).to(state.batch.device)
        places: torch.Tensor = prepared["places"]
        return places


def adapt(blocks: Iterable[nn.Module]) -> None:
    """Turn the attention modules in some Llama 4 blocks into those above; weights stay as they are."""
    for block in blocks:
        for module in block.modules():
            if type(module) is Llama4TextAttention:
                module.__class__ = PagedLlama4Attention
