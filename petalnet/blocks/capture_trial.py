"""Whether decoding is captured (see `captured`): tried before a span serves, and chosen by what is quicker on its device."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from petalnet.blocks.backends import CudaBackend
from petalnet.blocks.captured import Recorder
from petalnet.blocks.pages import Rows
from petalnet.blocks.span import Span, SpanStep
from petalnet.blocks.throughput import MEASURED_BLOCKS, PROMPT_TOKENS, own_store, rows_of, seconds

log = logging.getLogger(__name__)

ROWS = (1, 16)
"""Passes of so many rows are timed, and compared; so are those of one row less, which are padded."""
TOLERANCE = 0.03
"""How far outputs of both ways may be apart, over the largest of them: some times what rounding to bfloat16 adds in a few blocks."""


@dataclass(frozen=True)
class Choice:
    """Whether a span's decoding is captured, and why, for a person."""

    captured: bool
    why: str


def choose(span: Span, wanted: str, *, most_bytes: int, recorder: Recorder | None = None) -> Choice:
    """Have a span capture its decoding where that is wanted and works. Takes up to a second, in which nothing else may use it, or CUDA.

    Args:
        span: all of it on one device.
        wanted: "auto" for what is quicker, "on" for wherever it works, "off".
        most_bytes: of the device's memory that recordings may take.
        recorder: by default one of CUDA graphs, on CUDA.
    """
    choice = _choose(span, wanted, most_bytes, recorder)
    if not choice.captured:
        span.capture(None)
    level = logging.INFO if span.device.type == "cuda" or wanted == "on" else logging.DEBUG
    log.log(level, "decoding on %s is%s captured as CUDA graphs: %s", span.device, "" if choice.captured else " not", choice.why)
    return choice


def _choose(span: Span, wanted: str, most_bytes: int, recorder: Recorder | None) -> Choice:
    if wanted == "off":
        return Choice(False, "switched off")
    if recorder is None:
        if span.device.type != "cuda":
            return Choice(False, f"there are no CUDA graphs on {span.device.type}")
        from petalnet.blocks.recorder import CudaRecorder

        recorder = CudaRecorder(span.device)
    if not isinstance(span.backend, CudaBackend) or not span.packs:
        return Choice(False, "attention does not go by the kernel for pages")
    if not span.computes_alike(sys.maxsize):
        return Choice(False, "rotary frequencies depend on the longest position of a pass")
    blocks = min(len(span), MEASURED_BLOCKS)
    with own_store(span, blocks) as pool:
        passes = _passes(span, [rows_of(pool, PROMPT_TOKENS + 1) for _ in range(max(ROWS))])
        usual, usual_s = _run(span, passes, span.first + blocks)
        span.capture(recorder, most_bytes)
        found, captured_s = _run(span, passes, span.first + blocks)
        captured = span.captured
        if captured is None or captured.failure is not None:
            return Choice(False, "the store has no spare page" if captured is None else f"it failed: {captured.failure}")
    for one, other in zip(usual, found, strict=True):
        if not bool((one - other).abs().max() <= TOLERANCE * one.abs().max()):  # what is not a number is refused as well
            return Choice(False, "outputs differ from those of the usual way")
    quicker = sum(captured_s) < sum(usual_s)
    times = [f"{1e3 * s:.2f} ms for {count} row{'s' * (count > 1)}" for s, count in zip(captured_s, ROWS, strict=True)]
    before = " and ".join(f"{1e3 * s:.2f}" for s in usual_s)
    return Choice(quicker or wanted == "on", f"{' and '.join(times)}, {before} ms the usual way, through {blocks} blocks")


def _passes(span: Span, rows: Sequence[Rows]) -> list[list[SpanStep]]:
    """Passes of `ROWS` rows, then others of as many rows or one less, in another order: recordings have to take notice of that."""
    generator = torch.Generator().manual_seed(0)
    assert span.store is not None
    for entries in (*span.store.keys, *span.store.values):
        entries.normal_()
    steps = []
    for one in rows:
        one.advance(PROMPT_TOKENS)
        steps.append(SpanStep(one, torch.randn(1, 1, span.hidden_size, generator=generator)))
    return [steps[:count] for count in ROWS] + [steps[-max(count - 1, 1) :][::-1] for count in ROWS]


def _run(span: Span, passes: Sequence[list[SpanStep]], end: int) -> tuple[list[torch.Tensor], list[float]]:
    """The outputs of all passes, and the seconds that the first ones take."""
    outputs = [torch.cat([output for (output,) in span.step(steps, end=end)]).float() for steps in passes]
    return outputs, [seconds(partial(span.step, steps, end=end), span.device) for steps in passes[: len(ROWS)]]
