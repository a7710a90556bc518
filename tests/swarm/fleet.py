"""Servers of many models, one model after the other, in one swarm: two node processes each, which part from a process that has imported
what they need, and start while the model before theirs is being tested."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import READY_WITHIN_S, Nodes

AHEAD = 2
"""Models whose servers start before it is their turn."""
KV_TOKENS = 16384


@dataclass
class Forked:
    """A node process: its number, and where it says what."""

    process: int
    ready_file: Path
    log: Path

    def wait_ready(self) -> list[str]:
        """The addresses of a node that is usable."""
        deadline = time.monotonic() + READY_WITHIN_S
        while not self.ready_file.exists():
            if self.ended:
                pytest.fail(f"the node ended before it was ready:\n{self.log.read_text(errors='replace')}")
            if time.monotonic() > deadline:
                pytest.fail(f"the node was not ready within {READY_WITHIN_S} s:\n{self.log.read_text(errors='replace')}")
            time.sleep(0.02)
        addrs: list[str] = json.loads(self.ready_file.read_text())["addrs"]
        return addrs

    def wait_ended(self) -> int:
        """Its exit status."""
        deadline = time.monotonic() + READY_WITHIN_S
        while not self.ended:
            if time.monotonic() > deadline:
                pytest.fail(f"the node did not end within {READY_WITHIN_S} s:\n{self.log.read_text(errors='replace')}")
            time.sleep(0.02)
        return int(self.status.read_text())

    @property
    def status(self) -> Path:
        return Path(f"{self.log}.status")

    @property
    def ended(self) -> bool:
        return self.status.exists()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGTERM)


class Fleet:
    """Two servers for each of some models, in their order.

    Attributes:
        environment: of all nodes.
    """

    def __init__(self, folder: Path, models: Sequence[tuple[str, Callable[[], Path], int]]) -> None:
        """
        Args:
            folder: for what nodes write.
            models: for each its name, what makes its folder, and how many blocks it has.
        """
        self.environment = Nodes(folder).environment()
        self._folder = folder
        self._models = list(models)
        self._started: dict[str, tuple[Path, list[Forked]]] = {}
        self._count = 0

    def __enter__(self) -> Fleet:
        program = Path(__file__).with_name("forked_nodes.py")
        self._parent = subprocess.Popen(
            [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, text=True
        )
        assert self._parent.stdout is not None and self._parent.stdout.readline() == "ready\n"
        self._bootstrap = self._fork("--bootstrap", "--new-swarm")
        self._peers = self._bootstrap.wait_ready()
        return self

    def __exit__(self, *error: Any) -> None:
        """All nodes end: those that are left, as their parent's input does."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.stdout.close()
        self._parent.wait(READY_WITHIN_S)

    @contextlib.contextmanager
    def serving(self, name: str) -> Iterator[tuple[Path, list[str]]]:
        """The folder of a model and the addresses by which its swarm is found, while it has its servers."""
        names = [model for model, _, _ in self._models]
        place = names.index(name)
        for model in names[place : place + 1 + AHEAD]:
            self._start(model)
        path, servers = self._started[name]
        try:
            for server in servers:
                server.wait_ready()
            yield path, self._peers
        finally:
            for server in servers:
                server.stop()

    def refuse(self, path: Path) -> tuple[int, str]:
        """The exit status and the output of a node that is to serve a model that it cannot serve."""
        node = self._fork(str(path), "--serve", "0:1", "--initial-peers", *self._peers)
        status = node.wait_ended()
        return status, node.log.read_text()

    def _start(self, name: str) -> None:
        if name in self._started:
            return
        _, make, blocks = next(model for model in self._models if model[0] == name)
        path = make()
        options = ("--dtype", "float32", "--throughput", "100", "--attn-cache-tokens", str(KV_TOKENS), "--initial-peers", *self._peers)
        spans = ((0, blocks // 2 - 1), (blocks // 2 - 1, blocks))  # unequal ones
        self._started[name] = path, [self._fork(str(path), "--serve", f"{first}:{end}", *options) for first, end in spans]

    def _fork(self, *arguments: str) -> Forked:
        number, self._count = self._count, self._count + 1
        ready_file, log = self._folder / f"ready-{number}.json", self._folder / f"node-{number}.log"
        files = ("--ready-file", str(ready_file), "--identity-path", str(self._folder / f"identity-{number}.key"))
        task = {"arguments": ["node", *arguments, *files, "--host-maddrs", "/ip4/127.0.0.1/tcp/0"], "log": str(log)}
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(task) + "\n")
        self._parent.stdin.flush()
        return Forked(int(self._parent.stdout.readline()), ready_file, log)
