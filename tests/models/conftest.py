"""Tiny models with random weights, saved once for all tests of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

LAYERS, VOCABULARY = 4, 99
SIZES = {
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": LAYERS},
    "llama": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False,
    },
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "word_embed_proj_dim": 16,
    },
}
SIZES["mixtral"] = {**SIZES["llama"], "num_local_experts": 4}
SIZES["gpt2"] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 40}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to a folder with a model of it."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **SIZES[family])
            folders[family] = tmp_path_factory.mktemp(family)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What petalnet remembers between runs goes to a folder of the test."""
    monkeypatch.setenv("PETALNET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
