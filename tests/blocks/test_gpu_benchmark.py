"""The benchmark for rented GPUs has to run the first time: its small form does all of it but CUDA."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_small_form_prints_all_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "WARM_UPS", 0)
    monkeypatch.setattr("petalnet.blocks.throughput.WORTH_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--rounds", "1", "--rows", "3", "--contexts", "20"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "MB a block" in line] == ["bf16:", "nf4:"]
    decodes = [line.split() for line in lines if line.startswith("3 × 20")]
    assert len(decodes) == 2
    assert all(float(line[-3]) < 0.03 for line in decodes)  # both ways give the same
    assert len([line for line in lines if line.startswith("20 ")]) == 2


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        importlib.import_module("gpu").main()
