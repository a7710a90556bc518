"""Tutorials as tests: a page's blocks of shell and Python are run in their order, in an empty folder, as a reader would.

Every block in the language `sh` or `python` is run. A comment on the line before it says more:

    <!-- not run: why -->               it needs what a test has not: a second machine, a login
    <!-- terminal, until: words -->     a command that goes on, in a terminal of its own; the next block comes when it has printed the words
    <!-- prints -->                     a `text` block: lines that the block before has printed, in this order; … stands for anything

Addresses that end in … are what the first of the terminals printed: a reader copies it from there.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 180.0
"""How long a block may take, with room for a busy machine."""

_FENCE = re.compile(r"(?:<!-- (?P<marker>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SHOWN_ADDRESS = re.compile(r"/ip4/[\d.]+/tcp/\d+/p2p/\w+…")
_ADDRESS = re.compile(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+")


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: name and line, for messages.
        language: "sh", "python" or "text".
        text: what is in it.
        marker: what the comment before it says; "" where there is none.
    """

    page: str
    language: str
    text: str
    marker: str

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and not self.marker.startswith("not run: ")

    @property
    def until(self) -> str | None:
        """The words at which a command that goes on is ready; None for one that ends."""
        return self.marker.removeprefix("terminal, until: ") if self.marker.startswith("terminal, until: ") else None


def read_blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        yield Block(f"{page.name}:{line}", match["language"], match["text"], match["marker"] or "")


class Reader:
    """Somebody who does what a page says; a context manager, at whose end all that was started is ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "work"
        self._folder.mkdir()
        self._bin = folder / "bin"
        self._bin.mkdir()
        for name, command in (("petalnet", "-m petalnet"), ("python", "")):
            script = self._bin / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
            script.chmod(0o755)
        self._home = folder / "home"
        self._home.mkdir()
        self._terminals: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._printed = ""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process, _ in self._terminals:
            process.terminate()
        for process, _ in self._terminals:
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def do(self, block: Block) -> None:
        """Carry out what a block says. Raises AssertionError where it does not do what the page promises."""
        if block.until is not None:
            self._open_terminal(block, block.until)
        elif block.runs:
            self._run(block)
        elif block.marker == "prints":
            self._compare(block)

    def _environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PETALNET_", "HF_"))}
        return clean | {
            "PATH": f"{self._bin}:{clean['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self._home / "huggingface"),
            "PETALNET_CONFIG": str(self._home / "config.toml"),
            "PETALNET_STATE_DIR": str(self._home / "state"),
            "PETALNET_CACHE_DIR": str(self._home / "cache"),
            "PETALNET_HOST_MADDRS": "/ip4/127.0.0.1/tcp/0",  # whatever else runs on this machine
            "PETALNET_DRAIN_TIME": "5",
        }

    def _command(self, block: Block) -> list[str]:
        text = block.text
        if _SHOWN_ADDRESS.search(text):
            assert self._terminals, f"{block.page} names an address before any terminal has printed one"
            found = _ADDRESS.search(self._terminals[0][1].read_text(errors="replace"))
            assert found is not None, f"{block.page}: the first terminal has printed no address"
            text = _SHOWN_ADDRESS.sub(found[0], text)
        return ["bash", "-euo", "pipefail", "-c", text] if block.language == "sh" else [str(self._bin / "python"), "-c", text]

    def _run(self, block: Block) -> None:
        done = subprocess.run(
            self._command(block), cwd=self._folder, env=self._environment(), capture_output=True, text=True, timeout=WITHIN_S
        )
        self._printed = done.stdout
        assert done.returncode == 0, f"{block.page} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}{self._logs()}"

    def _open_terminal(self, block: Block, until: str) -> None:
        log = self._folder.parent / f"terminal-{len(self._terminals)}.log"
        command = self._command(block)
        command[-1] = f"exec {command[-1]}"  # so that ending the terminal ends what runs in it
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=self._folder, env=self._environment(), stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
        self._terminals.append((process, log))
        deadline = time.monotonic() + WITHIN_S
        while until not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, f"{block.page} has not printed {until!r}:{self._logs()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        self._printed = log.read_text(errors="replace")

    def _compare(self, block: Block) -> None:
        pattern = ".*?".join(r"\s*".join(map(_as_pattern, line.split())) for line in block.text.splitlines() if line.strip())
        assert re.search(pattern, self._printed, re.DOTALL), f"{block.page}: what was printed is\n{self._printed}"

    def _logs(self) -> str:
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for _, log in self._terminals)


def _as_pattern(word: str) -> str:
    return r"[^\n]*?".join(map(re.escape, word.split("…")))
