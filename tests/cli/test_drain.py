"""`petalnet drain`, against nodes that are only a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest

from petalnet import inspection
from petalnet.cli import run

CELLAR = {"role": "server", "public_name": "cellar", "pid": 4711, "peers": []}
ATTIC = {"role": "server", "public_name": "attic", "pid": 4712, "peers": []}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The nodes that were told to drain, by their processes."""
    found: list[int] = []

    def drain(pid: int) -> dict[str, Any]:
        found.append(pid)
        return {"sessions": 2, "within_s": 30.0}

    monkeypatch.setattr(inspection, "ask_nodes", lambda: [CELLAR, ATTIC])
    monkeypatch.setattr(inspection, "ask_to_drain", drain)
    monkeypatch.setattr(inspection, "await_end", lambda pid, within_s: True)
    return found


def test_one_of_several_by_its_name_or_its_process(told: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["drain", "--node", "attic"]) == 0 and told == [4712]
    assert capsys.readouterr().out == "server attic (pid 4712) drains: 2 sessions may take up to 30 s to leave\nit has left\n"
    assert run(["drain", "--node", "4711", "--json"]) == 0 and told == [4712, 4711]
    assert json.loads(capsys.readouterr().out) == {"pid": 4711, "ended": True, "sessions": 2, "within_s": 30.0}


def test_the_only_one_need_not_be_named(told: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inspection, "ask_nodes", lambda: [CELLAR])
    assert run(["drain", "--no-wait"]) == 0 and told == [4711]
    assert "it has left" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nodes", "arguments", "status", "says"),
    [
        ([], [], 1, "you run no node on this machine"),
        ([CELLAR, ATTIC], [], 2, "say which one with --node NAME or PID: server cellar (pid 4711), server attic (pid 4712)"),
        ([CELLAR, ATTIC], ["--node", "kitchen"], 2, "you run no node 'kitchen' on this machine; there is server cellar (pid 4711), server"),
    ],
)
def test_which_one_is_told_in_one_line(
    told: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    nodes: list[dict[str, Any]],
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    monkeypatch.setattr(inspection, "ask_nodes", lambda: nodes)
    assert run(["drain", *arguments]) == status and not told
    said = capsys.readouterr().err
    assert said.startswith(f"petalnet: {says}") and said.count("\n") == 1


def test_a_node_that_does_not_end(told: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inspection, "await_end", lambda pid, within_s: False)
    assert run(["drain", "--node", "cellar"]) == 1
    assert "server cellar (pid 4711) has not ended after 45 s; its log says why, `kill 4711` ends it" in capsys.readouterr().err
