"""Models with only some of their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from petalnet.errors import ModelError
from petalnet.models.anatomy import find_layers
from petalnet.models.checkpoint import ModelSource
from petalnet.models.loading import build, pick_dtype

Saved = Callable[[str], Path]
IDS = torch.tensor([[5, 17, 80, 3], [9, 9, 41, 60]])


@pytest.mark.parametrize("family", ["bloom", "llama", "mixtral", "opt"])
def test_a_model_with_all_tensors_equals_the_librarys(family: str, saved: Saved) -> None:
    source = ModelSource.open(saved(family))
    built = build(AutoModelForCausalLM, source, names=source.tensor_names())
    assert not built.missing
    expected = AutoModelForCausalLM.from_pretrained(saved(family))
    with torch.no_grad():
        assert torch.equal(built.model(IDS).logits, expected(IDS).logits)
    assert not any(parameter.requires_grad for parameter in built.model.parameters())


@pytest.mark.parametrize("family", ["bloom", "llama", "mixtral", "opt"])
def test_the_clients_part_alone(family: str, saved: Saved) -> None:
    source = ModelSource.open(saved(family))
    built = build(AutoModelForCausalLM, source, prepare=lambda model: find_layers(model).replace(torch.nn.ModuleList()))
    expected = AutoModelForCausalLM.from_pretrained(saved(family)).state_dict()
    state = built.model.state_dict()
    path = find_layers(AutoModelForCausalLM.from_pretrained(saved(family))).path
    assert set(state) == {name for name in expected if not name.startswith(path)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert not built.missing


def test_one_block_and_zeros_without_memory(saved: Saved) -> None:
    source = ModelSource.open(saved("llama"))
    built = build(AutoModel, source, names=lambda parts: parts.blocks[2], others="zeros")
    expected = load_file(saved("llama") / "model.safetensors")
    assert built.loaded == {name.removeprefix("model.") for name in expected if ".layers.2." in name}
    for name, parameter in built.model.named_parameters():
        if name in built.loaded:
            assert torch.equal(parameter, expected["model." + name])
        else:
            assert parameter.untyped_storage().nbytes() == parameter.itemsize
    rotary = AutoModel.from_pretrained(saved("llama")).rotary_emb.inv_freq
    assert torch.equal(built.model.rotary_emb.inv_freq, rotary)


def test_others_may_stay_on_meta(saved: Saved) -> None:
    built = build(AutoModel, ModelSource.open(saved("bloom")), others="meta")
    assert all(parameter.is_meta == (name not in built.loaded) for name, parameter in built.model.named_parameters())
    assert not built.model.word_embeddings.weight.is_meta


def test_a_new_head_is_initialised_and_trainable(saved: Saved) -> None:
    source = ModelSource.open(saved("llama"))
    prepare = lambda model: find_layers(model).replace(torch.nn.ModuleList())  # noqa: E731
    built = build(AutoModelForSequenceClassification, source, prepare=prepare)
    assert built.missing == {"score.weight"}
    head = built.model.score.weight
    assert head.requires_grad
    assert 0 < head.std() < 0.1
    assert not built.model.model.embed_tokens.weight.requires_grad


def test_a_tied_head_is_the_embedding(saved: Saved) -> None:
    built = build(AutoModelForCausalLM, ModelSource.open(saved("bloom")), others="zeros")
    assert built.model.lm_head.weight is built.model.transformer.word_embeddings.weight
    names = lambda parts: parts.blocks[0]  # noqa: E731
    without = build(AutoModelForCausalLM, ModelSource.open(saved("bloom")), names=names, others="zeros")
    assert without.model.lm_head.weight is without.model.transformer.word_embeddings.weight


def test_dtype(saved: Saved) -> None:
    source = ModelSource.open(saved("llama"))
    built = build(AutoModelForCausalLM, source, names=source.tensor_names(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in built.model.parameters()} == {torch.bfloat16}
    assert built.model.config.dtype == torch.bfloat16
    assert built.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert source.config.dtype == torch.float32, "the source's own configuration must not change"


def test_pick_dtype(saved: Saved) -> None:
    source = ModelSource.open(saved("llama"))
    assert pick_dtype("auto", source) == torch.float32
    assert pick_dtype("bfloat16", source) == torch.bfloat16
    assert pick_dtype(torch.float16, source) == torch.float16
    source.config.dtype = torch.float16
    assert pick_dtype("auto", source, "cpu") == torch.float32
    assert pick_dtype("auto", source, "cuda") == torch.float16
    source.config.dtype = None
    assert pick_dtype(None, source, "cuda") == torch.float32
    with pytest.raises(ModelError, match="unknown dtype 'int3'"):
        pick_dtype("int3", source)


def test_a_tensor_of_another_shape_is_named(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    (tmp_path / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.norm.weight has the shape \(31,\) where the configuration says \(32,\)"):
        build(AutoModelForCausalLM, ModelSource.open(tmp_path))
