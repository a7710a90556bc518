"""Single-stream `generate` through servers of the swarm, over local `transformers` in the same run.

    python benchmarks/generate.py

Real node processes on loopback, one compute thread each: one server of all blocks, and three servers of a third each. The
alternatives take turns in every round, and the table has the medians over rounds. "of local" is local time over swarm time for the
whole call: 1.00 would be a swarm without overhead. "first" is the time to the first token (prefill, and for a swarm the opening of
the session), "step" the median time of one token after it. The last columns are processor time, which other work on the machine
disturbs less: what this process and what the servers spend on a token, and what that is beyond the local model's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
from swarm_processes import add_model_options, bench, local_addrs, machine, make_model, print_table


class Clock:
    """A streamer that notes when each token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass
class Runs:
    """Seconds of one alternative, one entry a round; `cpu` is (this process, its servers)."""

    servers: list[psutil.Process] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    cpu: list[tuple[float, float]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def used(processes: list[psutil.Process]) -> float:
    """Seconds of processor time that these processes have taken."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(generate: Callable[..., Any], runs: Runs, tokens: int) -> Any:
    before, own = used(runs.servers), time.process_time()
    clock, start = Clock(), time.perf_counter()
    output = generate(max_new_tokens=tokens, do_sample=False, streamer=clock)
    runs.whole.append(time.perf_counter() - start)
    runs.cpu.append((time.process_time() - own, used(runs.servers) - before))
    runs.first.append(clock.times[1] - start)
    runs.steps += [later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:], strict=False)]
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[8, 128], help="prompt lengths in tokens")
    parser.add_argument("--tokens", type=int, default=40, help="new tokens a call")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 3], help="sizes of the swarms to compare")
    options = parser.parse_args()

    with bench() as running:
        # Before torch and petalnet are imported: the client in this process lives in the same surroundings as the nodes.
        os.environ.clear()
        os.environ.update(running.environment)
        import torch
        from transformers import AutoModelForCausalLM

        from petalnet import AutoDistributedModelForCausalLM

        torch.set_num_threads(1)
        path = make_model(running.folder, options)
        servers: dict[str, list[psutil.Process]] = {"local": []}
        models: dict[str, Any] = {"local": AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()}
        for count in options.servers:
            bounds = [round(options.layers * part / count) for part in range(count + 1)]
            name = f"{count} server{'s' if count > 1 else ''}"
            servers[name] = []
            peers: list[str] = []
            for first, end in zip(bounds, bounds[1:], strict=False):
                # A given throughput: the measurement at start is not what is compared here.
                options_of_node = ["--serve", f"{first}:{end}", "--dtype", "float32", "--throughput", "100"]
                process, ready, _ = running.node(path, *options_of_node, peers=peers)
                servers[name].append(psutil.Process(process.pid))
                peers = peers or local_addrs(ready)
            # Guesses would save steps, which are what is measured.
            models[name] = AutoDistributedModelForCausalLM.from_pretrained(
                path, initial_peers=peers, dtype=torch.float32, show_route=False, speculation=False
            )

        size = f"{options.layers}×{options.hidden}, {options.heads} heads, vocabulary {options.vocabulary}, float32"
        print(f"BLOOM {size}; {options.tokens} new tokens, {options.rounds} rounds; {machine()}")
        rows, agree = [], True
        for prefix in options.prefixes:
            inputs = torch.randint(10, options.vocabulary, (1, prefix), generator=torch.Generator().manual_seed(prefix))
            results = {name: Runs(servers[name]) for name in models}
            calls = {name: partial(model.generate, inputs) for name, model in models.items()}
            for call in calls.values():  # warms up: buffers, connections
                measure(call, Runs(), 4)
            for round_number in range(options.rounds):
                names = list(models)
                outputs = {}
                for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
                    outputs[name] = measure(calls[name], results[name], options.tokens)
                agree = agree and all(torch.equal(outputs[name], outputs["local"]) for name in names)
            local = statistics.median(results["local"].whole)
            local_cpu = statistics.median(own for own, _ in results["local"].cpu)
            for name, runs in results.items():
                whole = statistics.median(runs.whole)
                own_cpu, server_cpu = (statistics.median(seconds) for seconds in zip(*runs.cpu, strict=True))
                rows.append(
                    [
                        f"prefix {prefix}, {name}",
                        options.tokens / whole,
                        statistics.median(runs.first) * 1e3,
                        statistics.median(runs.steps) * 1e3,
                        (whole - local) / options.tokens * 1e3,
                        local / whole,
                        local / max(runs.whole),
                        local / min(runs.whole),
                        own_cpu / options.tokens * 1e3,
                        server_cpu / options.tokens * 1e3,
                        (own_cpu + server_cpu - local_cpu) / options.tokens * 1e3,
                    ]
                )
        print_table(
            ["", "tokens/s", "first ms", "step ms", "added ms a token", "of local", "worst", "best", "cpu ms", "servers'", "added"], rows
        )
        print(f"tokens equal to local: {'yes' if agree else 'NO'}")
    if not agree:
        sys.exit(1)


if __name__ == "__main__":
    main()
