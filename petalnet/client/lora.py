"""LoRA parameters (arXiv:2106.09685) of the user's own, in the form in which servers take them. Pure: tensors in, tensors and messages out.

What a tuner holds, one pair of matrices for each module and adapter, becomes one flat tensor: adapters that are active together are joined
by rank, and each one's scaling becomes part of its B, so that a module has one A and one B. All of that is done by operations that torch
differentiates: a gradient of the flat tensor reaches the parameters that it was made of.

Servers know the numbers by a version, which is a hash of them and of where they belong. Equal parameters have equal versions, so what a
server was given once need not go there again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from petalnet.p2p.pass_messages import MAX_MODULES, MAX_RANK, PutLora
from petalnet.p2p.tensors import encode_tensor

VERSION_BYTES = 16
"""Of the hash: two sets of parameters meet by chance once in 2^64."""


class Pair(NamedTuple):
    """What one adapter adds to a module: scaling · B · A · x.

    Attributes:
        a: [r, in], any floating-point dtype and device; likewise
        b: [out, r].
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class Adapted(NamedTuple):
    """A module of a block, and what the active adapters add to it.

    Attributes:
        block: the block's number in the model.
        path: of the module in the block ("self_attention.query_key_value").
    """

    block: int
    path: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class Lora:
    """The LoRA parameters that one pass or session names, for blocks [first, end) of a model.

    Attributes:
        model: the model's key.
        version: a hash of all that servers are given, in hex.
        modules: paths of modules in a block.
        ranks: int32 [blocks, modules], 0 where a block's module gets nothing.
        weights: float32 [numbers], detached and on the CPU: block by block, module by module, A [r, in] and then B [out, r] with scaling
            folded in.
        bounds: [blocks + 1], where each block's numbers begin, and the end.
        dropout: probability with which a number of the modules' input is left out in training; 0 otherwise.
    """

    model: str
    version: str
    modules: tuple[str, ...]
    ranks: npt.NDArray[np.int32] = field(repr=False)
    first: int
    end: int
    weights: torch.Tensor = field(repr=False)
    bounds: tuple[int, ...]
    dropout: float = 0.0

    def numbers(self, first: int, end: int) -> slice:
        """Where the numbers of blocks [first, end) are in `weights`, or in a gradient of them."""
        if not self.first <= first < end <= self.end:
            raise ValueError(f"there are LoRA parameters for blocks {self.first}:{self.end}, not for {first}:{end}")
        return slice(self.bounds[first - self.first], self.bounds[end - self.first])

    def part(self, first: int, end: int) -> torch.Tensor:
        """The numbers of blocks [first, end), float32 [numbers]."""
        return self.weights[self.numbers(first, end)]

    def touches(self, first: int, end: int) -> bool:
        """Whether some of blocks [first, end) get something."""
        numbers = self.numbers(first, end)
        return numbers.start < numbers.stop

    def message(self, first: int, end: int) -> PutLora:
        """What brings the numbers of blocks [first, end) to a server."""
        ranks = np.ascontiguousarray(self.ranks[first - self.first : end - self.first])
        return PutLora(
            model=self.model,
            first=first,
            end=end,
            version=self.version,
            modules=self.modules,
            ranks=encode_tensor(torch.from_numpy(ranks)),
            weights=encode_tensor(self.part(first, end)),
        )


def fold(adapted: Sequence[Adapted], model: str, first: int, end: int, dropout: float = 0.0) -> tuple[Lora, torch.Tensor]:
    """What active adapters add to blocks [first, end), and the same numbers as a tensor through which gradients reach the parameters.

    Args:
        adapted: modules of these blocks, in any order, each once and with at least one pair.
    Returns:
        the description, and float32 [numbers] on the CPU.
    Raises:
        ValueError: shapes that do not fit together, too many kinds of modules, too high a rank, or numbers that are not finite.
    """
    modules = tuple(sorted({entry.path for entry in adapted}))
    if len(modules) > MAX_MODULES:
        raise ValueError(f"LoRA parameters for {len(modules)} kinds of modules in a block; {MAX_MODULES} are possible")
    columns = {path: column for column, path in enumerate(modules)}
    ranks = np.zeros((end - first, len(modules)), dtype=np.int32)
    counts = [0] * (end - first)
    pieces: list[torch.Tensor] = []
    for entry in sorted(adapted, key=lambda entry: (entry.block, entry.path)):
        a, b = joined(entry)
        ranks[entry.block - first, columns[entry.path]] = a.shape[0]
        counts[entry.block - first] += a.numel() + b.numel()
        pieces += [a.reshape(-1), b.reshape(-1)]
    flat = torch.cat(pieces) if pieces else torch.zeros(0)
    weights = flat.detach()
    # A sum is finite only where all its terms are, and much quicker than asking each.
    if not bool(weights.sum().isfinite()) and not bool(weights.isfinite().all()):
        raise ValueError(
            f"LoRA parameters of {_not_finite(adapted)} are not finite numbers: were they made from the weights of the blocks?"
        )
    version = _hash(modules, ranks, first, end, weights)
    return Lora(model, version, modules, ranks, first, end, weights, tuple(accumulate(counts, initial=0)), dropout), flat


def joined(entry: Adapted) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of a module, r the sum of the adapters' ranks; float32, on the CPU, scaling folded into B.

    Raises: as `fold`.
    """
    for a, b, _ in entry.pairs:
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"LoRA parameters of {_named(entry)} have the shapes {list(a.shape)} and {list(b.shape)}")
    parts_a = [a.to("cpu", torch.float32) for a, _, _ in entry.pairs]
    parts_b = [b.to("cpu", torch.float32) * scaling for _, b, scaling in entry.pairs]
    if len({part.shape[1] for part in parts_a}) > 1 or len({part.shape[0] for part in parts_b}) > 1:
        raise ValueError(f"LoRA parameters of {_named(entry)} do not fit together")
    a, b = (parts_a[0], parts_b[0]) if len(entry.pairs) == 1 else (torch.cat(parts_a), torch.cat(parts_b, dim=1))
    if a.shape[0] > MAX_RANK:
        raise ValueError(f"LoRA parameters of {_named(entry)} have rank {a.shape[0]}; {MAX_RANK} is possible")
    return a, b


def _named(entry: Adapted) -> str:
    return f"block {entry.block}, {entry.path}"


def _not_finite(adapted: Sequence[Adapted]) -> str:
    """The first module whose parameters are none."""
    return next(
        _named(entry)
        for entry in sorted(adapted, key=lambda entry: (entry.block, entry.path))
        if not all(bool(part.isfinite().all()) for part in joined(entry))
    )


def _hash(modules: tuple[str, ...], ranks: npt.NDArray[np.int32], first: int, end: int, weights: torch.Tensor) -> str:
    state = blake3("\0".join(["petalnet lora 1", *modules, f"{first}:{end}"]).encode())
    state.update(np.ascontiguousarray(ranks).tobytes())
    state.update(weights.numpy().data.cast("B") if weights.numel() else b"")
    return state.hexdigest(length=VERSION_BYTES)
