"""How a node gets into its swarm, and whom it lets in, as settings say it: the swarm's key and lists of peer ids.

Values only, free of libp2p: what they do to a connection is decided in `admission`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from petalnet.errors import UsageError
from petalnet.p2p.lists import entries_of
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

    An entry is a peer id or a multiaddr that ends in one; see `entries_of`. Raises UsageError, whose one line names the text that is
    wrong.
    """
    return frozenset(_peer_id(text, where) for text, where in entries_of(values, "peer ids"))


def _peer_id(text: str, where: str) -> str:
    from petalnet.p2p.identity import public_key_bytes  # slow to import, and needed only where somebody names peers

    peer_id = text.rpartition("/p2p/")[2]
    if public_key_bytes(peer_id) is None:
        raise UsageError(f"{where}{text[:120]!r} is not a peer id; it should look like 12D3Koo…, as `petalnet peers` shows it")
    return peer_id
