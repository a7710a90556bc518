"""Tensors whose memory is a file: mapped, not read, so that those that are never touched cost nothing."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from petalnet.errors import ModelError

if TYPE_CHECKING:
    import torch

    from petalnet.models.files import LocalTensor


@cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """PyTorch's dtypes by the names that safetensors gives them."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "C64": torch.complex64,
    }


def map_tensors(tensors: Mapping[str, LocalTensor]) -> dict[str, torch.Tensor]:
    """CPU tensors of these bytes. What is written to them stays in memory and never reaches the files.

    Raises:
        FileNotFoundError: a file is gone, as those of a cache may be.
        ModelError: a file is shorter than it should be, or a dtype is not one that PyTorch has.
    """
    files: dict[Path, mmap.mmap] = {}
    for tensor in tensors.values():
        if tensor.path not in files and tensor.end > tensor.start:
            with tensor.path.open("rb") as stream:
                # A private mapping: PyTorch wants memory that could be written to, and pages stay shared until somebody does.
                files[tensor.path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _tensor(name, tensor, files) for name, tensor in tensors.items()}


def _tensor(name: str, tensor: LocalTensor, files: Mapping[Path, mmap.mmap]) -> torch.Tensor:
    import torch

    dtype = torch_dtypes().get(tensor.dtype)
    if dtype is None:
        raise ModelError(f"{tensor.path.name} has the tensor {name} of dtype {tensor.dtype}, which cannot be computed with")
    if tensor.start == tensor.end:
        return torch.empty(tensor.shape, dtype=dtype)
    mapped = files[tensor.path]
    if tensor.end > len(mapped):
        raise ModelError(f"{tensor.path.name} is too short to hold the tensor {name}: was it downloaded whole?")
    flat = torch.frombuffer(mapped, dtype=dtype, count=(tensor.end - tensor.start) // dtype.itemsize, offset=tensor.start)
    return flat.view(tensor.shape)
