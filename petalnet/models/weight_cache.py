"""Weights that were fetched, on this machine's disk, within a bound: what was used least recently makes room for what is needed.

Several nodes may use one cache at once. An entry is a file under its key; while it is being filled it has the ending `.incomplete`, and
beside it stands in `.progress` which of its bytes are there, so that whoever goes on after a kill does not begin anew. Two kinds of locks
keep processes apart: one for each key, held by whoever fills it (others wait, and then find it), and one for the cache as a whole, held
for moments while it is looked through. A process that gathers files for a load lists them in `use-….json`: those are never removed. The
list counts as long as its owner holds the lock of the same name, which ends with the process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from petalnet.errors import PetalnetError, UsageError
from petalnet.models.cachedir import cache_dir as own_cache_dir
from petalnet.models.filling import INCOMPLETE, PROGRESS, Filling, beside

logger = logging.getLogger(__name__)

FOLDER = "petalnet-weights"
"""Its name says whose it is, since it may stand in the folder of the hub's own cache."""
LOCK, USES = ".lock", "use-"
_KEY = re.compile(r"[0-9A-Za-z][\w\-]{0,199}", re.ASCII)


class WeightCache:
    """A folder of files that were fetched, which together take at most so many bytes.

    Args:
        folder: where they are; made if need be.
        most_bytes: the bound, or None for none but the disk.
    """

    def __init__(self, folder: Path, most_bytes: int | None) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self._uses: dict[str, set[str]] = {}

    def find(self, key: str) -> Path | None:
        """The whole file of a key, which counts as used now; None where it is not there."""
        path = self._path(key)
        if not path.exists():
            return None
        with self._looking():
            try:
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            except FileNotFoundError:
                return None
            self._keep(key)
        return path

    @contextlib.contextmanager
    def filling(self, key: str, size: int) -> Iterator[Filling]:
        """The file of a key while it is being filled, by this process alone: another one waits here, and then finds it whole.

        Args:
            size: of the whole file, in bytes. Room for all of it is made at once.
        Raises:
            UsageError: there is no room for it, or it cannot be written; the message says what to do.
        """
        path = self._path(key)
        with _locked(beside(path, LOCK), waiting=f"another node on this machine is fetching {key}: waiting for it"):
            with self._looking():
                whole = path.exists()
                if not whole:
                    self._make_room(size, key)
                self._keep(key)
            try:
                filling = Filling(path, size, whole=whole)
                try:
                    yield filling
                finally:
                    filling.close()
            except OSError as error:
                if isinstance(error, PetalnetError):
                    raise
                raise write_error(self.folder, error) from error

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Within this, whatever this cache's object finds or fills stays on the disk. To be used around a load; several may overlap."""
        name = f"{USES}{uuid.uuid4().hex}"
        self._make_folder()
        with _locked(self.folder / f"{name}{LOCK}"):
            self._uses[name] = set()
            try:
                yield
            finally:
                with self._looking():
                    del self._uses[name]
                    for ending in (".json", LOCK):
                        (self.folder / f"{name}{ending}").unlink(missing_ok=True)
                    self._trim()

    def require(self, nbytes: int) -> None:
        """Raises UsageError where so many bytes are more than the cache may ever hold."""
        if self.most_bytes is not None and nbytes > self.most_bytes:
            raise UsageError(
                f"--max-disk-space: what is to be loaded takes {readable(nbytes)} on the disk, and {readable(self.most_bytes)} are "
                "allowed: raise it, or serve fewer blocks"
            )

    def discard(self, key: str) -> None:
        """Remove a file that turned out to be damaged, unless somebody is filling it."""
        with self._looking():
            self._remove(key)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key) or key.startswith(USES):
            raise ValueError(f"{key!r} cannot be the key of a file")
        self._make_folder()
        return self.folder / key

    def _make_folder(self) -> None:
        """Raises UsageError where fetched files cannot be kept there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.folder, error) from error

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Nobody else adds or removes entries meanwhile."""
        with _locked(self.folder / LOCK):
            yield

    def _keep(self, key: str) -> None:
        for name, keys in self._uses.items():
            if key not in keys:
                keys.add(key)
                temporary = self.folder / f"{name}.new"
                try:
                    temporary.write_text(json.dumps(sorted(keys)))
                    temporary.replace(self.folder / f"{name}.json")
                except OSError as error:
                    raise write_error(self.folder, error) from error

    def _make_room(self, size: int, key: str) -> None:
        """Remove what was used least recently until there is room for the file of a key. Raises UsageError where that is not enough."""
        self.require(size)
        others = [entry for entry in self._entries() if entry.key != key]
        there = _allocated(beside(self.folder / key, INCOMPLETE))
        promised = sum(entry.promised for entry in others)
        over_bound = 0 if self.most_bytes is None else sum(entry.nbytes for entry in others) + size - self.most_bytes
        over_disk = size - there + promised - shutil.disk_usage(self.folder).free
        room = max(over_bound, over_disk)
        lacking = room - sum(entry.nbytes for entry in others if not entry.needed)
        if lacking <= 0:
            self._free(others, room)
            return
        if over_disk >= over_bound:
            raise full_disk(self.folder, lacking)
        raise UsageError(
            f"--max-disk-space: there is no room for {readable(size)} more, all that is kept is needed by loads under way: raise it by "
            f"{readable(lacking)}, or serve fewer blocks"
        )

    def _trim(self) -> None:
        """Keep to a bound that may have been lower when the files were fetched."""
        if self.most_bytes is not None:
            entries = self._entries()
            self._free(entries, sum(entry.nbytes for entry in entries) - self.most_bytes)

    def _free(self, entries: Iterable[Entry], room: int) -> None:
        """Remove what was used least recently, as far as nobody needs it, until so many bytes are free."""
        for entry in least_recently_used(entries, room):
            logger.info("making room in %s: removing %s (%s)", self.folder, entry.key, readable(entry.nbytes))
            self._remove(entry.key)

    def _remove(self, key: str) -> None:
        path = self.folder / key
        lock = beside(path, LOCK)
        with contextlib.suppress(Timeout), _locked(lock, timeout=0):
            for file in (path, beside(path, INCOMPLETE), beside(path, PROGRESS), lock):
                file.unlink(missing_ok=True)

    def _entries(self) -> list[Entry]:
        needed = self._needed()
        entries: dict[str, Entry] = {}
        for path in self.folder.iterdir():
            if path.name.startswith((".", USES)) or path.suffix not in ("", INCOMPLETE):
                continue
            key = path.name.removesuffix(INCOMPLETE)
            status = _status(path)
            if status is None:  # it became whole just now
                path = self.folder / key
                status = _status(path)
            if status is None:
                continue
            if path.suffix == INCOMPLETE:
                filled = _is_held(beside(self.folder / key, LOCK))
                there = _allocated(path)
                size = max(status.st_size, there) if filled else there
                entries[key] = Entry(key, size, size - there, status.st_mtime_ns, filled or key in needed)
            else:
                entries[key] = Entry(key, status.st_size, 0, status.st_atime_ns, key in needed)
        return list(entries.values())

    def _needed(self) -> set[str]:
        """Keys that loads under way list, of any process; lists whose process is gone are removed."""
        needed: set[str] = set()
        for lock in self.folder.glob(f"{USES}*{LOCK}"):
            listed = lock.with_suffix(".json")
            if not _is_held(lock):
                for file in (listed, lock.with_suffix(".new"), lock):
                    file.unlink(missing_ok=True)
            else:
                with contextlib.suppress(OSError, ValueError):  # not written yet, or damaged
                    needed.update(json.loads(listed.read_text()))
        return needed


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        key: its key.
        nbytes: what it takes on the disk, or will take once it is filled.
        promised: how much of that is still to be written.
        used: when it was last used, in nanoseconds.
        needed: whether it must stay.
    """

    key: str
    nbytes: int
    promised: int
    used: int
    needed: bool


def least_recently_used(entries: Iterable[Entry], room: int) -> list[Entry]:
    """Which files to remove for so many bytes of room: those that nobody needs, the one used longest ago first."""
    chosen: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.used):
        if room <= 0:
            break
        if not entry.needed:
            chosen.append(entry)
            room -= entry.nbytes
    return chosen


def weight_cache(most_bytes: int | None, cache_dir: str | Path | None = None) -> WeightCache:
    """The cache of this machine, or the one in the folder that was given for files from the hub."""
    base = own_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    return WeightCache(base / FOLDER, most_bytes)


def full_disk(folder: Path, lacking: int | None = None) -> UsageError:
    """What to tell the person whose disk is full."""
    more = f": {readable(lacking)} more are needed" if lacking else ""
    return UsageError(f"the disk that {folder} is on is full{more}. Free some, or set PETALNET_CACHE_DIR to a folder on another disk")


def write_error(folder: Path, error: OSError) -> UsageError:
    """What to tell the person whose cache could not be written."""
    return full_disk(folder) if error.errno in (errno.ENOSPC, errno.EDQUOT) else _unusable(folder, error)


def _unusable(folder: Path, error: OSError) -> UsageError:
    reason = error.strerror or type(error).__name__
    return UsageError(f"what is fetched cannot be kept in {folder}: {reason}. Set PETALNET_CACHE_DIR to a folder of your own")


def readable(nbytes: int) -> str:
    """Bytes for people to read."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2f} MB"


def _allocated(path: Path) -> int:
    """Bytes that a file with holes takes on the disk."""
    status = _status(path)
    return 0 if status is None else status.st_blocks * 512  # the unit wherever there is one, whatever the file system's blocks are


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_held(lock: Path) -> bool:
    try:
        with _locked(lock, timeout=0):
            return False
    except Timeout:
        return True


@contextlib.contextmanager
def _locked(path: Path, *, timeout: float = -1, waiting: str = "") -> Iterator[None]:
    """Hold a lock. `waiting` is told once where somebody else holds it. Raises Timeout after `timeout` seconds, unless that is negative."""
    lock = FileLock(path, thread_local=False)
    try:
        try:
            lock.acquire(timeout=0 if waiting else timeout)
        except Timeout:
            if not waiting:
                raise
            logger.info("%s", waiting)
            lock.acquire(timeout=timeout)
    except PermissionError as error:
        raise _unusable(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()
