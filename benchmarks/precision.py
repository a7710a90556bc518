"""What wire precision costs: how far logits and greedy answers are from the exact ones, and how long codecs take.

    python benchmarks/precision.py                         # all three models (half an hour on one core)
    python benchmarks/precision.py --models demo --rounds 5   # the shipped demo model, and the codecs' times (a minute)

In one process: the library's own model, whose hidden states are encoded and decoded, by the very code that puts them on the wire, where a
span begins, as on their way from the client or from the server before. That is done to prompts and to passes without a session, not to
single tokens: a client does not round these either. Passes without a session are rounded on their way back to the client as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from swarm_processes import machine, make_llama, make_model, print_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import petalnet
from petalnet.client.precision import EXACT_TOKENS
from petalnet.p2p.fields import blob_size
from petalnet.p2p.tensors import decode_tensor, encode_tensor

CODECS = ("bfloat16", "float16", "int8")
DEMO = Path(petalnet.__file__).parent / "demo_model"
TEXT = """
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the
minds of the surrounding families, that he is considered as the rightful property of some one or other of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.

"Why, my dear, you must know, Mrs. Long says that Netherfield is taken by a young man of large fortune from the north of England; that he
came down on Monday in a chaise and four to see the place, and was so much delighted with it that he agreed with Mr. Morris immediately;
that he is to take possession before Michaelmas, and some of his servants are to be in the house by the end of next week."
"""
"""From Jane Austen's Pride and Prejudice, of the kind that the demo model was trained on."""


@dataclass
class Subject:
    """A model and what is asked of it.

    Attributes:
        layers: its blocks.
        prompts: ids [rows, tokens].
    """

    name: str
    model: Any
    layers: Sequence[torch.nn.Module]
    prompts: torch.Tensor

    @contextmanager
    def over_the_wire(self, codec: str, spans: int, *, and_back: bool) -> Iterator[None]:
        """Inside, prompts and whole passes go through so many spans, in a codec.

        Args:
            and_back: whether the output of the last span is encoded, too.
        """

        def rounded(hidden: torch.Tensor) -> torch.Tensor:
            if hidden.shape[0] * hidden.shape[1] <= EXACT_TOKENS:
                return hidden
            return decode_tensor(encode_tensor(hidden, codec))

        def entering(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (rounded(args[0]), *args[1:])

        def leaving(_: Any, args: tuple[Any, ...], output: Any) -> Any:
            return (rounded(output[0]), *output[1:]) if isinstance(output, tuple) else rounded(output)

        firsts = [round(len(self.layers) * span / spans) for span in range(spans)]
        hooks = [self.layers[first].register_forward_pre_hook(entering) for first in firsts]
        if and_back:
            hooks.append(self.layers[-1].register_forward_hook(leaving))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self) -> torch.Tensor:
        """Of every token of the prompts, [rows, tokens, vocabulary]."""
        with torch.inference_mode():
            return self.model(self.prompts, use_cache=False).logits

    def perplexity(self, logits: torch.Tensor) -> float:
        wanted = self.prompts[:, 1:].reshape(-1)
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(wanted), -1), wanted).exp())

    def answers(self, tokens: int) -> torch.Tensor:
        """Greedy answers to each prompt alone, [rows, tokens]."""
        answers = [self.model.generate(row[None], max_new_tokens=tokens, do_sample=False)[0, len(row) :] for row in self.prompts]
        return torch.stack(answers)


def demo(options: argparse.Namespace) -> Subject:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = AutoTokenizer.from_pretrained(DEMO)(TEXT.strip(), return_tensors="pt").input_ids[0]
    length = min(options.length, len(ids) // options.prompts)
    return Subject("demo model, 12×160", model, model.base_model.h, ids[: options.prompts * length].view(options.prompts, length))


def random(name: str, save: Callable[[Path, argparse.Namespace], Path], layers: int, options: argparse.Namespace) -> Subject:
    """A model of random weights, and prompts that it wrote itself, so that its perplexity of them means something."""
    with tempfile.TemporaryDirectory(prefix="petalnet-bench-") as folder:
        path = save(Path(folder), argparse.Namespace(layers=layers, hidden=1024, heads=16, vocabulary=8192))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.manual_seed(1)
    start = torch.randint(10, 8192, (options.prompts, 4))
    prompts = model.generate(start, max_new_tokens=options.length - 4, do_sample=True, top_k=0, eos_token_id=None)
    inner = model.base_model
    return Subject(f"{name}, {layers}×1024", model, getattr(inner, "h", None) or inner.layers, prompts)


def compare(subject: Subject, options: argparse.Namespace) -> list[list[object]]:
    exact, exact_answers = subject.logits(), subject.answers(options.tokens)
    spread, exact_perplexity = float(exact.std()), subject.perplexity(exact)
    hidden = subject.model.config.hidden_size
    rows: list[list[object]] = [
        [f"{subject.name}: exact", "", 4 * hidden, "", "", "", f"{exact_perplexity:.2f}", ""],
    ]
    for codec in CODECS:
        for spans in options.spans:
            with subject.over_the_wire(codec, spans, and_back=True):
                logits = subject.logits()
            with subject.over_the_wire(codec, spans, and_back=False):
                answers = subject.answers(options.tokens)
            wrong = (logits - exact).abs()
            rows.append(
                [
                    codec,
                    spans,
                    blob_size("float32", (64, hidden), codec) // 64,
                    f"{float(wrong.square().mean().sqrt()) / spread:.1e}",
                    f"{float(wrong.max()) / spread:.1e}",
                    f"{float((logits.argmax(-1) == exact.argmax(-1)).float().mean()):.2%}",
                    f"{(subject.perplexity(logits) / exact_perplexity - 1) * 100:+.3f} %",
                    " ".join(f"{share:.0%}" for share in (answers == exact_answers).float().mean(1).tolist()),
                ]
            )
    return rows


def codec_times(rounds: int) -> list[list[object]]:
    """Gigabytes of float32 hidden states a second."""
    rows: list[list[object]] = []
    for tokens, hidden in ((64, 1024), (1024, 1024), (1024, 8192)):
        tensor = torch.randn(1, tokens, hidden)
        gigabytes = tensor.numel() * 4 / 1e9
        row: list[object] = [f"{tokens} × {hidden}", round(gigabytes / seconds(tensor.clone, rounds), 1)]
        for codec in CODECS:
            blob = encode_tensor(tensor, codec)
            row.append(round(gigabytes / seconds(partial(encode_tensor, tensor, codec), rounds), 1))
            row.append(round(gigabytes / seconds(partial(decode_tensor, blob), rounds), 1))
        rows.append(row)
    return rows


def seconds(call: Callable[[], object], rounds: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("demo", "bloom", "llama"), default=["demo", "bloom", "llama"])
    parser.add_argument("--spans", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=9, help="of the codecs' times")
    options = parser.parse_args()

    torch.set_num_threads(1)
    print(machine())
    print("\nGB of float32 hidden states a second (tokens × features), one core")
    print_table(["", "copy", *(f"{codec} {way}" for codec in CODECS for way in ("there", "back"))], codec_times(options.rounds))
    makers = {
        "demo": lambda: demo(options),
        "bloom": lambda: random("BLOOM", make_model, 24, options),
        "llama": lambda: random("Llama", make_llama, 16, options),
    }
    rows = [row for name in options.models for row in compare(makers[name](), options)]
    print(f"\n{options.prompts} prompts, greedy answers of {options.tokens} tokens; differences of logits over the logits' own spread")
    print_table(["", "spans", "bytes a token", "rms", "most", "same first choice", "perplexity", "same tokens, by prompt"], rows)


if __name__ == "__main__":
    main()
