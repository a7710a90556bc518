"""A hub on loopback: it answers what `huggingface_hub` asks for the files of repositories, ranges of bytes included, and counts.

Its manners can be made bad: connections that break, ranges that are ignored or answered wrongly, headers that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

COMMIT = "a" * 40
REPOSITORY = "org/tiny"


@dataclass
class Manners:
    """How the hub behaves.

    Attributes:
        break_after: of each answer for weights send only so many bytes and cut the connection; None for all.
        breaks_left: how many more connections to cut so.
        ignore_ranges: send the whole file with status 200, whatever part is asked for.
        shift: answer with a range that begins so many bytes later than the one that was asked for.
        longer: send so many bytes more than it says.
        statuses: of answers to the next GET requests for weights, instead of the files.
        leave_out: headers that are not sent.
        gated: nobody may read it.
        token: who reads has to send this one.
        redirect: files of weights are at another address, as on a content network.
        down: it answers nothing.
    """

    break_after: int | None = None
    breaks_left: int = 1 << 30
    ignore_ranges: bool = False
    shift: int = 0
    longer: int = 0
    statuses: list[int] = field(default_factory=list)
    leave_out: frozenset[str] = frozenset()
    gated: bool = False
    token: str | None = None
    redirect: bool = False
    down: bool = False


class Hub(ThreadingHTTPServer):
    """A hub with one repository, `REPOSITORY`, of one commit, `COMMIT`.

    Attributes:
        folder: the repository's files.
        manners: see `Manners`.
        requests: (method, file) of each request, in order.
        sent: bytes that were sent of each file.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.manners = Manners()
        self.requests: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def fetched(self) -> list[str]:
        """Files that bytes were taken of, in the order of requests."""
        return [name for method, name in self.requests if method == "GET"]

    @property
    def weights_sent(self) -> int:
        """Bytes that were sent of files of weights."""
        return sum(size for name, size in self.sent.items() if is_weights(name))

    def forget(self) -> None:
        """Count from here on."""
        self.requests.clear()
        self.sent.clear()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are no news."""

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process whose hub this is: huggingface_hub reads it when it is imported."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "0"}
        return os.environ | ours | {"OMP_NUM_THREADS": "1"}

    def be_the_hub(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Of this process."""
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        constants = "huggingface_hub.constants"
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"{constants}.{name}", value)
        huggingface_hub.close_session()  # the next one reads the environment

    def run(self, home: Path, code: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a program for which this is the hub."""
        environment = self.environment(home) | more
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub that serves a folder."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        match = re.fullmatch(rf"(?P<moved>/moved)?/{REPOSITORY}/resolve/(main|{COMMIT})/(?P<name>[^/]+)", self.path)
        manners = self.server.manners
        if manners.down:
            self.close_connection = True
            return
        if self.path == f"/api/models/{REPOSITORY}":
            if manners.token is not None and "Authorization" not in self.headers:
                return self._refuse(401, "RepoNotFound")
            about = {"id": REPOSITORY, "sha": COMMIT, "private": manners.token is not None, "gated": "auto" if manners.gated else False}
            return self._send("", 200, {"Content-Type": "application/json"}, json.dumps(about).encode())
        if match is None:
            known = self.path.startswith(f"/{REPOSITORY}/")
            return self._refuse(404, "RevisionNotFound" if known else "RepoNotFound")
        name = match["name"]
        self.server.requests.append((self.command, name))
        if manners.gated:
            return self._refuse(403, "GatedRepo")
        if manners.token is not None and not match["moved"] and self.headers.get("Authorization") != f"Bearer {manners.token}":
            return self._refuse(401, "RepoNotFound")
        file = self.server.folder / name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if not is_weights(name):
            return self._send(name, 200, headers, content)
        if manners.redirect and not match["moved"]:
            etag, size = headers["ETag"], str(len(content))
            moved = {
                "Location": f"http://localhost:{self.server.server_port}/moved{self.path}",
                "X-Linked-Etag": etag,
                "X-Linked-Size": size,
            }
            return self._send(name, 302, {"X-Repo-Commit": COMMIT} | moved, b"")
        if match["moved"] and "Authorization" in self.headers:
            return self._refuse(400, "TokenLeaked")
        if self.command == "GET" and manners.statuses:
            return self._refuse(manners.statuses.pop(0), "")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or manners.ignore_ranges:
            return self._send(name, 200, headers, content)
        start, end = int(asked[1]) + manners.shift, min(int(asked[2]) + 1 + manners.shift, len(content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(name, 206, headers, content[start : end + manners.longer])

    def _send(self, name: str, status: int, headers: dict[str, str], content: bytes) -> None:
        manners = self.server.manners
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            if header not in manners.leave_out:
                self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = manners.break_after is not None and is_weights(name) and manners.breaks_left > 0 and len(content) > manners.break_after
        if cut:
            content = content[: manners.break_after]
            manners.breaks_left -= 1
            self.close_connection = True
        with self.server.counting:  # before anybody can have got it
            self.server.sent[name] += len(content)
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass
