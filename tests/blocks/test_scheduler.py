"""What runs next: what shares a round, budgets, turns, fairness, stragglers. No threads, no clock."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from petalnet.blocks.costs import Costs
from petalnet.blocks.scheduler import DECODE_TOKENS, LEAST_PREFILL, OVERDUE_S, WAIT_SHARE, Part, Scheduler, Task
from petalnet.blocks.shares import PEERS_OF_A_NETWORK

MANY = 1 << 30


def seconds(tokens: int) -> float:
    """A pass of up to 32 tokens takes 0.1 to 0.2 s, a longer one in proportion."""
    return 0.1 + 0.1 * (tokens - 1) / 31 if tokens else 0.0


@pytest.fixture
def scheduler() -> Scheduler:
    return make()


def make(**options: float) -> Scheduler:
    scheduler = Scheduler(Costs(10.0, 160.0), **options)  # type: ignore[arg-type]
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        scheduler._costs["step"].measured(tokens, seconds(tokens))
        scheduler._costs["pass"].measured(tokens, seconds(tokens))
    return scheduler


def step(session: str, units: int = 1, *, width: int = 1, key: object = "key", peer: str | None = None, max_units: int = MANY) -> Task:
    return Task(peer or f"peer of {session}", session, key, units, width, "step", max_units, None)


def a_pass(blocks: int, tokens: int, peer: str = "trainer", *, weight: float = 1.0, cuts: tuple[int, ...] = ()) -> Task:
    """So many tokens through so many blocks, each of which takes so many times as long as a pass through the whole span."""
    return Task(peer, None, None, blocks, tokens, "pass", MANY, None, weight=weight, cuts=cuts)


def started(scheduler: Scheduler, now: float) -> list[Part]:
    parts = scheduler.next(now)
    assert isinstance(parts, list)
    return parts


def run_round(scheduler: Scheduler, now: float) -> tuple[list[Part], float]:
    """Run the next round; its parts and the time when it ended."""
    parts = started(scheduler, now)
    took = parts[0].weight * seconds(sum(part.tokens for part in parts))
    scheduler.finished(parts, took, now + took)
    return parts, now + took


def sessions(parts: list[Part]) -> list[object]:
    return [part.task.session for part in parts]


# What shares a round


def test_nothing_to_do(scheduler: Scheduler) -> None:
    assert scheduler.next(0.0) is None
    assert len(scheduler) == 0
    assert scheduler.expected_wait() == 0.0


def test_all_decodes_of_a_key_share_a_round(scheduler: Scheduler) -> None:
    tasks = [step(f"s{i}", units=1 + i % 3) for i in range(20)]
    for task in tasks:
        scheduler.add(task, 0.0)
    parts = started(scheduler, 0.0)
    assert {part.task for part in parts} == set(tasks)
    assert all((part.start, part.end) == (0, part.task.units) for part in parts)
    assert set(scheduler.finished(parts, 0.2, 0.2)) == set(tasks)
    assert scheduler.next(0.2) is None


def test_no_more_tokens_than_a_pass_takes() -> None:
    scheduler = make(most_tokens=10)
    for i in range(8):
        scheduler.add(step(f"s{i}", width=3), 0.0)
    first, now = run_round(scheduler, 0.0)
    second, now = run_round(scheduler, now)
    third, _ = run_round(scheduler, now)
    assert [len(parts) for parts in (first, second, third)] == [3, 3, 2]
    scheduler.add(step("wide", width=64), 1.0)
    assert len(started(scheduler, 1.0)) == 1  # what cannot be cut further runs all the same


def test_decodes_of_one_peer_that_would_take_long_do_not_hold_up_others(scheduler: Scheduler) -> None:
    """A peer that verifies speculated tokens in many sessions takes turns with itself; others wait for a short round, not for all of it."""
    for number in range(30):
        scheduler.add(step(f"s{number}", units=16, width=4, peer="many"), 0.0)
    scheduler.add(step("one"), 0.0)
    served: dict[object, int] = dict.fromkeys((f"s{number}" for number in range(30)), 0)
    alone, now = 0, 0.0
    for _ in range(130):
        parts, ended = run_round(scheduler, now)
        assert ended - now < 0.7
        now = ended
        for part in parts:
            if part.task.peer == "many":
                served[part.task.session] += 1
                scheduler.add(step(str(part.task.session), units=16, width=4, peer="many"), now)
            else:
                alone += 1
                scheduler.add(step("one"), now)
    assert alone >= 60
    assert min(served.values()) >= 1 and max(served.values()) - min(served.values()) <= 1


def test_other_keys_and_no_key_run_apart(scheduler: Scheduler) -> None:
    for session, key in (("a", 1), ("b", 2), ("c", None), ("d", None), ("e", 1)):
        scheduler.add(step(session, key=key), 0.0)
    rounds, now = [], 0.0
    while len(scheduler):
        parts, now = run_round(scheduler, now)
        rounds.append(sorted(map(str, sessions(parts))))
    assert sorted(rounds) == [["a", "e"], ["b"], ["c"], ["d"]]


def test_steps_without_tokens_go_at_once(scheduler: Scheduler) -> None:
    scheduler.add(step("long", 500), 0.0)
    empty = step("empty", 0, width=5, key=None)
    scheduler.add(empty, 0.0)
    parts = started(scheduler, 0.0)
    assert [(part.task, part.start, part.end) for part in parts] == [(empty, 0, 0)]
    assert scheduler.finished(parts, 0.001, 0.001) == [empty]
    assert sessions(started(scheduler, 0.001)) == ["long"]


def test_a_part_has_no_more_units_than_there_is_memory_for(scheduler: Scheduler) -> None:
    scheduler.add(step("long", 100, max_units=7), 0.0)
    scheduler.add(step("short", 10, max_units=4), 0.0)
    parts = started(scheduler, 0.0)
    assert {part.task.session: part.end for part in parts} == {"short": 4, "long": 7}


# Budgets


def test_a_prefill_joins_decodes_within_the_budget(scheduler: Scheduler) -> None:
    for i in range(4):
        scheduler.add(step(f"s{i}"), 0.0)
    scheduler.add(step("prompt", 2000), 0.0)
    parts = started(scheduler, 0.0)
    assert set(sessions(parts)) == {"s0", "s1", "s2", "s3", "prompt"}
    tokens = sum(part.tokens for part in parts)
    assert tokens >= LEAST_PREFILL + 4
    assert seconds(tokens) <= 1.5 * seconds(4) + 0.01


def test_a_prefill_gets_on_however_slow_the_machine_is() -> None:
    scheduler = make(round_s=0.001)
    scheduler.add(step("decoder"), 0.0)
    scheduler.add(step("prompt", 2000), 0.0)
    scheduler.add(step("another", 2000), 0.0)
    parts = {part.task.session: part.tokens for part in started(scheduler, 0.0)}
    assert parts["decoder"] == 1
    assert sum(parts.values()) >= LEAST_PREFILL + 1


def test_on_a_slow_device_a_prompt_does_not_crawl() -> None:
    slow = Scheduler(Costs(1.0, 16.0))
    for tokens in (1, 8, 16, 32, 64, 128, 256):
        slow._costs["step"].measured(tokens, 10 * seconds(tokens))
    slow.add(step("long", 2000), 0.0)
    (part,) = started(slow, 0.0)
    assert 10 * seconds(part.tokens) == pytest.approx(3.0, rel=0.1)


def test_a_prompt_that_nobody_waits_beside_gets_larger_chunks(scheduler: Scheduler) -> None:
    scheduler.add(step("prompt", 2000), 0.0)
    (alone,), now = run_round(scheduler, 0.0)
    scheduler.add(step("another", 2000), now)
    beside = started(scheduler, now)
    assert seconds(alone.tokens) == pytest.approx(0.3, rel=0.1)
    assert seconds(sum(part.tokens for part in beside)) == pytest.approx(0.15, rel=0.1)


def test_a_prompt_of_a_second_goes_through_in_one_piece_where_nobody_else_is(scheduler: Scheduler) -> None:
    tokens = next(tokens for tokens in range(2000, 0, -1) if seconds(tokens) <= 0.9)
    scheduler.add(step("prompt", tokens), 0.0)
    (part,) = started(scheduler, 0.0)
    assert part.tokens == tokens


def test_a_prompt_of_a_second_goes_in_chunks_beside_others(scheduler: Scheduler) -> None:
    tokens = next(tokens for tokens in range(2000, 0, -1) if seconds(tokens) <= 0.9)
    scheduler.add(step("prompt", tokens), 0.0)
    scheduler.add(step("another", tokens), 0.0)
    parts = started(scheduler, 0.0)
    assert seconds(sum(part.tokens for part in parts)) == pytest.approx(0.15, rel=0.1)


def test_longer_chunks_are_tried_where_nobody_waits() -> None:
    """Sixteen tokens take three times as long as one, and a hundred take little longer than those."""

    def seconds(tokens: int) -> float:
        return 0.1 if tokens < 4 else 0.25 + tokens / 5000

    scheduler = Scheduler(Costs(10.0, 130.0))
    for tokens in (1, 16):
        scheduler._costs["step"].measured(tokens, seconds(tokens))
    task = step("prompt", 2000)
    scheduler.add(task, 0.0)
    now, rounds = 0.0, 0
    while task.done < task.units:
        parts = started(scheduler, now)
        took = seconds(parts[0].tokens)
        now += took
        scheduler.finished(parts, took, now)
        rounds += 1
    assert rounds < 25


def test_a_short_prompt_goes_before_the_rest_of_a_long_one(scheduler: Scheduler) -> None:
    scheduler.add(step("long", 2000), 0.0)
    _, now = run_round(scheduler, 0.0)
    scheduler.add(step("short", 50), 0.1)
    (part,), now = run_round(scheduler, now)
    assert part.task.session == "short" and part.end == 50  # in one round, though it takes longer than the budget
    longer = step("longer", 150)
    scheduler.add(longer, now)
    first = []
    while longer.done < 150 and len(first) < 20:
        parts, now = run_round(scheduler, now)
        first.append(parts[0].task.session)
    assert first[0] == "longer"
    assert 3 <= first.count("longer") <= first.count("long") + 2  # by turns: they are two peers


def test_the_end_of_a_prompt_is_a_decode(scheduler: Scheduler) -> None:
    task = step("prompt", 100)
    scheduler.add(task, 0.0)
    task.done = 0
    while task.units - task.done > 16:
        _, _ = run_round(scheduler, 0.0)
    assert task.rank == "decode" or task.done == 100


def test_wide_steps_are_no_decodes() -> None:
    assert step("beams", 1, width=5).rank == "decode"
    assert step("speculation", 12).rank == "decode"
    assert step("batch", 1, width=DECODE_TOKENS + 1).rank == "prefill"


def test_rows_too_wide_for_the_budget_get_their_turn_and_no_more(scheduler: Scheduler) -> None:
    """A step of 1000 rows takes 3 s: beside sessions that decode all the time it gets half of the device."""
    now, wide_s, narrow_s = 0.0, 0.0, 0.0
    while now < 60.0:
        if not any(task.session == "wide" for task in scheduler._waiting):
            scheduler.add(step("wide", width=1000), now)
        scheduler.add(step("narrow"), now)
        parts, ended = run_round(scheduler, now)
        if "wide" in sessions(parts):
            wide_s += ended - now
        else:
            narrow_s += ended - now
        now = ended
    assert 0.4 < wide_s / (wide_s + narrow_s) < 0.6


# Turns, fairness


def test_passes_run_beneath_steps_and_are_not_starved(scheduler: Scheduler) -> None:
    scheduler.add(a_pass(100, 32), 0.0)
    now, passes_s = 0.0, 0.0
    while now < 30.0:
        scheduler.add(step(f"s{now}"), now)
        parts, ended = run_round(scheduler, now)
        if parts[0].task.kind == "pass":
            assert len(parts) == 1
            passes_s += ended - now
        now = ended
    assert 0.1 < passes_s / 30.0 < 0.3


def way(scheduler: Scheduler, task: Task, now: float = 0.0) -> list[Part]:
    """The rounds of a pass, alone."""
    scheduler.add(task, now)
    parts = []
    while task.done < task.units:
        (part,), now = run_round(scheduler, now)
        parts.append(part)
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    return parts


def test_a_pass_goes_through_some_blocks_a_round(scheduler: Scheduler) -> None:
    parts = way(scheduler, a_pass(24, 200, weight=1 / 24))  # 0.74 s in all
    assert len(parts) == 3
    assert all(part.weight * seconds(part.tokens) <= 2 * 0.15 for part in parts), "alone, a round may take twice its budget"
    scheduler.add(step("s", 1), 10.0)
    _, now = run_round(scheduler, 10.0)  # now a session is there, and will be back
    parts = way(scheduler, a_pass(24, 200, weight=1 / 24), now)
    assert all(part.weight * seconds(part.tokens) <= 0.15 for part in parts)
    assert [part.end - part.start for part in way(scheduler, a_pass(3, 200), 20.0)] == [1, 1, 1], "one block at the least"


def test_a_pass_ends_its_rounds_only_at_its_cuts(scheduler: Scheduler) -> None:
    cuts = (5, 7, 20, 22, 24)
    ends = [part.end for part in way(scheduler, a_pass(24, 200, weight=1 / 24, cuts=cuts))]
    assert ends == [7, 20, 24], "as many as fit, and at least up to the next"


def test_weights_count(scheduler: Scheduler) -> None:
    light, heavy = step("light", 2000), step("heavy", 2000)
    light.weight, heavy.weight = 0.25, 3.0
    scheduler.add(light, 0.0)
    (part,) = started(scheduler, 0.0)
    tokens_of_light = part.tokens
    scheduler.finished([part], seconds(part.tokens) * 0.25, 0.0)
    assert scheduler._costs["step"].seconds(part.tokens) == pytest.approx(seconds(part.tokens), rel=0.05)
    scheduler.drop(light)
    scheduler.add(heavy, 0.0)
    (part,) = started(scheduler, 0.0)
    assert part.tokens == LEAST_PREFILL < tokens_of_light


def test_peers_share_what_they_compete_for(scheduler: Scheduler) -> None:
    """One peer with one session and one with twenty, whose steps cannot share a pass."""
    now, used = 0.0, {"one": 0.0, "many": 0.0}
    for i in range(20):
        scheduler.add(step(f"many {i}", key=f"many {i}", peer="many"), 0.0)
    scheduler.add(step("one", key="one", peer="one"), 0.0)
    while now < 60.0:
        (part,), ended = run_round(scheduler, now)
        used[part.task.peer] += ended - now
        now = ended
        scheduler.add(step(str(part.task.session), key=part.task.key, peer=part.task.peer), now)
    assert used["one"] == pytest.approx(used["many"], rel=0.1)


def test_peers_of_one_network_get_no_more_than_a_few_would(scheduler: Scheduler) -> None:
    """One peer beside twenty whose ids somebody at one address has made up."""
    now, used = 0.0, {"honest": 0.0, "crowd": 0.0}
    for name, network in [("honest", "192.0.2.0/24"), *((f"crowd {i}", "198.51.100.0/24") for i in range(20))]:
        scheduler.add(dataclasses.replace(step(name, key=name, peer=name), network=network), now)
    while now < 60.0:
        (part,), ended = run_round(scheduler, now)
        used[part.task.peer.split()[0]] += ended - now
        now = ended
        scheduler.add(dataclasses.replace(part.task, done=0), now)
    assert used["honest"] == pytest.approx(used["crowd"] / PEERS_OF_A_NETWORK, rel=0.15)


def test_a_peer_that_comes_anew_neither_catches_up_nor_waits(scheduler: Scheduler) -> None:
    now = 0.0
    scheduler.add(step("old 0", key="old", peer="old"), now)
    for i in range(1, 100):
        _, now = run_round(scheduler, now)
        scheduler.add(step(f"old {i}", key="old", peer="old"), now)
    scheduler.add(step("new", key="new", peer="new"), now)
    order = []
    for i in range(10):
        (part,), now = run_round(scheduler, now)
        order.append(part.task.peer)
        scheduler.add(step(f"{part.task.peer} again {i}", key=part.task.peer, peer=part.task.peer), now)
    assert order.count("new") == 5
    assert "new" in order[:2] and "old" in order[:3]


def test_within_a_peer_what_is_soonest_done_is_first_and_the_long_one_is_not_starved(scheduler: Scheduler) -> None:
    long = step("long", 300, peer="peer")
    scheduler.add(long, 0.0)
    now, first = 0.0, []
    while long.done < long.units and now < 60.0:
        if not any(task.units == 40 for task in scheduler._waiting):
            scheduler.add(step(f"short {now}", 40, peer="peer"), now)
        parts, now = run_round(scheduler, now)
        first.append(parts[0].task.units)
    assert first[0] == 40
    assert long.done == long.units and now < 10.0


# Stragglers


def acquaint(scheduler: Scheduler, names: list[str], think: float, now: float = 0.0) -> float:
    """Let sessions decode side by side until their habits are known; the time when all have just been answered."""
    for _ in range(20):
        for name in names:
            scheduler.add(step(name), now + think)
        now += think + 0.01
        parts = started(scheduler, now)
        assert len(parts) == len(names)
        now += 0.1
        scheduler.finished(parts, seconds(len(names)), now)
    return now


def test_a_lone_session_never_waits(scheduler: Scheduler) -> None:
    now = acquaint(scheduler, ["lone"], 0.008)
    scheduler.add(step("lone"), now + 0.008)
    assert sessions(started(scheduler, now + 0.008)) == ["lone"]


def test_sessions_about_to_come_back_are_waited_for_and_only_so_long(scheduler: Scheduler) -> None:
    now = acquaint(scheduler, ["a", "b", "c"], 0.008)
    scheduler.add(step("a"), now + 0.007)
    until = scheduler.next(now + 0.007)
    assert isinstance(until, float) and now + 0.007 < until < now + 0.007 + WAIT_SHARE * seconds(3)
    scheduler.add(step("b"), now + 0.008)
    until = scheduler.next(now + 0.008)
    assert isinstance(until, float)
    assert sessions(started(scheduler, until)) == ["a", "b"]  # c is late
    assert len(scheduler) == 2, "until the round is finished"


def test_when_all_are_there_nobody_is_waited_for(scheduler: Scheduler) -> None:
    now = acquaint(scheduler, ["a", "b"], 0.008)
    scheduler.add(step("a"), now + 0.008)
    assert isinstance(scheduler.next(now + 0.008), float)
    scheduler.add(step("b"), now + 0.0081)
    assert sessions(started(scheduler, now + 0.0081)) == ["a", "b"]


def test_sessions_far_away_are_not_waited_for(scheduler: Scheduler) -> None:
    now = acquaint(scheduler, ["near", "far"], 0.08)
    scheduler.add(step("near"), now + 0.079)  # the other is due in a moment; but it would be waited for again and again
    assert sessions(started(scheduler, now + 0.079)) == ["near"]


def test_sessions_of_another_key_and_those_that_ended_are_not_waited_for(scheduler: Scheduler) -> None:
    now = acquaint(scheduler, ["a", "b"], 0.008)
    scheduler.add(step("a", key="another"), now + 0.008)
    assert sessions(started(scheduler, now + 0.008)) == ["a"]
    scheduler.finished([], 0.0, now)
    other = make()
    now = acquaint(other, ["a", "b"], 0.008)
    other.add(step("a"), now + 0.007)
    other.forget("b")
    assert sessions(started(other, now + 0.007)) == ["a"]


def test_where_larger_passes_cost_in_proportion_nobody_is_waited_for() -> None:
    scheduler = Scheduler(Costs(10.0, 10.0))
    for tokens in (1, 2, 4):
        scheduler._costs["step"].measured(tokens, 0.1 * tokens)
    now = acquaint(scheduler, ["a", "b"], 0.008)
    for _ in range(20):
        scheduler._costs["step"].measured(2, 0.2)
        scheduler._costs["step"].measured(1, 0.1)
    scheduler.add(step("a"), now + 0.007)
    assert sessions(started(scheduler, now + 0.007)) == ["a"]


def test_a_chunk_lets_those_in_who_come_in_a_moment(scheduler: Scheduler) -> None:
    now = acquaint(scheduler, ["decoder"], 0.008)
    scheduler.add(step("prompt", 2000), now)
    assert isinstance(scheduler.next(now), float)
    scheduler.add(step("decoder"), now + 0.008)
    assert set(sessions(started(scheduler, now + 0.008))) == {"decoder", "prompt"}


# Whatever comes

tasks = st.builds(
    lambda peer, network, session, key, units, width, kind, most, cuts: Task(
        f"p{peer}",
        None if kind == "pass" else session,
        None if kind == "pass" else key,
        max(units, kind == "pass"),
        width,
        kind,
        most,
        None,
        network=network,
        cuts=tuple(sorted({cut for cut in cuts if cut < units} | {max(units, 1)})) if kind == "pass" and cuts else (),
    ),
    peer=st.integers(0, 3),
    network=st.sampled_from(["", "network"]),
    session=st.integers(0, 10**9),
    key=st.sampled_from([None, "a", "b"]),
    units=st.one_of(st.integers(0, 3), st.integers(0, 300)),
    width=st.one_of(st.just(1), st.integers(1, 40)),
    kind=st.sampled_from(["step", "step", "pass"]),
    most=st.integers(1, 100),
    cuts=st.lists(st.integers(1, 300), max_size=20),
)


@settings(deadline=None)
@given(arrivals=st.lists(st.tuples(st.floats(0.0, 0.5), tasks, st.integers(0, 5)), max_size=25), most_tokens=st.integers(1, 300))
def test_everything_is_computed_once_and_in_order(arrivals: list[tuple[float, Task, int]], most_tokens: int) -> None:
    """Work of any mix: each part once and in its order, nothing of what was dropped, nothing too large, no wait that ends in the past."""
    scheduler = make(most_tokens=most_tokens)
    now, done, dropped = 0.0, dict.fromkeys((task for _, task, _ in arrivals), 0), set()
    times = itertools.accumulate(gap for gap, _, _ in arrivals)
    coming = [(when, task, fate) for when, (_, task, fate) in zip(times, arrivals, strict=True)]
    while coming or len(scheduler):
        while coming and coming[0][0] <= now:
            when, task, fate = coming.pop(0)
            scheduler.add(task, when)
            if fate == 0:
                scheduler.drop(task)
                dropped.add(task)
        decision = scheduler.next(now)
        if not isinstance(decision, list):
            assert isinstance(decision, float) == bool(len(scheduler))
            changes = [when for when, _, _ in coming[:1]] + ([decision] if isinstance(decision, float) else [])
            assert all(when > now for when in changes)
            now = min(changes, default=now)
            continue
        tokens = sum(part.tokens for part in decision)
        assert decision and len({part.task for part in decision}) == len(decision)
        if tokens:
            computed = [part for part in decision if part.tokens]  # steps without tokens come along with any
            assert len({(part.task.kind, part.task.key) for part in computed}) == 1
            assert len(computed) == 1 or computed[0].task.key is not None
            assert tokens <= max(most_tokens, DECODE_TOKENS) or [part.end - part.start for part in computed] == [1]
        for part in decision:
            assert part.task not in dropped
            assert part.start == done[part.task] and part.end <= part.task.units
            cuts = part.task.cuts
            assert part.end in cuts if cuts else part.end - part.start <= part.task.max_units
            assert part.end > part.start or part.task.units == 0
            done[part.task] = part.end
        now += seconds(tokens)
        complete = scheduler.finished(decision, seconds(tokens), now)
        assert all(task.done == task.units for task in complete)
    assert all(done[task] == task.units for task in done if task not in dropped)
    assert scheduler.next(now) is None


@settings(deadline=None, max_examples=30)
@given(
    victim=tasks,
    crowd=st.lists(tasks, min_size=1, max_size=5),
    newcomers=st.booleans(),
)
def test_nothing_starves_beside_work_that_never_ends(victim: Task, crowd: list[Task], newcomers: bool) -> None:
    """Whatever others ask for again and again, each time by another name or not, a task gets on, on a device that has too much to do."""
    scheduler = make(most_tokens=256)
    scheduler.add(victim, 0.0)
    here: dict[Task, Task] = {}
    number, now, last, rounds = 0, 0.0, 0.0, 0
    longest = max(0.15, *(seconds(task.width * min(task.units, task.max_units, 300)) for task in [*crowd, victim]))
    while victim in scheduler._waiting and rounds < 2000:
        for template in crowd:
            if template not in here.values():
                number += 1
                peer = f"new {number}" if newcomers else template.peer
                task = dataclasses.replace(template, peer=peer)
                here[task] = template
                scheduler.add(task, now)
        parts = scheduler.next(now)
        if isinstance(parts, float):
            now = parts
            continue
        assert parts
        rounds += 1
        took = max(seconds(sum(part.tokens for part in parts)), 1e-3)
        now += took
        if any(part.task is victim for part in parts):
            last = now
        assert now - last < OVERDUE_S + 10 * len(crowd) * longest, "starved"
        for task in scheduler.finished(parts, took, now):
            here.pop(task, None)


def test_the_expected_wait_is_what_is_queued(scheduler: Scheduler) -> None:
    scheduler.add(step("decoder"), 0.0)
    assert scheduler.expected_wait() == pytest.approx(0.1)
    scheduler.add(step("other"), 0.0)
    assert scheduler.expected_wait() == pytest.approx(seconds(2))
    scheduler.add(step("prompt", 1000), 0.0)
    assert 4.0 < scheduler.expected_wait() < 12.0
    scheduler.add(a_pass(10, 100), 0.0)
    assert 8.0 < scheduler.expected_wait() < 24.0


def test_what_was_done_tells_how_fast_it_was() -> None:
    scheduler = Scheduler(Costs(10.0, 160.0))
    assert set(scheduler.done().values()) == {(0.0, 0.0)}
    now = 0.0

    def work(tasks: list[Task], slower: float) -> None:
        """Everything takes so many times as long as announced: 0.1 s for a token, 0.2 s for 32."""
        nonlocal now
        for task in tasks:
            scheduler.add(task, now)
        left = len(tasks)
        while left:
            parts = scheduler.next(now)
            if not isinstance(parts, list):
                now = parts
                continue
            took = parts[0].weight * slower * seconds(sum(part.tokens for part in parts))
            now += took
            left -= len(scheduler.finished(parts, took, now))

    def rates() -> dict[str, float]:
        return {kind: done.tokens / done.seconds for kind, done in scheduler.done().items() if done.seconds}

    for _ in range(10):
        work([step("a")], 1.0)
        work([step(session) for session in "abcd"], 1.0)  # side by side: no slower for that
    assert rates() == {"decode": pytest.approx(10.0)}
    work([step("a", 512)], 1.0)
    work([a_pass(2, 64, weight=0.5)], 1.0)
    assert rates() == {"decode": pytest.approx(10.0), "prefill": pytest.approx(160.0), "forward": pytest.approx(160.0)}
    for _ in range(10):
        work([a_pass(1, 1, weight=0.5)], 1.0)
    assert rates()["forward"] == pytest.approx(160.0), "whoever sends single tokens makes nobody look slow"
    before = scheduler.done()["decode"]
    for _ in range(10):
        work([dataclasses.replace(step("a"), weight=1 / 12)], 3.0)
    assert scheduler.done()["decode"] == before, "one block alone takes more than its share: that says nothing of the whole span"
    for _ in range(10):
        work([step(session) for session in "abcd"], 3.0)  # another program takes its share
    after = scheduler.done()["decode"]
    assert (after.tokens - before.tokens) / (after.seconds - before.seconds) == pytest.approx(10 / 3)
    scheduler.add(step("a"), now)
    parts = scheduler.next(now + 10)
    assert isinstance(parts, list)
    scheduler.finished(parts, 3600.0, now + 3600)
    assert scheduler.done()["decode"].seconds - after.seconds < 5, "a machine that was suspended has not become slow"


# Several devices: as many rounds under way


def test_what_is_under_way_is_not_touched() -> None:
    scheduler = make(devices=2)
    first, long, training = step("first"), step("long", 1000, key="other"), a_pass(10, 100, weight=0.1)
    scheduler.add(first, 0.0)
    decode = started(scheduler, 0.0)
    assert sessions(decode) == ["first"] and scheduler.next(0.0) is None
    scheduler.add(training, 0.0)
    passing = started(scheduler, 0.0)
    assert passing[0].task is training and scheduler.next(0.0) is None, "a pass goes on where it was left"
    scheduler.drop(first)
    assert scheduler.finished(decode, 0.1, 0.1) == [] and len(scheduler) == 1
    scheduler.add(long, 0.1)
    chunks = [started(scheduler, 0.1)]
    while chunks[-1][0].end < 1000:
        chunks.append(started(scheduler, 0.1))
        assert chunks[-1][0].start == chunks[-2][0].end, "a prompt goes on at once"
    assert len(chunks) > 3 and scheduler.next(0.2) is None and len(scheduler) == 2
    assert scheduler.expected_wait() == pytest.approx(scheduler._seconds_left(training))
    assert scheduler.finished(passing, 0.1, 0.3) == []
    assert started(scheduler, 0.3)[0].start == passing[0].end
    done = [scheduler.finished(parts, 0.1, 0.4) for parts in chunks]
    assert done == [*([[]] * (len(chunks) - 1)), [long]]


def test_decodes_are_divided_among_devices_where_that_is_quicker() -> None:
    """A pass of one token takes 0.1 s, one of 32 takes 0.2 s: few sessions stay together, many are divided."""
    for number, rounds in ((4, [4]), (64, [32, 32]), (6, [6])):
        scheduler = make(devices=2)
        for session in range(number):
            scheduler.add(step(f"s{session}"), 0.0)
        found = []
        while isinstance(parts := scheduler.next(0.0), list):
            found.append(len(parts))
        assert found == rounds


def test_rounds_stay_as_large_while_sessions_come_and_go() -> None:
    """Those under way and those about to come back count, so that halves are not divided again."""
    scheduler, now = make(devices=2), 0.0
    for session in range(64):
        scheduler.add(step(f"s{session}"), now)
    under_way, sizes = [started(scheduler, now), started(scheduler, now)], []
    for _ in range(20):
        parts = under_way.pop(0)
        sizes.append(len(parts))
        now += 0.1
        scheduler.finished(parts, 0.2, now)
        for part in parts:
            scheduler.add(step(str(part.task.session)), now + 0.001)
        under_way.append(started(scheduler, now + 0.001))
    assert sizes == [32] * 20


def test_a_prompt_that_is_alone_is_cut_so_that_all_devices_work_at_it() -> None:
    whole, cut = make(), make(devices=2)
    for scheduler in (whole, cut):
        scheduler.add(step("prompt", 128), 0.0)
    (alone,), (first,) = started(whole, 0.0), started(cut, 0.0)
    assert alone.tokens == 128 and 32 <= first.tokens <= 64
    pieces = [first]
    while isinstance(parts := cut.next(0.0), list):
        pieces += parts
    assert sum(part.tokens for part in pieces) == 128
    through = sum(seconds(part.tokens) / 2 for part in pieces) + seconds(pieces[-1].tokens) / 2
    assert through < 0.9 * seconds(128)
