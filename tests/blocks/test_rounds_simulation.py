"""The scheduler in virtual time with made-up costs and clients, by the code of the benchmark: throughput, waits, fair shares."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from petalnet.blocks.scheduler import Scheduler

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "rounds_simulation.py"
SECONDS = 30.0


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rounds_simulation", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(simulation: ModuleType, clients: list[Any], kind: type[Scheduler] = Scheduler, costs: dict[int, float] | None = None) -> Any:
    cost = simulation.curve(costs or simulation.CPU_MS)
    scheduler = simulation.seeded(kind, cost)
    if isinstance(scheduler, simulation.LockStep):
        scheduler.everybody = len(clients)
    simulated = simulation.Simulation(clients, cost, scheduler)
    simulated.run(SECONDS)
    return simulated


def on_one_core(simulation: ModuleType, count: int) -> list[Any]:
    core = simulation.Core()
    return [simulation.Client(f"client {number}", core=core) for number in range(count)]


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("costs", ["CPU_MS", "SLOW_CPU_MS"])
def test_clients_side_by_side_do_not_split_into_groups(simulation: ModuleType, count: int, costs: str) -> None:
    rates = {}
    for kind in (simulation.AtOnce, simulation.LockStep, Scheduler):
        clients = on_one_core(simulation, count)
        run(simulation, clients, kind, getattr(simulation, costs))
        rates[kind] = simulation.tokens_s(clients, SECONDS)
    assert rates[Scheduler] >= 0.9 * max(rates.values())
    assert rates[Scheduler] > rates[simulation.AtOnce]


def test_a_lone_client_is_never_kept_waiting(simulation: ModuleType) -> None:
    for costs in (simulation.CPU_MS, simulation.GPU_MS):
        steps = []
        for kind in (simulation.AtOnce, Scheduler):
            (client,) = clients = on_one_core(simulation, 1)
            run(simulation, clients, kind, costs)
            steps.append(client.answered)
        assert steps[0] == steps[1]


@pytest.mark.parametrize("count", [2, 8])
def test_clients_far_away_are_not_waited_for(simulation: ModuleType, count: int) -> None:
    medians = {}
    for kind in (simulation.AtOnce, Scheduler):
        clients = [simulation.Client(f"client {number}", away_s=(0.05, 0.2)) for number in range(count)]
        run(simulation, clients, kind)
        medians[kind] = simulation.typical_ms(clients), simulation.tokens_s(clients, SECONDS)
    assert medians[Scheduler][0] <= 1.03 * medians[simulation.AtOnce][0]
    assert medians[Scheduler][1] >= 0.97 * medians[simulation.AtOnce][1]


def test_a_short_prompt_beside_a_long_one_waits_for_two_rounds_at_most(simulation: ModuleType) -> None:
    alone = simulation.Client("short", prompt=24, repeat=3)
    run(simulation, [alone])
    beside = simulation.Client("short", prompt=24, repeat=3, begins=1.0)
    simulated = run(simulation, [simulation.Client("long", prompt=2000, repeat=1), beside])
    longest = max(seconds for _, seconds, _ in simulated.rounds)
    assert max(beside.prompts) <= 2 * longest + 0.05
    assert statistics.median(beside.prompts) <= 2 * statistics.median(alone.prompts)
    assert longest < 0.45  # a chunk that was tried while nobody else was there


def test_decoding_and_a_long_prompt_share_the_device(simulation: ModuleType) -> None:
    long_alone = simulation.Client("long", prompt=2000, repeat=1)
    run(simulation, [long_alone])
    decoder, prompt = simulation.Client("decoder"), simulation.Client("long", prompt=2000, repeat=1)
    run(simulation, [decoder, prompt])
    assert simulation.tokens_s([decoder], SECONDS) > 0.45 * 10.2
    assert prompt.prompts[0] < 2.6 * long_alone.prompts[0]


def test_training_runs_beneath_decoding_and_is_not_starved(simulation: ModuleType) -> None:
    decoders, trainer = on_one_core(simulation, 4), simulation.Client("trainer", passes=(32, 128))
    run(simulation, [*decoders, trainer])
    alone, undisturbed = simulation.Client("trainer", passes=(32, 128)), on_one_core(simulation, 4)
    run(simulation, [alone])
    run(simulation, undisturbed)
    assert simulation.tokens_s(decoders, SECONDS) > 0.7 * simulation.tokens_s(undisturbed, SECONDS)
    assert trainer.rows_done > 0.12 * alone.rows_done


def test_a_peer_with_many_sessions_takes_nothing_from_a_peer_with_one(simulation: ModuleType) -> None:
    """Where sessions share passes, the one gets a token a round; where they cannot, half of the device."""
    for shared in (True, False):
        one = simulation.Client("one", peer="one", key=0)
        many = [simulation.Client(f"many {number}", peer="many", key=0 if shared else number) for number in range(1, 21)]
        run(simulation, [one, *many])
        others = simulation.tokens_s(many, SECONDS)
        assert simulation.tokens_s([one], SECONDS) > (4.5 if shared else 0.9 * others)
