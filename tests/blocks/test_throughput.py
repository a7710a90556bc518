"""Rates are measured once and remembered."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from petalnet.blocks import throughput
from petalnet.blocks.kv import KVStore
from petalnet.blocks.span import Span
from petalnet.models.checkpoint import ModelSource


def test_rates_are_measured_and_remembered(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    span = Span.load(ModelSource.open(saved("llama")), 0, 4)
    rates = throughput.measure(span, model="a")
    assert all(rate > 0 for rate in (rates.decode, rates.prefill, rates.forward))
    assert rates.prefill > rates.decode
    assert [sessions for sessions, _ in rates.rounds] == list(throughput.SESSIONS)
    assert all(seconds > 0 for _, seconds in rates.rounds)
    assert span.store is None
    monkeypatch.setattr(throughput, "_measure", lambda span: throughput.Rates(1.0, 2.0, 3.0))
    assert throughput.measure(span, model="a") == rates
    assert throughput.measure(span, model="b") == throughput.Rates(1.0, 2.0, 3.0)


def test_what_was_remembered_is_checked(saved: Callable[..., Path], cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    span = Span.load(ModelSource.open(saved("falcon")), 1, 2)
    throughput.measure(span, model="a")
    (remembered,) = (cache_folder / "throughput").iterdir()
    remembered.write_text(f'{{"decode": 1.0, "prefill": 2.0, "forward": 3.0, "rounds": 4, "measured": {time.time()}}}')
    monkeypatch.setattr(throughput, "_measure", lambda span: throughput.Rates(1.0, 2.0, 3.0))
    assert throughput.measure(span, model="a") == throughput.Rates(1.0, 2.0, 3.0)


def test_what_is_old_or_was_measured_with_other_cores_is_measured_anew(
    saved: Callable[..., Path], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = Span.load(ModelSource.open(saved("falcon")), 0, 2)
    again = throughput.Rates(1.0, 2.0, 3.0)
    first = throughput.measure(span, model="a")
    monkeypatch.setattr(throughput, "_measure", lambda span: again)
    assert throughput.measure(span, model="a") == first
    now = time.time()
    monkeypatch.setattr(throughput.time, "time", lambda: now + throughput.REMEMBERED_S + 60)
    assert throughput.measure(span, model="a") == again
    monkeypatch.setattr(throughput.time, "time", lambda: now - 60)  # stored by a clock that was ahead
    monkeypatch.setattr(throughput, "_measure", lambda span: first)
    assert throughput.measure(span, model="a") == first
    monkeypatch.setattr(throughput.os, "sched_getaffinity", lambda pid: range(99))
    monkeypatch.setattr(throughput, "_measure", lambda span: again)
    assert throughput.measure(span, model="a") == again


def test_a_store_that_a_span_has_stays(saved: Callable[..., Path]) -> None:
    span = Span.load(ModelSource.open(saved("llama")), 0, 4)
    store = KVStore(span.kv_shapes, pages=1, page_tokens=span.backend.page_tokens, dtype=span.dtype, device=span.device)
    span.attach(store)
    throughput.measure(span, model="a")
    assert span.store is store
