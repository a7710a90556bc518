"""What has become of a step that is late: which servers of its chain are gone, and whether a link between two of them is cut.

A host answers pings whatever its compute thread does, and a session says how far it is (`AskProgress`) while a step is computed. So who
does not answer is gone, whoever computes is waited for, and where one server has sent a step on and the next, though it is there, has not
got it, the way between these two is cut. Asking changes nothing: a false alarm costs a few small messages.

Runs on the portal's thread, beside whoever reads the links' streams and notes what sessions answer (`Link.progress`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from petalnet.client.pipeline import Pending
from petalnet.client.requests import Target
from petalnet.errors import PetalnetError
from petalnet.p2p.fields import blob_size
from petalnet.p2p.session_messages import AskProgress, Progress

if TYPE_CHECKING:
    from petalnet.client.links import Link

logger = logging.getLogger(__name__)

CUT_AFTER = 1 / 3
"""Of the time within which hosts have to answer, the part in which a step that was sent on has to come to the next server."""
SLOW_LINK_BYTES_S = 250_000.0
"""Bytes a second of the slowest link that is waited for before it counts as cut: a poor uplink of 2 Mbit/s."""
WITNESSES = 3
"""Other peers that are asked as well: where nobody answers, it is this machine that has lost its network."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a chain, as far as it shows.

    Attributes:
        gone: hops, by their numbers in the chain, whose hosts do not answer.
        cut: the number of a hop that has done a step and sends it to the next one, which does not get it although both are there; None
            where all links do their work.
    """

    gone: frozenset[int] = frozenset()
    cut: int | None = None

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong but the time: somebody computes, or has others before it."""
        return not self.gone and self.cut is None


async def diagnose(target: Target, links: Sequence[Link], oldest: Pending, within_s: float) -> Diagnosis:
    """Ask the servers that may hold a step up. One at a time for the links of a chain.

    Args:
        links: of the whole chain, whose streams are read meanwhile.
        oldest: the first step that is under way.
        within_s: for hosts to answer. To be sure of a cut takes longer where the step is so long that its outputs may still be on the way.
    """
    host = target.swarm.membership.host
    suspects = {index: links[index].hop.peer_id for index in range(oldest.reached + 1, len(links))}
    others = sorted(set(host.connected_peers()) - set(suspects.values()))
    witnesses = random.sample(others, min(WITNESSES, len(others)))
    answered: set[str] = set()
    progress: dict[int, Progress] = {}

    async def ping(peer_id: str) -> None:
        try:
            await host.ping(peer_id, within_s)
        except PetalnetError as error:
            logger.debug("a step is late, and %s", error)
        else:
            answered.add(peer_id)

    async def ask(index: int) -> None:
        # A session answers as soon as its host does, or never, being of an older version: it is not waited for longer than that.
        with trio.move_on_after(within_s):
            if (found := await _progress(links[index])) is not None:
                progress[index] = found

    async with trio.open_nursery() as beside:
        for peer_id in witnesses:
            beside.start_soon(ping, peer_id)
        async with trio.open_nursery() as nursery:
            for peer_id in set(suspects.values()):
                nursery.start_soon(ping, peer_id)
            for index in range(max(oldest.reached, 0), len(links)):
                nursery.start_soon(ask, index)
        if answered:
            beside.cancel_scope.cancel()  # there is a network
    if witnesses and not answered:
        logger.info("a step is late, and no peer answers at all: this machine may have lost its network")
        return Diagnosis()
    gone = frozenset(index for index, peer_id in suspects.items() if peer_id not in answered)
    if gone or not target.settings.direct_chains:
        return Diagnosis(gone)
    step = oldest.request.step
    for index, before in progress.items():
        behind = progress.get(index + 1)
        is_carried = index in oldest.carried or index in oldest.onward
        # Long outputs may have been computed and not be sent as a whole where nobody takes them.
        if behind is not None and before.done >= step > behind.taken and not is_carried:
            return Diagnosis(cut=index if await _stays_away(links[index + 1], oldest, within_s) else None)
    return Diagnosis()


async def _stays_away(link: Link, oldest: Pending, within_s: float) -> bool:
    """Whether a step that was sent to a server is not there after a while either."""
    hidden = oldest.request.hidden
    await trio.sleep(within_s * CUT_AFTER + blob_size(hidden.dtype, hidden.shape, hidden.codec) / SLOW_LINK_BYTES_S)
    with trio.move_on_after(within_s):
        found = await _progress(link)
        return found is not None and found.taken < oldest.request.step
    return False


async def _progress(link: Link) -> Progress | None:
    """How far a server's session is; None where its stream has ended."""
    question = AskProgress(random.getrandbits(53))
    link.progress, link.has_progress = None, trio.Event()
    try:
        await link.stream.send(question)
        while True:
            await link.has_progress.wait()
            found: Progress | None = link.progress
            if found is not None and found.nonce == question.nonce:
                return found
            link.has_progress = trio.Event()  # it answered an earlier question
    except PetalnetError:
        return None  # whoever reads the stream learns of it
    finally:
        link.has_progress = None
