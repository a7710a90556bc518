"""Rotary embeddings whose frequencies depend on how long the sequence is (see `models.frequencies`).

Sessions may share a pass only where they get the same frequencies, and a prompt that is run in chunks has to get those of the whole prompt
from its first chunk on.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from petalnet.models.frequencies import Frequencies


class RotaryRegimes:
    """The rotary embeddings of a backbone that look at the longest position; none in most families, and then nothing is done."""

    def __init__(self, owner: nn.Module) -> None:
        """Find them, and make them follow `begin` from now on."""
        self._frequencies = Frequencies.of(owner)
        self._longest: int | None = None
        for module in self._frequencies.growing:
            module.register_forward_pre_hook(self._reach, with_kwargs=True)
            module.register_forward_hook(self._cut)

    def key(self, position_end: int, session: Hashable) -> Hashable:
        """Equal for two steps that get the same frequencies.

        Args:
            position_end: one past the last position that the whole of the step reaches.
            session: whose step it is.
        """
        frequencies = self._frequencies
        if not frequencies.growing:
            return None
        if frequencies.unlike is not None and position_end > frequencies.unlike:
            return session
        return tuple(position_end > switch for switch in frequencies.switches)

    def alike(self, positions: int) -> bool:
        """Whether all sequences of at most so many positions get the same frequencies."""
        alike = self._frequencies.alike
        return alike is None or positions <= alike

    def begin(self, position_end: int | None) -> None:
        """Before a pass: choose the frequencies for sequences of so many positions; None for those of the pass's own positions."""
        self._longest = None if position_end is None else position_end - 1
        for module in self._frequencies.growing:
            # Dynamic frequencies are chosen for this pass, not for the longest that was seen so far.
            for name in [name for name in module.__dict__ if name.endswith("max_seq_len_cached")]:
                module.__dict__[name] = 0

    def _reach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Show the module one more position, the longest; `_cut` takes away what comes of it."""
        if self._longest is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._with_longest(kwargs["position_ids"])}
        return (args[0], self._with_longest(args[1]), *args[2:]), kwargs

    def _with_longest(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([position_ids, position_ids.new_full((position_ids.shape[0], 1), self._longest or 0)], dim=1)

    def _cut(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._longest is None:
            return output
        return tuple(part[:, :-1] for part in output) if isinstance(output, tuple) else output[:, :-1]
