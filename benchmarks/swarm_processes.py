"""What the benchmarks share: a model of random weights, real `petalnet node` processes on loopback, and small tables.

Everything lives in one temporary folder and ends with the program, whichever way it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

READY_WITHIN_S = 300.0
STOPPED_WITHIN_S = 20.0
ON_LOOPBACK = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")


class Bench:
    """A temporary folder and the processes that were started in it.

    Attributes:
        folder: for models and files of the benchmark.
        environment: for every process: one compute thread, nothing of the user's configuration, caches of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PETALNET_")}
        self.environment = clean | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PETALNET_STATE_DIR": str(folder / "state"),
            "PETALNET_CACHE_DIR": str(folder / "cache"),
            "PETALNET_CONFIG": str(folder / "config.toml"),
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self._nodes = 0

    def node(
        self, *arguments: object, peers: Sequence[str] = (), listen: Sequence[str] = ON_LOOPBACK, on: Sequence[str] = ()
    ) -> tuple[subprocess.Popen[bytes], dict[str, object], float]:
        """Runs `petalnet node …` until it is ready: its process, what its ready file says, and the seconds that it took from its start.

        Args:
            listen: options that say where.
            on: what runs a command on the host where it is to be, as `ip netns exec …`.
        """
        self._nodes += 1
        ready_file, log_file = self.folder / f"ready-{self._nodes}.json", self.folder / f"node-{self._nodes}.log"
        command = [*on, sys.executable, "-m", "petalnet", "node", *map(str, arguments)]
        command += ["--identity-path", str(self.folder / f"identity-{self._nodes}.key"), *listen]
        command += ["--ready-file", str(ready_file), *(["--initial-peers", *peers] if peers else ["--new-swarm"])]
        start = time.perf_counter()
        with log_file.open("wb") as log:
            process = self.start(command, stdout=log)
        while not ready_file.exists():
            if process.poll() is not None or time.perf_counter() - start > READY_WITHIN_S:
                raise SystemExit(f"a node did not become ready (exit status {process.poll()}):\n{log_file.read_text(errors='replace')}")
            time.sleep(0.005)
        return process, json.loads(ready_file.read_text()), time.perf_counter() - start

    def start(
        self,
        command: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a process that ends with the benchmark. A file for its output is one for its errors too, unless another is given."""
        if stderr is None and stdout not in (None, subprocess.PIPE):
            stderr = subprocess.STDOUT
        process = subprocess.Popen(command, env=self.environment, stdin=stdin, stdout=stdout, stderr=stderr)
        self._processes.append(process)
        return process

    def stop(self, *processes: subprocess.Popen[bytes]) -> None:
        """Ends these processes, all that were started where none are named."""
        chosen = processes or tuple(self._processes)
        for process in chosen:
            if process.poll() is None:
                process.terminate()
        for process in chosen:
            try:
                process.wait(STOPPED_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A `Bench` that is cleaned up at the end, on Ctrl-C and SIGTERM too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="petalnet-bench-") as folder:
        running = Bench(Path(folder))
        try:
            yield running
        finally:
            running.stop()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192)


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """A BLOOM of seeded random weights in float32, in Hugging Face format."""
    from transformers import BloomConfig

    config = BloomConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        n_layer=options.layers,
        n_head=options.heads,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=3,
    )
    return _save(config, folder)


def make_llama(folder: Path, options: argparse.Namespace) -> Path:
    """As `make_model`, of a Llama with half as many heads for keys and values and an MLP 2.75 times as wide as the hidden states."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=max(1, options.heads // 2),
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=3,
    )
    return _save(config, folder)


def _save(config: Any, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    path = folder / "model"
    model.save_pretrained(path, safe_serialization=True)
    return path


def local_addrs(ready: dict[str, object]) -> list[str]:
    """The multiaddrs of a ready file, as a list of text."""
    addrs = ready["addrs"]
    if not isinstance(addrs, list):
        raise SystemExit(f"a ready file without addresses: {ready}")
    return [str(addr) for addr in addrs]


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns: the first to the left, the others to the right; floats with two decimals."""
    text = [list(header)] + [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in text) for column in range(len(header))]
    for row in text:
        print(
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def machine() -> str:
    """One line on what this was measured with; the load says whether to trust it."""
    import torch
    import transformers

    return (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
