"""A block that comes chunk by chunk: a safetensors file of canonical names in the weight cache, which counts once it is whole and right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from petalnet.errors import ModelError
from petalnet.models.files import LocalTensor, read_header
from petalnet.models.identity import digest_of_set, digest_of_tensor
from petalnet.models.manifest import CHUNK_BYTES, BlockEntry
from petalnet.models.payload import Payload
from petalnet.models.weight_cache import Filling, WeightCache

DIGEST_CHARS = 32
"""Of a block's digest, by which it is known before all of the digest is: as much of it as servers announce."""


class BlockFile:
    """The file of one block while it is being filled. All methods block: they read and write the disk.

    Attributes:
        entry: what it is to hold.
        payload: its bytes, those that are there and those that are not.
    """

    def __init__(self, entry: BlockEntry, filling: Filling) -> None:
        self.entry = entry
        self._filling = filling
        self.payload = Payload(self._tensors())
        header = entry.header
        with filling.path.open("rb+") as file:
            if file.read(len(header)) != header:  # of another list of tensors that happens to be as long, or a new file
                file.seek(0)
                file.write(header)
        filling.note(0, len(header))

    def held(self) -> set[int]:
        """Chunks that are there from before, each looked at again: another list may have been believed then, and disks lose things."""
        found = set()
        for index in range(self.entry.num_chunks):
            start, end = self._range(index)
            if any(first <= start and end <= last for first, last in self._filling.done) and self._is_right(index):
                found.add(index)
        return found

    def write(self, index: int, data: bytes) -> None:
        """Put a chunk, which has been checked, in its place. Raises OSError."""
        start, end = self._range(index)
        with self._filling.path.open("rb+", buffering=0) as file:
            file.seek(start)
            left = memoryview(data)
            while left:
                left = left[file.write(left) or 0 :]
        self._filling.note(start, end)

    def digest(self) -> str:
        """The digest of the block as it is in the file; to be called when all chunks are there. Raises OSError."""
        digests = {tensor[0]: digest_of_tensor(found) for tensor, found in zip(self.entry.tensors, self._tensors(), strict=True)}
        return digest_of_set(digests)

    def commit(self) -> Path:
        """It is whole and right: put it where it is found from now on."""
        path = self._filling.commit()
        self.payload = Payload(self._tensors())
        return path

    def _is_right(self, index: int) -> bool:
        return blake3(self.payload.read(*self.entry.chunk_range(index)), max_threads=blake3.AUTO).hexdigest() == self.entry.chunks[index]

    def _range(self, index: int) -> tuple[int, int]:
        start, end = self.entry.chunk_range(index)
        before = len(self.entry.header)
        return before + start, before + end

    def _tensors(self) -> list[LocalTensor]:
        before = len(self.entry.header)
        ranges = self.entry.ranges
        return [
            LocalTensor(self._filling.path, dtype, shape, before + ranges[name][0], before + ranges[name][1])
            for name, dtype, shape in self.entry.tensors
        ]


@contextmanager
def filling_block(cache: WeightCache, entry: BlockEntry) -> Iterator[BlockFile]:
    """The file of a block that is not whole yet. Waits where another process of this machine fills it, and finds it whole then.

    Raises:
        UsageError: there is no room for it.
    """
    with cache.filling(key_of_block(entry.digest), len(entry.header) + entry.nbytes) as filling:
        yield BlockFile(entry, filling)


def find_block(cache: WeightCache, digest: str) -> tuple[Path, BlockEntry, Payload] | None:
    """A block that is whole in the cache: its file, what it holds, and its payload; None where it is not there. Blocks: reads all of it.

    Args:
        digest: the block's, or at least as much of its beginning as servers announce.
    """
    key = key_of_block(digest)
    path = cache.find(key)
    if path is None:
        return None
    try:
        found = sorted(read_header(path).items())
        tensors = [tensor for _, tensor in found]
        payload = Payload(tensors)
        whole = digest_of_set({name: digest_of_tensor(tensor) for name, tensor in found})
        if not whole.startswith(digest):
            raise ValueError("it is another block")
        described = tuple((name, tensor.dtype, tensor.shape) for name, tensor in found)
        entry = BlockEntry(whole, described, payload.size, payload.chunks(CHUNK_BYTES))
    except (OSError, ValueError, KeyError, TypeError, ModelError):
        cache.discard(key)
        return None
    return path, entry, payload


def key_of_block(digest: str) -> str:
    """Under what a block is kept in the cache of weights."""
    return f"block-{digest[:DIGEST_CHARS]}"
