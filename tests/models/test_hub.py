"""Models from a hub repository: the real huggingface_hub and a small hub on loopback. Only the files that are needed are fetched."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.peft_adapters import save_adapter

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Answers what `hf_hub_download` asks for the files of one repository, org/tiny; `fetched` names those whose bytes were taken."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        prefix, _, name = self.path.partition("/resolve/main/")
        file = self.server.folder / name
        if prefix != "/org/tiny" or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if prefix == "/org/tiny" else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.server.fetched.append(name)
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(saved: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(folder, max_shard_size="20KB")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub: Hub, home: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A program for which `hub` is the hub; it reads that from the environment when it starts."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


LOAD = """
from petalnet.blocks.span import Span
from petalnet.models.checkpoint import ModelSource
span = Span.load(ModelSource.open("org/tiny"), 1, 2)
print(span.first, span.end, len(span.digests))
"""


def test_a_span_fetches_only_the_files_that_hold_it(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path / "home", LOAD)
    assert done.stdout.split() == ["1", "2", "1"], done.stderr
    shards = sorted(file.name for file in hub.folder.glob("*.safetensors"))
    taken = sorted(name for name in hub.fetched if name.endswith(".safetensors"))
    index = (hub.folder / "model.safetensors.index.json").read_text()
    needed = sorted({line.split('"')[3] for line in index.splitlines() if "model.layers.1." in line})
    assert taken == needed and 0 < len(needed) < len(shards)
    hub.fetched.clear()
    assert run(hub, tmp_path / "home", LOAD).stdout.split() == ["1", "2", "1"]
    assert not hub.fetched  # all of it is in the cache by now


def test_a_repository_that_is_not_there_is_one_clear_error(hub: Hub, tmp_path: Path) -> None:
    code = """
from petalnet.errors import ModelError
from petalnet.models.checkpoint import ModelSource
try:
    ModelSource.open("org/other")
except ModelError as error:
    print(error)
"""
    done = run(hub, tmp_path / "home", code)
    assert done.stdout.strip() == "there is no folder org/other and no such hub repository (or it is private: pass a token)", done.stderr


@pytest.mark.long
def test_an_adapter_from_the_hub(hub: Hub, saved: Callable[[str], Path], tmp_path: Path) -> None:
    save_adapter(saved("llama"), hub.folder, "llama")
    code = f"""
import sys
from petalnet.models.adapters import AdapterSource
from petalnet.models.checkpoint import ModelSource
adapter = AdapterSource.open("org/tiny", ModelSource.open({str(saved("llama"))!r}))
print(adapter.label.partition("@")[0], len(adapter.load(1, 2)[1]), "peft" in sys.modules)
"""
    done = run(hub, tmp_path / "home", code)
    assert done.stdout.split() == ["org/tiny", "4", "False"], done.stderr
    assert hub.fetched == ["adapter_config.json", "adapter_model.safetensors"]
