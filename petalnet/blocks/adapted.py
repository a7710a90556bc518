"""Families whose attention modules compute by themselves instead of asking for an attention function.

Each has a module of its own here that gives its attention modules another `forward`, which hands queries, keys and values to our attention
over pages in packed passes. They keep their weights, and their own `forward` for all other passes. Whether what comes out is right is
held against the library's by the probe, as for every family.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from petalnet.blocks.attention import STATE

MODULES = {"bloom": "bloom", "deepseek_v3": "deepseek", "falcon": "falcon", "llama4_text": "llama4", "mpt": "mpt"}
"""Which module of this package knows a family, by its `model_type`."""


def adapt(model_type: str, blocks: Sequence[nn.Module]) -> dict[str, Any]:
    """Make the attention modules of some blocks attend over pages in packed passes, where the family needs that.

    Returns:
        what the family's backbone has to be given in packed passes beside what all get.
    """
    if model_type not in MODULES:
        return {}
    family: Any = importlib.import_module(f"petalnet.blocks.{MODULES[model_type]}")
    arguments: dict[str, Any] | None = family.adapt(blocks)
    return arguments or {}


def is_packed(module: nn.Module) -> bool:
    """Whether a packed pass is under way through an attention module."""
    state = module.__dict__.get(STATE)
    return state is not None and state.batch is not None
