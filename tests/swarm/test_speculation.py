"""Drafts over real server processes: fewer steps where the text repeats itself, and the local model's tokens whatever is guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from petalnet.client.session import InferenceSession
from petalnet.client.speculation import DraftPolicy

from .models import BLOCKS, Pair, connected, ids, load_local

GREEDY = {"do_sample": False}


class Always(DraftPolicy):
    """Drafts wherever there is something to guess from: on one machine, that would seldom pay."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def for_answer(self) -> Always:
        return self

    def choose(self, length: int, most: int, draft_s: float = 0.0) -> int:
        return max(min(self._count, most), 0)


class Dictation(LogitsProcessor):
    """Has the library choose the tokens of a text."""

    def __init__(self, text: list[int], start: int) -> None:
        self.text, self.start = text, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.text[input_ids.shape[1] - self.start]] = 0.0
        return chosen


@pytest.fixture(scope="module", params=sorted(BLOCKS))
def pair(request: pytest.FixtureRequest, families: Any) -> Iterator[Pair]:
    path = families.paths[request.param]
    with connected(path, families.peers) as remote:
        remote.remote_blocks.draft_policy = Always(7)
        yield Pair(request.param, path, load_local(path), remote)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(position, new tokens) of each step."""
    seen: list[tuple[int, int]] = []
    run: Callable[..., list[torch.Tensor]] = InferenceSession.run

    def spy(session: InferenceSession, hidden: torch.Tensor, **options: object) -> list[torch.Tensor]:
        seen.append((session.position, hidden.shape[1]))
        return run(session, hidden, **options)

    monkeypatch.setattr(InferenceSession, "run", spy)
    return seen


def repetitive(length: int) -> list[int]:
    """A list of short lines that begin alike and end in a word of their own."""
    line = ids(1, 9, seed=40)[0].tolist()
    words = ids(1, length, seed=41)[0].tolist()
    return [token for word in words for token in (*line, word)][:length]


def test_a_text_that_repeats_itself_takes_few_steps(pair: Pair, steps: list[tuple[int, int]]) -> None:
    """And what the servers have in the end is that text: the model goes on from it as the local one does."""
    tokens, text = ids(1, 12, seed=30), repetitive(120)
    with pair.remote.inference_session(max_length=160) as session:
        dictated = LogitsProcessorList([Dictation(text, 12)])
        answer = pair.remote.generate(tokens, max_new_tokens=len(text), logits_processor=dictated, **GREEDY)
        assert answer[0].tolist() == tokens[0].tolist() + text
        assert len(text) / len(steps) > 2.5
        assert session.accepted == len(text) - len(steps) and session.position == 12 + len(text) - 1
        expected = pair.local.generate(answer, max_new_tokens=20, **GREEDY)
        assert torch.equal(pair.remote.generate(None, max_new_tokens=20, **GREEDY), expected[:, answer.shape[1] :])


def test_right_and_wrong_guesses_give_the_same(pair: Pair, steps: list[tuple[int, int]]) -> None:
    """Prompts that hold the beginnings of their own answer: some guesses are right, most are not."""
    tokens = ids(1, 8, seed=10)
    for _ in range(3):
        tokens = torch.cat([tokens, pair.local.generate(tokens, max_new_tokens=3, **GREEDY)[:, -6:]], dim=1)
    pair.same(tokens, max_new_tokens=60, **GREEDY)
    pair.same(tokens, max_new_tokens=40, do_sample=True, temperature=0.5, top_k=4, repetition_penalty=0.8)
    assert any(new > 1 for _, new in steps[1:])


def test_the_same_without_drafts(pair: Pair, families: Any, steps: list[tuple[int, int]]) -> None:
    tokens, text = ids(1, 12, seed=31), repetitive(60)
    prompt = torch.cat([tokens, torch.tensor([text])], dim=1)
    expected = pair.same(prompt, max_new_tokens=30, **GREEDY)
    steps.clear()
    with connected(pair.path, families.peers, speculation=False) as plain:
        plain.remote_blocks.draft_policy = Always(7)
        assert torch.equal(plain.generate(prompt, max_new_tokens=30, **GREEDY), expected)
    assert [new for _, new in steps[1:]] == [1] * 29
