"""What the scheduler makes of a server's time: its real code in virtual time, with made-up costs of passes and made-up clients.

    python benchmarks/rounds_simulation.py       # about half a minute

Clients are closed loops: a prompt, then a token after each answer, after the time that their own computation and their network take.
Three ways to begin a round are compared: at once when anything is there; only when everybody is there (lock-step); and the scheduler's own.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from petalnet.blocks.costs import Costs
from petalnet.blocks.passes import CHUNK_TOKENS
from petalnet.blocks.scheduler import Part, Scheduler, Task

BLOCKS = 24
CPU_MS = {1: 90, 2: 92, 3: 98, 4: 145, 8: 160, 16: 175, 32: 220, 64: 310, 128: 510, 2048: 7500}
"""Milliseconds of a pass by its tokens: 24 blocks of 1024 features, float32, one thread of a server's CPU."""
SLOW_CPU_MS = {1: 90, 2: 92, 3: 98, 4: 170, 8: 220, 16: 240, 32: 270, 64: 340, 128: 540, 2048: 7700}
"""The same with a slower product of a few rows."""
GPU_MS = {1: 18, 64: 20, 256: 26, 512: 40, 2048: 130}


def curve(points: dict[int, float], noise: float = 0.05, seed: int = 0) -> Callable[[int], float]:
    """Seconds of a pass by its tokens, through these points (milliseconds), with so much noise."""
    drawn = random.Random(seed)
    known = sorted(points.items())

    def seconds(tokens: int) -> float:
        exact = known[-1][1] * tokens / known[-1][0]
        for (fewer, quick), (more, slow) in itertools.pairwise(known):
            if tokens <= more:
                exact = quick + (slow - quick) * max(0, tokens - fewer) / (more - fewer)
                break
        return exact / 1000 * drawn.uniform(1 - noise, 1 + noise)

    return seconds


@dataclass
class Core:
    """A processor that clients share: they compute one after another."""

    free_at: float = 0.0


@dataclass(eq=False)
class Client:
    """One closed loop.

    Attributes:
        think_s: least and most seconds of its own computation between an answer and the next token, on its core.
        away_s: least and most seconds that its network takes to the server and back.
        rows: tokens that a decode step puts into a pass.
        prompt: tokens of its prompt; 0 for none.
        repeat: ask prompt after prompt, each followed by so many tokens; 0 for one prompt and tokens for ever.
        passes: rows and length of stateless passes that it asks for instead.
    """

    name: str
    think_s: tuple[float, float] = (0.006, 0.010)
    away_s: tuple[float, float] = (0.0, 0.0)
    core: Core | None = None
    peer: str | None = None
    key: object = "steps"
    rows: int = 1
    prompt: int = 0
    repeat: int = 0
    passes: tuple[int, int] | None = None
    begins: float = 0.0
    answered: list[tuple[float, float]] = field(default_factory=list)
    """(when, after how many seconds) for each token."""
    prompts: list[float] = field(default_factory=list)
    """Seconds to the answer of each prompt."""
    rows_done: float = 0.0


class Simulation:
    """A server's compute thread and its clients, in virtual time."""

    def __init__(self, clients: Sequence[Client], cost: Callable[[int], float], scheduler: Scheduler, *, seed: int = 1) -> None:
        self.now = 0.0
        self.clients = list(clients)
        self.scheduler = scheduler
        self.rounds: list[tuple[float, float, list[Part]]] = []
        self.waited_s = 0.0
        self._cost = cost
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._computing = False
        self._wake = 0
        self._asked: dict[Task, tuple[Client, float]] = {}

    def run(self, seconds: float) -> None:
        for client in self.clients:
            self._at(client.begins, lambda client=client: self._ask(client, bool(client.prompt)))
        while self._events and self._events[0][0] <= seconds:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.now = seconds

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def _ask(self, client: Client, prompt: bool) -> None:
        peer = client.peer or client.name
        if client.passes is not None:
            rows, length = client.passes
            chunks = -(-rows * length // CHUNK_TOKENS)
            task = Task(peer, None, None, chunks * BLOCKS, rows * length // chunks, "pass", 1 << 30, None, weight=1 / BLOCKS)
        else:
            task = Task(peer, client, client.key, client.prompt if prompt else 1, client.rows, "step", 1 << 30, None)
        self._asked[task] = (client, self.now)
        self.scheduler.add(task, self.now)
        if not self._computing:
            self._go_on()

    def _go_on(self) -> None:
        decision = self.scheduler.next(self.now)
        self._wake += 1
        if isinstance(decision, float):
            wake, since = self._wake, self.now

            def look_again() -> None:
                if self._wake == wake and not self._computing:
                    self._go_on()

            self._at(max(decision, since), look_again)
        elif decision:
            self._computing = True
            tokens = sum(part.tokens for part in decision)
            seconds = self._cost(tokens) * decision[0].weight if tokens else 0.0001
            self.rounds.append((self.now, seconds, decision))
            self._at(self.now + seconds, lambda: self._finish(decision, seconds))

    def _finish(self, parts: list[Part], seconds: float) -> None:
        self._computing = False
        for part in parts:
            asker = self._asked[part.task][0]
            if asker.passes is not None:
                asker.rows_done += asker.passes[0] * (part.end - part.start) / part.task.units
        for task in self.scheduler.finished(parts, seconds, self.now):
            client, asked = self._asked.pop(task)
            prompt = task.units > 1
            (client.prompts if prompt and client.passes is None else []).append(self.now - asked)
            if not prompt and client.passes is None:
                client.answered.append((self.now, self.now - asked))
            again = bool(client.repeat) and not prompt and len(client.answered) % client.repeat == 0
            think = self._random.uniform(*client.think_s)
            if client.core is not None:
                client.core.free_at = max(client.core.free_at, self.now) + think
                back = client.core.free_at
            else:
                back = self.now + think
            back += self._random.uniform(*client.away_s)
            self._at(back, lambda client=client, again=again: self._ask(client, again))
        self._go_on()


class AtOnce(Scheduler):
    """Starts whatever is there."""

    def _stragglers(self, plan: object, now: float) -> float | None:
        return None


class LockStep(Scheduler):
    """Starts when everybody is there."""

    everybody = 0

    def _stragglers(self, plan: object, now: float) -> float | None:
        return None if len(self) >= self.everybody else 1e9


def seeded(kind: type[Scheduler], cost: Callable[[int], float]) -> Scheduler:
    """A scheduler that was told the rates at which such a server decodes and prefills."""
    return kind(Costs(1 / cost(1), 32 / cost(32)))


def tokens_s(clients: Sequence[Client], seconds: float) -> float:
    """Tokens a second of all clients over the second half."""
    return sum(when > seconds / 2 for client in clients for when, _ in client.answered) / (seconds / 2)


def typical_ms(clients: Sequence[Client]) -> float:
    """The median time of a decode step, in milliseconds."""
    return 1000 * statistics.median(took for client in clients for _, took in client.answered)


def main() -> None:
    seconds = 60.0
    kinds: list[type[Scheduler]] = [AtOnce, LockStep, Scheduler]
    servers = {"CPU": CPU_MS, "slow CPU": SLOW_CPU_MS, "GPU": GPU_MS}
    scenes: dict[str, Callable[[int], list[Client]]] = {}

    def one_core(count: int) -> list[Client]:
        core = Core()
        return [Client(f"client {i}", core=core) for i in range(count)]

    scenes["6-10 ms each, on one core"] = one_core
    scenes["6-10 ms each, each on its own"] = lambda count: [Client(f"client {i}") for i in range(count)]
    scenes["50-200 ms away, each steady"] = lambda count: [
        Client(f"client {i}", away_s=(away, away * 1.05))
        for i, away in enumerate(0.05 + 0.15 * i / max(1, count - 1) for i in range(count))
    ]
    scenes["50-200 ms away, by chance"] = lambda count: [Client(f"client {i}", away_s=(0.05, 0.2)) for i in range(count)]

    def mixed(count: int) -> list[Client]:
        core = Core()
        return [
            Client(f"client {i}", core=core) if i % 2 == 0 else Client(f"client {i}", away_s=(0.05 + 0.02 * i, 0.06 + 0.02 * i))
            for i in range(count)
        ]

    scenes["half on one core, half 50-200 ms away"] = mixed
    for scene, make in scenes.items():
        print(f"\n{scene}: tokens/s of all (median ms of a step)")
        for name, points in servers.items():
            for count in (1, 2, 4, 8):
                cells = []
                for kind in kinds:
                    clients, cost = make(count), curve(points)
                    scheduler = seeded(kind, cost)
                    if isinstance(scheduler, LockStep):
                        scheduler.everybody = count
                    Simulation(clients, cost, scheduler).run(seconds)
                    cells.append(f"{kind.__name__:>9} {tokens_s(clients, seconds):6.1f} ({typical_ms(clients):4.0f})")
                print(f"  {name:>8}, {count} clients: {'  '.join(cells)}")


if __name__ == "__main__":
    main()
