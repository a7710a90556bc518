"""The rows of the table of families: a tiny model of each with random weights, as unlike its neighbours as what is published of it.

Sizes are as small as each family allows; what makes it itself (multipliers, windows, kinds of layers, scalings of rotary embeddings) is as
in its checkpoints, or small where it is counted in tokens, so that a few tokens go past it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 96
PADDING = 3
LAYERS = 4
WINDOW = 8
"""Positions of a sliding window or of a chunk: prompts and answers go past it."""
BORDER = 24
"""The length that a rotary embedding was first trained on, beyond which its frequencies are others. Some prompts and answers go past it;
those of the probe do not, which holds batches against single sessions: there the library itself computes them differently."""

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    **_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
_HEADS_OF_8 = {**_SIZES, "head_dim": 8}
_ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_DEEPSEEK = {
    **_SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
_GEMMA3 = {**_HEADS_OF_8, "sliding_window": WINDOW, "layer_types": _ALTERNATING}
_LLAMA4 = {
    **_HEADS_OF_8, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": WINDOW, "no_rope_layer_interval": 2,
    "interleave_moe_layer_step": 2, "floor_scale": WINDOW,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        family: its `model_type`, as in a checkpoint's configuration.
        variant: what is particular about it; "" for what is usual.
        options: fields of the configuration.
        refused: what it is refused by; "" for a family that is served.
    """

    family: str
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}, {self.variant}" if self.variant else self.family

    def config(self) -> Any:
        return transformers.AutoConfig.for_model(self.family, **self.options)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": BORDER}

ROWS = (
    Row("bloom", options={**_COMMON, "hidden_size": 32, "n_head": 4, "n_layer": LAYERS}),
    Row("llama", options=_SIZES),
    Row("llama", "llama3 RoPE", {**_SIZES, **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=BORDER)}),
    Row("llama", "dynamic RoPE", {**_SIZES, "max_position_embeddings": BORDER, **_rope("dynamic", factor=2.0)}),
    Row("llama", "tied embeddings", {**_SIZES, "tie_word_embeddings": True}),
    Row("mistral", options={**_SIZES, "sliding_window": WINDOW}),
    Row("qwen2", options=_SIZES),
    Row("qwen2", "yarn RoPE", {**_SIZES, "max_position_embeddings": 4 * BORDER, **_rope("yarn", factor=4.0,
        original_max_position_embeddings=BORDER)}),
    Row("qwen3", options=_HEADS_OF_8),
    Row("qwen3_moe", options={**_HEADS_OF_8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    Row("mixtral", options={**_SIZES, "num_local_experts": 4}),
    Row("gemma", options={**_HEADS_OF_8, "num_key_value_heads": 1}),
    Row("gemma2", options={**_HEADS_OF_8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    Row("gemma3_text", options=_GEMMA3),
    Row("gemma3", "text part", {
        "text_config": _GEMMA3,
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
        "mm_tokens_per_image": 4, "image_token_id": 5, "boi_token_id": 6, "eoi_token_id": 7, "pad_token_id": PADDING,
        "tie_word_embeddings": False,
    }),
    Row("phi3", options=_SIZES),
    Row("phi3", "longrope", {**_SIZES, "original_max_position_embeddings": BORDER, **_rope("longrope", **_LONGROPE)}),
    Row("falcon", "one key and value", {**_COMMON, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS}),
    Row("falcon", "newer architecture", {**_COMMON, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS,
        "new_decoder_architecture": True, "num_kv_heads": 2}),
    Row("falcon", "ALiBi", {**_COMMON, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": LAYERS,
        "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    Row("mpt", options={**_COMMON, "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 128}),
    Row("gpt2", options={**_COMMON, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 128}),
    Row("gpt_neox", options={**_SIZES, "num_key_value_heads": 4}),
    Row("opt", options={**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    Row("opt", "projected embeddings", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    Row("olmo2", options=_SIZES),
    Row("cohere2", options={**_HEADS_OF_8, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "tie_word_embeddings": True}),
    Row("granite", "multipliers of Granite 3.1 8B", {**_SIZES, "embedding_multiplier": 12.0, "logits_scaling": 16.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.0078125}),
    Row("starcoder2", options={**_SIZES, "sliding_window": WINDOW}),
    Row("glm4", options=_HEADS_OF_8),
    Row("smollm3", options={**_HEADS_OF_8, "no_rope_layer_interval": 2}),
    Row("stablelm", options={**_SIZES, "partial_rotary_factor": 0.5}),
    Row("gpt_oss", options={**_HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    Row("deepseek_v3", options=_DEEPSEEK),
    Row("llama4_text", options=_LLAMA4),
    Row("llama4", "text part", {
        "text_config": _LLAMA4,
        "vision_config": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
            "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7,
    }),
    Row("qwen3_next", options={**_HEADS_OF_8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"] * 2},
        refused="its linear_attention layers keep a state that cannot be split yet"),
)  # fmt: skip


def save(row: Row, folder: Path) -> Path:
    """Write the row's model into a folder, for answers of any length."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(row.config(), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # Initialised weights are so small that layers hardly differ from the identity.
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None  # random weights would end some answers early
    model.save_pretrained(folder)
    return folder


def ids(rows: int, length: int, seed: int) -> torch.Tensor:
    """Random ids [rows, length] that are no special tokens."""
    return torch.randint(8, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 11, 7 and 3 tokens, padded to 11 on one side, and their attention mask."""
    tokens = ids(3, 11, seed=7)
    mask = torch.ones_like(tokens)
    for row, length in enumerate((11, 7, 3)):
        unused = slice(0, 11 - length) if side == "left" else slice(length, 11)
        tokens[row, unused] = PADDING
        mask[row, unused] = 0
    return tokens, mask
