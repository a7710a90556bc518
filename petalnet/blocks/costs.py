"""How long a pass through a span takes, by its number of tokens: first as announced, then as the rounds turn out.

A pass of a few tokens costs about as much as one of a single token, since it reads the same weights; a long one costs in proportion to its
tokens. Where one turns into the other depends on the machine, so it is measured: one point for each power of two, straight lines between.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

RECENT = 0.25
"""Share of the newest measurement in an average."""
OUTLIER = 4.0
"""A measurement counts as at most so many times what was expected: a machine that was suspended has not become slow."""
SEED_TOKENS = 32
"""Tokens of the prompts by which prefill rates are measured (`throughput.PROMPT_TOKENS`)."""


@dataclass
class _Point:
    """Passes of about so many tokens took about so many seconds."""

    tokens: float
    seconds: float
    measured: bool


class Costs:
    """Seconds of a pass by its tokens; pure arithmetic."""

    def __init__(self, decode_tokens_s: float, prefill_tokens_s: float) -> None:
        """
        Args:
            decode_tokens_s: tokens per second of one row, one token at a time.
            prefill_tokens_s: tokens per second of a prompt of `SEED_TOKENS`. What is actually measured soon takes the place of both.
        """
        seeds = ((1, 1 / decode_tokens_s), (SEED_TOKENS, SEED_TOKENS / prefill_tokens_s))
        self._points = {tokens.bit_length() - 1: _Point(tokens, seconds, measured=False) for tokens, seconds in seeds}
        self._curve: list[tuple[float, float]] = []
        self._draw()

    def seconds(self, tokens: float) -> float:
        """The expected seconds of a pass of so many tokens; never less for more tokens."""
        curve = self._curve
        if tokens <= curve[0][0]:
            return curve[0][1]
        for (fewer, quick), (more, slow) in pairwise(curve):
            if tokens <= more:
                return quick + (slow - quick) * (tokens - fewer) / (more - fewer)
        last, seconds = curve[-1]
        return seconds + (tokens - last) * self._slope()

    def fitting(self, seconds: float) -> int:
        """The most tokens whose pass is expected to take no longer than this; 0 where a single one takes longer."""
        curve = self._curve
        if seconds < curve[0][1]:
            return 0
        for (fewer, quick), (more, slow) in pairwise(curve):
            if seconds < slow:
                return int(fewer + (more - fewer) * (seconds - quick) / (slow - quick))
        last, longest = curve[-1]
        return int(last + (seconds - longest) / self._slope())

    @property
    def longest(self) -> int:
        """Tokens of the longest pass that was measured; 0 where none was."""
        return int(max((point.tokens for point in self._points.values() if point.measured), default=0))

    def measured(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        if tokens < 1 or seconds <= 0:
            return
        bucket = tokens.bit_length() - 1
        point = self._points.get(bucket)
        if point is None or not point.measured:
            # The first of its size. What was only announced so far was as wrong about other sizes, as far as anybody knows.
            ratio = seconds / self.seconds(tokens)
            for other in self._points.values():
                if not other.measured:
                    other.seconds *= ratio
            self._points[bucket] = _Point(tokens, seconds, measured=True)
        else:
            bounded = min(seconds, OUTLIER * self.seconds(tokens))
            point.tokens += RECENT * (tokens - point.tokens)
            point.seconds += RECENT * (bounded - point.seconds)
        self._draw()

    def _draw(self) -> None:
        """The points in order. One that is slower than one of more tokens was disturbed when it was measured, and counts as the other."""
        quickest = float("inf")
        self._curve = []
        for _, point in sorted(self._points.items(), reverse=True):
            quickest = min(quickest, point.seconds)
            self._curve.insert(0, (point.tokens, quickest))

    def _slope(self) -> float:
        """Seconds a token beyond the longest pass known: as between the two longest, and no less than half of its average."""
        (fewer, quick), (more, slow) = self._curve[-2:]
        return max((slow - quick) / (more - fewer), slow / more / 2)
