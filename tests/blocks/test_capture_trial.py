"""Whether decoding is captured: what is refused, what is compared, what is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnet.blocks import capture_trial
from petalnet.blocks.capture_trial import choose
from petalnet.blocks.emulated import EmulatedBackend, Rerun, Rerunner
from petalnet.blocks.span import Span
from petalnet.models.checkpoint import ModelSource

Saved = Callable[..., Path]
MOST_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalnet.blocks.throughput.WORTH_S", 0.0)


def load(folder: Path) -> Span:
    span = Span.load(ModelSource.open(folder), 0, 4)
    span.backend = EmulatedBackend()
    return span


def is_capturing(span: Span) -> bool:
    span.attach(span.make_store(4))
    return span.captured is not None


def timed(usual_s: float, captured_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have both ways take so long."""

    def seconds(run: Callable[[], object], device: torch.device) -> float:
        run()
        return captured_s if run.func.__self__.captured is not None else usual_s  # type: ignore[attr-defined]

    monkeypatch.setattr(capture_trial, "seconds", seconds)


def test_the_quicker_way_is_chosen(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    span = load(saved("llama"))
    timed(0.003, 0.001, monkeypatch)
    choice = choose(span, "auto", most_bytes=MOST_BYTES, recorder=Rerunner())
    assert choice.captured
    assert choice.why == "1.00 ms for 1 row and 1.00 ms for 16 rows, 3.00 and 3.00 ms the usual way, through 3 blocks"
    assert span.store is None
    assert is_capturing(span)
    timed(0.001, 0.002, monkeypatch)
    assert not choose(span, "auto", most_bytes=MOST_BYTES, recorder=Rerunner()).captured
    assert not is_capturing(span)
    assert choose(span, "on", most_bytes=MOST_BYTES, recorder=Rerunner()).captured
    assert is_capturing(span)
    assert choose(span, "off", most_bytes=MOST_BYTES, recorder=Rerunner()).why == "switched off"
    assert not is_capturing(span)


def test_where_it_is_not_possible(saved: Saved) -> None:
    def why(family: str, recorder: Any = None, **changes: object) -> str:
        span = load(saved(family, **changes))
        choice = choose(span, "on", most_bytes=MOST_BYTES, recorder=recorder)
        assert not choice.captured
        assert not is_capturing(span)
        return choice.why

    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **scaling}
    assert why("llama") == "there are no CUDA graphs on cpu"
    assert "the kernel for paged attention does not take" in why("gemma2", Rerunner())
    assert "longest position" in why("phi3", Rerunner(), max_position_embeddings=64, rope_parameters=rope)
    usual = Span.load(ModelSource.open(saved("llama")), 0, 2)
    assert "kernel for pages" in choose(usual, "on", most_bytes=MOST_BYTES, recorder=Rerunner()).why


def test_outputs_are_compared(saved: Saved) -> None:
    class Stale:
        """Replays nothing, so that what the first pass came to stays."""

        def record(self, run: Callable[[], None]) -> Rerun:
            run()
            return Rerun(lambda: None)

    class Broken:
        def record(self, run: Callable[[], None]) -> Rerun:
            raise RuntimeError("no")

    span = load(saved("llama"))
    assert "differ" in choose(span, "on", most_bytes=MOST_BYTES, recorder=Stale()).why
    assert choose(span, "on", most_bytes=MOST_BYTES, recorder=Broken()).why == "it failed: RuntimeError: no"
    assert not is_capturing(span)
