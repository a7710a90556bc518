"""The records protocol in a swarm of ten thousand nodes, in virtual time.

    python benchmarks/records_simulation.py                  # 10,000 nodes, 20 minutes of them (about 3 minutes)
    python benchmarks/records_simulation.py --nodes 1000

What a node decides is decided by the same code as in a real one: the store and who gives way in it, who is nearest, who is asked next
where somebody fails, who is avoided for how long, what answers come to, how often a server speaks. Records are really signed and
checked. Only the network is made up: requests take a round trip, some nodes never answer, some lie, nodes come, leave and die, and what a
node knows of the others is patchy and out of date.

Prints the share of a model's servers that a look-up finds, how many of those it names are dead, what a node keeps and is asked, and how
long it takes until a new server is found and a dead one is not named any more.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from petalnet.p2p.avoidance import Avoidance, Reason
from petalnet.p2p.identity import Identity
from petalnet.p2p.places import key_place, peer_place
from petalnet.p2p.record_keeper import MAX_ANSWER_RECORDS
from petalnet.p2p.record_store import RecordStore, read_kept
from petalnet.p2p.replication import REPLICAS, Announcement, Asking, Lie, LookUps, Merge, may_end
from petalnet.p2p.signed import sign
from petalnet.routing.pace import BEAT_S, LEFT_LIFETIME_S, LIFETIME_BEATS, beat_s, list_every_s, refresh_every_s
from petalnet.routing.records import SWARM_KEY, ServerRecord, discovery_key, next_sequence

EPOCH = 1_800_000_000.0
"""Unix time at which the virtual time is 0."""
ROUND_TRIP_S = (0.02, 0.3)
SILENCE_S = 1.0
"""What a keeper that does not answer costs whoever asks it: `discovery.QUERY_TIMEOUT_S`."""
ROUND_S = 1.8
"""`discovery.ROUND_TIMEOUT_S`."""
DIAL_S = 5.0
"""Until an attempt to connect to a machine that is gone is given up; where only the process is gone, that is known at once."""
KNOWN = 0.85
"""Chance that a look-up comes across any one of the nodes near a key."""
STALE_S = 300.0
"""Seconds for which the dead are still in the tables of the living."""
NOTICED = 0.9
"""Chance that a keeper has a connection to a server that dies, and so notices; the others wait until its record expires."""
TO_NOTICE_S = (0.2, 8.0)
"""Until a broken connection is noticed (a process that is killed, a machine that is cut off) and an attempt to connect again has failed."""


@dataclass(frozen=True)
class Setting:
    """What is simulated; times are seconds, shares and chances 0 to 1."""

    nodes: int = 10_000
    seconds: float = 1200.0
    warm_up: float = 300.0
    servers: float = 0.5
    """Share of nodes that serve blocks; the others keep records all the same."""
    models: int = 40
    silent: float = 0.05
    """Share of nodes that take requests and never answer."""
    liars: float = 0.05
    """Share of nodes that keep nothing and answer with records of dead servers, and one in four of them with forged ones."""
    session: float = 3600.0
    """Mean time for which a node stays; then as many die as leave in good order, and others join."""
    skew: float = 300.0
    """Standard deviation of the nodes' clocks, cut off at ten minutes between any two."""
    look_ups: int = 200
    seed: int = 1


@dataclass(eq=False)
class Node:
    """One node; `model` is what it serves, None where it serves nothing."""

    peer_id: str
    identity: Identity
    behaviour: str
    source: str
    skew: float
    model: str | None
    born: float
    died: float = float("inf")
    store: RecordStore = field(init=False)
    avoidance: Avoidance = field(default_factory=Avoidance)
    look_ups: LookUps = field(default_factory=LookUps)
    record: bytes = b""
    sequence: int = 0
    announced: float = float("inf")
    keepers: set[str] = field(default_factory=set)
    beat: float = BEAT_S
    listed: float = float("-inf")
    list_every: float = BEAT_S
    forges: bool = False
    requests: int = 0
    answered: int = 0

    def clock(self, now: float) -> float:
        """What its clock shows."""
        return EPOCH + now + self.skew


@dataclass
class Outcome:
    """What came out; lists are over look-ups, nodes or servers."""

    found: list[float] = field(default_factory=list)
    """Share of a model's living servers that one look-up found, where one answer could hold them all."""
    found_large: list[int] = field(default_factory=list)
    """Servers that one look-up found of a model that has more than one answer holds."""
    dead: list[float] = field(default_factory=list)
    """Share of those named that were dead."""
    to_find: list[float] = field(default_factory=list)
    to_forget: list[float] = field(default_factory=list)
    look_up_s: list[float] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    kib: list[float] = field(default_factory=list)


class Simulation:
    """One run; `run` gives its outcome."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.now = 0.0
        self.outcome = Outcome()
        self.nodes: dict[str, Node] = {}
        self._random = random.Random(setting.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._models = [f"model-{number}" for number in range(setting.models)]
        # The first models are served by many, the last by a few, as in every swarm.
        self._weights = [1 / (rank + 1) for rank in range(setting.models)]
        self._keys = {discovery_key(model): model for model in self._models} | {SWARM_KEY: None}
        self._near: dict[bytes, list[tuple[int, Node]]] = {key: [] for key in self._keys}
        self._dead_records: list[tuple[str, bytes]] = []
        self._farewells: set[bytes] = set()

    # ---- the run

    def run(self) -> Outcome:
        """Everybody joins over the first minute or two; what happens after the warm-up counts."""
        setting = self.setting
        for _ in range(setting.nodes):
            self.at(self._random.uniform(0, min(setting.warm_up / 2, 120.0)), self._join)
        self.at(setting.warm_up, self._start_counting)
        for moment in _spread(setting.warm_up, setting.seconds - 30, setting.look_ups):
            self.at(moment, self._look_up_some_model)
        for moment in _spread(setting.warm_up, setting.seconds - 200, max(setting.look_ups // 6, 5)):
            self.at(moment, self._follow_newcomer)
            self.at(moment, self._follow_death)
        while self._events and self._events[0][0] <= setting.seconds:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = setting.seconds
        self._stop_counting()
        return self.outcome

    def at(self, moment: float, event: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (moment, next(self._order), event))

    # ---- nodes that come and go

    def _join(self, model: str | None = None) -> Node:
        setting, rng = self.setting, self._random
        identity = Identity(rng.randbytes(32))
        behaviour = rng.choices(("honest", "silent", "liar"), (1 - setting.silent - setting.liars, setting.silent, setting.liars))[0]
        if model is None and rng.random() < setting.servers:
            model = rng.choices(self._models, self._weights)[0]
        node = Node(
            peer_id=identity.peer_id,
            identity=identity,
            behaviour=behaviour,
            # A third of the nodes share a provider's networks, the others have one each.
            source=f"10.{rng.randrange(50)}.0.0/24" if rng.random() < 1 / 3 else f"net of {identity.peer_id}",
            skew=max(min(rng.gauss(0, setting.skew), 300.0), -300.0),
            model=model,
            born=self.now,
        )
        node.forges = rng.random() < 0.25
        node.store = RecordStore(node.peer_id, rng=random.Random(rng.random()))
        self.nodes[node.peer_id] = node
        for key, near in self._near.items():
            bisect.insort(near, (peer_place(node.peer_id) ^ key_place(key), node), key=lambda entry: entry[0])
        self.at(self.now + rng.expovariate(1 / setting.session), lambda: self._end(node, in_order=rng.random() < 0.5))
        if model is not None:
            self._announce(node)
            self._refresh(node)
        return node

    def _end(self, node: Node, *, in_order: bool, replaced: bool = True) -> None:
        if node.died <= self.now:
            return
        if in_order and node.model is not None:
            self._announce(node, state="left")
        node.died = self.now
        if node.record and not in_order:
            self._dead_records.append((node.model or "", node.record))
            for peer_id in node.keepers:
                if self._random.random() < NOTICED:
                    self.at(self.now + self._random.uniform(*TO_NOTICE_S), lambda peer_id=peer_id: self._notice(self.nodes[peer_id], node))
        if replaced:
            self.at(self.now + self._random.expovariate(1 / 5.0), self._join)

    def _notice(self, keeper: Node, dead: Node) -> None:
        if keeper.died > self.now:
            keeper.store.mark_lost(dead.peer_id)

    # ---- what servers do

    def _announce(self, node: Node, state: str = "online") -> None:
        if node.died <= self.now or node.model is None:
            return
        clock = node.clock(self.now)
        record = ServerRecord(
            peer_id=node.peer_id,
            addrs=("/ip4/198.51.100.7/tcp/31330",),
            model=node.model,
            model_name=node.model,
            span=(0, 8),
            num_blocks=32,
            state=state,
            dtype="bfloat16",
            sequence=next_sequence(node.sequence, clock),
            issued=clock,
            expires=clock + (LEFT_LIFETIME_S if state == "left" else LIFETIME_BEATS * node.beat),
            block_digests=tuple(f"{block:032x}" for block in range(8)),
        )
        node.sequence, node.record = record.sequence, sign(node.identity, record.encode())
        if state == "left":
            self._farewells.add(node.record)
        keys = [discovery_key(node.model)]
        if state == "left" or node.list_every <= node.beat or self.now - node.listed >= node.list_every:
            keys.append(SWARM_KEY)
        kept = read_kept(node.record, keys, now=clock)
        node.store.add(kept, now=clock)
        announcement = Announcement(kept, {key: node.store.count(key) for key in keys})

        def store(keeper: Node, keys: Sequence[bytes]) -> bool:
            keeper.requests += 1
            if keeper.behaviour == "liar":
                announcement.answer(keeper.peer_id, keys, newest=0, counts=[10**9] * len(keys))
                return True
            local = keeper.clock(self.now)
            expires = local + kept.expires - kept.received
            keeper.store.add(replace(kept, keys=frozenset(keys), source=node.source, received=local, expires=expires), now=local)
            counts = [keeper.store.count(key) for key in keys]
            announcement.answer(keeper.peer_id, keys, newest=keeper.store.newest(node.peer_id), counts=counts)
            return True

        took = self._ask_around(node, keys, store)
        node.keepers = announcement.stored - {node.peer_id}
        node.beat = beat_s(announcement.crowds[keys[0]])
        if SWARM_KEY in keys:
            node.list_every = list_every_s(announcement.crowds[SWARM_KEY], node.list_every, record.expires - clock)
            node.listed = self.now
        if node.announced == float("inf"):
            node.announced = self.now + took
        if state != "left":
            self.at(self.now + node.beat, lambda: self._announce(node))

    def _refresh(self, node: Node) -> None:
        """A server looks up its model again and again; only what that costs those whom it asks is counted."""
        if node.died <= self.now or node.model is None:
            return
        key = discovery_key(node.model)
        known = 0

        def count(keeper: Node, _: Sequence[bytes]) -> bool:
            nonlocal known
            keeper.requests += 1
            if keeper.behaviour == "honest":
                known = keeper.store.count(key)
                keeper.answered += min(known, MAX_ANSWER_RECORDS) * len(node.record)
            return True

        self._ask_around(node, [key], count, 3)
        self.at(self.now + refresh_every_s(known) * self._random.uniform(0.9, 1.1), lambda: self._refresh(node))

    # ---- the network between

    def _ask_around(
        self, node: Node, keys: Sequence[bytes], ask: Callable[[Node, Sequence[bytes]], bool], count: int = REPLICAS, *, hurry: bool = False
    ) -> float:
        """As `Discovery._ask_around`; returns the seconds that it took. What is asked takes effect at once."""
        asking = Asking(keys, count, rng=self._random)
        for key in keys:
            if node.look_ups.is_due(key, self.now):
                node.look_ups.note(key, list(self._nearby(node, key)), self.now)
            asking.offer(key, (peer_id for peer_id in node.look_ups.peers(key) if not node.avoidance.is_avoided(peer_id, self.now)))
        under_way: list[tuple[float, str, list[bytes], Reason | None]] = []
        wanted = answered = 0
        took, deadline = 0.0, ROUND_S

        def pump() -> None:
            nonlocal wanted
            for peer_id, its_keys in asking.next().items():
                wanted += 1
                seconds, failure = self._contact(self.nodes[peer_id], its_keys, ask)
                heapq.heappush(under_way, (took + seconds, peer_id, its_keys, failure))

        pump()
        while under_way:
            moment, peer_id, its_keys, failure = heapq.heappop(under_way)
            if failure is not None:  # also of those that are not waited for any more
                node.avoidance.add(peer_id, failure, self.now)
                node.look_ups.forget(peer_id)
                asking.failed(peer_id, its_keys)
                wanted -= 1
            if moment > deadline:
                took = deadline
                continue
            took = moment
            if failure is None:
                answered += 1
            else:
                pump()
            if hurry and may_end(wanted, answered):
                deadline, hurry = min(deadline, 2 * took), False
        return took

    def _contact(self, keeper: Node, keys: list[bytes], ask: Callable[[Node, Sequence[bytes]], bool]) -> tuple[float, Reason | None]:
        """One request: the seconds until it is over, and how it failed, if it did."""
        if keeper.died <= self.now:
            return self._random.choice((0.1, DIAL_S)), Reason.UNREACHABLE
        if keeper.behaviour == "silent":
            keeper.requests += 1
            return SILENCE_S, Reason.SILENT
        return self._random.uniform(*ROUND_TRIP_S), None if ask(keeper, keys) else Reason.LYING

    def _nearby(self, node: Node, key: bytes) -> Iterator[str]:
        """What a look-up of Kademlia's comes to: nodes near the key, not all of them, and some that died lately."""
        wanted = 2 * REPLICAS
        for _, other in self._near[key]:
            if other.died > self.now - STALE_S and other is not node and self._random.random() < KNOWN:
                yield other.peer_id
                wanted -= 1
                if not wanted:
                    return

    # ---- what readers see

    def find(self, reader: Node, model: str) -> set[str]:
        """The servers that a look-up names, without those that say that they have left."""
        key = discovery_key(model)
        clock = reader.clock(self.now)
        merge = Merge(key, clock, most=MAX_ANSWER_RECORDS)
        for kept in reader.store.find(key, now=clock):
            merge.add_own(kept)

        def query(keeper: Node, _: Sequence[bytes]) -> bool:
            keeper.requests += 1
            try:
                merge.answer(*self._answer(keeper, key, model))
            except Lie:
                return False
            return True

        self.outcome.look_up_s.append(self._ask_around(reader, [key], query, hurry=True))
        return {kept.peer_id for kept in merge.result() if kept.data not in self._farewells}

    def _answer(self, keeper: Node, key: bytes, model: str) -> tuple[list[bytes], list[float], int]:
        if keeper.behaviour == "liar":
            replayed = [data for name, data in self._dead_records if name == model][-50:]
            if keeper.forges:
                replayed.append(b"forged")
            return replayed, [0.0] * len(replayed), len(replayed)
        clock = keeper.clock(self.now)
        keeper.store.expire(clock)
        found, count = keeper.store.find(key, now=clock, most=MAX_ANSWER_RECORDS), keeper.store.count(key)
        keeper.answered += sum(len(kept.data) for kept in found)
        ages = [max(clock - kept.received, 0.0) for kept in found]
        return [kept.data for kept in found], ages, len(found) if count <= MAX_ANSWER_RECORDS else count

    def _reader(self) -> Node:
        """An honest node that is there."""
        while True:
            node = self._random.choice(list(self.nodes.values()))
            if node.died > self.now and node.behaviour == "honest":
                return node

    def _living(self, model: str) -> set[str]:
        return {
            peer_id for peer_id, node in self.nodes.items() if node.model == model and node.died > self.now and node.announced <= self.now
        }

    def _look_up_some_model(self) -> None:
        model = self._random.choice(self._models)
        living, named = self._living(model), self.find(self._reader(), model)
        if not living:
            return
        if len(living) <= MAX_ANSWER_RECORDS:
            self.outcome.found.append(len(living & named) / len(living))
        else:
            self.outcome.found_large.append(len(living & named))
        self.outcome.dead.append(len(named - living) / max(len(named), 1))

    def _small_model(self) -> str:
        """One of which each answer holds all servers: what a reader gets of a larger one is left to chance."""
        return self._random.choice([model for model in self._models if len(self._living(model)) < MAX_ANSWER_RECORDS // 2])

    def _follow_newcomer(self) -> None:
        """A server joins; how long after it began to announce itself do three readers, who ask anew each time, know of it?"""
        began = self.now
        newcomer = self._join(self._small_model())
        self._poll(newcomer, began, self.outcome.to_find, named=True)

    def _follow_death(self) -> None:
        """A server dies; how long after that do three readers in a row not name it?"""
        model = self._small_model()
        settled = [node for peer_id in self._living(model) if (node := self.nodes[peer_id]).announced < self.now - BEAT_S]
        if not settled:
            return
        victim = self._random.choice(settled)
        self._end(victim, in_order=False)
        self._poll(victim, self.now, self.outcome.to_forget, named=False)

    def _poll(self, server: Node, began: float, times: list[float], *, named: bool) -> None:
        assert server.model is not None

        def look() -> None:
            if self.now - began > 180:
                times.append(float("inf"))
            elif all((server.peer_id in self.find(self._reader(), server.model or "")) is named for _ in range(3)):
                times.append(self.now - began)
            else:
                self.at(self.now + max(0.25, (self.now - began) / 8), look)

        self.at(self.now + ROUND_TRIP_S[1], look)

    # ---- counting

    def _start_counting(self) -> None:
        for node in self.nodes.values():
            node.requests = node.answered = 0
        self.outcome.look_up_s.clear()

    def _stop_counting(self) -> None:
        minutes = (self.setting.seconds - self.setting.warm_up) / 60
        there = [node for node in self.nodes.values() if node.died > self.now and node.born < self.setting.warm_up]
        self.outcome.records = [len(node.store) for node in there if node.behaviour == "honest"]
        self.outcome.requests = [node.requests / minutes for node in there]
        self.outcome.kib = [node.answered / 1024 / minutes for node in there]


def _spread(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * (number + 0.5) / count for number in range(count)]


def report(setting: Setting, outcome: Outcome) -> str:
    """The outcome as text."""

    def spread(values: Sequence[float], unit: str = "") -> str:
        ordered = sorted(values)
        if not ordered:
            return "none"
        at = {share: ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.9, 0.99)}
        return f"median {at[0.5]:.3g}{unit}, 90 % {at[0.9]:.3g}{unit}, 99 % {at[0.99]:.3g}{unit}, most {ordered[-1]:.3g}{unit}"

    worst = sorted(outcome.found)
    lines = [
        f"{setting.nodes} nodes, {setting.servers:.0%} of them servers of {setting.models} models, {setting.silent:.0%} silent, "
        f"{setting.liars:.0%} liars, clocks up to ten minutes apart, a node stays {setting.session / 60:.0f} minutes; "
        f"{setting.seconds - setting.warm_up:.0f} s after {setting.warm_up:.0f} s",
        f"servers found by one look-up: {statistics.mean(outcome.found):.2%} on average, {worst[len(worst) // 100]:.1%} in one of 100",
        f"servers found of models with more than {MAX_ANSWER_RECORDS}: {spread(outcome.found_large)}",
        f"dead among those named: {statistics.mean(outcome.dead):.2%} on average",
        f"a look-up: {spread(outcome.look_up_s, ' s')}",
        f"a new server is found by three readers after: {spread(outcome.to_find, ' s')}",
        f"a dead server is named by none of three readers after: {spread(outcome.to_forget, ' s')}",
        f"records that a node keeps: mean {statistics.mean(outcome.records):.1f}, {spread(outcome.records)}",
        f"requests to a node per minute: mean {statistics.mean(outcome.requests):.1f}, {spread(outcome.requests)}",
        f"KiB that a node answers per minute: mean {statistics.mean(outcome.kib):.1f}, {spread(outcome.kib)}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in fields(Setting):
        parser.add_argument(f"--{entry.name.replace('_', '-')}", type=type(entry.default), default=entry.default)
    setting = Setting(**vars(parser.parse_args()))
    began = time.perf_counter()
    print(report(setting, Simulation(setting).run()))
    print(f"({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
