"""Tensors whose memory is a file: mapped, not read, so that those that are never touched cost nothing."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from contextlib import suppress
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


RUN_BYTES = 64 * 1024 * 1024
"""Tensors that lie side by side are mapped together up to this size: each mapping takes a file descriptor, and the memory of one is given
back when none of its tensors is there any more."""


def map_tensors(tensors: Mapping[str, LocalTensor]) -> dict[str, torch.Tensor]:
    """CPU tensors of these bytes. What is written to them stays in memory and never reaches the files.

    Raises:
        FileNotFoundError: a file is gone, as those of a cache may be.
        ModelError: a file is shorter than it should be, or a dtype is not one that PyTorch has.
    """
    mapped: dict[str, torch.Tensor] = {}
    for path, run in _runs(tensors):
        start = run[0][1].start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        end = max(tensor.end for _, tensor in run)
        with path.open("rb") as stream:
            if end > stream.seek(0, 2):
                raise ModelError(f"{path.name} is too short to hold the tensor {run[-1][0]}: was it downloaded whole?")
            # A private mapping: PyTorch wants memory that could be written to, and pages stay the file's until somebody does. Of no more
            # than what is wanted: the kernel refuses private mappings that are larger than its memory.
            memory = mmap.mmap(stream.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start) if end > start else b""
        mapped.update({name: _tensor(name, tensor, memory, tensor.start - start) for name, tensor in run})
    return {name: mapped[name] for name in tensors}


def read_tensor(tensor: LocalTensor) -> torch.Tensor:
    """A CPU tensor of these bytes in memory of its own: for one that is not to stay as it is, whose pages would be this process's for as
    long as its mapping is.

    Raises: as `map_tensors`.
    """
    size = tensor.end - tensor.start
    if size == 0:
        return _tensor(tensor.path.name, tensor, b"", 0)
    # Of the kernel: the allocator keeps what is given back to it, and by how much that is, it takes more for later tensors.
    memory = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    left = memoryview(memory)
    with tensor.path.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        while left:
            count = stream.readinto(left)
            if not count:
                raise ModelError(f"{tensor.path.name} is too short: was it downloaded whole?")
            left = left[count:]
    return _tensor(tensor.path.name, tensor, memory, 0)


def give_back_freed() -> None:
    """Have the C library give back to the kernel what this process has freed; where there is another one, nothing happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _runs(tensors: Mapping[str, LocalTensor]) -> Iterator[tuple[Path, list[tuple[str, LocalTensor]]]]:
    """Tensors by file, in order of their places there, those together that are mapped together."""
    run: list[tuple[str, LocalTensor]] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].path, item[1].start)):
        if run and (run[0][1].path != tensor.path or tensor.end - run[0][1].start > RUN_BYTES):
            yield run[0][1].path, run
            run = []
        run.append((name, tensor))
    if run:
        yield run[0][1].path, run


def _tensor(name: str, tensor: LocalTensor, memory: mmap.mmap | bytes, offset: int) -> torch.Tensor:
    import torch

    dtype = torch_dtypes().get(tensor.dtype)
    if dtype is None:
        raise ModelError(f"{tensor.path.name} has the tensor {name} of dtype {tensor.dtype}, which cannot be computed with")
    if tensor.start == tensor.end:
        return torch.empty(tensor.shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=dtype, count=(tensor.end - tensor.start) // dtype.itemsize, offset=offset)
    return flat.view(tensor.shape)
