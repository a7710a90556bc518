"""Chains of servers that lie apart: what a token and a prompt cost by distance, over what physics and computation leave.

    python benchmarks/chains.py decode        # 10, 40 and 100 ms: time per token over one way × 4 + computation
    python benchmarks/chains.py prefill       # a prompt of 1,024 tokens at 40 ms and 100 Mbit/s: in chunks, and whole
    python benchmarks/chains.py speculation   # tokens/s with guesses over tokens/s without: repetitive text, code, prose
    python benchmarks/chains.py precision     # what rounding on the wire saves at 20 Mbit/s, and what it does to the logits

Three real node processes and a client, each on a host of its own (`wan.py`), one compute thread each. Beside each figure stands what TCP
alone does between two of the hosts. `--loopback` needs no root. `--quick` takes a tiny model and few tokens, which only shows that the
benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swarm_processes import Bench, bench, machine, make_model, print_table
from wan import Hosts, Raw, far_hosts

SERVERS = ("first", "second", "third")
QUICK_SIZE = {"layers": 3, "hidden": 64, "heads": 4}


class Client:
    """A client process on a host of its own: see `chains_client.py`."""

    def __init__(self, hosts: Hosts) -> None:
        command = [sys.executable, str(Path(__file__).with_name("chains_client.py"))]
        self._process = hosts.start("client", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise SystemExit("a client process without pipes")
        self._process.stdin.write(json.dumps({"do": what, **request}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the client process ended ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Place:
    """Three servers with a part of a model each, and a client, far from one another.

    Attributes:
        raw: what TCP does between the client and the first server.
    """

    def __init__(self, hosts: Hosts, path: Path, blocks: int, *, transfer: int = 0, throughput: str = "100") -> None:
        """
        Args:
            transfer: bytes of a transfer that `raw` has the time of.
            throughput: as of `petalnet node`; a given one where what servers announce does not matter: measuring takes a while.
        """
        self.hosts, self.path = hosts, path
        self.raw: Raw = hosts.measure("client", SERVERS[0], transfer)
        cuts = [round(blocks * part / len(SERVERS)) for part in range(len(SERVERS) + 1)]
        self.peers: list[str] = []
        for name, first, end in zip(SERVERS, cuts, cuts[1:], strict=False):
            served = (path, "--serve", f"{first}:{end}", "--dtype", "float32", "--throughput", throughput)
            self.peers += hosts.node(name, *served, peers=self.peers[:1])
        self.client = Client(hosts)

    def open(self, ways: dict[str, dict[str, Any] | None]) -> None:
        """A model for each way; None stands for the local one."""
        for name, settings in ways.items():
            where = {} if settings is None else {"peers": self.peers[:1], "settings": settings}
            self.client.ask("open", name=name, path=str(self.path), **where)


@contextmanager
def place(
    options: argparse.Namespace, path: Path, running: Bench, rtt_ms: float, mbit: float | None = None, **more: Any
) -> Iterator[Place]:
    with far_hosts(running, ["client", *SERVERS], rtt_ms=rtt_ms, mbit=mbit, loopback=options.loopback) as hosts:
        yield Place(hosts, path, options.layers, **more)


def prompt(options: argparse.Namespace, tokens: int, seed: int) -> list[list[int]]:
    import torch

    return torch.randint(10, options.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed)).tolist()


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The least squares line through (x, y): where it begins, and its slope."""
    if len(points) < 2:
        return points[0][1], 0.0
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return intercept, slope


def decode(options: argparse.Namespace, running: Bench) -> bool:
    """Time per token by distance, with outputs that go from server to server, and with each through the client.

    The bound is one way × 4 (through the client × 6) and the computation of the same run: what the servers say that they computed, and
    what the client does between two visits to the swarm (embeddings, head, the library's loop). What is above it: "servers beside" is what
    servers have of a token outside of computation, "wire late" what plain TCP takes longer than the distance, "messages" what is left:
    encoding, encryption, wake-ups.
    """
    path = make_model(running.folder, options)
    ways: dict[str, dict[str, Any]] = {"direct": {"direct_chains": True}, "through the client": {"direct_chains": False}}
    trips = {"direct": (len(SERVERS) + 1) / 2, "through the client": float(len(SERVERS))}
    rows: list[list[object]] = []
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    agree = True
    for rtt_ms in options.rtt_ms:
        with place(options, path, running, rtt_ms) as here:
            here.open({"local": None, **{name: {"speculation": False, **settings} for name, settings in ways.items()}})
            steps: dict[str, list[float]] = {name: [] for name in ("local", *ways)}
            visits: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
            for number in range(-1, options.rounds):  # the first one warms up
                ids = prompt(options, options.prefix, number + 1)
                expected = None
                for name in steps:
                    answer = here.client.ask("generate", name=name, ids=ids, tokens=options.tokens, options={"do_sample": False})
                    expected = expected or answer["ids"]
                    agree = agree and answer["ids"] == expected
                    if number >= 0:
                        steps[name] += answer["steps_s"]
                        if name in ways:
                            visits[name] += answer["visits"][1:]  # the first is the prompt's
            local = statistics.median(steps["local"]) * 1e3
            print(f"{rtt_ms:g} ms: TCP alone, {here.raw}; a step of the local model {local:.1f} ms", flush=True)
        for name in ways:
            step = statistics.median(steps[name]) * 1e3
            late = statistics.quantiles(steps[name], n=10)[-1] * 1e3
            wall = statistics.median(visit["wall"] for visit in visits[name]) * 1e3
            held, computed = (statistics.median(sum(visit[key]) for visit in visits[name]) * 1e3 for key in ("held", "computed"))
            distance = trips[name] * rtt_ms
            bound = distance + computed + step - wall
            found[name].append((rtt_ms, step, step - bound))
            wire = trips[name] * (here.raw.median_ms - rtt_ms)
            parts = (computed, step - wall, held - computed, wire, wall - held - distance - wire)
            rows.append([f"{rtt_ms:g} ms, {name}", step, late, bound, step - bound, *parts, step - distance - local])
    print(f"medians over {options.rounds} rounds of {options.tokens} tokens, milliseconds")
    header = ["", "a token", "nine of ten", "bound", "above it", "servers compute", "client", "servers beside", "wire late", "messages"]
    print_table([*header, "above local step"], rows)
    for name, points in found.items():
        _, slope = line_through([(rtt, step) for rtt, step, _ in points])
        fixed, share = line_through([(rtt, residual) for rtt, _, residual in points])
        print(
            f"{name}: {slope:.2f} round trips a token (bound {trips[name]:g});"
            f" above the bound: {fixed:.1f} ms {share * 100:+.1f} % of a round trip"
        )
    print(f"tokens equal to local: {'yes' if agree else 'NO'}")
    return agree


def prefill(options: argparse.Namespace, running: Bench) -> bool:
    """Time to the first token of a long prompt, in chunks that are under way at once, and whole.

    The bound: a round trip that opens the session, one way × 4 (through the client × 6), what the client does itself, every stage's time
    for one chunk, and for all other chunks the longest stage's. Stages are the uplinks, with the time that TCP alone takes for the prompt's
    bytes, and the servers, with what they say they computed in that very run. It is no less than all servers' computation over the
    processors of this machine, which they share.
    """
    path = make_model(running.folder, options)
    ways: dict[str, int | None] = {"whole": 0, "in chunks": None, **{f"in chunks of {tokens}": tokens for tokens in options.chunk}}
    ways["whole, through the client"] = 0
    size = options.prompt * options.hidden * 4
    (rtt_ms,) = options.rtt_ms
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    agree = True
    with place(options, path, running, rtt_ms, options.mbit, transfer=size, throughput="auto") as here:
        uplink_s = here.raw.transfer_s - here.raw.median_ms / 1e3
        print(f"{rtt_ms:g} ms, {options.mbit:g} Mbit/s: TCP alone, {here.raw}; {size:,} bytes in {here.raw.transfer_s:.2f} s", flush=True)
        here.open({"local": None, "direct": {"direct_chains": True}, "through the client": {"direct_chains": False}})
        for number in range(-1, options.rounds):
            for turn, (name, chunk) in enumerate(ways.items()):
                ids = prompt(options, options.prompt, 100 + (number + 1) * len(ways) + turn)  # a new one each time: nothing is remembered
                request = {"ids": ids, "tokens": 1, "options": {"do_sample": False}}
                answer = here.client.ask("generate", name="through the client" if "client" in name else "direct", chunk=chunk, **request)
                agree = agree and answer["ids"] == here.client.ask("generate", name="local", **request)["ids"]
                if number >= 0:
                    runs[name].append(answer)
    rows: list[list[object]] = []
    whole = statistics.median(run["first_s"] for run in runs["whole"])
    for name, answers in runs.items():
        through_client = "client" in name
        chunks = answers[0]["visits"][0]["chunks"]
        servers = [statistics.median(times) for times in zip(*(run["visits"][0]["computed"] for run in answers), strict=True)]
        stages = [uplink_s] * (2 * len(SERVERS) - 1 if through_client else len(SERVERS)) + servers
        trips = len(SERVERS) if through_client else (len(SERVERS) + 1) / 2
        fixed = (1 + trips) * rtt_ms / 1e3 + statistics.median(run["trace"]["local_s"] for run in answers)
        bound = fixed + max((sum(stages) + (chunks - 1) * max(stages)) / chunks, sum(servers) / (os.cpu_count() or 1))
        first = [run["first_s"] for run in answers]
        middle = statistics.median(first)
        computed = ", ".join(f"{seconds:.2f}" for seconds in servers)
        rows.append([name, chunks, middle, min(first), max(first), computed, bound, middle / bound, whole / middle])
    print(f"seconds, medians of {options.rounds} rounds; an uplink takes {uplink_s:.2f} for the prompt")
    print_table(["first token", "chunks", "median", "best", "worst", "servers compute", "bound", "of bound", "faster than whole"], rows)
    print(f"tokens equal to local: {'yes' if agree else 'NO'}")
    return agree


CODE = "textwrap.py"
"""Of the standard library: code that somebody wrote."""
PROSE = "The old man looked at the sea and"
REFRAIN = "One for the money, two for the show, three to get ready. " * 2 + "One for the money,"
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0}


def speculation(options: argparse.Namespace, running: Bench) -> bool:
    """Tokens/s with guesses (n-grams, no draft model) over tokens/s without, of the demonstration's model.

    That model has read plays and novels and has never seen code. So code is dictated to it: the library's loop chooses the tokens of a
    file, which come as hard to guess as they are, while computation and network do what they always do.
    """
    from transformers import AutoTokenizer

    from petalnet.models.checkpoint import DEMO_MODEL

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    code = tokenizer((Path(sysconfig.get_path("stdlib")) / CODE).read_text())["input_ids"]
    half, tokens = options.prompt, options.tokens
    piece = tokenizer.decode(code[half : 2 * half])
    changed = tokenizer(piece.replace("width", "length").replace("self", "this"))["input_ids"]
    texts: dict[str, tuple[list[int], list[int] | None, dict[str, Any]]] = {
        "the model's own, greedy: a loop": (tokenizer(REFRAIN)["input_ids"], None, {"do_sample": False}),
        "the model's own, greedy: repeats itself with changes": (tokenizer(PROSE)["input_ids"], None, {"do_sample": False}),
        "code again with two names changed, dictated": (code[half : 2 * half], (changed * 2)[:tokens], {"do_sample": False}),
        "code that goes on, dictated": (code[:half], code[half : half + tokens], {"do_sample": False}),
        "prose, sampled at temperature 1": (tokenizer(PROSE)["input_ids"], None, SAMPLED),
    }
    rows: list[list[object]] = []
    agree = True
    for rtt_ms in options.rtt_ms:
        with place(options, DEMO_MODEL, running, rtt_ms) as here:
            print(f"{rtt_ms:g} ms: TCP alone, {here.raw}", flush=True)
            here.open({"local": None, "with": {}, "without": {"speculation": False}})
            for text, (ids, answer, how) in texts.items():
                rates: dict[str, list[float]] = {"with": [], "without": []}
                drafted = accepted = 0
                for number in range(-1, options.rounds):
                    request = {
                        "ids": [ids],
                        "tokens": tokens,
                        "options": {**how, "min_new_tokens": tokens},
                        "seed": number + 1,
                        "answer": answer,
                    }
                    expected = here.client.ask("generate", name="local", **request)["ids"]
                    for name in sorted(rates, reverse=number % 2 == 1):
                        told = here.client.ask("generate", name=name, **request)
                        agree = agree and told["ids"] == expected
                        if number >= 0:
                            rates[name].append(len(told["steps_s"]) / sum(told["steps_s"]))
                            if name == "with":
                                drafted, accepted = drafted + told["trace"]["drafted"], accepted + told["trace"]["accepted"]
                medians = {name: statistics.median(values) for name, values in rates.items()}
                ratios = [one / other for one, other in zip(rates["with"], rates["without"], strict=True)]
                ratio = medians["with"] / medians["without"]
                rows.append([f"{rtt_ms:g} ms, {text}", *medians.values(), ratio, min(ratios), drafted, accepted])
    print(f"{tokens} tokens after the first, medians of {options.rounds} rounds, demonstration model in float32")
    print_table(["tokens/s", "with", "without", "over plain", "worst round", "guessed", "right"], rows)
    print(f"tokens equal to local: {'yes' if agree else 'NO'}")
    return agree


def precision(options: argparse.Namespace, running: Bench) -> bool:
    """Bytes, time to the first token and logits of a prompt, by what its hidden states are rounded to on the wire."""
    path = make_model(running.folder, options)
    (rtt_ms,) = options.rtt_ms
    rows: list[list[object]] = []
    with place(options, path, running, rtt_ms, options.mbit) as here:
        print(f"{rtt_ms:g} ms, {options.mbit:g} Mbit/s: TCP alone, {here.raw}", flush=True)
        here.open({"local": None, **{name: {"wire_precision": name} for name in options.codecs}})
        compared = prompt(options, options.prompt, 99)
        here.client.ask("logits", name="local", ids=compared)
        for turn, name in enumerate(options.codecs):
            times: list[float] = []
            sent: list[float] = []
            for number in range(-1, options.rounds):
                ids = prompt(options, options.prompt, 100 + (number + 1) * len(options.codecs) + turn)
                before = here.hosts.sent_bytes()
                told = here.client.ask("generate", name=name, ids=ids, tokens=1, options={"do_sample": False})
                after = here.hosts.sent_bytes()
                if number >= 0:
                    times.append(told["first_s"])
                    if before is not None and after is not None:
                        sent.append(sum(after.values()) - sum(before.values()))
            here.client.ask("logits", name=name, ids=compared)
            found = here.client.ask("compare", names=["local", name])
            wire = statistics.median(sent) / 1e6 if sent else ""
            differences = (f"{found['mean']:.1e}", f"{found['worst']:.1e}", f"{found['other_best'] * 100:.1f} %")
            rows.append([name, wire, statistics.median(times), min(times), max(times), *differences])
    print(f"prompts of {options.prompt} tokens, medians of {options.rounds} rounds; logits over their spread, of all positions")
    header = ["wire", "MB sent", "first token, s", "best", "worst", "logits off, mean", "worst", "another best token"]
    print_table(header, rows)
    return True


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(work: Callable[[argparse.Namespace, Bench], bool], **sizes: Any) -> None:
        sub = commands.add_parser(work.__name__, help=work.__doc__, description=work.__doc__)
        sub.set_defaults(work=work)
        sub.add_argument("--loopback", action="store_true", help="relays on this machine instead of hosts of their own: needs no root")
        sub.add_argument("--quick", action="store_true", help="a tiny model and few tokens")
        for name, value in sizes.items():
            many = isinstance(value, tuple)
            kind = type(value[0] if isinstance(value, tuple) else value)
            sub.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if many else None, default=value, help=f"[{value}]")

    command(decode, layers=12, hidden=256, heads=8, vocabulary=8192, prefix=8, tokens=30, rounds=3, rtt_ms=(10.0, 40.0, 100.0))
    bulky = {"layers": 3, "hidden": 1024, "heads": 16, "vocabulary": 8192}
    command(prefill, **bulky, prompt=1024, rounds=3, rtt_ms=(40.0,), mbit=100.0, chunk=(64, 256))
    command(speculation, layers=12, hidden=160, prompt=200, tokens=80, rounds=2, rtt_ms=(40.0, 80.0))
    command(precision, **bulky, prompt=512, rounds=3, rtt_ms=(40.0,), mbit=20.0, codecs=("exact", "bfloat16", "float16", "int8"))
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK_SIZE if options.work is not speculation else {}, rounds=1)
        if "tokens" in options:
            options.tokens = min(options.tokens, 8)
    return options


def main() -> None:
    options = read_options()
    with bench() as running:
        where = "loopback behind relays" if options.loopback else "hosts of their own"
        print(f"BLOOM {options.layers}×{options.hidden}, float32, three servers; {where}; {machine()}", flush=True)
        if not options.work(options, running):
            sys.exit(1)


if __name__ == "__main__":
    main()
