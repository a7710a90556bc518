"""What captured passes rest on, in plain torch, for machines without a GPU: tests and `benchmarks/gpu.py --tiny` run over it.

The kernel for paged attention is written out by gathering, and in place of a recording the function is run again. Over both, everything but
CUDA itself is as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from petalnet.blocks.backends import CudaBackend


class EmulatedBackend(CudaBackend):
    """`CudaBackend` over `paged_attention`, with small pages and in every dtype."""

    page_tokens = 8
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(self) -> None:
        super().__init__(paged_attention, sums_of_keys=True)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes over pages, with its parameters.

    Where each row has one query, nothing in it depends in Python on what tensors hold, as in the kernel.

    Returns:
        [tokens, heads, value size].
    """
    if max_q == 1:
        return _attend(query.unsqueeze(2), key, value, seqused_k, block_table, scale, window_size[0], enable_gqa).squeeze(2)
    outputs = []
    for row, (start, end) in enumerate(zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False)):
        queries = query[start:end].transpose(0, 1).unsqueeze(0)
        output = _attend(queries, key, value, seqused_k[row : row + 1], block_table[row : row + 1], scale, window_size[0], enable_gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _attend(queries: Tensor, key: Tensor, value: Tensor, used: Tensor, table: Tensor, scale: float, left: int, enable_gqa: bool) -> Tensor:
    """[rows, heads, new, size] for the last `new` of each row's `used` entries."""
    keys, values = (entries[table.long()].flatten(1, 2) for entries in (key, value))  # [rows, slots, KV heads, size]
    new = queries.shape[2]
    at = used[:, None] - new + torch.arange(new, device=used.device)  # the position of each query
    slots = torch.arange(keys.shape[1], device=used.device)
    seen = slots <= at[:, :, None]
    if left >= 0:
        seen &= slots >= at[:, :, None] - left
    unused = (slots >= used[:, None])[:, :, None, None]  # may hold anything, which a weight of zero does not undo
    keys, values = (entries.masked_fill(unused, 0).transpose(1, 2) for entries in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None], scale=scale, enable_gqa=enable_gqa)


@dataclass(frozen=True)
class Rerun:
    """A function that is run again."""

    run: Callable[[], None]
    nbytes: int = 0

    def replay(self) -> None:
        self.run()


class Rerunner:
    """In place of a recorder: replaying a pass is running it again, over the same buffers."""

    def record(self, run: Callable[[], None]) -> Rerun:
        run()
        return Rerun(run)
