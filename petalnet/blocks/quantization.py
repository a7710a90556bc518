"""Linear layers whose weights are kept in 8 or 4 bits, in bitsandbytes' formats and by its kernels.

`int8`: each output has a scale, the largest of its weights, and 255 equal steps (the weights of LLM.int8(), Dettmers et al. 2022,
arXiv:2208.07339). `nf4`: each 64 weights have a scale and 16 steps at the quantiles of a normal distribution (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314; scales in float32, which are not rounded once more).

Only weights are rounded. LLM.int8() rounds what enters a layer as well, and picks the columns that it does not by looking at all tokens of
a pass: here tokens of strangers share passes, and nobody's answer may depend on who else is there, or on which server goes on with it.

A layer's weight is rounded some rows at a time as it is loaded, so that neither a whole model nor a whole tensor is there in two forms.
Gradients flow back to what entered a layer, by the same rounded weights; its graph holds no copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from petalnet.errors import UsageError

QUANTIZATIONS = ("none", "int8", "nf4")
GROUP = 64
"""Weights that share a scale in nf4."""
PIECE = 2**18
"""About so many weights are rounded at a time."""
CACHED = {4: 2**18, 2: 2**20}
"""By the bytes of a number: about so many weights a processor makes whole at a time, to multiply by them while they are in its cache.
Measured with int8 rows of 4096 on one core: float32 is slower by a half with four times as many, bfloat16 by a third with a quarter."""
FEW_ROWS = 8
"""Up to so many rows, a processor multiplies in bfloat16 with torch's kernel for int8 weights, which makes nothing whole: once to
three times as fast as by weights in bfloat16. It is slower for more."""
STEP = 16
"""Numbers of a row that this kernel reads at a time, at aligned addresses alone. It does not look whether a row is so many times as long,
and reads beyond its end where it is not."""
LIKE_LINEAR = ("FalconLinear",)
"""Subclasses of `nn.Linear` in the library that compute what it computes, in another order of operations."""
ROUTERS = ("gate", "router")
"""What modules are called that choose experts: a few numbers that decide over everything else."""


def require_quantization(quantization: str) -> None:
    """Raises UsageError unless weights can be kept so here. Imports what that takes, in a moment."""
    if quantization not in QUANTIZATIONS:
        raise UsageError(f"unknown quantization {quantization!r}: use one of {', '.join(QUANTIZATIONS)}")
    if quantization == "none":
        return
    from petalnet.models.lean import import_bitsandbytes

    try:
        import_bitsandbytes()
    except Exception as error:
        # It loads a library for the machine's accelerator as it is imported, which fails in as many ways as there are drivers.
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"--quantization {quantization} needs bitsandbytes, which cannot be imported ({type(error).__name__}: {reason}): "
            "reinstall it (pip install --force-reinstall bitsandbytes), or leave --quantization out"
        ) from error


def quantize_layers(blocks: Iterable[nn.Module], quantization: str) -> None:
    """Put layers in place of the linear layers of blocks, which are on meta; they round the weights that they are given, for which
    `require_quantization` has to hold.

    Routers stay as they are, norms do, and so do experts that are one parameter for all of them ([experts, out, in]).
    """
    if quantization == "none":
        return
    for block in blocks:
        for path, layer in list(block.named_modules()):
            if is_quantizable(path, layer):
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, _KINDS[quantization](layer))


def is_quantizable(path: str, layer: nn.Module) -> bool:
    """Whether a module, at a path within a block, is a linear layer that quantization is for."""
    from transformers.pytorch_utils import Conv1D

    linear = type(layer) in (nn.Linear, Conv1D) or type(layer).__name__ in LIKE_LINEAR
    return linear and not any(name in ROUTERS or name.endswith("_router") or name == "shared_expert_gate" for name in path.split("."))


def stored_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that the weights of a module take once it is loaded in a dtype; it may be on meta, its linear layers replaced or not."""
    total = 0
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            total += part.stored_bytes + (0 if part.bias is None else part.bias.numel() * dtype.itemsize)
        else:
            total += sum(parameter.numel() for parameter in part.parameters(recurse=False)) * dtype.itemsize
    return total


class QuantizedLinear(nn.Linear):
    """A linear layer with rounded weights. Made on meta in place of another; `take_weight` fills it.

    Attributes:
        weight: the rounded numbers, once there are any.
        scales: float32.
    """

    kind: str

    def __init__(self, layer: Any) -> None:
        """
        Args:
            layer: an `nn.Linear`, or the library's `Conv1D`, whose weight is transposed.
        """
        transposed = not isinstance(layer, nn.Linear)
        outputs, inputs = layer.weight.shape[::-1] if transposed else layer.weight.shape
        super().__init__(inputs, outputs, bias=layer.bias is not None, device="meta")
        self.transposed = transposed
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("scales", torch.empty(0, device="meta"), persistent=False)
        self.eval()

    @property
    def stored_bytes(self) -> int:
        """What weight and scales take."""
        raise NotImplementedError

    def take_weight(self, weight: torch.Tensor) -> nn.Parameter:
        """Round a weight, as the checkpoint has it, on the device where it is; returns what becomes this layer's parameter."""
        rounded, scales = self._rounded(weight.t() if self.transposed else weight)
        self.scales = scales
        self._is_hf_initialized = True  # the library leaves the layer alone then
        return nn.Parameter(rounded, requires_grad=False)

    def dequantized(self, dtype: torch.dtype, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows [first, end) of the weight as rounded, [end - first, in]; `first` is a multiple of `GROUP`."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            output: torch.Tensor = _Multiplication.apply(input, self)
            return output
        return self.multiply(input)

    def multiply(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out], in the input's dtype, without a graph."""
        if self.weight.device.type != "cpu":
            return F.linear(input, self.dequantized(input.dtype), self.bias)
        output = input.new_empty(*input.shape[:-1], self.out_features)
        for rows in self._pieces(CACHED.get(input.element_size(), PIECE)):
            output[..., rows] = F.linear(input, self.dequantized(input.dtype, rows.start, rows.stop))
        return output if self.bias is None else output.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"

    def _rounded(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of a weight [out, in]: the rounded numbers, and the scales."""
        raise NotImplementedError

    def _pieces(self, weights: int) -> Iterator[slice]:
        """The rows, about so many weights at a time."""
        rows = max(weights // self.in_features // GROUP, 1) * GROUP  # in whole groups, wherever a row ends
        for first in range(0, self.out_features, rows):
            yield slice(first, min(first + rows, self.out_features))


class Int8Linear(QuantizedLinear):
    """Weights int8 [out, in], scales [out]: a weight is its number × scale / 127."""

    kind = "int8"

    @property
    def stored_bytes(self) -> int:
        return self.out_features * (self.in_features + 4)

    def dequantized(self, dtype: torch.dtype, first: int = 0, end: int | None = None) -> torch.Tensor:
        rows = slice(first, end)
        return self.weight[rows].to(dtype).mul_((self.scales[rows] / 127)[:, None])

    def multiply(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype is torch.float16:  # whose sums of numbers up to 127 might not be finite
            return super().multiply(input)
        weight, on_cpu = self.weight, self.weight.device.type == "cpu"
        if not on_cpu:
            output = F.linear(input, weight.to(input.dtype))
        elif input.dtype is torch.bfloat16 and input.numel() <= FEW_ROWS * self.in_features and self.in_features % STEP == 0:
            flat = input.reshape(-1, self.in_features).contiguous()
            if flat.data_ptr() % (STEP * flat.element_size()):  # part of another tensor
                flat = flat.clone()
            ones = torch.ones(self.out_features, dtype=input.dtype)  # its scales would be rounded to the input's dtype
            output = torch.ops.aten._weight_int8pack_mm(flat, weight, ones).view(*input.shape[:-1], self.out_features)
        else:
            output = input.new_empty(*input.shape[:-1], self.out_features)
            for rows in self._pieces(CACHED[input.element_size()]):
                output[..., rows] = F.linear(input, weight[rows].to(input.dtype))
        output.mul_(self.scales / 127)
        return output if self.bias is None else output.add_(self.bias)

    def _rounded(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(weight), device=weight.device)
        for rows in self._pieces(PIECE):
            piece = weight[rows].to(torch.float16)  # which is what the kernel takes
            numbers, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(piece.contiguous())
            rounded[rows] = numbers.masked_fill_((largest == 0)[:, None], 0)
            scales[rows] = largest
        return rounded, scales


class NF4Linear(QuantizedLinear):
    """Weights uint8 [out × in / 2, 1], two in a byte, the first in its upper half; scales [out × in / 64]."""

    kind = "nf4"

    @property
    def stored_bytes(self) -> int:
        count = self.out_features * self.in_features
        return -(-count // 2) + 4 * -(-count // GROUP)

    def multiply(self, input: torch.Tensor) -> torch.Tensor:
        if input.is_cuda and self.in_features % GROUP == 0:
            return self.multiply_rounded(input)
        return super().multiply(input)

    def multiply_rounded(self, input: torch.Tensor) -> torch.Tensor:
        """`multiply`, by a kernel that for few rows reads a GPU's memory once for the rounded weight, and never writes the whole one."""
        product: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
            input, self.weight, (self.out_features, self.in_features), self.scales, GROUP, self.kind, self.bias
        )
        return product

    def dequantized(self, dtype: torch.dtype, first: int = 0, end: int | None = None) -> torch.Tensor:
        end = self.out_features if end is None else end
        start, stop = first * self.in_features, end * self.in_features
        numbers, scales = self.weight[start // 2 : -(-stop // 2)], self.scales[start // GROUP : -(-stop // GROUP)]
        # The kernel for CPUs takes a new scale at the beginning of each row, so it is told of rows that do begin there.
        count = stop - start
        shape = (count // GROUP, GROUP) if count % GROUP == 0 else (1, count)
        whole: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(numbers, scales, GROUP, "nf4", shape, dtype)
        return whole.view(end - first, self.in_features)

    def _rounded(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = weight.numel()
        rounded = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(-(-count // GROUP), device=weight.device)
        for rows in self._pieces(PIECE):
            piece = weight[rows].contiguous()
            numbers, largest = torch.ops.bitsandbytes.quantize_4bit(piece, GROUP, "nf4", torch.uint8)
            start = rows.start * self.in_features
            rounded[start // 2 : start // 2 + len(numbers)] = numbers
            scales[start // GROUP : start // GROUP + len(largest)] = largest
        return rounded, scales


_KINDS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": NF4Linear}


class _Multiplication(torch.autograd.Function):
    """What a layer puts out, with the gradient of what enters it. The layer's own numbers are not saved: they never change."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.multiply(input)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized(gradient.dtype), None
