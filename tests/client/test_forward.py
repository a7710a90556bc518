"""`forward` of a distributed model: logits, hidden states, masks, caches by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from petalnet.client.cache import SessionCache


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits(pair: Any, side: str) -> None:
    ids, mask = pair.padded(side)
    with torch.inference_mode():
        expected, answer = (model(ids, attention_mask=mask).logits for model in (pair.local, pair.remote))
    assert (answer - expected)[mask.bool()].abs().max() < 1e-4


def test_positions_of_ones_own(pair: Any) -> None:
    if pair.family == "bloom":
        pytest.skip("BLOOM has no position ids")
    ids, mask = pair.padded("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in (positions, torch.arange(9)[None] * 2):
        with torch.inference_mode():
            expected, answer = (model(ids, attention_mask=mask, position_ids=given).logits for model in (pair.local, pair.remote))
        assert (answer - expected)[mask.bool()].abs().max() < 1e-4


def test_hidden_states(pair: Any) -> None:
    ids = pair.ids(2, 6)
    for wanted in (True, [0, 2, -1], 1):
        with torch.inference_mode():
            answer = pair.remote(ids, output_hidden_states=wanted).hidden_states
            expected = pair.local(ids, output_hidden_states=True).hidden_states
        count = pair.local.config.num_hidden_layers + 1
        chosen = range(count) if wanted is True else {index % count for index in ([wanted] if isinstance(wanted, int) else wanted)}
        assert len(answer) == count
        for index, (ours, theirs) in enumerate(zip(answer, expected, strict=True)):
            assert torch.allclose(ours, theirs, atol=1e-4) if index in chosen else ours is None
    assert pair.remote(ids).hidden_states is None


def test_loss_tuple_and_backbone(pair: Any) -> None:
    ids = pair.ids(2, 6)
    with torch.inference_mode():
        expected, answer = (model(ids, labels=ids) for model in (pair.local, pair.remote))
        assert torch.allclose(answer.loss, expected.loss, atol=1e-5)
        assert torch.allclose(pair.remote(ids, return_dict=False)[0], expected.logits, atol=1e-4)
        assert torch.allclose(pair.remote.base_model(ids)[0], pair.local.base_model(ids)[0], atol=1e-4)
        embeddings = pair.local.get_input_embeddings()(ids)
        assert torch.allclose(pair.remote(inputs_embeds=embeddings).logits, expected.logits, atol=1e-4)


def test_a_loop_by_hand(pair: Any) -> None:
    """past_key_values of one call, handed to the next, as in `transformers`' own examples."""
    ids = pair.ids(2, 8)
    with torch.inference_mode():
        expected = pair.local(ids).logits
        out = pair.remote(ids[:, :3], use_cache=True)
        assert isinstance(out.past_key_values, SessionCache)
        pieces = [out.logits]
        for start, end in ((3, 4), (4, 7), (7, 8)):
            out = pair.remote(ids[:, start:end], past_key_values=out.past_key_values)
            pieces.append(out.logits)
        assert out.past_key_values.get_seq_length() == 8
    assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-4)
    assert pair.remote(ids).past_key_values is None


def test_the_session_of_a_forgotten_cache_is_closed(pair: Any) -> None:
    out = pair.remote(pair.ids(1, 3), use_cache=True)
    assert pair.servers.open_sessions() >= 3
    del out
    pair.servers.wait_until(lambda: pair.servers.open_sessions() == 0)


def test_forward_in_a_session(pair: Any) -> None:
    ids, mask = pair.padded("left")
    more = pair.ids(3, 4, seed=2)
    both, both_mask = torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)
    with torch.inference_mode():
        # BLOOM's positions follow from the mask; Llama's are given here, since without them the library counts padding as well.
        positions = {} if pair.family == "bloom" else {"position_ids": torch.arange(13)[None]}
        later_positions = {name: ids[:, 9:] for name, ids in positions.items()}
        expected = pair.local(both, attention_mask=both_mask, **positions).logits[:, -4:]
        for later_mask in (both_mask, torch.ones_like(more), None):
            with pair.remote.inference_session(max_length=20) as session:
                pair.remote(ids, attention_mask=mask)
                answer = pair.remote(more, attention_mask=later_mask, **later_positions).logits
                assert session.position == 13
            assert torch.allclose(answer, expected, atol=1e-4)


def test_what_is_refused(pair: Any) -> None:
    ids = pair.ids(1, 4)
    with pytest.raises(ValueError, match="output_attentions"):
        pair.remote(ids, output_attentions=True)
    with pytest.raises(ValueError, match="past_key_values"):
        pair.remote(ids, past_key_values=DynamicCache())
    for wrong in (torch.tensor([[1, 256]]), torch.tensor([[-1, 5]])):
        with pytest.raises(ValueError, match="vocabulary"):
            pair.remote(wrong)
    with pytest.raises(ValueError, match="attention_mask"):
        pair.remote(ids, attention_mask=torch.ones(1, 7))
    with pytest.raises(ValueError, match="attention_mask"):
        pair.remote(ids, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="shape"):
        pair.remote(inputs_embeds=torch.zeros(1, 4, 7))


def test_only_the_local_part_is_loaded(pair: Any) -> None:
    names = [name for name, _ in pair.remote.named_parameters()]
    assert names and not any(".h." in name or ".layers." in name for name in names)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in pair.remote.parameters())
    assert pair.remote.config.num_hidden_layers == pair.local.config.num_hidden_layers
    assert isinstance(pair.remote, type(pair.local))
    assert isinstance(pair.remote.base_model, type(pair.local.base_model))
