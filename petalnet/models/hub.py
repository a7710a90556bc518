"""The files of a hub repository at one revision."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from petalnet.errors import ModelError
from petalnet.models.files import CheckpointFiles, LocalTensor, Place, in_file, read_tensors


class HubFiles(CheckpointFiles):
    """The files of a hub repository at one revision.

    Attributes:
        name: the repository's id.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        max_disk_space: int | None = None,
    ) -> None:
        self.name = name
        self._revision = revision
        self._token = token
        self._cache_dir = cache_dir
        self._max_disk_space = max_disk_space
        self._found: dict[str, Path | None] = {}
        self._headers: dict[str, dict[str, Place]] = {}

    def file(self, name: str) -> Path | None:
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

        if name in self._found:
            return self._found[name]
        try:
            path = hf_hub_download(self.name, name, revision=self._revision, token=self._token, cache_dir=self._cache_dir)
            self._found[name] = Path(path)
        except LocalEntryNotFoundError as error:
            raise ModelError(f"there is no folder {self.name}, and the hub cannot be reached to fetch a repository of that name") from error
        except EntryNotFoundError:
            self._found[name] = None
        except GatedRepoError as error:
            raise ModelError(f"{self.name} is gated: accept its terms on the hub and log in, or pass a token") from error
        except RevisionNotFoundError as error:
            raise ModelError(f"{self.name} has no revision {self._revision}") from error
        except RepositoryNotFoundError as error:
            raise ModelError(f"there is no folder {self.name} and no such hub repository (or it is private: pass a token)") from error
        except HFValidationError as error:
            raise ModelError(f"{self.name} is neither a folder nor the id of a hub repository (owner/name)") from error
        except (HfHubHTTPError, OSError) as error:
            raise ModelError(f"{name} of {self.name} cannot be fetched: {str(error).splitlines()[0]}") from error
        return self._found[name]

    def has(self, file: str) -> bool:
        return self.file(file) is not None

    def header(self, file: str) -> Mapping[str, Place]:
        if file not in self._headers:
            tensors = read_tensors(self._path(file), self.name)
            self._headers[file] = {name: Place(one.dtype, one.shape, one.start, one.end) for name, one in tensors.items()}
        return self._headers[file]

    def local(self, names: Collection[str]) -> Mapping[str, LocalTensor]:
        return {name: in_file(self._path(self.file_of[name]), self.place(name)) for name in names}

    def _path(self, file: str) -> Path:
        path = self.file(file)
        if path is None:
            raise ModelError(f"{self.name} lacks the file {file}, which should hold some of its tensors")
        return path
