from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalnet.p2p.rates import Rates


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 5)), max_size=60))
def test_nobody_gets_more_than_the_rate_and_one_burst(steps: list[tuple[float, float]]) -> None:
    rates, now, taken = Rates(2.0, 5.0), 0.0, 0.0
    for seconds, amount in steps:
        now += seconds
        wait = rates.wait("a", now, amount)
        if rates.take("a", now, amount):
            taken += amount
            assert wait == 0
        else:
            assert wait > 0 and rates.wait("a", now + wait + 1e-6, amount) == 0
    assert taken <= 5.0 + 2.0 * now + 1e-6


def test_names_do_not_share_and_are_bounded() -> None:
    rates = Rates(1.0, 1.0, capacity=3)
    assert rates.take("a", 0.0) and not rates.take("a", 0.5) and rates.take("b", 0.5)
    for number in range(10):
        rates.take(str(number), 1.0)
    assert len(rates) == 3


def test_what_was_taken_on_credit_is_waited_for() -> None:
    rates = Rates(10.0, 20.0)
    rates.charge("a", 0.0, 50.0)
    assert rates.wait("a", 0.0, 0.0) == 3.0
    assert rates.wait("a", 3.0, 0.0) == 0.0
