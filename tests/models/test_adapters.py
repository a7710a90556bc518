"""Adapters in PEFT's format: read without PEFT and to the same effect, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from petalnet.errors import ModelError
from petalnet.models.adapters import AdapterSource
from petalnet.models.checkpoint import ModelSource
from tests.peft_adapters import load_with_peft, save_adapter

Saved = Callable[[str], Path]
POSSIBLE = "servers apply plain LoRA for linear layers in the model's blocks"


def open_adapter(folder: Path, model: Path) -> AdapterSource:
    return AdapterSource.open(folder, ModelSource.open(model))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bloom", {}),
        ("llama", {"use_rslora": True, "lora_alpha": 3}),
        ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
        ("llama", {"r": 8, "layers_to_transform": [1, 3]}),
        ("mixtral", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"^model.layers.1.self_attn.o_proj": 1, "self_attn.o_proj": 5}}),
        ("gpt2", {"rank_pattern": {"mlp.c_proj": 3}, "alpha_pattern": {r"h\.\d.attn.c_proj": 2}}),
    ],
)
def test_matrices_have_the_effect_that_they_have_in_peft(family: str, settings: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    folder = save_adapter(saved(family), tmp_path / "adapter", family, **settings)
    source = open_adapter(folder, saved(family))
    blocks = source.load(0, 4)
    modules = dict(load_with_peft(saved(family), folder).get_base_model().named_modules())
    found = set()
    for block, layers in blocks.items():
        for path, (a, b) in layers.items():
            (name,) = [name for name in modules if name.endswith(f".{block}.{path}")]
            expected = modules[name].get_delta_weight("default")
            torch.testing.assert_close(b @ a, expected.T if family == "gpt2" else expected)
            found.add(name)
    assert found == {name for name, module in modules.items() if hasattr(module, "lora_A")}
    assert source.nbytes(0, 4) == sum(matrix.nbytes for layers in blocks.values() for pair in layers.values() for matrix in pair)
    assert source.load(1, 2).keys() == {1}


def test_the_label_tells_adapters_of_one_name_apart(saved: Saved, tmp_path: Path) -> None:
    first = save_adapter(saved("llama"), tmp_path / "a" / "poet", "llama")
    again = save_adapter(saved("llama"), tmp_path / "b" / "poet", "llama")
    other = save_adapter(saved("llama"), tmp_path / "c" / "poet", "llama", seed=1)
    scaled = save_adapter(saved("llama"), tmp_path / "d" / "poet", "llama", lora_alpha=7)
    labels = [open_adapter(folder, saved("llama")).label for folder in (first, again, other, scaled)]
    assert labels[0] == labels[1] and len(set(labels)) == 3
    assert all(label.startswith("poet@") and len(label) == len("poet@") + 16 for label in labels)


def test_names_without_the_base_models_prefix(saved: Saved, tmp_path: Path) -> None:
    """As an adapter has them that was trained on the model without its head."""
    folder = save_adapter(saved("bloom"), tmp_path / "adapter", "bloom")
    expected = open_adapter(folder, saved("bloom")).load(0, 4)
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("model.transformer.h", "model.h"): tensor for name, tensor in load_file(file).items()}, file)
    torch.testing.assert_close(open_adapter(folder, saved("bloom")).load(0, 4), expected)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"bias": "lora_only"}, "has trained biases (bias='lora_only')"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices"),
        ({"target_modules": ["q_proj", "lm_head"]}, "changes lm_head, which is not in a block of llama"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "has the tensor base_model.model.model.embed_tokens.lora_embedding_A"),
    ],
)
def test_what_servers_cannot_apply_is_refused(settings: dict[str, Any], why: str, saved: Saved, tmp_path: Path) -> None:
    folder = save_adapter(saved("llama"), tmp_path / "adapter", "llama", **settings)
    with pytest.raises(ModelError) as refused:
        open_adapter(folder, saved("llama"))
    assert why in str(refused.value).replace(saved("llama").name, "llama")
    assert POSSIBLE in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    ],
)
def test_other_kinds_of_adapters_are_refused(config: Any, saved: Saved, tmp_path: Path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved("llama")), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"adapter adapter is of type {config.peft_type.value}: {POSSIBLE}"):
        open_adapter(tmp_path / "adapter", saved("llama"))


def test_an_adapter_of_another_model_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder = save_adapter(saved("llama"), tmp_path / "adapter", "llama")
    with pytest.raises(ModelError, match=r"changes model\.layers\.0\.mlp\.down_proj, which is not in a block of"):
        open_adapter(folder, saved("bloom"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    save_file({**tensors, name: torch.zeros(4, 48)}, file)
    with pytest.raises(ModelError, match=r"is not for .*q_proj maps 32 numbers to 32 there, its matrices are \[4, 48\] and \[32, 4\]"):
        open_adapter(folder, saved("llama"))
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lacks one of the two matrices for model\.layers\.\d\.self_attn\.q_proj"):
        open_adapter(folder, saved("llama"))
    save_file({name.replace("q_proj", "k_norm"): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(ModelError, match="which is no linear layer of"):
        open_adapter(folder, saved("llama"))


def test_damaged_folders(saved: Saved, tmp_path: Path) -> None:
    folder = save_adapter(saved("llama"), tmp_path / "adapter", "llama")
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            open_adapter(folder, saved("llama")).load(0, 4)

    save_file({name: tensor.fill_(torch.nan) for name, tensor in tensors.items()}, file)
    refused("has numbers that are not finite")
    file.write_bytes(file.read_bytes()[:100])
    refused("adapter_model.safetensors of adapter adapter is not a safetensors file")
    file.unlink()
    refused("adapter adapter has no adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"")
    refused("has only adapter_model.bin, which is a pickle and can run code")
    save_file({}, file)
    refused("has no tensors")
    save_file(tensors, file)
    for broken, match in (
        ({"lora_alpha": "x"}, "lora_alpha or alpha_pattern of adapter adapter makes no sense"),
        ({"alpha_pattern": {"(": 1}}, "lora_alpha or alpha_pattern of adapter adapter makes no sense"),
        ({"init_lora_weights": "pissa_niter_4"}, "was begun with pissa_niter_4, which changes the model's own weights"),
        ({"some_new_way": True}, "uses some_new_way"),
    ):
        config.write_text(json.dumps(settings | broken))
        refused(match)
    config.write_text("[]")
    refused("adapter_config.json of adapter adapter is not a table")
    config.write_text("{")
    refused("adapter_config.json of adapter adapter cannot be read")
    config.unlink()
    refused("adapter has no adapter_config.json: not an adapter in PEFT's format")
    with pytest.raises(ModelError, match="neither a folder nor the id of a hub repository"):
        open_adapter(tmp_path / "nowhere", saved("llama"))
