"""Checkpoints as PyTorch's own files (`pytorch_model.bin`): where their tensors lie, found without running anything that is in them.

Such a file is a zip archive of a pickle and of the bytes of each storage, which are not compressed. Only the pickle is read, by
`torch.load(weights_only=True)`, which makes tensors and plain containers and nothing else; onto the meta device, which leaves with each
storage where its bytes are in the file. So the tensors of these files are mapped and digested as those of any other format.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # the name of an error, nothing else of it
from typing import TYPE_CHECKING, Any

from petalnet.errors import ModelError

if TYPE_CHECKING:
    import torch

CONVERT = "convert it to safetensors"
DAMAGED = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError, zipfile.BadZipFile)
"""What PyTorch raises at a damaged archive, or at a pickle that is none."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's dtype (as safetensors writes it), its shape, and the range of bytes that it takes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read(path: Path, what: str) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Args:
        what: how messages name the file.
    Raises:
        ModelError: it is damaged, holds something else than tensors, or is in the format from before PyTorch 1.6, which cannot be mapped;
            the message says what to do.
    """
    import torch

    try:
        if not zipfile.is_zipfile(path):
            raise ModelError(f"{what} is damaged, or was saved by PyTorch before 1.6: {CONVERT}")
        _require_plain(path, what)
        found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except ModelError:
        raise
    except UnpicklingError as error:
        raise ModelError(f"{what} is damaged, or holds more than tensors and could run code: {CONVERT} where you trust it") from error
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{what} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{what} holds no table of tensors: {CONVERT}")
    size = path.stat().st_size
    return {str(name): _stored(tensor, str(name), size, what) for name, tensor in found.items() if not str(name).startswith("_")}


def _require_plain(path: Path, what: str) -> None:
    """What the archive's bytes mean is known only where they are as PyTorch writes them on today's machines."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ModelError(f"{what} is compressed: {CONVERT}")
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise ModelError(f"{what} was saved on a machine with another order of bytes: {CONVERT}")


def _stored(tensor: Any, name: str, file_size: int, what: str) -> StoredTensor:
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise ModelError(f"{what} has {name}, which is no plain tensor: {CONVERT}")
    dtype = _names().get(tensor.dtype)
    if dtype is None:
        raise ModelError(f"{what} has the tensor {name} of dtype {tensor.dtype}, which cannot be read: {CONVERT}")
    if not tensor.is_contiguous():
        raise ModelError(f"{what} has the tensor {name}, whose numbers do not lie in order: {CONVERT}")
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if not isinstance(offset, int):
        raise ModelError(f"{what} does not tell where the tensor {name} lies: {CONVERT}")
    start = offset + int(tensor.storage_offset()) * tensor.dtype.itemsize
    end = start + tensor.numel() * tensor.dtype.itemsize
    if not 0 <= start <= end <= file_size:
        raise ModelError(f"{what} is damaged: the tensor {name} lies outside of it")
    return StoredTensor(dtype, tuple(tensor.shape), start, end)


def _names() -> dict[torch.dtype, str]:
    from petalnet.models.mapped import torch_dtypes

    return {dtype: name for name, dtype in torch_dtypes().items()}
