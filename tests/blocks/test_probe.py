"""Families that can be cut pass, others are refused with a reason."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from petalnet.blocks import probe as probe_module
from petalnet.blocks.probe import ProbeResult, probe, require_splittable
from petalnet.errors import ModelError


@pytest.mark.parametrize(
    "family",
    [
        "bloom",
        "llama",
        "mistral",
        "gemma",
        "gemma2",
        "mixtral",
        "opt",
        "gpt2",
        "gpt_oss",
        "granite",
        "falcon",
        "mpt",
        "llama4_text",
        "deepseek_v3",
    ],
)
def test_families_whose_sessions_share_passes(family: str) -> None:
    """With the sizes that the library gives a family, billions of parameters some of them."""
    assert probe(transformers.AutoConfig.for_model(family)) == ProbeResult(True, packs=True)


def test_a_family_whose_sessions_run_one_after_the_other() -> None:
    """Its layers call an attention function of their own."""
    config = transformers.AutoConfig.for_model("gptj", n_embd=256, n_head=4, rotary_dim=16)
    assert require_splittable(config) == ProbeResult(True, packs=False)


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
    assert "split, it computes a pass without a cache differently" in result.reason


class CountingConfig(transformers.LlamaConfig):
    model_type = "counting"


class CountingModel(transformers.LlamaModel):
    """A family whose layers ask the cache how far a session is, which in a packed pass is several sessions."""

    config_class = CountingConfig

    def __init__(self, config: CountingConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.register_forward_pre_hook(self._note, with_kwargs=True)
            layer.register_forward_hook(self._count)

    @staticmethod
    def _note(layer: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        layer.past = 0 if cache is None else cache.get_seq_length(layer.self_attn.layer_idx)

    @staticmethod
    def _count(layer: Any, args: Any, output: Any) -> Any:
        return output * (1 + 0.01 * torch.arange(layer.past, layer.past + output.shape[1])[:, None])


def test_a_family_that_is_wrong_only_in_shared_passes_runs_one_session_after_the_other() -> None:
    transformers.AutoModel.register(CountingConfig, CountingModel)
    assert probe(CountingConfig()) == ProbeResult(True, packs=False)


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
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    probe(transformers.BloomConfig())
    assert torch.equal(torch.rand(1), expected)
