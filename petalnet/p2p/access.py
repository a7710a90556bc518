"""How a node gets into its swarm, and whom it lets in, as settings say it: the swarm's key and lists of peer ids.

Values only, free of libp2p: what they do to a connection is decided in `admission`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from petalnet.errors import UsageError
from petalnet.p2p.swarm_key import SwarmKey


@dataclass(frozen=True)
class Access:
    """See the module's docstring.

    Attributes:
        swarm_key: the key of the private swarm; None for an open one.
        allowed: ids of the only peers that may be connected; None for no such restriction.
        blocked: ids of peers that may not be connected, allowed or not.
    """

    swarm_key: SwarmKey | None = None
    allowed: frozenset[str] | None = None
    blocked: frozenset[str] = frozenset()


def read_peer_ids(values: Sequence[str]) -> frozenset[str]:
    """The peer ids that `values` name.

    A value is one peer id or a multiaddr that ends in one, several of them separated by commas or blanks, or `@FILE`: a file with one a
    line, where `#` begins a comment. Raises UsageError, whose one line names the text that is wrong.
    """
    return frozenset(peer_id for value in values for peer_id in _read_value(value))


def _read_value(value: str) -> Iterator[str]:
    for text in re.split(r"[,\s]+", value.strip()):
        if text.startswith("@"):
            yield from _read_file(Path(text[1:]).expanduser())
        elif text:
            yield _peer_id(text, "")


def _read_file(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UsageError(f"cannot read the list of peer ids {path}: {reason}") from error
    for number, line in enumerate(lines, 1):
        if entry := line.split("#", 1)[0].strip():
            yield _peer_id(entry, f"{path}, line {number}: ")


def _peer_id(text: str, where: str) -> str:
    from petalnet.p2p.identity import public_key_bytes  # slow to import, and needed only where somebody names peers

    peer_id = text.rpartition("/p2p/")[2]
    if public_key_bytes(peer_id) is None:
        raise UsageError(f"{where}{text[:120]!r} is not a peer id; it should look like 12D3Koo…, as `petalnet peers` shows it")
    return peer_id
