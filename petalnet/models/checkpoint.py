"""A model's files: configuration and tensors, from a local folder or a hub repository, reading only what is asked for.

Tensors come from safetensors files, mapped into memory: a tensor that is never touched costs nothing, and those of other blocks are
not even opened. Of a hub repository only the files that hold a wanted tensor are fetched.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petalnet.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model"
"""The small model that ships in the package."""

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors format allows."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype (as safetensors writes it, e.g. "BF16"), shape, and the range of bytes in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


Fetch = Callable[[str], Path | None]
"""From the name of a file of a folder or a hub repository to where it is on this machine; None where there is none of that name."""


def open_files(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[str, Path | None, Fetch]:
    """The name of a folder or of a hub repository, the folder (None for a repository), and what finds its files.

    Raises:
        ModelError: it can be neither. Whether a repository is there shows when the first file is fetched.
    """
    path, text = Path(name_or_path).expanduser(), str(name_or_path)
    if path.is_dir():
        folder = path.resolve()
        return folder.name, folder, lambda file: folder / file if (folder / file).is_file() else None
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"{text} is neither a folder nor the id of a hub repository (owner/name)")
    return text, None, _hub_fetcher(text, revision, token, cache_dir)


class ModelSource:
    """A model in Hugging Face format: a folder, or a hub repository at one revision.

    Attributes:
        name: what it was asked for by, for people to read.
        folder: where the files are, None for a hub repository.
    """

    def __init__(self, name: str, folder: Path | None, fetch: Fetch) -> None:
        self.name = name
        self.folder = folder
        self._fetch = fetch
        self._headers: dict[Path, dict[str, TensorInfo]] = {}

    @classmethod
    def open(
        cls,
        name_or_path: str | Path | None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> ModelSource:
        """Find a model; None means the demo model of the package. Reads the configuration, no tensor.

        Raises:
            ModelError: there is no such folder or repository, or it holds no configuration of a known family.
        """
        given = DEMO_MODEL if name_or_path is None else name_or_path
        name, folder, fetch = open_files(given, revision=revision, token=token, cache_dir=cache_dir)
        source = cls(name if name_or_path is not None else "petalnet-demo", folder, fetch)
        _ = source.config
        return source

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, of the library's own class for the family."""
        from transformers import AutoConfig

        file = self._fetch("config.json")
        if file is None:
            raise ModelError(f"{self.name} has no config.json: not a model in Hugging Face format")
        try:
            return AutoConfig.from_pretrained(file.parent)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise ModelError(f"the configuration of {self.name} cannot be used: {str(error).splitlines()[0]}") from error

    @cached_property
    def _files(self) -> dict[str, str]:
        """Which file holds each tensor."""
        index = self._fetch(INDEX_FILE)
        if index is not None:
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                return {str(name): _plain_file_name(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ModelError(f"the index of the tensors of {self.name} is damaged: {error}") from error
        single = self._fetch(SINGLE_FILE)
        if single is not None:
            return dict.fromkeys(self._header(single), SINGLE_FILE)
        if self._fetch("pytorch_model.bin") or self._fetch("pytorch_model.bin.index.json"):
            raise ModelError(f"{self.name} has only pytorch_model.bin, which is a pickle and can run code: convert it to safetensors first")
        raise ModelError(f"{self.name} has no weights ({SINGLE_FILE} or {INDEX_FILE})")

    def file(self, name: str) -> Path | None:
        """Another file of the model (e.g. "generation_config.json"), fetched if need be; None where there is none of that name."""
        return self._fetch(name)

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors, as the files have them. Raises ModelError where there are no weights in safetensors format."""
        return tuple(self._files)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; of a hub repository its file is fetched."""
        file = self._fetch(self._files[name])
        if file is None:
            raise ModelError(f"{self.name} lacks the file {self._files[name]}, which should hold {name}")
        try:
            return self._header(file)[name]
        except KeyError as error:
            raise ModelError(f"{file.name} of {self.name} lacks the tensor {name}") from error

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names, on the CPU, in the checkpoint's dtype, mapped from the files.

        Raises:
            ModelError: a file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.info(name).file, []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    tensors.update((name, opened.get_tensor(name)) for name in wanted)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file.name} of {self.name} cannot be read: {error}") from error
        return tensors

    def _header(self, file: Path) -> dict[str, TensorInfo]:
        if file not in self._headers:
            try:
                self._headers[file] = read_header(file)
            except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
                raise ModelError(f"{file.name} of {self.name} is not a safetensors file: {error}") from error
        return self._headers[file]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The table at the start of a safetensors file: 8 bytes of length (little-endian), then JSON, then the data.

    Raises whatever reading and taking apart a damaged one raises: OSError, ValueError, KeyError, TypeError, struct.error.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("its header is longer than the file")
        table: Any = json.loads(stream.read(length))
    if not isinstance(table, dict):
        raise ValueError("its header is not a table")
    data = 8 + length
    tensors = {}
    for name, entry in table.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= size - data:
                raise ValueError(f"the tensor {name} lies outside of the file (was it downloaded whole?)")
            tensors[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), data + start, data + end)
    return tensors


def _plain_file_name(file: str) -> str:
    """An index may name only files beside it."""
    if Path(file).name != file:
        raise ValueError(f"{file!r} is not a plain file name")
    return file


def _hub_fetcher(repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None) -> Fetch:
    """A function that downloads one file of a repository (or finds it in the cache); None where the repository has no such file."""
    known: dict[str, Path | None] = {}

    def fetch(file: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if file in known:
            return known[file]
        try:
            known[file] = Path(hf_hub_download(repo_id, file, revision=revision, token=token, cache_dir=cache_dir))
        except LocalEntryNotFoundError as error:
            raise ModelError(f"there is no folder {repo_id}, and the hub cannot be reached to fetch a repository of that name") from error
        except EntryNotFoundError:
            known[file] = None
        except GatedRepoError as error:
            raise ModelError(f"{repo_id} is gated: accept its terms on the hub and log in, or pass a token") from error
        except RevisionNotFoundError as error:
            raise ModelError(f"{repo_id} has no revision {revision}") from error
        except RepositoryNotFoundError as error:
            raise ModelError(f"there is no folder {repo_id} and no such hub repository (or it is private: pass a token)") from error
        except HFValidationError as error:
            raise ModelError(f"{repo_id} is neither a folder nor the id of a hub repository (owner/name)") from error
        except (HfHubHTTPError, OSError) as error:
            raise ModelError(f"{file} of {repo_id} cannot be fetched: {str(error).splitlines()[0]}") from error
        return known[file]

    return fetch
