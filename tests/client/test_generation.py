"""`generate` over a swarm gives what the local model gives, in one call or in pieces."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

GREEDY = {"do_sample": False}


def same(pair: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Generate on both sides from the same seed, and compare."""
    torch.manual_seed(7)
    expected = pair.local.generate(ids, **options)
    torch.manual_seed(7)
    answer = pair.remote.generate(ids, **options)
    assert torch.equal(answer, expected)
    return answer


def test_greedy(pair: Any) -> None:
    assert same(pair, pair.ids(1, 5), max_new_tokens=12, **GREEDY).shape == (1, 17)


def test_max_length_and_default_length(pair: Any) -> None:
    assert same(pair, pair.ids(1, 5), max_length=9, **GREEDY).shape == (1, 9)
    assert same(pair, pair.ids(1, 5), **GREEDY).shape == (1, 25)


def test_left_padded_batch(pair: Any) -> None:
    ids, mask = pair.padded("left")
    same(pair, ids, attention_mask=mask, max_new_tokens=10, **GREEDY)
    same(pair, ids, max_new_tokens=10, **GREEDY)  # the library infers the mask from the padding token


def test_sampling(pair: Any) -> None:
    ids, mask = pair.padded("left")
    same(pair, ids, attention_mask=mask, max_new_tokens=12, do_sample=True, temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2)
    assert same(pair, pair.ids(2, 4), max_new_tokens=5, do_sample=True, num_return_sequences=3).shape == (6, 9)


def test_beams(pair: Any) -> None:
    assert same(pair, pair.ids(2, 6), max_new_tokens=8, num_beams=5, num_return_sequences=2, **GREEDY).shape == (4, 14)
    ids, mask = pair.padded("left")
    same(pair, ids, attention_mask=mask, max_new_tokens=6, num_beams=3, **GREEDY)


def test_prompt_lookup_and_assistant(pair: Any) -> None:
    ids = pair.ids(1, 6).repeat(1, 3)
    same(pair, ids, max_new_tokens=20, prompt_lookup_num_tokens=3, **GREEDY)
    assistant = AutoModelForCausalLM.from_pretrained(pair.path, dtype=torch.float32).eval()
    same(pair, ids, max_new_tokens=20, assistant_model=assistant, **GREEDY)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02)  # now it is wrong at times
    same(pair, ids, max_new_tokens=20, assistant_model=assistant, **GREEDY)


def test_sampled_with_an_assistant(pair: Any) -> None:
    """The same draws on both sides, so that what is accepted and what is drawn instead are the same."""
    assistant = AutoModelForCausalLM.from_pretrained(pair.path, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    same(pair, pair.ids(1, 7), max_new_tokens=20, assistant_model=assistant, do_sample=True, temperature=0.7, top_k=30)


def test_an_assistant_over_the_swarm(pair: Any) -> None:
    """Its own cache lives from one proposal to the next, and ends with the answer."""
    ids = pair.ids(1, 7)
    expected = pair.local.generate(ids, max_new_tokens=20, **GREEDY)
    for model in (pair.local, pair.remote):
        assert torch.equal(model.generate(ids, max_new_tokens=20, assistant_model=pair.remote, **GREEDY), expected)
    gc.collect()
    pair.servers.wait_until(lambda: pair.servers.open_sessions() == 0)


def test_sampled_beams(pair: Any) -> None:
    same(pair, pair.ids(2, 6), max_new_tokens=8, num_beams=3, num_return_sequences=2, do_sample=True)


def test_guidance_by_another_prompt(pair: Any) -> None:
    """A logits processor that runs the model itself, beside the answer's session."""
    ids, options = pair.ids(1, 6), {"max_new_tokens": 8, "guidance_scale": 1.8, **GREEDY}
    expected = same(pair, ids, **options)
    with pair.remote.inference_session(max_length=64) as session:
        assert torch.equal(pair.remote.generate(ids, **options), expected)
        assert session.position == expected.shape[1] - 1


def test_a_prompt_in_chunks(pair: Any) -> None:
    ids = pair.ids(1, 30)
    expected = pair.local.generate(ids, max_new_tokens=6, **GREEDY)
    assert torch.equal(pair.remote.generate(ids, max_new_tokens=6, prefill_chunk_size=7, **GREEDY), expected)


def test_stop_strings(pair: Any) -> None:
    ids = pair.ids(1, 6)
    ending = int(pair.local.generate(ids, max_new_tokens=8, **GREEDY)[0, 10])
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols.remove("z")
    symbols.insert(ending, "z")
    words = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert same(pair, ids, max_new_tokens=20, stop_strings=["z"], tokenizer=tokenizer, **GREEDY).shape[1] <= 11


def test_without_any_input(pair: Any) -> None:
    same(pair, None, max_new_tokens=4, bos_token_id=1, **GREEDY)


def test_from_embeddings(pair: Any) -> None:
    embeddings = pair.local.get_input_embeddings()(pair.ids(2, 5)).detach()
    expected = pair.local.generate(inputs_embeds=embeddings, max_new_tokens=6, **GREEDY)
    assert torch.equal(pair.remote.generate(inputs_embeds=embeddings, max_new_tokens=6, **GREEDY), expected)


class After(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria_and_eos(pair: Any) -> None:
    ids = pair.ids(1, 4)
    assert same(pair, ids, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([After(11)]), **GREEDY).shape == (1, 11)
    third = int(pair.local.generate(ids, max_new_tokens=3, **GREEDY)[0, -1])
    same(pair, ids, max_new_tokens=30, eos_token_id=third, **GREEDY)
    same(pair, pair.ids(3, 4), max_new_tokens=30, eos_token_id=third, pad_token_id=3, **GREEDY)


class Recorder:
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_what_is_returned(pair: Any) -> None:
    with pair.remote.inference_session(max_length=32):
        for inputs in (pair.ids(1, 4), None, pair.ids(1, 3, seed=1)):
            recorder = Recorder()
            answer = pair.remote.generate(inputs, max_new_tokens=3, streamer=recorder, **GREEDY)
            assert torch.equal(torch.cat(recorder.pieces), answer[0])
            assert recorder.ended == 1


def test_scores_and_hidden_states(pair: Any) -> None:
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True, **GREEDY}
    expected, answer = (model.generate(pair.ids(2, 5), **options) for model in (pair.local, pair.remote))
    assert torch.equal(answer.sequences, expected.sequences)
    for ours, theirs in zip(answer.logits, expected.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert len(answer.hidden_states) == 4
    for ours, theirs in zip(answer.hidden_states, expected.hidden_states, strict=True):
        assert len(ours) == len(theirs) == pair.local.config.num_hidden_layers + 1
        for boundary, expected_boundary in zip(ours, theirs, strict=True):
            assert torch.allclose(boundary, expected_boundary, atol=1e-4)


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "ambient"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_in_pieces(pair: Any, explicit: bool, side: str) -> None:
    ids, mask = (pair.ids(1, 6), None) if side == "none" else pair.padded("left")
    whole = pair.local.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY)
    with pair.remote.inference_session(max_length=ids.shape[1] + 19) as session:
        named = {"session": session} if explicit else {}
        pieces = [pair.remote.generate(ids, attention_mask=mask, max_new_tokens=1, **GREEDY, **named)]
        assert session.position == ids.shape[1]
        pieces += [pair.remote.generate(None, max_new_tokens=count, **GREEDY, **named) for count in (18, 1)]
        assert session.position == ids.shape[1] + 19
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_new_inputs_in_a_session_see_all_that_was_said(pair: Any) -> None:
    """Processors that look at earlier tokens get them all, and masks of padded rows stay."""
    ids, mask = pair.padded("left")
    more = pair.ids(3, 4, seed=9)
    options = {"max_new_tokens": 5, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, **GREEDY}
    first = pair.local.generate(ids, attention_mask=mask, **options)
    both = torch.cat([first, more], dim=1)
    whole_mask = torch.nn.functional.pad(mask, (0, both.shape[1] - mask.shape[1]), value=1)
    second = pair.local.generate(both, attention_mask=whole_mask, **options)
    for given in (None, torch.ones_like(more), whole_mask):
        with pair.remote.inference_session(max_length=64) as session:
            assert torch.equal(pair.remote.generate(ids, attention_mask=mask, **options), first)
            answer = pair.remote.generate(more, attention_mask=given, **options)
            assert torch.equal(answer, second[:, first.shape[1] :])
            assert session.position == second.shape[1] - 1


def test_a_session_goes_on_after_beams(pair: Any) -> None:
    ids, more = pair.ids(2, 5), pair.ids(2, 3, seed=4)
    first = pair.local.generate(ids, max_new_tokens=6, num_beams=4, **GREEDY)
    second = pair.local.generate(torch.cat([first, more], dim=1), max_new_tokens=5, **GREEDY)
    third = pair.local.generate(second, max_new_tokens=4, num_beams=3, **GREEDY)
    with pair.remote.inference_session(max_length=64):
        answers = [
            pair.remote.generate(ids, max_new_tokens=6, num_beams=4, **GREEDY),
            pair.remote.generate(more, max_new_tokens=5, **GREEDY),
            pair.remote.generate(None, max_new_tokens=4, num_beams=3, **GREEDY),
        ]
    assert torch.equal(torch.cat(answers, dim=1), third)


def test_position_set_back(pair: Any) -> None:
    ids = pair.ids(1, 8)
    with pair.remote.inference_session(max_length=40) as session:
        first = pair.remote.generate(ids, max_new_tokens=6, **GREEDY)
        session.position = 8
        assert torch.equal(pair.remote.generate(None, max_new_tokens=6, **GREEDY), first[:, 8:])
        session.position = 3
        expected = pair.local.generate(torch.cat([ids[:, :3], ids[:, 5:]], dim=1), max_new_tokens=6, **GREEDY)
        assert torch.equal(pair.remote.generate(ids[:, 5:], max_new_tokens=6, **GREEDY), expected[:, 3:])
        session.position = 0
        assert torch.equal(pair.remote.generate(ids, max_new_tokens=6, **GREEDY), first)
        for wrong in (-1, session.position + 1):
            with pytest.raises(ValueError, match="position"):
                session.position = wrong


def test_too_long_is_refused_before_anything_is_sent(pair: Any) -> None:
    with pair.remote.inference_session(max_length=10) as session:
        with pytest.raises(ValueError, match=r"(?=.*\b12\b)(?=.*\b10\b)"):
            pair.remote.generate(pair.ids(1, 8), max_new_tokens=5, session=session)
        assert session.position == 0
        pair.remote.generate(pair.ids(1, 8), max_new_tokens=3, session=session)
        assert session.position == 10
        with pytest.raises(ValueError, match=r"(?=.*\b11\b)(?=.*\b10\b)"):
            pair.remote.generate(None, max_new_tokens=1, session=session)


def test_wrong_arguments(pair: Any) -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        pair.remote.generate(pair.ids(1, 3), max_new_tokens=2, output_attentions=True)
    with pytest.raises(ValueError, match="not used by the model"):
        pair.remote.generate(pair.ids(1, 3), max_new_tokens=2, atention_mask=None, top_q=3)
    with pytest.raises(ValueError, match="vocabulary"):
        pair.remote.generate(torch.tensor([[5, 99999]]), max_new_tokens=2)
    with pair.remote.inference_session(max_length=32) as session:
        pair.remote.generate(pair.ids(1, 3), max_new_tokens=2)
        with pytest.raises(ValueError, match="rows"):
            pair.remote.generate(pair.ids(2, 3), max_new_tokens=2)
        assert pair.remote.generate(None, max_new_tokens=1, session=session).shape == (1, 1)  # the session is none the worse
    with pytest.raises(RuntimeError, match="closed"):
        pair.remote.generate(None, max_new_tokens=1, session=session)


def test_use_cache_false_gives_the_same(pair: Any) -> None:
    same(pair, pair.ids(1, 4), max_new_tokens=4, use_cache=False, **GREEDY)
