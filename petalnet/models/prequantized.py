"""Checkpoints whose weights are stored rounded: what they stand for.

A weight that was rounded when the checkpoint was made is several stored tensors: its numbers in a few bits, their scales, and more. Here
they become one tensor again as it is loaded, so that everything else deals with plain weights; those that bitsandbytes rounded are
rounded once more, to the same numbers, where blocks are kept in few bits (`blocks.quantization`). Only arithmetic of PyTorch is used,
which checks sizes: stored tensors may be anything.

The formats: bitsandbytes' 4 bits (Dettmers et al. 2023, arXiv:2305.14314) and 8 bits (Dettmers et al. 2022, arXiv:2208.07339), float8
with a scale for each block of a matrix (DeepSeek-V3, arXiv:2412.19437), and MXFP4 (Open Compute Project, Microscaling Formats 1.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petalnet.errors import ModelError

if TYPE_CHECKING:
    import torch

    from petalnet.models.checkpoint import ModelSource

READABLE = "bitsandbytes, fp8 and mxfp4"
PIECE = 2**20
"""About so many numbers are made whole at a time."""
MX_GROUP = 32
"""Numbers that share a scale in MXFP4."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 numbers of 4 bits with 2 bits of exponent and 1 of mantissa stand for."""
BYTE_SCALE_BIAS = 127
"""Of scales that are exponents of two in a byte."""

_BESIDE = {
    "bitsandbytes": re.compile(
        r"(?P<weight>.+\.weight)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))"
        r"|(?P<layer>.+)\.(?P<more>SCB|weight_format)"
    ),
    "fp8": re.compile(r"(?P<weight>.+)_(?P<part>scale_inv)|(?P<layer>.+)\.(?P<more>activation_scale)"),
    "mxfp4": re.compile(r"(?P<weight>.+)_(?P<part>blocks|scales)"),
}
"""By the method: names of the tensors beside a weight, from which its own name and what they are can be told."""

Parts = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Rounded:
    """A weight that is stored rounded.

    Attributes:
        name: of the weight that it stands for.
        parts: names of the stored tensors by what they are; "" is the weight's own.
        make: makes the weight in a dtype, of the tensors.
    """

    name: str
    parts: Mapping[str, str]
    make: Callable[[Parts, torch.dtype], torch.Tensor]

    def read(self, source: ModelSource, dtype: torch.dtype) -> torch.Tensor:
        """The weight. Raises ModelError where what is stored makes no sense."""
        tensors = {part: source.read_copy(name) for part, name in self.parts.items()}
        try:
            return self.make(tensors, dtype)
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(f"the weight {self.name} of {source.name} is stored rounded, and cannot be made whole: {error}") from error


def rounded_weights(source: ModelSource, names: Iterable[str], *, transposed: bool) -> dict[str, Rounded]:
    """Which of the named tensors of a checkpoint together stand for a weight, by its name; the others are plain tensors.

    Args:
        transposed: whether the model keeps weights [in, out], as the library's Conv1D does: bitsandbytes stores [out, in] all the same.
    Raises:
        ModelError: they are stored in a way that is not known here.
    """
    stored = _stored(source.config)
    if stored is None:
        return {}
    method = require_readable(source.config, source.name)
    all_names = tuple(names)
    found: dict[str, dict[str, str]] = {}
    for name in all_names:
        weight, part = _beside(name, method)
        if part:
            found.setdefault(weight, {})[part] = name
    for name in all_names:
        if name in found:
            found[name][""] = name
    result = {}
    for weight, parts in found.items():
        if method == "mxfp4":
            make: Callable[[Parts, torch.dtype], torch.Tensor] = _from_mxfp4
        elif method == "fp8":
            make = _from_fp8(stored.get("weight_block_size"))
        else:
            make = _from_int8 if "SCB" in parts else _from_four_bits
            make = _turned(make) if transposed else make
        result[weight] = Rounded(weight, parts, make)
    return result


def weight_of(name: str, config: Any) -> str:
    """The name of the weight that a stored tensor belongs to, which may be its own."""
    stored = _stored(config)
    return name if stored is None else _beside(name, _method(stored))[0]


def require_readable(config: Any, name: str) -> str:
    """The method by which a model's weights are stored rounded; "none" where they are not.

    Raises:
        ModelError: it is none that is known here; the message says which it is and what to take instead.
    """
    stored = _stored(config)
    if stored is None:
        return "none"
    method = _method(stored)
    if method not in _BESIDE:
        raise ModelError(
            f"the weights of {name} are stored in the format {method}, which cannot be read here ({READABLE} can): take the model "
            "as it was before that, and --quantization"
        )
    return method


def stored_quantization(config: Any) -> str:
    """How a checkpoint's blocks are rounded, as `--quantization` names it, where they can be kept as they are stored; else "none"."""
    stored = _stored(config)
    if stored is None or stored.get("llm_int8_skip_modules") not in (None, [], ["lm_head"]):
        return "none"
    if stored.get("load_in_8bit"):
        return "int8"
    return "nf4" if stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4" else "none"


def _stored(config: Any) -> Mapping[str, Any] | None:
    """What a configuration says of how the weights are stored."""
    stored = getattr(config, "quantization_config", None) or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if stored is None:
        return None
    fields: Mapping[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    return fields


def _method(stored: Mapping[str, Any]) -> str:
    method = stored.get("quant_method") or "bitsandbytes"  # which did not say so at first
    return str(getattr(method, "value", method))


def _beside(name: str, method: str) -> tuple[str, str]:
    """The weight that a stored tensor belongs to, and what it is of it: "" for one that is not beside another."""
    match = _BESIDE[method].fullmatch(name) if method in _BESIDE else None
    if match is None:
        return name, ""
    groups = match.groupdict()
    if groups["weight"]:
        return groups["weight"], groups["part"]
    return f"{groups['layer']}.weight", groups["more"]


def _turned(make: Callable[[Parts, torch.dtype], torch.Tensor]) -> Callable[[Parts, torch.dtype], torch.Tensor]:
    return lambda parts, dtype: make(parts, dtype).t().contiguous()


def _from_four_bits(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Two numbers a byte, the first in its upper half, each the place of a value in a map. So many in a row share a scale, and the scales
    may be rounded themselves, to 8 bits, around their mean."""
    import torch

    (described,) = (parts[part] for part in parts if part.startswith("quant_state"))
    state = json.loads(bytes(described.to(torch.uint8).tolist()))
    shape = tuple(int(size) for size in state["shape"])
    scales = parts["absmax"]
    if "nested_absmax" in parts:
        nested = parts["nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))[: scales.numel()]
        scales = parts["nested_quant_map"].float()[scales.long()] * nested + float(state["nested_offset"])
    packed = parts[""].contiguous().view(torch.uint8).flatten()
    whole = _unpacked(packed, parts["quant_map"].float(), scales.float(), int(state["blocksize"]), dtype, upper_first=True)
    return whole.view(shape)


def _from_int8(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of -127 to 127 and for each row the largest that they stand for."""
    import torch

    if "weight_format" in parts and int(parts["weight_format"].item()) != 0:
        raise ValueError("its numbers are in an order that only one kind of GPU has")
    rows = parts[""].view(torch.int8)
    whole = torch.empty(rows.shape, dtype=dtype)
    scales = parts["SCB"].float().view(-1, 1) / 127
    if len(scales) != len(rows):
        raise ValueError("it has another number of scales than of rows")
    count = max(PIECE // rows.shape[1], 1)
    for first in range(0, len(rows), count):
        whole[first : first + count] = rows[first : first + count].float() * scales[first : first + count]
    return whole


def _from_fp8(block: Any) -> Callable[[Parts, torch.dtype], torch.Tensor]:
    """A matrix, or several, in 8-bit floating point; each block of it has a scale, or the whole."""

    def make(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        import torch

        rounded, scales = parts[""], parts["scale_inv"]
        scales = (scales.float() - BYTE_SCALE_BIAS).exp2() if scales.dtype == torch.uint8 else scales.float()
        if scales.numel() == 1:
            return (rounded.float() * scales.view(())).to(dtype)
        rows, columns = rounded.shape[-2:]
        high, wide = block or (-(-rows // scales.shape[-2]), -(-columns // scales.shape[-1]))
        whole = torch.empty(rounded.shape, dtype=dtype)
        for first in range(0, rows, high):
            scale = scales[..., first // high, :].repeat_interleave(wide, dim=-1)[..., None, :columns]
            whole[..., first : first + high, :] = rounded[..., first : first + high, :].float() * scale
        return whole

    return make


def _from_mxfp4(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """[experts, out, groups, 16] bytes, the first number in each one's lower half, and [experts, out, groups] exponents to
    [experts, in, out]."""
    import torch

    blocks, exponents = parts["blocks"], parts["scales"]
    if blocks.shape[:-1] != exponents.shape or blocks.shape[-1] * 2 != MX_GROUP:
        raise ValueError("its scales are not those of its groups")
    scales = (exponents.flatten().float() - BYTE_SCALE_BIAS).exp2()
    whole = _unpacked(blocks.flatten(), torch.tensor(FP4_VALUES), scales, MX_GROUP, dtype, upper_first=False)
    return whole.view(*blocks.shape[:-2], -1).transpose(-1, -2).contiguous()


def _unpacked(
    packed: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, group: int, dtype: torch.dtype, *, upper_first: bool
) -> torch.Tensor:
    """Numbers of 4 bits, two a byte, as values times the scale of their group, [2 · bytes]."""
    import torch

    if group < 2 or group % 2 or scales.numel() != -(-2 * packed.numel() // group):
        raise ValueError("it has another number of scales than of groups")
    whole = torch.empty(2 * packed.numel(), dtype=dtype)
    groups = max(PIECE // group, 1)
    for first in range(0, scales.numel(), groups):
        some = packed[first * group // 2 : (first + groups) * group // 2].int()
        halves = (some >> 4, some & 15) if upper_first else (some & 15, some >> 4)
        numbers = values[torch.stack(halves, dim=-1).flatten()]
        start = first * group
        whole[start : start + len(numbers)] = numbers * scales[first : first + groups].repeat_interleave(group)[: len(numbers)]
    return whole
