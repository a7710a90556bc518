"""What a model is made of, in one file: its configuration, the digest of the client's part, and each block's digest and tensors.

A manifest fixes the bytes of every block before any of them is there. `petalnet convert` writes one beside a model's files, and a server
that has a whole model makes one for those that have none of it.

A block's *payload* is the bytes of its tensors one after the other, in order of their canonical names (`models.identity`), cut into chunks
of `CHUNK_BYTES` of which the last may be shorter. Chunks are what peers send each other, so each has a digest of its own.

Manifests come from strangers too: reading one checks every field, and its sizes are bounded.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from petalnet.errors import ModelError
from petalnet.models.files import DTYPE_BYTES
from petalnet.models.identity import VOLATILE_FIELDS, block_digests, client_digest, config_hash, empty_model, key_of
from petalnet.models.payload import Payload

if TYPE_CHECKING:
    from petalnet.models.anatomy import Partition
    from petalnet.models.checkpoint import ModelSource

MANIFEST_FILE = "petalnet_manifest.json"
CHUNK_BYTES = 4 * 1024 * 1024
"""Small enough that a wrong chunk costs little and that several peers share even a small block; a block of a 70B model has 400 of them."""

MAX_MANIFEST_BYTES = 16 * 1024 * 1024
"""A mixture of 60 blocks with 256 experts each takes 7 MB."""
MAX_BLOCKS = 4096
MAX_TENSORS = 1 << 15
"""Of one block."""
MAX_TENSORS_IN_ALL = 1 << 18
"""Of all blocks: each takes half a kilobyte in memory. The largest mixtures of 2025 (60 blocks of 384 experts) have 140 000."""
MAX_BLOCK_BYTES = 1 << 40
MAX_DIMENSIONS = 8
MAX_NAME = 128
MOST_IN_CONFIG = {
    **dict.fromkeys(("position", "size", "dim", "embd", "d_model"), 1 << 25),
    **{"layer": MAX_BLOCKS, "label": 1 << 16},
    **dict.fromkeys(("head", "expert"), 1 << 16),
}
"""By what is in a field's name, the first that is: as many layers as blocks, and positions for the longest contexts of today's models
(10 million). Lists and tables as long as one of these numbers says are made before any weight is looked at."""
MAX_DEPTH = 16
"""Of tables within tables of a configuration."""
CODE_FIELDS = frozenset(("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"))
"""Fields of a configuration, or of one within it, by which the library finds code to run, some of it on a hub."""

_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\w.\-]{1,256}", re.ASCII)
_PREFIX = re.compile(r"[\w.\-]{0,256}", re.ASCII)


@dataclass(frozen=True)
class BlockEntry:
    """One block of a model. Making one checks that its parts fit together, whoever makes it.

    Attributes:
        digest: BLAKE3 over its tensors (`models.identity`), in hex.
        tensors: (canonical name, dtype as safetensors writes it, shape) of each, sorted by name.
        nbytes: of its payload.
        chunks: BLAKE3 of each chunk of the payload, in hex; empty where they are not known.
        prefix: what the names of its tensors begin with in the files of the model ("model.layers.3."); not part of what the block is.

    Raises:
        ModelError: it makes no sense.
    """

    digest: str
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    nbytes: int
    chunks: tuple[str, ...] = ()
    prefix: str = ""

    def __post_init__(self) -> None:
        names = [name for name, _, _ in self.tensors]
        if not names or any(left >= right for left, right in pairwise(names)):
            raise ModelError("the tensors of a block are not sorted by name, one of them is there twice, or there are none")
        if self.nbytes != sum(size for _, size in self._sizes()) or not 0 < self.nbytes <= MAX_BLOCK_BYTES:
            raise ModelError("the size of a block is not that of its tensors, or is out of range")
        if self.chunks and len(self.chunks) != self.num_chunks:
            raise ModelError(f"a block of {self.nbytes} bytes has {self.num_chunks} chunks, {len(self.chunks)} are listed")

    @property
    def num_chunks(self) -> int:
        return -(-self.nbytes // CHUNK_BYTES)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """Bytes [start, end) of the payload that make a chunk."""
        return index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, self.nbytes)

    def _sizes(self) -> list[tuple[str, int]]:
        sizes = []
        for name, dtype, shape in self.tensors:
            size = DTYPE_BYTES[dtype]
            for dimension in shape:
                size *= dimension
            sizes.append((name, size))
        return sizes

    @cached_property
    def ranges(self) -> Mapping[str, tuple[int, int]]:
        """Bytes [start, end) of the payload that each tensor takes, by its canonical name."""
        ranges, start = {}, 0
        for name, size in self._sizes():
            ranges[name] = (start, start + size)
            start += size
        return ranges

    @cached_property
    def header(self) -> bytes:
        """What stands before the payload in a safetensors file of canonical names: 8 bytes of length, then JSON, padded to 8 bytes."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, dtype, shape in self.tensors:
            table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": list(self.ranges[name])}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def encode(self) -> bytes:
        """The entry as bytes, without its prefix: the same bytes for the same block, whoever has it in which files."""
        return _dump(self._fields())

    @cached_property
    def list_digest(self) -> str:
        """BLAKE3 of `encode()`, in hex: by this, two peers that have the same list of chunks for a block know it."""
        return blake3(self.encode()).hexdigest()

    @classmethod
    def decode(cls, data: bytes) -> BlockEntry:
        """The inverse of `encode`. Raises ModelError."""
        return cls._of(_load(data))

    def _fields(self) -> dict[str, Any]:
        tensors = [[name, dtype, list(shape)] for name, dtype, shape in self.tensors]
        return {"digest": self.digest, "nbytes": self.nbytes, "tensors": tensors, "chunks": list(self.chunks)}

    @classmethod
    def _of(cls, fields: Any) -> BlockEntry:
        fields = _table(fields, "a block")
        tensors = tuple(_tensor(entry) for entry in _list(fields.get("tensors"), MAX_TENSORS, "tensors"))
        chunks = tuple(_hex(chunk) for chunk in _list(fields.get("chunks", []), MAX_BLOCK_BYTES // CHUNK_BYTES, "chunks"))
        prefix = fields.get("prefix", "")
        if type(prefix) is not str or not _PREFIX.fullmatch(prefix):
            raise ModelError("the prefix of a block's names is none")
        return cls(_hex(fields.get("digest")), tensors, _integer(fields.get("nbytes"), MAX_BLOCK_BYTES), chunks, prefix)


@dataclass(frozen=True)
class Manifest:
    """A whole model.

    Attributes:
        name: what it is called; a label.
        config: the content of its config.json.
        client_digest: of the client's part (`models.identity`), in hex.
        blocks: all of them, in order.

    Raises:
        ModelError: it has no blocks, or too many.
    """

    name: str
    config: dict[str, Any]
    client_digest: str
    blocks: tuple[BlockEntry, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.blocks) <= MAX_BLOCKS:
            raise ModelError(f"a manifest lists {len(self.blocks)} blocks; 1 to {MAX_BLOCKS} are possible")

    @classmethod
    def of(cls, source: ModelSource, blocks: Sequence[BlockEntry]) -> Manifest:
        """The manifest of a model whose blocks have been described. Raises ModelError where its files cannot be read."""
        config_file = source.file("config.json")
        if config_file is None:
            raise ModelError(f"{source.name} has no config.json: not a model in Hugging Face format")
        return cls(_label(source.name), _table(_load(config_file.read_bytes()), "config.json"), client_digest(source), tuple(blocks))

    @property
    def model_key(self) -> str:
        """The key under which the model's servers are found.

        Raises:
            ModelError: the configuration is of no family that the library knows, or of a model of another number of blocks.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from petalnet.models.anatomy import text_config

        try:
            config = CONFIG_MAPPING[self.config["model_type"]].from_dict(self.plain_config())
            count = text_config(config).num_hidden_layers
        except Exception as error:  # whatever a stranger's configuration makes the library's classes raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"the configuration in the manifest of {self.name} cannot be used: {reason}") from error
        if count != len(self.blocks):
            raise ModelError(f"the manifest of {self.name} lists {len(self.blocks)} blocks, and its configuration says {count}")
        return key_of(config_hash(config), self.client_digest)

    def plain_config(self) -> dict[str, Any]:
        """A copy of the configuration without what the model's key does not cover: whoever gave the manifest may have put there what they
        like. A dtype is left, where it is one that models are run in.
        """
        dtypes = {key: value for key in ("dtype", "torch_dtype") if (value := self.config.get(key)) in ("float32", "bfloat16", "float16")}
        kept = {key: value for key, value in self.config.items() if key not in VOLATILE_FIELDS}
        return {**_without_code(kept), **dtypes}

    def without_chunks(self) -> Manifest:
        """The same model without the digests of chunks, which are a hundredth of a per mille of it but most of a manifest."""
        return replace(self, blocks=tuple(replace(block, chunks=()) for block in self.blocks))

    def to_json(self) -> bytes:
        """The manifest as the content of `MANIFEST_FILE`."""
        blocks = [{**block._fields(), "prefix": block.prefix} for block in self.blocks]
        return _dump({"name": self.name, "config": self.config, "client_digest": self.client_digest, "blocks": blocks})

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """The inverse of `to_json`; fields that this version does not know are left out.

        Raises:
            ModelError: it is too long, no JSON, or a field is missing, of the wrong type or out of range.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ModelError(f"a manifest of {len(data)} bytes is too long; {MAX_MANIFEST_BYTES} are allowed")
        fields = _table(_load(data), "a manifest")
        name = fields.get("name")
        if type(name) is not str or len(name) > MAX_NAME or not name.isprintable():
            raise ModelError(f"a manifest needs a name: printable text of at most {MAX_NAME} characters")
        listed = [_table(block, "a block") for block in _list(fields.get("blocks"), MAX_BLOCKS, "blocks")]
        if sum(len(_list(block.get("tensors"), MAX_TENSORS, "tensors")) for block in listed) > MAX_TENSORS_IN_ALL:
            raise ModelError(f"a manifest lists more than {MAX_TENSORS_IN_ALL} tensors")
        blocks = tuple(BlockEntry._of(block) for block in listed)
        config = _table(fields.get("config"), "the configuration in a manifest")
        _require_bounds(config)
        return cls(name, config, _hex(fields.get("client_digest")), blocks)


def make_manifest(source: ModelSource, *, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of a model whose files are here, digests of chunks included. Reads all of its blocks.

    Args:
        progress: called after each block with how many are done, and of how many.

    Raises:
        ModelError: the model cannot be split, or its files cannot be read.
    """
    from petalnet.models.anatomy import partition

    parts = partition(empty_model(source), source.tensor_names())
    blocks = []
    for index in range(len(parts.blocks)):
        entry, payload = describe_block(source, parts, index)
        blocks.append(replace(entry, chunks=payload.chunks(CHUNK_BYTES)))
        if progress is not None:
            progress(index + 1, len(parts.blocks))
    return Manifest.of(source, blocks)


def read_manifest(source: ModelSource, key: str) -> Manifest | None:
    """The manifest that lies beside a model's files; None where there is none.

    Args:
        key: the model's.

    Raises:
        ModelError: it is damaged, or that of another model.
    """
    path = source.file(MANIFEST_FILE)
    if path is None:
        return None
    manifest = Manifest.parse(path.read_bytes())
    if manifest.model_key != key:
        raise ModelError(f"the manifest of {source.name} ({MANIFEST_FILE}) is that of another model: remove it, or make it anew")
    return manifest


def require_listed(source: ModelSource, key: str, first: int, digests: Sequence[str]) -> None:
    """Raises ModelError where blocks from `first` on are others than the manifest beside the model's files lists, if there is one.

    What was fetched of such a block is not used again.
    """
    manifest = read_manifest(source, key)
    for index, digest in enumerate(digests, first):
        if manifest is None or (index < len(manifest.blocks) and manifest.blocks[index].digest == digest):
            continue
        what = f"block {index} of {source.name} is not what its manifest ({MANIFEST_FILE}) says"
        if source.folder is not None:
            raise ModelError(f"{what}: the files are damaged, or were changed since; make it anew, or remove it")
        prefix = manifest.blocks[index].prefix if index < len(manifest.blocks) else ""
        source.files.forget([name for name in source.tensor_names() if prefix and name.startswith(prefix)])
        raise ModelError(f"{what}: start again to fetch it anew")


def describe_block(source: ModelSource, parts: Partition, index: int) -> tuple[BlockEntry, Payload]:
    """One block of a model whose files are here, without the digests of its chunks, and where its payload lies.

    Raises:
        ModelError: its files cannot be read, or a tensor has a dtype that does not take whole bytes.
    """
    prefix = parts.prefixes[index]
    by_canonical = {name.removeprefix(prefix): name for name in parts.blocks[index]}
    found = source.local(tuple(by_canonical.values()))
    tensors = []
    for canonical, name in sorted(by_canonical.items()):
        tensor = found[name]
        if tensor.dtype not in DTYPE_BYTES:
            raise ModelError(f"the tensor {name} of {source.name} is of the dtype {tensor.dtype}, which is not supported here")
        tensors.append((canonical, tensor.dtype, tuple(tensor.shape)))
    payload = Payload([found[by_canonical[canonical]] for canonical, _, _ in tensors])
    digest = block_digests(source, parts, index, index + 1)[0]
    return BlockEntry(digest, tuple(tensors), payload.size, prefix=prefix), payload


def _label(name: str) -> str:
    """A name as a manifest may carry it."""
    return "".join(char if char.isprintable() else "?" for char in name)[:MAX_NAME]


def _dump(fields: Any) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _load(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"a manifest is damaged: {error}") from error


def _table(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise ModelError(f"{what} is not a table of fields")
    return value


def _without_code(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_code(value) for key, value in config.items() if key not in CODE_FIELDS}
    return [_without_code(value) for value in config] if isinstance(config, list) else config


def _require_bounds(config: Any, key: str = "", depth: int = 0) -> None:
    """Raises ModelError where a configuration has a number by which the library would make endless lists of layers, or of positions."""
    if depth > MAX_DEPTH:
        raise ModelError(f"the configuration in a manifest has more than {MAX_DEPTH} tables within each other")
    if isinstance(config, dict):
        for name, value in config.items():
            _require_bounds(value, name, depth + 1)
    elif isinstance(config, list):
        for value in config:
            _require_bounds(value, key, depth + 1)
    elif type(config) is float and math.isnan(config):
        raise ModelError(f"the configuration in a manifest has {key} that is no number")
    elif type(config) is int:
        most = next((most for part, most in MOST_IN_CONFIG.items() if part in key), MAX_BLOCK_BYTES)
        if not -most <= config <= most:
            raise ModelError(f"the configuration in a manifest has {key} = {config}; {most} is the most that is believed")


def _list(value: Any, most: int, what: str) -> list[Any]:
    if type(value) is not list or len(value) > most:
        raise ModelError(f"the {what} in a manifest are not a list of at most {most}")
    return value


def _integer(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ModelError(f"a size in a manifest is not a whole number up to {most}")
    return value


def _hex(value: Any) -> str:
    if type(value) is not str or not _HEX.fullmatch(value):
        raise ModelError("a digest in a manifest is not 64 hex digits")
    return value


def _tensor(value: Any) -> tuple[str, str, tuple[int, ...]]:
    name, dtype, shape = _list(value, 3, "tensors") if type(value) is list and len(value) == 3 else ("", "", [])
    if type(name) is not str or not _NAME.fullmatch(name) or name == "__metadata__" or type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise ModelError("a tensor in a manifest is not a name, a dtype and a shape")
    return name, dtype, tuple(_integer(dimension, MAX_BLOCK_BYTES) for dimension in _list(shape, MAX_DIMENSIONS, "dimensions"))
