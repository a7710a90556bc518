"""What a session sends and what it computes: rows that are alike, outputs that are used, any order of steps, rows and positions."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from petalnet.p2p.session_messages import StepDone

GREEDY = {"do_sample": False}
HIDDEN, LAYERS = 32, 6


def random_hidden(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_a_prompt_is_sent_once_for_all_its_beams(pair: Any, wire: Any) -> None:
    ids = pair.ids(2, 7)
    options = {"max_new_tokens": 20, "num_beams": 5, "num_return_sequences": 2, **GREEDY}
    assert torch.equal(pair.remote.generate(ids, **options), pair.local.generate(ids, **options))
    prompt, *others = wire.steps
    assert prompt.hidden.shape == (2, 7, HIDDEN)
    assert prompt.promise_rows == 10
    for request in others:
        assert request.hidden.shape == (10, 1, HIDDEN)
        assert request.promise_rows == 0


def test_padded_rows_are_alike_only_with_equal_masks(pair: Any, wire: Any) -> None:
    ids, mask = pair.padded("left")
    ids, mask = torch.cat([ids, ids[:1]]), torch.cat([mask, mask[:1]])
    mask[3, 0] = 0  # as the first row otherwise
    options = {"attention_mask": mask, "max_new_tokens": 9, "num_beams": 3, **GREEDY}
    assert torch.equal(pair.remote.generate(ids, **options), pair.local.generate(ids, **options))
    request = wire.steps[0]
    assert request.hidden.shape == (4, 9, HIDDEN)
    assert request.mask is not None and request.mask.shape == (4, 9)


def test_only_the_outputs_that_are_used_come_back(pair: Any, wire: Any) -> None:
    ids = pair.ids(1, 12)
    pair.remote.generate(ids, max_new_tokens=2, **GREEDY)
    assert [answer.output.shape[1] for answer in wire.answers] == [1, 1]
    with torch.inference_mode():
        expected = pair.local(ids)
        for keep in (0, 1, 5, 12, 40):
            answer = pair.remote(ids, use_cache=True, logits_to_keep=keep).logits
            assert torch.allclose(answer, expected.logits[:, -keep:], atol=1e-4)
        wire.clear()
        states = pair.remote(ids, use_cache=True, logits_to_keep=1, output_hidden_states=True).hidden_states
        whole = pair.remote.base_model(ids, use_cache=True).last_hidden_state
        assert all(answer.output.shape[-2] == 12 for answer in wire.received if isinstance(answer, StepDone))
        for ours, theirs in zip(states, pair.local(ids, output_hidden_states=True).hidden_states, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.allclose(whole, states[-1], atol=1e-4)


def test_all_logits_of_a_draft_are_kept(pair: Any, wire: Any) -> None:
    """Assisted generation asks for the logits of all candidates at once."""
    ids = pair.ids(1, 6).repeat(1, 3)
    options = {"max_new_tokens": 16, "prompt_lookup_num_tokens": 4, **GREEDY}
    assert torch.equal(pair.remote.generate(ids, **options), pair.local.generate(ids, **options))
    assert 1 < wire.answers[0].output.shape[1] <= 5


def test_hidden_states_of_rows_that_are_alike(pair: Any, wire: Any) -> None:
    ids = pair.ids(1, 5).repeat(2, 1)
    with torch.inference_mode():
        ours = pair.remote(ids, use_cache=True, output_hidden_states=True).hidden_states
        theirs = pair.local(ids, output_hidden_states=True).hidden_states
    assert wire.steps[0].hidden.shape[0] == 1
    assert len(ours) == LAYERS + 1
    for boundary, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(boundary, expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_steps_rows_and_positions(pair: Any, seed: int) -> None:
    """Against the blocks run over each row's whole history."""
    chance = random.Random(seed)
    rows = chance.randint(1, 4)
    history = torch.zeros(rows, 0, HIDDEN)
    with torch.inference_mode(), pair.blocks.inference_session(max_length=40) as session:
        for count in range(10):
            if chance.random() < 0.3:
                session.position = chance.randint(0, session.position)
                history = history[:, : session.position]
                if session.position == 0 and chance.random() < 0.5:
                    history = torch.zeros(chance.randint(1, 4), 0, HIDDEN)
            order = None
            if session.position and chance.random() < 0.5:
                order = torch.tensor([chance.randrange(len(history)) for _ in range(chance.randint(1, 5))])
                history = history[order]
                if chance.random() < 0.3:  # in two goes
                    session.reorder(order)
                    order = torch.tensor(chance.sample(range(len(history)), len(history)))
                    history = history[order]
            new = chance.choice((0, 1, 1, 2, 4))
            tokens = random_hidden(len(history), new, seed=100 * seed + count)
            if chance.random() < 0.5:  # some rows alike
                tokens = tokens[[chance.randrange(len(tokens)) for _ in range(len(tokens))]]
            if session.position + new > session.max_length:
                break
            answer = session.step(tokens, hypo_ids=order)
            history = torch.cat([history, tokens], dim=1)
            assert session.position == history.shape[1]
            assert session.rows == len(history)
            assert answer.shape == tokens.shape
            if new:
                assert torch.allclose(answer, pair.local_blocks(history, 0, LAYERS)[:, -new:], atol=1e-4)


def test_beams_follow_beams_in_a_session(pair: Any) -> None:
    """The rows that the second call begins with are those of the first call's answers."""
    ids = pair.ids(2, 5)
    options = {"max_new_tokens": 6, "num_beams": 4, **GREEDY}
    with pair.remote.inference_session(max_length=64) as session:
        first = pair.remote.generate(ids, **options)
        assert session.rows == 2
        second = pair.remote.generate(None, **options)
        third = pair.remote.generate(None, max_new_tokens=4, **GREEDY)
    expected = pair.local.generate(ids, **options)
    assert torch.equal(first, expected)
    expected = pair.local.generate(expected, **options)
    assert torch.equal(second, expected[:, first.shape[1] :])
    assert torch.equal(third, pair.local.generate(expected, max_new_tokens=4, **GREEDY)[:, expected.shape[1] :])
