"""A node finds its swarm again by the peers that it knew, though its entries are gone."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from petalnet.errors import PeerUnreachable
from petalnet.p2p import discovery
from petalnet.p2p.identity import Identity
from petalnet.p2p.known_peers import KnownPeers
from petalnet.peering import Peering, open_peering
from petalnet.remembering import MOST_BYTES, PeerFile

LISTEN = ["/ip4/127.0.0.1/tcp/0"]
GONE = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
ENTRY: dict[str, Any] = {"peer_id": Identity.generate().peer_id, "addrs": ["/ip4/10.0.0.1/tcp/31330"], "seen": time.time(), "dialled": True}


async def wait_for(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  (there is no sign of it)
            await trio.sleep(0.01)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "MAINTAIN_EVERY_S", 0.1)


class Members:
    """Starts and stops members of a swarm."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._running: dict[str, tuple[trio.CancelScope, trio.Event]] = {}

    async def start(self, *peers: str, known: KnownPeers | None = None) -> Peering:
        peering: Peering = await self._nursery.start(self._run, peers, known)
        return peering

    async def stop(self, peering: Peering) -> None:
        scope, over = self._running[peering.host.peer_id]
        scope.cancel()
        await over.wait()

    async def _run(self, peers: Sequence[str], known: KnownPeers | None, *, task_status: trio.TaskStatus[Peering]) -> None:
        over = trio.Event()
        with trio.CancelScope() as scope:
            async with open_peering(Identity.generate(), initial_peers=peers, listen=LISTEN, server=True, known=known) as peering:
                self._running[peering.host.peer_id] = scope, over
                task_status.started(peering)
                await trio.sleep_forever()
        over.set()


@pytest.fixture
def members(nursery: trio.Nursery) -> Members:
    return Members(nursery)


@pytest.mark.parametrize("founder", [False, True])
async def test_a_server_that_restarts_finds_the_swarm_without_its_entry(
    members: Members, tmp_path: Path, founder: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the one that began the swarm and was never told any entry."""
    caplog.set_level(logging.INFO, "petalnet")
    key = tmp_path / "server.key"
    entry = await members.start()
    entries = [] if founder else entry.host.addrs
    file = PeerFile(key, entries, None)
    server = await members.start(*entries, known=file.known)
    other = await members.start(*server.host.addrs, *entry.host.addrs)
    await wait_for(lambda: any(peer.peer_id == other.host.peer_id for peer in file.known.peers(9)))
    file.store()
    await members.stop(server)
    await members.stop(entry)
    again = PeerFile(key, entries, None)
    again.load()
    server = await members.start(*entries, known=again.known)
    assert server.host.is_connected(other.host.peer_id)
    assert "the swarm was found again through a peer that was remembered" in caplog.text
    assert ("none of the initial peers answers; " in caplog.text) == (not founder)


async def test_who_loses_all_connections_and_its_entry_finds_back(members: Members) -> None:
    """As after an hour without a line: nobody is in the routing table any more."""
    entry = await members.start()
    one, other = await members.start(*entry.host.addrs), await members.start(*entry.host.addrs)
    pair = {one.host.peer_id, other.host.peer_id}
    await wait_for(lambda: bool({peer.peer_id for either in (one, other) for peer in either.discovery.known.peers(9)} & pair))
    await members.stop(entry)
    await one.host.disconnect(other.host.peer_id)
    await wait_for(lambda: one.host.is_connected(other.host.peer_id))


async def test_a_newcomer_without_a_living_entry_is_told_so() -> None:
    refused = rf"no swarm was reached: none of the initial peers answered \({GONE}\); any running node of the swarm will do"
    with pytest.RaisesGroup(pytest.RaisesExc(PeerUnreachable, match=refused), flatten_subgroups=True):
        async with open_peering(Identity.generate(), initial_peers=[GONE], listen=(), server=False):
            pass


def test_what_is_remembered_is_of_one_swarm(tmp_path: Path) -> None:
    path = tmp_path / "a.key"

    def remembered(initial_peers: list[str], swarm_key: str | None) -> int:
        file = PeerFile(path, initial_peers, swarm_key)
        file.load()
        return len(file.known)

    file = PeerFile(path, ["A", "B"], "0a1b2c3d")
    file.known.load([ENTRY], now=ENTRY["seen"])
    file.store()
    assert remembered(["B", "C"], "0a1b2c3d") == 1
    assert remembered(["C"], "0a1b2c3d") == remembered([], "0a1b2c3d") == remembered(["A"], None) == remembered(["A"], "ffffffff") == 0


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * MOST_BYTES, b'{"initial_peers": [], "swarm_key": null, "peers": 7}']
)
def test_a_file_that_is_broken_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.peers").write_bytes(content)
    file = PeerFile(tmp_path / "a.key", [], None)
    file.load()
    assert not len(file.known)


def test_a_full_disk_is_told_once_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = PeerFile(tmp_path / "a.key", [], None)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    dump = json.dump
    monkeypatch.setattr(json, "dump", full)
    file.store()
    file.store()
    (warning,) = caplog.records
    assert "cannot be remembered" in warning.getMessage() and "No space left on device" in warning.getMessage()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(json, "dump", dump)
    file.store()
    assert (tmp_path / "a.peers").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["box", "box.peers", "box.one", "box.key"])
def test_the_file_is_never_that_of_the_key(tmp_path: Path, name: str) -> None:
    assert PeerFile(tmp_path / name, [], None).path not in {tmp_path / other for other in ("box", "box.key", name)}
