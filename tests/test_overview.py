"""The overview of a swarm, as data and as text, for swarms of any shape."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from petalnet.overview import describe_swarm, render, span_bar
from petalnet.routing.records import ServerRecord
from petalnet.routing.swarm import SwarmView

NOW = 1.8e9


def view_of(*spans: tuple[str, int, int, str], num_blocks: int = 8) -> SwarmView:
    view = SwarmView()
    for peer_id, first, end, state in spans:
        record = ServerRecord(
            peer_id=peer_id, addrs=("/ip4/10.0.0.1/tcp/1",),
            model="m" * 64, model_name="org/model", span=(first, end), num_blocks=num_blocks,
            state=state, dtype="bfloat16", sequence=1, issued=NOW - 3, expires=NOW + 60, decode_tokens_s=12.34, free_kv_tokens=1234567,
        )  # fmt: skip
        view.add(record, now=NOW)
    return view


def test_who_serves_what_and_what_is_missing() -> None:
    view = view_of(("B", 4, 6, "online"), ("A", 0, 4, "online"), ("C", 6, 8, "joining"), ("D", 0, 8, "left"))
    view.mark_failed("B", now=NOW)
    (model,) = describe_swarm(view, now=NOW)["models"]
    assert (model["name"], model["num_blocks"], model["missing"]) == ("org/model", 8, [4, 5, 6, 7])
    assert [server["peer_id"] for server in model["servers"]] == ["A", "B", "C"]
    assert [server.get("failed_for_s") for server in model["servers"]] == [None, 5.0, None]
    assert describe_swarm(view, now=NOW, model="other") == {"models": []}
    assert describe_swarm(view, now=NOW, model="m" * 64)["models"] == [model]
    text = render({"models": [model]}, width=200)
    assert text.splitlines()[0] == "org/model: 8 blocks, 3 servers, blocks 4-7 missing"
    assert "failed, avoided for 5 s" in text and "1,234,567" in text and "joining" in text


def test_a_server_behind_a_relay_is_marked() -> None:
    view = view_of(("A", 0, 4, "online"), ("B", 4, 8, "online"))
    record = view.record("B")
    assert record is not None
    addrs = ("/ip4/203.0.113.2/tcp/1/p2p/12D3KooR/p2p-circuit", *record.addrs)
    view.add(dataclasses.replace(record, addrs=addrs, sequence=2), now=NOW)
    (model,) = describe_swarm(view, now=NOW)["models"]
    assert [server["relayed"] for server in model["servers"]] == [False, True]
    assert render({"models": [model]}, width=200).count("online, relayed") == 1


def test_for_which_blocks_an_adapter_is_there() -> None:
    view = view_of(("A", 0, 4, "online"), ("B", 4, 8, "online"), ("C", 4, 6, "joining"))
    for peer_id, adapters in {"A": ("poet@01", "lawyer@02"), "B": ("poet@01",), "C": ("lawyer@02",)}.items():
        record = view.record(peer_id)
        assert record is not None
        view.add(dataclasses.replace(record, adapters=adapters, sequence=2), now=NOW)
    lines = render(describe_swarm(view, now=NOW), width=200).splitlines()
    assert lines[-2:] == ["  adapter lawyer@02: blocks 4-7 missing", "  adapter poet@01: complete"]


def test_an_empty_swarm() -> None:
    assert render(describe_swarm(SwarmView(), now=NOW)) == "no servers"


def test_lines_fit_the_terminal() -> None:
    assert max(map(len, render(describe_swarm(view_of(("A", 0, 8, "online")), now=NOW), width=40).splitlines()[1:])) <= 40


@given(st.data())
def test_a_span_is_drawn_where_it_is(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, 4096))
    first = data.draw(st.integers(0, num_blocks - 1))
    end = data.draw(st.integers(first + 1, num_blocks))
    bar = span_bar(first, end, num_blocks)
    assert len(bar) == min(24, num_blocks) and set(bar) <= {"·", "█"} and "█" in bar
    assert (bar[0] == "█") == (first * len(bar) // num_blocks == 0)
    if num_blocks <= 24:
        assert bar == "·" * first + "█" * (end - first) + "·" * (num_blocks - end)
