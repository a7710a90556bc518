"""Where the frequencies of a model's rotary embeddings change with the length of the sequence.

Most families turn queries and keys by angles that follow from a token's position alone. Two scalings look at the longest position of the
whole call: longrope has one set of frequencies up to the length that the model was first trained on and another beyond it, dynamic
scaling has other frequencies for each length beyond that.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import nn


class Frequencies(NamedTuple):
    """Which lengths have frequencies of their own; none in most families.

    Attributes:
        growing: the rotary embeddings that look at the longest position.
        switches: lengths beyond which all sequences have other frequencies than up to there, ascending.
        unlike: the length beyond which each length has its own; None where there is none.
    """

    growing: tuple[nn.Module, ...] = ()
    switches: tuple[int, ...] = ()
    unlike: int | None = None

    @classmethod
    def of(cls, owner: nn.Module) -> Frequencies:
        """Those of the rotary embeddings in a module."""
        growing: list[nn.Module] = []
        switches: set[int] = set()
        limits: list[int] = []
        module: Any
        for module in owner.modules():
            kinds = getattr(module, "rope_type", None)
            for layer_type, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
                if kind == "longrope":
                    parameters = module.config.rope_parameters
                    parameters = parameters if layer_type is None else parameters[layer_type]
                    switches.add(int(parameters["original_max_position_embeddings"]))
                elif kind is not None and "dynamic" in str(kind):
                    limits.append(int(module.original_max_seq_len))
                else:
                    continue
                if module not in growing:
                    growing.append(module)
        return cls(tuple(growing), tuple(sorted(switches)), min(limits, default=None))

    @property
    def alike(self) -> int | None:
        """The length up to which all sequences have the same frequencies; None where all have."""
        return min([*self.switches, *([] if self.unlike is None else [self.unlike])], default=None)

    def regime(self, length: int) -> Hashable:
        """Equal for two lengths whose sequences have the same frequencies."""
        if self.unlike is not None and length > self.unlike:
            return length
        return tuple(length > switch for switch in self.switches)

    def room(self, length: int) -> int | None:
        """How many tokens more a sequence of so many may have without getting other frequencies; None for any number."""
        if self.unlike is not None and length > self.unlike:
            return 0
        ahead = [switch for switch in (*self.switches, self.unlike) if switch is not None and switch >= length]
        return min(ahead) - length if ahead else None
