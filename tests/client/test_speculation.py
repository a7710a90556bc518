"""Guesses from what was said before, and the policy that decides how many of them a step brings, in simulated time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.client.speculation import LONGEST_MATCH, MOST_DRAFTED, DraftPolicy, Lookup, StepSeconds

tokens = st.lists(st.integers(0, 3), max_size=60)


def lookup_of(ids: list[int]) -> Lookup:
    lookup = Lookup()
    lookup.set(ids)
    return lookup


def index_of(lookup: Lookup) -> tuple[object, ...]:
    return lookup._after, lookup._before, lookup._after_one, lookup._before_one


def naive_matches(ids: list[int]) -> dict[int, int]:
    """For each place to go on from the tokens before it that are like the end; single ones only where there are no longer matches."""
    matches = {}
    for source in range(1, len(ids)):
        length = 0
        while length < min(source, LONGEST_MATCH) and ids[source - 1 - length] == ids[-1 - length]:
            length += 1
        if length:
            matches[source] = length
    return {source: length for source, length in matches.items() if length > 1} or matches


@given(tokens)
def test_a_guess_is_what_followed_the_longest_recent_match(ids: list[int]) -> None:
    lookup, matches = lookup_of(ids), naive_matches(ids)
    if not matches:
        assert lookup.length == 0 and lookup.guess() is None and lookup.draft(5) == []
        return
    compared = sorted(matches, reverse=True)[:8]
    longest = max(matches[source] for source in compared)
    source = next(source for source in compared if matches[source] == longest)
    assert lookup.length == longest
    assert lookup.guess() == ids[source]


@given(tokens, st.integers(1, 20))
def test_a_draft_goes_on_as_that_place_did(ids: list[int], count: int) -> None:
    """Each token is what would be guessed if those before it had come; where the place reaches the end, it repeats itself."""
    lookup = lookup_of(ids)
    drafted = lookup.draft(count)
    if not lookup.length:
        return
    assert len(drafted) == count
    source = next(source for source in range(len(ids) - 1, 0, -1) if naive_matches(ids).get(source) == lookup.length)
    whole = list(ids)
    for place in range(count):
        whole.append(whole[source + place])
    assert drafted == whole[len(ids) :]


@given(st.lists(st.one_of(st.integers(0, 2), st.integers(-8, -1), st.just("look")), max_size=80))
def test_any_order_of_adding_looking_and_going_back(moves: list[int | str]) -> None:
    """Without a look in between, the same index as one that was built from what is left; a look only adds the match that was followed."""
    lookup, ids = Lookup(), []
    for move in moves:
        if move == "look":
            lookup.draft(3)
        elif isinstance(move, int) and move < 0:
            ids = ids[:move]
            lookup.cut(len(ids))
        else:
            ids.append(move)
            lookup.append(move)
    fresh = lookup_of(ids)
    assert len(lookup) == len(ids) and lookup.last == (ids[-1] if ids else None)
    assert index_of(lookup) == index_of(fresh)
    assert lookup.length >= fresh.length
    if lookup.length:
        assert lookup.guess() in {ids[source] for source, length in naive_matches(ids).items() if length >= fresh.length}


@given(tokens, tokens)
def test_what_two_texts_have_in_common_stays(first: list[int], second: list[int]) -> None:
    lookup = lookup_of(first)
    lookup.set(second)
    fresh = lookup_of(second)
    assert lookup._ids == second and index_of(lookup) == index_of(fresh)


def test_a_followed_match_is_not_lost_among_later_ones() -> None:
    """A pair that has come up often since is not looked for further back; but who follows a text from its beginning stays on it."""
    text = list(range(100, 130))
    noise = [token for number in range(20) for token in (105, 106, 900 + number)]
    lookup = lookup_of(text + noise)
    for token in text[:7]:
        lookup.guess()
        lookup.append(token)
    assert lookup.draft(5) == text[7:12]


def test_unknown_tokens_are_never_guessed() -> None:
    lookup = lookup_of(list(range(-1, -40, -1)))
    for token in (5, 6, 7, 5, 6):
        lookup.append(token)
    assert lookup.draft(3) == [7, 5, 6]


# ---- what steps take


def test_single_slow_steps_do_not_count() -> None:
    seconds = StepSeconds()
    for tokens_, taken in [(1, 0.01), (1, 0.01), (1, 3.0), (1, 0.01), (4, 0.012), (4, 5.0), (4, 0.012), (8, 0.013)]:
        seconds.note(tokens_, taken)
    table = seconds.table()
    assert table[1] == 0.01 and table[4] == pytest.approx(0.012) and table[8] == pytest.approx(0.013)


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(1e-4, 10)), max_size=60))
def test_more_tokens_never_take_less(steps: list[tuple[int, float]]) -> None:
    seconds = StepSeconds()
    seconds.note(1, 0.01)
    for tokens_, taken in steps:
        seconds.note(tokens_, taken)
    table = seconds.table()
    assert len(table) == MOST_DRAFTED + 2
    assert all(low <= high * (1 + 1e-12) for low, high in zip(table[1:], table[2:], strict=False))


def test_where_only_the_network_takes_time_longer_steps_are_expected_to_be_cheap() -> None:
    far, near = StepSeconds(), StepSeconds()
    far.note(1, 0.1, network_s=0.095)
    near.note(1, 0.1, network_s=0.001)
    assert far.table()[8] < 0.11 < 0.19 < near.table()[8]


# ---- simulated answers


def flat(tokens: int) -> float:
    """An accelerator: up to 16 tokens take what one takes."""
    return 1.0


def processor(tokens: int) -> float:
    """float32 on few cores: a little more for 2 to 4 tokens, twice as much for 8."""
    points = [(1, 1.0), (2, 1.15), (4, 1.35), (8, 2.2), (16, 4.0)]
    for (low, at_low), (high, at_high) in zip(points, points[1:], strict=False):
        if tokens <= high:
            return at_low + (at_high - at_low) * (tokens - low) / (high - low)
    raise AssertionError(tokens)


def proportional(tokens: int) -> float:
    """The worst that a server can be."""
    return float(tokens)


class Simulation:
    """An answer in virtual time. Its guesses come from matches of some length, and are right with a probability that may change."""

    def __init__(
        self, policy: DraftPolicy, *, trip_s: float, compute_s: float, growth: Callable[[int], float], noise: float = 0.1, seed: int = 0
    ) -> None:
        self.policy, self.trip_s, self.compute_s, self.growth, self.noise = policy, trip_s, compute_s, growth, noise
        self.random = random.Random(seed)
        self.now = self.plain_s = 0.0
        self.tokens = 0
        self.drafted: list[int] = []
        self.stalls: dict[int, float] = {}  # by number of step: how much longer it takes

    def seconds(self, tokens: int) -> float:
        return self.trip_s + self.compute_s * self.growth(tokens)

    def run(self, tokens: int, acceptance: float, *, length: int = 3, queue: float = 0.0) -> Simulation:
        right = [self.random.random() < acceptance for _ in range(tokens + MOST_DRAFTED + 1)]
        done = 0
        while done < tokens:
            drafted = self.policy.choose(length, tokens - done - 1)
            assert 0 <= drafted <= MOST_DRAFTED
            accepted = next((place for place in range(drafted) if not right[done + place]), drafted)
            taken = self.seconds(1 + drafted) * (1 + self.noise * self.random.random()) + self.stalls.get(len(self.drafted), 0.0)
            self.policy.note_step(1 + drafted, taken, network_s=self.trip_s, queue_s=queue * taken)
            self.policy.note_draft(drafted, accepted)
            for place in range(accepted + 1):
                self.policy.note_guess(min(length + place, LONGEST_MATCH), right[done + place])
            self.now += taken
            self.plain_s += (accepted + 1) * self.seconds(1) * (1 + self.noise / 2)
            self.drafted.append(drafted)
            done += accepted + 1
        self.tokens += done
        return self

    @property
    def gain(self) -> float:
        """Tokens a second over those of plain decoding."""
        return self.plain_s / self.now

    def best(self, acceptance: float) -> float:
        """The gain of the best constant number of drafts."""
        expected = [sum(acceptance**place for place in range(drafted + 1)) for drafted in range(MOST_DRAFTED + 1)]
        return max(tokens * self.seconds(1) / self.seconds(1 + drafted) for drafted, tokens in enumerate(expected))


GROWTHS = [flat, processor, proportional]
PLACES = [(0.0, 0.005), (0.001, 0.02), (0.04, 0.01), (0.1, 0.03), (0.2, 0.002)]
"""Round trip and computation, in seconds."""


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize(("trip_s", "compute_s"), PLACES)
@pytest.mark.parametrize("length", [1, 2, 4, 9, 32])
def test_wrong_guesses_cost_next_to_nothing(growth: Callable[[int], float], trip_s: float, compute_s: float, length: int) -> None:
    for seed in range(4):
        simulation = Simulation(DraftPolicy(), trip_s=trip_s, compute_s=compute_s, growth=growth, seed=seed)
        assert simulation.run(300, 0.0, length=length).gain >= 0.97


@pytest.mark.parametrize("acceptance", [0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("growth", GROWTHS)
def test_seldom_right_guesses_cost_next_to_nothing(growth: Callable[[int], float], acceptance: float) -> None:
    for trip_s, compute_s in PLACES:
        gains = [
            Simulation(DraftPolicy(), trip_s=trip_s, compute_s=compute_s, growth=growth, seed=seed).run(300, acceptance).gain
            for seed in range(5)
        ]
        assert min(gains) >= 0.94 and sum(gains) / len(gains) >= 0.965


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("growth", GROWTHS)
def test_close_to_the_best_number_once_it_is_known(growth: Callable[[int], float], acceptance: float) -> None:
    for trip_s, compute_s in PLACES:
        policy = DraftPolicy()
        Simulation(policy, trip_s=trip_s, compute_s=compute_s, growth=growth).run(600, acceptance, length=LONGEST_MATCH)
        simulation = Simulation(policy, trip_s=trip_s, compute_s=compute_s, growth=growth, seed=1)
        gain = simulation.run(3000, acceptance, length=LONGEST_MATCH).gain
        assert gain >= 0.93 * simulation.best(acceptance), (trip_s, compute_s, gain, simulation.best(acceptance))


@pytest.mark.parametrize("trip_s", [0.04, 0.08, 0.1, 0.2])
@pytest.mark.parametrize("growth", [flat, processor])
def test_repetitive_text_over_a_distance_is_twice_as_fast(growth: Callable[[int], float], trip_s: float) -> None:
    """From the first token on, nothing learned before."""
    for seed in range(5):
        assert Simulation(DraftPolicy(), trip_s=trip_s, compute_s=0.015, growth=growth, seed=seed).run(150, 0.85).gain >= 2


def test_off_where_each_token_costs_as_much_as_the_first() -> None:
    simulation = Simulation(DraftPolicy(), trip_s=0.0005, compute_s=0.02, growth=proportional).run(1000, 0.7)
    assert sum(drafted > 0 for drafted in simulation.drafted[100:]) <= 8 and simulation.gain >= 0.97


def test_on_again_when_servers_have_become_fast() -> None:
    policy = DraftPolicy()
    Simulation(policy, trip_s=0.0005, compute_s=0.02, growth=proportional).run(400, 0.8)
    simulation = Simulation(policy, trip_s=0.0005, compute_s=0.02, growth=flat).run(800, 0.8)
    assert sum(simulation.drafted[-50:]) > 100 and simulation.gain > 1.3


def test_on_when_the_text_becomes_repetitive() -> None:
    """What is guessed and not sent is compared all the same, so this is noticed within some tokens."""
    policy = DraftPolicy()
    Simulation(policy, trip_s=0.08, compute_s=0.01, growth=processor).run(300, 0.0)
    assert Simulation(policy, trip_s=0.08, compute_s=0.01, growth=processor).run(200, 0.9).gain > 2


@pytest.mark.parametrize("growth", [flat, processor])
def test_single_slow_steps_do_not_turn_it_off(growth: Callable[[int], float]) -> None:
    """Whichever steps are held up, the first drafted ones included."""
    for stalled in (range(1, 6), range(2, 200, 9), [3], [4]):
        simulation = Simulation(DraftPolicy(), trip_s=0.05, compute_s=0.01, growth=growth)
        simulation.stalls = dict.fromkeys(stalled, 2.0)
        simulation.run(600, 0.85)
        late = Simulation(simulation.policy, trip_s=0.05, compute_s=0.01, growth=growth, seed=3).run(400, 0.85)
        assert late.gain > 2


def test_less_under_load() -> None:
    """What is less likely to be right than that somebody waits is not computed; a queue that is always full gets nothing to guess."""
    shares = []
    for queue in (0.0, 0.3, 0.6, 0.95):
        simulation = Simulation(DraftPolicy(), trip_s=0.05, compute_s=0.01, growth=flat)
        simulation.run(600, 0.7, queue=queue)
        shares.append(sum(simulation.drafted[50:]) / len(simulation.drafted[50:]))
    assert shares == sorted(shares, reverse=True) and shares[0] > 3 and shares[-1] == 0


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("step"), st.integers(0, 20), st.floats(0, 1e3), st.floats(0, 1e3)),
            st.tuples(st.just("guess"), st.integers(2, 32), st.booleans(), st.none()),
            st.tuples(st.just("draft"), st.integers(0, 15), st.integers(0, 15), st.none()),
            st.tuples(st.just("choose"), st.integers(0, 40), st.integers(-3, 30), st.none()),
        ),
        max_size=80,
    ),
    st.booleans(),
)
def test_whatever_is_measured_it_stays_within_bounds(moves: list[tuple], steady: bool) -> None:
    policy = DraftPolicy(steady=steady)
    for what, first, second, third in moves:
        if what == "step":
            policy.note_step(first, second, network_s=third, queue_s=third)
        elif what == "guess":
            policy.note_guess(first, second)
        elif what == "draft":
            policy.note_draft(first, min(first, second))
        else:
            assert 0 <= policy.choose(first, second) <= max(min(second, MOST_DRAFTED), 0)
        policy = policy.for_answer() if what == "guess" else policy


# ---- draft models


def assisted(
    trip_s: float, compute_s: float, draft_s: float, acceptance: float, *, tokens: int = 600, seed: int = 0
) -> tuple[float, float]:
    """Gain over plain decoding of an answer with a draft model, and the best possible."""
    policy, draw = DraftPolicy(steady=True), random.Random(seed)
    now, done = 0.0, 0

    def seconds(count: int) -> float:
        return trip_s + compute_s * processor(count)

    while done < tokens:
        drafted = policy.choose(0, MOST_DRAFTED, draft_s)
        accepted = next((place for place in range(drafted) if draw.random() >= acceptance), drafted)
        taken = seconds(1 + drafted) * (1 + 0.1 * draw.random())
        policy.note_step(1 + drafted, taken)
        for place in range(min(accepted + 1, drafted)):
            policy.note_guess(0, place < accepted)
        policy.note_draft(drafted, accepted, drafted * draft_s)
        now += taken + drafted * draft_s
        done += accepted + 1
    expected = [sum(acceptance**place for place in range(count + 1)) for count in range(MOST_DRAFTED + 1)]
    best = max(made * seconds(1) / (seconds(1 + count) + count * draft_s) for count, made in enumerate(expected))
    return done * seconds(1) * 1.05 / now, best


@pytest.mark.parametrize("draft_s", [0.001, 0.005, 0.02])
@pytest.mark.parametrize("acceptance", [0.4, 0.7, 0.9])
@pytest.mark.parametrize("trip_s", [0.001, 0.04, 0.1])
def test_a_draft_model_proposes_about_as_many_as_pay(trip_s: float, acceptance: float, draft_s: float) -> None:
    gains = [assisted(trip_s, 0.02, draft_s, acceptance, seed=seed) for seed in range(5)]
    best = gains[0][1]
    assert sum(gain for gain, _ in gains) / len(gains) >= 0.87 * best
    assert min(gain for gain, _ in gains) >= 0.93


def test_a_draft_model_that_is_never_right_is_asked_seldom() -> None:
    assert assisted(0.05, 0.02, 0.003, 0.0)[0] >= 0.96


def test_what_another_answer_is_learning_can_be_copied() -> None:
    """Answers of two threads on one model, of which one goes on from what the other knows so far."""
    seconds = StepSeconds()

    class Growing(deque[float]):
        def copy(self) -> Growing:
            seconds.note(2 + len(seconds._longer), 0.2)
            return self

    seconds.note(1, 0.1)
    seconds._longer[2] = Growing([0.1])
    assert list(seconds.copy()._longer) == [2] and list(seconds._longer) == [2, 3]
