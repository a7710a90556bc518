"""A round on its way through the devices of a span: what is run beside each, by a thread of that device's or by the compute thread itself.

The compute thread begins a round and finishes it (see `runner`); page tables and sessions change nowhere else. In between a round holds all
that its devices need: inputs, the page tables as they were when it began, and the pages that have to be copied first. So several rounds may
be under way, one on each device. What keeps them apart is their order: each device runs the steps of rounds in the order in which the
rounds were begun, which is the order in which the page tables were changed. A page that one round has given up and a later one has taken
is written by the later one only after the former has read it, on every device.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import outcome
import torch

from petalnet.blocks.packed import SpanStep
from petalnet.blocks.passes import PassWork
from petalnet.blocks.scheduler import Part
from petalnet.blocks.sessions import Session
from petalnet.blocks.span import Span
from petalnet.blocks.spread import on_one_device, run_stage
from petalnet.blocks.work import StepWork

log = logging.getLogger(__name__)

Outcome = outcome.Outcome[Any]


@dataclass(eq=False)
class Entry:
    """Some of a step's tokens in a round.

    Attributes:
        part: which tokens of which step.
        step: their inputs, with the page tables as of when the round began.
        copies: pages (source, target) that are to be copied before.
        outputs: of the blocks so far: of the last, or of each where the step wants all.
        piece: what the answer needs of the outputs, in the machine's memory; there once the last device is done.
        error: what went wrong; nothing more is run of it then.
        copied: whether the pages were copied wherever they had to be.
    """

    part: Part
    step: SpanStep
    copies: list[tuple[int, int]]
    outputs: list[torch.Tensor] = field(default_factory=list)
    piece: torch.Tensor | None = None
    error: Exception | None = None
    copied: bool = True

    @property
    def work(self) -> StepWork:
        work: StepWork = self.part.task.work
        return work

    @property
    def session(self) -> Session:
        return self.work.session


class Round:
    """A round that was begun. Its visits are to be run in order, `run(0)`, `run(1)`, …, each on the thread of its device.

    Attributes:
        parts: what it is made of.
        entries: those that are steps of sessions, in order.
        outcomes: of parts that are done with: steps without tokens, passes, and what could not begin.
        devices: for each visit the number of the device, in the order of the blocks. Steps visit all devices, whether their blocks are
            there or not: that keeps rounds in order.
        seconds: what the visits took so far.
    """

    def __init__(self, parts: Sequence[Part], stages: Sequence[Span]) -> None:
        """`stages`: the parts of the span, a device each."""
        self.parts = parts
        self.entries: list[Entry] = []
        self.outcomes: dict[Part, Outcome | None] = {}
        self.devices: list[int] = []
        self.seconds = 0.0
        self._stages = stages
        # Of a pass, which part and units; None for steps. Not its own functions: cycles like that are ended by the collector alone.
        self._visits: list[tuple[Part, int, int] | None] = []

    def add(self, entry: Entry) -> None:
        """One more step's part is to be run."""
        if not self.entries:
            for device in range(len(self._stages)):
                self._visit(device, None)
        self.entries.append(entry)

    def add_pass(self, part: Part) -> None:
        """A pass's part is to be run: device by device, as its blocks come."""
        work: PassWork = part.task.work
        self.outcomes[part] = None
        start = part.start
        while start < part.end:
            device, end = self._device_of(work, start), start + 1
            while end < part.end and self._device_of(work, end) == device:
                end += 1
            self._visit(device, (part, start, end))
            start = end

    def run(self, visit: int) -> None:
        """Run a visit. What fails is noted for `Runner.finish`."""
        started = time.perf_counter()
        units = self._visits[visit]
        if units is None:
            self._run_steps(self._stages[self.devices[visit]])
        else:
            self._run_pass(*units)
        self.seconds += time.perf_counter() - started

    def fail(self, error: Exception) -> None:
        """Have the whole round failed."""
        for entry in self.entries:
            entry.error = entry.error or error
            entry.copied = entry.copied and not entry.copies
        self.outcomes.update((part, outcome.Error(error)) for part in self.parts if part in self.outcomes)

    def _visit(self, device: int, units: tuple[Part, int, int] | None) -> None:
        self.devices.append(device)
        self._visits.append(units)

    def _device_of(self, work: PassWork, unit: int) -> int:
        block = work.block_of(unit)
        return next(number for number, stage in enumerate(self._stages) if block < stage.end)

    def _run_steps(self, stage: Span) -> None:
        for entry in self.entries:
            if entry.copies and entry.copied:  # whatever else has failed: the row's pages are these now, on each device
                self._copy(entry, stage)
        packs: dict[Hashable, list[Entry]] = {}
        for entry in self.entries:
            if entry.error is None:
                key = entry.part.task.key
                packs.setdefault(key if key is not None else entry, []).append(entry)
        for pack in packs.values():
            self._run_pack(pack, stage)

    def _copy(self, entry: Entry, stage: Span) -> None:
        begin, stop = max(entry.session.first, stage.first), min(entry.session.end, stage.end)
        if begin >= stop or stage.store is None:
            return
        try:
            stage.store.copy_pages(entry.copies, begin - stage.first, stop - stage.first)
        except Exception as error:  # the boundary of one request: its failure is its own
            entry.error, entry.copied = error, False

    def _run_pack(self, pack: list[Entry], stage: Span) -> None:
        """Run entries that share a pass through what is on a device, or each by itself where that fails."""
        first, end = pack[0].session.first, pack[0].session.end
        begin, stop = max(first, stage.first), min(end, stage.end)
        if begin >= stop:
            return
        try:
            with torch.inference_mode():
                found = run_stage(stage, [entry.step for entry in pack], [entry.outputs for entry in pack], first, begin, stop)
                if stop < end:
                    self._hand_on(found, stage)
                else:
                    pieces = on_host(
                        [
                            entry.work.wanted(entry.part.start, entry.part.end, on_one_device(outputs))
                            for entry, outputs in zip(pack, found, strict=True)
                        ]
                    )
        except Exception as error:  # the boundary of the compute threads: whose fault it is shows below
            traceback.clear_frames(error.__traceback__)  # what the pass had in memory may be what others lack
            if len(pack) == 1:
                pack[0].error = error
                return
            log.warning("a pass of %d sessions failed (%s); each runs by itself", len(pack), type(error).__name__)
            for entry in pack:
                self._run_pack([entry], stage)
            return
        for number, entry in enumerate(pack):
            if stop < end:
                entry.outputs = found[number]
            else:
                entry.outputs, entry.piece = [], pieces[number]

    def _hand_on(self, found: list[list[torch.Tensor]], stage: Span) -> None:
        """Have the last outputs on the next device: ordered now, that is done before this one's next round begins."""
        following = next(one for one in self._stages if one.first == stage.end)
        for outputs in found:
            outputs[-1] = outputs[-1].to(following.device)

    def _run_pass(self, part: Part, start: int, end: int) -> None:
        if self.outcomes[part] is not None:
            return
        work: PassWork = part.task.work
        try:
            work.part(start, end)
            if end == part.task.units:
                self.outcomes[part] = outcome.Value(work.answer())
        except Exception as error:  # the boundary of one request: its failure is its own
            self.outcomes[part] = outcome.Error(error)


def on_host(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The tensors in the machine's memory; from a device they come in one transfer, which the device waits for once."""
    moved = [tensor for tensor in tensors if tensor is not None and tensor.device.type != "cpu"]
    if not moved:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in moved]).cpu().split([tensor.numel() for tensor in moved])
    parts = iter(flat)
    return [tensor if tensor is None or tensor.device.type == "cpu" else next(parts).view(tensor.shape) for tensor in tensors]
