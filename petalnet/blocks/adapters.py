"""LoRA (Hu et al. 2021, arXiv:2106.09685) in the blocks of a span: adapters that the host has loaded, and parameters that clients bring.

A linear layer that maps x to y yields y + B · A · x while a pass runs for which an adapter names it. The layers know nothing of it: hooks
are put on them for the time of such a pass, so that passes without adapters cost what they would without this module. Tokens of one pass
may have different adapters, or none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from blake3 import blake3
from torch import nn

from petalnet.p2p.pass_messages import PutLora
from petalnet.p2p.tensors import decode_tensor

Handles = list[torch.utils.hooks.RemovableHandle]
DeviceOf = Callable[[int], torch.device]
"""Where a block of the model is, by its number."""


class LoraWeights(NamedTuple):
    """The parameters for one linear layer, of which `b` includes the scaling.

    Attributes:
        a: [r, in], float32.
        b: [out, r], float32.
    """

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA for some blocks of a model.

    Attributes:
        blocks: by the model's number of a block, and by a module's path in the block, in the order of the wire; blocks of which nothing
            is changed may have an empty entry.
    """

    blocks: Mapping[int, Mapping[str, LoraWeights]]

    @cached_property
    def nbytes(self) -> int:
        """Memory that the weights take."""
        return self._nbytes_of(self.blocks)

    def nbytes_in(self, first: int, end: int) -> int:
        """The same of the weights for blocks [first, end)."""
        return self._nbytes_of(range(first, end))

    def _nbytes_of(self, blocks: Iterable[int]) -> int:
        return sum(weights.a.nbytes + weights.b.nbytes for block in blocks for weights in self.blocks.get(block, {}).values())

    @classmethod
    def of(cls, request: PutLora, shapes: Mapping[int, Mapping[str, tuple[int, int]]], device_of: DeviceOf) -> Adapter:
        """The parameters in a request, which was checked (`lora_store.check_parameters`).

        Args:
            shapes: (in, out) of the modules of each block, see `Span.linear_shapes`.
            device_of: where each block is, by its number.
        """
        rest = decode_tensor(request.weights)
        blocks: dict[int, dict[str, LoraWeights]] = {}
        for block, ranks in zip(range(request.first, request.end), decode_tensor(request.ranks).tolist(), strict=True):
            modules = blocks[block] = {}
            for path, rank in zip(request.modules, ranks, strict=True):
                if rank:
                    inputs, outputs = shapes[block][path]
                    a, b, rest = rest.split((rank * inputs, outputs * rank, len(rest) - rank * (inputs + outputs)))
                    # Copies, each by itself: what stays of this must hold neither the message's memory nor that of other parts of it.
                    a, b = (part.to(device_of(block), torch.float32, copy=True) for part in (a, b))
                    modules[path] = LoraWeights(a.view(rank, inputs), b.view(outputs, rank))
        return cls(blocks)

    def leaves(self, first: int, end: int) -> tuple[Adapter, list[torch.Tensor]]:
        """The part for blocks [first, end) with the same memory in new leaves of autograd's graph, and these in the order of
        `PutLora.weights`: block by block, module by module, `a` and then `b`."""
        blocks = {
            block: {path: LoraWeights(*(weight.detach().requires_grad_() for weight in weights)) for path, weights in modules.items()}
            for block, modules in sorted(self.blocks.items())
            if first <= block < end
        }
        leaves = [weight for modules in blocks.values() for weights in modules.values() for weight in weights]
        return Adapter(blocks), leaves


@dataclass(frozen=True)
class Dropout:
    """Which numbers of what enters LoRA are left out of a pass; the others are divided by 1 - p. A function of `seed`, of a row's number,
    and of where the layer is in the model, so that a pass that is computed again, in other parts or elsewhere, leaves out the same.

    Attributes:
        p: the probability with which a number is left out; less than 1.
        seed: any number.
        row: the number within the request of the first row of what is run.
    """

    p: float
    seed: int
    row: int = 0

    def apply(self, inputs: torch.Tensor, rows: int, block: int, path: str) -> torch.Tensor:
        """`inputs`, [rows, …] or with rows and positions in one dimension, without what is left out."""
        numbers = inputs.numel() // rows
        draws = torch.empty(rows, numbers)
        for row in range(rows):
            key = blake3(f"{self.seed} {self.row + row} {block} {path}".encode()).digest(8)
            # Drawn by the processor on any device, as its generator gives the same everywhere.
            torch.rand(numbers, generator=torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1), out=draws[row])
        kept = draws.ge_(self.p).div_(1 - self.p).view(inputs.shape)
        return inputs * kept.to(inputs.device, inputs.dtype)


@dataclass(frozen=True, eq=False)
class Share:
    """Tokens of a pass that have the same adapters.

    Attributes:
        adapters: which are applied, all of them.
        tokens: the numbers of the tokens, int64, or a slice of them; None for all that there are.
    """

    adapters: Sequence[Adapter]
    tokens: slice | torch.Tensor | None = None


def shares_of(columns: Iterable[tuple[slice, Sequence[Adapter]]], device: torch.device) -> list[Share]:
    """The shares of a packed row, from which columns have which adapters, in order."""
    found: dict[tuple[Adapter, ...], list[slice]] = {}
    for span, adapters in columns:
        if adapters:
            found.setdefault(tuple(adapters), []).append(span)
    shares = []
    for adapters, spans in found.items():
        if all(before.stop == after.start for before, after in itertools.pairwise(spans)):
            shares.append(Share(adapters, slice(spans[0].start, spans[-1].stop)))
        else:
            shares.append(Share(adapters, torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(device)))
    return shares


def apply_adapters(
    blocks: Iterable[tuple[int, nn.Module]], shares: Sequence[Share], size: tuple[int, int], dropout: Dropout | None = None
) -> Handles:
    """Have the layers of blocks add what adapters say, until the handles are removed.

    Args:
        blocks: the blocks with their numbers in the model.
        shares: which tokens have which adapters.
        size: (rows, length) of the pass.
        dropout: of what enters the last adapter of each share.
    """
    handles: Handles = []
    for number, block in blocks:
        paths = {path: None for share in shares for adapter in share.adapters for path in adapter.blocks.get(number, ())}
        for path in paths:
            added = [
                (share.tokens, adapter.blocks[number][path], dropout if adapter is share.adapters[-1] else None)
                for share in shares
                for adapter in share.adapters
                if path in adapter.blocks.get(number, ())
            ]
            hook = _Hook(added, *size, number, path)
            handles.append(block.get_submodule(path).register_forward_hook(hook))
    return handles


def lora_of(module: nn.Module) -> list[tuple[slice | torch.Tensor | None, LoraWeights]]:
    """What is added to a module's output in the pass under way, with the tokens that have it: for what multiplies with the module's weight
    in another order than the module itself. `apply_adapters` has put it there."""
    hooks = module._forward_hooks.values()
    return [(tokens, weights) for hook in hooks if isinstance(hook, _Hook) for tokens, weights, _ in hook.added]


@dataclass(frozen=True, eq=False, slots=True)
class _Hook:
    """Adds to a layer's output."""

    added: list[tuple[slice | torch.Tensor | None, LoraWeights, Dropout | None]]
    rows: int
    length: int
    block: int
    path: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        inputs: torch.Tensor = args[0]
        wide = inputs.to(torch.float32).reshape(-1, inputs.shape[-1])
        sums = output.reshape(-1, output.shape[-1])
        for tokens, (a, b), dropout in self.added:
            if tokens is not None or dropout is not None:
                self._check(inputs)
            given = wide if tokens is None else wide[tokens]
            if dropout is not None:
                given = dropout.apply(given, self.rows, self.block, self.path)
            reduced = F.linear(given, a)
            if tokens is not None and not isinstance(tokens, slice):
                sums.index_add_(0, tokens, F.linear(reduced, b).to(sums.dtype))
            elif sums.dtype != torch.float32:
                more = F.linear(reduced, b)
                if tokens is None:
                    sums = (sums + more).to(sums.dtype)
                else:
                    sums[tokens] += more.to(sums.dtype)
            elif tokens is None and torch.is_grad_enabled():
                sums = torch.addmm(sums, reduced, b.t())
            else:  # what the layer has put out is nobody else's yet
                (sums if tokens is None else sums[tokens]).addmm_(reduced, b.t())
        return sums.view(output.shape)

    def _check(self, inputs: torch.Tensor) -> None:
        if inputs.numel() != self.rows * self.length * inputs.shape[-1]:
            raise ValueError(f"{self.path} of block {self.block} does not see each token once: it cannot be adapted so")
