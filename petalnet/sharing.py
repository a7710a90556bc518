"""What a server gives others of its weights: manifests, lists of chunks, and chunks, at the rate that its owner allows.

Only what was put here is given, which is the owner's choice (`supply` knows it). Each chunk is looked at before it leaves: a file may have
been changed since it was read, and who sends a wrong chunk is taken for hostile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio
from blake3 import blake3

from petalnet.errors import BusyError, CallerError, PetalnetError, ProtocolError
from petalnet.p2p.messages import Error
from petalnet.p2p.protocols import WEIGHTS
from petalnet.p2p.rates import Rates
from petalnet.p2p.weight_messages import (
    BLOCK_ID_BYTES,
    Chunk,
    ChunkList,
    ChunksHeld,
    GetChunk,
    GetChunkList,
    GetManifest,
    ManifestFound,
    WhichChunks,
    bits_of,
    blob_of,
)

if TYPE_CHECKING:
    from petalnet.models.manifest import BlockEntry, Manifest
    from petalnet.models.payload import Payload
    from petalnet.p2p.fields import Message
    from petalnet.p2p.host import Host
    from petalnet.p2p.streams import Stream

logger = logging.getLogger(__name__)

READS_AT_ONCE = 4
"""Chunks that are read from the disk at a time: more would only make the disk's head move."""
BURST_S = 1.0
"""Seconds' worth of bytes that may go at once."""
MANIFEST_RETRY_S = 2.0
"""When to ask again for a manifest that is being made."""


@dataclass(frozen=True)
class _Shared:
    """A block that others may get.

    Attributes:
        entry: with the digests of its chunks.
        payload: where it lies.
        held: gives the chunks that are there, of a block that is still being fetched itself; None where it is whole.
    """

    entry: BlockEntry
    payload: Payload
    held: Callable[[], set[int]] | None

    @property
    def bits(self) -> bytes:
        """See `ChunksHeld.held`."""
        return b"" if self.held is None else bits_of(self.held(), self.entry.num_chunks)


class Sharing:
    """The blocks that one host gives to whoever asks.

    Attributes:
        bytes_served, chunks_served: so far.
    """

    def __init__(self, host: Host, *, max_rate: int | None = None) -> None:
        """
        Args:
            max_rate: bytes a second for all that ask together, None for no bound.
        """
        self._host = host
        self._blocks: dict[bytes, _Shared] = {}
        self._manifests: dict[str, bytes] = {}
        self._making: set[str] = set()
        self._rates = None if max_rate is None else Rates(max_rate, max_rate * BURST_S)
        self._reads = trio.CapacityLimiter(READS_AT_ONCE)
        self.bytes_served = 0
        self.chunks_served = 0

    def open(self) -> None:
        """Answer from now on."""
        self._host.serve(WEIGHTS, self._answer)

    def share(self, entry: BlockEntry, payload: Payload, held: Callable[[], set[int]] | None = None) -> None:
        """Give a block, or what is there of it (see `_Shared`), to whoever asks."""
        self._blocks[_id_of(entry)] = _Shared(entry, payload, held)

    def withhold(self, entry: BlockEntry) -> None:
        """Do not give a block any more."""
        self._blocks.pop(_id_of(entry), None)

    def make_manifest(self, model: str) -> None:
        """The manifest of this model is being worked out."""
        self._making.add(model)

    def give_manifest(self, model: str, manifest: Manifest | None) -> None:
        """From now on, who asks for this model's manifest gets it; None: there is none after all."""
        self._making.discard(model)
        if manifest is not None:
            self._manifests[model] = manifest.without_chunks().to_json()

    def describe(self) -> dict[str, Any]:
        """What others get here, for the node's own user."""
        whole = sum(shared.held is None for shared in self._blocks.values())
        return {"blocks_shared": whole, "chunks_served": self.chunks_served, "bytes_served": self.bytes_served}

    async def _answer(self, stream: Stream) -> None:
        while (request := await stream.receive()) is not None:
            try:
                answer = await self._answer_to(request)
            except ProtocolError:
                raise
            except PetalnetError as error:
                answer = Error.of(error)
            await stream.send(answer)
            if isinstance(answer, Chunk):
                self.chunks_served += 1
                self.bytes_served += len(answer.data.data)

    async def _answer_to(self, request: Message) -> Message:
        match request:
            case WhichChunks(blocks):
                found = [self._blocks.get(block) for block in blocks]
                lists = [b"" if shared is None else bytes.fromhex(shared.entry.list_digest) for shared in found]
                return ChunksHeld(tuple(lists), tuple(b"" if shared is None else shared.bits for shared in found))
            case GetChunkList(block):
                entry = self._shared(block).entry.encode()
                await self._pace("lists", len(entry))
                return ChunkList(blob_of(entry))
            case GetChunk(block, index, digest):
                return Chunk(blob_of(await self._chunk(self._shared(block), index, digest.hex())))
            case GetManifest(model):
                if model in self._making:
                    raise BusyError("the manifest is being made", MANIFEST_RETRY_S)
                if model not in self._manifests:
                    raise CallerError("no manifest of this model is given here")
                await self._pace("lists", len(self._manifests[model]))
                return ManifestFound(blob_of(self._manifests[model]))
        raise ProtocolError(f"a message {request.name} is no request for weights")

    def _shared(self, block: bytes) -> _Shared:
        shared = self._blocks.get(block)
        if shared is None:
            raise CallerError("this block is not given here")
        return shared

    async def _chunk(self, shared: _Shared, index: int, digest: str) -> bytes:
        entry = shared.entry
        if index >= entry.num_chunks or entry.chunks[index] != digest or (shared.held is not None and index not in shared.held()):
            raise CallerError("this chunk is not given here")
        start, end = entry.chunk_range(index)
        await self._pace("chunks", end - start)
        data = await trio.to_thread.run_sync(_read, shared.payload, start, end, digest, limiter=self._reads, abandon_on_cancel=True)
        if data is not None:
            return data
        if shared.held is None and self._blocks.get(_id_of(entry)) is shared:  # else it has just been moved to where it is whole
            logger.warning("a block is not shared any more: its file was changed or removed")
            self.withhold(entry)
        raise CallerError("this chunk is not here any more")

    async def _pace(self, what: str, size: int) -> None:
        """Wait until so many bytes may leave; whoever asked first goes first. Lists do not wait for chunks: they are few and short."""
        if self._rates is not None:
            now = trio.current_time()
            wait = self._rates.wait(what, now, size)
            self._rates.charge(what, now, size)
            await trio.sleep(wait)


def _id_of(entry: BlockEntry) -> bytes:
    return bytes.fromhex(entry.digest)[:BLOCK_ID_BYTES]


def _read(payload: Payload, start: int, end: int, digest: str) -> bytes | None:
    """Bytes of a payload; None where they are not these any more."""
    try:
        data = payload.read(start, end)
    except OSError:
        return None
    return data if blake3(data).hexdigest() == digest else None
