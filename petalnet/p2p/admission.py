"""Who may be connected to this node: holders of the swarm's key, and peers that no list and no ban keeps away.

A connection passes four gates, each on both sides, before anything is served on it:

1. *The name of the secure channel.* In a private swarm it is negotiated under a name of its own, so a node without a key, or any other
   libp2p peer, is told "not available" before the handshake begins, and learns nothing else.
2. *The handshake.* The key is mixed into it from the first message on (`handshake_key`, Noise's psk0), so somebody who knows the name but
   not the key cannot even read the peer id of whom it has reached.
3. *The peer's id*, as soon as the handshake has proved it: `Admission.check`. Before a dial too, where the id is known.
4. *The key*, proved inside the channel: `Admission.prove`. The initiator sends HMAC(key, role, handshake hash); only if that holds does the
   responder answer with its own. The hash covers both sides' ephemeral and static keys, so a proof is worth nothing on any other
   connection: it can be neither replayed nor passed on by somebody in the middle, and the role keeps it from being sent back. This is
   where both sides know that the other one has the key, whatever a library made of the handshake.

The key itself never travels, and 32 random bytes cannot be guessed from a proof. Whoever fails is disconnected without a word; what a
person reads on either side is made here, from what that side knows.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterator
from typing import Protocol

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.transport.exceptions import MuxerUpgradeFailure, SecurityUpgradeFailure

from petalnet.errors import NotAdmitted
from petalnet.p2p.offences import Offences
from petalnet.p2p.swarm_key import SwarmKey

PRIVATE_NOISE_ID = "/petalnet/private-noise/1.0.0"
PROOF_SIZE = 32
_PURPOSE = {True: b"petalnet swarm proof 1: initiator", False: b"petalnet swarm proof 1: responder"}
AWAY_S = 60.0
"""For which a peer that was turned away is not connected again: it may have been updated by then, under the same id."""
MOST_REFUSALS = 64
"""Refusals that are remembered for whoever has to tell a person why nobody was reached."""


class Channel(Protocol):
    """What `prove` needs of a secure channel; `NoiseSession` is one."""

    def get_remote_peer(self) -> ID:
        """The other side, as the handshake proved it."""

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or fewer where the connection ends before."""

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""


class Admission:
    """The rules of one node, and what has come of them.

    Attributes:
        security_id: the name under which secure channels are negotiated.
        handshake_key: what is mixed into the handshake, 32 bytes made from the swarm's key; None in an open swarm.
        offences: the peers that broke rules lately, on trio's clock.
        refusals: for peers that this node dialled, why they or it refused; the latest ones only.
    """

    def __init__(
        self,
        *,
        swarm_key: SwarmKey | None = None,
        allowed: Collection[str] | None = None,
        blocked: Collection[str] = (),
        offences: Offences | None = None,
    ) -> None:
        """
        Args:
            swarm_key: the key of the private swarm; None for an open one.
            allowed: ids of the only peers that are admitted; None for no such restriction.
            blocked: ids of peers that are never admitted, allowed or not.
            offences: where offences are counted.
        """
        self.security_id = str(NOISE_ID) if swarm_key is None else PRIVATE_NOISE_ID
        self.handshake_key = None if swarm_key is None else swarm_key.tag(b"petalnet swarm handshake 1", b"")
        self.offences = Offences() if offences is None else offences
        self.refusals: dict[str, NotAdmitted] = {}
        self._turned_away: dict[str, tuple[NotAdmitted, float]] = {}
        self._key = swarm_key
        self._allowed = None if allowed is None else frozenset(allowed)
        self._blocked = frozenset(blocked)

    def check(self, peer_id: str) -> None:
        """Raise NotAdmitted where this node wants no connection with a peer."""
        if peer_id in self._blocked:
            raise NotAdmitted(f"peer {peer_id} is blocked by this node's --block-peers", peer_id)
        if self._allowed is not None and peer_id not in self._allowed:
            raise NotAdmitted(f"peer {peer_id} is not among this node's --allow-peers", peer_id)
        refusal, until = self._turned_away.get(peer_id, (None, 0.0))
        if refusal is not None and trio.current_time() < until:
            raise NotAdmitted(str(refusal), peer_id)
        banned_until = self.offences.banned_until(peer_id, trio.current_time())
        if banned_until is not None:
            left = banned_until - trio.current_time()
            raise NotAdmitted(f"peer {peer_id} broke the rules of the protocol and is kept away for another {left:.0f} s", peer_id)

    def check_dial(self, peer_id: str) -> None:
        """As `check`, for a peer that this node is about to dial: the refusal is remembered."""
        try:
            self.check(peer_id)
        except NotAdmitted as refusal:
            self._remember(peer_id, refusal)
            raise

    def turn_away(self, peer_id: str, why: str) -> bool:
        """Keep a peer away for a while that has nothing to do here; False where it was turned away for the same reason before."""
        known = self._turned_away.pop(peer_id, None)
        refusal = NotAdmitted(why, peer_id)
        self._turned_away[peer_id] = refusal, trio.current_time() + AWAY_S
        while len(self._turned_away) > MOST_REFUSALS:
            del self._turned_away[next(iter(self._turned_away))]
        self._remember(peer_id, refusal)
        return known is None or str(known[0]) != why

    def offend(self, peer_id: str, weight: float = 1.0) -> bool:
        """Note that a peer broke a rule; True where it is to be dropped now."""
        return self.offences.add(peer_id, trio.current_time(), weight)

    async def prove(self, session: Channel, handshake_hash: bytes, *, initiator: bool) -> None:
        """Exchange proofs of the swarm's key over a channel whose handshake is done; nothing is sent in an open swarm.

        The caller sets a deadline, and ends the connection where this raises.

        Args:
            handshake_hash: of this channel's handshake; the same bytes on both sides.
            initiator: whether this side began the handshake.
        Raises:
            NotAdmitted: the peer does not have the key, or ended the connection instead of proving it.
        """
        if self._key is None:
            return
        peer_id = str(session.get_remote_peer())
        proof, expected = (self._key.tag(_PURPOSE[role], handshake_hash) for role in (initiator, not initiator))
        refusal = self.refused_by(peer_id) if initiator else NotAdmitted(f"peer {peer_id} did not prove the swarm's key", peer_id)
        try:
            if initiator:
                await session.write(proof)
            answer = await session.read(PROOF_SIZE)
            if hmac.compare_digest(answer, expected) and not initiator:
                await session.write(proof)
        except (BaseLibp2pError, OSError) as error:
            raise refusal from error
        if not hmac.compare_digest(answer, expected):
            raise refusal

    @staticmethod
    def refused_by(peer_id: str) -> NotAdmitted:
        """What is known where a peer of a private swarm goes away in the middle: it does not say why."""
        why = "it has another swarm key, or its lists of peers keep this node out"
        return NotAdmitted(f"peer {peer_id} refused this node: {why}", peer_id)

    def explain(self, peer_id: str, error: BaseException) -> NotAdmitted | None:
        """Why a dial of ours failed, where admission is the reason; remembered in `refusals`."""
        found = self._reason(peer_id, error)
        if found is not None:
            self._remember(peer_id, found)
        return found

    def _remember(self, peer_id: str, refusal: NotAdmitted) -> None:
        self.refusals.pop(peer_id, None)
        self.refusals[peer_id] = refusal
        while len(self.refusals) > MOST_REFUSALS:
            del self.refusals[next(iter(self.refusals))]

    def _reason(self, peer_id: str, error: BaseException) -> NotAdmitted | None:
        securing = secured = False
        for cause in _causes(error):
            if isinstance(cause, NotAdmitted):
                return cause
            securing = securing or isinstance(cause, SecurityUpgradeFailure)
            secured = secured or isinstance(cause, MuxerUpgradeFailure)
            if secured and isinstance(cause, ConnectionClosedError):
                why = "it does not admit this node, or has no room"
                return NotAdmitted(f"peer {peer_id} ended the connection right after the handshake: {why}", peer_id)
            if securing and isinstance(cause, MultiselectClientError) and "not supported" in str(cause):
                if self._key is None:
                    return NotAdmitted(f"peer {peer_id} is in a private swarm: give its key with --swarm-key FILE (swarm_key=)", peer_id)
                return NotAdmitted(f"peer {peer_id} is in no private swarm: leave out the swarm key (--swarm-key none)", peer_id)
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
