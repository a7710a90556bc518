"""The memory that holds the keys and values of all sessions of a span.

A *slot* holds one position of one row: slot = page × page_tokens + offset. Pages have the same numbers in every block. Who holds which page
is none of this module's business (see `pages`); it writes, reads and copies.

How slots lie in memory belongs to the backend. A kernel for paged attention wants the heads of a token side by side. On a CPU each head's
slots lie side by side instead: what attention reads for a head is then one stretch of memory, which takes half the time of collecting it
from all tokens once the entries are no longer in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor


@dataclass(frozen=True)
class KVShape:
    """What one position takes in one block: so many heads, each with a key and a value of so many numbers."""

    heads: int
    key_size: int
    value_size: int

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory that a position takes."""
        return self.heads * (self.key_size + self.value_size) * dtype.itemsize


class KVStore:
    """Keys and values of `pages` pages for each block of a span.

    Attributes:
        shapes: for each block what a position takes.
        pages, page_tokens: how many pages rows may have, of how many slots each.
        spare_page: the number of one more page, which no row has; None where there is none.
        keys, values: for each block [slots, heads, size]; views of the store's memory, not always contiguous.
        head_keys, head_values: the same memory as [1, heads, slots, size], which is how attention reads it.
        bytes_per_token: memory that one position of one row takes, over all blocks.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        *,
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        heads_together: bool | None = None,
        spare: bool = False,
    ) -> None:
        """
        Args:
            shapes: for each block what a position takes.
            heads_together: whether the heads of a token lie side by side, rather than the tokens of a head; by default not on a CPU.
            spare: whether there is to be a spare page, for what rows of padding write.

        Raises:
            MemoryError: there is less memory than that. A CPU's is taken only as pages are first written.
            torch.OutOfMemoryError: the same of an accelerator.
        """
        self.shapes = list(shapes)
        self.pages, self.page_tokens = pages, page_tokens
        self.spare_page = pages if spare else None
        pages += spare
        self.slots = pages * page_tokens
        self.dtype, self.device = dtype, torch.device(device)
        if heads_together is None:
            heads_together = self.device.type != "cpu"
        sizes = [(shape.heads, size) for shape in shapes for size in (shape.key_size, shape.value_size)]
        self.bytes_per_token = sum(shape.bytes(dtype) for shape in shapes)
        # One piece for all, so that memory that does not suffice is found out now and not in the middle of an answer.
        memory = allocate(self.slots * self.bytes_per_token // dtype.itemsize, dtype, self.device, "KV entries")
        parts = memory.split([self.slots * heads * size for heads, size in sizes])
        tensors = [
            part.view(self.slots, heads, size) if heads_together else part.view(heads, self.slots, size).transpose(0, 1)
            for part, (heads, size) in zip(parts, sizes, strict=True)
        ]
        self.keys, self.values = tensors[::2], tensors[1::2]
        self.head_keys = [keys.transpose(0, 1).unsqueeze(0) for keys in self.keys]
        self.head_values = [values.transpose(0, 1).unsqueeze(0) for values in self.values]
        self._pages = [tensor.unflatten(0, (pages, page_tokens)) for tensor in tensors]

    def __len__(self) -> int:
        """How many blocks it holds entries for."""
        return len(self.keys)

    @property
    def machine_bytes(self) -> int:
        """Of the machine's own memory, what it takes or will have taken."""
        return self.slots * self.bytes_per_token if self.device.type == "cpu" else 0

    def write(self, block: int, slots: Tensor | slice, key: Tensor, value: Tensor) -> None:
        """Set slots of a block (int64 [tokens], or a slice with start and stop) to keys and values [tokens, heads, size]."""
        self.write_heads(block, slots, key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0))

    def write_heads(self, block: int, slots: Tensor | slice, key: Tensor, value: Tensor) -> None:
        """`write` for keys and values as attention modules make them: [1, heads, tokens, size]."""
        keys, values = self.head_keys[block], self.head_values[block]
        if isinstance(slots, slice):
            start, count = slots.start, slots.stop - slots.start
            keys.narrow(2, start, count).copy_(key)
            values.narrow(2, start, count).copy_(value)
        else:
            keys.index_copy_(2, slots, key)
            values.index_copy_(2, slots, value)

    def gather(self, block: int, pages: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values at positions [start, end) of a row.

        Args:
            pages: int64, on the store's device: the row's pages from position 0 on.
        Returns:
            keys and values [1, heads, end - start, size].
        """
        first = start // self.page_tokens
        used = pages[first : -(-end // self.page_tokens)]
        offset = start - first * self.page_tokens
        return self._gather(2 * block, used, offset, end - start), self._gather(2 * block + 1, used, offset, end - start)

    def _gather(self, index: int, pages: Tensor, offset: int, count: int) -> Tensor:
        tensor = self._pages[index]
        _, tokens, heads, size = tensor.shape
        if tensor.is_contiguous():
            slots = tensor.index_select(0, pages).view(-1, heads, size).transpose(0, 1)
        else:  # tokens of a head together: copied a page of a head at a time
            slots = tensor.permute(2, 0, 1, 3).flatten(2).index_select(1, pages).view(heads, -1, size)
        return slots.unsqueeze(0).narrow(2, offset, count)

    def copy_pages(self, copies: Sequence[tuple[int, int]], first_block: int, end_block: int) -> None:
        """Copy pages (source, target) in blocks [first_block, end_block); all sources are read before any target is written."""
        if not copies:
            return
        sources, targets = torch.tensor(copies, dtype=torch.long, device=self.device).unbind(1)
        for tensor in self._pages[2 * first_block : 2 * end_block]:
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))


def allocate(numbers: int, dtype: torch.dtype, device: torch.device, purpose: str, beside: int = 0) -> Tensor:
    """Memory for so many numbers, uninitialised; a CPU's is taken as it is first written.

    Args:
        purpose: what it is for, for a person.
        beside: bytes of a CPU's memory that others will take.
    Raises:
        MemoryError: a CPU has less.
        torch.OutOfMemoryError: an accelerator has.
    """
    if device.type == "cpu":
        size, available = numbers * dtype.itemsize, psutil.virtual_memory().available - beside
        if size > available:  # the system would promise it, and end the process when it is used
            raise MemoryError(f"{size / 1e9:.2f} GB are needed for {purpose}, {max(available, 0) / 1e9:.2f} GB are free")
    try:
        return torch.empty(numbers, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # how torch says that the CPU's allocator got nothing
        raise MemoryError(str(error)) from error
