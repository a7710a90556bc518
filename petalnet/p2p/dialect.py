"""Which version of petalnet's protocols a peer speaks, by the names of what it serves. Pure.

Peers of one version understand each other, whatever their releases: `version.PROTOCOL` says when it grows. A petalnet node of another
version is told from a program of somebody else's, which is left in peace, and is refused in words that say who has to be updated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from petalnet.version import PROTOCOL, __version__

_OURS = re.compile(r"/petalnet/[a-z-]{1,40}/(\d{1,4})\.\d{1,4}\.\d{1,4}")


def foreign_version(protocols: Iterable[str]) -> int | None:
    """The newest version that a petalnet node of other versions than ours speaks; None where it speaks ours, or is no petalnet node.

    Args:
        protocols: the names of all protocols that it serves.
    """
    versions = {int(match[1]) for name in protocols if (match := _OURS.fullmatch(name))}
    return max(versions) if versions and PROTOCOL not in versions else None


def describe_foreign(peer_id: str, version: int) -> str:
    """One line for a person whose node met such a peer."""
    whose = "that peer has" if version < PROTOCOL else "this machine has"
    return (
        f"peer {peer_id} speaks version {version} of petalnet's protocols, this node (petalnet {__version__}) version {PROTOCOL}: "
        f"{whose} to be updated"
    )
