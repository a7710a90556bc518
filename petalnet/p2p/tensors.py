"""Tensors to and from their form on the wire. Sans-IO; the only module of `p2p` that needs torch."""

from __future__ import annotations

import math

import torch

from petalnet.errors import ProtocolError
from petalnet.p2p.messages import INT8_BLOCK, Blob

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


def encode_tensor(tensor: torch.Tensor, codec: str = "raw") -> Blob:
    """The wire form of a tensor, of any device and layout.

    Args:
        tensor: of one of the dtypes float32, float16, bfloat16, int64, int32, uint8, bool.
        codec: "raw" is exact; "bfloat16" and "float16" round; "int8" keeps about 7 bits, relative to the largest of 64 neighbours.
    Raises:
        ValueError: the dtype cannot travel, or the codec is not for it.
    """
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise ValueError(f"tensors of {tensor.dtype} cannot be sent")
    shape = tuple(tensor.shape)
    if codec == "raw" and tensor.dtype in _PLAIN and tensor.is_cpu and tensor.numel() and tensor.is_contiguous():
        return Blob(name, shape, codec, tensor.detach().numpy().data.cast("B"))
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    if codec == "raw":
        return Blob(name, shape, codec, _bytes_of(flat))
    if not flat.is_floating_point():
        raise ValueError(f"codec {codec} is for floating-point tensors, not {name}")
    if codec == "int8":
        padded = torch.nn.functional.pad(flat.float(), (0, -len(flat) % INT8_BLOCK)).view(-1, INT8_BLOCK)
        scales = padded.abs().amax(dim=1) / 127
        quantized = (padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127).to(torch.int8)
        return Blob(name, shape, codec, b"".join((_bytes_of(scales), _bytes_of(quantized.view(-1)[: len(flat)]))))
    if codec in ("bfloat16", "float16"):
        return Blob(name, shape, codec, _bytes_of(flat.to(_DTYPES[codec])))
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
            return (values.float() * scales.repeat_interleave(INT8_BLOCK)[:count]).to(dtype).view(blob.shape)
        return torch.frombuffer(blob.data, dtype=_DTYPES[blob.codec], count=count).to(dtype).view(blob.shape)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ProtocolError(f"an array's data does not fit its description: {error}") from error


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous one-dimensional CPU tensor, without a copy."""
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
