"""A trace as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petalnet.client.trace import HopTotals, Trace


def lines_of(trace: Trace) -> Iterator[str]:
    """A trace as a table for a person."""
    yield trace.summary
    if trace.median_token_s is not None and trace.worst_token_s is not None:
        yield f"from token to token: median {describe_seconds(trace.median_token_s)}, worst {describe_seconds(trace.worst_token_s)}"
    prompt = f"first step: {counted(trace.prompt_tokens, 'token')}"
    if trace.prompt_chunks > 1:
        prompt += f" in {trace.prompt_chunks} chunks"
    yield f"{counted(trace.steps, 'step')}; {prompt}" if trace.steps else "no step was completed"
    if trace.drafted:
        yield f"{counted(trace.drafted, 'token')} guessed ahead, {trace.accepted} of them right"
    yield from map(str, trace.recoveries)
    steps = max(trace.steps, 1)
    rows: list[tuple[str, ...]] = [("", "share", "total", "a step", "queue", "compute", "other", "output goes")]
    for hop in trace.hops:
        rows.append(
            (
                f"{hop.name} {hop.first}:{hop.end}",
                *_share(trace, hop.held_s, max(hop.steps, 1)),
                *(describe_seconds(seconds) for seconds in (hop.queue_s, hop.compute_s, hop.overhead_s)),
                _destination(trace, hop),
            )
        )
    rows.append(("network", *_share(trace, trace.network_s, steps), "", "", "", ""))
    if trace.complete:
        rows.append(("this machine", *_share(trace, trace.local_s, steps), "", "", "", ""))
    if trace.waiting_s * 200 > trace.wall_s:
        rows.append(("waiting for servers", *_share(trace, trace.waiting_s, None), "", "", "", ""))
    yield from _columns(rows)
    yield f"most of it: {trace.slowest}"


def _share(trace: Trace, seconds: float, steps: int | None) -> tuple[str, str, str]:
    share = f"{seconds / trace.wall_s * 100:.0f} %" if trace.wall_s else ""
    return share, describe_seconds(seconds), "" if steps is None else describe_seconds(seconds / steps)


def _destination(trace: Trace, hop: HopTotals) -> str:
    if not any(hop is used for used in trace.chain):
        return "not used any more"
    if hop is trace.chain[-1]:
        return "to this machine"
    if not hop.relayed_steps:
        return "to the next server"
    return "through this machine" + (f" ({hop.relayed_steps} of {hop.steps} steps)" if hop.relayed_steps < hop.steps else "")


def describe_seconds(seconds: float) -> str:
    """`1.23 s`, `41 ms`, `0.4 ms`, `80 µs`."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 0.9995:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    if seconds >= 0.00095:
        return f"{seconds * 1e3:.0f} ms" if seconds >= 0.00995 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} µs"


def counted(count: int, noun: str) -> str:
    """`1 step`, `1,024 tokens`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines of aligned columns, numbers to the right."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    last = len(widths) - 1
    for row in table:
        cells = zip(row, widths, strict=True)
        yield "  ".join(cell.ljust(size) if column in (0, last) else cell.rjust(size) for column, (cell, size) in enumerate(cells)).rstrip()
