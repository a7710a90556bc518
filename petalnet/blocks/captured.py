"""Decoding without Python between the kernels: passes of one new token a row, captured once and replayed.

On a GPU the kernels of a small pass take less time than Python takes to start them. So where every row of a pass has one new token, the
pass is captured (as a CUDA graph, see `recorder`) over buffers that stay where they are, and replaying it costs what its kernels cost.
Nothing that changes from pass to pass may be a number in Python then: positions, slots to write, page tables and lengths are read from
those buffers on the device.

Passes are captured by **shape**: rows are padded to a power of two, and so is the number of pages in the longest row's table. Rows of
padding write to the store's spare page and read from there, so that nothing of anybody's is touched. Usual shapes are captured at the
start, others when they first occur; recordings are bounded in number and in bytes, and the one that was used longest ago goes first.

What is not captured goes the usual way: several new tokens a row (prompts, speculated tokens), padding among a row's tokens, prompts that
are added to blocks, outputs of every block, adapters. Where capturing fails, everything does from then on.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from petalnet.blocks.attention import Batch
from petalnet.blocks.backends import PagedCall
from petalnet.blocks.kv import KVStore
from petalnet.blocks.packed import SpanStep

log = logging.getLogger(__name__)

MOST_ROWS = 64
"""Rows of a pass that is captured; with more, kernels take longer than Python does."""
MOST_RECORDINGS = 64
"""There are seven numbers of rows, and tables for a million tokens double a dozen times: few servers ever see so many shapes."""


USUAL_ROWS = (16, 8, 4, 2, 1)
USUAL_PAGES = (8, 4, 2, 1)
"""Shapes that are captured before anybody waits for them, the most frequent last: those are given up last."""


class Recording(Protocol):
    """A captured pass.

    Attributes:
        nbytes: the device's memory that it takes.
    """

    @property
    def nbytes(self) -> int: ...

    def replay(self) -> None:
        """Do again what was captured, with what the buffers hold now."""


class Recorder(Protocol):
    """What captures functions that take and return nothing, and work on buffers."""

    def record(self, run: Callable[[], None]) -> Recording:
        """Capture a function; it is run meanwhile. Raises whatever keeps it from being captured."""


class RunRow(Protocol):
    """Runs a packed row through blocks [first, end) of a model; the last of the outputs, [1, columns, hidden], is the last block's."""

    def __call__(self, batch: Batch, hidden: Tensor, position_ids: Tensor | None, first: int, end: int) -> list[Tensor]: ...


class CapturedDecode:
    """The captured passes over one store. Belongs to the thread that runs the span.

    Attributes:
        failure: why nothing is captured any more; None while all is well.
        replayed: how many passes recordings have done.
        nbytes: of the device's memory, what recordings take.
    """

    def __init__(
        self, run: RunRow, recorder: Recorder, store: KVStore, *, hidden_size: int, takes_positions: bool, most_bytes: int
    ) -> None:
        """
        Args:
            run: runs a row over the store. It may raise what it likes where that cannot be captured.
            store: has a spare page.
            takes_positions: whether the backbone is told positions.
            most_bytes: of the device's memory, what recordings may take.
        Raises:
            ValueError: the store has no spare page.
        """
        if store.spare_page is None:
            raise ValueError("padding needs a spare page to be written to")
        self._run_row = run
        self._recorder = recorder
        self._store, self._spare_page = store, store.spare_page
        self._takes_positions = takes_positions
        self._most_bytes = most_bytes
        self._captured: OrderedDict[_Shape, _Captured] = OrderedDict()
        self._hidden = torch.zeros(1, MOST_ROWS, hidden_size, dtype=store.dtype, device=store.device)
        self._output = torch.zeros_like(self._hidden)
        self.failure: str | None = None
        self.replayed = 0
        self.nbytes = 0

    def __len__(self) -> int:
        """How many shapes are captured."""
        return len(self._captured)

    def describe(self) -> dict[str, Any]:
        """What goes on here, for the node's own user; plain values."""
        return {"recordings": len(self), "bytes": self.nbytes, "replayed": self.replayed, "failure": self.failure}

    def run(self, steps: Sequence[SpanStep], first: int, end: int) -> list[list[Tensor]] | None:
        """Run steps through blocks [first, end) of the model, as `Span.step` does; None where they are to go the usual way."""
        if self.failure is not None or not all(map(_is_taken, steps)):
            return None
        rows = [row for step in steps for row in _rows_of(step)]
        if len(rows) > MOST_ROWS:
            return None
        pages = max(row.past for row in rows) // self._store.page_tokens + 1
        shape = _Shape(first, end, _padded(len(rows)), _padded(pages))
        self._enter(steps, len(rows), shape.rows)
        captured = self._captured.get(shape)
        if captured is not None:
            self._captured.move_to_end(shape)
            captured.numbers.fill(rows)
        else:
            captured = self._capture(shape, rows)
            if captured is None:
                return None
        captured.recording.replay()
        self.replayed += 1
        output = self._output[0, : len(rows)].clone()  # since the next pass writes there
        return [[part.unsqueeze(1)] for part in output.split([len(step.hidden) for step in steps])]

    def prepare(self, first: int, end: int) -> None:
        """Capture the usual shapes of passes through blocks [first, end), by passes of nothing but padding."""
        with torch.inference_mode():
            for rows, pages in itertools.product(USUAL_ROWS, USUAL_PAGES):
                shape = _Shape(first, end, rows, pages)
                if self.failure is None and pages <= self._store.pages and shape not in self._captured:
                    self._capture(shape, [])

    def _enter(self, steps: Sequence[SpanStep], rows: int, padded: int) -> None:
        """Bring the steps' inputs into the buffer: from the machine's memory in one transfer, not in one a step."""
        hidden = [step.hidden.reshape(-1, step.hidden.shape[2]) for step in steps]
        if len({(part.device, part.dtype) for part in hidden}) > 1:
            hidden = [part.to(self._hidden.device, self._hidden.dtype) for part in hidden]
        self._hidden[0, :rows].copy_(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        if rows < padded:
            self._hidden[0, rows:padded].zero_()

    def _capture(self, shape: _Shape, rows: Sequence[_Row]) -> _Captured | None:
        """Capture a pass of these rows; None where that fails. What the pass writes may have been written then."""
        store = self._store
        numbers = _Numbers(shape.rows, shape.pages, store.page_tokens, self._spare_page, store.device)
        numbers.fill(rows)
        hidden, output = self._hidden[:, : shape.rows], self._output[:, : shape.rows]
        position_ids = numbers.position_ids if self._takes_positions else None

        def run() -> None:
            output.copy_(self._run_row(numbers.batch(), hidden, position_ids, shape.first, shape.end)[-1])

        try:
            recording = self._recorder.record(run)
        except Exception as error:
            # A family's code, a library's kernels and torch say in as many ways that they cannot be captured; memory may be short as well.
            self._give_up(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            return None
        captured = self._captured[shape] = _Captured(numbers, recording)
        self.nbytes += recording.nbytes
        while len(self) > 1 and (len(self) > MOST_RECORDINGS or self.nbytes > self._most_bytes):
            _, oldest = self._captured.popitem(last=False)
            self.nbytes -= oldest.recording.nbytes
        if self.nbytes > self._most_bytes:
            self._give_up(f"a recording takes {self.nbytes / 1e6:.0f} MB of the {self._most_bytes / 1e6:.0f} MB that there are for all")
            return None
        log.debug("captured passes of %d rows of %d pages through blocks %d:%d", shape.rows, shape.pages, shape.first, shape.end)
        return captured

    def _give_up(self, why: str) -> None:
        self.failure = why
        self._captured.clear()
        self.nbytes = 0
        log.warning("decoding is not captured any more, which makes it slower: %s", why)


class _Shape(NamedTuple):
    """Passes of one shape share a recording: the blocks, and rows and pages of the longest row, both padded."""

    first: int
    end: int
    rows: int
    pages: int


class _Row(NamedTuple):
    """A row with one new token: KV entries before it, its position for rotary embeddings, the row's pages from the first on."""

    past: int
    position: int
    pages: Sequence[int]


class _Numbers:
    """What captured passes of one shape read beside hidden states: written on the host, and brought to the device in one transfer.

    Attributes:
        position_ids: int64 [1, rows], on the device.
    """

    def __init__(self, rows: int, pages: int, page_tokens: int, spare_page: int, device: torch.device) -> None:
        self._rows, self._pages, self._page_tokens = rows, pages, page_tokens
        self._device = device
        self._padding = _Row(0, 0, (spare_page,))
        # Positions, slots, used entries, sums of these, page tables.
        self._sizes = [rows, rows, rows, rows + 1, rows * pages]
        self._on_host = torch.zeros(sum(self._sizes), dtype=torch.long, pin_memory=device.type == "cuda")
        self._on_device = torch.zeros_like(self._on_host, device=device)
        self._table = self._on_host[-rows * pages :].view(rows, pages)
        self._held: list[list[int]] = [[] for _ in range(rows)]  # what the rows of the table begin with
        self._queries = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.position_ids = self._on_device[:rows].unsqueeze(0)

    def fill(self, rows: Sequence[_Row]) -> None:
        """Have the next pass be one of these rows, and of padding."""
        size = self._page_tokens
        filled = [*rows, *[self._padding] * (self._rows - len(rows))]
        used = [row.past + 1 for row in filled]
        numbers = [row.position for row in filled]
        numbers += [row.pages[row.past // size] * size + row.past % size for row in filled]
        numbers += [*used, *itertools.accumulate(used, initial=0)]
        self._on_host[: len(numbers)] = torch.tensor(numbers)
        for index, row in enumerate(filled):
            held = list(row.pages[: row.past // size + 1])
            if held != self._held[index]:  # which is so once a page, and a long row has many
                self._table[index, : len(held)] = torch.tensor(held)
                self._held[index] = held
        self._on_device.copy_(self._on_host)

    def batch(self) -> Batch:
        """A pass whose numbers are read on the device; part of what is captured."""
        slots = self._on_device.split(self._sizes)[1]
        _, _, used, keys, table = self._on_device.to(torch.int32).split(self._sizes)
        call = PagedCall(
            columns=None,
            others=(),
            other_columns=slots[:0],
            queries=self._queries,
            keys=keys,
            used=used,
            table=table.view(self._rows, self._pages),
            most_queries=1,
            most_keys=self._pages * self._page_tokens,
        )
        return _CapturedBatch(call, slots, self._page_tokens, self._device)


class _CapturedBatch(Batch):
    """A pass of which Python knows no segments: what these come to is on the device."""

    def __init__(self, call: PagedCall, slots: Tensor, page_tokens: int, device: torch.device) -> None:
        # `Batch` would find the slots by the segments.
        self.segments = ()
        self.page_tokens, self.device = page_tokens, device
        self.slots = slots
        self.prepared = {"paged": call}


@dataclass(eq=False)
class _Captured:
    numbers: _Numbers
    recording: Recording


def _is_taken(step: SpanStep) -> bool:
    """Whether a step may take part in a captured pass."""
    return (
        step.hidden.shape[1] == 1
        and not step.all_hidden
        and not step.adapters
        and (step.prompts is None or step.rows.length >= step.prompts.shape[2])
        and (step.mask is None or bool(step.mask.all()))
    )


def _rows_of(step: SpanStep) -> list[_Row]:
    past, tables = step.rows.length, step.rows.tables
    if step.position_ids is None:
        return [_Row(past, past, table) for table in tables]
    return [_Row(past, position, table) for position, table in zip(step.position_ids.reshape(-1).tolist(), tables, strict=True)]


def _padded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
