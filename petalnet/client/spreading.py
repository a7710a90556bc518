"""How a pass is spread over servers: into how many micro-batches it is cut, and who does which of them. Of servers that hold the same
blocks it is the one that is expected to be done first, by what this client has asked each of them for already.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

from petalnet.client.inputs import Inputs
from petalnet.client.micro_batches import MicroBatch, Worker, best_count, cut, most_rows, workers_of
from petalnet.client.requests import Target, find_hops
from petalnet.errors import MissingBlocksError, ServerError
from petalnet.p2p.fields import Blob
from petalnet.routing.adapters import adapter_label, having
from petalnet.routing.expected import Expected
from petalnet.routing.routes import Hop, servers_of


async def cut_for(target: Target, hidden: Blob, inputs: Inputs) -> list[MicroBatch]:
    """The micro-batches of a pass, as many as the servers that are known now make worth while.

    Args:
        hidden: raw, [rows, length, hidden].
    """
    rows, length, _ = hidden.shape
    count = -(-rows // most_rows(hidden, inputs, target.end - target.first))
    if count < rows:
        with suppress(ServerError):  # who has not joined the swarm hears of it where the first server is chosen
            await target.swarm.membership.joined()
            count = best_count(rows, length, _workers(target), first=target.first, end=target.end, least=count)
    return cut(hidden, inputs, count)


def _workers(target: Target) -> list[Worker]:
    """The servers that could do parts of a pass now, as far as they are known and connected."""
    membership, settings, now = target.swarm.membership, target.settings, time.time()
    records = membership.view.servers(target.model, now=now, allowed=settings.allowed_servers, blocked=settings.blocked_servers)
    records = settings.precisions.of(records)
    if settings.active_adapter is not None:
        records = having(records, settings.active_adapter, adapter_label(records, settings.active_adapter))
    client = membership.outlook(records)
    try:
        whole, last_resort = servers_of(records, target.first, target.end, client, now=now)
    except MissingBlocksError:
        return []
    there = [record for record in whole if record.peer_id not in last_resort and membership.host.is_connected(record.peer_id)]
    return workers_of(Expected(there, client, work="forward"), target.first, target.end)


@asynccontextmanager
async def next_hop(target: Target, full: frozenset[str], tokens: int) -> AsyncIterator[Hop]:
    """The server that is to do the first of the target's blocks in a forward pass of so many tokens, which counts as under way as long as
    this is open.

    Args:
        full: servers to do without.
    Raises: as `find_hops`.
    """
    under_way = target.swarm.membership.under_way
    with ExitStack() as counted:
        async with under_way.choosing(target.model, target.first, target.end):
            hop = (await find_hops(target, full, "forward", tokens))[0]
            counted.enter_context(under_way.at(hop, tokens))
        yield hop
