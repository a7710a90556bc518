"""Falcon's attention over pages.

Falcon's attention module calls torch's kernel by itself, and in the newer architecture it repeats keys and values for all heads that share
them before they are cached; pages hold each once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb, build_alibi_tensor

from petalnet.blocks.adapted import is_packed
from petalnet.blocks.attention import paged_attention


class PagedFalconAttention(FalconAttention):
    """The library's module, made to attend over pages in packed passes."""

    alibi_slopes: torch.Tensor | None

    def forward(
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if not is_packed(self):
            return super().forward(
                hidden_states, alibi, attention_mask, position_ids, layer_past, use_cache, output_attentions, position_embeddings, **kwargs
            )
        tokens = hidden_states.shape[1]
        fused = self.query_key_value(hidden_states)
        if self.new_decoder_architecture:
            # For each key and value: the heads that share them, then the key, then the value.
            groups = fused.view(1, tokens, self.num_kv_heads, -1, self.head_dim)
            query, key, value = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        else:
            query, key, value = self._split_heads(fused)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        slopes = None
        if alibi is not None:
            slopes = self.alibi_slopes
        elif position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output, _ = paged_attention(self, query, key, value, None, scaling=self.inv_norm_factor, alibi_slopes=slopes)
        return self.dense(output.reshape(1, tokens, self.hidden_size)), None


def adapt(blocks: Iterable[nn.Module]) -> None:
    """Turn the attention modules in some Falcon blocks into those above; weights stay as they are."""
    slopes: torch.Tensor | None = None
    module: Any
    for block in blocks:
        for module in block.modules():
            if type(module) is not FalconAttention:
                continue
            if module.config.alibi and slopes is None:
                # Biases are rounded to bfloat16 and then divided by this root. Divided beforehand they round to the same where that is a
                # power of two, as in all that were published; other models keep the library's attention.
                root = math.sqrt(module.head_dim)
                if math.log2(root) % 1:
                    return
                ones = torch.ones(1, 2, dtype=torch.long, device=module.dense.weight.device)
                slopes = build_alibi_tensor(ones, module.num_heads, torch.bfloat16)[:, 0, 1] / root  # the bias of the key at position 1
            module.__class__ = PagedFalconAttention
            module.__dict__["alibi_slopes"] = slopes  # one tensor for all blocks, so that a pass's biases are made once
