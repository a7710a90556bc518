"""`petalnet key new`, and the key's way from a person's hands into the settings."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from petalnet.cli import run
from petalnet.config import access_of, client_state_path, load_settings, resolve_access
from petalnet.errors import UsageError
from petalnet.p2p.identity import Identity
from petalnet.p2p.swarm_key import SwarmKey

ONE, OTHER = Identity(bytes(32)).peer_id, Identity(b"\1" * 32).peer_id
PEER = f"/ip4/127.0.0.1/tcp/31330/p2p/{ONE}"


def test_a_new_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my swarm.key"
    assert run(["key", "new", str(path)]) == 0
    said = capsys.readouterr().out
    key = SwarmKey.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.fingerprint in said and f"--swarm-key '{path}'" in said
    assert key.text().splitlines()[1] not in said


def test_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swarm.key"
    assert run(["key", "new", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path), "fingerprint": SwarmKey.load(path).fingerprint}


def test_a_key_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swarm.key"
    assert run(["key", "new", str(path)]) == 0
    before = path.read_bytes()
    capsys.readouterr()
    assert run(["key", "new", str(path)]) == 2
    said = capsys.readouterr()
    assert path.read_bytes() == before and said.err.count("\n") == 1 and "exists" in said.err


@pytest.mark.parametrize("arguments", [["key"], ["key", "old"], ["key", "new"], ["key", "new", "/no/such/folder/key"]])
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Usage:" not in said


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"PETALNET_STATE_DIR": str(tmp_path / "state"), "PETALNET_CONFIG": str(tmp_path / "config.toml")}


def new_key(path: Path) -> SwarmKey:
    key = SwarmKey.generate()
    key.save_new(path)
    return key


def test_a_key_is_looked_for_in_four_places(tmp_path: Path, environ: dict[str, str]) -> None:
    daemon, file, variable, given = (new_key(tmp_path / f"{name}.key") for name in ("daemon", "file", "variable", "given"))
    assert resolve_access(environ=environ).swarm_key is None
    state = client_state_path(environ)
    state.parent.mkdir()
    state.write_text(json.dumps({"pid": os.getpid(), "initial_peers": [PEER], "swarm_key": str(tmp_path / "daemon.key")}))
    assert resolve_access(environ=environ).swarm_key == daemon
    assert resolve_access(environ=environ, daemon=False).swarm_key is None
    assert resolve_access(environ=environ | {"PETALNET_INITIAL_PEERS": PEER}).swarm_key is None  # not the daemon's swarm
    (tmp_path / "config.toml").write_text(f'swarm_key = "{tmp_path}/file.key"')
    assert resolve_access(environ=environ).swarm_key == file
    environ["PETALNET_SWARM_KEY"] = str(tmp_path / "variable.key")
    assert resolve_access(environ=environ).swarm_key == variable
    for form in (given, given.text(), tmp_path / "given.key", str(tmp_path / "given.key")):
        assert resolve_access(form, environ=environ).swarm_key == given
    assert resolve_access("none", environ=environ).swarm_key is None
    assert access_of(load_settings({"swarm_key": "none"}, environ=environ)).swarm_key is None


def test_a_key_that_is_handed_over_as_text_is_not_shown(environ: dict[str, str]) -> None:
    key = SwarmKey.generate()
    settings = load_settings({}, environ=environ | {"PETALNET_SWARM_KEY": key.text()})
    assert access_of(settings).swarm_key == key
    assert key.text().splitlines()[1] not in repr(settings) + repr(access_of(settings))


def test_a_key_file_that_is_not_there(tmp_path: Path, environ: dict[str, str]) -> None:
    settings = load_settings({"swarm_key": str(tmp_path / "none.key")}, environ=environ)
    with pytest.raises(UsageError, match=r"cannot read the swarm key .*none\.key: No such file"):
        access_of(settings)


def test_lists_of_peers(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "peers.txt").write_text(f"# friends\n{ONE}\n\n{OTHER}  # in the cellar\n")
    assert access_of(load_settings({}, environ=environ)).allowed is None
    settings = load_settings({"allow_peers": [f"@{tmp_path}/peers.txt"], "block_peers": [OTHER, PEER]}, environ=environ)
    access = access_of(settings)
    assert access.allowed == {ONE, OTHER} and access.blocked == {ONE, OTHER}
    environ["PETALNET_BLOCK_PEERS"] = f"{ONE}, {OTHER}"
    assert access_of(load_settings({}, environ=environ)).blocked == {ONE, OTHER}


@pytest.mark.parametrize("text", ["rubbish", ONE[:-1], "/ip4/127.0.0.1/tcp/1", "@/no/such/file"])
def test_what_is_no_peer_id_is_told_in_one_line(text: str, environ: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        access_of(load_settings({"block_peers": [text]}, environ=environ))
    assert text.lstrip("@") in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_line_of_a_list_is_named(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "peers.txt").write_text(f"{ONE}\nrubbish\n")
    with pytest.raises(UsageError, match=r"peers\.txt, line 2: 'rubbish' is not a peer id"):
        access_of(load_settings({"block_peers": [f"@{tmp_path}/peers.txt"]}, environ=environ))
