"""`petalnet route`, against servers that are only announced."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import trio

from petalnet.cli import run
from petalnet.cli.route import milliseconds, render
from petalnet.p2p.identity import Identity
from petalnet.peering import open_peering
from petalnet.routing.records import ServerRecord, next_sequence

SPANS = {"alice": (0, 6), "bob": (6, 12), "carol": (4, 12), "dave": (0, 3)}
CHANGES = {"bob": {"decode_tokens_s": 5.0}, "carol": {"free_kv_tokens": 100, "decode_tokens_s": 20.0}, "dave": {"state": "draining"}}


def record_of(name: str, peer_id: str, addrs: list[str]) -> ServerRecord:
    now = time.time()
    record = ServerRecord(
        peer_id=peer_id, addrs=tuple(addrs), model="ab" * 32, model_name="tiny", span=SPANS[name], num_blocks=12, state="online",
        dtype="float32", sequence=next_sequence(0, now), issued=now, expires=now + 600, decode_tokens_s=10.0, free_kv_tokens=5000,
        public_name=name,
    )  # fmt: skip
    return replace(record, **CHANGES.get(name, {}))


@pytest.fixture(scope="module")
def swarm() -> Iterator[list[str]]:
    """The addresses of a swarm of servers that compute nothing; dave drains, and there is a second model."""
    addrs: list[str] = []
    ready = threading.Event()
    ended: list[trio.CancelScope] = []

    async def serve(name: str, *, task_status: trio.TaskStatus[None]) -> None:
        async with open_peering(Identity.generate(), initial_peers=addrs[:1], listen=["/ip4/127.0.0.1/tcp/0"], server=True) as peering:
            addrs.extend(peering.host.addrs)
            if name == "other":
                record = replace(record_of("alice", peering.host.peer_id, peering.host.plain_addrs), model="cd" * 32, model_name="other")
            else:
                record = record_of(name, peering.host.peer_id, peering.host.plain_addrs)
            await peering.announce(record)
            task_status.started()
            await trio.sleep_forever()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            ended.append(nursery.cancel_scope)
            token.append(trio.lowlevel.current_trio_token())
            for name in (*SPANS, "other"):
                await nursery.start(serve, name)
            ready.set()

    token: list[trio.lowlevel.TrioToken] = []
    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(20)
        yield addrs
    finally:
        token[0].run_sync_soon(ended[0].cancel)
        thread.join()


@pytest.fixture(autouse=True)
def _no_settings(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALNET_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("PETALNET_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.delenv("PETALNET_INITIAL_PEERS", raising=False)


def test_the_route_and_why(swarm: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {"runners_up": []}
    for _ in range(10):  # on a machine that does much else, a look-up may miss a server whose answer is late
        if not found["runners_up"]:
            assert run(["route", "tiny", "--initial-peers", swarm[0], "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
    assert found["name"] == "tiny" and found["num_blocks"] == 12
    assert [(hop["public_name"], hop["blocks"]) for hop in found["hops"]] == [("alice", [0, 4]), ("carol", [4, 12])]
    first, second = found["hops"]
    assert first["rate"] == "announced" and first["compute_s"] == pytest.approx(0.4 / 6)
    assert 0 < first["round_trip_s"] < 5 and first["way"] == "measured" and second["way"] == "at most, through the client"
    parts = sum(found[part] for part in ("way_s", "handling_s", "queue_s", "compute_s"))
    assert found["seconds"] == pytest.approx(parts)
    (other,) = found["runners_up"]
    assert [hop["public_name"] for hop in other["hops"]] == ["alice", "bob"] and "ms computing" in other["loses"]
    assert [(server["public_name"], server["why"]) for server in found["left_out"]] == [("dave", "draining")]


def test_a_long_session_goes_where_there_is_room(swarm: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["route", "tiny", "--initial-peers", swarm[0], "--tokens", "4000"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].startswith("tiny: 12 blocks, ") and "a token expected" in lines[0]
    assert any(line.split()[:2] == ["6:12", "bob"] for line in lines)
    assert "carol" in shown and "room for 100 KV tokens, 4000 are needed" in shown and "has too little room" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "this swarm serves several models; say which one: tiny, other"),
        (["nothing"], "nobody in this swarm serves nothing"),
        (["other"], "no server holds blocks 6-11"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(
    swarm: list[str], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["route", *arguments, "--initial-peers", swarm[0]]) in (1, 2)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and says in errors


def test_without_a_swarm_or_with_a_wrong_number_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["route"]) == 2
    assert "no swarm to join" in capsys.readouterr().err
    assert run(["route", "--tokens", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_narrow_terminals_get_narrow_lines() -> None:
    hop = {
        "peer_id": "12D3KooWRyoDGGEaWkXLRD5VMkEaMrxCqNQw9fbWxwVa9R3oWBVy", "public_name": "box", "blocks": [0, 12], "way_s": 0.02,
        "way": "measured", "compute_s": 1.5, "rate": "corrected", "announced_compute_s": 0.1, "queue_s": 0.0, "queue": 0,
        "free_kv_tokens": 12345, "own": False, "notes": ["failed or late, nobody else holds some block"],
    }  # fmt: skip
    found = {
        "name": "tiny", "num_blocks": 12, "seconds": 1.541, "way_s": 0.04, "compute_s": 1.5, "queue_s": 0.0, "handling_s": 0.001,
        "way_back_s": 0.02, "hops": [hop], "runners_up": [], "left_out": [],
    }  # fmt: skip
    lines = list(render(found, 60))
    assert max(map(len, lines)) <= 60
    wide = "\n".join(render(found, 200))
    assert "corrected, 100.0 ms announced" in wide and "12,345" in wide and "no other route: each of these servers" in wide
    assert milliseconds(12.34) == "12.3 s" and milliseconds(0.0001) == "0.1 ms"
