"""A small swarm of real server processes on this machine, for the demonstration."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from petalnet.errors import ServerError

READY_WITHIN_S = 180.0
"""A machine that does much else takes a minute to import the libraries."""
STOP_WITHIN_S = 5.0


@dataclass
class Server:
    """One `petalnet node` of the demonstration.

    Attributes:
        span: the blocks that it was told to serve.
        ready: what its ready file says; empty until it is ready.
    """

    span: tuple[int, int]
    process: subprocess.Popen[bytes]
    ready_file: Path
    log_file: Path
    ready: dict[str, Any]

    def poll(self) -> bool:
        """Whether the server is ready by now.

        Raises:
            ServerError: its process has ended.
        """
        if not self.ready and self.ready_file.exists():
            self.ready = json.loads(self.ready_file.read_text())
        if self.process.poll() is not None:
            log = self.log_file.read_text(errors="replace").strip()
            raise ServerError(f"a server ended with status {self.process.returncode}; the end of its log: {log[-500:]}")
        return bool(self.ready)

    def wait_ready(self, deadline: float) -> None:
        """Block until the server is ready. Raises ServerError where it ends, or is not ready at `deadline` (`time.monotonic`)."""
        while not self.poll():
            if time.monotonic() > deadline:
                raise ServerError(f"a server was not ready within {READY_WITHIN_S:.0f} s")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)

    def kill(self) -> None:
        """End the server at once and without a word to anybody, as a machine that loses power."""
        self.process.kill()
        self.process.wait()

    def loopback_addrs(self) -> list[str]:
        return [addr for addr in self.ready["addrs"] if "/127.0.0.1/" in addr]


class LocalSwarm:
    """Servers of the demo model on loopback; `local_swarm` makes and ends one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._launching = False
        self._interrupted = False
        self.servers: list[Server] = []

    def launch(self, span: tuple[int, int], initial_peers: list[str], *options: str) -> Server:
        """Start a server process without waiting for it; without `initial_peers` it begins the swarm. `options`: more for the command."""
        number = len(self.servers)
        ready_file, log_file = self._folder / f"ready-{number}.json", self._folder / f"node-{number}.log"
        command = [
            *(sys.executable, "-m", "petalnet", "node", "--serve", f"{span[0]}:{span[1]}"),
            *("--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--identity-path", str(self._folder / f"node-{number}.key")),
            *("--ready-file", str(ready_file), "--public-name", f"server {number + 1}"),
            *(["--initial-peers", *initial_peers] if initial_peers else ["--new-swarm"]),
            *options,
        ]
        self._launching = True
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment())
        server = Server(span, process, ready_file, log_file, {})
        self.servers.append(server)
        self._launching = False
        if self._interrupted:
            self.interrupt()
        return server

    def interrupt(self) -> None:
        """End the servers and this program; for signal handlers.

        Not by an exception, which may be raised where Python ignores it (in a finaliser), or between a server's start and our knowing it.
        """
        self._interrupted = True
        if not self._launching:
            self.stop()
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(130)

    def stop(self) -> None:
        """End all servers, at the latest by force."""
        for server in self.servers:
            if server.process.poll() is None:
                server.process.terminate()
        deadline = time.monotonic() + STOP_WITHIN_S
        for server in self.servers:
            try:
                server.process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()

    @staticmethod
    def _environment() -> Mapping[str, str]:
        """The user's, less what configures other nodes; one compute thread each, since several processes share this machine."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PETALNET_") or name in ("PETALNET_CACHE_DIR",)}
        return {"OMP_NUM_THREADS": "1", **kept, "PETALNET_CONFIG": os.devnull, "PYTHONUNBUFFERED": "1"}


@contextmanager
def local_swarm() -> Iterator[LocalSwarm]:
    """A `LocalSwarm` without servers yet; whatever ends the context, its servers end with it."""
    with TemporaryDirectory(prefix="petalnet-demo-") as folder:
        swarm = LocalSwarm(Path(folder))
        try:
            yield swarm
        finally:
            swarm.stop()
