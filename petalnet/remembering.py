"""The file in which a node keeps the peers of its swarm, so that it finds back after a restart though its entries are gone.

It lies beside the node's key. It counts only for a start of the same kind: with one of the same initial peers (or again with none) and the
same swarm key; so whoever means another swarm gets that one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from petalnet.p2p.known_peers import KnownPeers
from petalnet.state import KeptFile

logger = logging.getLogger(__name__)

FIRST_AFTER_S = 5.0
STORE_EVERY_S = 60.0
MOST_BYTES = 256 * 1024
"""Several times what the file can hold; more is not read."""


class PeerFile:
    """The file of one node.

    Args:
        identity_path: where its key lies.
        initial_peers: by which it was told to join, full multiaddrs.
        swarm_key: the fingerprint of its swarm's key, None in an open swarm.

    Attributes:
        path: where the file lies.
        known: the peers.
    """

    def __init__(self, identity_path: Path, initial_peers: Sequence[str], swarm_key: str | None) -> None:
        self.path = identity_path.with_name(f"{identity_path.name.removesuffix('.key')}.peers")  # never the key's own
        self.known = KnownPeers()
        self._initial_peers = list(initial_peers)
        self._swarm_key = swarm_key
        self._stored = -1
        self._file = KeptFile(self.path, "this node's peers cannot be remembered for its next start")

    def load(self) -> None:
        """Take in what an earlier life of this node left; nothing where that was of another swarm, or cannot be read."""
        try:
            with self.path.open("rb") as file:
                content = json.loads(file.read(MOST_BYTES))
            same = not self._initial_peers and not content["initial_peers"] or set(self._initial_peers) & set(content["initial_peers"])
            if same and content["swarm_key"] == self._swarm_key:
                self.known.load(content["peers"], now=time.time())
                self._stored = self.known.version
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.info("the peers that were remembered in %s cannot be read: %s", self.path, error)

    def store(self) -> None:
        """Write the file where something has changed."""
        version = self.known.version
        content = {"initial_peers": self._initial_peers, "swarm_key": self._swarm_key, "peers": self.known.dump()}
        if version != self._stored and self._file.write(content):
            self._stored = version

    async def keep(self) -> None:
        """Keep the file up to date until cancelled."""
        await trio.sleep(FIRST_AFTER_S)
        while True:
            self.store()
            await trio.sleep(STORE_EVERY_S)
