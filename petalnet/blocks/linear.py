"""Linear layers that are quicker for a few rows on a CPU.

A decode round of several sessions multiplies a few rows by every weight of the span. Up to about three rows a processor does that as
fast as it reads the weights from memory. For four to some dozens, the kernel that `torch.nn.functional.linear` takes in float32 needs up
to twice as long as two others, which are as exact. Which is quickest depends on the processor, the number of threads, the weight's shape
and the number of rows: it is measured once, in about a second, and remembered.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from blake3 import blake3
from torch import nn

from petalnet.models.cachedir import load_facts, store_facts
from petalnet.version import __version__

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Like `torch.nn.functional.linear`: input [..., in], weight [out, in] and bias [out] or None give a contiguous [..., out]."""

MEASURED_ROWS = (4, 8, 16, 32, 48)
"""Between two of these, a kernel is taken that is quicker at both; for fewer and for more rows, the library's."""
LEAST_GAIN = 1.05
"""A kernel must be so many times as fast as the library's to be taken."""
ROUNDS, RUN = 2, 3
"""Kernels take turns for so many rounds, each with so many weights in succession: the first after another kernel's takes longer."""
MEASURED_WEIGHTS = 2**22
"""Of a weight, at most so many numbers for each thread are multiplied by in a measurement."""
TRIED_ROWS = 32
MOST_ERROR = 3.0
"""A kernel's errors may be so many times the library's. Others in float32 are within 2, one that rounds to fewer bits is beyond 100."""

_LIBRARY = "library"


def speed_up_linears(module: nn.Module) -> None:
    """Give the linear layers within a module, in place, the quickest kernels for few rows. Takes up to a second the first time.

    It changes only plain `nn.Linear` layers with float32 weights on the CPU, and what they do in inference mode; parameters, hooks and
    gradients stay as they are. Results differ from the library's by the order of summation. Thread counts set later are not noticed.
    """
    alike: dict[tuple[int, int], list[nn.Linear]] = {}
    for layer in module.modules():
        if type(layer) is nn.Linear and _is_plain(layer.weight):
            alike.setdefault(_measured_shape(layer.weight), []).append(layer)
    for shape, layers in alike.items():
        by_rows = quickest_kernels(_seconds(shape, [layer.weight for layer in layers]))
        if any(by_rows):
            for layer in layers:
                layer.__class__ = FewRowsLinear
                layer.__dict__["kernels"] = by_rows


class FewRowsLinear(nn.Linear):
    """An `nn.Linear` that takes, in inference mode, the quickest kernel for the number of rows. Made by `speed_up_linears`.

    Attributes:
        kernels: which one for each number of rows from 0 on; None for the library's, as for more rows than there are entries.
    """

    kernels: tuple[Kernel | None, ...]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # `self.weight` would be found by `nn.Module.__getattr__`, which takes ten times as long.
        parameters: dict[str, Any] = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        rows = input.numel() // self.in_features
        if (
            rows < len(self.kernels)
            and (kernel := self.kernels[rows]) is not None
            and input.dtype is torch.float32
            and weight.dtype is torch.float32
            and torch.is_inference_mode_enabled()
        ):
            return kernel(input, weight, bias)
        return F.linear(input, weight, bias)


def quickest_kernels(seconds: Mapping[str, Sequence[float]]) -> tuple[Kernel | None, ...]:
    """The kernel for each number of rows from 0 to the last measured one; None for the library's.

    Args:
        seconds: what each kernel takes for `MEASURED_ROWS`, by its name; the library's among them.
    """
    chosen: list[Kernel | None] = [None] * (MEASURED_ROWS[-1] + 1)
    for rows in range(MEASURED_ROWS[0], len(chosen)):
        above = next(index for index, measured in enumerate(MEASURED_ROWS) if measured >= rows)
        near = {above, above if MEASURED_ROWS[above] == rows else above - 1}
        quicker = {
            name: sum(taken[index] for index in near)
            for name, taken in seconds.items()
            if name != _LIBRARY and all(taken[index] * LEAST_GAIN <= seconds[_LIBRARY][index] for index in near)
        }
        if quicker:
            chosen[rows] = _KERNELS[min(quicker, key=quicker.__getitem__)]
    return tuple(chosen)


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether this is an ordinary float32 matrix on the CPU, and not, for one, a quantized one that only looks like it."""
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is torch.Tensor
        and weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and weight.numel() > 0
    )


def _one_dnn(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output


def _transposed(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """By weight × inputᵀ, for which BLAS has another kernel."""
    product = torch.mm(weight, input.reshape(-1, input.shape[-1]).t()).t()
    output = torch.empty(product.shape)
    if bias is None:
        output.copy_(product)
    else:
        torch.add(product, bias, out=output)
    return output.view(*input.shape[:-1], -1)


_KERNELS: dict[str, Kernel] = {"oneDNN": _one_dnn, "transposed": _transposed}


def _measured_shape(weight: torch.Tensor) -> tuple[int, int]:
    """(out, in) of what is measured in a weight's place: as wide, with fewer outputs where it is large."""
    outputs, inputs = weight.shape
    return min(outputs, max(1, MEASURED_WEIGHTS * torch.get_num_threads() // inputs)), inputs


def _seconds(shape: tuple[int, int], weights: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """What each kernel takes for `MEASURED_ROWS`, by its name; as remembered, or measured now."""
    machine = f"{platform.node()} {platform.processor()} {os.cpu_count()} {torch.get_num_threads()}"
    key = blake3(f"{machine} {shape} {MEASURED_ROWS} {torch.__version__} {__version__}".encode()).hexdigest()
    known = load_facts("linear", key)
    if _is_complete(known):
        return known
    with torch.inference_mode():
        seconds = _measure(shape, weights)
    store_facts("linear", key, seconds)
    return seconds


def _is_complete(known: Mapping[str, Any]) -> bool:
    return _LIBRARY in known and all(
        (name == _LIBRARY or name in _KERNELS)
        and isinstance(taken, list)
        and len(taken) == len(MEASURED_ROWS)
        and all(isinstance(one, float) and one > 0 for one in taken)
        for name, taken in known.items()
    )


def _measure(shape: tuple[int, int], weights: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    outputs, inputs = shape
    parts = [weight[start : start + outputs] for weight in weights for start in range(0, len(weight) - outputs + 1, outputs)]
    turn = itertools.cycle(parts)  # one after the other, since a pass finds no weight in the processor's caches either
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # the first leaves out other work on the machine
    for weight in weights:
        weight.view(-1)[::1024].sum()  # maps its pages in, where it lies in a file
    tried = {_LIBRARY: F.linear} | {name: kernel for name, kernel in _KERNELS.items() if _is_exact(kernel, parts[0])}
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    for rows in MEASURED_ROWS:
        hidden = torch.ones(1, rows, inputs)
        taken: dict[str, list[float]] = {name: [] for name in tried}
        for _, (name, kernel), _ in itertools.product(range(ROUNDS), tried.items(), range(RUN)):
            weight = next(turn)
            began = clock()
            kernel(hidden, weight, None)
            taken[name].append(clock() - began)
        for name in tried:
            seconds[name].append(max(statistics.median(taken[name]), 1e-9))
    return seconds


def _is_exact(kernel: Kernel, weight: torch.Tensor) -> bool:
    """Whether a kernel runs here and its sums are as exact as the library's."""
    hidden = torch.randn(TRIED_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    exact = F.linear(hidden.double(), weight.double())
    try:
        output = kernel(hidden, weight, None)
    except (AttributeError, RuntimeError):  # it is private, so another torch may lack it, and it may be built without oneDNN
        return False
    error, usual = ((sums - exact).square().mean().sqrt().item() for sums in (output, F.linear(hidden, weight)))
    return error <= MOST_ERROR * usual
