"""Kademlia's metric: where peers and keys are, and how near to each other.

A peer's place is the SHA-256 of its id's bytes, a key's that of the key; near is what is small when two places are joined by exclusive or.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import base58


@lru_cache(maxsize=65536)
def peer_place(peer_id: str) -> int:
    """Where a peer is, as an integer of 256 bits."""
    return int.from_bytes(hashlib.sha256(base58.b58decode(peer_id)).digest(), "big")


@lru_cache(maxsize=4096)
def key_place(key: bytes) -> int:
    """Where a key is, as an integer of 256 bits."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


def shared_bits(one: int, two: int) -> int:
    """Leading bits, of 256, that two places have in common."""
    return 256 - (one ^ two).bit_length()
