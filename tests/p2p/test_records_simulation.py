"""The simulation of the records protocol with a few hundred nodes, by the code of the benchmark for ten thousand."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

from petalnet.routing.pace import BEAT_S, LIFETIME_BEATS

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "records_simulation.py"


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("records_simulation", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_swarm_of_honest_nodes_knows_all_that_live_and_forgets_the_dead(simulation: ModuleType) -> None:
    setting = simulation.Setting(nodes=100, models=4, seconds=360.0, warm_up=100.0, silent=0.0, liars=0.0, look_ups=20)
    outcome = simulation.Simulation(setting).run()
    assert statistics.mean(outcome.found) > 0.999
    assert max(outcome.to_find) < 2.0
    assert max(outcome.to_forget) <= LIFETIME_BEATS * BEAT_S + 5.0
    assert max(outcome.look_up_s) <= simulation.ROUND_S


def test_silent_nodes_and_liars_and_churn_cost_little(simulation: ModuleType) -> None:
    setting = simulation.Setting(
        nodes=200, models=6, seconds=400.0, warm_up=120.0, silent=0.1, liars=0.05, session=900.0, look_ups=30, skew=400.0, seed=2
    )
    outcome = simulation.Simulation(setting).run()
    assert statistics.mean(outcome.found) > 0.99
    assert statistics.mean(outcome.dead) < 0.05
    assert statistics.median(outcome.to_find) < 2.0
    assert statistics.median(outcome.to_forget) <= LIFETIME_BEATS * BEAT_S
    assert statistics.median(outcome.look_up_s) < 1.0
