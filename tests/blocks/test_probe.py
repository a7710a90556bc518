"""Families that can be cut pass, others are refused with a reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import transformers

from petalnet.blocks import probe as probe_module
from petalnet.blocks.probe import ProbeResult, probe, require_splittable
from petalnet.errors import ModelError


@pytest.mark.parametrize("family", ["bloom", "llama", "mistral", "gemma2", "mixtral", "falcon", "opt", "gpt2", "deepseek_v3"])
def test_families_that_can_be_split(family: str) -> None:
    """With the sizes that the library gives a family, billions of parameters some of them."""
    assert probe(transformers.AutoConfig.for_model(family)) == ProbeResult(True)


@pytest.mark.parametrize(
    ("family", "reason"), [("mamba", "linear_attention layers keep a state"), ("gemma3n_text", "dummy layers keep a state")]
)
def test_families_that_cannot(family: str, reason: str) -> None:
    config = transformers.AutoConfig.for_model(family)
    with pytest.raises(ModelError, match=reason) as caught:
        require_splittable(config)
    assert "\n" not in str(caught.value)


class PlacedConfig(transformers.LlamaConfig):
    model_type = "placed"


class PlacedModel(transformers.LlamaModel):
    """A family whose layers compute with their own number, which a span does not know."""

    config_class = PlacedConfig

    def __init__(self, config: PlacedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.register_forward_hook(lambda layer, args, output: output * (1 + layer.self_attn.layer_idx))


def test_a_family_that_computes_differently_when_split_is_refused() -> None:
    transformers.AutoModel.register(PlacedConfig, PlacedModel)
    result = probe(PlacedConfig())
    assert not result.ok
    assert "split, it computes a prompt differently" in result.reason


def test_the_outcome_is_remembered(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig()
    first = probe(config)
    monkeypatch.setattr(probe_module, "_probe", lambda config: pytest.fail("probed again"))
    began = time.perf_counter()
    assert probe(config) == first
    assert time.perf_counter() - began < 0.1
    (remembered,) = (cache_folder / "probe").iterdir()
    remembered.write_text('{"ok": 3}')
    monkeypatch.undo()
    monkeypatch.setenv("PETALNET_CACHE_DIR", str(cache_folder))
    assert probe(config) == first


def test_the_random_state_is_left_alone() -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    probe(transformers.BloomConfig())
    assert torch.equal(torch.rand(1), expected)
