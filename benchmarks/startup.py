"""How long a user waits: a server until it is ready, and a client program until its first token.

    python benchmarks/startup.py

Seconds from the start of the process, beside `python -c "import transformers"` and `import torch` alone and the same program with
local `transformers`, all in the same run and taking turns. "first start" has empty caches (digests, probe, measured throughput),
later starts find them filled.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from swarm_processes import Bench, add_model_options, bench, local_addrs, machine, make_model, print_table

PROGRAM = """
import sys
import torch
{imports}
torch.set_num_threads(1)
model = {model}
class FirstToken:
    calls = 0
    def put(self, value):
        self.calls += 1
        if self.calls == 2:
            print("token", flush=True)
    def end(self):
        pass
model.generate(torch.tensor([[11, 12, 13, 14, 15, 16, 17, 18]]), max_new_tokens=2, do_sample=False, streamer=FirstToken())
"""


def program(path: Path, peers: list[str] | None) -> str:
    if peers is None:
        imports, call = (
            "from transformers import AutoModelForCausalLM",
            f"AutoModelForCausalLM.from_pretrained({str(path)!r}, dtype=torch.float32)",
        )
    else:
        imports = "from petalnet import AutoDistributedModelForCausalLM"
        call = f"AutoDistributedModelForCausalLM.from_pretrained({str(path)!r}, initial_peers={peers!r}, dtype=torch.float32)"
    return PROGRAM.format(imports=imports, model=call)


def until_token(running: Bench, code: str) -> tuple[float, float]:
    """Seconds from the start of a Python process to the line that it prints, and to its end."""
    start = time.perf_counter()
    process = running.start([sys.executable, "-c", code], stdout=subprocess.PIPE)
    if process.stdout is None or process.stdout.readline() != b"token\n":
        raise SystemExit("a client program ended without a token")
    token = time.perf_counter() - start
    if process.wait() != 0:
        raise SystemExit(f"a client program ended with {process.returncode}")
    return token, time.perf_counter() - start


def until_end(running: Bench, code: str) -> float:
    start = time.perf_counter()
    if running.start([sys.executable, "-c", code]).wait() != 0:
        raise SystemExit(f"this failed: {code}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with bench() as running:
        path = make_model(running.folder, options)
        serve = [path, "--serve", f"0:{options.layers}", "--dtype", "float32"]
        seconds: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            seconds.setdefault(name, []).append(value)

        note("import transformers", until_end(running, "import transformers"))  # also brings files into the page cache
        process, _, first_start = running.node(*serve)
        running.stop(process)
        seconds.clear()
        for _ in range(options.rounds):
            note("import torch", until_end(running, "import torch"))
            note("import transformers", until_end(running, "import transformers"))
            note(
                "import torch, transformers.BloomForCausalLM", until_end(running, "import torch; from transformers import BloomForCausalLM")
            )
            note("import petalnet", until_end(running, "import petalnet"))
            note("local transformers, to first token", until_token(running, program(path, None))[0])
            process, ready, taken = running.node(*serve)
            note("node to ready", taken)
            token, whole = until_token(running, program(path, local_addrs(ready)))
            note("client to first token", token)
            note("client to the end of its process", whole)
            running.stop(process)
        base = statistics.median(seconds["import transformers"])
        print(f"BLOOM {options.layers}×{options.hidden}, float32, all blocks on one server; {options.rounds} rounds; {machine()}")
        rows: list[list[object]] = [
            [name, statistics.median(values), min(values), max(values), statistics.median(values) / base]
            for name, values in seconds.items()
        ]
        rows.append(["node to ready, first start", first_start, first_start, first_start, first_start / base])
        print_table(["", "seconds", "min", "max", "over import transformers"], rows)


if __name__ == "__main__":
    main()
