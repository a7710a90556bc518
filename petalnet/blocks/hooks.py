"""Hooks that change what reaches a layer, whether the family passes hidden states by position or by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Hook = Callable[..., Any]


def with_hidden(hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def add_at_start(prompt: torch.Tensor) -> Hook:
    """Add a prompt [rows, n, hidden] to the first n positions of a layer's input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        count = prompt.shape[1]
        return with_hidden(torch.cat([hidden[:, :count] + prompt, hidden[:, count:]], dim=1), args, kwargs)

    return hook


def add_at(columns: torch.Tensor, prompt: torch.Tensor) -> Hook:
    """Add a prompt [n, hidden] to n columns of a packed row that is a layer's input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        return with_hidden(hidden.index_add(1, columns, prompt.unsqueeze(0)), args, kwargs)

    return hook
