"""The client of `chains.py`, a process on a host of its own: requests on the standard input, answers on the standard output, a line each.

{"do": "open", "name": "direct", "path": folder, "peers": [multiaddr, …], "settings": {…}}     # without peers: the local model
{"do": "generate", "name": "direct", "ids": [[…]], "tokens": 40, "options": {…}, "seed": 1}
{"do": "logits", "name": "direct", "ids": [[…]]}                                               # kept for `compare`
{"do": "compare", "names": ["local", "direct"]}
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from generate import Clock
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging as transformers_logging

from petalnet import AutoDistributedModelForCausalLM
from petalnet.client import chain
from petalnet.client.trace import StepTimes, Trace


class Dictated(LogitsProcessor):
    """Has the model write a given text: to whoever guesses ahead, it is the one of a model that would write that."""

    def __init__(self, prompt: int, answer: list[int]) -> None:
        self._prompt, self._answer = prompt, answer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        dictated = torch.full_like(scores, float("-inf"))
        dictated[:, self._answer[input_ids.shape[1] - self._prompt]] = 0.0
        return dictated


@contextlib.contextmanager
def noting_steps(steps: list[dict[str, Any]]) -> Iterator[None]:
    """Has the steps of sessions noted, in seconds: until the output was there, at each server, and of that for computation."""
    add = Trace.add

    def noted(trace: Trace, step: StepTimes) -> None:
        held, computed = [hop.held_s for hop in step.hops], [hop.compute_s for hop in step.hops]
        steps.append({"wall": step.wall_s, "held": held, "computed": computed, "chunks": step.chunks})
        add(trace, step)

    Trace.add = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trace.add = add  # type: ignore[method-assign]


@contextlib.contextmanager
def chunks_of(tokens: int | None) -> Iterator[None]:
    """Prompts go in chunks of so many tokens instead of the length that the client chooses; 0: whole; None: as it chooses."""
    if tokens is None:
        yield
        return
    chosen = chain.chunk_ends

    def chunk_ends(new: int, *arguments: Any, **keywords: Any) -> list[int]:
        return [*range(tokens, new, tokens), new] if tokens else [new]

    chain.chunk_ends = chunk_ends  # type: ignore[assignment]
    try:
        yield
    finally:
        chain.chunk_ends = chosen


class Client:
    """Models by name, and what their logits were."""

    def __init__(self) -> None:
        self._models: dict[str, Any] = {}
        self._logits: dict[str, torch.Tensor] = {}

    def open(self, name: str, path: str, peers: list[str] | None = None, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        if peers is None:
            self._models[name] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        else:
            self._models[name] = AutoDistributedModelForCausalLM.from_pretrained(
                path, initial_peers=peers, dtype=torch.float32, show_route=False, **settings or {}
            )
        return {}

    def generate(
        self,
        name: str,
        ids: list[list[int]],
        tokens: int,
        options: dict[str, Any],
        seed: int = 0,
        answer: list[int] | None = None,
        chunk: int | None = None,
    ) -> dict[str, Any]:
        """How long each token took, what was written, and what the model's trace says of it.

        Args:
            answer: what the model is made to write.
            chunk: see `chunks_of`.
        """
        model, clock = self._models[name], Clock()
        processors = LogitsProcessorList([] if answer is None else [Dictated(len(ids[0]), answer)])
        visits: list[dict[str, Any]] = []
        torch.manual_seed(seed)
        with chunks_of(chunk), noting_steps(visits):
            start = time.perf_counter()
            output = model.generate(
                torch.tensor(ids), max_new_tokens=tokens, streamer=clock, logits_processor=processors, pad_token_id=3, **options
            )
        whole_s = time.perf_counter() - start
        trace = getattr(model, "last_trace", None)
        return {
            "ids": output.tolist(),
            "whole_s": whole_s,
            "first_s": clock.times[1] - start,
            "steps_s": [later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:], strict=False)],
            "visits": visits,
            "trace": None if trace is None else trace.to_dict(),
        }

    def logits(self, name: str, ids: list[list[int]]) -> dict[str, Any]:
        model = self._models[name]
        with torch.inference_mode():
            start = time.perf_counter()
            session = contextlib.nullcontext() if name == "local" else model.inference_session(max_length=len(ids[0]))
            with session:
                self._logits[name] = model(torch.tensor(ids)).logits
        return {"whole_s": time.perf_counter() - start}

    def compare(self, names: list[str]) -> dict[str, Any]:
        """How far the second's logits are from the first's, in units of the first's spread, and how often the best token is another."""
        first, second = (self._logits[name].double() for name in names)
        difference, spread = (first - second).abs(), first.std()
        other = (first.argmax(-1) != second.argmax(-1)).double().mean()
        return {"mean": float(difference.mean() / spread), "worst": float(difference.max() / spread), "other_best": float(other)}


def main() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    client = Client()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(client, request.pop("do"))(**request)), flush=True)


if __name__ == "__main__":
    main()
