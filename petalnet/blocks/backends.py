"""What does the arithmetic of attention over pages on each kind of device.

`Backend` is exact everywhere (see `pieces`). `CudaBackend` hands what torch's kernel for paged attention takes to that kernel: what it does
not take (other dtypes, ALiBi, soft-capped scores, sinks, padding) goes the general way, segment by segment.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petalnet.blocks.attention import Batch, Segment
from petalnet.blocks.kv import KVShape, KVStore
from petalnet.blocks.pieces import Plan, SlopeTables

log = logging.getLogger(__name__)


class Backend:
    """Attention over pages by the library's fused kernels, row by row. It keeps tables of biases: one a span.

    Attributes:
        page_tokens: slots of a page.
        heads_together: how slots lie in memory (see `KVStore`).
        pads: whether passes may be padded with rows that write to a spare page, which stores have to have then.
    """

    page_tokens = 32
    heads_together = False
    pads = False

    def __init__(self) -> None:
        self._tables = SlopeTables()

    def attend(
        self,
        batch: Batch,
        store: KVStore,
        block: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        chunked: bool = False,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
        over_padding: bool = False,
    ) -> Tensor:
        """Write a block's new keys and values, then attend.

        Args:
            query: [1, heads, tokens, key size].
            key, value: [1, KV heads, tokens, key size or value size].
            window: a query sees so many positions, its own among them.
            chunked: it sees those of its chunk, which has so many.
            softcap, sinks, slopes, over_padding: see `paged_attention`.
        Returns:
            [1, tokens, heads, value size].
        """
        store.write_heads(block, batch.slots, key, value)
        output = self._by_plan(batch, None, store, block, query, scale, window, softcap, sinks, slopes, chunked, over_padding)
        _, heads, tokens, _ = query.shape
        return output.reshape(1, tokens, heads, -1)

    def _by_plan(
        self,
        batch: Batch,
        segments: tuple[int, ...] | None,
        store: KVStore,
        block: int,
        query: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        slopes: Tensor | None,
        chunked: bool = False,
        over_padding: bool = False,
    ) -> Tensor:
        """[1, tokens of the segments, KV heads, group, value size]; all segments by default."""
        # A plan holds its slopes, so that an id stands for one tensor as long as the batch lives.
        kind = (window, chunked, softcap is None, sinks is None, None if slopes is None else id(slopes), over_padding)
        name = (segments, query.shape, store.shapes[block], kind)
        plan: Plan | None = batch.prepared.get(name)
        if plan is None:
            chosen = range(len(batch.segments)) if segments is None else segments
            plan = batch.prepared[name] = Plan(
                self._tables, batch, chosen, store, block, query, window, slopes, softcap, sinks, chunked, over_padding
            )
        return plan.attend(store, block, query, scale=scale, softcap=softcap, sinks=sinks)


class NotingBackend(Backend):
    """Computes nothing, and notes what a position takes in each block.

    Attributes:
        shapes: by the number of the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, KVShape] = {}

    def attend(
        self, batch: Batch, store: KVStore, block: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, **others: Any
    ) -> Tensor:
        """Zeros, of the shape that `Backend.attend` returns."""
        self.shapes[block] = KVShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


CAPABILITY = (8, 0)
"""The oldest compute capability that the kernel for paged attention runs on."""

LARGEST_HEAD = 256
"""The largest head size that it takes."""


@dataclass(frozen=True, eq=False)
class PagedCall:
    """What the kernel for paged attention is told about some segments of a pass.

    Attributes:
        columns: int64 [tokens], their columns in the packed row; None where they are all columns.
        others: the segments that it is not told of, and `other_columns`, theirs.
        queries: int32 [segments + 1], sums of the numbers of new tokens.
        keys: int32 [segments + 1], sums of the numbers of entries.
        used: int32 [segments], entries of each row.
        table: int32 [segments, pages], the page numbers; 0 beyond a row's last.
        most_queries, most_keys: of a row.
    """

    columns: Tensor | None
    others: tuple[int, ...]
    other_columns: Tensor
    queries: Tensor
    keys: Tensor
    used: Tensor
    table: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, batch: Batch, segments: Sequence[int]) -> PagedCall:
        chosen = [batch.segments[index] for index in segments]
        others = tuple(sorted(set(range(len(batch.segments))) - set(segments)))
        new, totals = [segment.end - segment.start for segment in chosen], [segment.total for segment in chosen]
        counts = [-(-total // batch.page_tokens) for total in totals]

        def ints(numbers: Any) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=batch.device)

        return cls(
            columns=_columns(batch, segments) if others else None,
            others=others,
            other_columns=_columns(batch, others),
            queries=ints([0, *itertools.accumulate(new)]),
            keys=ints([0, *itertools.accumulate(totals)]),
            used=ints(totals),
            table=ints([[*segment.pages[:count], *[0] * (max(counts) - count)] for segment, count in zip(chosen, counts, strict=True)]),
            most_queries=max(new),
            most_keys=max(totals),
        )


def _columns(batch: Batch, segments: Sequence[int]) -> Tensor:
    """The columns of some segments, int64 on the device."""
    spans = [range(batch.segments[index].start, batch.segments[index].end) for index in segments]
    return torch.tensor([*itertools.chain.from_iterable(spans)], dtype=torch.long, device=batch.device)


class CudaBackend(Backend):
    """Attention by `torch.nn.attention.varlen.varlen_attn` where that takes it.

    Attributes:
        dtypes: of queries that it takes.
    """

    page_tokens = 256  # of which the page size must be a multiple in the kernel that comes with torch
    heads_together = True
    pads = True
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def __init__(self, kernel: Callable[..., Any], *, sums_of_keys: bool, says_alone: bool = True) -> None:
        """
        Args:
            kernel: `varlen_attn`.
            sums_of_keys: whether it wants the sums of the numbers of keys beside each row's; implementations differ.
            says_alone: whether it is told where each row has one query, from which nothing is hidden then. It reads keys once for all heads
                that share them where it knows that.
        """
        super().__init__()
        self._kernel = kernel
        self._sums_of_keys = sums_of_keys
        self._says_alone = says_alone

    def attend(
        self,
        batch: Batch,
        store: KVStore,
        block: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        chunked: bool = False,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
        over_padding: bool = False,
    ) -> Tensor:
        """See `Backend.attend`."""
        if "paged" not in batch.prepared:
            taken = [index for index, segment in enumerate(batch.segments) if segment.mask is None and segment.first == 0]
            batch.prepared["paged"] = PagedCall.of(batch, taken) if taken else None
        call: PagedCall | None = batch.prepared["paged"]
        if call is None or chunked or not takes(query, value, softcap, sinks, slopes, self.dtypes):
            if not batch.segments:
                raise RuntimeError("the kernel for paged attention does not take such attention, and nothing else knows the pass")
            return super().attend(
                batch,
                store,
                block,
                query,
                key,
                value,
                scale=scale,
                window=window,
                chunked=chunked,
                softcap=softcap,
                sinks=sinks,
                slopes=slopes,
                over_padding=over_padding,
            )
        store.write_heads(block, batch.slots, key, value)
        queries = query[0].transpose(0, 1)
        alone = self._says_alone and call.most_queries == 1
        output: Tensor = self._kernel(
            queries if call.columns is None else queries.index_select(0, call.columns),
            store.keys[block].unflatten(0, (-1, store.page_tokens)),
            store.values[block].unflatten(0, (-1, store.page_tokens)),
            call.queries,
            call.keys if self._sums_of_keys else None,
            call.most_queries,
            call.most_keys,
            scale=scale,
            window_size=(-1, -1) if alone and window is None else (-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=call.used,
            block_table=call.table,
        )
        if call.columns is None:
            return output.unsqueeze(0)
        others = self._by_plan(batch, call.others, store, block, query, scale, window, None, None, None)
        whole = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        whole[0, call.columns] = output
        whole[0, call.other_columns] = others[0].flatten(1, 2)
        return whole


def takes(
    query: Tensor,
    value: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    dtypes: Sequence[torch.dtype] = CudaBackend.dtypes,
) -> bool:
    """Whether the kernel for paged attention computes such attention; padding is another matter."""
    size = query.shape[3]
    return (
        query.dtype in dtypes
        and size == value.shape[3]
        and size % 8 == 0
        and size <= LARGEST_HEAD
        and softcap is None
        and sinks is None
        and slopes is None
    )


def pick_backend(device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The backend for spans of a dtype on a device: the kernel for paged attention where it is there and right, else the general way."""
    device = torch.device(device)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return Backend()
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return Backend()
    from torch.nn.attention.varlen import varlen_attn  # half a second that servers on a CPU need not spend

    for says_alone, sums_of_keys in itertools.product((True, False), repeat=2):
        backend = CudaBackend(varlen_attn, sums_of_keys=sums_of_keys, says_alone=says_alone)
        if is_right(backend, device, dtype):
            return backend
    log.warning("the kernel for paged attention does not work with this device and build of torch: attention is slower")
    return Backend()


def is_right(backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend computes the same as the general way: tried with a prefill beside a decode and with decodes alone, with grouped
    heads, a window and far pages."""
    mixed = [Segment(0, 40, 270, [5, 2], None), Segment(40, 41, 300, [0, 3], None)]
    decodes = [Segment(0, 1, 400, [5, 2], None), Segment(1, 2, 300, [0, 3], None)]
    try:
        for window, segments in itertools.product((None, 100), (mixed, decodes)):
            outputs = []
            for one in (backend, Backend()):
                generator = torch.Generator().manual_seed(0)
                store = KVStore([KVShape(2, 64, 64)], pages=6, page_tokens=256, dtype=dtype, device=device, heads_together=True)
                for tensor in (*store.keys, *store.values):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                batch = Batch(segments, 256, device)
                tensors = [torch.randn(1, heads, segments[-1].end, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2)]
                with torch.inference_mode():
                    outputs.append(one.attend(batch, store, 0, *tensors, scale=0.125, window=window).float())
            if not torch.allclose(outputs[0], outputs[1], atol=0.03, rtol=0.03):
                return False
    except (RuntimeError, ValueError) as error:  # how torch says that a kernel is not there, or not for such tensors
        log.debug("the kernel for paged attention cannot be used: %s", error)
        return False
    return True
