"""Rates are measured once and remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from petalnet.blocks import throughput
from petalnet.blocks.span import Span
from petalnet.models.checkpoint import ModelSource


def test_rates_are_measured_and_remembered(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    span = Span.load(ModelSource.open(saved("llama")), 0, 4)
    rates = throughput.measure(span, model="a")
    assert all(rate > 0 for rate in (rates.decode, rates.prefill, rates.forward))
    assert rates.prefill > rates.decode
    monkeypatch.setattr(throughput, "_measure", lambda span: throughput.Rates(1.0, 2.0, 3.0))
    assert throughput.measure(span, model="a") == rates
    assert throughput.measure(span, model="b") == throughput.Rates(1.0, 2.0, 3.0)
