"""Several clients of a swarm, each a process of its own: `python clients.py` reads what they are to do as JSON, one line on standard input.

    {"peers": [multiaddr, …], "clients": [{"model": folder, "ids": [[…]], "seed": 1, "options": {…}}, …]}

They begin at the same time. Each prints one line when it is done: its number and the rows that it was answered, as JSON. The imports are
done once, before the processes part.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import petalnet
import petalnet.client.distributed
import petalnet.peering
from petalnet.errors import MissingBlocksError

JOINING = 3
JOIN_WITHIN_S = 60.0


def join(model: torch.nn.Module) -> None:
    """Wait until there is a route. On a machine with far more to do than it can, servers are late with telling of themselves."""
    deadline = time.monotonic() + JOIN_WITHIN_S
    while True:
        try:
            model.remote_blocks.route()
            return
        except MissingBlocksError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def run_client(number: int, task: dict[str, Any], client: dict[str, Any], turn: Any, start: Any) -> None:
    """One client, in its own process. A few join at a time: all at once, on few cores, they would find servers too slow to be there."""
    with turn:
        model = petalnet.AutoDistributedModelForCausalLM.from_pretrained(
            client["model"], initial_peers=task["peers"], dtype=torch.float32, show_route=False
        )
        join(model)
    with model:
        start.wait(2 * JOIN_WITHIN_S)
        torch.manual_seed(client["seed"])
        rows = model.generate(torch.tensor(client["ids"]), **client["options"]).tolist()
    sys.stdout.write(json.dumps([number, rows]) + "\n")
    sys.stdout.flush()


def main() -> int:
    task = json.loads(sys.stdin.readline())
    for model in {client["model"] for client in task["clients"]}:
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))  # imports what the library needs for it
    forking = multiprocessing.get_context("fork")
    turn, start = forking.Semaphore(JOINING), forking.Barrier(len(task["clients"]))
    processes = [
        forking.Process(target=run_client, args=(number, task, client, turn, start)) for number, client in enumerate(task["clients"])
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
