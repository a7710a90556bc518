"""A file of the weight cache while it is being filled: which of its bytes are there, noted beside it so that a kill loses little."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

INCOMPLETE, PROGRESS = ".incomplete", ".progress"
NOTE_BYTES = 32 * 1024 * 1024
"""What is fetched is forced onto the disk, and noted, once it is this much: the most that is fetched again after a kill."""

Range = tuple[int, int]


class Filling:
    """A file of the cache while this process fills it.

    Attributes:
        path: where to write, at any place of the file, which has its full size from the start. Of a file that was whole already, that one.
        size: of the file in bytes.
    """

    def __init__(self, path: Path, size: int, *, whole: bool) -> None:
        self.size = size
        self._final = path
        self._progress = beside(path, PROGRESS)
        self._unsaved: list[Range] = []
        self.path = path if whole else beside(path, INCOMPLETE)
        self._done: list[Range] = [(0, size)] if whole else []
        if not whole:
            with self.path.open("ab") as stream:
                if stream.tell() != size:
                    stream.truncate(0)
                    stream.truncate(size)
                    self._progress.unlink(missing_ok=True)
            self._done = merged(read_progress(self._progress, size))

    @property
    def done(self) -> tuple[Range, ...]:
        """Ranges [start, end) of bytes that are there, in order and apart; of a file that was begun before, what was there then too."""
        return tuple(self._done)

    @property
    def lacking(self) -> tuple[Range, ...]:
        """Ranges [start, end) of bytes that are not there yet, in order."""
        edges = [0, *(edge for ran in self._done for edge in ran), self.size]
        return tuple((start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end > start)

    def note(self, start: int, end: int) -> None:
        """Bytes [start, end) have been written. They count after a kill, too, once enough have come together."""
        self._done = merged([*self._done, (start, end)])
        self._unsaved = merged([*self._unsaved, (start, end)])
        if sum(end - start for start, end in self._unsaved) >= NOTE_BYTES:
            self._save()

    def commit(self) -> Path:
        """The file is whole: put it in its place, which is returned.

        Raises:
            ValueError: it is not.
        """
        if self.path == self._final:
            return self._final
        if self.lacking:
            raise ValueError(f"bytes {self.lacking[0]} of {self._final.name} are not there yet")
        _force_to_disk(self.path)
        self.path.replace(self._final)
        self._progress.unlink(missing_ok=True)
        self._unsaved = []
        self.path = self._final
        return self._final

    def close(self) -> None:
        """Note what was written since the last note, so that it counts later on; what cannot be noted is fetched again."""
        if self._unsaved and self.path.exists():
            with contextlib.suppress(OSError):
                self._save()

    def _save(self) -> None:
        """What the notes say has to be on the disk before they are: else a power failure leaves zeros that count as weights."""
        _force_to_disk(self.path)
        with self._progress.open("a") as stream:
            stream.writelines(f"{start} {end}\n" for start, end in self._unsaved)
        self._unsaved = []


def beside(path: Path, ending: str) -> Path:
    """The file of the same name with an ending."""
    return path.with_name(path.name + ending)


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as ranges that are in order and apart."""
    result: list[Range] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif end > start:
            result.append((start, end))
    return result


def read_progress(path: Path, size: int) -> list[Range]:
    """What a process noted before it ended; a line that was not written to its end, or that makes no sense, does not count."""
    text = path.read_text(errors="replace") if path.exists() else ""
    found = (re.fullmatch(r"(\d{1,18}) (\d{1,18})\n", line, re.ASCII) for line in text.splitlines(keepends=True))
    ranges = [(int(match[1]), int(match[2])) for match in found if match]
    return [(start, end) for start, end in ranges if start < end <= size]


def _force_to_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
