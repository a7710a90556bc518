"""What was trained comes back from a folder, onto the model that it was trained with and no other."""

from __future__ import annotations

import copy
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from petalnet import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from petalnet.errors import ModelError, UsageError

FILES = {"model.safetensors", "petalnet.json"}
VOCABULARY = 256  # of the small models
NOBODY = ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"]
TUNED = {"tuning_mode": "deep_ptune", "pre_seq_len": 4}


def change(model: torch.nn.Module) -> None:
    """As training does it."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def trained_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = trained_of(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_prompts_head_and_embeddings(pair: Any, tmp_path: Path) -> None:
    with AutoDistributedModelForSequenceClassification.from_pretrained(
        pair.path, initial_peers=pair.servers.peers, dtype=torch.float32, num_labels=3, **TUNED
    ) as model:
        model.get_input_embeddings().weight.requires_grad = True
        change(model)
        expected = trained_of(model)
        assert len(expected) == 4
        handed = {name: torch.zeros_like(value) if name == "score.weight" else value for name, value in model.state_dict().items()}
        model.save_pretrained(tmp_path / "handed", state_dict=handed, max_shard_size="1GB")  # the whole of a model, as Trainer hands it
        assert load_file(tmp_path / "handed" / "model.safetensors").keys() == expected.keys()
        assert not load_file(tmp_path / "handed" / "model.safetensors")["score.weight"].any()
        model.save_pretrained(tmp_path, state_dict={})
        model.save_pretrained(tmp_path / "nothing", is_main_process=False)
        logits = model(pair.ids(2, 4)).logits
        # As Trainer resumes.
        lacking = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).missing_keys
        assert set(lacking) == set(model._keys_to_ignore_on_save)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "handed"}
    assert not (tmp_path / "nothing").exists()
    with AutoDistributedModelForSequenceClassification.from_pretrained(tmp_path, initial_peers=pair.servers.peers) as again:
        carrying = AutoDistributedConfig.from_pretrained(tmp_path)
        assert (carrying.num_labels, carrying.tuning_mode, carrying.pre_seq_len) == (3, "deep_ptune", 4)
        assert again.config.num_labels == 3 and again.dtype == torch.float32
        assert again.config.tuning_mode == "deep_ptune" and again.prompt_length == 4
        assert_same(again, expected)
        assert torch.equal(again(pair.ids(2, 4)).logits, logits)
        for parameter in again.parameters():
            parameter.requires_grad = False
        again.save_pretrained(tmp_path / "frozen")  # trained is trained
    assert load_file(tmp_path / "frozen" / "model.safetensors").keys() == expected.keys()


def test_another_kind_of_model_takes_what_it_knows(pair: Any, tmp_path: Path, connect: Any) -> None:
    with connect(pair.path, pair.servers.peers, **TUNED) as model:
        change(model)
        model.save_pretrained(tmp_path)
        expected = {name.partition(".")[2]: value for name, value in trained_of(model).items()}
    with AutoDistributedModel.from_pretrained(tmp_path, initial_peers=pair.servers.peers) as backbone:
        assert_same(backbone, expected)
        backbone.save_pretrained(tmp_path / "backbone")
    with AutoDistributedModelForCausalLM.from_pretrained(tmp_path / "backbone", initial_peers=pair.servers.peers) as again:
        assert_same(again, {f"{again.base_model_prefix}.{name}": value for name, value in expected.items()})


def test_a_vocabulary_with_further_tokens(pair: Any, tmp_path: Path, connect: Any) -> None:
    ids = torch.cat([pair.ids(2, 4), torch.full((2, 1), VOCABULARY + 2)], dim=1)
    with connect(pair.path, pair.servers.peers) as model:
        model.resize_token_embeddings(VOCABULARY + 3)
        model.get_input_embeddings().weight.requires_grad = True
        change(model)
        logits = model(ids).logits
        model.save_pretrained(tmp_path)
    with AutoDistributedModelForCausalLM.from_pretrained(tmp_path, initial_peers=pair.servers.peers) as again:
        assert again.config.vocab_size == VOCABULARY + 3 and len(trained_of(again)) == 1
        assert torch.equal(again(ids).logits, logits)  # the head's further rows as well, which were not trained
        again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


def test_adapters_are_peft_s_own(pair: Any, tmp_path: Path, connect: Any) -> None:
    ids = pair.ids(1, 5)
    with connect(pair.path, pair.servers.peers) as model:
        with pytest.raises(UsageError, match="nothing of this model was trained"):
            model.save_pretrained(tmp_path)
        model.add_adapter(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        expected = trained_of(model)
        assert len(expected) == 2
        model.save_pretrained(tmp_path)
        logits = model(ids).logits.detach()
        model.add_adapter(LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False), "other")
        model.save_pretrained(tmp_path / "both")
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "adapter_config.json", "adapter_model.safetensors", "both"}
    local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair.path, dtype=torch.float32), tmp_path)
    assert torch.allclose(local(ids).logits, logits, atol=1e-4)
    with AutoDistributedModelForCausalLM.from_pretrained(tmp_path, initial_peers=pair.servers.peers) as again:
        assert_same(again, expected)
        assert torch.allclose(again(ids).logits, logits, atol=1e-5)
    with AutoDistributedModelForCausalLM.from_pretrained(tmp_path / "both", initial_peers=pair.servers.peers) as again:
        assert again.active_adapters() == ["other"] and set(again.peft_config) == {"default", "other"}
        again.set_adapter("default")
        assert torch.allclose(again(ids).logits, logits, atol=1e-5)
    assert (tmp_path / "both" / "other" / "adapter_model.safetensors").is_file()


def test_what_a_peft_model_saves_is_an_adapter_alone(pair: Any, tmp_path: Path, connect: Any) -> None:
    ids = pair.ids(1, 5)
    with connect(pair.path, pair.servers.peers) as model:
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"an adapter alone.* PeftModel\.from_pretrained\(model, "):
            connect(tmp_path, pair.servers.peers)
        assert torch.allclose(PeftModel.from_pretrained(model, tmp_path)(ids).logits, adapted(ids).logits, atol=1e-5)


def test_a_full_disk_leaves_what_was_there(pair: Any, tmp_path: Path, connect: Any) -> None:
    with connect(pair.path, pair.servers.peers, **TUNED) as model:
        model.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        change(model)
        bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, bounds[1]))
        try:
            with pytest.raises(OSError, match="cannot be written"):
                model.save_pretrained(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="is a file"):
            model.save_pretrained(tmp_path / "file")


@pytest.fixture(scope="module")
def saved(bloom_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with AutoDistributedModelForCausalLM.from_pretrained(bloom_path, initial_peers=NOBODY, dtype=torch.float32, **TUNED) as model:
        model.save_pretrained(folder)
    return folder


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        said = json.loads((folder / "petalnet.json").read_text())
        change(said)
        (folder / "petalnet.json").write_text(json.dumps(said))

    return write


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(lambda said: said["base"].update(key="0" * 64)), "is another one"),
        (edit(lambda said: said["base"].update(name="/no/such/model")), "give base_model="),
        (edit(lambda said: said.update(format=99)), "format 99"),
        (edit(lambda said: said.pop("base")), "damaged"),
        (edit(lambda said: said.update(adapters=["../elsewhere"])), "cannot be saved"),
        (edit(lambda said: said.update(adapters=[5])), "damaged"),
        (edit(lambda said: said.update(adapters=["default"])), "lacks adapter_config"),
        (edit(lambda said: said["configuration"].update(layer_norm_epsilon="much", id2label=5)), "damaged"),
        (edit(lambda said: said.update(dtype="float17")), "float17"),
        (edit(lambda said: said["settings"].update(pre_seq_len=0)), "pre_seq_len"),
        (edit(lambda said: said["settings"].update(pre_seq_len=5)), "shape"),
        (edit(lambda said: said["parameters"].update(score=True)), "lacks score"),
        (lambda folder: (folder / "petalnet.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: save_file({}, folder / "model.safetensors"), "lacks"),
        (cut_weights, "cannot be read"),
    ],
)
def test_damaged_or_of_another_model(saved: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    damage(folder)
    with pytest.raises(UsageError, match=message) as raised:
        AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=NOBODY)
    assert "\n" not in str(raised.value)


def test_the_base_model_was_moved(bloom_path: Path, saved: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(bloom_path, tmp_path / "moved")
    edit(lambda said: said["base"].update(name="/no/such/model"))(folder := shutil.copytree(saved, tmp_path / "copy"))
    with AutoDistributedModelForCausalLM.from_pretrained(folder, base_model=moved, initial_peers=NOBODY) as model:
        assert model.prompt_length == 4
    with pytest.raises(UsageError, match="base_model"):
        AutoDistributedModelForCausalLM.from_pretrained(bloom_path, base_model=moved, initial_peers=NOBODY)
