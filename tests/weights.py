"""Blocks of random bytes and servers that share them, for tests of weights that go from peer to peer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from petalnet.fetching import Fetching
from petalnet.models import block_file, manifest
from petalnet.models.files import LocalTensor
from petalnet.models.identity import digest_of_set, digest_of_tensor
from petalnet.models.manifest import BlockEntry
from petalnet.models.payload import Payload
from petalnet.models.weight_cache import WeightCache
from petalnet.p2p.host import Host
from petalnet.routing.records import ServerRecord
from petalnet.routing.swarm import SwarmView
from petalnet.sharing import Sharing

MODEL = "m" * 64
CHUNK = 64 * 1024


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 KiB, so that small blocks have several."""
    monkeypatch.setattr(manifest, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(block_file, "CHUNK_BYTES", CHUNK)


def make_block(folder: Path, number: int, chunks: int = 5) -> tuple[BlockEntry, Payload]:
    """A block of two tensors in a file of its own, which does not end with a chunk."""
    sizes = {"a.weight": CHUNK // 2 + 12, "b.weight": CHUNK * (chunks - 1)}
    path = folder / f"block-{number}.bin"
    path.write_bytes(random.Random(number).randbytes(sum(sizes.values())))
    tensors, start = {}, 0
    for name, size in sizes.items():
        tensors[name] = LocalTensor(path, "U8", (size,), start, start + size)
        start += size
    payload = Payload(list(tensors.values()))
    digest = digest_of_set({name: digest_of_tensor(tensor) for name, tensor in tensors.items()})
    described = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    return BlockEntry(digest, described, payload.size, payload.chunks(CHUNK)), payload


@dataclass
class Membership:
    """As much of a `Peering` as fetching needs: a host, and a view that the test fills."""

    host: Host
    view: SwarmView = field(default_factory=SwarmView)

    async def look_up(self, model: str) -> None:
        """Whom there is has been told by the test."""

    def meet(self, host: Host, *, shares: bool = True) -> None:
        """Hear of a server."""
        now = time.time()
        record = ServerRecord(
            peer_id=host.peer_id, addrs=tuple(host.plain_addrs), model=MODEL, model_name="test", span=(0, 1), num_blocks=1,
            state="online", dtype="float32", sequence=int(now * 1000), issued=now, expires=now + 600, shares=shares,
        )  # fmt: skip
        self.view.add(record, now=now)


@dataclass
class Node:
    """A server that shares, and may fetch."""

    peering: Membership
    sharing: Sharing
    fetching: Fetching

    @classmethod
    def on(
        cls, host: Host, folder: Path, *, upload: int | None = None, most_bytes: int | None = None, sharing: type[Sharing] = Sharing
    ) -> Node:
        peering, shares = Membership(host), sharing(host, max_rate=upload)
        shares.open()
        cache = WeightCache(folder / host.peer_id[-8:], most_bytes)
        return cls(peering, shares, Fetching(peering, shares, cache, MODEL))  # type: ignore[arg-type]

    def knows(self, *others: Node) -> None:
        for other in others:
            self.peering.meet(other.peering.host)


def unknown(entry: BlockEntry) -> BlockEntry:
    """What is known of a block whose chunks nobody told."""
    return replace(entry, chunks=())


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; the test fails where it does not in time."""
    with trio.fail_after(10):
        while True:
            if condition():
                return
            await trio.sleep(0.005)
