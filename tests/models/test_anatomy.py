"""Finding the list of layers, and sorting a checkpoint's tensors by layer."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from petalnet.errors import ModelError
from petalnet.models.anatomy import find_layers, partition


def empty(auto_class: type, family: str, **sizes: int) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return auto_class.from_config(transformers.AutoConfig.for_model(family, vocab_size=99, **sizes))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("auto_class", "family", "path"),
    [
        (AutoModelForCausalLM, "bloom", "transformer.h"),
        (AutoModel, "bloom", "h"),
        (AutoModelForCausalLM, "llama", "model.layers"),
        (AutoModelForSequenceClassification, "llama", "model.layers"),
        (AutoModel, "opt", "decoder.layers"),
        (AutoModelForCausalLM, "opt", "model.decoder.layers"),
        (AutoModelForCausalLM, "mpt", "transformer.blocks"),
        (AutoModelForCausalLM, "gpt_neox", "gpt_neox.layers"),
    ],
)
def test_the_list_of_layers_is_found(auto_class: type, family: str, path: str) -> None:
    model = empty(auto_class, family, num_hidden_layers=3, hidden_size=64, num_attention_heads=4)
    layers = find_layers(model)
    assert layers.path == path
    assert layers.layers is model.get_submodule(path)
    assert getattr(layers.owner, layers.name) is layers.layers
    layers.replace(torch.nn.ModuleList())
    assert len(model.get_submodule(path)) == 0  # type: ignore[arg-type]


def test_a_list_inside_a_layer_is_not_taken_for_the_layers() -> None:
    """A mixture with as many experts as there are layers."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(
                "olmoe", vocab_size=99, hidden_size=32, num_attention_heads=4, num_hidden_layers=4, num_experts=4, pad_token_id=0
            )
        )
    assert find_layers(model).path == "model.layers"


def test_a_model_without_such_a_list() -> None:
    model = empty(AutoModel, "bloom", n_layer=3, hidden_size=64, n_head=4)
    find_layers(model).replace(torch.nn.ModuleList())
    with pytest.raises(ModelError, match="a bloom model cannot be split into blocks: it has no list of 3 layers"):
        find_layers(model)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_are_sorted_with_and_without_prefix(auto_class: type, prefix: str) -> None:
    model = empty(auto_class, "bloom", n_layer=12, hidden_size=64, n_head=4)
    client = [f"{prefix}word_embeddings.weight", f"{prefix}ln_f.weight", "lm_head.weight"]
    blocks = [[f"{prefix}h.{i}.input_layernorm.weight", f"{prefix}h.{i}.mlp.dense_h_to_4h.bias"] for i in range(12)]
    parts = partition(model, [*client, *(name for block in blocks for name in block)])
    assert sorted(parts.client) == sorted(client)
    assert [sorted(block) for block in parts.blocks] == blocks
    assert parts.prefixes == tuple(f"{prefix}h.{i}." for i in range(12))


def test_layers_beyond_the_models_belong_to_nobody() -> None:
    """As checkpoints have them that were trained to guess several tokens ahead."""
    model = empty(AutoModel, "llama", num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
    parts = partition(model, ["model.norm.weight", *(f"model.layers.{i}.input_layernorm.weight" for i in range(3))])
    assert parts.client == ("model.norm.weight",)
    assert [len(block) for block in parts.blocks] == [1, 1]


def test_experts_that_are_stored_one_by_one_belong_to_their_layer() -> None:
    model = empty(AutoModel, "mixtral", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_local_experts=4)
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w{w}.weight" for i in range(2) for e in range(4) for w in (1, 2, 3)]
    parts = partition(model, names)
    assert parts.client == ()
    assert [len(block) for block in parts.blocks] == [12, 12]
    assert parts.prefixes == ("model.layers.0.", "model.layers.1.")
