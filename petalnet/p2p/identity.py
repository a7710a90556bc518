"""Who a node is: an ed25519 key and the peer id that is made from it.

A peer id carries the public key inside itself, so whoever knows the id can verify what that peer signed, without asking anybody.
The key file holds libp2p's own form of a private key, so that other libp2p tools read it. Free of libp2p: importing that takes a
second, and `petalnet key` must not wait for it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from petalnet.errors import UsageError

_KEY_SIZE = 32
_PRIVATE_PREFIX = b"\x08\x01\x12\x40"  # protobuf PrivateKey: type ed25519, then 64 bytes (private key, public key)
_SHORT_PREFIX = b"\x08\x01\x12\x20"  # the same with the private key only, as py-libp2p writes it
_PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"  # identity multihash of a protobuf PublicKey: type ed25519, then 32 bytes


class Identity:
    """An ed25519 key pair.

    Attributes:
        peer_id: the peer id in base58, "12D3Koo…".
        private_bytes: the private key, 32 bytes.
    """

    def __init__(self, private_bytes: bytes) -> None:
        if len(private_bytes) != _KEY_SIZE:
            raise ValueError(f"an ed25519 key has {_KEY_SIZE} bytes, not {len(private_bytes)}")
        self.private_bytes = bytes(private_bytes)
        self._key = Ed25519PrivateKey.from_private_bytes(self.private_bytes)
        self._public_bytes = self._key.public_key().public_bytes_raw()
        self.peer_id = base58.b58encode(_PEER_ID_PREFIX + self._public_bytes).decode()

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @classmethod
    def generate(cls) -> Identity:
        """A new identity."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity in the file at `path`, which is made there (mode 0600, folders included) where there is none.

        Two processes that make the same file at once end up with the same identity.

        Raises:
            UsageError: the file cannot be read or written, or holds something else.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            try:
                data = _create(path, cls.generate())
            except OSError as error:
                raise UsageError(f"cannot write the identity file {path}: {error.strerror or error}") from error
        except OSError as error:
            raise UsageError(f"cannot read the identity file {path}: {error.strerror or error}") from error
        identity = cls._decode(data)
        if identity is None:
            raise UsageError(f"{path} is not an identity file (a libp2p ed25519 key); name another, or move it away to have a new one made")
        return identity

    def encode(self) -> bytes:
        """The private key in libp2p's form (protobuf)."""
        return _PRIVATE_PREFIX + self.private_bytes + self._public_bytes

    @classmethod
    def _decode(cls, data: bytes) -> Identity | None:
        if data.startswith(_SHORT_PREFIX) and len(data) == len(_SHORT_PREFIX) + _KEY_SIZE:
            return cls(data[len(_SHORT_PREFIX) :])
        if not data.startswith(_PRIVATE_PREFIX) or len(data) != len(_PRIVATE_PREFIX) + 2 * _KEY_SIZE:
            return None
        identity = cls(data[len(_PRIVATE_PREFIX) :][:_KEY_SIZE])
        return identity if identity.encode() == data else None

    def sign(self, data: bytes) -> bytes:
        """The signature of `data`, 64 bytes."""
        return self._key.sign(data)


def verify_signature(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of `data` by the peer `peer_id`. False for anything malformed."""
    key = public_key_bytes(peer_id)
    if key is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def public_key_bytes(peer_id: str) -> bytes | None:
    """The ed25519 public key inside a peer id; None where the text is not the id of such a key."""
    if len(peer_id) > 64:
        return None
    try:
        data = base58.b58decode(peer_id)
    except ValueError:
        return None
    # Several texts decode to the same bytes (leading and trailing blanks are stripped); only one is the id.
    if len(data) != len(_PEER_ID_PREFIX) + _KEY_SIZE or not data.startswith(_PEER_ID_PREFIX) or base58.b58encode(data).decode() != peer_id:
        return None
    return data[len(_PEER_ID_PREFIX) :]


def _create(path: Path, identity: Identity) -> bytes:
    """Write the identity to `path` in one step; where another process was faster, what that one wrote."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(identity.encode())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)  # unlike a rename, fails where the file exists by now
    finally:
        os.unlink(name)
    return path.read_bytes()
