"""The new tokens of several sessions side by side, as one row that a backbone runs in one pass.

Every row of every session becomes a segment: some columns of the packed row, and the pages where its earlier keys and values are.
Attention keeps the segments apart; whatever else a layer does, it does for each token by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petalnet.blocks.adapters import Adapter
from petalnet.blocks.attention import Segment
from petalnet.blocks.pages import PageTables


@dataclass(eq=False)
class SpanStep:
    """One session's new tokens in a pass.

    Attributes:
        rows: the session's page tables, prepared for the new tokens; running the step does not advance them.
        hidden: [rows, new, hidden], new ≥ 1, the input of the first block; any float dtype, any device.
        mask: bool [rows, past + new] on the CPU, False where a token is padding; None when nothing is.
        position_ids: [rows, new]; None when they are past … past + new - 1 in every row.
        prompts: [blocks, rows, prompt length, hidden], added to each block's input at positions 0 … prompt length - 1.
        all_hidden: return the outputs of every block, not only of the last.
        position_end: one past the last position that the session's step reaches, where this is only a part of it: it decides which
            frequencies the rotary embeddings of some families take. None where this is all of the step.
        adapters: are applied to it, as far as they are for these blocks.
    """

    rows: PageTables
    hidden: torch.Tensor
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    prompts: torch.Tensor | None = None
    all_hidden: bool = False
    position_end: int | None = None
    adapters: tuple[Adapter, ...] = ()


@dataclass(eq=False)
class PackedRow:
    """What a pass needs of all its steps together.

    Attributes:
        hidden: [1, columns, hidden].
        position_ids: [1, columns], where they were asked for.
        segments: one for each row of each step, in order.
        columns: for each step which columns are its own: rows × new of them, row after row.
        prompted: the columns to which a prompt is added (int64), and what is added, [blocks, columns, hidden]; None where none is.
    """

    hidden: torch.Tensor
    position_ids: torch.Tensor | None
    segments: list[Segment]
    columns: list[slice]
    prompted: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, steps: Sequence[SpanStep], *, dtype: torch.dtype, device: torch.device, positions: bool) -> PackedRow:
        """Put steps side by side. `positions`: whether the backbone is told positions."""
        segments: list[Segment] = []
        columns: list[slice] = []
        column = 0
        for step in steps:
            began, past = column, step.rows.length
            count, new, _ = step.hidden.shape
            padding = _padding(step.mask) if step.mask is not None else [(0, None)] * count
            for row, (first, mask) in enumerate(padding):
                segments.append(Segment(column, column + new, past, step.rows.tables[row], step.rows.run(row), first, mask))
                column += new
            columns.append(slice(began, column))
        hidden = [step.hidden.to(device, dtype).reshape(1, -1, step.hidden.shape[2]) for step in steps]
        return cls(
            hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1),
            _positions(steps, device) if positions else None,
            segments,
            columns,
            _prompted(steps, columns, dtype, device),
        )


def _padding(mask: torch.Tensor) -> list[tuple[int, torch.Tensor | None]]:
    """For each row of a mask where its tokens begin, and its mask where there is padding between or after them as well."""
    length = mask.shape[1]
    kept, firsts = mask.sum(dim=1).tolist(), mask.int().argmax(dim=1).tolist()
    found: list[tuple[int, torch.Tensor | None]] = []
    for row, (count, first) in enumerate(zip(kept, firsts, strict=True)):
        if count == 0:
            found.append((length, None))
        else:
            found.append((first, None if first + count == length else mask[row]))
    return found


def _positions(steps: Sequence[SpanStep], device: torch.device) -> torch.Tensor:
    if all(step.position_ids is None for step in steps):
        if len(steps) == 1 and steps[0].hidden.shape[0] == 1:
            past = steps[0].rows.length
            return torch.arange(past, past + steps[0].hidden.shape[1], device=device).unsqueeze(0)
        numbers: list[int] = []
        for step in steps:
            count, new, _ = step.hidden.shape
            numbers += list(range(step.rows.length, step.rows.length + new)) * count
        return torch.tensor([numbers], device=device)
    parts = []
    for step in steps:
        count, new, _ = step.hidden.shape
        if step.position_ids is not None:
            parts.append(step.position_ids.to(device, torch.long).reshape(-1))
        else:
            parts.append(torch.arange(step.rows.length, step.rows.length + new, device=device).repeat(count))
    return torch.cat(parts).unsqueeze(0)


def _prompted(
    steps: Sequence[SpanStep], columns: Sequence[slice], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which columns lie where prompts are added, and what of the prompts they get."""
    where: list[torch.Tensor] = []
    what: list[torch.Tensor] = []
    for step, span in zip(steps, columns, strict=True):
        past = step.rows.length
        if step.prompts is None or past >= step.prompts.shape[2]:
            continue
        count, new, _ = step.hidden.shape
        reaching = step.prompts[:, :, past : past + new]
        offsets = torch.arange(reaching.shape[2])
        where.append((span.start + torch.arange(count)[:, None] * new + offsets).reshape(-1))
        what.append(reaching.to(device, dtype).flatten(1, 2))
    if not where:
        return None
    return torch.cat(where).to(device), torch.cat(what, dim=1)
