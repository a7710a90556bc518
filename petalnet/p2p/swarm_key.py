"""The key of a private swarm: 32 random bytes that every member has and nobody else.

    petalnet swarm key 1
    3q2+7w…=                     the bytes, base64

Two lines of a file that only its owner can read. The bytes themselves never travel, and are shown nowhere: what a member sends is
`SwarmKey.tag`, and what a person compares is `SwarmKey.fingerprint`. Free of libp2p: `petalnet key` must not wait for its import.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from petalnet.errors import UsageError

logger = logging.getLogger(__name__)

HEADER = "petalnet swarm key 1"
KEY_SIZE = 32
_MAX_FILE_SIZE = 1024
_HINT = "make one with `petalnet key new FILE`"


class SwarmKey:
    """A swarm's key. Equal where the bytes are.

    Attributes:
        path: the file that it was read from, or None.
    """

    __slots__ = ("_secret", "path")

    def __init__(self, secret: bytes, *, path: Path | None = None) -> None:
        if len(secret) != KEY_SIZE:
            raise ValueError(f"a swarm key has {KEY_SIZE} bytes, not {len(secret)}")
        self._secret = bytes(secret)
        self.path = path

    @classmethod
    def generate(cls) -> SwarmKey:
        """A new key, from the system's source of randomness."""
        return cls(secrets.token_bytes(KEY_SIZE))

    @classmethod
    def parse(cls, text: str) -> SwarmKey:
        """The key in a key file's text, or in its second line alone. Raises UsageError, whose message does not show the text."""
        lines = text.split("\n")
        if len(lines) > 1:
            if lines[0].rstrip() != HEADER:
                raise UsageError(f"the text is not a swarm key: its first line is not {HEADER!r}; {_HINT}")
            lines = lines[1:]
        secret = _decode(lines[0].strip())
        if secret is None or any(line.strip() for line in lines[1:]):
            raise UsageError(f"the text is not a swarm key: {KEY_SIZE} bytes as base64 are needed in one line; {_HINT}")
        return cls(secret)

    @classmethod
    def load(cls, path: Path) -> SwarmKey:
        """The key in the file at `path`; warns where other users of this machine can read it.

        Raises:
            UsageError: the file cannot be read, or is no key file.
        """
        path = path.expanduser()
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(_MAX_FILE_SIZE + 1)
        except OSError as error:
            hint = f"; {_HINT}" if isinstance(error, FileNotFoundError) else ""
            raise UsageError(f"cannot read the swarm key {path}: {error.strerror or error}{hint}") from None
        first, _, rest = data.partition(b"\n")
        secret = _decode(rest.decode("ascii", "replace").strip()) if len(data) <= _MAX_FILE_SIZE else None
        if first.rstrip() != HEADER.encode() or secret is None:
            raise UsageError(f"{path} is not a swarm key (two lines, {HEADER!r} and {KEY_SIZE} bytes as base64); {_HINT}")
        if stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("other users of this machine can read the swarm key %s: chmod 600 it", path)
        return cls(secret, path=path.absolute())

    @classmethod
    def of(cls, value: str | os.PathLike[str] | SwarmKey) -> SwarmKey:
        """The key that a program gave: a key, a key's text, or the path of a key file.

        Raises:
            UsageError: it is none of these.
        """
        if isinstance(value, SwarmKey):
            return value
        if isinstance(value, str) and ("\n" in value or _decode(value.strip()) is not None):
            return cls.parse(value)
        return cls.load(Path(value))

    def text(self) -> str:
        """What stands in a key file: the secret itself."""
        return f"{HEADER}\n{base64.b64encode(self._secret).decode()}\n"

    def save_new(self, path: Path) -> None:
        """Write the key to a new file at `path` that only its owner can read (mode 0600).

        Raises:
            UsageError: there is a file already, which stays as it is, or none can be written.
        """
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise UsageError(f"{path} exists and is left as it is: name a new file (whoever loses a swarm's key loses the swarm)") from None
        except OSError as error:
            raise UsageError(f"cannot write the swarm key {path}: {error.strerror or error}") from None
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(self.text())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise UsageError(f"cannot write the swarm key {path}: {error.strerror or error}") from None

    def tag(self, purpose: bytes, data: bytes) -> bytes:
        """HMAC-SHA256 over `data`, 32 bytes that only a holder of the key can make; tags for different purposes have nothing in common."""
        return hmac.digest(self._secret, len(purpose).to_bytes(2, "big") + purpose + data, "sha256")

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits by which people see whether two machines have the same key; they tell nothing else about it."""
        return self.tag(b"petalnet swarm key fingerprint", b"")[:4].hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SwarmKey) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(hashlib.sha256(self._secret).digest())

    def __repr__(self) -> str:
        return f"SwarmKey({self.fingerprint})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SwarmKey:
        return self

    def __reduce__(self) -> tuple[Callable[..., SwarmKey], tuple[Path]]:
        # A saved model or configuration must not carry the secret: it says where the key lies.
        if self.path is None:
            raise TypeError("a swarm key that was given as text cannot be pickled: give the path of its file")
        return SwarmKey.load, (self.path,)


def _decode(text: str) -> bytes | None:
    """The bytes that a key's line stands for, or None."""
    try:
        secret = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return None
    # The last character has bits to spare: only one spelling is the key.
    return secret if len(secret) == KEY_SIZE and base64.b64encode(secret).decode() == text else None
