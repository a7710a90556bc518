"""Small models with random weights, one for each way of attention, and the same model on this machine and over a swarm.

Weights are spread widely, so that the two best next tokens differ by far more than the rounding of sums that are taken in another order,
as in a packed pass: logits are about 1 in size, and the closest pair of a whole answer is some 1e-3 apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import petalnet

VOCABULARY = 512
PADDING = 3
WINDOW = 16
"""Positions that a layer of the sliding-window model attends to: fewer than any answer of the tests is long."""
LONGEST = 2304

# A head that is tied to random embeddings would say each token again and again.
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
_ROTARY = {
    **_COMMON, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
    "max_position_embeddings": LONGEST,
}  # fmt: skip

SPANS = {
    "bloom": [(0, 2), (2, 5)],
    "llama": [(0, 2), (2, 4), (4, 6)],
    "mistral": [(0, 1), (1, 4)],
    "falcon": [(0, 4)],  # with biases that servers cannot make in packed passes: they run it session by session
}
"""How the swarm of all families is cut (the fixture `families`)."""
BLOCKS = {family: spans[-1][1] for family, spans in SPANS.items()}


def make_model(family: str) -> torch.nn.Module:
    """A model of a family (see `BLOCKS`), the same at every call."""
    torch.manual_seed(["bloom", "falcon", "llama", "mistral"].index(family))
    layers = BLOCKS[family]
    if family == "bloom":
        return BloomForCausalLM(BloomConfig(**_COMMON, hidden_size=64, n_head=4, n_layer=layers, initializer_range=0.1))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**_ROTARY, num_hidden_layers=layers))
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**_ROTARY, num_hidden_layers=layers, sliding_window=WINDOW))
    config = FalconConfig(
        **_COMMON, hidden_size=64, num_attention_heads=8, num_hidden_layers=layers, initializer_range=0.15, multi_query=True, alibi=True
    )
    return FalconForCausalLM(config)


def save_model(family: str, folder: Path) -> Path:
    """Write a model of a family into a folder, for answers of any length that hold no special tokens."""
    model = make_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight[:4] = 0.0  # the best logit is above 0, so it is none of theirs
    model.generation_config.eos_token_id = None  # random weights would end some answers early
    model.save_pretrained(folder)
    return folder


def ids(rows: int, length: int, seed: int) -> torch.Tensor:
    """Random ids [rows, length] that are no special tokens."""
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 11, 7 and 3 tokens, padded to 11 on one side, and their attention mask."""
    tokens = ids(3, 11, seed=7)
    mask = torch.ones_like(tokens)
    for row, length in enumerate((11, 7, 3)):
        unused = slice(0, 11 - length) if side == "left" else slice(length, 11)
        tokens[row, unused] = PADDING
        mask[row, unused] = 0
    return tokens, mask


def load_local(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@contextmanager
def connected(path: Path, peers: list[str], **options: object) -> Iterator[torch.nn.Module]:
    """The model over the swarm of these bootstrap peers."""
    with petalnet.AutoDistributedModelForCausalLM.from_pretrained(
        str(path), initial_peers=peers, dtype=torch.float32, **{"show_route": False, **options}
    ) as model:
        yield model


@dataclass
class Pair:
    """The same model twice: on this machine, and over the swarm."""

    family: str
    path: Path
    local: torch.nn.Module
    remote: torch.nn.Module

    def same(self, inputs: torch.Tensor | None, **options: object) -> torch.Tensor:
        """Generate on both sides, sampling from the same seed; what both write."""
        torch.manual_seed(11)
        expected = self.local.generate(inputs, **options)
        torch.manual_seed(11)
        answer = self.remote.generate(inputs, **options)
        assert torch.equal(answer, expected)
        return answer
