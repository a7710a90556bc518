"""Which servers can take the place of those that a chain has lost.

Runs on the portal's thread. They hold the same bytes of the blocks, and compute in the same dtype and quantization, or the session would
go on with other numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from petalnet.client.links import Link
from petalnet.client.requests import Target
from petalnet.errors import CallerError, MissingBlocksError, ServerError
from petalnet.routing.routes import Hop

if TYPE_CHECKING:
    from petalnet.routing.records import ServerRecord


async def replacements(
    target: Target, first: int, end: int, like: Sequence[ServerRecord], without: Collection[str], kv_tokens: int, *, look: bool = False
) -> list[Hop]:
    """The quickest servers through blocks [first, end) that can go on with what others have begun.

    Args:
        like: records of these others.
        without: peers to do without.
        kv_tokens: that the session takes: rows × its greatest length.
        look: whether to ask the swarm where nobody is known.
    Raises:
        CallerError: nobody announces the adapter any more.
        MissingBlocksError: there are none.
        ServerError: the swarm cannot be asked.
    """
    settings = target.settings
    return await target.swarm.membership.route(
        target.model,
        first,
        end,
        allowed=settings.allowed_servers,
        precisions=settings.precisions,
        blocked=settings.blocked_servers | set(without),
        look=look,
        kv_tokens=kv_tokens,
        like=like or None,
        direct=settings.direct_chains,
        adapter=settings.active_adapter,
    )


def own_record(link: Link) -> ServerRecord | None:
    """What a link's server had announced, of those blocks alone that the chain uses of it; None where that is not known."""
    record, hop = link.record, link.hop
    if record is None or not record.span[0] <= hop.first < hop.end <= record.span[1]:
        return None
    start = record.span[0]
    return replace(record, span=(hop.first, hop.end), block_digests=record.block_digests[hop.first - start : hop.end - start])


async def has_stand_in(target: Target, link: Link) -> bool:
    """Whether other servers hold a link's blocks."""
    hop, record = link.hop, own_record(link)
    try:
        await replacements(target, hop.first, hop.end, [] if record is None else [record], {hop.peer_id}, 0)
    except (CallerError, MissingBlocksError, ServerError):
        return False
    return True
