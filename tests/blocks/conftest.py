"""Tiny models with random weights that differ enough from layer to layer to notice a mix-up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from tests.blocks.spans import spread_over

LAYERS = 4
_BASE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
}
SIZES = {
    "bloom": {"vocab_size": 99, "hidden_size": 32, "n_head": 4, "n_layer": LAYERS},
    "llama": _BASE,
    "mistral": {**_BASE, "sliding_window": 5},
    "qwen2": _BASE,
    "gemma2": {**_BASE, "head_dim": 8, "sliding_window": 5},
    "mixtral": {**_BASE, "num_local_experts": 4},
    "falcon": {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS},
    "mpt": {"vocab_size": 99, "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64},
    "llama4_text": {
        **_BASE,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 5,
        "no_rope_layer_interval": 2,
        "floor_scale": 4,
        "pad_token_id": 0,
    },
    "deepseek_v3": {
        **_BASE,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "granite": {**_BASE, "embedding_multiplier": 3.0},
    "gpt_oss": {**_BASE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "phi3": {**_BASE, "pad_token_id": 0},
    "gptj": {"vocab_size": 99, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 40, "rotary_dim": 4},
    "xglm": {
        "vocab_size": 99,
        "d_model": 32,
        "ffn_dim": 64,
        "attention_heads": 4,
        "num_layers": LAYERS,
        "max_position_embeddings": 40,
    },
    "gpt2": {"vocab_size": 99, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 40},
    "opt": {
        "vocab_size": 99,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 40,
    },
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a family's name, and fields of its configuration to change, to a folder with a model of it."""
    folders: dict[str, Path] = {}

    def folder(family: str, **changes: object) -> Path:
        key = f"{family}{sorted(changes.items())}"
        if key not in folders:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **SIZES[family] | changes)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
            folders[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(folders[key])
        return folders[key]

    return folder


@pytest.fixture(autouse=True)
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Over how many devices spans are loaded; modules with the mark `spans.DEVICES` run with more than one as well."""
    count: int = getattr(request, "param", 1)
    if count > 1:
        spread_over(count, monkeypatch)
    return count


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What petalnet remembers between runs goes to a folder of the test."""
    monkeypatch.setenv("PETALNET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
