"""A folder that holds a whole model or none: what is written into it counts only when all of it is there.

Files are made in a hidden folder inside of it, and moved when all are on the disk; the configuration comes last, without which neither
petalnet nor the library takes a folder for a model. So a folder may be a mount point or the current one, and whatever a killed program
leaves is no model; the next one clears it away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from rich.filesize import decimal

from petalnet.errors import PetalnetError, UsageError
from petalnet.models.manifest import MANIFEST_FILE

UNFINISHED = ".unfinished"
"""Name of the hidden folder."""
CONFIG_FILE = "config.json"
MODEL_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *(CONFIG_FILE, "generation_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json"),
    *("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "tekken.json", "chat_template*"),
    MANIFEST_FILE,
)
"""Names of files that make a folder, or a repository, a model. Those of another one would be read beside the new ones, or instead."""


@contextmanager
def unfinished(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder to write a model's files into, which are in `folder` when the context ends well. After an error, `folder` is as before.

    Args:
        folder: is made where it is not there.
        replace: whether it may hold something; then the model's files in it are replaced in the end, and others are left alone.

    Raises:
        UsageError: `folder` holds something, is no folder, or another process is writing into it.
        PetalnetError: the disk is full, or the folder cannot be written.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            held = sorted(path.name for path in folder.iterdir() if path.name != UNFINISHED)
            if held and not replace:
                raise UsageError(f"{folder} holds something ({held[0]} …): name another folder, or replace the model in it with --force")
            temporary = folder / UNFINISHED
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                yield temporary
                _move(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                if made:
                    with contextlib.suppress(OSError):  # it holds a model now
                        folder.rmdir()
    except OSError as error:
        raise write_error(folder, error) from error


def write_error(folder: Path, error: OSError) -> PetalnetError:
    """What to tell a person whose folder could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PetalnetError(f"the disk of {folder} is full: make room there, or name a folder on another disk; nothing was left there")
    if isinstance(error, NotADirectoryError | FileExistsError):
        return UsageError(f"{folder} is no folder: name another one")
    return PetalnetError(f"{folder} cannot be written: {error.strerror or error}")


def require_room(folder: Path, nbytes: int) -> None:
    """Raises PetalnetError where the disk of a folder, which need not be there yet, has not so many bytes to spare."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise PetalnetError(
            f"writing the model needs {decimal(nbytes)} of room, and the disk of {folder} has {decimal(free)} left: make room there, or "
            "name a folder on another disk"
        )


def is_of_model(name: str) -> bool:
    """Whether a file of this name is one of those that make a folder a model."""
    return any(fnmatch(name, pattern) for pattern in MODEL_PATTERNS)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock of the folder, which ends with the process at the latest."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks; two at a time are then left to their users
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"another process is writing into {folder}: wait until it has ended") from error
        yield
    finally:
        os.close(handle)


def _move(temporary: Path, folder: Path) -> None:
    """The files of one folder into another on the same disk, in place of the model that was there; the configuration last."""
    new = sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG_FILE)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if is_of_model(path.name) and path.is_file():
            path.unlink()
    for path in new:
        path.replace(folder / path.name)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
