"""From names to classes: Auto classes, named classes, configurations, and what `from_pretrained` takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BloomConfig, BloomForCausalLM, BloomModel

import petalnet
from petalnet import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    DistributedBloomConfig,
    DistributedBloomForCausalLM,
    DistributedBloomModel,
    DistributedLlamaForCausalLM,
)
from petalnet.client.auto import distributed_config_class
from petalnet.client.settings import SETTING_NAMES, ClientSettings
from petalnet.errors import ModelError, UsageError
from petalnet.routing.precision import Precisions

HEAVY = ("torch", "transformers", "libp2p", "trio")


def test_the_package_alone_is_light() -> None:
    code = f"import petalnet, sys; print([name for name in {HEAVY} if name in sys.modules], 'DistributedLlamaModel' in dir(petalnet))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[] True"
    with pytest.raises(AttributeError):
        petalnet.NoSuchThing  # noqa: B018


def test_all_public_names_are_there() -> None:
    for name in petalnet.__all__:
        assert getattr(petalnet, name).__name__ == name


def test_classes(pair: Any) -> None:
    if pair.family == "bloom":
        assert type(pair.remote) is DistributedBloomForCausalLM
        assert isinstance(pair.remote, BloomForCausalLM)
        assert isinstance(pair.remote.transformer, DistributedBloomModel) and isinstance(pair.remote.transformer, BloomModel)
        assert isinstance(pair.remote.config, DistributedBloomConfig) and isinstance(pair.remote.config, BloomConfig)
    else:
        assert type(pair.remote) is DistributedLlamaForCausalLM
    assert pair.remote.config.initial_peers == sorted(pair.servers.peers) or pair.remote.config.initial_peers == pair.servers.peers
    assert "initial_peers" not in pair.remote.config.to_dict()
    assert pair.remote.generation_config.eos_token_id is None  # as saved beside the model


def test_by_the_named_class_and_with_petals_arguments(pair: Any) -> None:
    named = DistributedBloomForCausalLM if pair.family == "bloom" else DistributedLlamaForCausalLM
    other = DistributedLlamaForCausalLM if pair.family == "bloom" else DistributedBloomForCausalLM
    with named.from_pretrained(pair.path, initial_peers=pair.servers.peers, torch_dtype="float32", low_cpu_mem_usage=True) as model:
        assert model.dtype == torch.float32
        assert torch.equal(model.generate(pair.ids(1, 3), max_new_tokens=3), pair.local.generate(pair.ids(1, 3), max_new_tokens=3))
    with pytest.raises(ModelError, match="is not for"):
        other.from_pretrained(pair.path, initial_peers=pair.servers.peers)


def test_without_a_head(pair: Any) -> None:
    ids = pair.ids(2, 5)
    local = AutoModel.from_pretrained(pair.path, dtype=torch.float32).eval()
    options = {"initial_peers": pair.servers.peers, "dtype": torch.float32}
    with AutoDistributedModel.from_pretrained(pair.path, **options) as model, torch.inference_mode():
        assert isinstance(model, type(local))
        assert torch.allclose(model(ids).last_hidden_state, local(ids).last_hidden_state, atol=1e-4)
        assert torch.allclose(model(ids, return_dict=False)[0], local(ids)[0], atol=1e-4)


def test_a_new_classification_head_is_trainable(pair: Any) -> None:
    ids = pair.ids(3, 5)
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        pair.path, initial_peers=pair.servers.peers, dtype=torch.float32, num_labels=3
    )
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["score.weight"]
    local = AutoModelForSequenceClassification.from_pretrained(pair.path, dtype=torch.float32, num_labels=3).eval()
    local.score.load_state_dict(model.score.state_dict())
    labels = torch.tensor([0, 2, 1])
    ours, theirs = model(ids, labels=labels), local(ids, labels=labels)
    assert ours.logits.shape == (3, 3)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-4)
    ours.loss.backward()
    theirs.loss.backward()
    assert torch.allclose(model.score.weight.grad, local.score.weight.grad, atol=1e-4)
    model.close()


def test_settings_as_attributes_of_a_configuration(pair: Any) -> None:
    plain = AutoConfig.from_pretrained(pair.path)
    plain.initial_peers, plain.max_retries = pair.servers.peers, 1
    carrying = AutoDistributedConfig.from_pretrained(pair.path, initial_peers=pair.servers.peers, max_retries=1)
    assert isinstance(carrying, type(plain)) and type(carrying).__name__ == f"Distributed{type(plain).__name__}"
    for config in (plain, carrying):
        with AutoDistributedModelForCausalLM.from_pretrained(pair.path, config=config, dtype=torch.float32) as model:
            assert model.config.max_retries == 1
            assert pair.servers.peers[0] in model.config.initial_peers
            assert model.remote_blocks.target.settings.max_retries == 1
            assert model.generate(pair.ids(1, 3), max_new_tokens=2).shape == (1, 5)
        with AutoDistributedModelForCausalLM.from_pretrained(pair.path, config=config, max_retries=0, dtype=torch.float32) as model:
            assert model.config.max_retries == 0  # an argument wins


def test_a_configuration_made_by_hand_has_all_settings() -> None:
    config = distributed_config_class(BloomConfig)()
    assert all(hasattr(config, name) for name in SETTING_NAMES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"no_such_argument": 1}, TypeError, "no_such_argument"),
        ({"trust_remote_code": True}, ValueError, "trust_remote_code"),
        ({"request_timeout": 0}, ValueError, "request_timeout"),
        ({"max_retries": -1}, ValueError, "max_retries"),
        ({"tuning_mode": "prefix"}, UsageError, 'tuning_mode needs "ptune", "deep_ptune" or None'),
        ({"tuning_mode": "ptune"}, UsageError, "pre_seq_len"),
        ({"tuning_mode": "deep_ptune", "pre_seq_len": 0}, UsageError, "pre_seq_len"),
        ({"tuning_mode": "ptune", "pre_seq_len": -1}, UsageError, "pre_seq_len"),
        ({"tuning_mode": "ptune", "pre_seq_len": 2.5}, UsageError, "pre_seq_len"),
        ({"pre_seq_len": True}, UsageError, "pre_seq_len"),
        ({"dtype": "float17"}, ValueError, "float17"),
        ({"initial_peers": []}, ValueError, "initial_peers"),
        ({"initial_peers": ["rubbish"]}, ValueError, "rubbish"),
    ],
)
def test_what_is_refused(bloom_path: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    peers = ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"]
    with pytest.raises(error, match=message):
        AutoDistributedModelForCausalLM.from_pretrained(bloom_path, **{"initial_peers": peers, **arguments})


def test_no_such_model(tmp_path: Path, connect: Callable[..., Any]) -> None:
    peers = ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"]
    with pytest.raises(ModelError, match=r"no config\.json"):
        connect(tmp_path, peers)
    with pytest.raises(ModelError, match="neither a folder"):
        connect(tmp_path / "nothing", peers)


def test_what_servers_may_compute_in() -> None:
    settings = ClientSettings(server_dtype=torch.bfloat16, quantization=["int8", "none"])
    assert (settings.server_dtype, settings.quantization) == ({"bfloat16"}, {"none", "int8"})
    assert ClientSettings().precisions == Precisions() and ClientSettings(quantization="none").precisions.quantizations == {"none"}
    for wrong in ({"quantization": "int4"}, {"quantization": []}, {"server_dtype": "float8"}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} needs one of"):
            ClientSettings(**wrong)
