"""Tensors to and from their form on the wire. Sans-IO; the only module of `p2p` that needs torch.

What each codec loses, of a value x that is no infinity or NaN:

- "raw": nothing.
- "bfloat16": at most |x| / 256, and what is below 1.2e-38.
- "float16": at most |x| / 2048, or 3e-8 where that is more. It reaches to 65504: an array with a larger value goes as "bfloat16" instead,
  which takes as many bytes.
- "int8": at most half a step, which is 1/127 of the largest of the 64 values in a row that share a scale. Where one of these is an infinity
  or a NaN, all of them arrive as NaN.

Otherwise infinities and NaNs arrive as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from petalnet.errors import ProtocolError
from petalnet.p2p.fields import CODECS, INT8_BLOCK, ITEM_SIZES, Blob

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PLAIN = frozenset((torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool))
"""Dtypes whose memory is to be had with the fewest operations; the others have no counterpart in Python's buffers."""
_BLOCKS_AT_ONCE = 1024
"""Blocks of the int8 codec between two operations: 256 KiB as float32, which the processor's cache holds from one to the next."""
_LEAST_STEP = torch.finfo(torch.float32).tiny
"""Smaller steps would be denormal, and inexact in themselves."""
_GREATEST_STEP = torch.finfo(torch.float32).max / 127 * (1 - 2**-23)
"""127 of these are still finite."""


def encode_tensor(tensor: torch.Tensor, codec: str = "raw", dtype: torch.dtype | None = None) -> Blob:
    """The wire form of a tensor, of any device and layout.

    Args:
        tensor: of one of the dtypes float32, float16, bfloat16, int64, int32, uint8, bool.
        codec: see the module's docstring; all but "raw" are for floating-point tensors. The blob says which it became.
        dtype: what the receiver is to get; None for the tensor's own.
    Raises:
        ValueError: the dtype cannot travel, or the codec is not for it.
    """
    if dtype is not None and dtype != tensor.dtype:
        if codec == "raw":
            tensor = tensor.to(dtype)
        elif dtype.is_floating_point:
            return replace(encode_tensor(tensor, codec), dtype=_name_of(dtype))
    name = _name_of(tensor.dtype)
    shape = tuple(tensor.shape)
    if codec == "raw" and tensor.dtype in _PLAIN and tensor.is_cpu and tensor.numel() and tensor.is_contiguous():
        return Blob(name, shape, codec, tensor.detach().numpy().data.cast("B"))
    flat = tensor.detach().contiguous().view(-1)
    if codec == "raw":
        return Blob(name, shape, codec, _bytes_of(flat))
    if not flat.is_floating_point():
        raise ValueError(f"codec {codec} is for floating-point tensors, not {name}")
    if codec == "int8":
        return Blob(name, shape, codec, _bytes_of(_quantized(flat)))
    if codec == "float16":
        half = flat.to(torch.float16)
        if not flat.numel() or flat.dtype == torch.float16 or not _overflows(flat, half):
            return Blob(name, shape, codec, _bytes_of(half))
        codec = "bfloat16"
    if codec == "bfloat16":
        return Blob(name, shape, codec, _bytes_of(flat.to(torch.bfloat16)))
    raise ValueError(f"unknown codec {codec!r}")


def decode_tensor(blob: Blob) -> torch.Tensor:
    """The tensor of a blob that `decode_message` checked: on the CPU, of the blob's dtype and shape.

    A raw blob's tensor shares the blob's memory. Raises ProtocolError where the size of the data does not fit the description.
    """
    dtype, count = _DTYPES[blob.dtype], math.prod(blob.shape)
    try:
        if count == 0:
            return torch.zeros(blob.shape, dtype=dtype)
        if blob.codec == "raw":
            if blob.dtype == "bool":
                # Bytes other than 0 and 1 are undefined behaviour in a bool tensor.
                return torch.frombuffer(blob.data, dtype=torch.uint8, count=count).ne(0).view(blob.shape)
            return torch.frombuffer(blob.data, dtype=dtype, count=count).view(blob.shape)
        if blob.codec == "int8":
            blocks = -(-count // INT8_BLOCK)
            scales = torch.frombuffer(blob.data, dtype=torch.float32, count=blocks)
            values = torch.frombuffer(blob.data, dtype=torch.int8, count=count, offset=4 * blocks)
            return _dequantized(values, scales, dtype).view(blob.shape)
        return torch.frombuffer(blob.data, dtype=_DTYPES[blob.codec], count=count).to(dtype).view(blob.shape)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ProtocolError(f"an array's data does not fit its description: {error}") from error


def joined_tokens(blobs: Sequence[Blob]) -> Blob:
    """Hidden states [..., tokens, hidden] one after another along the tokens, as one raw array; they may be in different codecs.

    Raises ProtocolError as `decode_tensor`.
    """
    return encode_tensor(torch.cat([decode_tensor(blob) for blob in blobs], dim=-2))


def lossless_codec(dtype: str, computed: torch.dtype | str) -> str:
    """The codec in which hidden states lose nothing on the way to or from a server.

    Args:
        dtype: of the hidden states.
        computed: what the server computes in, any text.
    """
    name = str(computed).removeprefix("torch.")
    return name if name in CODECS and ITEM_SIZES.get(name, 8) < ITEM_SIZES[dtype] else "raw"


def _name_of(dtype: torch.dtype) -> str:
    name = _NAMES.get(dtype)
    if name is None:
        raise ValueError(f"tensors of {dtype} cannot be sent")
    return name


def _overflows(flat: torch.Tensor, half: torch.Tensor) -> bool:
    """Whether a finite value became infinite in float16."""
    if -math.inf < half.amin() and half.amax() < math.inf:  # a fifth of the time of what follows; never so where there are NaNs
        return False
    return bool((half.isinf() & flat.isfinite()).any())


def _quantized(flat: torch.Tensor) -> torch.Tensor:
    """The bytes of the int8 codec: the scale of each block, float32, then the values."""
    count, blocks = len(flat), -(-len(flat) // INT8_BLOCK)
    data = torch.empty(blocks * (4 + INT8_BLOCK), dtype=torch.uint8, device=flat.device)
    scales = data[: 4 * blocks].view(torch.float32)
    values = data[4 * blocks :].view(torch.int8).view(blocks, INT8_BLOCK)
    scratch = torch.empty(min(blocks, _BLOCKS_AT_ONCE), INT8_BLOCK, device=flat.device)
    for start in range(0, blocks, _BLOCKS_AT_ONCE):
        stop = min(start + _BLOCKS_AT_ONCE, blocks)
        part = flat[start * INT8_BLOCK : stop * INT8_BLOCK].float()
        if len(part) % INT8_BLOCK:
            part = torch.nn.functional.pad(part, (0, -len(part) % INT8_BLOCK))
        part, room, steps = part.view(-1, INT8_BLOCK), scratch[: stop - start], scales[start:stop]
        torch.amax(torch.abs(part, out=room), 1, out=steps)
        steps.div_(127).clamp_(min=_LEAST_STEP)
        values[start:stop].copy_(torch.div(part, steps[:, None], out=room).round_())
    scales.masked_fill_(scales.isinf(), math.nan).clamp_(max=_GREATEST_STEP)
    return data[: 4 * blocks + count]


def _dequantized(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of the int8 codec times the scales of their blocks, in a dtype."""
    count, whole = len(values), len(values) // INT8_BLOCK
    out = torch.empty(count, dtype=dtype)
    scratch = None if dtype == torch.float32 else torch.empty(min(whole, _BLOCKS_AT_ONCE), INT8_BLOCK)
    blocks, given = (flat[: whole * INT8_BLOCK].view(whole, INT8_BLOCK) for flat in (out, values))
    for start in range(0, whole, _BLOCKS_AT_ONCE):
        stop = min(start + _BLOCKS_AT_ONCE, whole)
        room = blocks[start:stop] if scratch is None else scratch[: stop - start]
        room.copy_(given[start:stop]).mul_(scales[start:stop, None])
        if scratch is not None:
            blocks[start:stop].copy_(room)
    if whole * INT8_BLOCK < count:
        rest = slice(whole * INT8_BLOCK, count)
        out[rest] = values[rest] * scales[-1]
    return out


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous one-dimensional tensor, without a copy where it is the CPU's."""
    return memoryview(flat.cpu().view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
