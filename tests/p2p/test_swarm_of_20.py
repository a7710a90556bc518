"""Twenty real hosts in processes of their own, by the benchmark that prints the same as figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from petalnet.routing.pace import BEAT_S, LIFETIME_BEATS

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "swarm.py"


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_swarm", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_news_travel_within_seconds_and_nobody_depends_on_the_bootstrap_node() -> None:
    benchmark = load_benchmark()
    nodes = benchmark.Nodes()
    try:
        result = benchmark.run_swarm(nodes, count=20, traffic_s=20.0)
    finally:
        nodes.close()
    assert result["not found"] == 0 and max(result["found"].values()) < 2.0
    assert result["not gone"] == 0 and max(result["gone"].values()) < LIFETIME_BEATS * BEAT_S + 1.0
    # Three times what was measured: 1 MiB each way.
    assert result["traffic"]["bytes_in"] < 3 * 1024 * 1024
