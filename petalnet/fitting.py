"""How many blocks and KV tokens fit into memory: the arithmetic behind `--serve auto` and `petalnet plan`, from nothing but numbers."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS_SHARE = 0.7
"""Of a node's memory that `--serve auto` fills with weights: the rest is for KV entries and activations."""
MOST_KV_TOKENS = 1 << 22
"""A bound for tiny models, whose KV entries would fit by the hundred million."""


@dataclass(frozen=True)
class Room:
    """What the memory of a machine's devices has to hold, in bytes.

    Attributes:
        devices: the memory that there is on each.
        block: the weights of a block, the largest of the model.
        kv: keys and values of one position in a block.
        kept: of one position, however many blocks a device has: the output that is kept for another server.
    """

    devices: tuple[int, ...]
    block: int
    kv: int
    kept: int

    def blocks(self, tokens: int | None = None) -> int:
        """How many blocks fit beside KV entries for so many tokens; without a number, into `WEIGHTS_SHARE` of the memory."""
        return sum(self._blocks_on(memory, tokens) for memory in self.devices)

    def tokens(self, blocks: int) -> int:
        """For how many tokens there is room beside so many blocks, as far as they fit; a token has entries in each of them."""
        fit, left = MOST_KV_TOKENS, blocks
        shares = [self._blocks_on(memory, None) for memory in self.devices]
        for number, (memory, share) in enumerate(zip(self.devices, shares, strict=True)):
            here = min(left, -(-blocks * share // max(sum(shares), 1))) if number + 1 < len(shares) else left
            left -= here
            if here:
                fit = min(fit, (memory - here * self.block) // max(here * self.kv + self.kept, 1))
        return max(fit, 0)

    def _blocks_on(self, memory: int, tokens: int | None) -> int:
        if tokens is None:
            return int(memory * WEIGHTS_SHARE) // max(self.block, 1)
        return max(memory - tokens * self.kept, 0) // max(self.block + tokens * self.kv, 1)
