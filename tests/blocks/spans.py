"""Spans over two devices in place of spans on one, for tests that know nothing of devices."""

from __future__ import annotations

from typing import Any

import pytest

from petalnet.blocks.span import Span
from petalnet.blocks.spread import SpreadSpan
from petalnet.models.checkpoint import ModelSource

DEVICES = pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)], indirect=True, ids=["one-device", "two-devices"])
"""For modules that are worth running with both; their autouse fixture calls `spread_over`."""


def spread_over(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `Span.load` load the first half of the blocks to one device and the others to another."""
    load = Span.load

    def load_spread(source: ModelSource, first: int, end: int, **options: Any) -> Any:
        middle = (first + end) // 2
        if devices == 1 or middle == first:
            return load(source, first, end, **options)
        return SpreadSpan([load(source, first, middle, **options), load(source, middle, end, **options)])

    monkeypatch.setattr(Span, "load", load_spread)
