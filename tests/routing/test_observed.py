"""What a client saw corrects what servers announce: who lies or has become slow is found out, who had a bad minute is forgiven."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import MissingBlocksError
from petalnet.routing.expected import Client, Expected
from petalnet.routing.observed import HALF_LIFE_S, LONGEST_S, MAX_SERVERS, Observed, unaccounted
from petalnet.routing.records import ServerRecord
from petalnet.routing.routes import find_route

Build = Callable[..., ServerRecord]


def near(peer_id: str) -> float | None:
    return 0.001


def steps(
    observed: Observed, record: ServerRecord, count: int, block_s: float, now: float, *, tokens: int = 1, queue_s: float = 0.0
) -> None:
    for _ in range(count):
        observed.note(record, tokens=tokens, blocks=4, compute_s=4 * block_s * tokens, queue_s=queue_s, now=now)


def test_what_is_announced_counts_until_something_was_seen(record: Build) -> None:
    observed, server = Observed(), record("A")
    assert observed.speed(server, "decode", 0.0) == (0.025, 0.025, 0.0, None)
    steps(observed, server, 40, 0.005, 0.0)
    speed = observed.speed(server, "decode", 0.0)
    assert 0.005 < speed.block_s < 0.01 and speed.announced_s == 0.025 and speed.seen == 16
    assert observed.speed(server, "forward", 0.0).block_s == pytest.approx(1 / 200 / 4), "of other work nothing was seen"


def test_a_server_that_becomes_slow_is_found_out_within_some_tokens(record: Build) -> None:
    observed, server = Observed(), record("A")
    steps(observed, server, 500, 0.025, 0.0)
    steps(observed, server, 16, 0.25, 1.0)
    assert observed.speed(server, "decode", 1.0).block_s > 4 * 0.025


def test_one_bad_minute_is_forgiven(record: Build) -> None:
    observed, server = Observed(), record("A")
    for second in range(60):
        steps(observed, server, 1, 0.25, float(second))
    assert observed.speed(server, "decode", 60.0).block_s > 5 * 0.025
    # By good work within some tokens, and by time alone within some minutes.
    assert observed.speed(server, "decode", 60 + 6 * HALF_LIFE_S).block_s < 1.7 * 0.025
    steps(observed, server, 64, 0.025, 61.0)
    assert observed.speed(server, "decode", 61.0).block_s < 1.5 * 0.025


def test_one_step_that_took_forever_counts_for_little(record: Build) -> None:
    observed, server = Observed(), record("A")
    steps(observed, server, 20, 0.025, 0.0)
    steps(observed, server, 1, 1000.0, 1.0)
    assert observed.speed(server, "decode", 1.0).block_s < 1.3 * 0.025


def test_of_two_equal_servers_the_same_is_taken_though_measurements_differ(record: Build, now: float) -> None:
    """Users find what was computed of their earlier prompts only where they were before."""
    observed, servers = Observed(), [record("A"), record("B")]
    for number in range(200):
        (hop,) = find_route(servers, 0, 4, Client(round_trip=near, observed=observed, clock=float(number)), now=now)
        assert hop.peer_id == "A"
        steps(observed, servers[0], 1, 0.025 * (0.9 + 0.3 * (number % 2)), float(number))


def test_prompts_correct_the_rate_of_prompts(record: Build) -> None:
    observed, server = Observed(), record("A")
    steps(observed, server, 3, 0.01, 0.0, tokens=512)
    assert observed.speed(server, "prefill", 0.0).block_s > 2 * server.block_s("prefill")
    assert observed.speed(server, "decode", 0.0).block_s == server.block_s("decode")


def test_a_few_tokens_in_one_step_are_not_held_against_the_decode_rate(record: Build) -> None:
    observed, server = Observed(), record("A")  # a token alone 25 ms a block; in a prompt 2.5 ms
    for _ in range(20):
        observed.note(server, tokens=5, blocks=4, compute_s=4 * (0.025 + 4 * 0.0025), queue_s=0.0, now=0.0)
    assert observed.speed(server, "decode", 0.0).block_s == pytest.approx(0.025)


@pytest.mark.parametrize(("work", "tokens"), [("forward", 1), ("forward", 8), ("prefill", 17)])
def test_short_passes_and_prompts_are_not_held_against_the_rate_of_long_ones(record: Build, work: str, tokens: int) -> None:
    # A device that takes as long for 32 tokens as for one: 2.5 ms a block.
    observed, server = Observed(), record("A", decode_tokens_s=100.0, prefill_tokens_s=3200.0, forward_tokens_s=3200.0)
    for second in range(40):
        observed.note(server, tokens=tokens, blocks=4, compute_s=0.01, queue_s=0.0, now=float(second), work=work)
    assert observed.speed(server, work, 40.0).block_s == pytest.approx(server.block_s(work))
    assert Expected([server], Client(round_trip=near), work=work, tokens=tokens).hop_time("A").block_s == pytest.approx(0.0025)


def test_waiting_is_remembered_for_some_seconds(record: Build) -> None:
    observed, server = Observed(), record("A")
    steps(observed, server, 20, 0.025, 0.0, queue_s=0.5)
    queue = observed.speed(server, "decode", 1.0).queue
    assert queue is not None and queue.with_prior(0.0) > 0.3
    queue = observed.speed(server, "decode", 120.0).queue
    assert queue is not None and queue.with_prior(0.0) < 0.02


def test_a_liar_wins_for_a_moment_and_each_time_for_a_smaller_part_of_the_time(record: Build, now: float) -> None:
    """It claims a billion tokens a second and takes a second a block; another announces truly. Sessions of 20 tokens, one after another."""
    observed = Observed()
    servers = [record("A", decode_tokens_s=1e9), record("B")]
    block_s = {"A": 0.25, "B": 0.025}
    clock, won = 0.0, []
    while clock < 6 * 3600:
        (hop,) = find_route(servers, 0, 4, Client(round_trip=near, observed=observed, clock=clock), now=now)
        record_of = servers[hop.peer_id == "B"]
        if hop.peer_id == "A":
            won.append(clock)
            if len(won) == 3:  # more lies do not help
                servers[0] = record("A", decode_tokens_s=1e8, prefill_tokens_s=1e9)
        for _ in range(20):
            observed.note(record_of, tokens=1, blocks=4, compute_s=4 * block_s[hop.peer_id], queue_s=0.0, now=clock)
            clock += 4 * block_s[hop.peer_id]
        clock += 5.0
    assert 2 <= len(won) <= 12, "it is tried again, seldom"
    pauses = [later - earlier for earlier, later in zip(won, won[1:], strict=False)]
    assert pauses[0] > HALF_LIFE_S and max(pauses) > 8 * pauses[0]


def test_who_announces_no_queue_and_lets_everybody_wait_gets_fewer_chances(record: Build, now: float) -> None:
    observed = Observed()
    servers = [record("A", decode_tokens_s=1e9), record("B")]
    clock, won = 0.0, []
    while clock < 6 * 3600:
        (hop,) = find_route(servers, 0, 4, Client(round_trip=near, observed=observed, clock=clock), now=now)
        takes = (0.0, 1.0) if hop.peer_id == "A" else (0.1, 0.0)
        won += [clock] if hop.peer_id == "A" else []
        for _ in range(20):
            observed.note(servers[hop.peer_id == "B"], tokens=1, blocks=4, compute_s=takes[0], queue_s=takes[1], now=clock)
            clock += sum(takes)
        clock += 5.0
    assert 2 <= len(won) <= 14 and won[-1] - won[-2] > 8 * (won[1] - won[0])


def test_an_honest_server_that_was_slow_for_long_is_trusted_again(record: Build) -> None:
    observed, server = Observed(), record("A")
    clock = 0.0
    for _ in range(6):
        steps(observed, server, 32, 0.25, clock)
        clock += 40 * HALF_LIFE_S
    steps(observed, server, 64, 0.025, clock)
    steps(observed, server, 32, 0.25, clock + 1)
    assert observed.speed(server, "decode", clock + 1 + 6 * HALF_LIFE_S).block_s < 1.7 * 0.025, "as after a first bad minute"


def test_what_is_remembered_is_bounded(record: Build) -> None:
    observed = Observed()
    for number in range(MAX_SERVERS + 10):
        observed.note(record("P" + str(number + 1).replace("0", "z")), tokens=1, blocks=1, compute_s=1.0, queue_s=0.0, now=0.0)
    assert len(observed._seen) == MAX_SERVERS


numbers = st.floats(min_value=-1e300, max_value=1e300) | st.sampled_from([math.inf, -math.inf, math.nan, 0.0])
notes = st.lists(st.tuples(st.integers(-1, 10**9), st.integers(0, 80), numbers, numbers, st.floats(0, 1e9)), max_size=20)


@given(notes, st.sampled_from([0.0, 5e-324, 10.0, 1e9]))
def test_nothing_that_servers_may_say_breaks_it(record: Build, given_notes, rate: float) -> None:
    observed, server = Observed(), record("A", decode_tokens_s=rate)
    for tokens, blocks, compute_s, queue_s, at in given_notes:
        observed.note(server, tokens=tokens, blocks=blocks, compute_s=compute_s, queue_s=queue_s, now=at)
    speed = observed.speed(server, "decode", 1e9)
    assert 0 <= speed.block_s <= max(LONGEST_S, server.block_s("decode") or 0.0)
    try:
        find_route([server], 0, 4, Client(round_trip=near, observed=observed, clock=1e9), now=server.issued)
    except MissingBlocksError:
        raise AssertionError("a server that is there is used") from None


def test_who_hides_time_is_asked_to_account_for_it() -> None:
    assert unaccounted([0.01, 0.02], 0.045, 0.01) == 0.0
    assert unaccounted([0.0, 0.0], 0.425, 0.01) == pytest.approx((0.425 - 0.015 - 0.005) / 2)
    assert unaccounted([], 1.0, 0.0) == 0.0
