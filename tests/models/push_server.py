"""A hub on loopback to which models can be pushed: as much of its interface as creating a repository and uploading a folder take."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"


class PushServer(ThreadingHTTPServer):
    """One owner's repositories, and who may fill them.

    Attributes:
        repositories: files by name, by the repositories' names.
        private: those that were made private.
        commits: how many there were.
        broken: while it is set, large files are refused.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.commits = 0
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def push_server() -> Iterator[PushServer]:
    server = PushServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: PushServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": "me", "type": "user"})
        name, _, rest = path.removeprefix("/api/models/").partition("/tree/")
        files = self.server.repositories.get(name if rest else path.removeprefix("/api/models/"))
        if files is None:
            return self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        private = (name if rest else path.removeprefix("/api/models/")) in self.server.private
        entries = [{"type": "file", "path": file, "size": len(content), "oid": "0" * 40} for file, content in files.items()]
        return self._answer(
            200, entries if rest else {"id": name, "private": private, "sha": "0" * 40, "siblings": [{"rfilename": file} for file in files]}
        )

    def do_HEAD(self) -> None:
        name, _, rest = self.path.lstrip("/").partition("/resolve/main/")
        files = self.server.repositories.get(name)
        if files is None or rest not in files:
            return self._answer(404, None, code="RepoNotFound" if files is None else "EntryNotFound")
        return self._answer(200, None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"me/{asked['name']}"
            if name in self.server.repositories:
                return self._answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
            self.server.repositories[name] = {}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(name)
            return self._answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.server.url}/large/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        name, _, rest = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        if rest == "preupload":
            kinds = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": kinds})
        assert rest == "commit", self.path
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.repositories[name][value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del self.server.repositories[name][value["path"]]
        self.server.commits += 1
        return self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.url}/{name}/commit/{'1' * 40}"})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.broken:
            return self._answer(403, {"error": "you may not"})
        self.server.large[self.path.rpartition("/")[2]] = content
        return self._answer(200, None)

    def _answer(self, status: int, content: object, *, code: str | None = None) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
