"""A server that many use at a time: how much it computes, how long others wait, and what it need not compute again.

    python benchmarks/engine.py clients --family bloom    # tokens/s of 1, 2, 4, 8 clients of one server
    python benchmarks/engine.py beside                    # the first token of a short prompt while a long one is computed
    python benchmarks/engine.py again                     # a long prompt that has been sent before, or begins like one that has

Real node processes on loopback: one server of all blocks, one compute thread in every process. The reference is `generate` of local
transformers in the same run; the ceiling of many clients is one local call with a row for each of them. `--quick` takes a tiny model,
which only shows that the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generate import Clock
from swarm_processes import Bench, bench, local_addrs, machine, make_llama, make_model, print_table

FAMILIES = {"bloom": (make_model, {"layers": 24}), "llama": (make_llama, {"layers": 16})}
FULL_SIZE = {"hidden": 1024, "heads": 16, "vocabulary": 8192}
QUICK_SIZE = {"layers": 4, "hidden": 64, "heads": 4, "vocabulary": 512}
START_IN_S = 0.05
"""Clients are told that long before they are to begin, so that all begin together."""


class SystemClock(Clock):
    """With times that mean the same in all processes."""

    def put(self, value: Any) -> None:
        self.times.append(time.monotonic())


@dataclass
class Answer:
    """One call of `generate`: when it began and when each token came, by the system's clock, and the ids of the whole row."""

    began: float
    times: list[float]
    ids: list[int]

    @property
    def first_s(self) -> float:
        return self.times[0] - self.began

    @property
    def steps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Place:
    """The model's folder, the server, and a local and a distributed model in this process.

    Attributes:
        delays: how late the server's network loop was, as noted by `watch_loop`: median and worst of a minute, in seconds.
    """

    def __init__(self, running: Bench, options: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from petalnet import AutoDistributedModelForCausalLM

        torch.set_num_threads(1)
        make, sizes = FAMILIES[options.family]
        self.sizes = argparse.Namespace(**FULL_SIZE | sizes | (QUICK_SIZE if options.quick else {}))
        self.running = running
        self.delays: list[tuple[float, float]] = []
        self.path = make(running.folder, self.sizes)
        # A given throughput: the measurement at start is not what is compared here.
        served = ["--serve", f"0:{self.sizes.layers}", "--dtype", "float32", "--throughput", "100"]
        process, ready, _ = running.node(self.path, *served)
        self.server, self.peers = process.pid, local_addrs(ready)
        self.local = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        self.model = AutoDistributedModelForCausalLM.from_pretrained(
            self.path, initial_peers=self.peers, dtype=torch.float32, show_route=False, speculation=False
        )
        size = f"{self.sizes.layers}×{self.sizes.hidden}, {self.sizes.heads} heads, vocabulary {self.sizes.vocabulary}, float32"
        print(f"{options.family} {size}; {machine()}", flush=True)

    def prompt(self, tokens: int, seed: int) -> list[int]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(10, self.sizes.vocabulary, (tokens,), generator=generator).tolist()

    def watch_loop(self) -> None:
        """Note how late the server's network loop was in the last minute; to be called at least once a minute."""
        from petalnet.inspection import ask_nodes

        for node in ask_nodes():
            if node["pid"] == self.server and node.get("engine"):
                delay = node["engine"]["loop_delay_s"]
                self.delays.append((delay["median"], delay["worst"]))

    def print_loop(self) -> None:
        if self.delays:
            medians, worst = zip(*self.delays, strict=True)
            print(f"the server's network loop was late by {statistics.median(medians) * 1e3:.1f} ms, {max(worst) * 1e3:.1f} at most")

    def process(self) -> Client:
        """A client in a process of its own."""
        return Client(self.running, self.path, self.peers)


def answer(model: Any, rows: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
    """One call of `generate` for all rows."""
    import torch

    clock, began = SystemClock(), time.monotonic()
    streamer = clock if len(rows) == 1 else None  # the library has none for more
    output = model.generate(torch.tensor(rows), max_new_tokens=tokens, do_sample=False, streamer=streamer)
    times = clock.times[1:] or [time.monotonic()]  # the first call brings the prompt
    return [Answer(began, times, ids) for ids in output.tolist()]


class Client:
    """A client process, which answers one request after the other; `ask`, then `wait`."""

    def __init__(self, running: Bench, path: Path, peers: Sequence[str]) -> None:
        command = [sys.executable, __file__, "client", str(path), *peers]
        self._process = running.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, ids: Sequence[int], tokens: int, start: float) -> None:
        if self._process.stdin is None:
            raise SystemExit("a client process without an input")
        self._process.stdin.write(json.dumps({"ids": list(ids), "tokens": tokens, "start": start}).encode() + b"\n")
        self._process.stdin.flush()

    def wait(self) -> Answer:
        line = self._process.stdout.readline() if self._process.stdout is not None else b""
        if not line:
            raise SystemExit(f"a client process ended ({self._process.wait()})")
        return Answer(**json.loads(line))


def client(options: argparse.Namespace) -> None:
    """The other side of `Client`: requests on the standard input, answers on the standard output."""
    import torch

    from petalnet import AutoDistributedModelForCausalLM

    torch.set_num_threads(1)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        options.path, initial_peers=options.peers, dtype=torch.float32, show_route=False, speculation=False
    )
    for line in sys.stdin:
        request = json.loads(line)
        time.sleep(max(0.0, request["start"] - time.monotonic()))
        (one,) = answer(model, [request["ids"]], request["tokens"])
        print(json.dumps({"began": one.began, "times": one.times, "ids": one.ids}), flush=True)


def as_threads(place: Place, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
    """All prompts at a time, each by a thread, with one model."""
    answers: list[Answer | None] = [None] * len(prompts)
    start = threading.Barrier(len(prompts))

    def run(number: int) -> None:
        start.wait()
        (answers[number],) = answer(place.model, [prompts[number]], tokens)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if None in answers:
        raise SystemExit("a client failed")
    return [one for one in answers if one is not None]


def as_processes(processes: Sequence[Client], prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
    """All prompts at a time, each by one of the processes."""
    start = time.monotonic() + START_IN_S
    for process, prompt in zip(processes, prompts, strict=False):
        process.ask(prompt, tokens, start)
    return [process.wait() for process, _ in zip(processes, prompts, strict=False)]


def tokens_per_s(answers: Sequence[Answer], tokens: int) -> float:
    return len(answers) * tokens / (max(one.times[-1] for one in answers) - min(one.began for one in answers))


def clients(place: Place, options: argparse.Namespace) -> bool:
    """Aggregate tokens/s of several clients, each with a prompt of its own, over a local call with all prompts."""
    most = max(options.clients)
    prompts = [place.prompt(options.prefix, seed) for seed in range(most)]
    expected = [answer(place.local, [prompt], options.tokens)[0].ids for prompt in prompts]
    ways: dict[str, Callable[[], list[Answer]]] = {
        "local, 1 row": lambda: answer(place.local, prompts[:1], options.tokens),
        f"local, {most} rows": lambda: answer(place.local, prompts, options.tokens),
    }
    if "threads" in options.as_:
        for count in options.clients:
            ways[f"{count} thread{'s' * (count > 1)}"] = lambda count=count: as_threads(place, prompts[:count], options.tokens)
    if "processes" in options.as_:
        processes = [place.process() for _ in range(most)]
        for process in processes:
            process.ask(prompts[0], 2, 0.0)
        for process in processes:  # until all have loaded
            process.wait()
        for count in options.clients:
            ways[f"{count} process{'es' * (count > 1)}"] = lambda count=count: as_processes(processes, prompts[:count], options.tokens)
    as_threads(place, prompts[:1], 4)  # warms up

    rates: dict[str, list[float]] = {name: [] for name in ways}
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    steps: dict[str, list[float]] = {name: [] for name in ways}
    wrong = 0
    for number in range(options.rounds):
        names = list(ways)
        turn = number * len(names) // options.rounds
        for name in names[turn:] + names[:turn]:
            answers = ways[name]()
            place.watch_loop()
            rates[name].append(tokens_per_s(answers, options.tokens))
            firsts[name] += [one.first_s for one in answers]
            steps[name] += [step for one in answers for step in one.steps]
            if len(answers) < most or not name.startswith("local"):
                wrong += sum(one.ids != ids for one, ids in zip(answers, expected, strict=False))
    one_row, all_rows = (statistics.median(rates[name]) for name in list(ways)[:2])
    print(f"prompts of {options.prefix} tokens, {options.tokens} new ones each, {options.rounds} rounds; {machine()}")
    print_table(
        ["", "tokens/s", "worst", "best", "of local, 1 row", f"of local, {most} rows", "first ms", "step ms", "longest"],
        [
            [
                name,
                statistics.median(rate),
                min(rate),
                max(rate),
                statistics.median(rate) / one_row,
                statistics.median(rate) / all_rows,
                statistics.median(firsts[name]) * 1e3 if steps[name] else "",
                statistics.median(steps[name]) * 1e3 if steps[name] else "",
                max(steps[name]) * 1e3 if steps[name] else "",
            ]
            for name, rate in rates.items()
        ],
    )
    place.print_loop()
    print(f"answers that differ from the client's own local answer: {wrong}")
    return wrong == 0


def beside(place: Place, options: argparse.Namespace) -> bool:
    """Time to the first token of a short prompt on an idle server, and while another client's long prompt is computed."""
    other = place.process()
    short = [place.prompt(options.prefix, seed) for seed in range(options.rounds)]
    expected = [answer(place.local, [prompt], options.tokens)[0].ids for prompt in short]
    other.ask(place.prompt(options.long, 100), 1, 0.0)  # warms up; as long as the others, so that memory has been claimed before
    alone = [other.wait().first_s]
    answer(place.model, [place.prompt(options.prefix, 99)], 4)

    idle: list[Answer] = []
    loaded: list[Answer] = []
    long: list[float] = []
    missed = 0
    for number, prompt in enumerate(short):
        other.ask(place.prompt(options.long, 200 + number), 1, 0.0)
        alone.append(other.wait().first_s)
        idle += answer(place.model, [prompt], options.tokens)
        # The short prompt comes at another moment of the long one in every round.
        start = time.monotonic() + START_IN_S
        other.ask(place.prompt(options.long, 300 + number), 1, start)
        time.sleep(START_IN_S + statistics.median(alone) * (0.1 + 0.6 * number / options.rounds))
        (one,) = answer(place.model, [prompt], options.tokens)
        end = other.wait()
        long.append(end.first_s)
        missed += one.times[0] > end.times[0]
        loaded.append(one)
        place.watch_loop()
    wrong = sum(one.ids != ids for ones in (idle, loaded) for one, ids in zip(ones, expected, strict=True))
    print(f"short prompts of {options.prefix} tokens, long ones of {options.long}, {options.rounds} rounds; {machine()}")
    least = statistics.median(one.first_s for one in idle)
    print_table(
        ["", "first ms", "best", "worst", "of idle", "worst of idle", "step ms", "longest"],
        [
            [
                name,
                statistics.median(first) * 1e3,
                min(first) * 1e3,
                max(first) * 1e3,
                statistics.median(first) / least,
                max(first) / least,
                statistics.median(steps) * 1e3 if steps else "",
                max(steps) * 1e3 if steps else "",
            ]
            for name, first, steps in (
                ("short, idle server", [one.first_s for one in idle], [step for one in idle for step in one.steps]),
                ("short, beside a long one", [one.first_s for one in loaded], [step for one in loaded for step in one.steps]),
                ("long, idle server", alone, []),
                ("long, beside a short one", long, []),
            )
        ],
    )
    place.print_loop()
    print(f"short prompts that were answered only after the long one: {missed}; answers that differ from the local ones: {wrong}")
    return wrong == 0


def again(place: Place, options: argparse.Namespace) -> bool:
    """Time to the first token of a long prompt: new, sent a second time, and with another end."""
    kept = options.long * 9 // 10
    names = ["local", "first time", "second time", f"another end after {kept} tokens"]
    firsts: dict[str, list[float]] = {name: [] for name in names}
    answer(place.model, [place.prompt(options.long, 1000)], 2)  # warms up
    wrong = 0
    for number in range(options.rounds):
        prompt = place.prompt(options.long, 2000 + number)
        changed = prompt[:kept] + place.prompt(options.long - kept, 3000 + number)
        expected = answer(place.local, [prompt], options.tokens)[0]
        expected_of_changed = answer(place.local, [changed], options.tokens)[0]
        firsts["local"] += [expected.first_s, expected_of_changed.first_s]
        for name, ids, right in zip(names[1:], (prompt, prompt, changed), (expected, expected, expected_of_changed), strict=True):
            (one,) = answer(place.model, [ids], options.tokens)
            firsts[name].append(one.first_s)
            wrong += one.ids != right.ids
    print(f"prompts of {options.long} tokens, {options.rounds} rounds; {machine()}")
    new = statistics.median(firsts["first time"])
    print_table(
        ["", "first token ms", "best", "worst", "faster than new"],
        [[name, statistics.median(t) * 1e3, min(t) * 1e3, max(t) * 1e3, new / statistics.median(t)] for name, t in firsts.items()],
    )
    print(f"answers that differ from the local ones: {wrong}")
    return wrong == 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(work: Callable[[Place, argparse.Namespace], bool], *, prefix: int, tokens: int, long: int, rounds: int) -> Any:
        sub = commands.add_parser(work.__name__, help=work.__doc__, description=work.__doc__)
        sub.set_defaults(work=work)
        sub.add_argument("--family", choices=FAMILIES, default="bloom")
        sub.add_argument("--quick", action="store_true", help="a tiny model")
        sub.add_argument("--tokens", type=int, default=tokens, help=f"new tokens of an answer  [{tokens}]")
        sub.add_argument("--rounds", type=int, default=rounds, help=f"[{rounds}]")
        if prefix:
            sub.add_argument("--prefix", type=int, default=prefix, help=f"tokens of a short prompt  [{prefix}]")
        if long:
            sub.add_argument("--long", type=int, default=long, help=f"tokens of a long prompt  [{long}]")
        return sub

    several = command(clients, prefix=16, tokens=40, long=0, rounds=3)
    several.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="how many at a time")
    several.add_argument("--as", dest="as_", nargs="+", choices=["threads", "processes"], default=["threads", "processes"])
    command(beside, prefix=16, tokens=8, long=2000, rounds=6)
    command(again, prefix=0, tokens=2, long=1000, rounds=5)
    process = commands.add_parser("client")  # what the others start
    process.add_argument("path")
    process.add_argument("peers", nargs="+")
    return parser.parse_args()


@contextmanager
def surroundings() -> Iterator[Bench]:
    """A `Bench` whose surroundings this process, which is a client, shares. Before torch and petalnet are imported."""
    with bench() as running:
        os.environ.clear()
        os.environ.update(running.environment)
        yield running


def main() -> None:
    options = read_options()
    if options.command == "client":
        client(options)
        return
    with surroundings() as running:
        place = Place(running, options)
        if not options.work(place, options):
            sys.exit(1)


if __name__ == "__main__":
    main()
