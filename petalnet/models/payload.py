"""A block's bytes where they lie on this machine: pieces of files, read as if they were one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from petalnet.models.files import LocalTensor


class Payload:
    """The bytes of some tensors in their order; see `models.manifest`.

    Attributes:
        size: bytes of all of them.
    """

    def __init__(self, tensors: Sequence[LocalTensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.end > tensor.start]
        self._starts = [0]
        for tensor in self._tensors:
            self._starts.append(self._starts[-1] + tensor.end - tensor.start)
        self.size = self._starts[-1]

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end). Blocks: reads files.

        Raises:
            OSError: a file is gone, or shorter than it was.
        """
        parts: list[bytes] = []
        index = bisect_right(self._starts, start) - 1
        while start < end:
            tensor = self._tensors[index]
            count = min(end, self._starts[index + 1]) - start
            with tensor.path.open("rb", buffering=0) as file:
                file.seek(tensor.start + start - self._starts[index])
                part = file.read(count)
            if len(part) != count:
                raise OSError(f"{tensor.path} is shorter than it was")
            parts.append(part)
            start, index = start + count, index + 1
        return b"".join(parts)

    def chunks(self, size: int) -> tuple[str, ...]:
        """BLAKE3 of each chunk of this many bytes, the last one maybe shorter, in hex. Blocks: reads all of the payload. Raises OSError."""
        return tuple(
            blake3(self.read(start, min(start + size, self.size)), max_threads=blake3.AUTO).hexdigest()
            for start in range(0, self.size, size)
        )
