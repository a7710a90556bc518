"""Costs of passes: announced ones first, measured ones in their place."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from petalnet.blocks.costs import Costs


def test_before_anything_is_measured_the_announced_rates_count() -> None:
    costs = Costs(10.0, 160.0)
    assert costs.seconds(1) == pytest.approx(0.1)
    assert costs.seconds(32) == pytest.approx(0.2)
    assert costs.seconds(16) == pytest.approx(0.1 + 0.1 * 15 / 31)
    assert costs.seconds(63) == pytest.approx(0.3)
    assert costs.fitting(0.2) == 32
    assert costs.fitting(0.05) == 0


def test_the_first_measurement_corrects_what_was_only_announced() -> None:
    costs = Costs(1.0, 1.0)  # a host's `--throughput 1`
    costs.measured(1, 0.09)
    assert costs.seconds(1) == pytest.approx(0.09)
    assert costs.seconds(32) == pytest.approx(32 * 0.09)
    costs.measured(16, 0.16)
    assert costs.seconds(16) == pytest.approx(0.16)
    assert costs.seconds(32) < 0.5


def test_measurements_are_averaged_and_a_suspended_machine_does_not_count_as_slow() -> None:
    costs = Costs(10.0, 160.0)
    costs.measured(8, 0.12)
    costs.measured(8, 0.16)
    assert costs.seconds(8) == pytest.approx(0.13)
    costs.measured(8, 3600.0)
    assert costs.seconds(8) < 0.3
    for _ in range(30):
        costs.measured(8, 0.12)
    assert costs.seconds(8) == pytest.approx(0.12, rel=0.01)


def test_a_single_disturbed_measurement_of_few_tokens_does_not_make_more_tokens_look_slow() -> None:
    costs = Costs(10.0, 160.0)
    costs.measured(16, 0.16)
    costs.measured(1, 0.9)
    assert costs.seconds(1) <= 0.16
    assert costs.seconds(16) == pytest.approx(0.16)


def test_nothing_is_learned_of_passes_without_tokens_or_time() -> None:
    costs = Costs(10.0, 160.0)
    costs.measured(0, 5.0)
    costs.measured(5, 0.0)
    assert costs.seconds(5) == Costs(10.0, 160.0).seconds(5)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-4, 100.0)), max_size=40),
    st.floats(1e-4, 1000.0),
    st.lists(st.integers(1, 10000), min_size=2, max_size=10),
)
def test_costs_never_fall_with_tokens_and_what_fits_costs_no_more(
    measured: list[tuple[int, float]], budget: float, sizes: list[int]
) -> None:
    costs = Costs(10.0, 160.0)
    for tokens, seconds in measured:
        costs.measured(tokens, seconds)
    values = [costs.seconds(size) for size in sorted(sizes)]
    assert all(value > 0 for value in values)
    assert all(more >= fewer * (1 - 1e-9) for fewer, more in zip(values, values[1:], strict=False))
    fits = costs.fitting(budget)
    assert fits == 0 or costs.seconds(fits) <= budget * (1 + 1e-6)
    assert costs.seconds(fits + 2) >= budget * (1 - 1e-6)
