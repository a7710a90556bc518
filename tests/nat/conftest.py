"""Real `petalnet` processes on hosts of the lab."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .lab import Lab, why_not

PEER = Path(__file__).with_name("peer.py")
READY_WITHIN_S = 90.0
"""How long a node may take to its ready file: several at once import and load on two busy cores."""


@pytest.fixture(scope="session")
def _lab_is_possible() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(f"the lab of network namespaces {reason}")


@pytest.fixture
def lab(_lab_is_possible: None) -> Iterator[Lab]:
    """An empty lab, taken down after the test whatever happens."""
    with Lab() as lab:
        yield lab


@dataclass
class LabNode:
    """A `petalnet node` on a host of the lab."""

    host: str
    process: subprocess.Popen[bytes]
    ready_file: Path
    log_file: Path
    ready: dict[str, object] = field(default_factory=dict)

    @property
    def peer_id(self) -> str:
        return str(self.ready["peer_id"])

    @property
    def addrs(self) -> list[str]:
        """Those of the ready file, without loopback."""
        return [addr for addr in self.ready["addrs"] if not addr.startswith("/ip4/127.")]  # type: ignore[attr-defined]

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_ready(self) -> LabNode:
        """Block until the node is usable; the test fails with its log where it is not in time."""
        self._wait_until(self.ready_file.exists, "be ready", READY_WITHIN_S)
        self.ready = json.loads(self.ready_file.read_text())
        return self

    def wait_for_log(self, text: str, within_s: float = 30.0) -> None:
        """Block until the node has logged a text."""
        self._wait_until(lambda: text in self.log(), f"log {text!r}", within_s)

    def _wait_until(self, condition: Callable[[], bool], what: str, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if self.process.poll() is not None:
                pytest.fail(f"the node on {self.host} ended with {self.process.returncode}:\n{self.log()}")
            if time.monotonic() > deadline:
                pytest.fail(f"the node on {self.host} did not {what} within {within_s} s:\n{self.log()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)


@dataclass
class LabPeer:
    """A peer of `peer.py` that serves, on a host of the lab."""

    host: str
    process: subprocess.Popen[bytes]
    out_file: Path
    log_file: Path

    def told(self) -> list[dict[str, Any]]:
        """What it has printed so far."""
        return [json.loads(line) for line in self.out_file.read_text().splitlines()]

    @property
    def peer_id(self) -> str:
        return str(self.told()[0]["peer_id"])

    def wait_for_addrs(self, condition: Callable[[list[str]], bool], within_s: float = 30.0) -> list[str]:
        """The addresses (without the peer's id) that it announces, once they fulfil a condition."""
        deadline = time.monotonic() + within_s
        while True:
            addrs = next((line["addrs"] for line in reversed(self.told()) if "addrs" in line), None)
            if addrs is not None and condition(addrs):
                return list(addrs)
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the peer on {self.host} announces {addrs}:\n{self.log_file.read_text()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)

    def wait_for_log(self, text: str, within_s: float = 30.0) -> None:
        """Block until it has logged a text (it logs at debug level)."""
        deadline = time.monotonic() + within_s
        while text not in self.log_file.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the peer on {self.host} did not log {text!r}:\n{self.log_file.read_text()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)

    def wait_for_circuit(self) -> str:
        """A full address of it through a relay."""
        addrs = self.wait_for_addrs(lambda addrs: any("p2p-circuit" in addr for addr in addrs))
        return f"{next(addr for addr in addrs if 'p2p-circuit' in addr)}/p2p/{self.peer_id}"


class LabNodes:
    """Starts nodes and programs on the hosts of a lab; each host has folders of its own."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self._folder = folder
        self._started = 0

    def environment(self, host: str) -> dict[str, str]:
        """Pinned threads, and nothing of the user's configuration."""
        state = self._folder / host
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PETALNET_")}
        return clean | {
            "OMP_NUM_THREADS": "1",
            "PETALNET_STATE_DIR": str(state / "state"),
            "PETALNET_CACHE_DIR": str(self._folder / "cache"),
            "PETALNET_CONFIG": str(state / "config.toml"),
            "PYTHONUNBUFFERED": "1",
        }

    def launch(self, host: str, *arguments: object) -> LabNode:
        """Start `petalnet node …` on a host without waiting for it."""
        self._started += 1
        ready_file, log_file = (self._folder / f"{host}-{self._started}.{kind}" for kind in ("json", "log"))
        command = [sys.executable, "-m", "petalnet", "node", *arguments, "--ready-file", ready_file]
        with log_file.open("wb") as log:
            process = self.lab.popen(host, command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment(host))
        return LabNode(host, process, ready_file, log_file)

    def launch_peer(self, host: str, *arguments: object) -> LabPeer:
        """Start `peer.py` on a host."""
        self._started += 1
        out_file, log_file = (self._folder / f"{host}-{self._started}.{kind}" for kind in ("out", "log"))
        command = [sys.executable, PEER, *arguments]
        with out_file.open("wb") as out, log_file.open("wb") as log:
            process = self.lab.popen(host, command, stdout=out, stderr=log, stdin=subprocess.DEVNULL, env=self.environment(host))
        return LabPeer(host, process, out_file, log_file)

    def run_peer(self, host: str, *arguments: object) -> str:
        """Run `peer.py` on a host to its end; returns what it printed."""
        return self._run(host, [PEER, *arguments], 60.0)

    def run_python(self, host: str, code: str, *arguments: object, within_s: float = 120.0) -> str:
        """Run a Python program on a host; returns what it printed, and the test fails where it failed."""
        return self._run(host, ["-c", code, *arguments], within_s)

    def _run(self, host: str, arguments: Sequence[object], within_s: float) -> str:
        command = [sys.executable, *arguments]
        done = self.lab.run(host, command, capture_output=True, text=True, timeout=within_s, env=self.environment(host))
        (self._folder / f"{host}.stderr").write_text(done.stderr)
        if done.returncode:
            pytest.fail(f"a program on {host} ended with {done.returncode}:\n{done.stderr}")
        return str(done.stdout)


@pytest.fixture
def nodes(lab: Lab, tmp_path: Path) -> LabNodes:
    return LabNodes(lab, tmp_path)
