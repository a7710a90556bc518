"""Which chunk of which block is asked from which peer, until all of them are there. Pure: what peers say and `now` in, what to ask out.

Peers say which chunks of a block they have, and by which list of digests (`models.manifest`); a block is put together by one list at a
time, of those peers that go by it. So each peer is held to what it said itself, and nobody is blamed for what another one said:

- a chunk is asked for by its digest, which its sender's own list names; where another one comes, the sender is out;
- a list that turns out not to give the block's digest: whoever had the whole block by that list is out. Who had only a part of it may have
  been deceived like us: the list is forgotten, and only at the third one is that peer out as well.

Of the chunks that a peer has, the one is asked for that fewest have, a random one of several (as in BitTorrent: B. Cohen, "Incentives build
robustness in BitTorrent", 2003): so those that load the same blocks soon have something for each other. Where all that is missing is on
its way, an idle peer is asked for what has been on its way for longer than this peer would take: a slow one does not hold up the end.

Blocks are named by the beginning of their digest, peers by their ids; seconds are of any clock that does not go back.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from petalnet.models.manifest import BlockEntry

AT_ONCE = 2
"""Chunks that one peer is asked for at a time: while one is on its way, the next is read."""
MOST_COPIES = 3
"""Peers that the same chunk may be on its way from."""
SOON_S = 1.0
"""A chunk that has been on its way for less is not asked for once more."""
MOST_DECEIVED = 3
"""Wrong lists by which a peer may have had parts of blocks."""
SMOOTHING = 0.3


class Outcome(Enum):
    """What becomes of a chunk that came."""

    TAKE = "take"
    """It is to be kept."""
    SURPLUS = "surplus"
    """It is there already, or not wanted any more."""
    WRONG = "wrong"
    """Its sender is out."""


class WrongList(Exception):
    """A peer gave another list of chunks than it had said it would."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A chunk to ask for: its block, its number in it, and its BLAKE3 in hex."""

    block: str
    index: int
    digest: str


@dataclass
class _Claim:
    """What a peer says about a block: by which list, and which chunks; None for all."""

    list_digest: str
    held: frozenset[int] | None

    def has(self, index: int) -> bool:
        return self.held is None or index in self.held


@dataclass
class _Block:
    """A block that is wanted.

    Attributes:
        fixed: the digest of the only list that counts, where that is known beforehand.
        entry: by which it is put together; None while the list is not known.
        missing: chunks that are not there.
        on_the_way: for each chunk that was asked for, the peers and since when.
        copies: how many peers have each chunk, by the list that counts.
        claims: what peers say.
        wrong: lists that did not give the block.
        asked_list: who was asked for the list.
    """

    fixed: str | None
    entry: BlockEntry | None = None
    missing: set[int] = field(default_factory=set)
    on_the_way: dict[int, dict[str, float]] = field(default_factory=dict)
    copies: Counter[int] = field(default_factory=Counter)
    claims: dict[str, _Claim] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    asked_list: str | None = None
    is_done: bool = False

    @property
    def list_digest(self) -> str | None:
        return None if self.entry is None else self.entry.list_digest


@dataclass
class _Peer:
    """A peer that is there: the chunks that it was asked for in their order, seconds that it takes for one, and when it last answered."""

    asked: list[Ask] = field(default_factory=list)
    chunk_s: float | None = None
    answered_at: float = 0.0


class Assembly:
    """Blocks that are put together of chunks from peers.

    Attributes:
        expelled: peers that are out for good.
    """

    def __init__(self, blocks: Iterable[str], *, seed: int | None = None) -> None:
        """
        Args:
            blocks: the ids of those that are wanted.
            seed: of the choices by chance.
        """
        self._blocks = {block: _Block(None) for block in blocks}
        self._peers: dict[str, _Peer] = {}
        self._deceived: Counter[str] = Counter()
        self._random = random.Random(seed)
        self.expelled: set[str] = set()

    # ---- what is wanted

    @property
    def open_blocks(self) -> list[str]:
        """Blocks that are not there yet."""
        return [name for name, block in self._blocks.items() if not block.is_done]

    def fix_list(self, block: str, list_digest: str) -> None:
        """Only the list of this digest counts for a block: it comes from where the model comes from. `use_list` is to follow."""
        self._blocks[block].fixed = list_digest

    def restore(self, block: str, indices: Collection[int]) -> None:
        """These chunks are there already, by the list that counts."""
        self._blocks[block].missing.difference_update(indices)

    def lose(self, block: str, indices: Collection[int]) -> None:
        """These chunks are not there after all."""
        self._blocks[block].missing.update(indices)

    def finish(self, block: str) -> None:
        """A block is there, or is not wanted any more."""
        wanted = self._blocks[block]
        wanted.is_done = True
        wanted.missing.clear()

    def give_up_list(self, block: str) -> list[str]:
        """The chunks of a block do not give its digest: it begins anew, by another list. Returns the peers that are out for that."""
        wanted = self._blocks[block]
        wrong = wanted.list_digest
        if wrong is None:
            raise ValueError(f"block {block} has no list")
        wanted.wrong.add(wrong)
        wanted.entry, wanted.asked_list = None, None
        wanted.missing.clear()
        wanted.copies.clear()
        blamed = []
        for peer, claim in list(wanted.claims.items()):
            if claim.list_digest == wrong:
                del wanted.claims[peer]
                self._deceived[peer] += 1
                if claim.held is None or self._deceived[peer] >= MOST_DECEIVED:
                    blamed.append(peer)
        for peer in blamed:
            self.expel(peer)
        return blamed

    # ---- peers that come and go

    def tell(self, peer: str, block: str, list_digest: str, held: Collection[int] | None) -> None:
        """A peer says which chunks of a block it has, all of them where `held` is None; "" as the list's digest: nothing at all."""
        if peer in self.expelled:
            return
        self._peers.setdefault(peer, _Peer())
        wanted = self._blocks.get(block)
        if wanted is None or wanted.is_done:
            return
        self._withdraw(wanted, peer)
        if list_digest and list_digest not in wanted.wrong and wanted.fixed in (None, list_digest):
            claim = wanted.claims[peer] = _Claim(list_digest, None if held is None else frozenset(held))
            self._count(wanted, claim, 1)

    def leave(self, peer: str) -> None:
        """A peer is gone; what it was asked for is asked from others."""
        gone = self._peers.pop(peer, None)
        for block in self._blocks.values():
            self._withdraw(block, peer)
            if block.asked_list == peer:
                block.asked_list = None
        for ask in [] if gone is None else gone.asked:
            self._land(ask, peer)

    def expel(self, peer: str) -> None:
        """A peer is out for good."""
        self.expelled.add(peer)
        self.leave(peer)

    # ---- lists

    def list_to_ask(self, peer: str) -> str | None:
        """A block whose list of chunks this peer is to be asked for now, which it then counts as; None where there is none."""
        for name, block in self._blocks.items():
            if (
                not block.is_done
                and block.asked_list is None
                and peer in block.claims
                and block.claims[peer].list_digest == self._next_list(block)
            ):
                block.asked_list = peer
                return name
        return None

    def take_list(self, peer: str, block: str, entry: BlockEntry | None) -> bool:
        """What a peer answered to that; None where it could not. Whether `use_list` may follow.

        Raises:
            WrongList: it is not what the peer had said: the peer is out.
        """
        wanted = self._blocks[block]
        claim = wanted.claims.get(peer)
        if (entry is None or claim is None) and wanted.asked_list == peer:
            wanted.asked_list = None
        if entry is None:
            self._withdraw(wanted, peer)
            return False
        if claim is None or wanted.is_done:
            return False
        if entry.list_digest != claim.list_digest and claim.held is not None:
            # It may have had to begin anew by another list since it was asked what it has. Not time and again.
            wanted.asked_list = None if wanted.asked_list == peer else wanted.asked_list
            self._withdraw(wanted, peer)
            self._deceived[peer] += 1
            if self._deceived[peer] < MOST_DECEIVED:
                return False
        if entry.list_digest != claim.list_digest or not entry.digest.startswith(block) or not entry.chunks:
            self.expel(peer)
            raise WrongList(f"the list of chunks of block {block} is not the one that it was said to be")
        return True

    def use_list(self, block: str, entry: BlockEntry) -> None:
        """From now on a block is put together by this list, unless it has been found to be wrong meanwhile."""
        wanted = self._blocks[block]
        wanted.asked_list = None
        if not wanted.is_done and entry.list_digest not in wanted.wrong:
            self._use(wanted, entry)

    def reject_list(self, block: str, list_digest: str) -> None:
        """A list cannot be that of the block that is wanted here; nobody is blamed for that."""
        wanted = self._blocks[block]
        wanted.wrong.add(list_digest)
        wanted.asked_list = None
        for peer in [peer for peer, claim in wanted.claims.items() if claim.list_digest == list_digest]:
            self._withdraw(wanted, peer)

    def entry(self, block: str) -> BlockEntry | None:
        """The list by which a block is put together, once it is known."""
        return self._blocks[block].entry

    # ---- chunks

    def ask(self, peer: str, now: float) -> Ask | None:
        """What a peer is to be asked for now, which it then counts as; None where there is nothing (yet)."""
        there = self._peers.get(peer)
        if there is None or len(there.asked) >= AT_ONCE:
            return None
        found = self._rarest(peer) or self._latest(peer, now)
        if found is None:
            return None
        if not there.asked:
            there.answered_at = now
        there.asked.append(found)
        self._blocks[found.block].on_the_way.setdefault(found.index, {})[peer] = now
        return found

    def answer(self, peer: str, ask: Ask, digest: str, now: float) -> Outcome:
        """What a peer answered has this BLAKE3 (hex)."""
        self._answered(peer, ask, now)
        block = self._blocks[ask.block]
        if digest != ask.digest:
            self.expel(peer)
            return Outcome.WRONG
        if ask.index not in block.missing or block.entry is None or block.entry.chunks[ask.index] != digest:
            return Outcome.SURPLUS
        block.missing.discard(ask.index)
        return Outcome.TAKE

    def refuse(self, peer: str, ask: Ask, now: float) -> None:
        """A peer does not have (any more) what it was asked for."""
        self._answered(peer, ask, now)
        self._withdraw(self._blocks[ask.block], peer)

    def is_complete(self, block: str) -> bool:
        """Whether all chunks of a block are there, by its list; its digest is still to be looked at."""
        wanted = self._blocks[block]
        return wanted.entry is not None and not wanted.missing and not wanted.is_done

    def held(self, block: str) -> set[int]:
        """Chunks of a block that are there."""
        wanted = self._blocks[block]
        return set() if wanted.entry is None else set(range(wanted.entry.num_chunks)) - wanted.missing

    def has_givers(self, block: str) -> bool:
        """Whether any peer says that it has something of a block."""
        return bool(self._blocks[block].claims)

    # ---- within

    def _next_list(self, block: _Block) -> str | None:
        """The list by which a block should be put together, if that is not the one that counts now: the one that most have the whole block
        by, then the one of most peers. One that counts already stays, unless nobody has what is missing by it and more go by another."""
        whole = Counter(claim.list_digest for claim in block.claims.values() if claim.held is None)
        some = Counter(claim.list_digest for claim in block.claims.values())
        best = max(some, key=lambda digest: (whole[digest], some[digest], self._random.random()), default=None)
        now = block.list_digest
        if now is None or best is None:
            return best
        if all(block.copies[index] for index in block.missing) or (whole[best], some[best]) <= (whole[now], some[now]):
            return None
        return best

    def _use(self, block: _Block, entry: BlockEntry) -> None:
        """Put a block together by this list; chunks that are the same as by the one before stay."""
        before, missing = block.entry, set(range(entry.num_chunks))
        if before is not None and before.tensors == entry.tensors:
            there = missing - block.missing
            missing -= {index for index in there if before.chunks[index] == entry.chunks[index]}
        block.entry, block.missing = entry, missing
        block.copies.clear()
        for claim in block.claims.values():
            self._count(block, claim, 1)

    def _count(self, block: _Block, claim: _Claim, by: int) -> None:
        if block.entry is not None and claim.list_digest == block.entry.list_digest:
            for index in range(block.entry.num_chunks) if claim.held is None else claim.held:
                block.copies[index] += by

    def _withdraw(self, block: _Block, peer: str) -> None:
        claim = block.claims.pop(peer, None)
        if claim is not None:
            self._count(block, claim, -1)

    def _usable(self, peer: str) -> Iterator[tuple[str, _Block, BlockEntry, _Claim]]:
        """Blocks of which a peer has something by the list that counts."""
        for name, block in self._blocks.items():
            claim = block.claims.get(peer)
            if claim is not None and block.entry is not None and claim.list_digest == block.entry.list_digest:
                yield name, block, block.entry, claim

    def _rarest(self, peer: str) -> Ask | None:
        """A chunk that the peer has and nobody was asked for, of those that fewest have."""
        best: list[tuple[str, BlockEntry, int]] = []
        fewest = 0
        for name, block, entry, claim in self._usable(peer):
            for index in block.missing:
                if index in block.on_the_way or not claim.has(index):
                    continue
                copies = block.copies[index]
                if not best or copies < fewest:
                    best, fewest = [(name, entry, index)], copies
                elif copies == fewest:
                    best.append((name, entry, index))
        if not best:
            return None
        name, entry, index = self._random.choice(best)
        return Ask(name, index, entry.chunks[index])

    def _latest(self, peer: str, now: float) -> Ask | None:
        """A chunk that the peer has and that has been on its way for longer than this peer would take: the one that was asked for first."""
        patience = max(self._peers[peer].chunk_s or 0.0, SOON_S)
        found: tuple[float, Ask] | None = None
        for name, block, entry, claim in self._usable(peer):
            for index, asked in block.on_the_way.items():
                if index not in block.missing or not claim.has(index) or peer in asked or len(asked) >= MOST_COPIES:
                    continue
                since = max(asked.values())
                if now - since >= patience and (found is None or since < found[0]):
                    found = since, Ask(name, index, entry.chunks[index])
        return None if found is None else found[1]

    def _answered(self, peer: str, ask: Ask, now: float) -> None:
        there = self._peers.get(peer)
        if there is None or ask not in there.asked:
            return  # it has left, or is out, since it was asked
        there.asked.remove(ask)
        took = max(now - there.answered_at, 0.0)
        there.chunk_s = took if there.chunk_s is None else (1 - SMOOTHING) * there.chunk_s + SMOOTHING * took
        there.answered_at = now
        self._land(ask, peer)

    def _land(self, ask: Ask, peer: str) -> None:
        """A chunk is not on its way from this peer any more."""
        on_the_way = self._blocks[ask.block].on_the_way
        asked = on_the_way.get(ask.index, {})
        asked.pop(peer, None)
        if not asked:
            on_the_way.pop(ask.index, None)
