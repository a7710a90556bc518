"""Which blocks a server takes, and whether it moves, on records alone; the clock stands still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.errors import UsageError
from petalnet.routing.placement import Move, choose_span, find_moves, may_leave, reconsider, yields_to
from petalnet.routing.records import ServerRecord
from petalnet.routing.strength import MOST_OF_MEDIAN, SCALE, places_of, strengths, weakest_window

Build = Callable[..., ServerRecord]
NOW = 1_800_000_000.0
PEERS = [f"P{number}{letter}" for number in "123456789" for letter in "ABCD"]


def strength(servers: Sequence[ServerRecord], num_blocks: int = 12) -> list[int]:
    return strengths(places_of(servers, num_blocks, now=NOW), num_blocks)


# ---- strength


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.data())
def test_the_weakest_window_is_the_first_by_its_sorted_strengths(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    starts = range(len(values) - count + 1)

    def merit(start: int) -> list[int]:
        return sorted(values[start : start + count])

    best = min(starts, key=lambda start: (merit(start), start))
    assert weakest_window(values, count) == best
    stay = data.draw(st.sampled_from(list(starts)))
    assert weakest_window(values, count, stay=stay) == (stay if merit(stay) == merit(best) else best)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=10), st.integers(1, 9), st.data())
def test_the_weakest_window_leaves_the_swarm_best_in_the_leximin_order(values: list[int], rate: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))

    def after(start: int) -> list[int]:
        return sorted(value + rate * (start <= block < start + count) for block, value in enumerate(values))

    assert after(weakest_window(values, count)) == max(after(start) for start in range(len(values) - count + 1))


def test_a_rate_counts_at_most_a_few_times_the_median_servers(record: Build) -> None:
    honest = [record(peer, span=(0, 4), decode_tokens_s=10.0) for peer in "ABC"]
    liar = record("D", span=(4, 8), decode_tokens_s=1e9)
    places = {place.peer_id: place.rate for place in places_of([*honest, liar], 12, now=NOW)}
    assert places == {"A": 10 * SCALE, "B": 10 * SCALE, "C": 10 * SCALE, "D": MOST_OF_MEDIAN * 10 * SCALE}


def test_speeds_are_compared_by_blocks_since_more_blocks_make_fewer_tokens(record: Build) -> None:
    """Ten machines alike, one of which holds a single block of eighty: nobody lies."""
    servers = [record(peer, span=(0, 80), decode_tokens_s=1.0) for peer in "ABCD"] + [record("E", span=(0, 1), decode_tokens_s=80.0)]
    assert strength(servers, 80)[:2] == [84 * SCALE, 4 * SCALE]


# ---- joining


def test_the_first_server_begins_at_the_beginning(now: float) -> None:
    assert choose_span([], 12, 5, now=now) == (0, 5)


def test_holes_are_filled_before_weak_blocks_are_strengthened(record: Build, now: float) -> None:
    servers = [record("A", span=(0, 5), decode_tokens_s=1.0), record("B", span=(7, 12), decode_tokens_s=900.0)]
    assert choose_span(servers, 12, 2, now=now) == (5, 7)
    assert choose_span(servers, 12, 3, now=now) == (4, 7), "the hole and, beside it, the weaker neighbour"


def test_the_largest_hole_that_can_be_filled_wins_over_a_cheap_neighbourhood(record: Build, now: float) -> None:
    servers = [record("A", span=(1, 6), decode_tokens_s=1.0), record("B", span=(9, 12), decode_tokens_s=900.0)]
    assert choose_span(servers, 12, 4, now=now) == (5, 9)


def test_servers_that_are_loading_count_and_those_that_go_or_are_gone_do_not(record: Build, now: float) -> None:
    loading = record("A", span=(0, 6), state="joining", decode_tokens_s=0.0)
    assert choose_span([loading], 12, 6, now=now) == (6, 12)
    assert choose_span([record("A", span=(0, 6), state="draining")], 12, 6, now=now) == (0, 6)
    assert choose_span([record("A", span=(0, 6), state="left")], 12, 6, now=now) == (0, 6)
    assert choose_span([record("A", span=(0, 6))], 12, 6, now=now + 90) == (0, 6)


@pytest.mark.parametrize("count", [0, -1, 13])
def test_an_impossible_count_is_refused(now: float, count: int) -> None:
    with pytest.raises(UsageError, match="1 to 12 blocks"):
        choose_span([], 12, count, now=now)


spans = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 12), st.floats(0, 1e6)).filter(lambda item: item[0] < item[1]), min_size=1, max_size=6
)


@given(spans, st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_chosen_window_is_the_weakest_and_does_not_depend_on_the_order(record: Build, swarm, count: int, random) -> None:
    servers = [record(peer, span=(a, b), decode_tokens_s=rate) for peer, (a, b, rate) in zip("ABCDEF", swarm, strict=False)]
    first, end = choose_span(servers, 12, count, now=NOW)
    assert first >= 0 and end - first == count and end <= 12
    known = strength(servers)
    assert min(known[first:end]) == min(known)
    random.shuffle(servers)
    assert choose_span(servers, 12, count, now=NOW) == (first, end)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_servers_that_come_one_after_another_complete_the_model(record: Build, counts: list[int]) -> None:
    servers: list[ServerRecord] = []
    for peer, count in zip("ABCDEFGH", counts, strict=False):
        uncovered = strength(servers).count(0)
        span = choose_span(servers, 12, count, now=NOW)
        servers.append(record(peer, span=span, state="joining"))
        assert strength(servers).count(0) == max(uncovered - count, 0)


@given(st.integers(1, 4), st.integers(2, 6), st.randoms(use_true_random=False))
def test_newcomers_that_chose_at_the_same_moment_spread_as_if_they_had_come_one_by_one(
    record: Build, count: int, many: int, random
) -> None:
    """All saw the empty swarm and chose the same blocks; then each looks again, in whatever order, as others' changes become known."""
    swarm = {peer: record(peer, span=(0, count), state="joining", decode_tokens_s=0.0, num_blocks=12) for peer in PEERS[:many]}
    for _ in range(many):
        order = list(swarm)
        random.shuffle(order)
        for peer in order:
            others = [record for other, record in swarm.items() if other != peer]
            swarm[peer] = replace(swarm[peer], span=reconsider(others, swarm[peer], (), now=NOW))
    alone: list[ServerRecord] = []
    for peer in sorted(swarm):
        alone.append(record(peer, span=choose_span(alone, 12, count, now=NOW), state="joining", decode_tokens_s=0.0))
    assert sorted(strength(list(swarm.values()))) == sorted(strength(alone))


def test_of_two_that_chose_the_same_blocks_one_stays(record: Build, now: float) -> None:
    a, b = (record(peer, span=(0, 6), state="joining", decode_tokens_s=0.0) for peer in "AB")
    assert reconsider([b], a, (), now=now) == (0, 6)
    assert reconsider([a], b, (), now=now) == (6, 12)
    assert reconsider([b], a, ["B"], now=now) == (6, 12), "B was there before, and may not have heard of A"


# ---- moving


def movable(record: Build, peer: str, span: tuple[int, int], rate: float = 10.0, **changes: object) -> ServerRecord:
    return record(peer, span=span, decode_tokens_s=rate, num_blocks=12, **({"movable": True} | changes))


def first_move(servers: Sequence[ServerRecord], **options: object) -> tuple[str, tuple[int, int]] | None:
    """Whose turn it is, and where to: all servers say the same."""
    answers = [find_moves([other for other in servers if other is not own], own, now=NOW, **options) for own in servers]  # type: ignore[arg-type]
    assert all(answer == answers[0] for answer in answers)
    return (answers[0][0].peer_id, answers[0][0].span) if answers[0] else None


def test_one_of_two_that_hold_the_same_fills_a_hole(record: Build, now: float) -> None:
    servers = [movable(record, peer, span) for peer, span in (("A", (0, 6)), ("B", (0, 6)), ("C", (8, 12)))]
    move = find_moves(servers[1:], servers[0], now=now)[0]
    assert move.peer_id == "A" and move.fills and move.span[0] <= 6 and move.span[1] >= 8
    assert move.strength == (0, 10 * SCALE)
    assert first_move(servers) == ("A", move.span)
    assert first_move(servers, idle=["A"]) == ("B", move.span), "who does not go when it is its turn is not counted on"


def test_whoever_alone_holds_a_block_stays(record: Build) -> None:
    servers = [movable(record, "A", (0, 6)), movable(record, "B", (0, 6), 1.0), movable(record, "C", (6, 9)), movable(record, "D", (9, 12))]
    assert first_move(servers[1:]) is None, "it would fill no hole"
    move = first_move([*servers, movable(record, "E", (0, 6)), movable(record, "F", (0, 6))])
    assert move is not None and move[0] in "ABEF"


def test_blocks_that_a_mover_keeps_are_out_while_it_loads(record: Build, now: float) -> None:
    """So it may shift by a few blocks where a hole is filled, since nobody can use the model before, and for nothing less."""
    a, b = movable(record, "A", (4, 10)), movable(record, "B", (0, 6))
    assert first_move([a, b]) == ("A", (6, 12))
    assert may_leave([b], a, Move("A", (6, 12), True, (0, 1)), now=now)
    assert not may_leave([b], a, Move("A", (6, 12), False, (1, 2)), now=now)
    assert first_move([a, b, movable(record, "C", (10, 12), 0.1)]) is None


def test_nobody_moves_whose_owner_chose_the_blocks(record: Build) -> None:
    servers = [movable(record, "A", (0, 6), movable=False), movable(record, "B", (0, 6))]
    assert first_move(servers) == ("B", (6, 12))
    assert first_move([replace(server, movable=False) for server in servers]) is None


def test_a_gain_below_the_margin_moves_nobody(record: Build) -> None:
    """Eleven servers on one half and nine on the other: ten and ten would be better, by less than it costs."""
    assert first_move([movable(record, peer, (0, 6) if index < 11 else (6, 12)) for index, peer in enumerate(PEERS[:20])]) is None
    assert first_move([movable(record, peer, (0, 6) if index < 12 else (6, 12)) for index, peer in enumerate(PEERS[:20])]) is not None


def test_nobody_begins_while_another_drains_and_those_that_load_count(record: Build) -> None:
    a, b = movable(record, "A", (0, 6)), movable(record, "B", (0, 6))
    assert find_moves([b], a, now=NOW)
    assert not find_moves([b, movable(record, "C", (0, 6), state="draining")], a, now=NOW)
    assert not find_moves([b, movable(record, "C", (6, 12), state="joining")], a, now=NOW)


GO = Move("A", (6, 12), False, (1, 2))


def test_a_move_that_only_makes_way_for_one_that_fills_a_hole_says_so(record: Build) -> None:
    """Nobody gets a token through the model as it is, so there is nothing by how many times it would be stronger."""
    fixed = {"movable": False}
    servers = [movable(record, "A", (0, 4), 60.0), movable(record, "B", (4, 8), 20.0, **fixed), movable(record, "C", (1, 7), 20.0)]
    servers += [movable(record, "D", (1, 3), 20.0), movable(record, "E", (5, 11), 10.0, **fixed)]
    move = find_moves(servers[1:], servers[0], now=NOW)[0]
    assert (move.peer_id, move.fills, move.strength[0]) == ("C", False, 0)
    assert move.why == "that lets others go where nobody serves some blocks"
    assert Move("A", (0, 4), True, (0, 10)).why == "nobody serves some of them"
    assert Move("A", (0, 4), False, (10, 15)).why == "the weakest block would get 1.5 times as strong"


def test_other_weights_do_not_stand_in(record: Build, now: float) -> None:
    mine, theirs = ("ab" * 16,) * 6, ("cd" * 16,) * 6
    own = movable(record, "A", (0, 6), block_digests=mine)
    assert may_leave([movable(record, "B", (0, 6), block_digests=mine)], own, GO, now=now)
    assert not may_leave([movable(record, "B", (0, 6), block_digests=theirs)], own, GO, now=now)
    assert not find_moves([movable(record, "B", (0, 6), block_digests=theirs)], own, now=now)


def test_a_mover_leaves_only_what_others_have_online(record: Build, now: float) -> None:
    own = movable(record, "B", (0, 6))
    for state in ("joining", "draining", "left"):
        assert not may_leave([movable(record, "A", (0, 6), state=state)], own, GO, now=now)
    parts = [movable(record, "A", (0, 3)), movable(record, "C", (3, 8))]
    assert may_leave(parts, own, GO, now=now)
    assert not may_leave(parts[:1], own, GO, now=now)
    assert not may_leave(parts, own, GO, now=now + 1000)
    assert not may_leave([own], own, GO, now=now)


def test_of_two_that_drain_the_one_with_the_smaller_peer_id_goes(record: Build, now: float) -> None:
    a, b = (movable(record, peer, (0, 6), state="draining") for peer in "AB")
    assert yields_to([a], b, now=now) and not yields_to([b], a, now=now)
    elsewhere = movable(record, "A", (6, 12), state="draining")
    assert yields_to([elsewhere], b, now=now), "both might go to the same place"
    many = [movable(record, peer, (0, 12)) for peer in PEERS] + [movable(record, f"Q{peer}", (0, 12)) for peer in PEERS]
    assert not yields_to([elsewhere, *many], b, now=now), "in a large swarm more than one may"


def settle_down(servers: list[ServerRecord]) -> int:
    """Let whoever's turn it is go, until nobody goes; returns how many went."""
    for moves in range(10 * len(servers)):
        move = first_move(servers)
        if move is None:
            return moves
        index = next(index for index, server in enumerate(servers) if server.peer_id == move[0])
        others = [*servers[:index], *servers[index + 1 :]]
        before = strength(servers)
        left = strength(others)
        opened = [block for block in range(12) if before[block] and not left[block]]
        assert not opened or (0 in before and all(move[1][0] <= block < move[1][1] for block in opened)), "a hole was opened"
        servers[index] = replace(servers[index], span=move[1])
        after = strength(servers)
        assert (-after.count(0), min(after)) >= (-before.count(0), min(before))
    pytest.fail("they go on and on")


servers_anywhere = st.lists(
    st.tuples(st.integers(1, 12), st.floats(0, 1), st.sampled_from([0.5, 1, 2, 5, 20, 1e9])), min_size=1, max_size=8
)


@settings(max_examples=60)
@given(servers_anywhere)
def test_moves_open_no_hole_and_end(record: Build, swarm) -> None:
    servers = []
    for peer, (length, where, rate) in zip(PEERS, swarm, strict=False):
        first = round(where * (12 - length))
        servers.append(movable(record, peer, (first, first + length), rate))
    assert settle_down(servers) <= 2 * len(servers)


def test_servers_that_all_hold_the_same_end_up_balanced(record: Build) -> None:
    servers = [movable(record, peer, (0, 4)) for peer in PEERS[:20]]
    assert settle_down(servers) <= 20
    assert min(strength(servers)) >= 10 * SCALE * 20 / 3 / 1.2
