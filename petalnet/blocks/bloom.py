"""BLOOM's attention over pages, and its activation in one kernel.

BLOOM's attention module computes its scores by itself instead of asking for an attention function, so it gets another `forward`, which
hands queries, keys and values to ours. The module keeps its weights and its own `forward` for all passes that are not packed. Its GELU is
written out as eight operations, which for a single token take longer than a layer norm and for a prompt are a tenth of all work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu, build_alibi_tensor

from petalnet.blocks.adapted import is_packed
from petalnet.blocks.attention import paged_attention


class PagedBloomAttention(BloomAttention):
    """The library's module, made to attend over pages in packed passes."""

    alibi_slopes: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_packed(self):
            return super().forward(hidden_states, residual, *args, **kwargs)
        tokens = hidden_states.shape[1]
        # One projection yields [heads, (query, key, value), size] for each token.
        fused = self.query_key_value(hidden_states).view(1, tokens, self.num_heads, 3, self.head_dim).transpose(1, 2)
        query, key, value = fused.unbind(3)
        output, _ = paged_attention(self, query, key, value, None, scaling=self.inv_norm_factor, alibi_slopes=self.alibi_slopes)
        return self.dense(output.reshape(1, tokens, self.hidden_size)) + residual, None


class FusedBloomGelu(BloomGelu):
    """The library's module, made to compute in one kernel, and so are its gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


def adapt(blocks: Iterable[nn.Module]) -> None:
    """Turn the attention modules and activations in some BLOOM blocks into those above; weights stay as they are."""
    slopes: torch.Tensor | None = None
    module: Any
    for block in blocks:
        for module in block.modules():
            if type(module) is BloomGelu:
                module.__class__ = FusedBloomGelu
            elif type(module) is BloomAttention:
                if slopes is None:
                    ones = torch.ones(1, 2, dtype=torch.long, device=module.dense.weight.device)
                    slopes = build_alibi_tensor(ones, module.num_heads, torch.float32)[:, 0, 1]  # the bias of the key at position 1
                module.__class__ = PagedBloomAttention
                module.__dict__["alibi_slopes"] = slopes  # one tensor for all blocks, so that a pass's biases are made once
