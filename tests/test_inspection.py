"""What a running node tells programs of its own user, over its Unix socket."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from petalnet import inspection
from petalnet.errors import PetalnetError
from petalnet.inspection import ask_nodes, ask_to_drain, serve_inspection


@pytest.fixture(params=["short", "long"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the sockets; a long one does not fit into a socket's address."""
    state = tmp_path / "state" if request.param == "short" else tmp_path / ("x" * 120) / "state"
    monkeypatch.setenv("PETALNET_STATE_DIR", str(state))
    return state / "nodes"


def modes(folder: Path) -> list[int]:
    """Of the folder, and of what is in it."""
    return [stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())]


async def ask() -> list[dict[str, object]]:
    return await trio.to_thread.run_sync(ask_nodes)


async def test_a_node_answers_its_own_user_only(folder: Path, nursery: trio.Nursery) -> None:
    assert await ask() == []
    reports = iter([{"number": 1}, {"number": 2, "large": "x" * 3_000_000}])
    await nursery.start(serve_inspection, lambda: next(reports))
    assert modes(folder) == [0o700, 0o600]
    assert await ask() == [{"number": 1}]
    assert [len(str(report)) > 3_000_000 for report in await ask()] == [True]


async def test_the_socket_goes_with_the_node(folder: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_inspection, dict)
        assert await ask() == [{}]
        nursery.cancel_scope.cancel()
    assert modes(folder) == [0o700] and await ask() == []


async def test_a_report_that_fails_does_not_end_the_node(folder: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    reports = iter([lambda: 1 / 0, lambda: {"well": True}])
    await nursery.start(serve_inspection, lambda: next(reports)())  # type: ignore[arg-type,return-value]
    assert await ask() == []
    assert await ask() == [{"well": True}]
    assert "ZeroDivisionError" in caplog.text


async def test_nodes_that_were_killed_or_hang_are_passed_over(folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "ANSWER_WITHIN_S", 0.2)
    await nursery.start(serve_inspection, lambda: {"alive": True})
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind("1.sock")  # never listened on, as after a kill
    (folder / "3.sock").write_text("no socket at all")
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind("2.sock")
        hanging.listen()
        assert await ask() == [{"alive": True}]
    assert len(modes(folder)) == 3  # the folder, and the sockets that somebody listens on


async def test_a_node_that_starts_clears_away_what_killed_ones_left(
    folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as other:
        await other.start(serve_inspection, dict)
        monkeypatch.chdir(folder)
        with socket.socket(socket.AF_UNIX) as killed, socket.socket(socket.AF_UNIX) as running:
            killed.bind("1.sock")
            running.bind("2.sock")
            running.listen()
            await nursery.start(serve_inspection, dict)
            assert len(modes(folder)) == 3  # the folder, the running one's and ours
        other.cancel_scope.cancel()


async def test_a_reader_that_does_not_read_is_given_up(
    autojump_clock: trio.testing.MockClock, folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nursery.start(serve_inspection, lambda: {"large": "x" * 3_000_000})
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as lazy:
        lazy.connect(f"{os.getpid()}.sock")
        lazy.sendall(b"report\n")
        await trio.sleep(10)
        assert len(b"".join(iter(lambda: lazy.recv(1 << 20), b""))) < 3_000_000


async def test_a_folder_that_cannot_be_used_is_told_and_nothing_more(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file")
    monkeypatch.setenv("PETALNET_STATE_DIR", str(tmp_path / "state"))
    await nursery.start(serve_inspection, dict)
    assert "will not see this node" in caplog.text
    assert await ask() == []


async def test_a_node_is_told_to_drain_and_says_what_it_waits_for(folder: Path, nursery: trio.Nursery) -> None:
    told: list[None] = []

    def drain() -> dict[str, object]:
        told.append(None)
        return {"sessions": 3, "within_s": 30.0}

    await nursery.start(partial(serve_inspection, drain=drain), lambda: {"well": True})
    assert await ask() == [{"well": True}] and not told
    assert await trio.to_thread.run_sync(ask_to_drain, os.getpid()) == {"sessions": 3, "within_s": 30.0}
    assert len(told) == 1


async def test_a_node_that_cannot_be_told_to_drain(folder: Path, nursery: trio.Nursery) -> None:
    """It is gone, or it is no node that drains, or it answers nonsense."""
    with pytest.raises(PetalnetError, match="could not be told to drain"):
        await trio.to_thread.run_sync(ask_to_drain, os.getpid())
    await nursery.start(serve_inspection, dict)
    with pytest.raises(PetalnetError, match="could not be told to drain"):
        await trio.to_thread.run_sync(ask_to_drain, os.getpid())


async def test_who_asks_for_something_else_gets_nothing(folder: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    await nursery.start(serve_inspection, lambda: {"well": True})
    monkeypatch.chdir(folder)
    for words in (b"open the door\n", b"x" * 100_000, b""):
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(f"{os.getpid()}.sock")
            with contextlib.suppress(BrokenPipeError):
                asking.sendall(words)
                asking.shutdown(socket.SHUT_WR)
            asking.settimeout(2)
            with contextlib.suppress(ConnectionResetError):
                assert await trio.to_thread.run_sync(asking.recv, 10) == b""
    assert await ask() == [{"well": True}]
