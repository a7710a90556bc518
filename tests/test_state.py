"""Files that a node leaves, on a disk that is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from petalnet.config import Settings
from petalnet.errors import UsageError
from petalnet.models.cachedir import load_facts, store_facts
from petalnet.node import Node
from petalnet.p2p.identity import Identity
from petalnet.state import KeptFile, write_json


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Files can be made and nothing can be written into them, until `full_disk.undo()`."""
    monkeypatch.setattr(json, "dump", full)
    monkeypatch.setattr(os, "fsync", full)
    return monkeypatch


def test_at_the_start_it_is_one_line_and_leaves_nothing_behind(tmp_path: Path, full_disk: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot write the identity file .*a.key: No space left on device"):
        Identity.load_or_create(tmp_path / "a.key")
    with pytest.raises(UsageError, match="cannot write .*ready.json: No space left on device"):
        write_json(tmp_path / "ready.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_kept_is_complained_about_once(
    tmp_path: Path, full_disk: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeptFile(tmp_path / "a.json", "nobody finds this node")
    assert not file.write({"number": 1}) and not file.write({"number": 2})
    (entry,) = caplog.records
    assert entry.getMessage() == f"nobody finds this node: cannot write {tmp_path / 'a.json'}: No space left on device"
    full_disk.undo()
    assert file.write({"number": 3}) and json.loads(file.path.read_text()) == {"number": 3}


async def test_a_client_daemon_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setenv("PETALNET_STATE_DIR", str(tmp_path))

    class Peering:
        class host:
            peer_id, addrs = "P", ()

        class view:
            @staticmethod
            def servers(*, now: float) -> list[Any]:
                return []

    daemon = Node(Settings(client=True))
    daemon._peering = Peering()  # type: ignore[assignment]
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon._keep_state)
        await trio.sleep(60)
        assert not (tmp_path / "client.json").exists()
        full_disk.undo()
        monkeypatch.setenv("PETALNET_STATE_DIR", str(tmp_path))
        await trio.sleep(60)
        assert json.loads((tmp_path / "client.json").read_text())["pid"] == os.getpid()
        nursery.cancel_scope.cancel()


def test_what_is_cached_is_found_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALNET_CACHE_DIR", str(tmp_path))
    store_facts("rates", "a", {"decode": 1.0})
    assert load_facts("rates", "a") == {} and list((tmp_path / "rates").iterdir()) == []


def test_a_node_whose_output_goes_to_a_full_disk_is_usable(tmp_path: Path) -> None:
    ready, log = tmp_path / "ready.json", tmp_path / "log"
    environment = os.environ | {"PETALNET_STATE_DIR": str(tmp_path), "PETALNET_CONFIG": str(tmp_path / "none")}
    command = ["node", "--bootstrap", "--new-swarm", "--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--ready-file", str(ready)]
    with open("/dev/full", "w") as nowhere, log.open("w") as said:
        node = subprocess.Popen([sys.executable, "-m", "petalnet", *command], stdout=nowhere, stderr=said, env=environment)
    try:
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        node.send_signal(signal.SIGTERM)
        assert node.wait(20) == 0, log.read_text()
        assert "standard output cannot be written: No space left on device" in log.read_text()
    finally:
        node.kill()
        node.wait()
