"""Many clients of the same servers at a time, short and long ones: each is answered as if it were alone, and whoever finds no room waits.

A Llama on three servers, and a Falcon of a kind whose attention the servers cannot replace.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from petalnet.client.session import InferenceSession

from .models import Pair, connected, ids, load_local, padded

CLIENTS = 8
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module", params=["llama", "falcon"])
def pair(request: pytest.FixtureRequest, families) -> Iterator[Pair]:
    path = families.paths[request.param]
    with connected(path, families.peers) as remote:
        yield Pair(request.param, path, load_local(path), remote)


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(0)` … `work(count - 1)`, each on a thread of its own, begun together."""
    start = threading.Barrier(count)

    def run(number: int) -> Any:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def prompt(client: int) -> torch.Tensor:
    """A prompt of its own for each client, of 3 to 80 tokens."""
    return ids(1, 3 + 11 * client, seed=100 + client)


def test_eight_threads_on_one_model(pair: Pair) -> None:
    """With prompts and answers of different lengths, so that they begin, go on and end at different times."""
    options = [{"max_new_tokens": 20 + 3 * client, **GREEDY} for client in range(CLIENTS)]
    expected = [pair.local.generate(prompt(client), **options[client]) for client in range(CLIENTS)]
    answers = at_once(CLIENTS, lambda client: pair.remote.generate(prompt(client), **options[client]))
    for answer, right in zip(answers, expected, strict=True):
        assert torch.equal(answer, right)


def test_threads_that_do_different_things(pair: Pair) -> None:
    """Beams, several rows with padding, passes without a cache, rollback and a draft, all in the same batches."""
    model, local = pair.remote, pair.local
    rows, mask = padded("left")

    def beams(either: torch.nn.Module) -> torch.Tensor:
        return either.generate(ids(2, 9, seed=1), max_new_tokens=16, num_beams=4, num_return_sequences=2, **GREEDY)

    def batch(either: torch.nn.Module) -> torch.Tensor:
        return either.generate(rows, attention_mask=mask, max_new_tokens=25, **GREEDY)

    def passes(either: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([either(ids(2, 30, seed=seed)).logits.argmax(-1) for seed in range(8)])

    def lookup(either: torch.nn.Module) -> torch.Tensor:
        return either.generate(ids(1, 6, seed=2).repeat(1, 4), max_new_tokens=30, prompt_lookup_num_tokens=3, **GREEDY)

    def rollback(either: torch.nn.Module) -> torch.Tensor:
        """Two answers to the same beginning."""
        begin, ends = ids(1, 40, seed=3), [ids(1, 5, seed=seed) for seed in (4, 5, 6)]
        if either is local:
            return torch.cat([local.generate(torch.cat([begin[:, :38], end], dim=1), max_new_tokens=10, **GREEDY)[:, 38:] for end in ends])
        answers = []
        with model.inference_session(max_length=64) as session:
            model.generate(begin, max_new_tokens=1, **GREEDY)
            for end in ends:
                session.position = 38
                answers.append(model.generate(end, max_new_tokens=10, **GREEDY)[:, -15:])
        return torch.cat(answers)

    work = [beams, batch, passes, lookup, rollback, batch]
    expected = [do(local) for do in work]
    answers = at_once(len(work), lambda number: work[number](model))
    for do, answer, right in zip(work, answers, expected, strict=True):
        assert torch.equal(answer, right), do.__name__


@pytest.mark.long
def test_processes(families) -> None:
    """Eight clients of the Llama and two of the Falcon at once: greedy, sampled, with beams, with several answers."""
    sampled = {"do_sample": True, "top_k": 40, "temperature": 0.8}
    choices = [GREEDY, sampled, {"num_beams": 3, **GREEDY}, {"num_return_sequences": 2, **sampled}]
    clients = [
        {
            "model": str(families.paths[family]),
            "ids": prompt(seed).tolist(),
            "seed": seed,
            "options": {**choices[seed % 4], "max_new_tokens": 24},
        }
        for family, count in (("llama", CLIENTS), ("falcon", CLIENTS // 4))
        for seed in range(count)
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("clients.py"))], input=json.dumps({"peers": families.peers, "clients": clients}),
        env=families.nodes.environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = dict(json.loads(line) for line in done.stdout.splitlines())
    local = {str(path): load_local(path) for path in (families.paths["llama"], families.paths["falcon"])}
    for number, client in enumerate(clients):
        torch.manual_seed(client["seed"])
        expected = local[client["model"]].generate(torch.tensor(client["ids"]), **client["options"])
        assert answers[number] == expected.tolist(), f"client {number}"


class Watch(StoppingCriteria):
    """Never stops; `seen` is set with the first token."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.seen.set()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_short_answer_beside_a_long_prompt(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 2,000 tokens are prefilled in pieces, between which another client's tokens come."""
    long, short = ids(2 if pair.family == "llama" else 1, 2000, seed=50), ids(1, 7, seed=51)
    sent, arrived = threading.Event(), Watch()
    run: Callable[..., Any] = InferenceSession.run

    def telling(session: InferenceSession, hidden: torch.Tensor, **options: object) -> Any:
        if hidden.shape[1] == 2000:
            sent.set()
        return run(session, hidden, **options)

    monkeypatch.setattr(InferenceSession, "run", telling)
    meanwhile = 0

    def answer_long() -> torch.Tensor:
        ending = StoppingCriteriaList([arrived])
        return pair.remote.generate(long, max_new_tokens=4, stopping_criteria=ending, **GREEDY)

    with ThreadPoolExecutor(1) as pool, pair.remote.inference_session(max_length=1024) as session:
        pieces = [pair.remote.generate(short, max_new_tokens=1, session=session, **GREEDY)]
        answering = pool.submit(answer_long)
        sent.wait(60)
        while not arrived.seen.is_set() and not answering.done() and session.position < 1000:
            pieces.append(pair.remote.generate(None, max_new_tokens=1, session=session, **GREEDY))
            meanwhile += not arrived.seen.is_set()
        answer = answering.result(60)
    assert meanwhile >= 3
    assert torch.equal(answer, pair.local.generate(long, max_new_tokens=4, **GREEDY))
    pieced = torch.cat(pieces, dim=1)
    assert torch.equal(pieced, pair.local.generate(short, max_new_tokens=len(pieces), **GREEDY))
