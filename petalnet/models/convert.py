"""A model written anew, in the form that suits a swarm: one safetensors file a block, one for all that belongs to no block, and a manifest.

A server then needs only the files of its blocks, a client one, and peers can check every chunk that they get from each other. Names and
bytes of tensors are those of the checkpoint, so the library reads the folder as any other, and digests and key of the model stay the same,
unless another dtype is asked for. Bytes go from file to file: no more than a tensor is ever in memory.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from petalnet.errors import ModelError, UsageError
from petalnet.models.anatomy import partition
from petalnet.models.checkpoint import ModelSource
from petalnet.models.files import DTYPE_BYTES, INDEX_FILE, LocalTensor, TensorInfo
from petalnet.models.identity import client_digest, empty_model
from petalnet.models.manifest import CHUNK_BYTES, MANIFEST_FILE, MAX_MANIFEST_BYTES, BlockEntry, Manifest, describe_block
from petalnet.models.unfinished import CONFIG_FILE, require_room, unfinished

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CLIENT_FILE = "client.safetensors"
BLOCK_FILE = "block-{:03}.safetensors"
OTHER_FILES = (
    *(CONFIG_FILE, "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "qwen.tiktoken"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json"),
    *("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
"""What is copied beside the weights, where the model has it: configuration, tokenizer, model card and terms of use. No code."""
STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The floating-point dtypes that another one can be asked for in place of, as safetensors writes them and as torch does."""
COPY_BYTES = 2**22
ROOM_BYTES = 2**24
"""What is reckoned for all files that are not weights, headers and manifest included."""

Progress = Callable[[int, int], None]
"""Told how many bytes of weights are written, and of how many."""


@dataclass(frozen=True)
class Converted:
    """A model that was written.

    Attributes:
        folder: where it is.
        manifest: what it is made of.
        key: under which its servers are found.
        nbytes: of all tensors.
    """

    folder: Path
    manifest: Manifest
    key: str
    nbytes: int


@dataclass(frozen=True)
class _Piece:
    """A tensor that is to be written: what it is in the source, and in which dtype it is to be written."""

    name: str
    stored: TensorInfo
    info: TensorInfo


def convert(
    source: ModelSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    replace_model: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a model into a folder, which then holds all of it; after an error it is as before.

    Args:
        source: the model; its tensors are fetched block by block.
        folder: where to; made where it is not there, must be empty otherwise.
        dtype: of floating-point tensors, in place of the checkpoint's; those that the library keeps in float32 are left alone. Another
            dtype is another model: it has a key of its own.
        name: what the manifest calls it; the source's name by default.
        replace_model: whether `folder` may hold a model, which is replaced.
        progress: told how far it is.

    Raises:
        ModelError: the model cannot be split, or read.
        UsageError: `folder` holds something, or the model cannot be written in that dtype.
        PetalnetError: the disk is full.
    """
    if source.folder is not None and source.folder == folder.resolve():
        raise UsageError(f"{folder} is the model itself: name another folder")
    model = empty_model(source)
    parts = partition(model, source.tensor_names())
    kept = _kept_as_they_are(source, model, dtype)
    files = {CLIENT_FILE: parts.client, **{BLOCK_FILE.format(index): names for index, names in enumerate(parts.blocks)}}
    pieces = {file: _pieces(source, names, dtype, kept) for file, names in files.items()}
    counter = _Counter(sum(piece.info.nbytes for file in pieces.values() for piece in file), progress)
    require_room(folder, counter.total + ROOM_BYTES)
    with unfinished(folder, replace=replace_model) as new:
        _write_others(source, new, dtype)
        _write_index(new / INDEX_FILE, pieces, counter.total)
        _write_file(source, new / CLIENT_FILE, pieces[CLIENT_FILE], counter)
        written = ModelSource.open(new)
        blocks: list[BlockEntry] = []
        for index in range(len(parts.blocks)):
            file = BLOCK_FILE.format(index)
            _write_file(source, new / file, pieces[file], counter)
            # Read back while it is in the system's cache: digests are of what was written.
            entry, payload = describe_block(written, parts, index)
            blocks.append(replace(entry, chunks=payload.chunks(CHUNK_BYTES)))
        config = json.loads((new / CONFIG_FILE).read_bytes())
        manifest = Manifest((name or source.name)[:128], config, client_digest(written), tuple(blocks))
        text = manifest.to_json()
        # Of the largest models the chunks' digests alone take more than a manifest may; peers then ask each other for them, block by block.
        _write(new / MANIFEST_FILE, text if len(text) <= MAX_MANIFEST_BYTES else manifest.without_chunks().to_json())
    return Converted(folder, manifest, manifest.model_key, counter.total)


class _Counter:
    """Counts written bytes for whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self._done = 0
        self._progress = progress

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self.total)


def _kept_as_they_are(source: ModelSource, model: PreTrainedModel, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Expressions for the names of tensors that the library keeps in float32 whatever it is asked for."""
    if dtype is None:
        return ()
    if getattr(source.config, "quantization_config", None):
        raise UsageError(f"{source.name} is quantized in its files already: convert it without --dtype")
    return tuple(pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype))


def _pieces(source: ModelSource, names: Sequence[str], dtype: torch.dtype | None, kept: tuple[str, ...]) -> list[_Piece]:
    """The tensors of a file in the order in which the safetensors library writes them: longest elements first, so that all are aligned."""
    wanted = next((stored for stored, name in STORED_DTYPES.items() if name == _name_of(dtype)), None)
    pieces = []
    for name in names:
        stored = source.info(name)
        info = stored
        if wanted is not None and stored.dtype in STORED_DTYPES and not any(re.search(pattern, name) for pattern in kept):
            info = TensorInfo(wanted, stored.shape, stored.nbytes // DTYPE_BYTES[stored.dtype] * DTYPE_BYTES[wanted])
        pieces.append(_Piece(name, stored, info))
    return sorted(pieces, key=lambda piece: (-DTYPE_BYTES.get(piece.info.dtype, 1), piece.name))


def _write_file(source: ModelSource, path: Path, pieces: Sequence[_Piece], counter: _Counter) -> None:
    """One safetensors file: the length of the header, the header, and the bytes of its tensors."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for piece in pieces:
        table[piece.name] = {
            "dtype": piece.info.dtype,
            "shape": list(piece.info.shape),
            "data_offsets": [start, start + piece.info.nbytes],
        }
        start += piece.info.nbytes
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    source.local([piece.name for piece in pieces])
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for piece in pieces:
            for part in _bytes_of(source, piece):
                stream.write(part)
                counter.add(len(part))
        _settle(stream)


def _bytes_of(source: ModelSource, piece: _Piece) -> Iterator[memoryview]:
    if piece.info == piece.stored:
        yield from _copied(source, piece.name)
    else:
        import torch

        tensor = source.read_copy(piece.name).to(getattr(torch, STORED_DTYPES[piece.info.dtype]))
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _copied(source: ModelSource, name: str) -> Iterator[memoryview]:
    """A tensor's bytes, a few megabytes at a time; read, not mapped, which would count as memory of this process.

    Raises:
        ModelError: the file is gone, or shorter than it was.
    """
    try:
        tensor, stream = _opened(source, name)
        with stream:
            left = tensor.end - tensor.start
            buffer = memoryview(bytearray(min(COPY_BYTES, left)))
            while left:
                count = stream.readinto(buffer[:left])
                if not count:
                    raise ModelError(f"{tensor.path.name} of {source.name} has become shorter: it ends within {name}")
                yield buffer[:count]
                left -= count
    except OSError as error:
        raise ModelError(f"the tensor {name} of {source.name} cannot be read: {error.strerror or error}") from error


def _opened(source: ModelSource, name: str) -> tuple[LocalTensor, FileIO]:
    """A tensor, and its file at its beginning."""
    tensor = source.local([name])[name]
    try:
        stream = FileIO(tensor.path)
    except FileNotFoundError:  # a node on this machine made room in the cache at just this moment
        tensor = source.local([name])[name]
        stream = FileIO(tensor.path)
    stream.seek(tensor.start)
    return tensor, stream


def _write_others(source: ModelSource, folder: Path, dtype: torch.dtype | None) -> None:
    for name in OTHER_FILES:
        found = source.file(name)
        if found is not None:
            content = found.read_bytes()
            _write(folder / name, _with_dtype(content, dtype) if name == CONFIG_FILE and dtype is not None else content)


def _with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """A configuration, that of its text part included, which says that its weights are of this dtype."""

    def changed(fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        named = {"dtype", "torch_dtype"} & fields.keys()
        return {key: changed(value) for key, value in fields.items() if key not in named} | ({"dtype": text} if named else {})

    text = _name_of(dtype)
    return json.dumps({**changed(json.loads(config)), "dtype": text}, indent=2).encode()


def _name_of(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _write_index(path: Path, pieces: dict[str, list[_Piece]], total: int) -> None:
    weight_map = {piece.name: file for file, found in pieces.items() for piece in found}
    _write(path, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True).encode())


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(content)
        _settle(stream)


def _settle(stream: BinaryIO) -> None:
    """Have what was written on the disk, so that nothing is moved into place whose bytes a power cut could still take."""
    stream.flush()
    os.fsync(stream.fileno())
