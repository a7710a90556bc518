"""Users of a swarm in which servers come and go at random, for half an hour: is every answer right, and is anything left behind?

    python scripts/soak.py                                # 30 minutes
    python scripts/soak.py --minutes 3 --seed 5 --folder soak

Six servers of a small model in three spans. One of each span stays all the time; the other three are killed (SIGKILL), told to drain
(SIGTERM) and followed by new ones, of spans drawn by chance. Four clients, each a process of its own, have texts written in all ways
(greedy, sampled, beams, guesses, steps by hand) and compare each with what the model writes in that process alone.

All this time the memory of the servers and clients that stay is looked at. A straight line through it, after a third of the time, may
rise by 2 % of its mean until the end. Then users rest, and what is open then (tasks, streams, descriptors, threads, KV pages, sessions)
is compared with a rest before: after that third. Writes `soak.csv` with all of it, draws memory on the terminal, and all as `soak.svg`
where matplotlib is installed. Ends with status 1 and one line where something is off.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

import psutil  # noqa: E402

FAMILY = "llama"
STEADY_AFTER = 1 / 3
"""The part of the time after which memory is to be steady: what is cached has been filled by then."""
CONNECTION_TASKS = 24
"""Tasks more or less that a client has for one server more or less that it is connected to."""
MOST_GROWTH = 0.02
LOOK_EVERY_S = 2.0
PAUSE_S = (2.0, 8.0)
"""Between two servers that come or go, drawn by chance."""
REST_WITHIN_S = 45.0
"""For what is left of sessions and of servers that are gone to be forgotten, where only heartbeats tell that they are."""
ANSWER_WITHIN_S = 60.0
BARS = " ▁▂▃▄▅▆▇█"


class Wrong(Exception):
    """What is off, in one line."""


# ---- a client process


def client(path: str, seed: int, peers: list[str]) -> None:
    """Reads "work" and "rest" on standard input. Writes a line of JSON for each answer, and for each rest what it has open then."""
    from tests.swarm.faults import Writing
    from tests.swarm.models import connected, load_local

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    working, over = threading.Event(), threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            (working.set if line.strip() == "work" else working.clear)()
        over.set()
        working.set()

    threading.Thread(target=listen, daemon=True).start()
    chance = random.Random(seed)
    local = load_local(Path(path))
    with connected(Path(path), peers, request_timeout=60.0) as model:
        model.remote_blocks.route()
        told = False
        while not over.is_set():
            if not working.is_set():
                if not told:
                    tell(rest=open_things(model))
                    told = True
                working.wait(0.2)
                continue
            told = False
            name = chance.choice(("greedy", "sampled", "beams", "guesses", "steps"))
            prompt = chance.choice((20, 60, 130, 200))
            tokens = 8 if name == "steps" else chance.choice((8, 24, 48))
            writing = Writing(name, prompt, tokens, seed=chance.randrange(10**6))
            began, sessions = time.monotonic(), []
            logging.info("%s", writing)
            try:
                answer = writing.remote(model, {}, sessions.append)
                right = bool((answer == writing.local(local)).all())
                error = ""
            except Exception as caught:  # whatever it is, it is one line of the report
                right, error = False, f"{type(caught).__name__}: {caught}"
            recoveries = len(getattr(sessions[0], "recoveries", ())) if sessions else 0
            tell(right=right, error=error, what=str(writing), seconds=time.monotonic() - began, recoveries=recoveries)


def open_things(model: Any) -> dict[str, int]:
    """What this client has open while it rests."""
    import trio

    async def tasks() -> int:
        return trio.lowlevel.current_statistics().tasks_living

    process = psutil.Process()
    return {
        "tasks": model.remote_blocks.target.swarm.portal.run(tasks),
        "threads": process.num_threads(),
        "descriptors": process.num_fds() - len(process.net_connections("tcp")),
    }


def tell(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


# ---- the soak


@dataclass
class User:
    """A client process, and what it has told."""

    process: subprocess.Popen[str]
    answers: list[dict[str, Any]] = field(default_factory=list)
    rests: list[dict[str, int]] = field(default_factory=list)
    heard_at: float = field(default_factory=time.monotonic)

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            self.heard_at = time.monotonic()
            if "rest" in told:
                self.rests.append(told["rest"])
            else:
                self.answers.append(told)

    def say(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        self.heard_at = time.monotonic()


class Soak:
    """The processes, and what was seen of them.

    Attributes:
        samples: (second, process, what, value).
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from tests.swarm.conftest import Nodes
        from tests.swarm.models import SPANS, save_model

        self.options, self.chance = options, random.Random(options.seed)
        self.nodes = Nodes(folder)
        self.path = save_model(FAMILY, folder / "model")
        self.spans = SPANS[FAMILY]
        self.samples: list[tuple[float, str, str, float]] = []
        self.events: dict[str, int] = {"joins": 0, "deaths": 0, "drains": 0}
        self.movers: list[Any] = []
        self.users: list[User] = []
        self.stayers: list[Any] = []
        os.environ["PETALNET_STATE_DIR"] = self.nodes.environment()["PETALNET_STATE_DIR"]
        self.began = time.monotonic()

    def start(self) -> None:
        options = ("--attn-cache-tokens", "8192")
        self.stayers = self.nodes.serve_all([(self.path, span) for span in self.spans], *options)
        for span in self.spans:
            self.join(span)
        for mover in self.movers:
            mover.wait_ready()
        for number in range(self.options.clients):
            command = [sys.executable, __file__, "--client", str(self.path), "--seed", str(self.options.seed * 100 + number)]
            command += ["--peers", *self.stayers[0].addrs]
            with (self.nodes.folder / f"client-{number + 1}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self.nodes.environment(), text=True
                )
            user = User(process)
            threading.Thread(target=user.listen, daemon=True).start()
            self.users.append(user)
        self.wait_for_rests([0] * len(self.users))

    def join(self, span: tuple[int, int]) -> None:
        options = ("--dtype", "float32", "--throughput", "100", "--attn-cache-tokens", "8192", "--initial-peers", *self.stayers[0].addrs)
        self.movers.append(self.nodes.launch(self.path, "--serve", f"{span[0]}:{span[1]}", *options))
        self.events["joins"] += 1

    def stir(self) -> None:
        """One server comes or goes."""
        self.movers = [mover for mover in self.movers if mover.process.poll() is None]
        if len(self.movers) < self.options.servers - len(self.spans) and self.chance.random() < 0.7:
            self.join(self.chance.choice(self.spans))
            return
        ready = [mover for mover in self.movers if mover.ready_file.exists()]
        if not ready:
            return
        mover = self.chance.choice(ready)
        if self.chance.random() < 0.5:
            mover.kill()
            self.events["deaths"] += 1
        else:
            mover.process.send_signal(signal.SIGTERM)
            self.events["drains"] += 1

    def look(self) -> None:
        """Take samples of all that stay."""
        now = time.monotonic() - self.began
        for name, process in self.staying().items():
            seen = psutil.Process(process.pid)
            self.samples.append((now, name, "resident_mb", seen.memory_info().rss / 2**20))
            self.samples.append((now, name, "descriptors", seen.num_fds()))
        for name, things in self.server_things().items():
            self.samples += [(now, name, what, count) for what, count in things.items() if what != "descriptors"]

    def staying(self) -> dict[str, Any]:
        servers = {f"server {number}": node.process for number, node in enumerate(self.stayers, 1)}
        return servers | {f"client {number}": user.process for number, user in enumerate(self.users, 1)}

    def server_things(self) -> dict[str, dict[str, int]]:
        """What each server that stays has open."""
        from petalnet.inspection import ask_nodes

        reports = {report["peer_id"]: report for report in ask_nodes()}
        things = {}
        for number, node in enumerate(self.stayers, 1):
            if (report := reports.get(node.peer_id)) is None:
                raise Wrong(f"server {number} does not answer")
            engine, process = report["engine"], psutil.Process(node.process.pid)
            connections = len(process.net_connections("tcp"))
            things[f"server {number}"] = {
                "sessions": engine["sessions"],
                "waiting": engine["waiting"],
                "pages": engine["kv_tokens"]["held"] - engine["kv_tokens"]["kept"],
                "promised": engine["kv_tokens"]["all"] - engine["kv_tokens"]["free"],
                "kept_outputs": engine["kept_outputs_bytes"],
                "streams_over": max(0, sum(peer["streams"] for peer in report["peers"]) - 8 * len(report["peers"])),
                "threads": process.num_threads(),
                "descriptors": process.num_fds() - connections,
            } | ({"tasks": report["tasks"]} if "tasks" in report else {})
        return things

    def check_users(self) -> None:
        """Raises Wrong where an answer was, or none comes."""
        for number, user in enumerate(self.users, 1):
            if wrong := next((answer for answer in user.answers if not answer["right"]), None):
                raise Wrong(f"client {number}: {wrong['error'] or 'another answer'} ({wrong['what']})")
            if user.process.poll() is not None:
                raise Wrong(f"client {number} ended with status {user.process.returncode}")
            if time.monotonic() - user.heard_at > ANSWER_WITHIN_S:
                user.process.send_signal(signal.SIGUSR1)  # what its threads do goes to its log
                raise Wrong(f"client {number} has had no answer for {ANSWER_WITHIN_S:.0f} s")

    def work(self, seconds: float) -> None:
        """Let users work and servers come and go."""
        for user in self.users:
            user.say("work")
        until = time.monotonic() + seconds
        next_look = next_stir = time.monotonic()
        while (now := time.monotonic()) < until:
            if now >= next_look:
                self.look()
                self.check_users()
                next_look = now + LOOK_EVERY_S
            if now >= next_stir:
                self.stir()
                next_stir = now + self.chance.uniform(*PAUSE_S)
            time.sleep(0.1)

    def rest(self) -> dict[str, dict[str, int]]:
        """What all that stay have open while users rest and no server comes or goes; the least that was seen until it settled."""
        counts = [len(user.rests) for user in self.users]
        for user in self.users:
            user.say("rest")
        self.movers = [mover for mover in self.movers if mover.process.poll() is None]
        while len(self.movers) < self.options.servers - len(self.spans):
            self.join(self.chance.choice(self.spans))
        for mover in self.movers:
            if not mover.ready:
                mover.wait_ready()
        self.wait_for_rests(counts)
        deadline, last = time.monotonic() + REST_WITHIN_S, {}
        while (now := self.server_things()) != last or any(
            things[what] for things in now.values() for what in ("sessions", "pages", "promised")
        ):
            if time.monotonic() > deadline:
                break
            last = now
            time.sleep(2.0)
        return now | {f"client {number}": user.rests[-1] for number, user in enumerate(self.users, 1)}

    def wait_for_rests(self, counts: list[int]) -> None:
        """Wait until each user has told more often than so that it rests. Raises Wrong."""
        while any(len(user.rests) == count for user, count in zip(self.users, counts, strict=True)):
            self.check_users()
            time.sleep(0.2)
        self.check_users()

    def growth(self, name: str, since_s: float) -> float:
        """By what part of its mean a process's memory rises from then on, by the straight line through it."""
        points = [(at, value) for at, process, what, value in self.samples if process == name and what == "resident_mb" and at >= since_s]
        if len(points) < 3:
            return 0.0
        slope, _ = statistics.linear_regression(*zip(*points, strict=True))
        return slope * (points[-1][0] - points[0][0]) / statistics.mean(value for _, value in points)

    def run(self) -> None:
        """Raises Wrong."""
        self.start()
        self.began = time.monotonic()
        seconds = self.options.minutes * 60
        self.work(seconds * STEADY_AFTER)
        before = self.rest()
        since = time.monotonic() - self.began
        self.work(seconds * (1 - STEADY_AFTER))
        after = self.rest()
        answers = [answer for user in self.users for answer in user.answers]
        seen = [answer["seconds"] for answer in answers]
        print(
            f"{len(answers)} answers, all right: {statistics.median(seen):.2f} s each (median), {max(seen):.2f} s at worst; "
            f"{sum(answer['recoveries'] for answer in answers)} recoveries; servers: {self.events}"
        )
        self.draw()
        for name in self.staying():
            print(f"{name}: memory {self.growth(name, since):+.2%} since the first rest; at rest {before[name]} then {after[name]}")
        for name in self.staying():
            if (growth := self.growth(name, since)) > MOST_GROWTH:
                raise Wrong(f"the memory of {name} grows: {growth:.1%} in {seconds * (1 - STEADY_AFTER) / 60:.1f} minutes")
            rest = {what: count + (CONNECTION_TASKS if what == "tasks" else 0) for what, count in before[name].items()}
            if more := [f"{what} {before[name][what]} → {count}" for what, count in after[name].items() if count > rest[what]]:
                raise Wrong(f"{name} has more open than before: {', '.join(more)}")
        for number, node in enumerate(self.stayers, 1):
            if "Traceback" in node.log():
                raise Wrong(f"server {number} has logged a traceback")

    # ---- what is shown

    def draw(self) -> None:
        """One line a process: its memory over time."""
        for name in self.staying():
            values = [value for _, process, what, value in self.samples if process == name and what == "resident_mb"]
            if len(values) < 2:
                continue
            step = max(1, len(values) // 80)
            low, high = min(values), max(values)
            bars = "".join(BARS[round((value - low) / max(high - low, 1e-9) * (len(BARS) - 1))] for value in values[::step])
            print(f"{name} {low:6.0f} MB {bars} {high:.0f} MB")

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "soak.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["second", "process", "what", "value"])
            writer.writerows((f"{at:.1f}", name, what, f"{value:.2f}") for at, name, what, value in self.samples)
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        kinds = list(dict.fromkeys(what for _, _, what, _ in self.samples))
        figure, axes = pyplot.subplots(len(kinds), 1, sharex=True, figsize=(10, 2 * len(kinds)))
        for axis, kind in zip(axes, kinds, strict=True):
            axis.set_title(kind)
            for name in self.staying():
                points = [(at, value) for at, process, what, value in self.samples if process == name and what == kind]
                if points:
                    axis.plot(*zip(*points, strict=True), label=name)
        figure.savefig(folder / "soak.svg")

    def stop(self) -> None:
        for user in self.users:
            user.process.kill()
            user.process.wait()
        self.nodes.stop_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", type=int, default=6)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where to leave soak.csv (and logs)")
    parser.add_argument("--client", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        client(options.client, options.seed, options.peers)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="petalnet-soak-") as folder:
        soak = Soak(options, Path(folder))
        try:
            soak.run()
        except Wrong as wrong:
            print(f"WRONG: {wrong} (seed {options.seed}, after {(time.monotonic() - soak.began) / 60:.1f} minutes)")
            return 1
        finally:
            soak.stop()
            if options.folder is not None:
                soak.write(options.folder)
                for log in Path(folder).glob("*.log"):
                    shutil.copy(log, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
