"""How fast a span runs on this machine, measured in a fraction of a second and remembered."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from blake3 import blake3

from petalnet.blocks.span import Span
from petalnet.models.cachedir import load_facts, store_facts
from petalnet.version import __version__

MEASURED_BLOCKS = 3
"""Blocks that are run for a measurement: enough that their weights do not stay in a CPU's cache, few enough to be quick."""
PROMPT_TOKENS = 32
DECODE_STEPS = 3
WORTH_S = 0.05
"""A measurement is repeated for so long, that one interruption does not decide."""


@dataclass(frozen=True)
class Rates:
    """Tokens per second through all blocks of a span.

    Attributes:
        decode: one row, one token at a time.
        prefill: prompts of one session.
        forward: stateless passes.
    """

    decode: float
    prefill: float
    forward: float


def measure(span: Span, *, model: str) -> Rates:
    """The rates of a span; blocks for up to about half a second the first time.

    Args:
        span: must not be in use by another thread.
        model: the model's key, under which the result is remembered.
    """
    machine = f"{platform.node()} {platform.processor()} {os.cpu_count()} {torch.get_num_threads()} {_device_name(span.device)}"
    facts = f"{machine} {model} {span.dtype} {len(span)} {torch.__version__} {__version__}"
    key = blake3(facts.encode()).hexdigest()
    known = load_facts("throughput", key)
    if set(known) == {"decode", "prefill", "forward"} and all(isinstance(rate, float) for rate in known.values()):
        return Rates(**known)
    rates = _measure(span)
    store_facts("throughput", key, asdict(rates))
    return rates


def _measure(span: Span) -> Rates:
    blocks = min(len(span), MEASURED_BLOCKS)
    end = span.first + blocks
    share = blocks / len(span)  # blocks are alike, so the whole span takes as many times as long as it has more of them
    prompt = torch.zeros(1, PROMPT_TOKENS, span.hidden_size, dtype=span.dtype, device=span.device)
    token = prompt[:, :1]
    with torch.inference_mode():
        cache = span.new_cache(PROMPT_TOKENS + DECODE_STEPS)

        def prefill() -> None:
            cache.set_length(0)
            span.forward(prompt, cache=cache, end=end)

        def decode() -> None:
            cache.set_length(PROMPT_TOKENS)
            for _ in range(DECODE_STEPS):
                span.forward(token, cache=cache, end=end)

        def forward() -> None:
            span.forward(prompt, end=end)

        span.forward(token, end=end)  # the first run maps weights in
        prefill_s, decode_s, forward_s = (_seconds(run, span.device) for run in (prefill, decode, forward))
    return Rates(
        decode=share * DECODE_STEPS / decode_s, prefill=share * PROMPT_TOKENS / prefill_s, forward=share * PROMPT_TOKENS / forward_s
    )


def _seconds(run: Callable[[], None], device: torch.device) -> float:
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
