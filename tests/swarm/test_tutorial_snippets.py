"""What people wrote in Petals notebooks runs here after the import line is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import petalnet
from petalnet import (
    AutoDistributedConfig,
    AutoDistributedModelForCausalLM,
    DistributedBloomForCausalLM,
    RemoteSequential,
    get_remote_module,
)
from petalnet.models.checkpoint import DEMO_MODEL

MODEL = str(DEMO_MODEL)


@pytest.fixture(scope="module")
def peers(start_swarm) -> Iterator[list[str]]:
    with start_swarm(Path(MODEL), spans=[(0, 5), (5, 12)], dtype="float32") as peers:
        yield peers


@pytest.fixture(scope="module")
def local() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(peers: list[str]) -> Iterator[torch.nn.Module]:
    model = DistributedBloomForCausalLM.from_pretrained(MODEL, initial_peers=peers, torch_dtype=torch.float32, low_cpu_mem_usage=True)
    yield model
    model.close()


def test_generate_by_class_and_by_auto_class(peers: list[str], model: torch.nn.Module, local: torch.nn.Module) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer("HAMLET:\n", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(local.generate(inputs, max_new_tokens=5)[0])
    assert tokenizer.decode(model.generate(inputs, max_new_tokens=5)[0]) == expected
    auto = AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=peers, dtype=torch.float32)
    assert type(auto) is DistributedBloomForCausalLM
    assert tokenizer.decode(auto.generate(inputs, max_new_tokens=5)[0]) == expected
    auto.close()


def test_chat_loop_in_one_session(model: torch.nn.Module, local: torch.nn.Module) -> None:
    """Token by token in one session, as the chatbot tutorial does."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text, pieces = "ROMEO:\nWhat light is", []
    with model.inference_session(max_length=64) as session:
        prefix = tokenizer(text, return_tensors="pt")["input_ids"]
        length = prefix.shape[1]
        for _ in range(10):
            outputs = model.generate(prefix, max_new_tokens=1, session=session, do_sample=False)
            pieces.append(outputs[:, -1:])
            prefix = None
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(torch.cat(pieces, dim=1), local.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)[:, length:])


def test_single_blocks_by_get_remote_module(peers: list[str], local: torch.nn.Module) -> None:
    config = AutoDistributedConfig.from_pretrained(MODEL)
    third, fourth = get_remote_module(peers, [f"{config.dht_prefix}.3" if hasattr(config, "dht_prefix") else "model.3", "model.4"], config)
    inputs = torch.randn(1, 6, config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = run_local(local, inputs, 3, 5)
        assert torch.allclose(fourth(third(inputs)), expected, atol=1e-4)


def test_a_session_of_ten_steps_on_one_block(model: torch.nn.Module, local: torch.nn.Module) -> None:
    inputs = torch.randn(1, 10, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    block = model.transformer.h[3]
    outputs = []
    with torch.inference_mode(), block.inference_session(max_length=10) as session:
        for i in range(10):
            outputs.append(session.step(inputs[:, i : i + 1, :]))
        assert session.position == 10
        with pytest.raises(ValueError, match=r"(?=.*\b11\b)(?=.*\b10\b)"):
            session.step(inputs[:, :1, :])
    with torch.inference_mode():
        assert torch.allclose(torch.cat(outputs, dim=1), run_local(local, inputs, 3, 4), atol=1e-4)


def test_slices_and_iteration(model: torch.nn.Module, local: torch.nn.Module) -> None:
    blocks = model.transformer.h
    assert isinstance(blocks, RemoteSequential)
    assert len(blocks) == 12 and len(blocks[4:7]) == 3 and len(list(blocks)) == 12
    inputs = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = run_local(local, inputs, 4, 7)
        assert torch.allclose(blocks[4:7](inputs), expected, atol=1e-4)
        one_by_one = inputs
        for block in blocks[4:7]:
            one_by_one = block(one_by_one)
        assert torch.allclose(one_by_one, expected, atol=1e-4)
        assert torch.allclose(blocks[2:9][2:5](inputs), expected, atol=1e-4)


def test_cross_entropy_reaches_the_embeddings(model: torch.nn.Module, local: torch.nn.Module) -> None:
    ids = torch.randint(4, 512, (2, 8), generator=torch.Generator().manual_seed(3))
    gradients = []
    for either in (model, local):
        either.transformer.word_embeddings.weight.requires_grad = True
        either.zero_grad()
        logits = either(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append(either.transformer.word_embeddings.weight.grad.clone())
        either.transformer.word_embeddings.weight.requires_grad = False
    assert gradients[1].abs().max() > 0
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-3 * gradients[1].abs().max()


def test_public_names() -> None:
    parts = ("Config", "Model", "ForCausalLM", "ForSequenceClassification")
    names = [f"Distributed{family}{part}" for family in ("Bloom", "Llama", "Falcon", "Mixtral") for part in parts]
    names += ["AutoDistributedConfig", "AutoDistributedModel", "AutoDistributedModelForCausalLM", "RemoteSequential", "get_remote_module"]
    for name in [*names, "AutoDistributedModelForSequenceClassification"]:
        assert getattr(petalnet, name) is not None, name
        assert name in petalnet.__all__


def run_local(local: torch.nn.Module, inputs: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Blocks [first, end) of the local BLOOM on [rows, length, hidden], called one by one."""
    rows, length, _ = inputs.shape
    alibi = local.transformer.build_alibi_tensor(torch.ones(rows, length, dtype=torch.long), local.config.n_head, inputs.dtype)
    mask = torch.full((length, length), torch.finfo(inputs.dtype).min).triu(1)[None, None]
    hidden = inputs
    for block in local.transformer.h[first:end]:
        hidden = block(hidden, alibi=alibi, attention_mask=mask)[0]
    return hidden
