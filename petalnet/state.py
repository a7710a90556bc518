"""What a node leaves on disk while it runs: its ready file, the client daemon's state, and which key it holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from petalnet.config import state_dir
from petalnet.errors import UsageError

logger = logging.getLogger(__name__)

MAX_NODES_OF_A_NAME = 1000


def write_json(path: Path, content: Mapping[str, Any], *, mode: int = 0o644) -> None:
    """Put `content` at `path` in one step: a reader sees the old file or the new one, never a part.

    Raises:
        UsageError: the file cannot be written.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.chmod(name, mode)
        os.replace(name, path)
    except OSError as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


class KeptFile:
    """A file that a running node keeps up to date. Where it cannot be written, as on a full disk, that is told once and the node goes on.

    Args:
        path: where it lies.
        without: what the node cannot do without it, for a person.
        mode: its permissions.
    """

    def __init__(self, path: Path, without: str, *, mode: int = 0o600) -> None:
        self.path = path
        self._without = without
        self._mode = mode
        self._complained = False

    def write(self, content: Mapping[str, Any]) -> bool:
        """Put `content` there, and say whether that worked."""
        try:
            write_json(self.path, content, mode=self._mode)
        except UsageError as error:
            if not self._complained:
                self._complained = True
                logger.warning("%s: %s", self._without, error)
            return False
        self._complained = False
        return True


def require_writable(path: Path) -> None:
    """Raises UsageError where `write_json` could not put a file there: known at the start, not when everything is loaded."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def remove_own_json(path: Path) -> None:
    """Remove a file that `write_json` wrote with our "pid" in it; another process's is left alone."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text(encoding="utf-8")).get("pid") == os.getpid():
            path.unlink()


@contextmanager
def claim_identity_path(name: str) -> Iterator[Path]:
    """The key file in the state folder for a node of this name, ours alone until the context ends.

    A second node of the same name on this machine gets the next number, so that both keep their identity over restarts.

    Raises:
        UsageError: the state folder cannot be written.
    """
    folder = state_dir()
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or "node"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in range(1, MAX_NODES_OF_A_NAME):
            path = folder / (f"{stem}.key" if number == 1 else f"{stem}-{number}.key")
            with path.with_suffix(".lock").open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield path
                return
    except OSError as error:
        raise UsageError(f"cannot use the state folder {folder}: {error.strerror or error}") from error
    raise UsageError(f"{MAX_NODES_OF_A_NAME} nodes named {stem} run on this machine; give one --identity-path of its own")
