"""What each peer has had of the device, so that whoever has had least is served first: start-time fair queueing.

Each peer has a virtual time that advances by the seconds of computation that it gets. Who comes anew, or was away, starts where the least
of those present is: what nobody competed for is not held against anybody, and nobody saves up for later. Idle time forgives.

Peer ids cost nothing, addresses do. So public networks (see `p2p.sources`) have shares as well, and these come first: one with any number
of peers gets no more than a few of them would. Between the peers of a network their own shares decide.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

KNOWN_NETWORKS, KNOWN_PEERS = 1024, 128
"""Networks, and peers of each, that are absent and remembered all the same, for what they have had beyond others."""
PEERS_OF_A_NETWORK = 4
"""A network whose peers compete gets as much as so many of them at most: several people may share an address."""


@dataclass(eq=False)
class Share:
    """One peer's, or one network's.

    Attributes:
        used: virtual time, seconds.
        since: when it came, or was last served.
        tasks: how many of its tasks are here.
    """

    used: float
    since: float
    tasks: int = 0

    def behind(self, now: float) -> float:
        """The least is served first. Time without service counts in a peer's favour, so that no stream of newcomers starves it."""
        return self.used - (now - self.since)

    def charge(self, seconds: float, now: float) -> None:
        """It got so much computation, until now."""
        self.used += seconds
        self.since = now


class Level:
    """The shares of all who compete with each other: of networks, or of one network's peers."""

    def __init__(self, known: int) -> None:
        """
        Args:
            known: how many that are absent are remembered.
        """
        self._known = known
        self._shares: dict[str, Share] = {}
        self.competing = 0  # those who have tasks here
        self._virtual = 0.0  # where whoever comes begins
        self._present = 0
        self._idle_since = 0.0

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._shares)

    def __contains__(self, name: str) -> bool:
        return name in self._shares

    def enter(self, name: str, now: float) -> Share:
        """A task of this one has come."""
        if not self._present:
            self._virtual += max(0.0, now - self._idle_since)
        self._present += 1
        share = self._shares.get(name)
        if share is None:
            if len(self._shares) >= self._known:
                self._forget()
            share = self._shares[name] = Share(self._virtual, now)
        if not share.tasks:
            share.used, share.since = max(share.used, self._virtual), now
            self.competing += 1
        share.tasks += 1
        return share

    def leave(self, share: Share, now: float) -> None:
        """One of its tasks is complete or gone."""
        share.tasks -= 1
        self.competing -= not share.tasks
        self._present -= 1
        if not self._present:
            self._idle_since = now

    def serve(self, present: Iterable[Share]) -> None:
        """Somebody of those present is served now."""
        self._virtual = max(self._virtual, min((share.used for share in present), default=0.0))

    def _forget(self) -> None:
        """Make room: who is absent and has had no more than others goes first; then all who are absent, since names cost nothing."""
        owing = {name: share for name, share in self._shares.items() if share.tasks or share.used > self._virtual}
        present = {name: share for name, share in self._shares.items() if share.tasks}
        self._shares = owing if len(owing) < self._known else present


@dataclass(eq=False, slots=True)
class Claim:
    """What decides when a task is served.

    Attributes:
        network, peer: the shares of those who ask.
        peers: the shares of all peers of the network.
    """

    network: Share
    peer: Share
    peers: Level


class Shares:
    """The shares of all networks and peers in one kind of work."""

    def __init__(self) -> None:
        self._networks = Level(KNOWN_NETWORKS)
        self._peers: dict[str, Level] = {}  # of each network

    def __len__(self) -> int:
        """Peers that are remembered."""
        return sum(map(len, self._peers.values()))

    def enter(self, peer: str, now: float, network: str = "") -> Claim:
        """A task of this peer has come, from this network; "": the peer counts as one by itself."""
        network = network or peer
        its_share = self._networks.enter(network, now)
        peers = self._peers.get(network)
        if peers is None:
            if len(self._peers) >= 2 * KNOWN_NETWORKS:
                self._peers = {name: level for name, level in self._peers.items() if name in self._networks}
            peers = self._peers[network] = Level(KNOWN_PEERS)
        return Claim(its_share, peers.enter(peer, now), peers)

    def leave(self, claim: Claim, now: float) -> None:
        """One of a peer's tasks is complete or gone."""
        self._networks.leave(claim.network, now)
        claim.peers.leave(claim.peer, now)

    def serve(self, present: Collection[Claim]) -> None:
        """Somebody of those present is served now."""
        self._networks.serve(claim.network for claim in present)
        levels: dict[Level, list[Share]] = {}
        for claim in present:
            levels.setdefault(claim.peers, []).append(claim.peer)
        for level, shares in levels.items():
            level.serve(shares)

    @staticmethod
    def charge(claim: Claim, seconds: float, now: float) -> None:
        """A peer got so much computation, until now."""
        claim.peer.charge(seconds, now)
        claim.network.charge(seconds / min(max(claim.peers.competing, 1), PEERS_OF_A_NETWORK), now)
