"""Where a model's files come from, and where its tensors lie in them.

`Files` is what a source of models has to offer: small files by name, what tensors there are, and the bytes of those that are wanted on
this machine. A folder is one such source (here); a hub repository is another (`models.hub`).
"""

from __future__ import annotations

import json
import struct
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

from petalnet.errors import ModelError
from petalnet.models import pickled

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SINGLE_PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLE_ENDING = ".bin"
HEADER_ERRORS = (OSError, ValueError, KeyError, TypeError, struct.error)
"""What reading and taking apart a damaged header raises."""
LENGTH_BYTES = 8
"""At the start of a safetensors file: the length of its header, little-endian."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors format allows."""
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""Bytes an element of each dtype takes, named as safetensors writes them."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without its bytes: dtype (as safetensors writes it, e.g. "BF16"), shape, and how many bytes it takes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class LocalTensor:
    """A tensor whose bytes are [start, end) of a file on this machine, in row-major order."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def info(self) -> TensorInfo:
        """What is known without the bytes."""
        return TensorInfo(self.dtype, self.shape, self.end - self.start)


Window = tuple[int, int]
"""Bytes [start, end) of a tensor."""


class Files(Protocol):
    """Where a model's files come from."""

    def file(self, name: str) -> Path | None:
        """A small file of the model (e.g. "config.json") on this machine, fetched if need be; None where there is none of that name.

        Raises:
            ModelError: it cannot be told or fetched.
        """

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name. No weights are read, and no header before a tensor of its file is asked for.

        Raises:
            ModelError: there are no weights; when an entry is looked at, that its file is missing or damaged.
        """

    def local(self, names: Collection[str]) -> Mapping[str, LocalTensor]:
        """Where these tensors lie on this machine; what is not here yet is fetched. Blocks for as long as that takes.

        Raises:
            ModelError: a file is missing, damaged or cannot be fetched.
            UsageError: there is no room for them on the disk.
        """

    def sample(self, windows: Mapping[str, Sequence[Window]]) -> Mapping[str, bytes]:
        """Some bytes of tensors, without fetching the whole of them where that can be spared; windows of one tensor are joined."""
        return {name: read_windows(tensor, windows[name]) for name, tensor in self.local(windows).items()}

    def fingerprint(self, name: str) -> str:
        """A text that is another one whenever the bytes of the file that holds a tensor may be others; nothing is fetched for it."""
        (tensor,) = self.local([name]).values()
        return file_fingerprint(tensor.path)

    def forget(self, names: Collection[str]) -> None:
        """Do not use again what was fetched of these tensors, since it is damaged. Files that were not fetched stay as they are."""
        return


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file that need not be on this machine."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class CheckpointFiles(Files, Protocol):
    """Files laid out as the library saves them: one file of weights, or several with an index of which tensor is in which."""

    name: str
    """What the model is called, for messages."""

    @abstractmethod
    def has(self, file: str) -> bool:
        """Whether there is a file of that name. Its content is not fetched."""

    @abstractmethod
    def header(self, file: str) -> Mapping[str, Place]:
        """The tensors of one file of weights. Raises ModelError where it is missing or damaged."""

    @cached_property
    def file_of(self) -> Mapping[str, str]:
        """Which file holds each tensor. Raises ModelError where there are no weights."""
        for single, index in ((SINGLE_FILE, INDEX_FILE), (SINGLE_PICKLE, PICKLE_INDEX)):
            if self.has(single):
                return dict.fromkeys(self.header(single), single)
            if (path := self.file(index)) is not None:
                return read_index(path, self.name)
        raise ModelError(f"{self.name} has no weights ({SINGLE_FILE} or {INDEX_FILE})")

    def tensors(self) -> Mapping[str, TensorInfo]:
        return _Infos(self.file_of, self._info)

    def place(self, name: str) -> Place:
        """Where a tensor lies in its file. Raises ModelError where the file lacks it."""
        file = self.file_of[name]
        try:
            return self.header(file)[name]
        except KeyError as error:
            raise ModelError(f"{file} of {self.name} lacks the tensor {name}") from error

    def _info(self, name: str) -> TensorInfo:
        place = self.place(name)
        return TensorInfo(place.dtype, place.shape, place.end - place.start)


class FolderFiles(CheckpointFiles):
    """The files of a folder.

    Attributes:
        folder: where they are.
        name: of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self._headers: dict[str, dict[str, Place]] = {}

    def file(self, name: str) -> Path | None:
        return self.folder / name if self.has(name) else None

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def header(self, file: str) -> Mapping[str, Place]:
        if file not in self._headers:
            if not self.has(file):
                raise ModelError(f"{self.name} lacks the file {file}, which should hold some of its tensors")
            tensors = read_tensors(self.folder / file, self.name)
            self._headers[file] = {name: Place(one.dtype, one.shape, one.start, one.end) for name, one in tensors.items()}
        return self._headers[file]

    def local(self, names: Collection[str]) -> Mapping[str, LocalTensor]:
        return {name: in_file(self.folder / self.file_of[name], self.place(name)) for name in names}

    def fingerprint(self, name: str) -> str:
        return file_fingerprint(self.folder / self.file_of[name])


def in_file(path: Path, place: Place, offset: int = 0) -> LocalTensor:
    """A tensor whose file, from byte `offset` on, lies in a file on this machine."""
    return LocalTensor(path, place.dtype, place.shape, place.start - offset, place.end - offset)


def read_windows(tensor: LocalTensor, windows: Sequence[Window]) -> bytes:
    """Some of a tensor's bytes."""
    parts = []
    with tensor.path.open("rb") as stream:
        for start, end in windows:
            stream.seek(tensor.start + start)
            parts.append(stream.read(end - start))
    return b"".join(parts)


def file_fingerprint(path: Path) -> str:
    """Path, size and time of change of a file on this machine."""
    status = path.stat()
    return f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"


def read_tensors(path: Path, model: str, file: str = "") -> dict[str, LocalTensor]:
    """The tensors of a file of weights, safetensors or PyTorch's own.

    Args:
        model, file: what model and file are called, for messages; the file's name ends with ".bin" if it is one of PyTorch's own.
    Raises:
        ModelError: it is damaged, or cannot be read without running what is in it; the message names the model.
    """
    file = file or path.name
    if file.endswith(PICKLE_ENDING):
        found = pickled.read(path, f"{file} of {model}")
        return {name: LocalTensor(path, one.dtype, one.shape, one.start, one.end) for name, one in found.items()}
    try:
        return read_header(path)
    except HEADER_ERRORS as error:
        raise ModelError(f"{file} of {model} is not a safetensors file: {error}") from error


def read_header(path: Path) -> dict[str, LocalTensor]:
    """The table at the start of a safetensors file: 8 bytes of length (little-endian), then JSON, then the data.

    Raises HEADER_ERRORS where it is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = header_length(stream.read(LENGTH_BYTES), size)
        places = parse_header(stream.read(length), size)
    return {name: in_file(path, place) for name, place in places.items()}


def header_length(first: bytes, file_size: int) -> int:
    """The length of a header from the first 8 bytes of a file. Raises ValueError or struct.error where it makes no sense."""
    (length,) = struct.unpack("<Q", first)
    if length > min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES):
        raise ValueError("its header is longer than the file")
    return int(length)


def parse_header(header: bytes, file_size: int) -> dict[str, Place]:
    """Where each tensor lies in a file, from the header after its length; all checked. Raises ValueError, KeyError or TypeError."""
    table: Any = json.loads(header)
    if not isinstance(table, dict):
        raise ValueError("its header is not a table")
    data = LENGTH_BYTES + len(header)
    places = {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
            raise ValueError(f"the shape or place of the tensor {name} makes no sense")
        if not start <= end <= file_size - data:
            raise ValueError(f"the tensor {name} lies outside of the file (was it downloaded whole?)")
        if entry["dtype"] in DTYPE_BYTES and prod(shape) * DTYPE_BYTES[entry["dtype"]] != end - start:
            raise ValueError(f"the tensor {name} takes another number of bytes than its shape says")
        places[name] = Place(str(entry["dtype"]), shape, data + start, data + end)
    return places


def read_index(path: Path, model: str) -> dict[str, str]:
    """Which file beside an index holds each tensor. Raises ModelError where it is damaged."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): _plain_file_name(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"the index of the tensors of {model} is damaged: {error}") from error


def _plain_file_name(file: str) -> str:
    """An index may name only files beside it."""
    if Path(file).name != file:
        raise ValueError(f"{file!r} is not a plain file name")
    return file


class _Infos(Mapping[str, TensorInfo]):
    """What is known of each tensor, found out when it is asked for."""

    def __init__(self, names: Mapping[str, str], info: Callable[[str], TensorInfo]) -> None:
        self._names = names
        self._info = info

    def __getitem__(self, name: str) -> TensorInfo:
        if name not in self._names:
            raise KeyError(name)
        return self._info(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
