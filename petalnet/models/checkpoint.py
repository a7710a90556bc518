"""A model's configuration and tensors, from a local folder or a hub repository, reading only what is asked for.

Tensors are mapped into memory: one that is never touched costs nothing. Of a hub repository only the bytes of wanted tensors are fetched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from petalnet.errors import ModelError
from petalnet.models.files import Files, FolderFiles, LocalTensor, TensorInfo, read_tensors
from petalnet.models.prequantized import require_readable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model"
"""The small model that ships in the package."""


def open_files(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    max_disk_space: int | None = None,
) -> tuple[str, Files]:
    """The name of a folder or of a hub repository, and its files; see `ModelSource.open`.

    Raises:
        ModelError: it can be neither. Whether a repository is there shows when the first file is fetched.
    """
    path, text = Path(name_or_path).expanduser(), str(name_or_path)
    if path.is_dir():
        folder = path.resolve()
        return folder.name, FolderFiles(folder)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"{text} is neither a folder nor the id of a hub repository (owner/name)")
    from petalnet.models.hub import HubFiles

    return text, HubFiles(text, revision=revision, token=token, cache_dir=cache_dir, max_disk_space=max_disk_space)


class ModelSource:
    """A model in Hugging Face format: a folder, or a hub repository at one revision.

    Attributes:
        name: what it was asked for by, for people to read.
        files: where its files come from.
    """

    def __init__(self, name: str, files: Files) -> None:
        self.name = name
        self.files = files
        self._added: dict[str, LocalTensor] = {}

    @classmethod
    def open(
        cls,
        name_or_path: str | Path | None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        max_disk_space: int | None = None,
    ) -> ModelSource:
        """Find a model; None means the demo model of the package. Reads the configuration, no tensor.

        Args:
            revision, token, cache_dir: of a hub repository, as `huggingface_hub` understands them.
            max_disk_space: bytes that weights fetched from hubs and peers may take on this machine's disk; None for no bound.
        Raises:
            ModelError: there is no such folder or repository, or it holds no configuration of a known family.
        """
        given = DEMO_MODEL if name_or_path is None else name_or_path
        name, files = open_files(given, revision=revision, token=token, cache_dir=cache_dir, max_disk_space=max_disk_space)
        source = cls(name if name_or_path is not None else "petalnet-demo", files)
        _ = source.config
        return source

    @property
    def folder(self) -> Path | None:
        """Where the files are, None where they are not in a folder of their own."""
        return self.files.folder if isinstance(self.files, FolderFiles) else None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, of the library's own class for the family."""
        from transformers import AutoConfig

        file = self.file("config.json")
        if file is None:
            raise ModelError(f"{self.name} has no config.json: not a model in Hugging Face format")
        try:
            config = AutoConfig.from_pretrained(file.parent)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise ModelError(f"the configuration of {self.name} cannot be used: {str(error).splitlines()[0]}") from error
        require_readable(config, self.name)
        return config

    def file(self, name: str) -> Path | None:
        """Another file of the model (e.g. "generation_config.json"), fetched if need be; None where there is none of that name."""
        return self.files.file(name)

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors, as the files have them. Raises ModelError where there are no weights."""
        return tuple(self.files.tensors())

    def info(self, name: str) -> TensorInfo:
        """A tensor's dtype, shape and size. Raises ModelError where the file that should hold it is missing or damaged."""
        added = self._added.get(name)
        return self.files.tensors()[name] if added is None else added.info

    def local(self, names: Collection[str]) -> Mapping[str, LocalTensor]:
        """Where these tensors lie on this machine; what is not here yet is fetched.

        Raises:
            ModelError: a file is missing, damaged or cannot be fetched.
            UsageError: there is no room for them on the disk.
        """
        found = {name: self._added[name] for name in names if name in self._added}
        found.update(self.files.local([name for name in names if name not in found]))
        return found

    def add_file(self, path: Path, names: Mapping[str, str]) -> None:
        """Read some tensors from a safetensors file from now on, as long as it is there.

        Args:
            names: from names of this model's tensors to those in the file.
        Raises:
            ModelError: the file is damaged, or lacks one of them.
        """
        found = read_tensors(path, self.name)
        lacking = [inside for inside in names.values() if inside not in found]
        if lacking:
            raise ModelError(f"{path.name} of {self.name} lacks the tensor {lacking[0]}")
        self._added.update({name: found[inside] for name, inside in names.items()})

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names, on the CPU, in the checkpoint's dtype, mapped from the files.

        Raises:
            ModelError: a file is missing, damaged or cannot be fetched.
            UsageError: there is no room for them on the disk.
        """
        from petalnet.models.mapped import map_tensors

        wanted = tuple(names)
        try:
            return map_tensors(self.local(wanted))
        except FileNotFoundError:  # another node made room in the cache at just this moment
            self._added = {name: tensor for name, tensor in self._added.items() if tensor.path.exists()}
            return map_tensors(self.local(wanted))
        except OSError as error:
            raise ModelError(f"the weights of {self.name} cannot be read: {error}") from error

    def read_copy(self, name: str) -> torch.Tensor:
        """One tensor likewise, but in memory of its own. Raises: as `read`."""
        from petalnet.models.mapped import read_tensor

        try:
            return read_tensor(self.local([name])[name])
        except FileNotFoundError:
            self._added = {name: tensor for name, tensor in self._added.items() if tensor.path.exists()}
            return read_tensor(self.local([name])[name])
        except OSError as error:
            raise ModelError(f"the weights of {self.name} cannot be read: {error}") from error
