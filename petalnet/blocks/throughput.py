"""How fast a span runs on this machine, measured in a fraction of a second and remembered."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import SpanStep
from petalnet.blocks.spread import AnySpan
from petalnet.models.cachedir import load_facts, store_facts
from petalnet.version import __version__

MEASURED_BLOCKS = 3
"""Blocks that are run for a measurement: enough that their weights do not stay in a CPU's cache, few enough to be quick."""
PROMPT_TOKENS = 32
SESSIONS = (4, 16)
"""How many sessions' tokens are run together, beside one alone: a pass gets dearer in no simple way from one token to a prompt's."""
REMEMBERED_S = 7 * 86400.0
"""How long a measurement is used: the machine may have been busy with something else, have got another driver, or less power."""
WORTH_S = 0.04
"""A measurement is repeated for so long, that one interruption does not decide."""


@dataclass(frozen=True)
class Rates:
    """Tokens per second through all blocks of a span.

    Attributes:
        decode: one row, one token at a time.
        prefill: prompts of one session.
        forward: stateless passes.
        rounds: how long passes of so many sessions, each with one token, take: (sessions, seconds).
    """

    decode: float
    prefill: float
    forward: float
    rounds: tuple[tuple[int, float], ...] = ()


def measure(span: AnySpan, *, model: str, captured: bool = False) -> Rates:
    """The rates of a span; blocks for up to about half a second the first time.

    Args:
        span: must not be in use by another thread.
        model: the model's key, under which the result is remembered.
        captured: whether the span captures its decoding.
    """
    machine = " ".join(_machine(stage.device) for stage in span.stages)
    facts = f"{machine} {model} {span.dtype} {span.quantization} {len(span)} {span.packs} {captured} {torch.__version__} {__version__} 3"
    key = blake3(facts.encode()).hexdigest()
    known = _parse(load_facts("throughput", key), time.time())
    if known is not None:
        return known
    rates = _measure(span)
    store_facts("throughput", key, {**asdict(rates), "measured": time.time()})
    return rates


def _machine(device: torch.device) -> str:
    """What runs the blocks. The name alone does not tell: containers share one, or have another each time, and may be given fewer cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return f"{platform.node()} {processor} {cores} of {os.cpu_count()} {torch.get_num_threads()} {_device_name(device)}"


def _parse(facts: dict[str, Any], now: float) -> Rates | None:
    """Rates from what was remembered; None where that is not what `measure` stores, or is too old."""
    try:
        if not 0 <= now - float(facts["measured"]) <= REMEMBERED_S:
            return None
        rounds = tuple((int(sessions), float(seconds)) for sessions, seconds in facts["rounds"])
        return Rates(float(facts["decode"]), float(facts["prefill"]), float(facts["forward"]), rounds)
    except (KeyError, TypeError, ValueError):
        return None


def _measure(span: AnySpan) -> Rates:
    blocks = min(len(span), MEASURED_BLOCKS)
    end = span.first + blocks
    share = blocks / len(span)  # blocks are alike, so the whole span takes as many times as long as it has more of them
    device = span.device_of(end - 1)  # which is done when all before it are; the last of several devices has nothing to do with it
    prompt = torch.zeros(1, PROMPT_TOKENS, span.hidden_size, dtype=span.dtype, device=span.device_of(span.first))
    with own_store(span, blocks) as pool:
        starting = rows_of(pool, PROMPT_TOKENS)
        going_on = [rows_of(pool, PROMPT_TOKENS + 1) for _ in range(max(SESSIONS))]
        for rows in going_on:
            rows.advance(PROMPT_TOKENS)
        tokens = [SpanStep(rows, prompt[:, :1]) for rows in going_on]
        span.step(tokens[:1], end=end)  # the first run maps weights in
        decode_s = seconds(lambda: span.step(tokens[:1], end=end), device)
        rounds = [(count, seconds(partial(span.step, tokens[:count], end=end), device)) for count in SESSIONS]
        prefill_s = seconds(lambda: span.step([SpanStep(starting, prompt)], end=end), device)
        with torch.inference_mode():
            forward_s = seconds(lambda: span.forward(prompt, end=end), device)
    return Rates(
        decode=share / decode_s,
        prefill=share * PROMPT_TOKENS / prefill_s,
        forward=share * PROMPT_TOKENS / forward_s,
        rounds=tuple((count, seconds / share) for count, seconds in rounds),
    )


@contextmanager
def own_store(span: AnySpan, blocks: int) -> Iterator[PagePool]:
    """Give a span a small store for its first blocks, and afterwards the one that it had."""
    page_tokens = span.backend.page_tokens
    pool = PagePool((max(SESSIONS) + 1) * -(-(PROMPT_TOKENS + 1) // page_tokens), page_tokens)
    before = span.store
    store = span.make_store(pool.pages, blocks)
    for entries in (*store.keys, *store.values):
        entries.zero_()  # sessions go on behind prompts that nobody has run
    span.attach(store)  # type: ignore[arg-type]  # which is of its own kind, and so is the other
    try:
        yield pool
    finally:
        span.attach(before)  # type: ignore[arg-type]


def rows_of(pool: PagePool, tokens: int) -> Rows:
    rows = Rows(pool, tokens)
    rows.resize(1)
    rows.prepare(tokens)
    return rows


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least that one run takes, of as many as fit into `WORTH_S`."""
    best, began = float("inf"), time.perf_counter()
    while True:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - began >= WORTH_S:
            return max(best, 1e-9)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
