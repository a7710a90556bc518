"""`petalnet peers`, against nodes that are only a socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

from petalnet.cli import run
from petalnet.cli.peers import (
    describe_age,
    describe_bytes,
    describe_engine,
    describe_links,
    describe_path,
    describe_recovery,
    describe_weights,
)
from petalnet.inspection import serve_inspection

PEER = {
    "peer_id": "12D3KooWRyoDGGEaWkXLRD5VMkEaMrxCqNQw9fbWxwVa9R3oWBVy", "public_name": "[red]box", "model": "demo", "span": [0, 6],
    "addr": "/ip4/203.0.113.7/tcp/31330", "direction": "out", "path": "direct", "relay": None, "round_trip_s": 0.0423,
    "bytes_in": 12_345_678, "bytes_out": 999, "streams": 3, "muxer": "/petalnet/mux/1.0.0", "since": 0.0,
}  # fmt: skip
STRANGER = PEER | {
    "peer_id": "12D3KooWStranger", "public_name": None, "model": None, "span": None, "direction": "in", "path": "relay",
    "relay": "12D3KooWRelay123456", "round_trip_s": None,
}  # fmt: skip
NODE = {"role": "server", "peer_id": "12D3KooWMe", "pid": 4711, "public_name": "cellar", "swarm_key": "0a1b2c3d", "peers": [PEER, STRANGER]}


@pytest.fixture
def node(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], None]]:
    """`node(report)` runs a node's socket on another thread until the test is over."""
    monkeypatch.setenv("PETALNET_STATE_DIR", str(tmp_path))
    ended: list[Callable[[], None]] = []

    def start(report: dict[str, Any]) -> None:
        running = threading.Event()

        async def serve() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_inspection, lambda: report)
                token = trio.lowlevel.current_trio_token()
                ended.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
                running.set()

        thread = threading.Thread(target=trio.run, args=(serve,))
        thread.start()
        ended.append(thread.join)
        running.wait(10)

    try:
        yield start
    finally:
        for end in sorted(ended, key=lambda end: getattr(end, "__name__", "") == "join"):
            end()


def test_without_a_node_it_says_so_in_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PETALNET_STATE_DIR", str(tmp_path))
    for arguments in (["peers"], ["peers", "--json"]):
        assert run(arguments) == 1
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "you run no node on this machine" in said.err and not said.out


def test_a_table_for_a_person(node, capsys: pytest.CaptureFixture[str]) -> None:
    node(NODE)
    assert run(["peers"]) == 0
    said = capsys.readouterr().out
    assert "server cellar 12D3KooWMe, pid 4711, private swarm (key 0a1b2c3d): 2 peers" in said
    for text in ("[red]box …3oWBVy", "0:6 of demo", "to 203.0.113.7:31330", "42.3 ms", "12.3 MB", "999 B"):
        assert text in said
    assert "from relay …123456" in said
    assert len(said.splitlines()) == 4


def test_the_same_as_json(node, capsys: pytest.CaptureFixture[str]) -> None:
    node(NODE)
    assert run(["peers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": [NODE]}


def test_a_node_without_peers(node, capsys: pytest.CaptureFixture[str]) -> None:
    node(NODE | {"peers": [], "swarm_key": None, "public_name": None})
    assert run(["peers"]) == 0
    assert capsys.readouterr().out == "server 12D3KooWMe, pid 4711: 0 peers\n"


def test_a_server_and_what_it_computes(node, capsys: pytest.CaptureFixture[str]) -> None:
    engine = {
        "sessions": 3, "waiting": 2, "expected_wait_s": 0.1, "kv_tokens": {"all": 4096, "free": 1024, "kept": 640},
        "last_minute": {"rounds": 50, "seconds": 3.0, "tokens": 160, "tasks": 120}, "loop_delay_s": {"median": 0.00012, "worst": 0.0051},
    }  # fmt: skip
    node(NODE | {"peers": [], "engine": engine})
    assert run(["peers"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        "3 sessions, 2 waiting; 1024 of 4096 KV tokens free, 640 kept of earlier prompts; in the last minute 50 rounds of 3.2 tokens and "
        "60 ms; network loop late by 0.1 ms, 5.1 at most"
    ]
    idle = engine | {"sessions": 1, "last_minute": dict.fromkeys(("rounds", "seconds", "tokens", "tasks"), 0)}
    assert describe_engine(idle).startswith("1 session, 2 waiting") and "0 rounds of 0.0 tokens and 0 ms" in describe_engine(idle)


def test_what_a_server_sent_to_the_next_ones() -> None:
    """One that never did says nothing of it."""
    links = {"open": 2, "pushed_steps": 41, "relayed_steps": 3, "pushed_bytes": 12_345_678, "failed": 1}
    said = describe_links({"links": links, "kept_outputs_bytes": 4_200_000})
    assert said == (
        "41 outputs (12.3 MB) went straight to next servers, 3 through clients; 2 links open, 1 failed so far; "
        "room of 4.2 MB for outputs that were sent"
    )
    assert describe_links({"links": links | {"failed": 0, "open": 1}}).endswith("3 through clients; 1 link open")
    assert describe_links({"links": dict.fromkeys(links, 0), "kept_outputs_bytes": 4_200_000}) == describe_links({}) == ""


def test_what_a_server_did_for_chains_that_lost_another() -> None:
    counts = {"resumed": 3, "replayed_tokens": 512, "rebuilt_tokens": 64}
    said = describe_recovery({"recovery": counts})
    assert said == "of chains that lost a server: 3 times between other neighbours, 512 tokens sent once more, 64 rebuilt"
    assert describe_recovery({"recovery": dict.fromkeys(counts, 0)}) == describe_recovery({}) == ""


def test_words() -> None:
    assert [describe_bytes(count) for count in (0, 999, 1000, 12_345_678, 5 * 10**12)] == ["0 B", "999 B", "1.0 kB", "12.3 MB", "5000.0 GB"]
    assert [describe_age(seconds) for seconds in (-1, 59.4, 200, 7200, 200_000)] == ["0 s", "59 s", "3 min", "2 h", "2 d"]
    assert describe_path(STRANGER | {"relay": None}) == "from relay …?"
    assert describe_path(PEER | {"addr": "/ip6/::1/tcp/5"}) == "to [::1]:5"


def test_what_went_to_others_and_came_from_them_of_weights() -> None:
    weights = {"shares": True, "blocks_shared": 6, "bytes_served": 99_381_248, "chunks_served": 24, "bytes_fetched": 0, "fetched_from": {}}
    assert describe_weights({}) == "" == describe_weights(weights | {"shares": False})
    assert describe_weights(weights) == "shares weights of 6 blocks, 99.4 MB given so far"
    fetched = {"shares": False, "bytes_fetched": 2_500_000, "fetched_from": {"A": 1, "B": 2_499_999}}
    assert describe_weights(weights | fetched) == "2.5 MB of weights came from 2 servers"
