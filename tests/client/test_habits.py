"""What code that was written for local models does: it hands caches to `generate`, names cache implementations, hooks modules, and fails in
the middle of an answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from petalnet.errors import SessionClosed

GREEDY = {"do_sample": False}


@pytest.mark.parametrize("more", [0, 4])
def test_a_cache_of_forward_goes_on_in_generate(pair: Any, more: int) -> None:
    """As in the library the inputs are all tokens so far, and so is what comes back."""
    begin, inputs = pair.ids(2, 6), pair.ids(2, 6 + more)
    inputs[:, :6] = begin
    if more == 0:
        inputs = torch.cat([begin, pair.local(begin).logits[:, -1:].argmax(-1)], dim=1)
    with torch.inference_mode():
        caches = [model(begin, use_cache=True).past_key_values for model in (pair.local, pair.remote)]
    expected, answer = (
        model.generate(inputs, past_key_values=cache, max_new_tokens=5, **GREEDY)
        for model, cache in zip((pair.local, pair.remote), caches, strict=True)
    )
    assert torch.equal(answer, expected) and torch.equal(expected, pair.local.generate(inputs, max_new_tokens=5, **GREEDY))
    longer = torch.cat([answer, pair.ids(2, 2)], dim=1)
    assert torch.equal(
        pair.remote.generate(longer, past_key_values=caches[1], max_new_tokens=3, **GREEDY),
        pair.local.generate(longer, max_new_tokens=3, **GREEDY),
    )
    with pytest.raises(ValueError, match="all tokens so far: 2 were given"):
        pair.remote.generate(longer[:, -2:], past_key_values=caches[1], max_new_tokens=3, **GREEDY)
    caches[1].session.close()


def test_the_cache_of_an_answer_is_over(pair: Any) -> None:
    answer = pair.remote.generate(pair.ids(1, 6), max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(SessionClosed, match="inference_session"):
        pair.remote.generate(answer.sequences, past_key_values=answer.past_key_values, max_new_tokens=4, **GREEDY)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_implementations_make_no_difference(pair: Any, kind: str) -> None:
    ids = pair.ids(2, 6)
    expected = pair.local.generate(ids, max_new_tokens=5, **GREEDY)
    assert torch.equal(pair.remote.generate(ids, max_new_tokens=5, cache_implementation=kind, **GREEDY), expected)


def test_hooks_see_all_hidden_states(pair: Any) -> None:
    """Also where the head asks for those of one position."""
    seen: list[torch.Tensor] = []
    for model in (pair.local, pair.remote):
        hook = model.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
        model.generate(pair.ids(2, 9), max_new_tokens=1, **GREEDY)
        hook.remove()
    expected, found = seen
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-3)


class Failing(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] > 8:
            raise ZeroDivisionError
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {}])
def test_a_session_goes_on_after_an_answer_that_failed(pair: Any, options: dict[str, Any]) -> None:
    ids, more = pair.ids(2, 6), pair.ids(2, 3)
    with pair.remote.inference_session(max_length=60) as session:
        with pytest.raises(ZeroDivisionError):
            pair.remote.generate(ids, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([Failing()]), **{**GREEDY, **options})
        said = session.known_tokens(0)
        assert said is not None and said.shape[0] == 2 and torch.equal(said[:, :6], ids)
        answer = pair.remote.generate(more, max_new_tokens=4, **GREEDY)
        said = torch.cat([said, more], dim=1)
        assert torch.equal(answer, pair.local.generate(said, max_new_tokens=4, **GREEDY)[:, said.shape[1] - 3 :])


def test_a_session_goes_on_after_arguments_that_were_refused(pair: Any) -> None:
    ids = pair.ids(1, 6)
    with pair.remote.inference_session(max_length=60):
        first = pair.remote.generate(ids, max_new_tokens=3, **GREEDY)
        with pytest.raises(ValueError, match="nonsense"):
            pair.remote.generate(max_new_tokens=3, num_beams=3, nonsense=1, **GREEDY)
        second = pair.remote.generate(max_new_tokens=3, **GREEDY)
    assert torch.equal(torch.cat([first, second], dim=1), pair.local.generate(ids, max_new_tokens=6, **GREEDY))


def test_a_session_begins_again_with_other_rows(pair: Any) -> None:
    tokens, mask = pair.padded("left")
    with pair.remote.inference_session(max_length=60) as session:
        for ids, options in ((tokens, {"attention_mask": mask}), (pair.ids(2, 5), {"num_beams": 3}), (pair.ids(1, 4), {})):
            session.position = 0
            answer = pair.remote.generate(ids, max_new_tokens=4, **options, **GREEDY)
            assert torch.equal(answer, pair.local.generate(ids, max_new_tokens=4, **options, **GREEDY))
