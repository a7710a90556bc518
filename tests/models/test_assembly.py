"""Which chunk is asked from whom: honest peers, liars and the deceived, who come and go in any order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.models import assembly as module
from petalnet.models.assembly import AT_ONCE, MOST_COPIES, MOST_DECEIVED, SOON_S, Ask, Assembly, Outcome, WrongList
from petalnet.models.manifest import CHUNK_BYTES, BlockEntry


def digest(text: str) -> str:
    return blake3(text.encode()).hexdigest()


def make_entry(block: int, chunks: int, version: str = "") -> BlockEntry:
    """A block of so many chunks, or another list for the same block."""
    size = CHUNK_BYTES * (chunks - 1) + 100
    lists = tuple(digest(f"{block}-{index}{version}") for index in range(chunks))
    return BlockEntry(digest(f"block {block}"), (("weight", "U8", (size,)),), size, lists)


def name_of(entry: BlockEntry) -> str:
    return entry.digest[:32]


@dataclass
class Peer:
    """A peer as it is played here.

    Attributes:
        entries: the lists that it goes by, one a block.
        held: what it says it has, by block; None: all.
        lies: whether it sends something else than it was asked for.
        asked: what is on its way from it.
    """

    name: str
    entries: dict[str, BlockEntry]
    held: dict[str, set[int] | None]
    lies: bool = False
    is_there: bool = False
    asked: list[Ask] = field(default_factory=list)
    told: bool = False


class Play:
    """An assembly and its peers; every step is checked."""

    def __init__(self, entries: list[BlockEntry], peers: list[Peer], chance: random.Random) -> None:
        self.entries = {name_of(entry): entry for entry in entries}
        self.assembly = Assembly(self.entries, seed=chance.getrandbits(32))
        self.peers = peers
        self.chance = chance
        self.now = 0.0

    def come(self, peer: Peer) -> None:
        if peer.name in self.assembly.expelled:
            return
        peer.is_there = peer.told = True
        for block, entry in peer.entries.items():
            self.assembly.tell(peer.name, block, entry.list_digest, peer.held[block])
        while (block := self.assembly.list_to_ask(peer.name)) is not None:
            if self.assembly.take_list(peer.name, block, peer.entries[block]):
                self.assembly.use_list(block, peer.entries[block])

    def go(self, peer: Peer) -> None:
        self.assembly.leave(peer.name)
        peer.is_there = False
        peer.asked.clear()

    def ask(self, peer: Peer) -> None:
        ask = self.assembly.ask(peer.name, self.now)
        if ask is None:
            return
        assert peer.is_there and peer.name not in self.assembly.expelled
        held = peer.held[ask.block]
        assert held is None or ask.index in held, "it is asked only for what it said it had"
        assert ask.digest == peer.entries[ask.block].chunks[ask.index], "and by its own list"
        assert ask not in peer.asked
        peer.asked.append(ask)
        assert len(peer.asked) <= AT_ONCE
        assert sum(ask in other.asked for other in self.peers) <= MOST_COPIES

    def answer(self, peer: Peer) -> None:
        if not peer.asked:
            return
        ask = peer.asked.pop(0)
        held_before = self.assembly.held(ask.block)
        outcome = self.assembly.answer(peer.name, ask, "wrong" if peer.lies else ask.digest, self.now)
        assert (outcome is Outcome.WRONG) == peer.lies == (peer.name in self.assembly.expelled)
        if peer.lies:
            assert self.assembly.held(ask.block) == held_before
            self.expelled(peer)
        if outcome is Outcome.TAKE:
            assert self.assembly.held(ask.block) == held_before | {ask.index}
        if self.assembly.is_complete(ask.block):
            entry = self.assembly.entry(ask.block)
            assert entry is not None
            if entry.chunks == self.entries[ask.block].chunks:
                self.assembly.finish(ask.block)
            else:
                for name in self.assembly.give_up_list(ask.block):
                    self.expelled(next(other for other in self.peers if other.name == name))

    def expelled(self, peer: Peer) -> None:
        assert peer.name in self.assembly.expelled
        self.go(peer)

    def step(self, peer: Peer) -> None:
        if not peer.is_there:
            self.come(peer)
            return
        action = self.chance.choice((self.come, self.ask, self.ask, self.answer, self.answer, self.go))
        action(peer)

    def go_on(self, steps: int) -> int:
        """Everybody who is there answers, in turn, until all is done; how many chunks came for that."""
        for count in range(steps):
            for peer in self.peers:
                if peer.is_there:
                    self.come(peer)
                    self.ask(peer)
                    self.answer(peer)
            self.now += 0.1
            if not self.assembly.open_blocks:
                return count
        raise AssertionError(f"it does not come to an end: {self.assembly.open_blocks}")


@st.composite
def plays(draw: st.DrawFn) -> Play:
    chance = draw(st.randoms(use_true_random=False))
    entries = [make_entry(block, draw(st.integers(1, 5))) for block in range(draw(st.integers(1, 3)))]
    peers = []
    for number in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["honest", "part", "liar", "wrong list", "deceived"]))
        lists = entries
        if kind in ("wrong list", "deceived"):
            lists = [make_entry(block, entry.num_chunks, f" by {draw(st.integers(1, 2))}") for block, entry in enumerate(entries)]
        some = kind in ("part", "deceived")
        held = {name_of(entry): {index for index in range(entry.num_chunks) if draw(st.booleans())} if some else None for entry in lists}
        peers.append(Peer(f"{kind} {number}", {name_of(entry): entry for entry in lists}, held, lies=kind == "liar"))
    return Play(entries, peers, chance)


@given(plays(), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_whatever_peers_do_the_blocks_come_together_and_no_honest_peer_is_blamed(play: Play, steps: int) -> None:
    for _ in range(steps):
        play.now += play.chance.random()
        play.step(play.chance.choice(play.peers))
    assert not any(name.startswith(("honest", "part")) for name in play.assembly.expelled)
    seeder = Peer("honest seeder", dict(play.entries), dict.fromkeys(play.entries))
    play.peers.append(seeder)
    play.come(seeder)
    play.go_on(400)
    assert not any(name.startswith(("honest", "part")) for name in play.assembly.expelled)


def simple(chunks: int, *peers: Peer, blocks: int = 1) -> Play:
    play = Play([make_entry(block, chunks) for block in range(blocks)], list(peers), random.Random(1))
    for peer in peers:
        if not peer.entries:
            peer.entries, peer.held = dict(play.entries), dict.fromkeys(play.entries)
        play.come(peer)
    return play


def test_the_chunk_that_fewest_have_is_asked_for_first() -> None:
    rare, other = Peer("rare", {}, {}), Peer("other", {}, {})
    play = simple(5, rare, other)
    (block,) = play.entries
    play.assembly.tell("other", block, play.entries[block].list_digest, {0, 1, 3, 4})
    ask = play.assembly.ask("rare", 0.0)
    assert ask is not None and ask.index == 2


def test_two_that_load_the_same_from_one_get_different_chunks() -> None:
    first: set[tuple[str, int]] = set()
    for seed in range(8):
        play = Play([make_entry(0, 40)], [Peer("seeder", {}, {})], random.Random(seed))
        (seeder,) = play.peers
        seeder.entries, seeder.held = dict(play.entries), dict.fromkeys(play.entries)
        play.come(seeder)
        ask = play.assembly.ask("seeder", 0.0)
        assert ask is not None
        first.add((ask.block, ask.index))
    assert len(first) > 4


def test_a_slow_peer_does_not_hold_up_the_end() -> None:
    slow, quick = Peer("slow", {}, {}), Peer("quick", {}, {})
    play = simple(6, slow, quick)
    play.ask(slow)
    play.ask(slow)
    for _ in range(4):
        play.now += 0.1
        play.ask(quick)
        play.answer(quick)
    play.ask(quick)
    assert not quick.asked, "what has just been asked for elsewhere is not asked for again"
    play.now += SOON_S
    for _ in range(2):
        play.ask(quick)
        play.answer(quick)
    assert not play.assembly.open_blocks
    assert play.assembly.answer("slow", slow.asked[0], slow.asked[0].digest, play.now) is Outcome.SURPLUS


def test_nothing_is_asked_of_a_peer_that_takes_longer_than_what_is_on_its_way_has_taken() -> None:
    slow, quick = Peer("slow", {}, {}), Peer("quick", {}, {})
    play = simple(3, slow, quick)
    play.ask(slow)
    play.now += 30.0
    play.answer(slow)
    for _ in range(2):
        play.ask(quick)
    play.now += 10.0
    play.ask(slow)
    assert not slow.asked
    play.now += 25.0
    play.ask(slow)
    assert slow.asked


def test_a_wrong_chunk_puts_its_sender_out_and_the_chunk_is_asked_elsewhere() -> None:
    liar, honest = Peer("liar", {}, {}, lies=True), Peer("honest", {}, {})
    play = simple(2, liar)
    play.ask(liar)
    wanted = liar.asked[0]
    play.answer(liar)
    assert play.assembly.expelled == {"liar"}
    assert play.assembly.ask("liar", 1.0) is None
    honest.entries, honest.held = dict(play.entries), dict.fromkeys(play.entries)
    play.come(honest)
    assert wanted in {play.assembly.ask("honest", 1.0), play.assembly.ask("honest", 1.0)}


def test_a_wrong_list_puts_out_who_had_the_whole_block_by_it() -> None:
    wrong = make_entry(0, 3, "wrong")
    liar = Peer("wrong list", {name_of(wrong): wrong}, {name_of(wrong): None})
    deceived = Peer("deceived", {name_of(wrong): wrong}, {name_of(wrong): {0}})
    play = simple(3, liar, deceived)
    with pytest.raises(AssertionError, match="does not come to an end"):
        play.go_on(40)
    assert play.assembly.expelled == {"wrong list"}
    seeder = Peer("honest", dict(play.entries), dict.fromkeys(play.entries))
    play.peers.append(seeder)
    play.come(seeder)
    play.go_on(40)
    assert play.assembly.expelled == {"wrong list"}


def test_another_list_than_was_promised() -> None:
    play = simple(3)
    (block,) = play.entries
    entry = play.entries[block]
    for sent in (make_entry(0, 3, "other"), replace(entry, chunks=()), make_entry(1, 3)):
        peer = f"peer {sent.list_digest[:4]}"
        play.assembly.tell(peer, block, sent.list_digest if sent.digest != entry.digest else entry.list_digest, None)
        assert play.assembly.list_to_ask(peer) == block
        with pytest.raises(WrongList):
            play.assembly.take_list(peer, block, sent)
        assert peer in play.assembly.expelled


def test_who_has_a_part_may_have_begun_anew_but_not_time_and_again() -> None:
    play = simple(3)
    (block,) = play.entries
    other = make_entry(0, 3, "other")
    for _ in range(MOST_DECEIVED - 1):
        play.assembly.tell("peer", block, other.list_digest, {1})
        assert play.assembly.list_to_ask("peer") == block
        assert not play.assembly.take_list("peer", block, play.entries[block])
    assert not play.assembly.expelled and not play.assembly.has_givers(block)
    play.assembly.tell("peer", block, other.list_digest, {1})
    assert play.assembly.list_to_ask("peer") == block
    with pytest.raises(WrongList):
        play.assembly.take_list("peer", block, play.entries[block])
    assert play.assembly.expelled == {"peer"}


def test_a_list_of_a_peer_that_took_back_what_it_said_is_asked_from_others() -> None:
    play = simple(3)
    (block,) = play.entries
    entry = play.entries[block]
    for peer in ("one", "two"):
        play.assembly.tell(peer, block, entry.list_digest, None)
    assert play.assembly.list_to_ask("one") == block
    play.assembly.tell("one", block, "", None)
    assert not play.assembly.take_list("one", block, entry)
    assert play.assembly.list_to_ask("two") == block


def test_a_list_that_is_known_beforehand_is_the_only_one_that_counts() -> None:
    entry, other = make_entry(0, 3), make_entry(0, 3, "other")
    block = name_of(entry)
    assembly = Assembly([block])
    assembly.fix_list(block, entry.list_digest)
    assembly.use_list(block, entry)
    assembly.restore(block, {0})
    assembly.tell("other", block, other.list_digest, None)
    assert assembly.ask("other", 0.0) is None and not assembly.expelled
    assembly.tell("same", block, entry.list_digest, None)
    asks = [assembly.ask("same", 0.0), assembly.ask("same", 0.0)]
    assert {ask.index for ask in asks if ask is not None} == {1, 2}


def test_a_list_that_cannot_be_of_the_model_is_forgotten_without_blame() -> None:
    peer = Peer("honest", {}, {})
    play = simple(3, peer)
    (block,) = play.entries
    play.assembly.reject_list(block, play.entries[block].list_digest)
    play.come(peer)
    assert play.assembly.ask("honest", 0.0) is None and not play.assembly.expelled


def test_what_a_disk_lost_comes_again() -> None:
    peer = Peer("honest", {}, {})
    play = simple(2, peer)
    (block,) = play.entries
    play.assembly.restore(block, {0, 1})
    assert play.assembly.is_complete(block)
    play.assembly.lose(block, {1})
    ask = play.assembly.ask("honest", 0.0)
    assert ask is not None and ask.index == 1


def test_who_is_deceived_too_often_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DECEIVED", 2)
    play = simple(1, blocks=2)
    for number, block in enumerate(play.entries):
        wrong = make_entry(number, 1, "wrong")
        play.assembly.tell("peer", block, wrong.list_digest, {0})
        assert play.assembly.list_to_ask("peer") == block and play.assembly.take_list("peer", block, wrong)
        play.assembly.use_list(block, wrong)
        play.assembly.restore(block, {0})
        assert play.assembly.give_up_list(block) == (["peer"] if number else [])
