"""How late a server's trio loop runs while its compute thread is busy, with a model that is all Python and tiny operations: the worst case.

    python benchmarks/loop_delay.py                 # half a minute; wants a machine with two idle cores

A task in the loop sleeps for 2 ms again and again and notes how much later it wakes; beside it, closed-loop clients keep the engine busy.
The reference is the same loop without them, and with Python's default interval for threads to take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import outcome
import torch
import transformers
import trio

from petalnet.blocks import engine as engine_module
from petalnet.blocks.costs import Costs
from petalnet.blocks.engine import Engine
from petalnet.blocks.scheduler import Part, Scheduler, Task

PROBE_S = 0.002
BLOCKS, HIDDEN = 24, 64


def tiny_model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_attention_heads=4, num_hidden_layers=BLOCKS
    )
    return transformers.LlamaModel(config).eval()


async def measure(model: torch.nn.Module, clients: int, seconds: float) -> None:
    def run(parts: list[Part]) -> list[outcome.Outcome[Any] | None]:
        with torch.inference_mode():
            hidden = model(inputs_embeds=torch.zeros(1, sum(part.tokens for part in parts), HIDDEN), use_cache=False).last_hidden_state
        return [outcome.Value(hidden[:, :1]) for _ in parts]

    engine = Engine(run, Scheduler(Costs(100, 3000)))
    late: list[float] = []

    async def probe() -> None:
        while True:
            began = time.perf_counter()
            await trio.sleep(PROBE_S)
            late.append(time.perf_counter() - began - PROBE_S)

    async def client(number: int) -> None:
        while True:
            await engine.submit(Task(f"peer {number}", number, "key", 1, 1, "step", 1 << 20, None))

    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        nursery.start_soon(probe)
        for number in range(clients):
            nursery.start_soon(client, number)
        await trio.sleep(seconds)
        late.sort()
        figures = "  ".join(f"{name} {1000 * late[int(share * (len(late) - 1))]:7.2f}" for name, share in SHARES.items())
        rounds, busy = engine.rounds, engine.busy_s / seconds
        per_round = 1000 * rounds.seconds / max(1, rounds.count)
        print(
            f"{clients} clients, threads take turns after {1000 * sys.getswitchinterval():.1f} ms: {figures} ms late;"
            f" busy {busy:4.0%}, {per_round:.1f} ms a round; the engine's own gauge: worst {1000 * engine.loop_delay.worst_s:.1f} ms"
        )
        nursery.cancel_scope.cancel()


SHARES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999, "worst": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    model = tiny_model()
    for clients in (0, 1, 8):
        trio.run(measure, model, clients, seconds)
    engine_module.SWITCH_INTERVAL_S = 1.0  # the lesser of this and Python's own counts
    trio.run(measure, model, 8, seconds)


if __name__ == "__main__":
    main()
