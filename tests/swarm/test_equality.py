"""What a swarm of three real server processes writes is what the local model writes: greedy, sampled, padded, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import petalnet
from petalnet.models.checkpoint import DEMO_MODEL

NEW_TOKENS = 64


def save_bloom(folder: Path) -> Path:
    torch.manual_seed(1)
    config = BloomConfig(
        vocab_size=512, hidden_size=64, n_head=4, n_layer=7, initializer_range=0.1, pad_token_id=3, bos_token_id=1, eos_token_id=2
    )
    model = BloomForCausalLM(config)
    model.generation_config.eos_token_id = None  # random weights would end some answers early
    model.save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=6,
        initializer_range=0.15, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@dataclass
class Pair:
    """The same model twice: on this machine, and over the swarm."""

    local: torch.nn.Module
    remote: torch.nn.Module
    name: str


@pytest.fixture(scope="module", params=["demo", "bloom", "llama"])
def pair(request: pytest.FixtureRequest, start_swarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    path, blocks = {
        "demo": lambda: (Path(DEMO_MODEL), 12),
        "bloom": lambda: (save_bloom(folder), 7),
        "llama": lambda: (save_llama(folder), 6),
    }[request.param]()
    cuts = [0, blocks // 3, 2 * blocks // 3, blocks]
    with start_swarm(path, spans=list(zip(cuts, cuts[1:], strict=False)), dtype="float32") as peers:
        remote = petalnet.AutoDistributedModelForCausalLM.from_pretrained(str(path), initial_peers=peers, dtype=torch.float32)
        local = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        yield Pair(local, remote, request.param)
        remote.close()


def padded_batch(pair: Pair, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 11, 7 and 3 tokens, padded to 11 on one side."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, 512, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((11, 7, 3)):
        hidden = slice(0, 11 - length) if side == "left" else slice(length, 11)
        ids[row, hidden] = 3
        mask[row, hidden] = 0
    return ids, mask


def test_isinstance_and_shape(pair: Pair) -> None:
    assert isinstance(pair.remote, type(pair.local))
    assert pair.remote.config.num_hidden_layers == pair.local.config.num_hidden_layers
    remote_blocks = pair.remote.model.layers if pair.name == "llama" else pair.remote.transformer.h
    assert len(remote_blocks) == pair.local.config.num_hidden_layers


def test_greedy(pair: Pair) -> None:
    ids = torch.randint(4, 512, (1, 9), generator=torch.Generator().manual_seed(3))
    expected = pair.local.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    answer = pair.remote.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(answer, expected)
    assert answer.shape == (1, 9 + NEW_TOKENS)


def test_greedy_batch_of_unequal_lengths(pair: Pair) -> None:
    ids, mask = padded_batch(pair, "left")
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    assert torch.equal(pair.remote.generate(ids, **options), pair.local.generate(ids, **options))


def test_seeded_sampling(pair: Pair) -> None:
    ids, mask = padded_batch(pair, "left")
    options = {
        "attention_mask": mask, "max_new_tokens": 32,
        "do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2,
    }  # fmt: skip
    torch.manual_seed(11)
    expected = pair.local.generate(ids, **options)
    torch.manual_seed(11)
    assert torch.equal(pair.remote.generate(ids, **options), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(pair: Pair, side: str) -> None:
    ids, mask = padded_batch(pair, side)
    with torch.inference_mode():
        expected = pair.local(ids, attention_mask=mask).logits
        answer = pair.remote(ids, attention_mask=mask).logits
    visible = mask.bool()
    assert (answer[visible] - expected[visible]).abs().max() <= 1e-3


def test_hidden_states_of_all_boundaries(pair: Pair) -> None:
    ids = torch.randint(4, 512, (2, 6), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        expected = pair.local(ids, output_hidden_states=True).hidden_states
        answer = pair.remote(ids, output_hidden_states=True).hidden_states
    assert len(answer) == len(expected) == pair.local.config.num_hidden_layers + 1
    for boundary, (ours, theirs) in enumerate(zip(answer, expected, strict=True)):
        assert (ours - theirs).abs().max() <= 1e-3, f"boundary {boundary}"


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "ambient"])
def test_answer_in_pieces(pair: Pair, explicit: bool) -> None:
    """40 tokens in one call equal the same in calls of 1, n-2 and 1 tokens within one session."""
    ids = torch.randint(4, 512, (1, 8), generator=torch.Generator().manual_seed(5))
    whole = pair.remote.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    pieces = []
    with pair.remote.inference_session(max_length=64) as session:
        inputs: torch.Tensor | None = ids
        for count in (1, 38, 1):
            arguments = {"session": session} if explicit else {}
            piece = pair.remote.generate(inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **arguments)
            pieces.append(piece)
            inputs = None
        assert session.position == 8 + 40 - 1
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(whole, pair.local.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False))


def test_too_long_is_refused_with_both_numbers(pair: Pair) -> None:
    ids = torch.randint(4, 512, (1, 8), generator=torch.Generator().manual_seed(6))
    with pair.remote.inference_session(max_length=10) as session, pytest.raises(ValueError, match=r"(?=.*\b12\b)(?=.*\b10\b)"):
        pair.remote.generate(ids, max_new_tokens=5, session=session)


def test_rollback(pair: Pair) -> None:
    """`position` set back and the same tokens again give the same answer."""
    ids = torch.randint(4, 512, (1, 12), generator=torch.Generator().manual_seed(8))
    with torch.inference_mode(), pair.remote.inference_session(max_length=40) as session:
        first = pair.remote.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, session=session)
        session.position = 0
        again = pair.remote.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, session=session)
    assert torch.equal(first, again)
