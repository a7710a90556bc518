"""What a backbone that is cut to a span has to be told, and what can be read off its modules: configurations, tables of positions."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig


def slice_config(config: PreTrainedConfig, first: int, end: int) -> PreTrainedConfig:
    """The configuration of a model that has only layers [first, end): lists with one entry a layer are cut as well."""
    count = config.num_hidden_layers
    sliced = copy.copy(config)
    sliced.__dict__ = dict(config.__dict__)
    for name, value in config.__dict__.items():
        if isinstance(value, (list, tuple)) and len(value) == count and not name.endswith("_token_id"):
            sliced.__dict__[name] = value[first:end]
        elif name == config.attribute_map.get("num_hidden_layers", "num_hidden_layers"):
            sliced.__dict__[name] = end - first
    return sliced


def quiet(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a configuration with which a backbone computes nothing but hidden states."""
    config = copy.copy(config)
    config.__dict__ = dict(config.__dict__)
    for name in ("output_hidden_states", "output_attentions", "_output_attentions", "output_router_logits"):
        if name in config.__dict__:
            config.__dict__[name] = False
    return config


def configurations_of(blocks: Sequence[nn.Module]) -> list[PreTrainedConfig]:
    """The configurations that modules hold, each once."""
    held = (module.__dict__.get("config") for block in blocks for module in block.modules())
    return list({id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values())


def known_positions(owner: nn.Module, tokens: nn.Module) -> int | None:
    """Entries of the backbone's table of positions, learned or computed, which looking up a later one would overrun: on some devices that
    is the end of the process's use of the device."""
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in owner.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens and not any(part.isdigit() for part in name.split("."))
    ]
    for name, table in owner.named_buffers():
        path, _, own = name.rpartition(".")
        if table.dim() == 2 and table.is_floating_point() and "embed_positions" in (own, path.rpartition(".")[2]):
            tables.append(len(table) - getattr(owner.get_submodule(path), "offset", 0))
    return min(tables, default=None)
