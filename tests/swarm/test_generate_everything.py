"""Everything that `generate` can do, over real server processes, equals what the local model does: BLOOM, Llama, and Mistral with a window.

Several models are served in one swarm, each by two or three servers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from petalnet.client.session import InferenceSession

from .models import PADDING, SPANS, WINDOW, Pair, connected, ids, load_local, padded

GREEDY = {"do_sample": False}


@pytest.fixture(scope="module", params=["bloom", pytest.param("llama", marks=pytest.mark.long), "mistral"])
def pair(request: pytest.FixtureRequest, families) -> Iterator[Pair]:
    path = families.paths[request.param]
    with connected(path, families.peers) as remote:
        yield Pair(request.param, path, load_local(path), remote)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(position, new tokens) of each visit to the swarm in a session, one after another."""
    seen: list[tuple[int, int]] = []
    run: Callable[..., list[torch.Tensor]] = InferenceSession.run

    def spy(session: InferenceSession, hidden: torch.Tensor, **options: object) -> list[torch.Tensor]:
        seen.append((session.position, hidden.shape[1]))
        return run(session, hidden, **options)

    monkeypatch.setattr(InferenceSession, "run", spy)
    return seen


def test_the_route_has_all_servers(pair: Pair) -> None:
    blocks = pair.remote.remote_blocks
    assert [(hop.first, hop.end) for hop in blocks.route()] == SPANS[pair.family]


def test_a_long_answer(pair: Pair) -> None:
    assert pair.same(ids(1, 40, seed=1), max_new_tokens=48, **GREEDY).shape == (1, 88)


def test_five_beams(pair: Pair) -> None:
    assert pair.same(ids(2, 9, seed=2), max_new_tokens=20, num_beams=5, **GREEDY).shape == (2, 29)


def test_three_beams_of_a_padded_batch(pair: Pair) -> None:
    tokens, mask = padded("left")
    answer = pair.same(tokens, attention_mask=mask, max_new_tokens=33, num_beams=3, **GREEDY)
    assert answer.shape == (3, 11 + 33) and answer.shape[1] > 2 * WINDOW


def test_two_returned_of_four_beams(pair: Pair) -> None:
    answer = pair.same(ids(2, 7, seed=3), max_new_tokens=16, num_beams=4, num_return_sequences=2, length_penalty=0.5, **GREEDY)
    assert answer.shape == (4, 23) and not torch.equal(answer[0], answer[1])


def test_beams_that_end_at_different_times(pair: Pair) -> None:
    """With an end token that one answer comes to first, beams are dropped and that answer is padded."""
    tokens = ids(3, 6, seed=4)
    free = pair.local.generate(tokens, max_new_tokens=20, num_beams=3, **GREEDY)
    options = {"num_beams": 3, "eos_token_id": int(free[1, 14]), "pad_token_id": PADDING, "length_penalty": -2.0, **GREEDY}
    answer = pair.same(tokens, max_new_tokens=20, **options)
    assert bool((answer[1] == PADDING).any()) and answer.shape[1] > 16


def test_sampled(pair: Pair) -> None:
    options = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "max_new_tokens": 12}
    several = pair.same(ids(2, 5, seed=5), num_return_sequences=3, **options)
    assert several.shape == (6, 17) and len({tuple(row) for row in several.tolist()}) == 6
    pair.same(ids(1, 8, seed=6), num_beams=3, num_return_sequences=2, **options)
    tokens, mask = padded("left")
    pair.same(tokens, attention_mask=mask, repetition_penalty=1.3, **options)


def test_hidden_states_of_each_token(pair: Pair) -> None:
    options = {"max_new_tokens": 5, "output_hidden_states": True, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    expected, answer = (model.generate(ids(2, 20, seed=7), **options) for model in (pair.local, pair.remote))
    assert torch.equal(answer.sequences, expected.sequences)
    assert all((ours - theirs).abs().max() <= 1e-3 for ours, theirs in zip(answer.logits, expected.logits, strict=True))
    for ours, theirs in zip(answer.hidden_states, expected.hidden_states, strict=True):
        assert len(ours) == len(theirs) == pair.local.config.num_hidden_layers + 1
        for boundary, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert one.shape == other.shape and (one - other).abs().max() <= 1e-3, f"boundary {boundary}"


def draft(model: torch.nn.Module, *, blurred: float = 0.0) -> torch.nn.Module:
    """A copy of a model that guesses five tokens at a time: all of them right, or with blurred weights not all."""
    guesser = copy.deepcopy(model)
    guesser.generation_config.update(num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guesser.parameters():
            parameter.mul_(1 + blurred * torch.randn(parameter.shape, generator=generator))
    return guesser


def rejected(steps: Sequence[tuple[int, int]]) -> int:
    """Entries that were rolled back."""
    ends = [position + new for position, new in steps]
    return sum(end - position for end, (position, _) in zip(ends, steps[1:], strict=False))


def test_a_draft_model(pair: Pair, steps: list[tuple[int, int]]) -> None:
    """Many tokens are verified in one visit to the servers, and what was guessed wrong is rolled back."""
    tokens = ids(1, 12, seed=8)
    expected = pair.local.generate(tokens, max_new_tokens=40, **GREEDY)
    answer = pair.remote.generate(tokens, max_new_tokens=40, assistant_model=draft(pair.local), **GREEDY)
    assert torch.equal(answer, expected)
    assert len(steps) < 10 and rejected(steps) == 0
    steps.clear()
    answer = pair.remote.generate(tokens, max_new_tokens=40, assistant_model=draft(pair.local, blurred=0.02), **GREEDY)
    assert torch.equal(answer, expected)
    assert len(steps) < 30 and rejected(steps) > 0


def test_a_draft_model_for_a_sampled_answer(pair: Pair) -> None:
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "top_k": 20}
    answers = []
    for model in (pair.local, pair.remote):
        torch.manual_seed(5)
        answers.append(model.generate(ids(1, 10, seed=9), assistant_model=draft(pair.local, blurred=0.02), **options))
    assert torch.equal(*answers)


def test_prompt_lookup(pair: Pair, steps: list[tuple[int, int]]) -> None:
    """The prompt holds the beginning of its own answer, so that some guesses are right; most of the others are not."""
    tokens = ids(1, 8, seed=10)
    for _ in range(3):
        tokens = torch.cat([tokens, pair.local.generate(tokens, max_new_tokens=3, **GREEDY)[:, -6:]], dim=1)
    steps.clear()
    pair.same(tokens, max_new_tokens=24, prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **GREEDY)
    assert any(new > 1 for _, new in steps[1:]) and rejected(steps) > 0


class Ending(StoppingCriteria):
    """Ends a row that holds one of these tokens behind its prompt, or has come to a length."""

    def __init__(self, tokens: set[int], prompt: int, longest: int) -> None:
        self.tokens = tokens
        self.prompt = prompt
        self.longest = longest

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        rows = input_ids[:, self.prompt :].tolist()
        return torch.tensor([bool(self.tokens & set(row)) or len(row) >= self.longest for row in rows])


def test_stopping_criteria(pair: Pair) -> None:
    tokens = ids(3, 7, seed=11)
    free = pair.local.generate(tokens, max_new_tokens=20, **GREEDY)
    ending = StoppingCriteriaList([Ending({int(free[0, 12]), int(free[2, 9])}, 7, 15)])
    answer = pair.same(tokens, max_new_tokens=30, stopping_criteria=ending, pad_token_id=PADDING, **GREEDY)
    assert answer.shape[1] <= 22
    answer = pair.same(tokens[:1], max_new_tokens=30, stopping_criteria=StoppingCriteriaList([Ending(set(), 7, 11)]), **GREEDY)
    assert answer.shape == (1, 18)


@pytest.mark.parametrize("back_to", [3, 12, 25])
def test_rollback_in_mid_answer(pair: Pair, back_to: int) -> None:
    """Back into the prompt, to its end and into the answer, and on with other words."""
    tokens, other = ids(2, 12, seed=12), ids(2, 5, seed=13)
    with pair.remote.inference_session(max_length=80) as session:
        first = pair.remote.generate(tokens, max_new_tokens=20, **GREEDY)
        assert torch.equal(first, pair.local.generate(tokens, max_new_tokens=20, **GREEDY))
        session.position = back_to
        second = pair.remote.generate(other, max_new_tokens=12, **GREEDY)
        said = torch.cat([first[:, :back_to], other], dim=1)
        assert torch.equal(second, pair.local.generate(said, max_new_tokens=12, **GREEDY)[:, back_to:])
        session.position = 12 if back_to > 12 else 0
        again = pair.remote.generate(None if back_to > 12 else tokens, max_new_tokens=20, **GREEDY)
        assert torch.equal(again, first[:, session.position + 1 - again.shape[1] :])


def test_beams_in_the_middle_of_a_session(pair: Pair) -> None:
    tokens, more = ids(2, 9, seed=14), ids(2, 4, seed=15)
    with pair.remote.inference_session(max_length=80) as session:
        first = pair.remote.generate(tokens, max_new_tokens=8, num_beams=3, **GREEDY)
        second = pair.remote.generate(more, max_new_tokens=12, **GREEDY)
        session.position = 11
        third = pair.remote.generate(more, max_new_tokens=10, num_beams=4, **GREEDY)
    assert torch.equal(first, pair.local.generate(tokens, max_new_tokens=8, num_beams=3, **GREEDY))
    assert torch.equal(second, pair.local.generate(torch.cat([first, more], dim=1), max_new_tokens=12, **GREEDY)[:, first.shape[1] :])
    said = torch.cat([first[:, :11], more], dim=1)
    assert torch.equal(third, pair.local.generate(said, max_new_tokens=10, num_beams=4, **GREEDY)[:, 11:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(pair: Pair, side: str) -> None:
    tokens, mask = padded(side)
    pair.same(tokens, attention_mask=mask, max_new_tokens=24, **GREEDY)
    with torch.inference_mode():
        expected = pair.local(tokens, attention_mask=mask).logits
        answer = pair.remote(tokens, attention_mask=mask).logits
        cached = pair.remote(tokens, attention_mask=mask, use_cache=True)
    visible = mask.bool()
    for logits in (answer, cached.logits):
        assert (logits - expected)[visible].abs().max() <= 1e-3
    cached.past_key_values.session.close()


def test_logits_of_a_long_text_in_pieces(pair: Pair) -> None:
    """A hand-written loop over `past_key_values`, with pieces of every kind of length."""
    tokens = ids(2, 75, seed=16)
    with torch.inference_mode():
        expected = pair.local(tokens).logits
        assert (pair.remote(tokens).logits - expected).abs().max() <= 1e-3
        cache, pieces, start = None, [], 0
        for length in (1, 30, 1, 1, 33, 9):
            output = pair.remote(tokens[:, start : start + length], past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, start + length
            pieces.append(output.logits)
    assert (torch.cat(pieces, dim=1) - expected).abs().max() <= 1e-3
    cache.session.close()
