"""Lists of remote blocks: slices, sessions, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petalnet import AutoDistributedConfig, RemoteSequential, get_remote_module


def hidden_states(rows: int, length: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(rows, length, size, generator=torch.Generator().manual_seed(seed))


def test_a_list_of_blocks(pair: Any) -> None:
    blocks = pair.blocks
    assert isinstance(blocks, RemoteSequential) and len(blocks) == 6 and len(list(blocks)) == 6
    assert [len(blocks[part]) for part in (slice(1, 4), slice(None), slice(-2, None), 0, -1)] == [3, 6, 2, 1, 1]
    assert (blocks[1:5][1:3].target.first, blocks[1:5][1:3].target.end) == (2, 4)
    assert (blocks[-1].target.first, blocks[-1].target.end) == (5, 6)
    for wrong in (6, -7):
        with pytest.raises(IndexError):
            blocks[wrong]
    for wrong_slice in (slice(3, 3), slice(0, 4, 2)):
        with pytest.raises(ValueError):
            blocks[wrong_slice]


@pytest.mark.parametrize(("first", "end"), [(0, 6), (1, 5), (2, 3), (4, 6)])
def test_calling(pair: Any, first: int, end: int) -> None:
    inputs = hidden_states(2, 5)
    with torch.inference_mode():
        expected = pair.local_blocks(inputs, first, end)
        assert torch.allclose(pair.blocks[first:end](inputs), expected, atol=1e-4)
        singly = inputs
        for block in pair.blocks[first:end]:
            singly = block(singly)
        assert torch.allclose(singly, expected, atol=1e-4)


def test_half_precision_goes_and_comes_as_such(pair: Any) -> None:
    inputs = hidden_states(1, 4)
    with torch.inference_mode():
        expected = pair.blocks(inputs)
        for dtype in (torch.bfloat16, torch.float16):
            answer = pair.blocks(inputs.to(dtype))
            assert answer.dtype == dtype
            assert torch.allclose(answer.float(), expected, atol=0.15, rtol=0.1)


def test_sessions_step_by_step(pair: Any) -> None:
    inputs = hidden_states(2, 10)
    for first, end in ((0, 6), (3, 4)):
        outputs = []
        with torch.inference_mode(), pair.blocks[first:end].inference_session(max_length=10) as session:
            outputs.append(session.step(inputs[:, :4]))
            assert session.step(inputs[:, :0]).shape == (2, 0, 32)
            outputs += [session.step(inputs[:, index : index + 1]) for index in range(4, 10)]
            assert session.position == 10
            with pytest.raises(ValueError, match=r"(?=.*\b11\b)(?=.*\b10\b)"):
                session.step(inputs[:, :1])
            session.position = 6
            again = session.step(inputs[:, 6:8])
            expected = pair.local_blocks(inputs, first, end)
            assert torch.allclose(again, expected[:, 6:8], atol=1e-4)
        assert torch.allclose(torch.cat(outputs, dim=1), expected, atol=1e-4)


def test_blocks_use_the_session_that_is_open_around_them(pair: Any) -> None:
    inputs = hidden_states(1, 6)
    part = pair.blocks[1:5]
    with torch.inference_mode():
        expected = pair.local_blocks(inputs, 1, 5)
        with part.inference_session(max_length=6) as session:
            assert torch.allclose(part(inputs[:, :4]), expected[:, :4], atol=1e-4)
            assert torch.allclose(part(inputs[:, 4:]), expected[:, 4:], atol=1e-4)
            assert session.position == 6
        assert torch.allclose(part(inputs), expected, atol=1e-4)
        assert session.closed


def test_rows_reordered_and_duplicated(pair: Any) -> None:
    inputs, more = hidden_states(2, 4), hidden_states(3, 2, seed=1)
    with torch.inference_mode(), pair.blocks.inference_session(max_length=8) as session:
        session.step(inputs)
        answer = session.step(more, hypo_ids=torch.tensor([1, 0, 1]))
        expected = pair.local_blocks(torch.cat([inputs[[1, 0, 1]], more], dim=1), 0, 6)[:, 4:]
        assert torch.allclose(answer, expected, atol=1e-4)
        for wrong in ([0, 3, 1], [-1, 0, 1]):
            with pytest.raises(ValueError, match="rows"):
                session.step(more, hypo_ids=torch.tensor(wrong))
        with pytest.raises(ValueError, match="rows"):
            session.step(more[:2])


def test_what_is_refused(pair: Any) -> None:
    blocks = pair.blocks
    for wrong in (hidden_states(1, 3, size=31), hidden_states(1, 3)[0], torch.zeros(1, 3, 32, dtype=torch.int64), torch.zeros(0, 3, 32)):
        with pytest.raises(ValueError, match="hidden states"):
            blocks(wrong)
        with blocks.inference_session(max_length=4) as session, pytest.raises(ValueError, match="hidden states"):
            session.step(wrong)
    with pytest.raises(ValueError, match="prompts"):
        blocks(hidden_states(1, 3), torch.zeros(5, 1, 2, 32))
    with blocks.inference_session(max_length=4) as session, pytest.raises(ValueError, match="finite"):
        session.step(hidden_states(1, 3), torch.full((len(blocks), 1, 2, 32), torch.nan))
    for wrong_length in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="max_length"):
            blocks.inference_session(max_length=wrong_length)


def test_gradients(pair: Any) -> None:
    weights = hidden_states(2, 5, seed=3)
    gradients = []
    for run in (lambda hidden: pair.blocks[1:6](hidden), lambda hidden: pair.local_blocks(hidden, 1, 6)):
        inputs = hidden_states(2, 5).requires_grad_()
        (run(inputs) * weights).sum().backward()
        gradients.append(inputs.grad)
    assert gradients[1].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-3 * float(gradients[1].abs().max()))


def test_gradients_of_prompts(pair: Any) -> None:
    inputs, weights = hidden_states(2, 5), hidden_states(2, 5, seed=3)
    prompts = (torch.randn(4, 2, 3, 32, generator=torch.Generator().manual_seed(4)) * 0.3).requires_grad_()
    (pair.blocks[1:5](inputs, prompts) * weights).sum().backward()
    answer, prompts.grad = prompts.grad, None
    hidden = inputs
    for index in range(4):
        hidden = torch.cat([hidden[:, :3] + prompts[index], hidden[:, 3:]], dim=1)
        hidden = pair.local_blocks(hidden, 1 + index, 2 + index)
    (hidden * weights).sum().backward()
    assert torch.allclose(answer, prompts.grad, atol=1e-3 * float(prompts.grad.abs().max()))


def test_gradients_through_the_model_and_its_hidden_states(pair: Any) -> None:
    ids, mask = pair.padded("left")
    for all_hidden in (False, True):
        gradients = []
        for model in (pair.remote, pair.local):
            weight = model.get_input_embeddings().weight
            weight.requires_grad_(True)
            out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_hidden_states=all_hidden)
            loss = out.loss + (sum(boundary[:, -1].square().mean() for boundary in out.hidden_states) if all_hidden else 0)
            loss.backward()
            gradients.append(weight.grad.clone())
            weight.grad = None
            weight.requires_grad_(False)
        assert torch.allclose(*gradients, atol=1e-3 * float(gradients[1].abs().max()))


def test_single_blocks_by_name(pair: Any) -> None:
    config = AutoDistributedConfig.from_pretrained(str(pair.path), initial_peers=pair.servers.peers)
    inputs = hidden_states(1, 4)
    third, first = get_remote_module(pair.servers.peers, ["model.3", f"{config.dht_prefix}.1"], config)
    alone = get_remote_module(pair.remote, "model.3", config)
    with torch.inference_mode():
        assert torch.allclose(third(inputs), pair.local_blocks(inputs, 3, 4), atol=1e-4)
        assert torch.allclose(first(inputs), pair.local_blocks(inputs, 1, 2), atol=1e-4)
        assert torch.allclose(alone(inputs), pair.local_blocks(inputs, 3, 4), atol=1e-4)
    for wrong in ("model", "model.x", "model.6"):
        with pytest.raises(ValueError):
            get_remote_module(pair.remote, wrong, config)


def test_a_route_is_shown(pair: Any) -> None:
    assert [(hop.first, hop.end) for hop in pair.blocks.route()] == [(0, 2), (2, 5), (5, 6)]
    assert [(hop.first, hop.end) for hop in pair.blocks[1:4].route()] == [(1, 2), (2, 4)]
