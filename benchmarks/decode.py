"""What a token costs beyond the computation: decoding through one, two and three servers, minus the local step of the same run.

    python benchmarks/decode.py --trace

A BLOOM of 24 blocks so small that its step is all Python and dispatch; real node processes on loopback, one compute thread each. The
alternatives take turns in every round, "step" is the median over rounds of the p50 of a round, and "added" is that minus the local
step: what sessions, threads, messages, the network and the servers' queues add. `--trace` says where each millisecond is: every entry is
the median over tokens, of the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from generate import Clock
from swarm_processes import add_model_options, bench, local_addrs, machine, make_model, print_table


@dataclass
class Token:
    """Where the time of one token went, in seconds; `hops` has (queue, computation, held) of each server, `wall` the time of all."""

    session: float = 0.0
    network_thread: float = 0.0
    wall: float = 0.0
    hops: list[tuple[float, float, float]] = field(default_factory=list)


class Trace:
    """Notes the times of each step of a session, by wrapping the calls on the way."""

    def __init__(self) -> None:
        self.tokens: list[Token] = [Token()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        from petalnet.client import server_side, session

        note, step, run = server_side.ServerSide._note, server_side.ServerSide.step, session.InferenceSession.run

        def timed_note(server_side: Any, times: Any) -> None:
            self.tokens[-1].wall = times.wall_s
            self.tokens[-1].hops = [(hop.queue_s, hop.compute_s, hop.held_s) for hop in times.hops]
            note(server_side, times)

        async def timed_step(server_side: Any, *arguments: Any) -> Any:
            began = time.perf_counter()
            outputs = await step(server_side, *arguments)
            self.tokens[-1].network_thread = time.perf_counter() - began
            return outputs

        def timed_run(whole: Any, *arguments: Any, **keywords: Any) -> Any:
            self.tokens.append(Token())
            began = time.perf_counter()
            outputs = run(whole, *arguments, **keywords)
            self.tokens[-1].session = time.perf_counter() - began
            return outputs

        patched: tuple[tuple[Any, str, Any, Any], ...] = (
            (server_side.ServerSide, "_note", timed_note, note),
            (server_side.ServerSide, "step", timed_step, step),
            (session.InferenceSession, "run", timed_run, run),
        )
        for owner, name, timed, _ in patched:
            setattr(owner, name, timed)
        try:
            yield
        finally:
            for owner, name, _, plain in patched:
                setattr(owner, name, plain)


@contextmanager
def watching_blocks(model: Any, seconds: list[float]) -> Iterator[None]:
    """Notes how long a local model spends in its blocks, step by step."""
    layers, began = model.transformer.h, [0.0]
    first = layers[0].register_forward_pre_hook(lambda *_: began.__setitem__(0, time.perf_counter()))
    last = layers[-1].register_forward_hook(lambda *_: seconds.append(time.perf_counter() - began[0]))
    try:
        yield
    finally:
        first.remove()
        last.remove()


REST_S = 0.005
"""About what a server of three waits from one token to the next."""


class Rest(Clock):
    """Pauses after each token, as a server does while the others have their turn: what was in the processor's caches is gone then."""

    def put(self, value: Any) -> None:
        super().put(value)
        time.sleep(REST_S)


def steps_of(generate: Callable[..., Any], tokens: int) -> tuple[list[float], Any]:
    """Seconds of each token after the first, and the ids."""
    clock = Clock()
    output = generate(max_new_tokens=tokens, do_sample=False, streamer=clock)
    return [later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:], strict=False)], output


def print_trace(
    traced: dict[str, list[Token]], steps: dict[str, float], blocks: float, rested: float, round_trips: dict[str, float | None]
) -> None:
    """One row for each place in which time goes, one column for each swarm; milliseconds."""
    print("\nwhere the milliseconds of a token are (medians over tokens; each line is what its name says, beyond the lines inside it)")
    names = list(traced)
    rows: list[list[object]] = []

    def row(label: str, value: Callable[[Token], float]) -> None:
        rows.append([label, *(statistics.median(map(value, traced[name])) * 1e3 for name in names)])

    around = {name: steps[name] - statistics.median(token.session for token in traced[name]) for name in names}
    rows.append(["embeddings, head, generate", *(around[name] * 1e3 for name in names)])
    row("session: checks, codec, to the network thread and back", lambda token: token.session - token.network_thread)
    row("network thread, beside the chain", lambda token: token.network_thread - token.wall)
    row("chain: wire, and sending and receiving at all ends", lambda token: token.wall - sum(hop[2] for hop in token.hops))
    row("servers: checks, codec", lambda token: sum(hop[2] - hop[1] - hop[0] for hop in token.hops))
    row("servers: queue", lambda token: sum(hop[0] for hop in token.hops))
    row("servers: computation", lambda token: sum(hop[1] for hop in token.hops))
    print_table(["", *names], rows)
    local = steps["local"]
    print(f"local: blocks {blocks * 1e3:.2f}, embeddings, head and generate {(local - blocks) * 1e3:.2f}")
    print(f"local, with pauses of {REST_S * 1e3:g} between tokens: blocks {rested * 1e3:.2f}")
    for name, round_trip in round_trips.items():
        if round_trip is not None:
            print(f"{name}: a bare round trip of a heartbeat takes {round_trip * 1e3:.2f} at best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.set_defaults(hidden=64, heads=4, vocabulary=512)
    parser.add_argument("--prefix", type=int, default=8, help="prompt length in tokens")
    parser.add_argument("--tokens", type=int, default=60, help="new tokens a call")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 3], help="sizes of the swarms to compare")
    parser.add_argument("--trace", action="store_true", help="say where the time goes; costs a few microseconds a token")
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
        models: dict[str, Any] = {"local": AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()}
        for count in options.servers:
            bounds = [round(options.layers * part / count) for part in range(count + 1)]
            peers: list[str] = []
            for first, end in zip(bounds, bounds[1:], strict=False):
                # A given throughput: the measurement at start is not what is compared here.
                _, ready, _ = running.node(path, "--serve", f"{first}:{end}", "--dtype", "float32", "--throughput", "100", peers=peers)
                peers = peers or local_addrs(ready)
            name = f"{count} server{'s' if count > 1 else ''}"
            models[name] = AutoDistributedModelForCausalLM.from_pretrained(
                path, initial_peers=peers, dtype=torch.float32, show_route=False, speculation=False
            )

        size = f"{options.layers}×{options.hidden}, {options.heads} heads, float32"
        print(f"BLOOM {size}; prefix {options.prefix}, {options.tokens} new tokens, {options.rounds} rounds; {machine()}")
        inputs = torch.randint(10, options.vocabulary, (1, options.prefix), generator=torch.Generator().manual_seed(1))
        steps: dict[str, list[float]] = {name: [] for name in models}
        local_blocks: list[float] = []
        rested_blocks: list[float] = []
        traced: dict[str, list[Token]] = {name: [] for name in models if name != "local"}
        agree = True
        for number in range(-1, options.rounds):  # the first one warms up
            names = list(models)
            turn = max(number, 0) % len(names)
            outputs = {}
            for name in names[turn:] + names[:turn]:
                call = partial(models[name].generate, inputs)
                trace = Trace()
                if not options.trace:
                    seconds, outputs[name] = steps_of(call, options.tokens)
                elif name == "local":
                    with watching_blocks(models[name], rested_blocks):
                        call(max_new_tokens=options.tokens, do_sample=False, streamer=Rest())
                    with watching_blocks(models[name], local_blocks):
                        seconds, outputs[name] = steps_of(call, options.tokens)
                else:
                    with trace.watching():
                        seconds, outputs[name] = steps_of(call, options.tokens)
                if number >= 0:
                    steps[name].append(statistics.median(seconds))
                    if name != "local":
                        traced[name] += trace.tokens[2:]  # the first is for what came before the prompt, the second for the prompt
            agree = agree and all(torch.equal(outputs[name], outputs["local"]) for name in names)
        medians = {name: statistics.median(values) for name, values in steps.items()}
        rows: list[list[object]] = []
        for name, values in steps.items():
            added = [own - local for own, local in zip(values, steps["local"], strict=True)]
            worst, best = max(added) * 1e3, min(added) * 1e3
            rows.append([name, medians[name] * 1e3, statistics.median(added) * 1e3, best, worst, medians[name] / medians["local"]])
        print_table(["", "step ms", "added ms", "best round", "worst round", "of local"], rows)
        print(f"tokens equal to local: {'yes' if agree else 'NO'}")
        if options.trace:
            round_trips = {name: least_round_trip(model) for name, model in models.items() if name != "local"}
            print_trace(traced, medians, statistics.median(local_blocks), statistics.median(rested_blocks), round_trips)
    if not agree:
        raise SystemExit(1)


def least_round_trip(model: Any) -> float | None:
    """Seconds of the shortest heartbeat to any server of the model's swarm."""
    from petalnet.client.remote import find_blocks

    blocks = find_blocks(model)
    if blocks is None:
        return None
    host = blocks.target.swarm.membership.host
    known = [host.round_trip_s(hop.peer_id) for hop in blocks.route()]
    return min((seconds for seconds in known if seconds is not None), default=None)


if __name__ == "__main__":
    main()
