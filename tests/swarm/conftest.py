"""Real `petalnet node` processes on loopback, one thread each, stopped at the end of the test whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

READY_WITHIN_S = 60.0
"""How long a node may take to its ready file: imports and the probe on two busy cores, with room to spare."""


@dataclass
class NodeProcess:
    """A running `petalnet node`: its process, what its ready file said, and where its log goes."""

    process: subprocess.Popen[bytes]
    ready_file: Path
    log_file: Path
    ready: dict[str, object]

    @property
    def addrs(self) -> list[str]:
        return [addr for addr in self.ready["addrs"] if addr.startswith("/ip4/127.0.0.1/")]  # type: ignore[attr-defined,union-attr]

    @property
    def peer_id(self) -> str:
        return str(self.ready["peer_id"])

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_ready(self) -> NodeProcess:
        """Block until the node has written its ready file; fails with the node's log when it ends before or takes too long."""
        deadline = time.monotonic() + READY_WITHIN_S
        while not self.ready_file.exists():
            if self.process.poll() is not None:
                pytest.fail(f"the node ended with {self.process.returncode} before it was ready:\n{self.log()}")
            if time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the node was not ready within {READY_WITHIN_S} s:\n{self.log()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
        self.ready = json.loads(self.ready_file.read_text())
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 15.0) -> int:
        """SIGTERM, then the exit status; SIGKILL where the node does not end in time."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode


class Nodes:
    """Starts nodes and stops them all in the end. Every node has folders of its own under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[NodeProcess] = []

    def environment(self) -> dict[str, str]:
        """The environment of every process: pinned threads, nothing of the user's configuration."""
        state = self.folder / "home"
        state.mkdir(exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PETALNET_")}
        return clean | {
            "OMP_NUM_THREADS": "1",
            "PETALNET_STATE_DIR": str(state / "state"),
            "PETALNET_CACHE_DIR": str(state / "cache"),
            "PETALNET_CONFIG": str(state / "config.toml"),
            "PETALNET_DRAIN_TIME": "10",  # shorter than the patience of `NodeProcess.stop`
            "PYTHONUNBUFFERED": "1",
        }

    def launch(
        self,
        *arguments: object,
        own_identity: bool = False,
        program: Sequence[str] = ("-m", "petalnet"),
        environment: Mapping[str, str] | None = None,
    ) -> NodeProcess:
        """Start `petalnet node …` on a free loopback port without waiting for it; `own_identity` leaves its key to the node.

        Args:
            program: what runs it, for Python.
            environment: what it gets beside the environment of all.
        """
        number = len(self.started)
        ready_file, log_file = self.folder / f"ready-{number}.json", self.folder / f"node-{number}.log"
        command = [sys.executable, *program, "node", *map(str, arguments), "--ready-file", str(ready_file)]
        if "--host-maddrs" not in arguments:
            command += ["--host-maddrs", "/ip4/127.0.0.1/tcp/0"]
        if "--identity-path" not in arguments and not own_identity:
            command += ["--identity-path", str(self.folder / f"identity-{number}.key")]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment() | dict(environment or {})
            )
        node = NodeProcess(process, ready_file, log_file, {})
        self.started.append(node)
        return node

    def start(self, *arguments: object, own_identity: bool = False) -> NodeProcess:
        """Start `petalnet node …` and wait until it is usable."""
        return self.launch(*arguments, own_identity=own_identity).wait_ready()

    def serve(
        self, model: Path, spans: Sequence[tuple[int, int]], *, dtype: str = "float32", peers: Sequence[str] = ()
    ) -> list[NodeProcess]:
        """One server a span; the first starts the swarm unless `peers` are given, the others join it, all at once."""
        options = ["--dtype", dtype, "--throughput", "100"]
        known = list(peers)
        servers: list[NodeProcess] = []
        for first, end in spans:
            joining = ["--initial-peers", *known] if known else ["--new-swarm"]
            servers.append(self.launch(model, "--serve", f"{first}:{end}", *options, *joining))
            if not known:
                known = servers[0].wait_ready().addrs
        return [server.wait_ready() for server in servers]

    def serve_all(self, servers: Sequence[tuple[Path, tuple[int, int]]], *options: object) -> list[NodeProcess]:
        """A server for each (model, span), of several models in one swarm: the first starts it, the others join, two at a time."""
        options = ("--dtype", "float32", "--throughput", "100", *options)
        started: list[NodeProcess] = []
        for number, (model, (first, end)) in enumerate(servers):
            joining = ("--initial-peers", *started[0].addrs) if started else ("--new-swarm",)
            started.append(self.launch(model, "--serve", f"{first}:{end}", *options, *joining))
            if number != 1:
                started[max(0, number - 1)].wait_ready()
        return [server.wait_ready() for server in started]

    def stop_all(self) -> None:
        for node in self.started:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGCONT)
                node.process.terminate()
        for node in self.started:
            node.stop()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """A `Nodes` for one test."""
    started = Nodes(tmp_path)
    try:
        yield started
    finally:
        started.stop_all()


@pytest.fixture(scope="module")
def module_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A `Nodes` for all tests of a module."""
    started = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        yield started
    finally:
        started.stop_all()


@dataclass(frozen=True)
class Families:
    """A swarm that serves small models of several families (see `models`): their folders, and their servers in the order of blocks."""

    paths: dict[str, Path]
    servers: dict[str, list[NodeProcess]]
    nodes: Nodes

    @property
    def peers(self) -> list[str]:
        return next(iter(self.servers.values()))[0].addrs


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Families]:
    """One swarm for all modules that only use its servers: nothing that a test leaves there is seen by another."""
    from .models import SPANS, save_model

    paths = {family: save_model(family, tmp_path_factory.mktemp(family)) for family in SPANS}
    places = [(family, span) for family, spans in SPANS.items() for span in spans]
    nodes = Nodes(tmp_path_factory.mktemp("families"))
    try:
        started = nodes.serve_all([(paths[family], span) for family, span in places])
        servers = {family: [node for node, (of, _) in zip(started, places, strict=True) if of == family] for family in SPANS}
        yield Families(paths, servers, nodes)
    finally:
        nodes.stop_all()


@pytest.fixture(scope="session")
def start_swarm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., contextlib.AbstractContextManager[list[str]]]:
    """`with start_swarm(model, spans=[(0, 4), (4, 8)], dtype="float32") as peers:` gives bootstrap multiaddrs of a running swarm."""

    @contextlib.contextmanager
    def swarm(model: Path, spans: Sequence[tuple[int, int]], dtype: str = "float32") -> Iterator[list[str]]:
        started = Nodes(tmp_path_factory.mktemp("swarm"))
        try:
            yield started.serve(model, spans, dtype=dtype)[0].addrs
        finally:
            started.stop_all()

    return swarm
