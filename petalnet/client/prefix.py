"""Names of prompts' beginnings, by which servers find keys and values that they have computed before. Pure: bytes in, names out.

A name stands for the first k × `UNIT_TOKENS` tokens of a row. It is a hash over what these tokens put into the first block, so everything
that shapes it counts without being listed: token ids, trained embeddings, soft prompts, the dtype. Two rows with the same name have the
same keys and values in every block, as long as positions are the usual ones and nothing is padding; rows of which that does not hold have
no names.

A name is hash(name before it ‖ a hash of each of its unit's tokens). The hashes of single tokens are kept, 16 bytes each, so that a row can
be set back to any token and go on from there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from blake3 import blake3

from petalnet.p2p.session_messages import NAME_BYTES, UNIT_TOKENS

MOST_NAMES = 1 << 15
"""Names that a client remembers having sent: two million tokens' worth."""


def first_name(model: str, dtype: str, first: int, precision: str = "exact", adapted: Sequence[str] = ()) -> bytes:
    """The name of no tokens at all, from which the names of rows follow that enter block `first` of a model in a dtype.

    Args:
        precision: the setting `wire_precision`: where the way to the blocks may round hidden states, their keys and values are other ones.
        adapted: what else makes the blocks others: an adapter's label, a version of LoRA parameters.
    """
    return _hash("\0".join(["petalnet prefix 1", model, dtype, str(first), precision, *adapted]).encode())


class Prefix(NamedTuple):
    """What is known of the tokens of one row; a value, shared by rows that go on from the same one.

    Attributes:
        origin: the name of no tokens.
        names: the names of the whole units.
        units: for each of them the hashes of its tokens.
        rest: the hashes of the tokens after the last whole unit.
    """

    origin: bytes
    names: tuple[bytes, ...] = ()
    units: tuple[bytes, ...] = ()
    rest: bytes = b""

    @property
    def length(self) -> int:
        """Tokens that are known."""
        return len(self.units) * UNIT_TOKENS + len(self.rest) // NAME_BYTES

    def cut(self, length: int) -> Prefix:
        """The first `length` tokens; all that are known where these are fewer."""
        if length >= self.length:
            return self
        whole, rest = divmod(length, UNIT_TOKENS)
        hashes = self.units[whole] if whole < len(self.units) else self.rest
        return Prefix(self.origin, self.names[:whole], self.units[:whole], hashes[: rest * NAME_BYTES])

    def extended(self, tokens: memoryview | bytes, count: int) -> Prefix:
        """With `count` more tokens, whose inputs of the first block lie one after another in `tokens`."""
        size = len(tokens) // count if count else 0
        hashes = self.rest + b"".join([_hash(tokens[start : start + size]) for start in range(0, count * size, size or 1)])
        unit_bytes = UNIT_TOKENS * NAME_BYTES
        if len(hashes) < unit_bytes:
            return Prefix(self.origin, self.names, self.units, hashes)
        names, units = list(self.names), list(self.units)
        while len(hashes) >= unit_bytes:
            unit, hashes = hashes[:unit_bytes], hashes[unit_bytes:]
            names.append(_hash((names[-1] if names else self.origin) + unit))
            units.append(unit)
        return Prefix(self.origin, tuple(names), tuple(units), hashes)


class SentNames:
    """Which names were sent to which servers: only these are worth asking for. The latest `MOST_NAMES`, by use."""

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._sent: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def note(self, peer_id: str, names: Sequence[bytes]) -> None:
        """The server has what these names stand for, as far as it keeps it."""
        for name in reversed(names):  # what a row begins with is forgotten last
            self._sent[peer_id, name] = None
            self._sent.move_to_end((peer_id, name))
        while len(self._sent) > self._most:
            self._sent.popitem(last=False)

    def known(self, peer_id: str, names: Sequence[bytes]) -> int:
        """How many of a row's names, from the first on, the server was sent."""
        for count, name in enumerate(names):
            if (peer_id, name) not in self._sent:
                return count
        return len(names)

    def forget(self, peer_id: str, names: Iterable[bytes]) -> None:
        """The server does not have these any more."""
        for name in names:
            self._sent.pop((peer_id, name), None)


def _hash(data: memoryview | bytes) -> bytes:
    return blake3(data).digest(NAME_BYTES)
