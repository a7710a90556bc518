"""The files of a hub repository at one commit, of which no more bytes are fetched than are wanted.

Small files are fetched as the hub's own library fetches them, into its cache. A file of weights is used from there where it is there as a
whole. Otherwise only its header is read, and then the tensors that are wanted, which are kept on the disk (`models.weight_cache`) in
*segments*: the tensors of one layer that lie side by side in the file, or a single tensor that is in no layer. So what is fetched is what
is asked for, a kill costs a part of one segment, and blocks that are not needed any more make room one by one.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from petalnet.errors import ModelError
from petalnet.models.cachedir import load_facts, store_facts
from petalnet.models.files import (
    HEADER_ERRORS,
    LENGTH_BYTES,
    PICKLE_ENDING,
    CheckpointFiles,
    LocalTensor,
    Place,
    Window,
    file_fingerprint,
    header_length,
    in_file,
    parse_header,
    read_tensors,
    read_windows,
)
from petalnet.models.remote_file import RangesIgnoredError, RemoteFile, explained, http_error, is_unreachable
from petalnet.models.weight_cache import Filling, full_disk, readable, weight_cache

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?:.*?\.)?\d+\.")
"""A tensor's name up to the first number in it, which is its layer's."""


@dataclass(frozen=True)
class Segment:
    """Bytes [start, end) of a file that are fetched and kept together, and their key in the cache."""

    key: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many they are."""
        return self.end - self.start


class HubFiles(CheckpointFiles):
    """The files of a hub repository.

    Args:
        name: the repository's id.
        revision, token, cache_dir: as `huggingface_hub` understands them; what is fetched in parts goes into a folder beside the hub's own
            where `cache_dir` is given, else to petalnet's.
        max_disk_space: bytes that what is fetched in parts may take on the disk; None for no bound.

    Attributes:
        name: the repository's id.
        cache: where what is fetched in parts is kept.
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
        self.cache = weight_cache(max_disk_space, cache_dir)
        self._revision = revision
        self._token = token
        self._cache_dir = cache_dir
        self._small: dict[str, Path | None] = {}
        self._wholes: dict[str, Path | None] = {}
        self._remotes: dict[str, RemoteFile | None] = {}
        self._headers: dict[str, Mapping[str, Place]] = {}
        self._segments: dict[str, Mapping[str, Segment]] = {}

    def file(self, name: str) -> Path | None:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError

        if name in self._small:
            return self._small[name]
        commit = next((path.parent.name for path in self._small.values() if path is not None), None)
        revision = commit or self._revision
        found = try_to_load_from_cache(self.name, name, cache_dir=self._cache_dir, revision=revision)
        if commit is None or not isinstance(found, str) and found is not _CACHED_NO_EXIST:
            try:
                with self._explained(name, may_lack=True):
                    if found is None:
                        self._look_for_hub(name, revision)
                    found = hf_hub_download(self.name, name, revision=revision, token=self._token, cache_dir=self._cache_dir)
            except EntryNotFoundError:
                found = None
            except ModelError as error:
                if not is_unreachable(error.__cause__):
                    raise
                if commit is not None:  # the repository is here, as far as it was needed so far
                    logger.info("whether %s has a file %s cannot be told without the hub: going on without", self.name, name)
                    return None
                # Where a connection breaks off, the library does not look into its cache as it does where there is none at all.
                if not isinstance(found, str):
                    raise
        self._small[name] = Path(found) if isinstance(found, str) else None
        return self._small[name]

    def _look_for_hub(self, name: str, revision: str | None) -> None:
        """Notice at once a hub that cannot be reached: a download would try again for half a minute before it says so."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            get_hf_file_metadata(hf_hub_url(self.name, name, revision=revision), token=self._token)
        except (http_error(), OSError) as error:
            if is_unreachable(error):
                raise LocalEntryNotFoundError(str(error)) from error
            raise

    def has(self, file: str) -> bool:
        return self._whole(file) is not None or self._remote(file) is not None

    def header(self, file: str) -> Mapping[str, Place]:
        if file not in self._headers:
            path = self._whole(file)
            if path is None and not file.endswith(PICKLE_ENDING):
                try:
                    self._headers[file] = self._read_header(self._require(file))
                    return self._headers[file]
                except RangesIgnoredError:
                    path = self._fetch_whole(file)
            tensors = read_tensors(path or self._pickle(file), self.name, file)
            self._headers[file] = {name: Place(one.dtype, one.shape, one.start, one.end) for name, one in tensors.items()}
        return self._headers[file]

    def local(self, names: Collection[str]) -> Mapping[str, LocalTensor]:
        with self.cache.keeping():
            lacking: dict[Segment, RemoteFile] = {}
            needed: set[Segment] = set()
            for name in names:
                file = self.file_of[name]
                self.place(name)
                if self._whole(file) is None:
                    segment = self._segment(name)
                    if segment not in needed and self.cache.find(segment.key) is None:
                        lacking[segment] = self._require(file)
                    needed.add(segment)
            self.cache.require(sum(segment.nbytes for segment in needed))
            if lacking:
                self._fetch(lacking)
            return {name: self._local(name) for name in names}

    def sample(self, windows: Mapping[str, Sequence[Window]]) -> Mapping[str, bytes]:
        sampled = {}
        for name, wanted in windows.items():
            if self._whole(self.file_of[name]) is None and self.cache.find(self._segment(name).key) is None:
                remote, start = self._require(self.file_of[name]), self.place(name).start
                try:
                    with self._explained(remote.name):
                        sampled[name] = b"".join(remote.read(start + first, start + end) for first, end in wanted)
                    continue
                except RangesIgnoredError:
                    self._fetch_whole(remote.name)
            sampled[name] = read_windows(self._local(name), wanted)
        return sampled

    def fingerprint(self, name: str) -> str:
        file = self.file_of[name]
        path = self._whole(file)
        return self._require(file).key if path is None else file_fingerprint(path)

    def is_here(self, names: Collection[str]) -> bool:
        """Whether nothing would have to be fetched for these tensors, which then count as used now. Raises ModelError as `local` does."""
        return all(self._whole(self.file_of[name]) is not None or self.cache.find(self._segment(name).key) is not None for name in names)

    def forget(self, names: Collection[str]) -> None:
        for name in names:
            if self._whole(self.file_of[name]) is None:
                self.cache.discard(self._segment(name).key)

    @cached_property
    def _commit(self) -> str:
        """The commit that the revision is at: whatever is pushed meanwhile, all files are of this one."""
        path = self.file("config.json")
        if path is None:
            raise ModelError(f"{self.name} has no config.json: not a model in Hugging Face format")
        return path.parent.name

    def _whole(self, file: str) -> Path | None:
        """A file of weights as a whole, where the hub's own cache has it."""
        from huggingface_hub import try_to_load_from_cache

        if file not in self._wholes:
            path = try_to_load_from_cache(self.name, file, cache_dir=self._cache_dir, revision=self._commit)
            self._wholes[file] = Path(path) if isinstance(path, str) else None
        return self._wholes[file]

    def _fetch_whole(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        logger.warning("the hub does not send parts of files: fetching all of %s into its own cache, which has no bound", file)
        with self._explained(file):
            path = hf_hub_download(self.name, file, revision=self._commit, token=self._token, cache_dir=self._cache_dir)
        self._wholes[file] = Path(path)
        return Path(path)

    def _remote(self, file: str) -> RemoteFile | None:
        """Where a file of weights is and how large, which is remembered: a commit does not change. None where it has none of that name."""
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError

        if file in self._remotes:
            return self._remotes[file]
        fact = blake3("\0".join((constants.ENDPOINT, self.name, self._commit, file)).encode()).hexdigest()
        known = load_facts("hub-files", fact)
        url = hf_hub_url(self.name, file, revision=self._commit)
        if not known:
            try:
                with self._explained(file, may_lack=True):
                    found = get_hf_file_metadata(url, token=self._token, library_name="petalnet", retry_on_errors=True)
                known = {"etag": found.etag, "size": found.size}
            except EntryNotFoundError:
                known = {"etag": None, "size": None}
            store_facts("hub-files", fact, known)
        etag, size = known.get("etag"), known.get("size")
        if isinstance(etag, str) and type(size) is int:
            self._remotes[file] = RemoteFile(self.name, file, url, etag, size, self._token)
        elif etag is size is None:
            self._remotes[file] = None
        else:
            raise ModelError(f"the hub does not tell how large {file} of {self.name} is, or which version of it this is")
        return self._remotes[file]

    def _require(self, file: str) -> RemoteFile:
        remote = self._remote(file)
        if remote is None:
            raise ModelError(f"{self.name} lacks the file {file}, which should hold some of its tensors")
        return remote

    def _read_header(self, remote: RemoteFile) -> Mapping[str, Place]:
        key = f"{remote.key}-header"
        path = self.cache.find(key)
        try:
            if path is not None:
                return parse_header(path.read_bytes(), remote.size)
            with self._explained(remote.name):
                length = header_length(remote.read(0, min(LENGTH_BYTES, remote.size)), remote.size)
                header = remote.read(LENGTH_BYTES, LENGTH_BYTES + length)
            places = parse_header(header, remote.size)
        except HEADER_ERRORS as error:
            if isinstance(error, ModelError):
                raise
            self.cache.discard(key)
            raise ModelError(f"{remote.name} of {self.name} is not a safetensors file: {error}") from error
        with self.cache.filling(key, length) as filling:
            if filling.lacking:
                filling.path.write_bytes(header)
                filling.note(0, length)
                filling.commit()
        return places

    def _segment(self, name: str) -> Segment:
        """The segment that a tensor is in."""
        file = self.file_of[name]
        if file not in self._segments:
            places, remote = self.header(file), self._require(file)
            self._segments[file] = dict.fromkeys(places, _all_of(remote)) if file.endswith(PICKLE_ENDING) else segments(places, remote.key)
        return self._segments[file][name]

    def _local(self, name: str) -> LocalTensor:
        file, place = self.file_of[name], self.place(name)
        whole = self._whole(file)
        if whole is not None:
            return in_file(whole, place)
        segment = self._segment(name)
        return in_file(self.cache.folder / segment.key, place, segment.start)

    def _pickle(self, file: str) -> Path:
        """A file of PyTorch's own, which can only be read as a whole, in the cache."""
        remote = self._require(file)
        segment = _all_of(remote)
        with self.cache.keeping():
            if self.cache.find(segment.key) is None:
                logger.warning("%s of %s is no safetensors file: all of it is needed (%s)", file, self.name, readable(remote.size))
                self._fetch({segment: remote})
        return self.cache.folder / segment.key

    def _fetch(self, lacking: Mapping[Segment, RemoteFile]) -> None:
        """Bring segments into the cache, with a bar that shows how far that is."""
        from huggingface_hub.utils import tqdm

        total = sum(segment.nbytes for segment in lacking)
        logger.info("fetching %s of %s from the hub", readable(total), self.name)
        # `disable=None`: no bar where standard error is no terminal; the hub library's own switches silence it too.
        with tqdm(total=total, desc=self.name, unit="B", unit_scale=True, disable=None, name="petalnet.fetch") as bar:
            for segment, remote in lacking.items():
                if self._whole(remote.name) is not None:
                    continue
                with self.cache.filling(segment.key, segment.nbytes) as filling:
                    bar.update(segment.nbytes - sum(end - start for start, end in filling.lacking))
                    try:
                        self._fill(filling, segment, remote, bar)
                        filling.commit()
                    except RangesIgnoredError:
                        self._fetch_whole(remote.name)

    def _fill(self, filling: Filling, segment: Segment, remote: RemoteFile, bar: Any) -> None:
        try:
            with filling.path.open("r+b", buffering=0) as file, self._explained(remote.name):
                for start, end in filling.lacking:
                    file.seek(start)
                    for part in remote.stream(segment.start + start, segment.start + end):
                        left = memoryview(part)
                        while left:  # a disk that is nearly full takes what it can, and says no to the rest
                            left = left[file.write(left) or 0 :]
                        filling.note(start, start + len(part))
                        start += len(part)
                        bar.update(len(part))
        except ModelError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full_disk(self.cache.folder) from error
            raise

    def _explained(self, what: str, *, may_lack: bool = False) -> AbstractContextManager[None]:
        return explained(self.name, self._revision, what, may_lack=may_lack)


def segments(places: Mapping[str, Place], key: str) -> dict[str, Segment]:
    """How a file is cut: for each tensor the segment that it is in. The same for whoever asks, and in whatever order.

    Args:
        places: of its tensors.
        key: begins the keys of its segments.
    """
    runs: list[tuple[str, list[str]]] = []
    for name in sorted(places, key=lambda name: (places[name].start, places[name].end)):
        match = _LAYER.match(name)
        layer = match[0] if match else name
        if not runs or runs[-1][0] != layer:
            runs.append((layer, []))
        runs[-1][1].append(name)
    result = {}
    for _, names in runs:
        start, end = places[names[0]].start, max(places[name].end for name in names)
        result.update(dict.fromkeys(names, Segment(f"{key}-{start}-{end}", start, end)))
    return result


def _all_of(remote: RemoteFile) -> Segment:
    return Segment(f"{remote.key}-whole", 0, remote.size)
