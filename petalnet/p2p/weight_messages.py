"""The messages by which servers get a model's weights from each other: what a model is made of, who has which chunks, and the chunks.

A block is named by the first `BLOCK_ID_BYTES` of its digest, as servers announce it. Requests of one stream are answered in their order. A
block or a manifest that is not shared, or not any more, is answered by an error of the class *caller*.
"""

from __future__ import annotations

from dataclasses import dataclass

from petalnet.p2p.fields import Blob, Message, array, integer, many, message_type, octets, scalar, text

BLOCK_ID_BYTES = 16
MAX_ASKED = 64
"""Blocks that one message may ask about."""
MAX_CHUNKS = 1 << 15
"""Of one block."""


@message_type("get_manifest")
@dataclass(frozen=True)
class GetManifest(Message):
    """What is the model of this key made of? Answered by `ManifestFound`, or by *busy* where that is still being worked out."""

    model: str = scalar(text(128))


@message_type("manifest_found")
@dataclass(frozen=True)
class ManifestFound(Message):
    """A model's manifest.

    Attributes:
        manifest: uint8, the content of the file (see `models.manifest`), without digests of chunks.
    """

    manifest: Blob = array()


@message_type("which_chunks")
@dataclass(frozen=True)
class WhichChunks(Message):
    """Which chunks of these blocks can be had from you? Answered by `ChunksHeld`."""

    blocks: tuple[bytes, ...] = scalar(many(octets(BLOCK_ID_BYTES), MAX_ASKED))


@message_type("chunks_held")
@dataclass(frozen=True)
class ChunksHeld(Message):
    """What can be had of each of the blocks that were asked about, in their order.

    Attributes:
        lists: the digest (32 bytes) of the block's list of chunks, by which they are checked; empty where nothing of the block can be had.
        held: a bit for each chunk, the first in the lowest bit of the first byte; empty where all can be had.
    """

    lists: tuple[bytes, ...] = scalar(many(octets(32), MAX_ASKED))
    held: tuple[bytes, ...] = scalar(many(octets(MAX_CHUNKS // 8), MAX_ASKED))


@message_type("get_chunk_list")
@dataclass(frozen=True)
class GetChunkList(Message):
    """What is this block made of? Answered by `ChunkList`."""

    block: bytes = scalar(octets(BLOCK_ID_BYTES))


@message_type("chunk_list")
@dataclass(frozen=True)
class ChunkList(Message):
    """A block's tensors and the digests of its chunks.

    Attributes:
        entry: uint8, see `models.manifest.BlockEntry.encode`; its BLAKE3 is what `ChunksHeld.lists` names.
    """

    entry: Blob = array()


@message_type("get_chunk")
@dataclass(frozen=True)
class GetChunk(Message):
    """A chunk of a block's payload, please. Answered by `Chunk`.

    Attributes:
        digest: its BLAKE3 (32 bytes); whoever has another chunk there by now refuses, rather than send what was not asked for.
    """

    block: bytes = scalar(octets(BLOCK_ID_BYTES))
    index: int = scalar(integer(0, MAX_CHUNKS - 1))
    digest: bytes = scalar(octets(32))


@message_type("chunk")
@dataclass(frozen=True)
class Chunk(Message):
    """The chunk that was asked for.

    Attributes:
        data: uint8.
    """

    data: Blob = array()


def blob_of(data: bytes) -> Blob:
    """Bytes as an array of a message."""
    return Blob("uint8", (len(data),), "raw", data)


def bits_of(indices: set[int], count: int) -> bytes:
    """The bits of `ChunksHeld.held` for these chunks of `count`."""
    bits = bytearray(-(-count // 8))
    for index in indices:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def indices_of(bits: bytes) -> set[int]:
    """The inverse of `bits_of`."""
    return {8 * place + bit for place, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}
