"""Ranges of bytes of a file on a hub, through `huggingface_hub`: its addresses, login, session, retries and errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from blake3 import blake3

from petalnet.errors import ModelError

logger = logging.getLogger(__name__)

MOST_FAILURES = 5
"""Times that a connection may break before any byte has come; as often as the hub's own library tries."""
BUSY_STATUSES = (408, 429, 500, 502, 503, 504)
"""What a hub answers that is to be asked once more, after a while."""


class RangesIgnoredError(Exception):
    """A hub sends files only as a whole, whatever part of them it is asked for."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository at one commit.

    Attributes:
        repository, name: the repository's id and the file's name.
        url: where it is.
        etag: what the hub says its content is: another text for any other content.
        size: in bytes.
        token: for the hub; None for the stored login.
    """

    repository: str
    name: str
    url: str
    etag: str
    size: int
    token: str | bool | None = field(default=None, repr=False)

    @cached_property
    def key(self) -> str:
        """A short name of its content. A hub's word counts only for what comes from that hub."""
        from huggingface_hub import constants

        return blake3(f"{constants.ENDPOINT}\0{self.etag}\0{self.size}".encode()).hexdigest()[:32]

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end). Raises as `stream`."""
        return b"".join(self.stream(start, end))

    def stream(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) in parts, as they come. A connection that breaks is opened again where it broke.

        Raises:
            RangesIgnoredError: the hub would send the whole file.
            ModelError: the hub sends something else than was asked for.
            OSError and the errors of the HTTP library: see `explained`.
        """
        failures = 0
        while start < end:
            before = start
            try:
                for part in self._request(start, end):
                    start += len(part)
                    failures = 0
                    yield part
                if start == before:
                    raise ModelError(f"the hub sends nothing of {self.name} of {self.repository} where there should be {end - start} bytes")
            except http_error() as error:
                failures += 1
                if not is_transport_error(error) or failures > MOST_FAILURES:
                    raise
                logger.info("the connection to the hub broke at byte %d of %s (%s): trying again", start, self.name, error)
                time.sleep(min(2 ** (failures - 1), 8) if failures > 1 else 0)

    def _request(self, start: int, end: int) -> Iterator[bytes]:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        headers = build_hf_headers(token=self.token, library_name="petalnet")
        # Ranges count in what is sent: compressed, they would be others.
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with http_stream_backoff(
            "GET",
            self.url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
            retry_on_status_codes=BUSY_STATUSES,
        ) as response:
            hf_raise_for_status(response)
            if response.status_code == 200:
                raise RangesIgnoredError(self.name)
            found = response.headers.get("Content-Range", "")
            if response.status_code != 206 or found != f"bytes {start}-{end - 1}/{self.size}":
                asked = f"bytes {start} to {end - 1} of {self.size}"
                raise ModelError(
                    f"the hub was asked for {asked} of {self.name} of {self.repository}, and answered {found or 'something else'}"
                )
            for part in response.iter_bytes():  # as they come: parts of a size would be held back, and lost where a connection breaks
                if start + len(part) > end:
                    raise ModelError(f"the hub sends more of {self.name} of {self.repository} than it was asked for")
                start += len(part)
                yield part


def http_error() -> type[Exception]:
    """What all errors of the hub library's HTTP library are; which library that is depends on the version."""
    from huggingface_hub import errors

    base: Any = errors.HfHubHTTPError.__bases__[0]
    return base


def is_transport_error(error: BaseException | None) -> bool:
    """Whether this is a failure of the network, rather than an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, http_error()) and not isinstance(error, HfHubHTTPError)


def is_unreachable(error: BaseException | None) -> bool:
    """Whether this says that there is no way to the hub, rather than what it has."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return is_transport_error(error) or isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)


def is_down(error: BaseException | None) -> bool:
    """Whether this says that the hub cannot be asked at present: there is no way to it, or it does not work."""
    from huggingface_hub.errors import HfHubHTTPError

    return is_unreachable(error) or (isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY_STATUSES)


@contextmanager
def explained(repository: str, revision: str | None, what: str, *, may_lack: bool = False) -> Iterator[None]:
    """Turns what goes wrong between us and a hub into one line that says what to do.

    Raises:
        ModelError: instead of all of the hub's and the network's errors.
        EntryNotFoundError: with `may_lack`, the repository has no such file.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable = f"the hub cannot be reached to fetch {what} of {repository}, and not all of it is on this machine"
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise ModelError(f"there is no folder {repository}, and the hub cannot be reached to fetch a repository of that name") from error
    except EntryNotFoundError as error:
        if may_lack:
            raise
        raise ModelError(f"{repository} lacks the file {what}") from error
    except GatedRepoError as error:
        raise ModelError(f"{repository} is gated: accept its terms on the hub and log in, or pass a token") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"there is no folder {repository} and no such hub repository (or it is private: pass a token)") from error
    except HFValidationError as error:
        raise ModelError(f"{repository} is neither a folder nor the id of a hub repository (owner/name)") from error
    except OfflineModeIsEnabled as error:
        raise ModelError(f"{unreachable}: this machine is set to stay offline (HF_HUB_OFFLINE)") from error
    except (http_error(), OSError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{what} of {repository} cannot be fetched: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
