from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.errors import MissingBlocksError, RecordRejected
from petalnet.routing import routes
from petalnet.routing.expected import Client, Expected
from petalnet.routing.records import ServerRecord
from petalnet.routing.routes import SPREAD, Hop, choose, find_route

Build = Callable[..., ServerRecord]

X, Y = "aa" * 16, "bb" * 16


def near(peer_id: str) -> float | None:
    return 0.001


def spans(hops: list[Hop]) -> list[tuple[str, int, int]]:
    return [(hop.peer_id, hop.first, hop.end) for hop in hops]


def test_one_server_for_all_is_one_hop_with_its_addresses(record: Build, now: float) -> None:
    assert find_route([record("A", span=(0, 12))], 0, 12, Client(round_trip=near), now=now) == [
        Hop("A", ("/ip4/127.0.0.1/tcp/4001/p2p/A",), 0, 12)
    ]
    assert spans(find_route([record("A", span=(0, 12))], 3, 5, Client(round_trip=near), now=now)) == [("A", 3, 5)]


def test_fewest_hops_where_rates_are_equal(record: Build, now: float) -> None:
    # Each takes the same time for a block, whatever its span.
    servers = [
        record(peer, span=span, decode_tokens_s=100 / (span[1] - span[0]))
        for peer, span in [("A", (0, 4)), ("B", (4, 8)), ("C", (8, 12)), ("D", (0, 6)), ("E", (6, 12))]
    ]
    assert spans(find_route(servers, 0, 12, Client(round_trip=near), now=now)) == [("D", 0, 6), ("E", 6, 12)]


def test_near_measured_idle_and_fast_servers_are_preferred(record: Build, now: float) -> None:
    plain = record("A")
    assert spans(find_route([plain, record("B")], 0, 4, Client(round_trip={"A": 0.05, "B": 0.01}.get), now=now)) == [("B", 0, 4)]
    assert spans(find_route([plain, record("B")], 0, 4, Client(round_trip={"B": 0.02}.get), now=now)) == [("B", 0, 4)]
    assert spans(find_route([record("A", queue=2), record("B")], 0, 4, Client(round_trip=near), now=now)) == [("B", 0, 4)]
    assert spans(find_route([plain, record("B", decode_tokens_s=20.0)], 0, 4, Client(round_trip=near), now=now)) == [("B", 0, 4)]
    assert spans(
        find_route([record("A", decode_tokens_s=0.0), record("B", decode_tokens_s=30.0)], 0, 4, Client(round_trip=near), now=now)
    ) == [("B", 0, 4)]


@pytest.mark.parametrize(("rate", "queue"), [(5e-324, 0), (1e-308, 10**6)])
def test_no_rate_that_a_record_may_announce_breaks_routing(record: Build, now: float, rate: float, queue: int) -> None:
    odd = record("B", decode_tokens_s=rate, queue=queue)
    assert spans(find_route([record("A"), odd], 0, 4, Client(round_trip=near), now=now)) == [("A", 0, 4)]
    assert spans(find_route([odd], 0, 4, Client(round_trip=near), now=now, tokens=1 << 24, rng=Random(0))) == [("B", 0, 4)]


def test_a_hop_knows_how_long_its_blocks_take(record: Build, now: float) -> None:
    servers = [record("A", span=(0, 8), decode_tokens_s=10.0, prefill_tokens_s=400.0), record("B", span=(8, 12), decode_tokens_s=0.0)]
    first, second = find_route(servers, 4, 12, Client(round_trip=near), now=now)
    assert (first.decode_s, first.prefill_s) == pytest.approx((0.05, 0.00125))  # half of A's blocks
    assert second.decode_s == 0.0 and second.prefill_s == pytest.approx(0.01)
    assert first == Hop("A", first.addrs, 4, 8) and len({first, Hop("A", first.addrs, 4, 8)}) == 1


def test_the_kind_of_work_decides_which_rate_counts(record: Build, now: float) -> None:
    servers = [record("A", decode_tokens_s=50.0, forward_tokens_s=100.0), record("B", decode_tokens_s=40.0, forward_tokens_s=900.0)]
    assert spans(find_route(servers, 0, 4, Client(round_trip=near), now=now)) == [("A", 0, 4)]
    assert spans(find_route(servers, 0, 4, Client(round_trip=near), now=now, work="forward", tokens=64)) == [("B", 0, 4)]


def test_missing_blocks_are_named_with_who_was_considered(record: Build, now: float) -> None:
    servers = [record("A", span=(0, 4)), record("B", span=(6, 9)), record("C", span=(4, 12), issued=now - 60, expires=now)]
    with pytest.raises(MissingBlocksError) as caught:
        find_route(servers, 0, 12, Client(round_trip=near), now=now)
    assert caught.value.blocks == [4, 5, 9, 10, 11] and caught.value.peers_asked == ["A", "B"]
    with pytest.raises(MissingBlocksError) as caught:
        find_route([], 0, 2, Client(round_trip=near), now=now)
    assert caught.value.blocks == [0, 1]


@pytest.mark.parametrize(("first", "end", "tokens"), [(3, 3, 1), (4, 3, 1), (-1, 3, 1), (0, 3, 0)])
def test_an_empty_request_is_the_callers_mistake(record: Build, now: float, first: int, end: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="no route leads"):
        find_route([record("A")], first, end, Client(round_trip=near), now=now, tokens=tokens)


def test_of_two_records_of_one_server_the_newer_counts(record: Build, now: float) -> None:
    old, new = record("A", span=(0, 12)), record("A", span=(4, 8), sequence=2)
    with pytest.raises(MissingBlocksError):
        find_route([new, old], 0, 12, Client(round_trip=near), now=now)


def test_a_route_does_not_lead_from_one_fine_tune_into_another(record: Build, now: float) -> None:
    whole = record("A", span=(0, 12), block_digests=(X,) * 12, decode_tokens_s=1.0)
    first = record("B", span=(0, 6), block_digests=(X,) * 6)
    other = record("C", span=(6, 12), block_digests=(Y,) * 6, decode_tokens_s=900.0)
    assert spans(find_route([whole, first, other], 0, 12, Client(round_trip=near), now=now)) == [("B", 0, 6), ("A", 6, 12)]
    halves = [first, other, record("D", span=(6, 12), block_digests=(X,) * 6)]
    with pytest.raises(MissingBlocksError, match="other weights"):
        find_route([*halves, record("E", span=(0, 6), block_digests=(Y,) * 6)], 0, 12, Client(round_trip=near), now=now)
    asked_for = {block: Y for block in range(12)}
    servers = [*halves, record("E", span=(0, 6), block_digests=(Y,) * 6)]
    assert spans(find_route(servers, 0, 12, Client(round_trip=near), now=now, expected=asked_for)) == [("E", 0, 6), ("C", 6, 12)]
    with pytest.raises(MissingBlocksError) as caught:
        find_route(halves, 0, 12, Client(round_trip=near), now=now, expected=asked_for)
    assert caught.value.blocks == [0, 1, 2, 3, 4, 5]


# A swarm of at most 5 servers of a model of 6 blocks; digests None: not announced. Then seconds to other servers, and free KV tokens.
swarms = st.lists(
    st.tuples(
        st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda span: span[0] < span[1]),
        st.sampled_from([0.0, 5.0, 10.0, 20.0, 500.0, 1e9]),
        st.sampled_from([None, 0.0, 0.01, 0.05, 1e6]),
        st.integers(0, 2),
        st.sampled_from([None, "X", "Y", "XY"]),
        st.dictionaries(st.sampled_from("ABCDE"), st.sampled_from([0.0, 0.001, 0.03, 0.5, 3600.0]), max_size=4),
        st.sampled_from([0, 100]),
    ),
    max_size=5,
)


def build(record: Build, swarm: list[tuple[tuple[int, int], float, float | None, int, str | None]], *, digests: bool):
    records, trips = [], {}
    for (span, rate, trip, queue, version, others, free), peer in zip(swarm, "ABCDE", strict=False):
        # "XY" is a fine-tune that shares the first three blocks with X.
        bytes_of = {"X": X, "Y": Y, None: ""}.get(version, "")
        listed = [(X if block < 3 else Y) if version == "XY" else bytes_of for block in range(*span)] if digests and version else []
        records.append(
            record(
                peer, span=span, num_blocks=6, decode_tokens_s=rate, forward_tokens_s=rate, queue=queue, block_digests=tuple(listed),
                next_round_trips=tuple(others.items()), free_kv_tokens=free,
            )
        )  # fmt: skip
        if trip is not None:
            trips[peer] = trip
    return records, trips.get


def all_chains(records: list[ServerRecord], first: int, end: int) -> Iterator[list[Hop]]:
    if first == end:
        yield []
        return
    for record in records:
        if record.holds(first):
            for stop in range(first + 1, min(record.span[1], end) + 1):
                for rest in all_chains(records, stop, end):
                    yield [Hop(record.peer_id, record.addrs, first, stop), *rest]


some_peers = st.sets(st.sampled_from("ABCDE"), max_size=2)


@settings(max_examples=300)
@given(swarms, st.integers(0, 5), st.integers(1, 6), st.booleans(), some_peers, some_peers, st.sampled_from([0, 50]))
def test_the_route_is_the_best_of_all(
    record: Build, swarm, first: int, end: int, direct: bool, own: set[str], doubtful: set[str], kv_tokens: int
) -> None:
    if first >= end:
        return
    records, round_trip = build(record, swarm, digests=False)
    cut = {("A", "B"), ("C", "A")}
    client = Client(round_trip=round_trip, direct=direct, own=own, doubtful=doubtful, cut=cut)
    chains = list(all_chains(records, first, end))
    if not chains:
        with pytest.raises(MissingBlocksError):
            find_route(records, first, end, client, now=1_800_000_000.0, kv_tokens=kv_tokens)
        return
    expected = Expected(records, client)
    shunned = doubtful | {known.peer_id for known in records if known.free_kv_tokens < kv_tokens}

    def rank(hops: list[Hop]) -> tuple[int, int, int, list[tuple[int, str]]]:
        chain = [(hop.first, hop.peer_id) for hop in hops]
        return sum(hop.peer_id in shunned for hop in hops), expected.route_ns(chain, end), len(hops), chain

    route = find_route(records, first, end, client, now=1_800_000_000.0, kv_tokens=kv_tokens)
    assert rank(route) == min(rank(chain) for chain in chains)


@given(swarms, st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_matter(record: Build, swarm, random: Random) -> None:
    records, round_trip = build(record, swarm, digests=True)

    def outcome(records: list[ServerRecord]) -> object:
        try:
            return find_route(records, 0, 6, Client(round_trip=round_trip), now=1_800_000_000.0)
        except MissingBlocksError as error:
            return error.blocks

    shuffled = records[:]
    random.shuffle(shuffled)
    assert outcome(records) == outcome(shuffled)


@given(swarms, st.integers(0, 1000))
def test_every_route_is_a_chain_of_one_version(record: Build, swarm, seed: int) -> None:
    records, round_trip = build(record, swarm, digests=True)
    by_peer = {known.peer_id: known for known in records}
    try:
        route = find_route(records, 0, 6, Client(round_trip=round_trip), now=1_800_000_000.0, rng=Random(seed))
    except MissingBlocksError as error:
        assert error.blocks
        return
    assert [hop.first for hop in route] + [6] == [0] + [hop.end for hop in route]
    assert all(by_peer[hop.peer_id].span[0] <= hop.first < hop.end <= by_peer[hop.peer_id].span[1] for hop in route)
    for one, other in itertools.combinations([by_peer[hop.peer_id] for hop in route], 2):
        for block in range(6):
            if one.block_digests and other.block_digests and one.holds(block) and other.holds(block):
                assert one.block_digests[block - one.span[0]] == other.block_digests[block - other.span[0]]


@given(swarms, st.integers(0, 1000))
def test_load_is_spread_within_a_bound(record: Build, swarm, seed: int) -> None:
    records, round_trip = build(record, swarm, digests=False)
    try:
        best = find_route(records, 0, 6, Client(round_trip=round_trip), now=1_800_000_000.0, work="forward")
    except MissingBlocksError:
        return
    spread = find_route(records, 0, 6, Client(round_trip=round_trip), now=1_800_000_000.0, work="forward", rng=Random(seed))
    expected = Expected(records, Client(round_trip=round_trip), work="forward")
    times = [expected.route_ns([(hop.first, hop.peer_id) for hop in route], 6) for route in (best, spread)]
    assert times[0] <= times[1] <= SPREAD * times[0]


def test_equal_servers_share_the_load(record: Build, now: float) -> None:
    servers, rng = [record(peer) for peer in "ABC"], Random(7)
    chosen = [find_route(servers, 0, 4, Client(round_trip=near), now=now, rng=rng)[0].peer_id for _ in range(60)]
    assert all(chosen.count(peer) > 10 for peer in "ABC")


def test_faster_servers_get_more_of_the_load(record: Build, now: float) -> None:
    rates = {"A": 100.0, "B": 60.0, "C": 10.0}
    servers, rng = [record(peer, forward_tokens_s=rate) for peer, rate in rates.items()], Random(7)
    client = Client(round_trip=near)
    chosen = [find_route(servers, 0, 4, client, now=now, work="forward", tokens=512, rng=rng)[0].peer_id for _ in range(400)]
    assert 1.2 < chosen.count("A") / chosen.count("B") < 2.4
    assert chosen.count("C") == 0, "who takes ten times as long is no help"


def test_a_session_goes_where_there_is_room_for_it(record: Build, now: float) -> None:
    quick = record("A", (0, 8), decode_tokens_s=100.0, free_kv_tokens=500)
    slow = [record("B", (0, 4), free_kv_tokens=2000), record("C", (4, 8), free_kv_tokens=2000)]
    client = Client(round_trip=near)
    assert spans(find_route([quick, *slow], 0, 8, client, now=now, kv_tokens=500)) == [("A", 0, 8)]
    assert spans(find_route([quick, *slow], 0, 8, client, now=now, kv_tokens=501)) == [("B", 0, 4), ("C", 4, 8)]
    # Where nobody else holds them, the full server gets its blocks, and no others.
    assert spans(find_route([quick, slow[1]], 0, 8, client, now=now, kv_tokens=501)) == [("A", 0, 8)]
    assert spans(find_route([quick, slow[1], record("D", (0, 3), free_kv_tokens=2000)], 0, 8, client, now=now, kv_tokens=501)) == [
        ("A", 0, 8)
    ]


def test_a_server_in_doubt_is_left_out_where_others_hold_its_blocks(record: Build, now: float) -> None:
    servers = [record("A", (0, 4), decode_tokens_s=100.0), record("B", (0, 4), decode_tokens_s=1.0), record("C", (4, 8))]
    client = Client(round_trip=near, doubtful={"A", "C"})
    assert spans(find_route(servers, 0, 8, client, now=now)) == [("B", 0, 4), ("C", 4, 8)]


def test_whoever_goes_on_with_a_session_has_the_same_bytes_and_the_same_numbers(record: Build, now: float) -> None:
    lost = record("A", (0, 8), block_digests=(X,) * 8)
    client = Client(round_trip=near)
    same = record("B", (0, 8), decode_tokens_s=1.0, block_digests=(X,) * 8)
    others = [
        record("C", (0, 8), block_digests=(Y,) * 8),
        record("D", (0, 8), block_digests=(X,) * 8, dtype="bfloat16"),
        record("E", (0, 8), block_digests=(X,) * 8, quantization="int8"),
        record("F", (0, 8)),
    ]
    assert spans(find_route([*others, same], 0, 8, client, now=now, like=[lost])) == [("B", 0, 8)]
    with pytest.raises(MissingBlocksError) as caught:
        find_route(others, 0, 8, client, now=now, like=[lost])
    assert caught.value.blocks == list(range(8))
    # Of a server that announced no digests nothing more is known.
    assert spans(find_route([record("F", (0, 8))], 0, 8, client, now=now, like=[record("A", (0, 8))])) == [("F", 0, 8)]


def test_two_lost_servers_of_two_dtypes_are_replaced_each_by_its_like(record: Build, now: float) -> None:
    lost = [record("A", (0, 4)), record("B", (4, 8), dtype="bfloat16")]
    servers = [record("C", (0, 8), decode_tokens_s=900.0), record("D", (3, 8), dtype="bfloat16"), record("E", (4, 8), dtype="float16")]
    assert spans(find_route(servers, 0, 8, Client(round_trip=near), now=now, like=lost)) == [("C", 0, 4), ("D", 4, 8)]
    with pytest.raises(MissingBlocksError) as caught:
        find_route(servers[::2], 0, 8, Client(round_trip=near), now=now, like=lost)
    assert caught.value.blocks == [4, 5, 6, 7]


def test_a_server_near_the_one_before_beats_one_near_the_client(record: Build, now: float) -> None:
    """Client and A are 80 ms apart; B stands beside A, C beside the client. From A the token need not come back to go to B."""
    trips = {"A": 0.080, "B": 0.081, "C": 0.002, "D": 0.079}
    servers = [
        record("A", (0, 4), next_round_trips=(("B", 0.001), ("C", 0.080))),
        record("B", (4, 8), next_round_trips=(("D", 0.002),)),
        record("C", (4, 8)),
        record("D", (8, 12)),
    ]
    assert spans(find_route(servers, 0, 12, Client(round_trip=trips.get), now=now)) == [("A", 0, 4), ("B", 4, 8), ("D", 8, 12)]
    # Where each token comes back after each server, or after A since A does not reach B, the one beside the client is better.
    for client in (Client(round_trip=trips.get, direct=False), Client(round_trip=trips.get, cut={("A", "B")})):
        assert spans(find_route(servers, 0, 12, client, now=now)) == [("A", 0, 4), ("C", 4, 8), ("D", 8, 12)]


@pytest.mark.parametrize("count", [60, 200])
def test_in_a_large_swarm_the_shortlist_loses_next_to_nothing(
    record: Build, now: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = Random(count)
    places = {f"P{number + 111111}".replace("0", "z"): (rng.random() * 0.1, rng.random() * 0.1) for number in range(count)}

    def between(one: tuple[float, float], other: tuple[float, float]) -> float:
        return 0.001 + ((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2) ** 0.5

    firsts = {peer: rng.randrange(0, 24) for peer in places}
    servers = []
    for peer, first in firsts.items():
        end = min(first + rng.choice([4, 8, 12]), 24)
        others = sorted((between(places[peer], places[other]), other) for other, start in firsts.items() if start <= end < start + 4)[:16]
        servers.append(
            record(
                peer, (first, end), num_blocks=24, decode_tokens_s=rng.choice([10.0, 30.0, 90.0]),
                next_round_trips=tuple((other, trip) for trip, other in others if other != peer),
            )
        )  # fmt: skip
    servers += [record(f"Q{number}", (12 * number, 12 * number + 12), num_blocks=24) for number in (1,)]
    servers.append(record("R", (0, 24), num_blocks=24, decode_tokens_s=1.0))
    client = Client(round_trip=lambda peer: between(places[peer], (0.0, 0.0)) if peer in places else 0.05)
    listed = choose(servers, 0, 24, client, now=now)
    monkeypatch.setattr(routes, "MOST_AT_A_BLOCK", 10**6)
    exact = choose(servers, 0, 24, client, now=now)
    assert exact.seconds <= listed.seconds <= 1.02 * exact.seconds


def test_a_thousand_servers_are_looked_through_quickly(record: Build, now: float) -> None:
    rng = Random(3)
    names = [f"P{number + 111111}".replace("0", "z") for number in range(1000)]
    servers = []
    for name in names:
        first = rng.randrange(0, 61)
        trips = tuple((other, rng.random() / 10) for other in rng.sample(names, 16) if other != name)
        servers.append(
            record(name, (first, first + 20), num_blocks=80, decode_tokens_s=rng.choice([5.0, 20.0, 60.0]), next_round_trips=trips)
        )
    trip_of = {name: rng.random() / 10 for name in names}
    seconds = []
    for _ in range(3):
        began = time.process_time()
        find_route(servers, 0, 80, Client(round_trip=trip_of.get), now=now)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.3, "30 ms are usual; the rest is for a machine with other things to do"


def test_a_hop_knows_what_its_link_to_the_next_one_carries(record: Build, now: float) -> None:
    first = record("A", (0, 4), next_round_trips=(("C", 0.001), ("B", 0.002)), next_bytes_s=(1e6, 5e6))
    hops = find_route([first, record("B", (4, 8))], 0, 8, Client(round_trip=near), now=now)
    assert [hop.next_bytes_s for hop in hops] == [5e6, 0.0]
    with pytest.raises(RecordRejected, match="2 rates for 1 links"):
        record("A", (0, 4), next_round_trips=(("C", 0.001),), next_bytes_s=(1e6, 5e6))
