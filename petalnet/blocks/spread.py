"""A span over several devices of one machine: some blocks on each, in sequence, with their keys and values beside them.

Each part is a `Span` with a backbone of its own. The page tables are the same for all of them, since pages have the same numbers in every
block; so sessions know nothing of devices. What a part puts out goes to the next one's device, within autograd's graph where there is one.
Run by itself, such a span has one device at work at a time; `pipeline` has each work on another round.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from petalnet.blocks.adapters import Adapter, Dropout
from petalnet.blocks.backends import Backend
from petalnet.blocks.kv import KVShape, KVStore
from petalnet.blocks.packed import SpanStep
from petalnet.blocks.span import Span
from petalnet.models.checkpoint import ModelSource


class SpreadStore:
    """The keys and values of a span over several devices, each block's where the block is; see `KVStore`.

    Attributes:
        parts: a store for each part of the span, the last of which may be empty where it is for the first blocks only.
        pages, page_tokens, slots: as of each part.
        keys, values: for each block [slots, heads, size], on its own device.
        bytes_per_token: memory that one position of one row takes, over all blocks.
    """

    def __init__(self, parts: Sequence[KVStore]) -> None:
        """`parts`: have the same pages."""
        self.parts = list(parts)
        self.pages, self.page_tokens, self.slots = parts[0].pages, parts[0].page_tokens, parts[0].slots
        self.keys = [keys for part in parts for keys in part.keys]
        self.values = [values for part in parts for values in part.values]
        self.bytes_per_token = sum(part.bytes_per_token for part in parts)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def machine_bytes(self) -> int:
        """Of the machine's own memory, what it takes or will have taken."""
        return sum(part.machine_bytes for part in self.parts)

    def copy_pages(self, copies: Sequence[tuple[int, int]], first_block: int, end_block: int) -> None:
        """Copy pages (source, target) in blocks [first_block, end_block); all sources are read before any target is written."""
        first = 0
        for part in self.parts:
            begin, stop = max(first_block - first, 0), min(end_block - first, len(part))
            if begin < stop:
                part.copy_pages(copies, begin, stop)
            first += len(part)


class SpreadSpan:
    """Blocks [first, end) of a model, some on each device; for whoever uses it like a `Span`, whose attributes and methods it has.

    Attributes:
        stages: the parts, in the order of the blocks.
        device: of what `forward` and `step` return, which is the last part's; each takes its inputs from any device.
    """

    def __init__(self, stages: Sequence[Span]) -> None:
        """
        Args:
            stages: spans of one model in one dtype, on devices of one kind, each beginning where the one before ends.
        Raises:
            ValueError: they do not follow one another, or their backends have pages of different sizes.
        """
        if any(one.end != following.first for one, following in pairwise(stages)):
            raise ValueError(f"{[(stage.first, stage.end) for stage in stages]} do not follow one another")
        if len({stage.backend.page_tokens for stage in stages}) != 1:
            raise ValueError("the devices of a span must have pages of one size")
        self.stages = list(stages)
        one, last = stages[0], stages[-1]
        self.first, self.end, self.num_blocks = one.first, last.end, one.num_blocks
        self.hidden_size, self.dtype, self.device = one.hidden_size, one.dtype, last.device
        self.quantization = one.quantization
        self.backend, self.takes_position_ids = one.backend, one.takes_position_ids
        self.score_heads, self.max_positions = one.score_heads, one.max_positions
        self._store: SpreadStore | None = None

    @classmethod
    def load(
        cls, source: ModelSource, first: int, end: int, *, devices: Sequence[str | torch.device], counts: Sequence[int], **options: Any
    ) -> Span | SpreadSpan:
        """Load blocks [first, end), so many on each device; a plain span where one device has them all.

        Args:
            counts: how many blocks each device gets, in order; their sum is end - first. See `devices.split_blocks`.
            options: as for `Span.load`, whose errors it raises.
        """
        stages, begin = [], first
        for device, count in zip(devices, counts, strict=True):
            if count:
                stages.append(Span.load(source, begin, begin + count, device=device, **options))
                begin += count
        if begin != end:
            raise ValueError(f"{sum(counts)} blocks for the devices, and {end - first} to load")
        if len({stage.backend.page_tokens for stage in stages}) > 1:  # the kernel for pages runs on some only: rows have pages of one size
            for stage in stages:
                stage.backend = Backend()
        return stages[0] if len(stages) == 1 else cls(stages)

    @cached_property
    def digests(self) -> list[str]:
        """The identity of each block, in hex."""
        return [digest for stage in self.stages for digest in stage.digests]

    def __len__(self) -> int:
        return self.end - self.first

    def speed_up(self) -> None:
        """Let linear layers take the quickest kernels that there are."""
        for stage in self.stages:
            stage.speed_up()

    @cached_property
    def linear_shapes(self) -> dict[int, dict[str, tuple[int, int]]]:
        """(in, out) of each layer that LoRA can be for, by the model's number of its block and its path in the block."""
        return {number: shapes for stage in self.stages for number, shapes in stage.linear_shapes.items()}

    @property
    def weights(self) -> list[torch.Tensor]:
        """All parameters and buffers."""
        return [weight for stage in self.stages for weight in stage.weights]

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take, on all devices."""
        return sum(stage.weight_bytes for stage in self.stages)

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory that one position of one row takes, on all devices."""
        return sum(stage.kv_bytes_per_token for stage in self.stages)

    @cached_property
    def kv_shapes(self) -> list[KVShape]:
        """What a position takes in each block."""
        return [shape for stage in self.stages for shape in stage.kv_shapes]

    @cached_property
    def packs(self) -> bool:
        """Whether steps of several sessions can share a pass."""
        return all(stage.packs for stage in self.stages)

    def device_of(self, block: int) -> torch.device:
        """Where a block of the model is, by its number."""
        return next(stage.device for stage in self.stages if block < stage.end)

    @property
    def store(self) -> SpreadStore | None:
        """Where keys and values are kept."""
        return self._store

    def make_store(self, pages: int, blocks: int | None = None) -> SpreadStore:
        """A store of so many pages, for all blocks or only for the first ones. Raises as `KVStore` does."""
        left = len(self) if blocks is None else blocks
        parts = []
        for stage in self.stages:
            parts.append(stage.make_store(pages, min(left, len(stage))))
            left -= min(left, len(stage))
        return SpreadStore(parts)

    def attach(self, store: SpreadStore | None) -> None:
        """Keep keys and values in a store from now on; None: in none."""
        self._store = store
        for number, stage in enumerate(self.stages):
            stage.attach(None if store is None else store.parts[number])

    def step(self, steps: Sequence[SpanStep], first: int | None = None, end: int | None = None) -> list[list[torch.Tensor]]:
        """Run steps of several sessions through blocks [first, end) of the model, by default all of the span; see `Span.step`."""
        first, end = self._range(first, end)
        found: list[list[torch.Tensor]] = [[] for _ in steps]
        for stage, begin, stop in self._within(first, end):
            found = run_stage(stage, steps, found, first, begin, stop)
        return [on_one_device(outputs) for outputs in found]

    def batch_key(self, position_end: int, session: Hashable) -> Hashable:
        """Steps that have equal keys, and run through the same blocks, may share a pass."""
        return self.stages[0].batch_key(position_end, session) if self.packs else ("alone", session)

    def computes_alike(self, positions: int) -> bool:
        """Whether the keys of equal beginnings are equal in any two sequences of at most so many positions, however long each becomes."""
        return all(stage.computes_alike(positions) for stage in self.stages)

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        first: int | None = None,
        end: int | None = None,
        all_hidden: bool = False,
        position_end: int | None = None,
        adapters: Sequence[Adapter] = (),
        dropout: Dropout | None = None,
    ) -> list[torch.Tensor]:
        """Run rows without a past through blocks [first, end) of the model, by default all of the span; see `Span.forward`. Gradients
        flow back over all devices."""
        first, end = self._range(first, end)
        outputs: list[torch.Tensor] = []
        for stage, begin, stop in self._within(first, end):
            found = stage.forward(
                hidden,
                attention_mask=attention_mask,
                position_ids=position_ids,
                prompts=None if prompts is None else prompts[begin - first : stop - first],
                first=begin,
                end=stop,
                all_hidden=all_hidden,
                position_end=position_end,
                adapters=adapters,
                dropout=dropout,
            )
            hidden = found[-1]
            outputs = outputs + found if all_hidden else found
        return on_one_device(outputs)

    def _within(self, first: int, end: int) -> Iterator[tuple[Span, int, int]]:
        """The parts that blocks [first, end) are on, and which of these each has."""
        for stage in self.stages:
            begin, stop = max(first, stage.first), min(end, stage.end)
            if begin < stop:
                yield stage, begin, stop

    def _range(self, first: int | None, end: int | None) -> tuple[int, int]:
        first, end = self.first if first is None else first, self.end if end is None else end
        if not self.first <= first < end <= self.end:
            raise ValueError(f"blocks {first}:{end} are not within {self.first}:{self.end}")
        return first, end


AnySpan = Span | SpreadSpan
"""What a server serves."""


def run_stage(
    stage: Span, steps: Sequence[SpanStep], before: Sequence[list[torch.Tensor]], first: int, begin: int, stop: int
) -> list[list[torch.Tensor]]:
    """Run steps through blocks [begin, stop), all on one device, that began at block `first`.

    Args:
        before: for each step the outputs of the parts before this one; empty in the first.
    Returns:
        for each step its outputs so far, on several devices: the last one, or with `all_hidden` one a block.
    """
    entering = [
        step
        if not outputs and step.prompts is None
        else replace(
            step,
            hidden=outputs[-1] if outputs else step.hidden,
            prompts=None if step.prompts is None else step.prompts[begin - first : stop - first],
        )
        for step, outputs in zip(steps, before, strict=True)
    ]
    found = stage.step(entering, begin, stop)
    return [[*outputs, *more] if step.all_hidden else more for step, outputs, more in zip(steps, before, found, strict=True)]


def on_one_device(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on the device of the last one."""
    return [output.to(outputs[-1].device) for output in outputs]
