"""MPT's attention over pages.

MPT's attention module computes its scores by itself, with ALiBi biases by the places of keys in the cache, padding included. They are in
float32 whatever the model is in, which fused kernels do not take beside other dtypes: in those, MPT keeps the library's attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from petalnet.blocks.adapted import is_packed
from petalnet.blocks.attention import paged_attention


class PagedMptAttention(MptAttention):
    """The library's module, made to attend over pages in packed passes."""

    alibi_slopes: torch.Tensor

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not is_packed(self):
            return super().forward(hidden_states, position_bias, past_key_values, attention_mask, **kwargs)
        tokens = hidden_states.shape[1]
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = fused.view(1, tokens, 3, self.n_heads, self.head_dim).transpose(1, 3).unbind(2)
        output, _ = paged_attention(
            self, query, key, value, None, scaling=self.softmax_scale, alibi_slopes=self.alibi_slopes, alibi_over_padding=True
        )
        return self.out_proj(output.reshape(1, tokens, self.hidden_size)), None


def adapt(blocks: Sequence[nn.Module]) -> dict[str, Any]:
    """Turn the attention modules in some MPT blocks into those above; weights stay as they are."""
    slopes: torch.Tensor | None = None
    block: Any
    for block in blocks:
        norm, module = block.norm_1.weight, block.attn
        if type(module) is MptAttention and norm.dtype == torch.float32:
            if slopes is None:
                biases = build_mpt_alibi_tensor(module.n_heads, 2, device=norm.device)[:, 0]
                slopes = biases[:, 1] - biases[:, 0]
            module.__class__ = PagedMptAttention
            module.__dict__["alibi_slopes"] = slopes  # one tensor for all blocks, so that a pass's biases are made once
    # The backbone makes a mask and takes it for granted that there is one; it takes a mask of four dimensions for one that is made already.
    return {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}
