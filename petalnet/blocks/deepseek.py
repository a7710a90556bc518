"""DeepSeek-V3's latent attention over pages.

What is cached of a position is one latent for all heads, and one key for its place. The library computes all heads' keys and values from
the latents of all positions in every step. In packed passes queries are taken to the latents instead, and what they find there to values:
the same products in another order, as "DeepSeek-V2" (arXiv:2405.04434, section 2.1.2) has it. To attention over pages that is one head of
keys, latent and place side by side, whose values are the latents, for all heads of queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, apply_rotary_pos_emb, apply_rotary_pos_emb_interleave

from petalnet.blocks.adapted import is_packed
from petalnet.blocks.adapters import lora_of
from petalnet.blocks.attention import paged_attention


class PagedDeepseekAttention(DeepseekV3Attention):
    """The library's module, made to attend over pages in packed passes."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not is_packed(self):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        tokens, rank = hidden_states.shape[1], self.kv_lora_rank
        small = None if self.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(hidden_states))
        query = self.q_proj(hidden_states) if small is None else self.q_b_proj(small)
        query = query.view(1, tokens, -1, self.qk_head_dim).transpose(1, 2)
        content, place = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, key_place = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split([rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        rotate = apply_rotary_pos_emb_interleave if self.config.rope_interleave else apply_rotary_pos_emb
        place, key_place = rotate(place, key_place, *position_embeddings)
        to_keys, to_values = self._by_head(self.kv_b_proj.weight)
        sought = content @ to_keys
        added = [(slice(None) if own is None else own, weights) for own, weights in lora_of(self.kv_b_proj)]
        for own, (a, b) in added:
            some = content[:, :, own].to(b.dtype) @ self._by_head(b)[0]
            sought[:, :, own] += (some @ a).to(sought.dtype)
        found, _ = paged_attention(
            self, torch.cat([sought, place], dim=-1), torch.cat([latent, key_place], dim=-1), latent, None, scaling=self.scaling
        )
        found = found.transpose(1, 2)
        value = found @ to_values.transpose(1, 2)
        for own, (a, b) in added:
            some = found[:, :, own].to(a.dtype) @ a.t()
            value[:, :, own] += (some @ self._by_head(b)[1].transpose(1, 2)).to(value.dtype)
        return self.o_proj(value.transpose(1, 2).reshape(1, tokens, -1)), None

    def _by_head(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What makes keys and what makes values of something, from [heads × (key + value), in]: [heads, key, in], [heads, value, in]."""
        to_keys, to_values = weight.view(self.num_heads, -1, weight.shape[1]).split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        return to_keys, to_values


def adapt(blocks: Iterable[nn.Module]) -> None:
    """Turn the attention modules in some DeepSeek blocks into those above; weights stay as they are.

    One that was rounded to few bits is not there to be multiplied with in another order: such a block keeps the library's attention.
    """
    for block in blocks:
        for module in block.modules():
            if type(module) is DeepseekV3Attention and type(module.kv_b_proj) is nn.Linear:
                module.__class__ = PagedDeepseekAttention
