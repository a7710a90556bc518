"""LoRA adapters as PEFT makes and saves them, with weights that make a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = {
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
"""For each family layers of different shapes."""


def save_adapter(model: Path, folder: Path, family: str, *, seed: int = 0, std: float = 0.1, **settings: Any) -> Path:
    """Save a random adapter for a model, with PEFT.

    Args:
        model: the model's folder.
        folder: where the adapter goes.
        family: decides which layers it is for.
        settings: fields of `LoraConfig`.
    """
    usual = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LoraConfig(**usual | settings))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=std, generator=generator)
    wrapped.save_pretrained(folder)
    return folder


def load_with_peft(model: Path, adapter: Path, *, is_trainable: bool = False) -> PeftModel:
    """The library's model in float32 with an adapter, in evaluation mode."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=is_trainable).eval()
