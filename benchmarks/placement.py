"""What placement makes of a swarm: the rules of `petalnet.routing.placement` in simulated time, beside the optimum and beside Petals' rule.

    python benchmarks/placement.py            # about 5 minutes; no torch
    python benchmarks/placement.py --quick    # half a minute

A swarm is as strong as its weakest block: the tokens a second of all servers that have it online. *Still* swarms are taken as they stand
and let settle; *living* ones have servers that come, die without a word or leave in good order, while others load and move. Their optimum
is found by trying all arrangements of the servers that are there (small swarms), or is bounded by all servers' work spread evenly over all
blocks (large ones): both as if servers moved in no time, so that nobody can reach them under churn.

Three rules are compared. *first*: servers stay where they chose to begin. *petals*: Petals' rule as it is published (`choose_best_blocks`
and `should_choose_other_blocks` with a balance quality of 0.75; a look every 0 to 240 s, a wait of 0 to 10 s before a server chooses).
*petalnet*: ours.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from petalnet.errors import MissingBlocksError
from petalnet.placing import CHECK_EVERY_S, HOLE_PATIENCE_S, LOOK_EVERY_S, STAY_S, TOLD_S
from petalnet.routing.expected import Client
from petalnet.routing.placement import Move, choose_span, find_moves, may_leave, reconsider
from petalnet.routing.records import ServerRecord
from petalnet.routing.routes import find_route
from petalnet.routing.settling import settle
from petalnet.routing.strength import Place, places_of, strengths, weakest_window

NOW = 1_800_000_000.0
LOAD_S, DRAIN_S, LISTED_S = 60.0, 10.0, 30.0
"""Seconds that loading takes, that sessions take to go elsewhere, and for which a dead server stays in everybody's view."""
ABRUPT = 0.7
"""Share of the servers that go without a word."""
SAMPLE_S = 20.0
ROUND_TRIP_S = 0.02
ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@dataclass(frozen=True)
class Kind:
    """A kind of swarm: blocks of the model, and how many blocks servers hold and how fast they are."""

    num_blocks: int
    lengths: Sequence[int]
    speeds: Sequence[float]
    """Blocks a second: a server's tokens a second are that over its blocks."""


SMALL = Kind(8, (2, 3, 4, 5), (20.0, 40.0, 80.0, 160.0))
LARGE = Kind(80, (4, 8, 10, 16, 20, 40), (100.0, 200.0, 400.0, 800.0))


def name_of(number: int) -> str:
    return "".join(ALPHABET[number // 58**power % 58] for power in range(3))


def made(number: int, kind: Kind, rng: random.Random) -> ServerRecord:
    """A server that is not anywhere yet."""
    length = rng.choice(kind.lengths)
    rate = rng.choice(kind.speeds) * rng.uniform(0.8, 1.25) / length
    # Identities are hashes: their order has nothing to do with that of coming.
    return ServerRecord(
        peer_id=f"{ALPHABET[rng.randrange(58)]}{name_of(number)}", addrs=(), model="m", model_name="m", span=(0, length),
        num_blocks=kind.num_blocks, state="joining", dtype="float32", sequence=1, issued=NOW, expires=NOW + 3600,
        decode_tokens_s=rate, prefill_tokens_s=rate, forward_tokens_s=rate, movable=True,
    )  # fmt: skip


def weakest(records: Sequence[ServerRecord], num_blocks: int) -> float:
    """The swarm's tokens a second."""
    strength = [0.0] * num_blocks
    for record in records:
        for block in range(*record.span):
            strength[block] += record.decode_tokens_s
    return min(strength)


def optimum(records: Sequence[ServerRecord], num_blocks: int) -> float:
    """The most tokens a second that any arrangement of these servers gives: all are tried, but those that cannot be better."""
    return _optimum(tuple(sorted((record.span[1] - record.span[0], record.decode_tokens_s) for record in records)), num_blocks)


@functools.cache
def _optimum(servers: tuple[tuple[int, float], ...], num_blocks: int) -> float:
    servers = tuple(sorted(servers, key=lambda server: -server[0] * server[1]))
    work = [sum(length * rate for length, rate in servers[index:]) for index in range(len(servers) + 1)]
    best, strength = 0.0, [0.0] * num_blocks

    def place(index: int) -> None:
        nonlocal best
        if index == len(servers):
            best = max(best, min(strength))
            return
        # All blocks have to get stronger than the best so far, and only so much work is left for that.
        if sum(best - value for value in strength if value < best) + 1e-9 >= work[index] or (best and not work[index]):
            return
        length, rate = servers[index]
        windows = range(num_blocks - length + 1)
        for first in sorted(windows, key=lambda first: min(strength[first : first + length])):
            for block in range(first, first + length):
                strength[block] += rate
            place(index + 1)
            for block in range(first, first + length):
                strength[block] -= rate

    place(0)
    return best


def most_possible(records: Sequence[ServerRecord], num_blocks: int) -> float:
    """More than any arrangement gives: all servers' work, evenly over all blocks."""
    return sum((record.span[1] - record.span[0]) * record.decode_tokens_s for record in records) / num_blocks


def alone(records: Sequence[ServerRecord], num_blocks: int) -> float:
    """Tokens a second of one user by the quickest route; 0 where there is none."""
    try:
        hops = find_route(records, 0, num_blocks, Client(round_trip=lambda peer_id: ROUND_TRIP_S), now=NOW)
    except MissingBlocksError:
        return 0.0
    return 1 / (sum(hop.decode_s for hop in hops) + ROUND_TRIP_S * len(hops))


# ---- Petals' rule


def petals_choice(strength: Sequence[float], length: int) -> int:
    """Where it begins: at the window with the smallest throughputs in ascending order, the first of equals."""
    return weakest_window(strength, length)


def petals_strength(records: Sequence[ServerRecord], num_blocks: int) -> list[float]:
    strength = [0.0] * num_blocks
    for record in sorted(records, key=lambda record: record.peer_id):
        for block in range(*record.span):
            strength[block] += record.decode_tokens_s
    return strength


def petals_moves(records: Sequence[ServerRecord], own: ServerRecord, rng: random.Random, quality: float = 0.75) -> bool:
    """Whether a server should load other blocks: where the swarm, itself included, let settle in a random order from the moment when it has
    gone, is so much stronger that the present is below `quality` of that; and where its going leaves no block without anybody."""
    tiny = 1e-3
    strength = petals_strength(records, own.num_blocks)
    before = min(strength)
    if before >= quality * most_possible(records, own.num_blocks):
        return False  # whatever comes out below, as no arrangement is stronger than that: it only saves time
    spans = {record.peer_id: record.span for record in records}
    rates = {record.peer_id: record.decode_tokens_s for record in records}

    def change(peer_id: str, factor: float) -> None:
        for block in range(*spans[peer_id]):
            strength[block] += factor * rates[peer_id]

    def go(peer_id: str) -> bool:
        first, end = spans[peer_id]
        change(peer_id, -(1 + tiny))  # the trifle more has it stay where other places are as good
        new = petals_choice(strength, end - first)
        change(peer_id, tiny)
        spans[peer_id] = (new, new + end - first)
        change(peer_id, 1.0)
        return new != first

    change(own.peer_id, -(1 + tiny))
    hole = before > tiny and min(strength) <= 0
    change(own.peer_id, 1 + tiny)
    if hole or not go(own.peer_id):
        return False
    moved = True
    while moved:
        order = list(spans)
        rng.shuffle(order)
        moved = any([go(peer_id) for peer_id in order])
    after = min(strength)
    return after >= max(before, tiny) and before / after < quality - tiny


# ---- still swarms


def still_petalnet(records: list[ServerRecord]) -> int:
    """Let the servers move, one after another as their turns come, until none does; returns how many moves that took."""
    for moves in itertools.count():
        found = find_moves(records[1:], records[0], now=NOW)
        if not found:
            return moves
        index = next(index for index, record in enumerate(records) if record.peer_id == found[0].peer_id)
        records[index] = replace(records[index], span=found[0].span)
    raise AssertionError


def still_petals(records: list[ServerRecord], rng: random.Random) -> int:
    for moves in itertools.count():
        order = list(range(len(records)))
        rng.shuffle(order)
        mover = next((index for index in order if petals_moves(records, records[index], rng)), None)
        if mover is None or moves > 20 * len(records):
            return moves
        own = records.pop(mover)
        length = own.span[1] - own.span[0]
        first = petals_choice(petals_strength(records, own.num_blocks), length)
        records.append(replace(own, span=(first, first + length)))
    raise AssertionError


def still(swarms: int, seed: int) -> None:
    print(
        f"\n{swarms} still swarms of 4 to 7 servers of {SMALL.num_blocks} blocks: of the optimum (mean, worst tenth, worst), moves a swarm"
    )
    for title, scattered in (("chosen one after another", False), ("scattered at random", True)):
        shares: dict[str, list[float]] = {}
        moves: dict[str, int] = {}
        rng = random.Random(seed)
        done = 0
        while done < swarms:
            records: list[ServerRecord] = []
            for number in range(rng.choice((4, 5, 6, 7))):
                own = made(number, SMALL, rng)
                length = own.span[1]
                first = rng.randint(0, SMALL.num_blocks - length)
                span = (first, first + length) if scattered else choose_span(records, SMALL.num_blocks, length, now=NOW)
                records.append(replace(own, span=span, state="online"))
            best = optimum(records, SMALL.num_blocks)
            if best == 0.0:
                continue
            done += 1
            for rule in ("first", "petals", "petalnet"):
                swarm = list(records)
                went = 0 if rule == "first" else still_petals(swarm, rng) if rule == "petals" else still_petalnet(swarm)
                moves[rule] = moves.get(rule, 0) + went
                shares.setdefault(rule, []).append(weakest(swarm, SMALL.num_blocks) / best)
        for rule, values in shares.items():
            tenth = sorted(values)[len(values) // 10]
            print(f"  {title:26} {rule:9} {statistics.mean(values):.3f}  {tenth:.3f}  {min(values):.3f}   {moves[rule] / swarms:.2f}")


# ---- living swarms


@dataclass(eq=False)
class Member:
    """A server of a living swarm: what others have heard of it, and what it really does."""

    record: ServerRecord
    alive: bool = True
    listed: bool = True
    settled_at: float = 0.0
    known: tuple[str, ...] = ()
    move: Move | None = None
    is_dirty: bool = field(default=False)


class Life:
    """A swarm in which servers come and go, by one of the rules."""

    def __init__(self, rule: str, kind: Kind, size: int, life_s: float, seed: int) -> None:
        self.rule, self.kind, self.size, self.life_s = rule, kind, size, life_s
        self.world, self.rng = random.Random(seed), random.Random(seed + 1)  # what happens to the swarm is the same for each rule
        self.members: dict[str, Member] = {}
        self.now = 0.0
        self.moves = self.opened = 0
        self.decisions: list[float] = []
        self.samples: list[tuple[float, float, float]] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._hole_since: float | None = None
        self._cached: tuple[int, list[Move]] = (-1, [])
        self._version = 0

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._count), action))

    def run(self, until: float, warm: float) -> None:
        for number in range(self.size):
            self.at(self.world.uniform(0, 120), lambda number=number: self.come(number))  # type: ignore[misc]
        self._coming = itertools.count(self.size)
        self.at(self.world.expovariate(self.size / self.life_s), self.another)
        self.at(warm, lambda: self.sample(until))
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            action()

    # what happens

    def another(self) -> None:
        self.come(next(self._coming))
        self.at(self.world.expovariate(self.size / self.life_s), self.another)

    def come(self, number: int) -> None:
        member = Member(made(number, self.kind, self.world))
        life_s, abrupt = self.world.expovariate(1 / self.life_s), self.world.random() < ABRUPT
        self.members[member.record.peer_id] = member
        member.listed = False
        self.at(life_s, lambda: self.go(member, abrupt))
        wait = self.rng.uniform(0, 10) if self.rule == "petals" else 0.0
        self.at(wait, lambda: self.begin(member))

    def go(self, member: Member, abrupt: bool) -> None:
        member.alive = False
        self._version += 1
        if abrupt or not member.listed:
            self.at(LISTED_S, lambda: self.forget(member))
        else:
            self.tell(member, state="draining")
            self.at(DRAIN_S, lambda: self.forget(member))

    def forget(self, member: Member) -> None:
        member.listed = False
        self.members.pop(member.record.peer_id, None)
        self._version += 1

    def tell(self, member: Member, **changes: object) -> None:
        member.record = replace(member.record, **changes)  # type: ignore[arg-type]
        self._version += 1

    def heard(self, but: Member | None = None) -> list[ServerRecord]:
        """What all know."""
        return [member.record for member in self.members.values() if member.listed and member is not but]

    def usable(self) -> list[ServerRecord]:
        """Who really answers."""
        return [member.record for member in self.members.values() if member.alive and member.record.state in ("online", "draining")]

    # joining

    def begin(self, member: Member) -> None:
        if not member.alive:
            return
        others = [record for record in self.heard(member) if record.state in ("joining", "online")]
        length = member.record.span[1] - member.record.span[0]
        if self.rule == "petals":
            first = petals_choice(petals_strength(others, self.kind.num_blocks), length)
            self.tell(member, span=(first, first + length))
        else:
            member.known = tuple(record.peer_id for record in others)
            self.tell(member, span=choose_span(others, self.kind.num_blocks, length, now=NOW))
            self.at(TOLD_S, lambda: self.look_again(member))
        self.at(1.0, lambda: self.list(member))  # news take a second
        self.at(LOAD_S, lambda: self.ready(member))

    def list(self, member: Member) -> None:
        member.listed = member.alive
        self._version += 1

    def look_again(self, member: Member) -> None:
        if member.alive:
            self.tell(member, span=reconsider(self.heard(member), member.record, member.known, now=NOW))

    def ready(self, member: Member) -> None:
        if not member.alive:
            return
        self.tell(member, state="online")
        member.settled_at = self.now
        if self.rule == "petals":
            self.at(self.rng.uniform(0, 240), lambda: self.look_petals(member))
        elif self.rule == "petalnet":
            self.at(self.rng.uniform(0.5, 1.5) * LOOK_EVERY_S, lambda: self.look(member, urgent=False))
            self.at(self.rng.uniform(0, CHECK_EVERY_S), lambda: self.check(member))

    # moving

    def look_petals(self, member: Member) -> None:
        if not member.alive or member.record.state != "online":
            return
        records = [record for record in self.heard() if record.state in ("joining", "online")]
        began = time.perf_counter()
        goes = petals_moves(records, member.record, self.rng)
        self.decisions.append(time.perf_counter() - began)
        if not goes:
            self.at(self.rng.uniform(0, 240), lambda: self.look_petals(member))
            return
        others = [record for record in records if record.peer_id != member.record.peer_id]
        length = member.record.span[1] - member.record.span[0]
        first = petals_choice(petals_strength(others, self.kind.num_blocks), length)
        self.leave(member, (first, first + length))

    def check(self, member: Member) -> None:
        """Whether there is a hole, and has been for a while."""
        if not member.alive:
            return
        self.at(CHECK_EVERY_S, lambda: self.check(member))
        if member.record.state != "online":
            return
        if self._holes_heard() and self._hole_since is not None and self.now - self._hole_since >= HOLE_PATIENCE_S:
            self.look(member, urgent=True)

    def _holes_heard(self) -> bool:
        if self._cached[0] != self._version:
            held = strengths(
                places_of([record for record in self.heard() if record.state != "draining"], self.kind.num_blocks, now=NOW),
                self.kind.num_blocks,
            )
            hole = 0 in held
            self._hole_since = (self.now if self._hole_since is None else self._hole_since) if hole else None
            began = time.perf_counter()
            records = self.heard()
            own = next((record for record in records if record.state == "online"), None)
            moves = [] if own is None else find_moves(records, own, now=NOW)
            self.decisions.append(time.perf_counter() - began)
            self._cached = (self._version, moves)
        return self._hole_since is not None

    def look(self, member: Member, *, urgent: bool) -> None:
        if not member.alive:
            return
        if not urgent:
            self.at(self.rng.uniform(0.5, 1.5) * LOOK_EVERY_S, lambda: self.look(member, urgent=False))
        if member.record.state != "online":
            return
        self._holes_heard()
        moves = [move for move in self._cached[1] if self._ready_to(move)][:1]
        if not moves or moves[0].peer_id != member.record.peer_id:
            return
        member.move = moves[0]
        self.tell(member, state="draining")
        self.at(TOLD_S + DRAIN_S, lambda: self.away(member))

    def _ready_to(self, move: Move) -> bool:
        """Whether it is long enough since a server came where it is; others pass it over."""
        return move.fills or self.now - self.members[move.peer_id].settled_at >= STAY_S

    def away(self, member: Member) -> None:
        move = member.move
        if not member.alive or move is None:
            return
        if may_leave(self.heard(member), member.record, move, now=NOW):
            self.leave(member, move.span)
        else:
            self.tell(member, state="online")

    def leave(self, member: Member, span: tuple[int, int]) -> None:
        before = weakest(self.usable(), self.kind.num_blocks)
        self.tell(member, state="joining", span=span)
        self.opened += before > 0 and weakest(self.usable(), self.kind.num_blocks) == 0
        self.moves += 1
        self.at(LOAD_S, lambda: self.ready(member))

    # what it is worth

    def sample(self, until: float) -> None:
        there = [member.record for member in self.members.values() if member.alive]
        best = optimum(there, self.kind.num_blocks) if self.size <= 8 else most_possible(there, self.kind.num_blocks)
        usable = self.usable()
        self.samples.append((weakest(usable, self.kind.num_blocks), best, alone(usable, self.kind.num_blocks)))
        if self.now < until:
            self.at(SAMPLE_S if self.size <= 100 else 10 * SAMPLE_S, lambda: self.sample(until))


def living(kind: Kind, size: int, life_s: float, hours: float, seeds: Sequence[int], limit: str) -> None:
    print(f"\n{size} servers of {kind.num_blocks} blocks that stay {life_s / 3600:g} h on average, {hours:g} h × {len(seeds)}, {limit}:")
    print("  rule      of that   no hole   one user, tokens/s   moves/server/h   holes opened by moves   a decision, ms (mean, worst)")
    for rule in ("first", "petals", "petalnet"):
        reached = possible = whole = could = user = moves = opened = 0.0
        decisions: list[float] = []
        for seed in seeds:
            life = Life(rule, kind, size, life_s, seed)
            life.run(hours * 3600, warm=600)
            reached += sum(now for now, _, _ in life.samples)
            possible += sum(best for _, best, _ in life.samples)
            whole += sum(now > 0 for now, best, _ in life.samples if best > 0)
            could += sum(best > 0 for _, best, _ in life.samples)
            user += statistics.mean(speed for _, _, speed in life.samples) / len(seeds)
            moves += life.moves
            opened += life.opened
            decisions += life.decisions
        rate = moves / (len(seeds) * hours * size)
        times = f"{1000 * statistics.mean(decisions):.2f}, {1000 * max(decisions):.0f}" if decisions else "-"
        print(f"  {rule:9} {reached / possible:7.3f} {whole / could:9.3f} {user:13.1f} {rate:18.2f} {opened:16.0f} {times:>30}")


def decision(size: int, seed: int) -> None:
    """The longest decision: a swarm that stands so badly that everything has to be worked out."""
    rng = random.Random(seed)
    records = []
    for number in range(size):
        own = made(number, LARGE, rng)
        first = min(rng.randint(0, 79), LARGE.num_blocks - own.span[1]) // 3
        records.append(replace(own, span=(first, first + own.span[1]), state="online"))
    records.append(replace(made(size, LARGE, rng), span=(0, 80), state="online"))
    began = time.perf_counter()
    moves = find_moves(records[1:], records[0], now=NOW)
    took = time.perf_counter() - began
    places = places_of(records, LARGE.num_blocks, now=NOW)
    settled: list[Place] = settle(places, LARGE.num_blocks, {place.peer_id for place in places})
    now, then = (min(strengths(each, LARGE.num_blocks)) / 1000 for each in (places, settled))
    print(
        f"\none decision among {size} servers that stand badly ({now:.0f} tokens/s, {then:.0f} possible, {len(moves)} may go): {took:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    few = 2 if options.quick else 8
    seeds = [options.seed + 100 * index for index in range(few)]
    still(60 if options.quick else 300, options.seed)
    living(SMALL, 6, 3600, 6, seeds, "of the optimum")
    living(LARGE, 50, 2 * 3600, 2, seeds[: few // 2], "of all work spread evenly")
    if not options.quick:
        living(LARGE, 200, 2 * 3600, 1, seeds[:1], "of all work spread evenly")
        living(LARGE, 1000, 2 * 3600, 1, seeds[:1], "of all work spread evenly")
    decision(1000, options.seed)


if __name__ == "__main__":
    main()
