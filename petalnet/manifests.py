"""Asking peers what a model is made of, for a node that was given no model: it takes the manifest that fits most of the swarm's servers."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from petalnet.errors import BusyError, ModelError, PetalnetError, ProtocolError, short_id
from petalnet.models.manifest import Manifest
from petalnet.p2p.messages import Error
from petalnet.p2p.protocols import WEIGHTS
from petalnet.p2p.weight_messages import GetManifest, ManifestFound
from petalnet.threads import in_thread

if TYPE_CHECKING:
    from petalnet.peering import Peering
    from petalnet.routing.records import ServerRecord

logger = logging.getLogger(__name__)

MOST_ASKED = 8
CONNECT_WITHIN_S = 10.0
ANSWER_WITHIN_S = 60.0
MAKING_WITHIN_S = 1800.0
"""For a server to read the whole of a model for its manifest: 400 GB at the pace of a hard disk."""
SOONEST_AGAIN_S, LATEST_AGAIN_S = 0.1, 60.0
"""For asking a server again that works it out, whatever it says."""
OTHERS_WITHIN_S = 3.0
"""For the others to answer once one has."""


async def find_manifest(peering: Peering, model: str) -> Manifest | None:
    """The manifest of the model of this key: of those that its servers give, the one that fewest of them contradict; None if there is none.

    Every manifest is checked to be of this model: its configuration and the digest of the client's part make the key. That does not fix the
    blocks: these are what the servers announce.
    """
    servers = [record for record in peering.view.servers(model, now=time.time(), states=("joining", "online", "draining")) if record.shares]
    asked = random.sample(servers, min(len(servers), MOST_ASKED))
    found: list[Manifest] = []
    read: dict[bytes, Manifest] = {}
    reading = trio.Lock()
    first, all_answered = trio.Event(), trio.Event()

    async def ask(record: ServerRecord) -> None:
        try:
            given = await _ask(peering, record, model)
            async with reading:  # one after the other: a long one takes a while, and honest servers give the same
                if given not in read:
                    read[given] = await in_thread(_read, given, model)
        except PetalnetError as error:
            logger.info("peer %s gives no manifest: %s", short_id(record.peer_id), error)
            return
        found.append(read[given])
        first.set()

    async def all_asked() -> None:
        async with trio.open_nursery() as nursery:
            for record in asked:
                nursery.start_soon(ask, record)
        first.set()
        all_answered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(all_asked)
        await first.wait()
        with trio.move_on_after(OTHERS_WITHIN_S):
            await all_answered.wait()
        async with reading:  # what has come until now is read before
            nursery.cancel_scope.cancel()
    return await in_thread(best_manifest, found, list(peering.view.servers(model, now=time.time())))


def best_manifest(manifests: Iterable[Manifest], servers: Iterable[ServerRecord]) -> Manifest | None:
    """The manifest that fewest of these servers contradict, by the digests that they announce; then the one that was given most often.

    Blocks for seconds where manifests are long.
    """
    given = list(manifests)
    encoded = {id(manifest): manifest.to_json() for manifest in {id(one): one for one in given}.values()}
    copies = Counter(encoded[id(manifest)] for manifest in given)
    distinct = {encoded[id(manifest)]: manifest for manifest in given}
    records = list(servers)

    def support(data: bytes) -> tuple[int, int]:
        return -sum(contradicts(record, distinct[data]) for record in records), copies[data]

    best = max(distinct, key=support, default=None)
    return None if best is None else distinct[best]


def contradicts(record: ServerRecord, manifest: Manifest) -> bool:
    """Whether a server announces another digest for one of its blocks than the manifest has."""
    blocks = manifest.blocks[record.span[0] : record.span[1]]
    return any(not block.digest.startswith(digest) for block, digest in zip(blocks, record.block_digests, strict=False))


def _read(data: bytes, model: str) -> Manifest:
    """A manifest that a server gave. Blocks for seconds where it is long. Raises ModelError where it is none, or that of another model."""
    # Digests of chunks would count as the model's own here; each server is asked for them, and held to them.
    manifest = Manifest.parse(data).without_chunks()
    if manifest.model_key != model:
        raise ModelError("its manifest is of another model")
    return manifest


async def _ask(peering: Peering, record: ServerRecord, model: str) -> bytes:
    """One server's manifest as it gave it, waited for while it is being made. Raises PetalnetError."""
    deadline = trio.current_time() + MAKING_WITHIN_S
    async with await peering.host.open_stream(record.peer_id, WEIGHTS, addrs=record.addrs, timeout_s=CONNECT_WITHIN_S) as stream:
        while True:
            answer = None
            with trio.move_on_after(ANSWER_WITHIN_S):
                await stream.send(GetManifest(model))
                answer = await stream.receive()
            if isinstance(answer, ManifestFound):
                return bytes(answer.manifest.data)
            if not isinstance(answer, Error):
                raise ProtocolError("it gives no answer", record.peer_id)
            error = answer.exception(record.peer_id)
            if not isinstance(error, BusyError) or trio.current_time() > deadline:
                raise error
            logger.info("peer %s works out what the model is made of", short_id(record.peer_id))
            await trio.sleep(min(max(error.retry_after_s, SOONEST_AGAIN_S), LATEST_AGAIN_S))
