"""What serving a model takes of this machine, precision by precision: `petalnet plan`. Reads the model's configuration, no weights."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from petalnet.models.checkpoint import ModelSource

DTYPES = (torch.float32, torch.bfloat16)
"""Shown for every model, beside what a node here would choose; float16 takes what bfloat16 takes."""


@dataclass(frozen=True)
class Precision:
    """What a precision costs, and what of it fits.

    Attributes:
        dtype, quantization: as a node's flags take them.
        chosen: it is what a node would take with these settings.
        block_bytes: weights of the largest block.
        model_bytes: of all blocks.
        quantized: the share of the model's weights that is rounded, from 0 to 1.
        kv_bytes: keys and values of one token in a block.
        blocks: how many fit here, at most all; 0 where none does beside the tokens.
        kv_tokens: for how many tokens there is room beside these.
        machines: how many such machines hold every block once; None where no block fits.
    """

    dtype: str
    quantization: str
    chosen: bool
    block_bytes: int
    model_bytes: int
    quantized: float
    kv_bytes: int
    blocks: int
    kv_tokens: int
    machines: int | None


@dataclass(frozen=True)
class Plan:
    """What a model takes of a machine.

    Attributes:
        model: its name.
        num_blocks: of the whole model.
        device: where they would run.
        memory_bytes: what there is for weights and KV tokens.
        kv_tokens: the tokens that were asked for; None where that was left open.
        precisions: from the largest to the smallest.
    """

    model: str
    num_blocks: int
    device: str
    memory_bytes: int
    kv_tokens: int | None
    precisions: tuple[Precision, ...]


def make_plan(
    source: ModelSource, *, dtype: torch.dtype, quantization: str, device: str, max_memory: int | None = None, kv_tokens: int | None = None
) -> Plan:
    """What a model takes of this machine.

    Args:
        dtype, quantization: what a node would take.
        device: one, or several as `--device` names them.
        max_memory: bytes for weights and KV tokens on all of them; None for the usual share of what is free.
        kv_tokens: room that is to be there beside the blocks; None for what is left of the memory.
    """
    from petalnet.blocks.quantization import QUANTIZATIONS
    from petalnet.capacity import FEWEST_KV_TOKENS, block_sizes, room_for, usable_memory
    from petalnet.fitting import MOST_KV_TOKENS

    memory, quantized = usable_memory(device, max_memory), quantized_share(source)
    wanted = FEWEST_KV_TOKENS if kv_tokens is None else kv_tokens
    found = []
    for each in dict.fromkeys((*DTYPES, dtype)):
        for kind in QUANTIZATIONS if each == dtype else ("none",):
            sizes = block_sizes(source, each, kind)
            count = len(sizes)
            room = room_for(source, max(sizes), dtype=each, device=device, max_memory=memory)
            blocks = min(room.blocks(kv_tokens), count)
            tokens = room.tokens(blocks) if blocks else 0
            if tokens < min(wanted, MOST_KV_TOKENS):
                blocks = tokens = 0
            elif blocks:
                tokens = max(tokens, wanted)  # more than a node would take by itself, where they were asked for
            found.append(
                Precision(
                    dtype=str(each).removeprefix("torch."),
                    quantization=kind,
                    chosen=each == dtype and kind == quantization,
                    block_bytes=room.block,
                    model_bytes=sum(sizes),
                    quantized=0.0 if kind == "none" else quantized,
                    kv_bytes=room.kv,
                    blocks=blocks,
                    kv_tokens=tokens,
                    machines=-(-count // blocks) if blocks else None,
                )
            )
    found.sort(key=lambda one: -one.model_bytes)
    return Plan(source.name, count, device, memory, kv_tokens, tuple(found))


def quantized_share(source: ModelSource) -> float:
    """The share of the weights of a model's blocks that quantization rounds, from 0 to 1: not experts that are one parameter, for one."""
    from transformers import AutoModel

    from petalnet.blocks.quantization import is_quantizable
    from petalnet.models.anatomy import find_layers
    from petalnet.models.loading import construct, resolve_class

    config = deepcopy(source.config)
    layers = find_layers(construct(resolve_class(AutoModel, config), config, torch.bfloat16)).layers
    rounded = [module.weight.numel() for layer in layers for path, module in layer.named_modules() if is_quantizable(path, module)]
    return sum(rounded) / max(sum(parameter.numel() for parameter in layers.parameters()), 1)
