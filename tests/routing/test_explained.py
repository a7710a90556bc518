"""What is told of a route adds up, and why others lose is what they lose by."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from petalnet.routing.expected import Client
from petalnet.routing.explained import explain
from petalnet.routing.observed import Observed
from petalnet.routing.records import ServerRecord

Build = Callable[..., ServerRecord]
X, Y = "aa" * 16, "bb" * 16


def test_the_parts_make_up_the_whole_and_each_way_says_from_what_it_is_known(record: Build, now: float) -> None:
    trips = {"A": 0.080, "B": 0.081, "C": 0.079}
    servers = [
        record("A", (0, 4), next_round_trips=(("B", 0.002),)),
        record("B", (4, 8), queue=2),
        record("C", (8, 10)),
        record("D", (10, 12), addrs=("/ip4/9.9.9.9/tcp/1",)),
    ]
    found = explain(servers, 0, 12, Client(round_trip=trips.get), now=now)
    assert found["seconds"] == pytest.approx(sum(found[part] for part in ("way_s", "handling_s", "queue_s", "compute_s")))
    assert found["way_s"] == pytest.approx(sum(hop["way_s"] for hop in found["hops"]) + found["way_back_s"])
    assert [hop["way"] for hop in found["hops"]] == [
        "measured",
        "measured by them",
        "at most, through the client",
        "at most, through the client",
    ]
    assert [hop["round_trip_s"] for hop in found["hops"]] == [0.080, 0.081, 0.079, None]
    assert found["hops"][1]["queue_s"] > 0 and found["hops"][1]["queue"] == 2
    assert found["runners_up"] == [] and found["left_out"] == []


def test_why_others_lose_and_who_was_left_out(record: Build, now: float) -> None:
    observed = Observed()
    slow = record("B", (0, 4), decode_tokens_s=1e6)
    for _ in range(40):
        observed.note(slow, tokens=1, blocks=4, compute_s=0.4, queue_s=0.0, now=0.0)
    trips = {"A": 0.001, "B": 0.001, "C": 0.051, "D": 0.001, "E": 0.001}
    servers = [
        record("A", (0, 4), free_kv_tokens=900, block_digests=(X,) * 4),
        slow,
        record("C", (0, 4), free_kv_tokens=900, block_digests=(X,) * 4),
        record("D", (0, 4), decode_tokens_s=1000.0),
        record("E", (0, 4), free_kv_tokens=900, block_digests=(Y,) * 4),
    ]
    slow_too = [known for known in servers if known.peer_id != "B"] + [record("B", (0, 4), decode_tokens_s=1e6, free_kv_tokens=900)]
    client = Client(round_trip=trips.get, doubtful={"D"}, observed=observed)
    found = explain(slow_too, 0, 4, client, now=now, kv_tokens=500)
    assert [hop["peer_id"] for hop in found["hops"]] == ["A"] and found["hops"][0]["rate"] == "announced"
    assert found["runners_up"][0]["loses"] == "+50.0 ms on the way" and found["runners_up"][0]["hops"][0]["peer_id"] == "C"
    assert {server["peer_id"]: server["why"] for server in found["left_out"]} == {
        "D": "failed or was late a moment ago, and was not seen to work since",
        "E": "other weights than the rest of the route",
    }
    found = explain([slow], 0, 4, client, now=now, kv_tokens=500)
    assert found["hops"][0]["rate"] == "corrected" and found["hops"][0]["announced_compute_s"] == pytest.approx(1e-6)
    assert found["hops"][0]["compute_s"] > 0.2 and found["hops"][0]["notes"] == ["too little room, nobody else holds some block"]


def test_of_equal_routes_it_says_that_they_are_equal(record: Build, now: float) -> None:
    client = Client(round_trip=lambda peer_id: 0.001)
    found = explain([record("A", (0, 4)), record("B", (0, 4))], 0, 4, client, now=now)
    assert found["runners_up"][0]["loses"] == "as quick; the first by name is taken"
    own = Client(round_trip=lambda peer_id: 0.001, own={"B"})
    found = explain([record("A", (0, 4), decode_tokens_s=12.0), record("B", (0, 4))], 0, 4, own, now=now)
    assert found["hops"][0]["own"] and found["runners_up"][0]["loses"].startswith("servers on this machine go first, -")
