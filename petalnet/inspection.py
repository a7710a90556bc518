"""What a running node tells programs of its own user, and does for them: a Unix socket in the state folder, one a node, that nobody else
can open. Nothing listens on the network.

Whoever connects says in one line what it wants, and gets one JSON document and the end of the stream:

- `report`: what the node does. `petalnet peers` reads it.
- `drain`: the node is told to drain and end, as by SIGTERM, and says what it waits for. `petalnet drain` does that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import trio

from petalnet.config import state_dir
from petalnet.errors import PetalnetError

logger = logging.getLogger(__name__)

ANSWER_WITHIN_S = 3.0
"""For both sides: a node whose loop hangs, and a reader that does not read."""
MOST_BYTES = 64 * 1024 * 1024
MOST_WORDS = 64
"""Bytes of the line that says what is wanted."""
ENDS_WITHIN_S = 15.0
"""Seconds for a node to be gone when the time for its sessions is over."""

Answer = Callable[[], dict[str, Any]]


async def serve_inspection(
    report: Answer, *, drain: Answer | None = None, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer whoever connects, until cancelled. A node that cannot have its socket goes on without.

    Args:
        report: what the node does, as JSON.
        drain: tells the node to drain and end, and returns what is waited for, as JSON; None where that cannot be asked for.
    """
    path = _folder() / f"{os.getpid()}.sock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for other in path.parent.glob("*.sock"):
            with contextlib.suppress(OSError):
                _connect(other).close()
        listening = _listen(path)
    except OSError as error:
        logger.warning("`petalnet peers` will not see this node: cannot make the socket %s: %s", path, error.strerror or error)
        task_status.started()
        return

    answers = {"report": report} if drain is None else {"report": report, "drain": drain}

    async def answer(stream: trio.SocketStream) -> None:
        try:
            with trio.move_on_after(ANSWER_WITHIN_S):
                async with stream:
                    if (found := answers.get(await _read_line(stream))) is not None:
                        await stream.send_all(json.dumps(found()).encode())
        except trio.BrokenResourceError:
            logger.debug("a program that asked about this node went away")
        except Exception:  # a defect in telling what the node does must not end what it does
            logger.exception("the report on this node failed")

    try:
        await trio.serve_listeners(answer, [trio.SocketListener(trio.socket.from_stdlib_socket(listening))], task_status=task_status)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def ask_nodes() -> list[dict[str, Any]]:
    """What the nodes of this user on this machine tell, those that answer in time, the longest running first."""
    found = []
    for path in sorted(_folder().glob("*.sock"), key=_made_at):
        try:
            found.append(_ask(path))
        except (ConnectionRefusedError, FileNotFoundError):
            logger.debug("the node of %s was killed, or has just ended", path)
        except (OSError, ValueError) as error:
            logger.warning("the node of %s does not answer: %s", path, error)
    return found


def ask_to_drain(pid: int) -> dict[str, Any]:
    """Tell a node of this user to drain and end; what it answers: "sessions" that are waited for, and "within_s" for how long.

    Raises:
        PetalnetError: the node is not there, or does not do it.
    """
    try:
        answer = _ask(_folder() / f"{pid}.sock", "drain")
        return {"sessions": int(answer["sessions"]), "within_s": float(answer["within_s"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PetalnetError(f"the node of pid {pid} could not be told to drain: {error}") from error


def await_end(pid: int, within_s: float) -> bool:
    """Whether a process on this machine has ended, after waiting for that for so many seconds at most."""
    deadline = time.monotonic() + within_s
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:  # whose parent has not asked yet how it ended
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


async def _read_line(stream: trio.SocketStream) -> str:
    """What whoever connects wants; of what is too long, the beginning."""
    line = bytearray()
    while b"\n" not in line and len(line) < MOST_WORDS and (more := await stream.receive_some(MOST_WORDS)):
        line += more
    return line.partition(b"\n")[0].decode("ascii", "replace")


def _folder() -> Path:
    return state_dir() / "nodes"


def _made_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _listen(path: Path) -> socket.socket:
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unready = path.with_suffix(".new")
    try:
        unready.unlink(missing_ok=True)  # of a process that had our number and was killed
        with _short(unready) as name:
            opened.bind(name)
        unready.chmod(stat.S_IRUSR | stat.S_IWUSR)
        opened.listen()
        opened.setblocking(False)
        unready.replace(path)  # found only now: a socket that nobody listens on is taken for one of a killed node
    except OSError:
        opened.close()
        raise
    return opened


def _connect(path: Path) -> socket.socket:
    """A connection to a node's socket, which is removed where its node is gone. Raises OSError."""
    asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    asking.settimeout(ANSWER_WITHIN_S)
    try:
        with _short(path) as name:
            asking.connect(name)
    except OSError as error:
        asking.close()
        if isinstance(error, ConnectionRefusedError):  # nobody listens any more
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return asking


def _ask(path: Path, wanted: str = "report") -> dict[str, Any]:
    with _connect(path) as asking:
        asking.sendall(f"{wanted}\n".encode())
        data = bytearray()
        while len(data) < MOST_BYTES and (more := asking.recv(256 * 1024)):
            data += more
    report = json.loads(data)
    if not isinstance(report, dict):
        raise ValueError("it answers something else than it was asked for")
    return report


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for `path` that fits into a socket's address, whose length is bounded by about a hundred bytes."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = f"/proc/self/fd/{folder}/{path.name}"
        yield short if os.path.isdir(f"/proc/self/fd/{folder}") else str(path)
    finally:
        os.close(folder)
