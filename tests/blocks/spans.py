"""Spans over two devices in place of spans on one, for tests that know nothing of devices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from petalnet.blocks.span import Span
from petalnet.blocks.spread import SpreadSpan
from petalnet.models.checkpoint import ModelSource

DEVICES = pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)], indirect=True, ids=["one-device", "two-devices"])
"""`pytestmark` of modules that are run with spans over two devices as well."""


def spread_over(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `Span.load` load blocks to so many devices, about as many to each."""
    load = Span.load

    def load_spread(source: ModelSource, first: int, end: int, **options: Any) -> Any:
        cuts = sorted({first + (end - first) * number // devices for number in range(devices + 1)})
        stages = [load(source, begin, stop, **options) for begin, stop in pairwise(cuts)]
        return stages[0] if len(stages) == 1 else SpreadSpan(stages)

    monkeypatch.setattr(Span, "load", load_spread)
