"""Lists of peers as people give them: several in one value, in several values, or in files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from petalnet.errors import UsageError


def entries_of(values: Sequence[str], what: str) -> Iterator[tuple[str, str]]:
    """The entries of a list, each with what a message about it begins with: "" or the file and the line.

    A value is one entry, several of them separated by commas or blanks, or `@FILE`: a file with one a line, where `#` begins a comment.
    Raises UsageError where a file cannot be read.

    Args:
        what: what it is a list of, for that message.
    """
    for value in values:
        for text in re.split(r"[,\s]+", value.strip()):
            if text.startswith("@"):
                yield from _read_file(Path(text[1:]).expanduser(), what)
            elif text:
                yield text, ""


def _read_file(path: Path, what: str) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UsageError(f"cannot read the list of {what} {path}: {reason}") from error
    for number, line in enumerate(lines, 1):
        if entry := line.split("#", 1)[0].strip():
            yield entry, f"{path}, line {number}: "
