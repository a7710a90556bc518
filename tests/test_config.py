"""Settings: their sources and precedence, and the peers that a client without peers finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from petalnet.config import (
    TABLE,
    Settings,
    client_state_path,
    config_path,
    load_settings,
    read_client_state,
    resolve_initial_peers,
    state_dir,
)
from petalnet.errors import NoSwarmError, UsageError

PEER = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWRyoDGGEaWkXLRD5VMkEaMrxCqNQw9fbWxwVa9R3oWBVy"


def load(tmp_path: Path, typed: dict[str, object] | None = None, file: str = "", **environ: str) -> Settings:
    path = tmp_path / "config.toml"
    path.write_text(file)
    return load_settings(typed or {}, environ={"PETALNET_CONFIG": str(path), **environ})


def test_precedence(tmp_path: Path) -> None:
    file = 'dtype = "float16"\n'
    assert load(tmp_path).dtype == "auto"
    assert load(tmp_path, file=file).dtype == "float16"
    assert load(tmp_path, file=file, PETALNET_DTYPE="bfloat16").dtype == "bfloat16"
    assert load(tmp_path, {"dtype": "float32"}, file=file, PETALNET_DTYPE="bfloat16").dtype == "float32"


def test_lists(tmp_path: Path) -> None:
    assert load(tmp_path, PETALNET_INITIAL_PEERS="/a/b, /c/d\n/e/f").initial_peers == ("/a/b", "/c/d", "/e/f")
    assert load(tmp_path, file='initial-peers = ["/a/b"]').initial_peers == ("/a/b",)
    assert load(tmp_path, {"new_swarm": True}, file='initial_peers = ["/a/b"]').initial_peers == ()


@pytest.mark.parametrize(
    ("text", "value"), [("0:12", (0, 12)), ("8", 8), ("auto", "auto")],
)  # fmt: skip
def test_serve(tmp_path: Path, text: str, value: object) -> None:
    assert load(tmp_path, {"serve": text}).serve == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("serve", "12:0"), ("serve", "3:3"), ("serve", "0"), ("serve", "-1"), ("serve", "a:b"), ("dtype", "float8"), ("device", "tpu"),
        ("device", "cpu,cuda"), ("throughput", "fast"), ("throughput", "nan"), ("throughput", "-3"), ("attn_cache_tokens", "0"),
        ("max_memory", "much"), ("max_memory", "0GB"), ("http", "localhost"), ("http", "127.0.0.1:99999"), ("log_level", "loud"),
        ("public_name", "  "), ("public_name", "a\x1b[1m"), ("public_name", "x" * 65),
    ],
)  # fmt: skip
def test_a_wrong_value_names_its_flag(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} needs ") as caught:
        load(tmp_path, {name: text})
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


def test_values(tmp_path: Path) -> None:
    settings = load(tmp_path, {"max_memory": "1.5GiB", "http": ":0", "throughput": "12.5", "identity_path": "~/key"})
    assert settings.max_memory == 3 << 29
    assert settings.http == ("127.0.0.1", 0)
    assert settings.throughput == 12.5
    assert settings.identity_path == Path.home() / "key"
    assert load(tmp_path, {"http": "[::1]:80"}).http == ("::1", 80)
    assert load(tmp_path, {"max_memory": "8gb"}).max_memory == 8 * 10**9
    assert load(tmp_path, {"max_disk_space": "300GB"}).max_disk_space == 3 * 10**11


@pytest.mark.parametrize("file", ["dtyp = 'float32'", "dtype = ['float32']", "initial_peers = '/a/b'", "dtype = ", "serve = '0:3'", "\xff"])
def test_a_wrong_file_is_named(tmp_path: Path, file: str) -> None:
    with pytest.raises(UsageError, match=r"config\.toml"):
        load(tmp_path, file=file)


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="PETALNET_DTYPE"):
        load(tmp_path, PETALNET_DTYPE="float8")


def test_every_setting_is_explained() -> None:
    for name, field in TABLE.items():
        assert field.metadata["help"], name
        assert len(field.metadata["help"]) < 140, name


def test_folders_can_be_moved(tmp_path: Path) -> None:
    environ = {"PETALNET_STATE_DIR": str(tmp_path / "state"), "PETALNET_CONFIG": "~/mine.toml"}
    assert state_dir(environ) == tmp_path / "state"
    assert config_path(environ) == Path.home() / "mine.toml"


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"PETALNET_STATE_DIR": str(tmp_path / "state"), "PETALNET_CONFIG": str(tmp_path / "none.toml"), **more}


def leave_state(environ: dict[str, str], **state: object) -> None:
    path = client_state_path(environ)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(state))


def test_peers_are_looked_for_in_four_places(tmp_path: Path) -> None:
    environ = environment(tmp_path)
    with pytest.raises(NoSwarmError, match="PETALNET_INITIAL_PEERS") as caught:
        resolve_initial_peers(None, environ=environ)
    assert "petalnet node --client" in str(caught.value) and "none.toml" in str(caught.value) and "\n" not in str(caught.value)

    leave_state(environ, pid=os.getpid(), initial_peers=[PEER])
    assert resolve_initial_peers(None, environ=environ) == [PEER]
    with pytest.raises(NoSwarmError):
        resolve_initial_peers(None, environ=environ, daemon=False)

    def at(port: int) -> str:
        return PEER.replace("31330", str(port))

    (tmp_path / "none.toml").write_text(f'initial_peers = ["{at(2)}"]')
    assert resolve_initial_peers(None, environ=environ) == [at(2)]
    assert resolve_initial_peers(None, environ=environ | {"PETALNET_INITIAL_PEERS": at(3)}) == [at(3)]
    (tmp_path / "peers.txt").write_text(f"# ours\n{at(4)}\n\n{at(5)}  # the second\n")
    assert resolve_initial_peers(f"@{tmp_path / 'peers.txt'}", environ=environ | {"PETALNET_INITIAL_PEERS": at(3)}) == [at(4), at(5)]
    with pytest.raises(UsageError, match="rubbish"):
        resolve_initial_peers(["rubbish"], environ=environ)


def test_the_state_of_a_daemon_that_is_gone_does_not_count(tmp_path: Path) -> None:
    environ = environment(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave_state(environ, pid=gone.pid, initial_peers=[PEER])
    assert read_client_state(environ) is None
    for rubbish in ({"pid": os.getpid()}, {"pid": "x", "initial_peers": []}, {"pid": 10**30, "initial_peers": []}):
        leave_state(environ, **rubbish)
        assert read_client_state(environ) is None
    client_state_path(environ).write_text("rubbish")
    assert read_client_state(environ) is None
