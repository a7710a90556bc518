"""Blocks on a GPU, over what its memory and its arithmetic allow.

    python benchmarks/gpu.py                     # blocks of Llama 3 8B's shape, random weights: bf16 and nf4 (5 minutes, 6 GB of the GPU)
    python benchmarks/gpu.py --precisions bf16   # of these only some; also int8
    python benchmarks/gpu.py --tiny              # anywhere, in seconds: shows only that it works

Decoding reads all weights and all KV entries of a pass once, so no pass is quicker than these bytes over the memory's bandwidth, as
measured by a large copy in the same run. A prompt multiplies: no quicker than its operations over what a large product of matrices reaches.
Times are those of `Span.step`, from hidden states in the machine's memory to results on the GPU: what a server does in a round, without the
network. "captured" is decoding as CUDA graphs (docs/nodes.md), "usual" is without.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from swarm_processes import machine, print_table

from petalnet.blocks.capture_trial import choose
from petalnet.blocks.captured import Recorder
from petalnet.blocks.emulated import EmulatedBackend, Rerunner
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import Span, SpanStep
from petalnet.models.checkpoint import ModelSource

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MOST_BYTES = 4 << 30
"""Recordings may take as much as they like here; the table says how much that is."""
ROUNDS = 30
WARM_UPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, help="how many  [4]")
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "nf4", "int8"], default=["bf16", "nf4"])
    parser.add_argument("--rows", type=int, nargs="+", help="sessions in a pass  [1 32]")
    parser.add_argument("--contexts", type=int, nargs="+", help="KV entries of each  [128 2048]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of which the median counts  [{ROUNDS}]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.device = "cpu"
    elif not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --tiny shows that the benchmark works")
    options.blocks = options.blocks or (2 if options.tiny else 4)
    options.rows = options.rows or ([1, 3] if options.tiny else [1, 32])
    options.contexts = options.contexts or ([5, 40] if options.tiny else [128, 2048])
    device = torch.device(options.device)
    name = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{name}; {machine()}", flush=True)
    bandwidth, rate = copy_bandwidth(device, options.tiny), matmul_rate(device, options.tiny)
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s, a product of matrices in bf16 does {rate / 1e12:.2f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory(prefix="petalnet-bench-") as folder:
        path = make_blocks(Path(folder), TINY if options.tiny else LLAMA_8B, options.blocks)
        for precision in options.precisions:
            measure(path, precision, device, options, bandwidth, rate)


def make_blocks(folder: Path, sizes: dict[str, int], blocks: int) -> Path:
    """A Llama of seeded random weights in bfloat16, in Hugging Face format; of its vocabulary there is hardly anything."""
    from transformers import LlamaConfig, LlamaModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, num_hidden_layers=blocks, max_position_embeddings=8192, pad_token_id=0, **sizes)
    LlamaModel(config).to(torch.bfloat16).save_pretrained(folder / "model")
    return folder / "model"


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.zeros((1 << 22) if tiny else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_s(lambda: target.copy_(source), device, 10)


def matmul_rate(device: torch.device, tiny: bool) -> float:
    """Floating-point operations a second of a large product of matrices in bfloat16."""
    size = 256 if tiny else 8192
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / median_s(lambda: one @ one, device, 10)


def measure(path: Path, precision: str, device: torch.device, options: argparse.Namespace, bandwidth: float, rate: float) -> None:
    """Both tables of one precision."""
    quantization = "none" if precision == "bf16" else precision
    span = Span.load(ModelSource.open(path), 0, options.blocks, dtype=torch.bfloat16, device=device, quantization=quantization)
    recorder: Recorder | None = None
    if options.tiny:
        span.backend, recorder = EmulatedBackend(), Rerunner()
    choice = choose(span, "auto", most_bytes=MOST_BYTES, recorder=recorder)
    print(f"\n{precision}: {span.weight_bytes / 1e6 / len(span):.1f} MB a block")
    print(f"a server would {'' if choice.captured else 'not '}capture decoding: {choice.why}", flush=True)
    if recorder is None:
        from petalnet.blocks.recorder import CudaRecorder

        recorder = CudaRecorder(device)
    print_table(
        ["decode, rows × context", "bound, ms a block", "usual", "captured", "usual/bound", "captured/bound", "difference", "graphs"],
        [decode(span, recorder, rows, context, options.rounds, bandwidth) for rows in options.rows for context in options.contexts],
    )
    span.capture(None)
    operations = partial(prompt_operations, TINY if options.tiny else LLAMA_8B)
    print_table(
        ["prompt, tokens", "bound, tokens/s through a block", "measured", "time/bound"],
        [prompt(span, context, options.rounds, operations(context) * len(span) / rate) for context in options.contexts],
    )


def decode(span: Span, recorder: Recorder, count: int, context: int, rounds: int, bandwidth: float) -> list[object]:
    """A row of the first table: so many sessions with so many KV entries get a token each."""
    bound_s = (span.weight_bytes + count * context * span.kv_bytes_per_token) / bandwidth
    pool = give_room(span, count, context + 1)
    inputs = torch.randn(count, 1, 1, span.hidden_size).to(torch.bfloat16)
    steps = [SpanStep(started(pool, context, 1), hidden) for hidden in inputs]
    seconds, outputs = [], []
    for one in (None, recorder):
        span.capture(one, MOST_BYTES)
        seconds.append(median_s(partial(span.step, steps), span.device, rounds))
        outputs.append(torch.cat([output for (output,) in span.step(steps)]).float())
    captured = span.captured
    if captured is None or captured.failure is not None:
        raise SystemExit(f"decoding cannot be captured: {captured.failure if captured is not None else 'there is no spare page'}")
    usual, found = outputs
    return [
        f"{count} × {context}",
        *(f"{1e3 * s / len(span):.3f}" for s in (bound_s, *seconds)),
        *(s / bound_s for s in seconds),
        f"{float((usual - found).abs().max() / usual.abs().max()):.4f}",
        f"{captured.nbytes / 1e6:.0f} MB",
    ]


def prompt(span: Span, tokens: int, rounds: int, bound_s: float) -> list[object]:
    """A row of the second table: a prompt of so many tokens."""
    step = SpanStep(started(give_room(span, 1, tokens), 0, tokens), torch.randn(1, tokens, span.hidden_size).to(torch.bfloat16))
    seconds = median_s(partial(span.step, [step]), span.device, max(rounds // 3, 1))
    return [str(tokens), *(f"{tokens / s * len(span):.0f}" for s in (bound_s, seconds)), seconds / bound_s]


def prompt_operations(sizes: dict[str, int], tokens: int) -> float:
    """Multiplications and additions of a prompt in a block: once a token with each weight, and with half of the keys and values."""
    hidden, head = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * head * sizes["num_key_value_heads"] + 3 * hidden * sizes["intermediate_size"]
    return 2.0 * weights * tokens + 2.0 * hidden * tokens * tokens


def give_room(span: Span, rows: int, tokens: int) -> PagePool:
    """Give a span room for so many rows, full of random entries."""
    page_tokens = span.backend.page_tokens
    pool = PagePool(rows * -(-tokens // page_tokens), page_tokens)
    span.attach(None)
    store = span.make_store(pool.pages)
    for entries in (*store.keys, *store.values):
        entries.normal_()
    span.attach(store)
    return pool


def started(pool: PagePool, context: int, new: int) -> Rows:
    """A row with so many entries, ready for new ones."""
    rows = Rows(pool, context + new)
    rows.resize(1)
    rows.prepare(context + new)
    rows.advance(context)
    return rows


def median_s(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of so many runs, each waited for."""
    for _ in range(WARM_UPS):
        run()
    times: list[float] = []
    for _ in range(rounds):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
