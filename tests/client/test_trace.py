"""Where an answer's time went: sums, what is believed, and what a person reads. No network, no clock."""

from __future__ import annotations

import json
import time

import pytest

from petalnet.client.trace import HopTimes, StepTimes, Trace
from petalnet.client.trace_text import describe_seconds

IDS = ("12D3KooWaaaaa1", "12D3KooWbbbbb2", "12D3KooWccccc3")
SPANS = ((0, 4), (4, 8), (8, 12))


def step(
    wall_s: float,
    *,
    queue_s: float = 0.0,
    compute_s: float = 0.0,
    other_s: float = 0.0,
    tokens: int = 1,
    chunks: int = 1,
    direct: bool = True,
) -> StepTimes:
    """A step through three servers that take the same time."""
    held_s = queue_s + compute_s + other_s
    hops = [
        HopTimes(peer_id, *span, queue_s, compute_s, held_s, direct and peer_id != IDS[-1])
        for peer_id, span in zip(IDS, SPANS, strict=True)
    ]
    return StepTimes(tokens, chunks, wall_s, tuple(hops))


def one_slow(*, queue_s: float = 0.0, compute_s: float = 0.0) -> StepTimes:
    """A step of 100 ms that is at the second of three servers for 80 ms."""
    hops = [
        HopTimes(peer_id, *span, queue_s * (span[0] == 4), compute_s * (span[0] == 4), 0.08 if span[0] == 4 else 0.001, span[0] < 8)
        for peer_id, span in zip(IDS, SPANS, strict=True)
    ]
    return StepTimes(1, 1, 0.1, tuple(hops))


def answer(steps: list[StepTimes], *, between_s: float = 0.0) -> Trace:
    """An answer of a token a step, with so much time of this machine before each step and at the end."""
    now = 100.0
    trace = Trace(now)
    for one in steps:
        now += between_s
        trace.token_begins(now)
        trace.visit_begins(now)
        trace.add(one)
        now += one.wall_s
        trace.visit_ends(now)
    trace.tokens, trace.rows = len(steps), 1
    trace.end(now + between_s)
    return trace


def test_the_parts_of_an_answer_are_all_of_it() -> None:
    trace = answer([step(0.1, queue_s=0.001, compute_s=0.01, other_s=0.002)] * 5, between_s=0.003)
    assert trace.steps == 5
    assert trace.wall_s == pytest.approx(5 * 0.1 + 6 * 0.003)
    assert trace.local_s == pytest.approx(6 * 0.003)
    assert trace.network_s == pytest.approx(5 * (0.1 - 3 * 0.013))
    assert [hop.queue_s for hop in trace.hops] == pytest.approx([0.005] * 3)
    assert [hop.compute_s for hop in trace.hops] == pytest.approx([0.05] * 3)
    assert [hop.overhead_s for hop in trace.hops] == pytest.approx([0.01] * 3)
    assert trace.local_s + trace.network_s + trace.waiting_s + sum(hop.held_s for hop in trace.hops) == pytest.approx(trace.wall_s)


def test_tokens_are_timed_from_one_pass_of_the_loop_to_the_next() -> None:
    trace = answer([step(0.5, tokens=40), step(0.1), step(0.1), step(0.3)], between_s=0.01)
    assert trace.first_token_s == pytest.approx(0.52)
    assert trace.token_s == pytest.approx((1.05 - 0.52) / 3)
    assert trace.median_token_s == pytest.approx(0.11)
    assert trace.worst_token_s == pytest.approx(0.31)
    assert (trace.prompt_tokens, trace.prompt_chunks) == (40, 1)
    single = answer([step(0.5)])
    assert single.first_token_s == pytest.approx(0.5) and single.token_s is None and single.worst_token_s is None


def test_chunks_under_way_at_several_servers_at_once_count_as_long_as_the_answer_waited_for_them() -> None:
    """The slowest server works through all chunks; of the others one chunk each is on the way of the first and the last."""
    hops = [
        HopTimes(IDS[0], 0, 4, 0.0, 0.4, 5.0, True),
        HopTimes(IDS[1], 4, 8, 0.0, 0.8, 5.0, True),
        HopTimes(IDS[2], 8, 12, 0.0, 0.4, 5.0, False),
    ]
    trace = answer([StepTimes(1024, 8, 1.1, tuple(hops))])
    assert [hop.compute_s for hop in trace.hops] == pytest.approx([0.05, 0.8, 0.05])
    assert [hop.overhead_s for hop in trace.hops] == [0, 0, 0]
    assert trace.network_s == pytest.approx(0.2)
    assert "1,024 tokens in 8 chunks" in str(trace)


def test_of_servers_that_are_alike_one_is_the_slowest() -> None:
    trace = answer([step(1.0, compute_s=0.4, tokens=1024, chunks=4)])
    assert [hop.compute_s for hop in trace.hops] == pytest.approx([0.4, 0.1, 0.1])
    assert trace.network_s == pytest.approx(0.4)


def test_a_server_is_believed_only_as_far_as_its_times_fit_into_the_step() -> None:
    """Anybody may claim anything: the parts stay parts of what this machine measured."""
    claims = (HopTimes(IDS[0], 0, 4, 0.0, 9e5, 9e5, True), HopTimes(IDS[1], 4, 12, 0.01, 0.02, 0.0, False))
    trace = answer([StepTimes(1, 1, 0.1, claims)])
    assert trace.network_s == pytest.approx(0.0, abs=1e-9)
    assert sum(hop.held_s for hop in trace.hops) == pytest.approx(0.1)
    assert all(hop.overhead_s == 0 for hop in trace.hops)


def test_what_a_step_took_beside_its_chain_is_waiting() -> None:
    trace = Trace(0.0)
    trace.token_begins(0.0)
    trace.visit_begins(0.0)
    trace.add(step(0.1))
    trace.visit_ends(1.1)
    trace.visit_begins(1.1)
    trace.add(step(0.1))
    trace.visit_ends(1.2005)  # half a millisecond: nobody waited
    trace.visit_begins(1.2005)
    trace.visit_ends(3.2005)  # in vain
    trace.end(3.2005, "no server")
    assert trace.waiting_s == pytest.approx(3.0)
    assert trace.local_s == pytest.approx(0.0005)
    assert trace.slowest == "waiting for servers with room: 94 % (3.00 s)"
    assert trace.error == "no server" and "cut short: no server" in str(trace)


@pytest.mark.parametrize(
    "trace, sentence",
    [
        (answer([step(0.05, compute_s=0.001)] * 4), "network: 94 % (3 hops, 47 ms a step)"),
        (answer([step(0.05, direct=False)] * 4), "network: 100 % (3 hops, 2 of them through this machine, 50 ms a step)"),
        (answer([step(0.01)] * 4, between_s=0.048), "this machine, between steps: 86 % (60 ms a step)"),
        (answer([step(0.1, compute_s=0.03)]), "servers compute: 90 % (90 ms a step)"),
        (answer([step(0.1, queue_s=0.03)]), "queues of servers: 90 % (90 ms a step)"),
        (answer([step(0.1, other_s=0.03)]), "servers, beside computation: 90 % (90 ms a step)"),
        (answer([one_slow(compute_s=0.08)] * 2), "server …bbbbb2 computes: 80 % (80 ms a step)"),
        (answer([one_slow(queue_s=0.08)] * 2), "queue at …bbbbb2: 80 % (80 ms a step)"),
        (answer([one_slow()] * 2), "server …bbbbb2, beside computation: 80 % (80 ms a step)"),
        (answer([]), "nothing was asked of servers"),
    ],
)
def test_the_slowest_part_is_said_in_a_sentence(trace: Trace, sentence: str) -> None:
    assert trace.slowest == sentence


def test_the_route_says_which_outputs_came_through_the_client() -> None:
    trace = answer([step(0.1, direct=False), step(0.1)])
    assert trace.route == "0:4 at …aaaaa1 → 4:8 at …bbbbb2 → 8:12 at …ccccc3"
    assert [hop.relayed_steps for hop in trace.hops] == [1, 1, 0]
    trace = answer([step(0.1), step(0.1, direct=False)])
    assert trace.route == "0:4 at …aaaaa1 ⇢ 4:8 at …bbbbb2 ⇢ 8:12 at …ccccc3"
    assert "through this machine (1 of 2 steps)" in str(trace)


def test_a_server_that_was_left_is_still_told_of() -> None:
    other = StepTimes(1, 1, 0.1, (HopTimes("12D3KooWddddd4", 0, 12, 0.0, 0.05, 0.05, False),))
    trace = answer([step(0.1), other])
    assert [hop.name for hop in trace.hops] == ["…ddddd4", "…aaaaa1", "…bbbbb2", "…ccccc3"]
    assert trace.route == "0:12 at …ddddd4"
    assert str(trace).count("not used any more") == 3


def test_the_table_is_aligned_and_the_values_are_plain() -> None:
    trace = answer([step(0.1, compute_s=0.01)] * 3, between_s=0.001)
    trace.drafted, trace.accepted = 12, 7
    text = str(trace)
    table = [line for line in text.splitlines() if line.startswith(("…", "network", "this machine"))]
    assert len({line.index("%") for line in table}) == 1
    assert max(len(line) for line in text.splitlines()) <= 110
    assert "12 tokens guessed ahead, 7 of them right" in text
    plain = json.loads(json.dumps(trace.to_dict()))
    assert plain["tokens"] == 3 and plain["hops"][1]["peer_id"] == IDS[1] and plain["slowest"] == trace.slowest


def test_a_session_that_is_stepped_by_hand_has_its_steps_only() -> None:
    trace = Trace(0.0)
    for _ in range(2):
        trace.add(step(0.1))
    assert trace.wall_s == pytest.approx(0.2) and trace.local_s == 0
    assert str(trace).startswith("2 steps in 200 ms\n")
    assert "this machine" not in trace.slowest


def test_an_answer_that_is_over_stays_as_it_is() -> None:
    trace = answer([step(0.1)] * 3)
    before = trace.to_dict()
    trace.token_begins(1000.0)
    trace.token_begins(2000.0)
    assert trace.to_dict() == before


def test_a_step_that_was_interrupted_is_waiting_and_what_comes_of_it_later_is_not_counted() -> None:
    trace = Trace(0.0)
    trace.token_begins(0.0)
    trace.visit_begins(1.0)
    trace.end(3.0, "KeyboardInterrupt")
    trace.add(step(5.0))
    trace.visit_ends(6.0)
    assert (trace.waiting_s, trace.local_s, trace.wall_s, trace.steps) == pytest.approx((2.0, 1.0, 3.0, 0))


@pytest.mark.parametrize(
    "seconds, text",
    [(0.0, "0 µs"), (0.0004, "400 µs"), (0.00123, "1.2 ms"), (0.0412, "41 ms"), (0.9996, "1.00 s"), (12.34, "12.3 s"), (345.6, "346 s")],
)
def test_seconds_are_written_for_people(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text


def test_a_step_costs_next_to_nothing() -> None:
    """The aim is 10 µs; the bound leaves room for a machine that is busy with other things."""
    one, trace = step(0.1, compute_s=0.01), Trace(0.0)
    quickest = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            trace.token_begins(0.0)
            trace.visit_begins(0.0)
            trace.add(one)
            trace.visit_ends(0.0)
        quickest = min(quickest, (time.perf_counter() - started) / 100)
    assert quickest < 50e-6
