"""Families beside BLOOM and Llama: learned positions, layers that return tuples, sliding windows, renamed heads, nested decoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": {},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128, "num_key_value_heads": None},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_and_hidden_states(
    family: str, tmp_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], padded: Callable[[str], Any]
) -> None:
    torch.manual_seed(3)
    options = {name: value for name, value in {**SMALL, **FAMILIES[family]}.items() if value is not None}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    made.generation_config.eos_token_id = None
    made.save_pretrained(tmp_path)
    local = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, mask = padded("left")
    with serving(tmp_path, [(0, 2), (2, 6)]) as servers, connect(tmp_path, servers.peers) as remote:
        assert isinstance(remote, type(local)) and type(remote).__name__ == f"Distributed{type(local).__name__}"
        for inputs, given in ((ids, {"attention_mask": mask}), (ids[:1], {})):
            expected = local.generate(inputs, max_new_tokens=12, do_sample=False, pad_token_id=3, **given)
            assert torch.equal(remote.generate(inputs, max_new_tokens=12, do_sample=False, pad_token_id=3, **given), expected)
        with torch.inference_mode():
            theirs, ours = (model(ids, attention_mask=mask, output_hidden_states=True).hidden_states for model in (local, remote))
        assert len(ours) == 7
        for boundary, expected_boundary in zip(ours, theirs, strict=True):
            assert (boundary - expected_boundary)[mask.bool()].abs().max() < 1e-4
