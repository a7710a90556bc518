"""`petalnet convert`, to a folder and to a hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalnet.cli import run
from petalnet.models.checkpoint import DEMO_MODEL
from tests.models.push_server import TOKEN, PushServer, push_server


@pytest.fixture(autouse=True)
def _places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PETALNET_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("PETALNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PETALNET_DTYPE", "bfloat16")  # of a host's nodes; a conversion keeps the model's own


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PushServer]:
    from huggingface_hub import constants

    with push_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(variable, raising=False)
        yield server


def test_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    assert run(["convert", str(DEMO_MODEL), "--output", str(folder)]) == 0
    said = capsys.readouterr()
    assert "12 blocks" in said.out and f"petalnet node {folder} --serve auto" in said.out and not said.err
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((DEMO_MODEL / "config.json").read_text())
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "generation_config.json", "petalnet_manifest.json"}
    assert run(["convert", str(DEMO_MODEL), "--output", str(folder)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["convert", str(DEMO_MODEL), "--output", str(folder), "--force", "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["num_blocks"] == 12 and told["folder"] == str(folder) and told["url"] is None and len(told["key"]) == 64


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--output", "x"], "say which model"),
        (["model"], "--output"),
        ([str(DEMO_MODEL), "--output", "x", "--private"], "--push-to-hub"),
        ([str(DEMO_MODEL), "--output", "x", "--dtype", "int3"], "int3"),
        (["./nowhere", "--output", "x"], "neither a folder nor"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and says in said.err and not Path("x").exists()


def test_to_the_hub(hub: PushServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    push = ["convert", str(DEMO_MODEL), "--push-to-hub", "me/tiny", "--token", TOKEN]
    assert run([*push, "--output", str(folder), "--private"]) == 0
    assert f"on the hub: {hub.url}/me/tiny/commit/" in capsys.readouterr().out
    pushed = hub.repositories["me/tiny"]
    assert pushed == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.private == {"me/tiny"} and hub.commits == 1
    assert json.loads(pushed["petalnet_manifest.json"])["name"] == "me/tiny"
    # What another model left there would be read in its place: it goes in the same commit, and only on demand.
    hub.repositories["me/tiny"] |= {"model.safetensors": b"old", "notes.txt": b"mine"}
    assert run([*push, "--output", str(tmp_path / "second")]) == 2
    assert "holds a model already" in capsys.readouterr().err and not (tmp_path / "second").exists()
    assert run([*push, "--output", str(tmp_path / "second"), "--force"]) == 0
    assert (
        hub.commits == 2 and "model.safetensors" not in hub.repositories["me/tiny"] and hub.repositories["me/tiny"]["notes.txt"] == b"mine"
    )


def test_a_hub_that_refuses_is_one_line(hub: PushServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push = ["convert", str(DEMO_MODEL), "--output", str(tmp_path / "new"), "--push-to-hub"]
    hub.repositories["me/public"] = {}
    for arguments, says, status in (
        ([*push, "me/tiny"], "hf auth login", 2),
        ([*push, "me/tiny", "--token", "hf_wrong"], "Invalid user token", 1),
        ([*push, "a b c", "--token", TOKEN], "not the id of a hub repository", 2),
        ([*push, "me/public", "--token", TOKEN, "--private"], "and public", 2),
    ):
        assert run(arguments) == status
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and says in said
        assert not (tmp_path / "new").exists()
    hub.broken = True
    assert run([*push, "me/tiny", "--token", TOKEN]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'new'} is complete; try again with" in said and said.splitlines()[-1].startswith("petalnet: ")
    assert hub.commits == 0 and hub.repositories == {"me/public": {}, "me/tiny": {}} and (tmp_path / "new/config.json").exists()
