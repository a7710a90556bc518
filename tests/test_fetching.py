"""Blocks from peers, over real connections: several at once, liars, peers that vanish, full disks."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from petalnet import fetching as module
from petalnet.errors import CallerError, UsageError
from petalnet.fetching import Wanted
from petalnet.models.block_file import BlockFile
from petalnet.models.files import read_header
from petalnet.models.identity import digest_of_set, digest_of_tensor
from petalnet.models.manifest import BlockEntry
from petalnet.models.payload import Payload
from petalnet.p2p.fields import Message
from petalnet.p2p.host import Host, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error, Ping
from petalnet.p2p.protocols import WEIGHTS
from petalnet.p2p.weight_messages import Chunk, ChunkList, ChunksHeld, GetChunk, GetChunkList, GetManifest, WhichChunks, blob_of
from petalnet.sharing import Sharing
from tests.weights import CHUNK, Node, eventually, make_block, small_chunks, unknown

Blocks = list[tuple[BlockEntry, Payload]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    for name, seconds in (("LOOK_EVERY_S", 0.02), ("POLL_S", 0.05), ("NEWS_S", 0.05), ("AGAIN_S", 0.1)):
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    return [make_block(tmp_path, number) for number in range(4)]


@asynccontextmanager
async def nodes_of(folder: Path, *options: dict[str, Any]) -> AsyncIterator[list[Node]]:
    """A node for each set of options."""
    async with trio.open_nursery() as nursery:
        found = [Node.on(await nursery.start(_run_host), folder, **given) for given in options]
        yield found
        nursery.cancel_scope.cancel()


async def _run_host(*, task_status: trio.TaskStatus[Host]) -> None:
    async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as host:
        task_status.started(host)
        await trio.sleep_forever()


def wanted(blocks: Blocks) -> list[Wanted]:
    return [Wanted(unknown(entry)) for entry, _ in blocks]


def share_all(node: Node, blocks: Blocks) -> None:
    for entry, payload in blocks:
        node.sharing.share(entry, payload)


def check(brought: dict[str, module.Brought], blocks: Blocks) -> None:
    assert len(brought) == len(blocks)
    for entry, payload in blocks:
        found = brought[Wanted(entry).name]
        tensors = read_header(found.path)
        assert digest_of_set({name: digest_of_tensor(tensor) for name, tensor in tensors.items()}) == entry.digest
        assert found.path.read_bytes()[len(entry.header) :] == payload.read(0, payload.size)


async def test_blocks_come_from_several_peers_and_are_found_again(tmp_path: Path, blocks: Blocks) -> None:
    async with nodes_of(tmp_path, {}, {}, {}) as (one, other, new):
        share_all(one, blocks)
        share_all(other, blocks)
        new.knows(one, other)
        with trio.fail_after(20):
            brought = await new.fetching.bring(wanted(blocks))
        check(brought, blocks)
        assert len(new.fetching.bytes_fetched) == 2 and one.sharing.bytes_served and other.sharing.bytes_served
        served = one.sharing.bytes_served + other.sharing.bytes_served
        again = await new.fetching.bring(wanted(blocks))
        check(again, blocks)
        assert one.sharing.bytes_served + other.sharing.bytes_served == served, "what is there is not asked for again"


async def test_two_newcomers_get_from_each_other_what_one_has(tmp_path: Path, blocks: Blocks) -> None:
    async with nodes_of(tmp_path, {"upload": 20 * CHUNK}, {}, {}) as (seeder, left, right):
        share_all(seeder, blocks)
        left.knows(seeder, right)
        right.knows(seeder, left)
        found: dict[str, dict[str, module.Brought]] = {}

        async def bring(name: str, node: Node) -> None:
            found[name] = await node.fetching.bring(wanted(blocks))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bring, "left", left)
                nursery.start_soon(bring, "right", right)
        check(found["left"], blocks)
        check(found["right"], blocks)
        total = sum(entry.nbytes for entry, _ in blocks)
        assert left.sharing.bytes_served + right.sharing.bytes_served > total / 4
        assert seeder.sharing.bytes_served < 1.75 * total


async def test_they_finish_among_themselves_when_the_only_source_dies(tmp_path: Path, blocks: Blocks) -> None:
    async with nodes_of(tmp_path, {}, {}) as (left, right), trio.open_nursery() as nursery:
        scope = await nursery.start(_seed_until_killed, tmp_path, blocks)
        seeder = scope.node
        left.knows(seeder, right)
        right.knows(seeder, left)
        found: dict[str, dict[str, module.Brought]] = {}

        async def bring(name: str, node: Node) -> None:
            found[name] = await node.fetching.bring(wanted(blocks))

        with trio.fail_after(30):
            async with trio.open_nursery() as both:
                both.start_soon(bring, "left", left)
                both.start_soon(bring, "right", right)
                await eventually(lambda: _together(blocks, left, right))
                assert len(found) < 2, "the source dies in the middle"
                scope.cancel()
        check(found["left"], blocks)
        check(found["right"], blocks)
        nursery.cancel_scope.cancel()


class _Seeder:
    def __init__(self, node: Node, scope: trio.CancelScope) -> None:
        self.node, self.cancel = node, scope.cancel


async def _seed_until_killed(folder: Path, blocks: Blocks, *, task_status: trio.TaskStatus[_Seeder]) -> None:
    with trio.CancelScope() as scope:
        async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as host:
            node = Node.on(host, folder, upload=40 * CHUNK)
            share_all(node, blocks)
            task_status.started(_Seeder(node, scope))
            await trio.sleep_forever()


def _together(blocks: Blocks, *nodes: Node) -> bool:
    """Whether these have every chunk between them."""
    for entry, _ in blocks:
        there: set[int] = set()
        for node in nodes:
            shared = node.sharing._blocks.get(bytes.fromhex(entry.digest)[:16])
            if shared is not None:
                there |= set(range(entry.num_chunks)) if shared.held is None else shared.held()
        if len(there) < entry.num_chunks:
            return False
    return True


class Liar(Sharing):
    """Sends something else than it says."""

    async def _chunk(self, shared, index, digest):  # type: ignore[no-untyped-def]
        start, end = shared.entry.chunk_range(index)
        return bytes(end - start)


class Mute(Sharing):
    """Says what it has, and never sends any of it."""

    async def _chunk(self, shared, index, digest):  # type: ignore[no-untyped-def]
        await trio.sleep_forever()


class Nonsense(Sharing):
    """Answers with something that is no answer."""

    async def _answer_to(self, request: Message) -> Message:
        return Ping(1) if isinstance(request, (GetChunk, GetChunkList)) else await super()._answer_to(request)


class Boaster(Sharing):
    """Says that it has more chunks than there are."""

    async def _answer_to(self, request: Message) -> Message:
        answer = await super()._answer_to(request)
        return replace(answer, held=tuple(b"\xff" * 4000 for _ in answer.held)) if isinstance(answer, ChunksHeld) else answer


@pytest.mark.parametrize("kind", [Liar, Nonsense, Boaster])
async def test_who_sends_wrong_things_is_out_at_once_and_others_give_the_rest(
    tmp_path: Path, blocks: Blocks, kind: type[Sharing], caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes_of(tmp_path, {"sharing": kind}, {"upload": 30 * CHUNK}, {}) as (hostile, honest, new):
        share_all(hostile, blocks)
        share_all(honest, blocks)
        new.knows(hostile, honest)
        with trio.fail_after(30):
            brought = await new.fetching.bring(wanted(blocks))
        check(brought, blocks)
        assert set().union(*(found.givers for found in brought.values())) == {honest.peering.host.peer_id}
        assert "is not asked for weights any more" in caplog.text
        host = new.peering.host
        await eventually(lambda: not host.is_connected(hostile.peering.host.peer_id))
        assert host.is_connected(honest.peering.host.peer_id)


async def test_a_wrong_list_of_chunks_is_found_out_and_its_giver_is_out(tmp_path: Path, blocks: Blocks) -> None:
    entry, payload = blocks[0]
    (tmp_path / "other").mkdir()
    other, wrong = make_block(tmp_path / "other", 77)
    forged = BlockEntry(entry.digest, entry.tensors, entry.nbytes, other.chunks)
    async with nodes_of(tmp_path, {}, {}, {}) as (hostile, honest, new):
        hostile.sharing.share(forged, wrong)
        new.knows(hostile)
        async with trio.open_nursery() as nursery:

            async def come_later() -> None:
                await eventually(lambda: hostile.sharing.bytes_served > 0)
                honest.sharing.share(entry, payload)
                new.knows(honest)

            nursery.start_soon(come_later)
            with trio.fail_after(30):
                brought = await new.fetching.bring(wanted(blocks[:1]))
        check(brought, blocks[:1])
        await eventually(lambda: not new.peering.host.is_connected(hostile.peering.host.peer_id))


async def test_a_peer_that_sends_nothing_does_not_hold_up_the_others(tmp_path: Path, blocks: Blocks) -> None:
    async with nodes_of(tmp_path, {"sharing": Mute}, {}, {}) as (mute, honest, new):
        share_all(mute, blocks)
        share_all(honest, blocks)
        new.knows(mute, honest)
        with trio.fail_after(20):
            check(await new.fetching.bring(wanted(blocks)), blocks)


async def test_what_nobody_gives_is_given_up(tmp_path: Path, blocks: Blocks) -> None:
    async with nodes_of(tmp_path, {}, {}) as (some, new):
        share_all(some, blocks[:2])
        new.knows(some)
        with trio.fail_after(20):
            check(await new.fetching.bring(wanted(blocks), patience_s=0.5), blocks[:2])


async def test_who_gives_too_slowly_is_not_waited_for(tmp_path: Path, blocks: Blocks) -> None:
    total = sum(entry.nbytes for entry, _ in blocks)
    async with nodes_of(tmp_path, {"upload": 4 * CHUNK}, {}) as (slow, new):
        share_all(slow, blocks)
        new.knows(slow)
        with trio.fail_after(20):
            brought = await new.fetching.bring(wanted(blocks), patience_s=1.0, least_bytes_s=100 * total)
            assert len(brought) < len(blocks) and 0 < sum(new.fetching.bytes_fetched.values()) < total
            slow.sharing._rates = None
            check(await new.fetching.bring(wanted(blocks), patience_s=1.0, least_bytes_s=total), blocks)


async def test_what_has_come_counts_after_a_restart(tmp_path: Path, blocks: Blocks) -> None:
    async with nodes_of(tmp_path, {"upload": 10 * CHUNK}, {}) as (seeder, new):
        share_all(seeder, blocks)
        new.knows(seeder)
        async with trio.open_nursery() as first:
            first.start_soon(new.fetching.bring, wanted(blocks))
            await eventually(lambda: sum(new.fetching.bytes_fetched.values()) > 4 * CHUNK)
            first.cancel_scope.cancel()
        assert seeder.sharing.bytes_served < (total := sum(entry.nbytes for entry, _ in blocks))
        seeder.sharing._rates = None
        with trio.fail_after(20):
            check(await new.fetching.bring(wanted(blocks)), blocks)
        assert seeder.sharing.bytes_served < total + 4 * CHUNK, "no more than was under way comes twice"


async def test_a_full_disk_ends_it_in_one_line_and_leaves_nothing(tmp_path: Path, blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    write = BlockFile.write

    def run_full(self: BlockFile, index: int, data: bytes) -> None:
        if index == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, index, data)

    monkeypatch.setattr(BlockFile, "write", run_full)
    async with nodes_of(tmp_path, {}, {}) as (seeder, new):
        share_all(seeder, blocks)
        new.knows(seeder)
        with trio.fail_after(20), pytest.raises(UsageError, match="is full") as raised:
            await new.fetching.bring(wanted(blocks))
        assert "\n" not in str(raised.value)
        left = [path for path in new.fetching.cache.folder.iterdir() if path.stat().st_size]
        whole = {Wanted(entry).name for entry, _ in blocks if any(Wanted(entry).name in path.name for path in left)}
        assert not [path for path in left if "incomplete" in path.name] and len(whole) < len(blocks)


async def test_more_than_the_cache_may_hold_is_not_begun(tmp_path: Path, blocks: Blocks) -> None:
    async with nodes_of(tmp_path, {}, {"most_bytes": 6 * CHUNK}) as (seeder, new):
        share_all(seeder, blocks)
        new.knows(seeder)
        with trio.fail_after(10), pytest.raises(UsageError, match="--max-disk-space"):
            await new.fetching.bring(wanted(blocks))
        assert not seeder.sharing.bytes_served


async def test_a_list_that_is_known_from_the_model_itself_holds(tmp_path: Path, blocks: Blocks) -> None:
    async with nodes_of(tmp_path, {}, {}) as (seeder, new):
        share_all(seeder, blocks)
        new.knows(seeder)
        with trio.fail_after(20):
            check(await new.fetching.bring([Wanted(entry) for entry, _ in blocks]), blocks)


async def _asker(node: Node, hosts: trio.Nursery) -> Callable[[Message], Any]:
    host = await hosts.start(_run_host)
    stream = await host.open_stream(node.peering.host.peer_id, WEIGHTS, addrs=node.peering.host.addrs)

    async def ask(message: Message) -> Message | None:
        with trio.fail_after(5):
            await stream.send(message)
            return await stream.receive()

    return ask


async def test_requests_for_what_is_not_there_are_refused_and_nothing_else(tmp_path: Path, blocks: Blocks) -> None:
    (entry, payload), (hidden, _) = blocks[:2]
    block = bytes.fromhex(entry.digest)[:16]
    async with nodes_of(tmp_path, {}) as (node,), trio.open_nursery() as hosts:
        node.sharing.share(entry, payload)
        ask = await _asker(node, hosts)
        assert await ask(WhichChunks((block, bytes.fromhex(hidden.digest)[:16], b""))) == ChunksHeld(
            (bytes.fromhex(entry.list_digest), b"", b""), (b"", b"", b"")
        )
        refused = [
            GetChunk(block, entry.num_chunks, bytes(32)),
            GetChunk(block, 0, bytes(32)),
            GetChunk(block, 0, b""),
            GetChunk(bytes.fromhex(hidden.digest)[:16], 0, bytes.fromhex(hidden.chunks[0])),
            GetChunkList(b"short"),
            GetManifest("n" * 64),
        ]
        for request in refused:
            answer = await ask(request)
            assert isinstance(answer, Error) and isinstance(answer.exception("p"), CallerError), request
        answer = await ask(GetChunkList(block))
        assert isinstance(answer, ChunkList) and BlockEntry.decode(bytes(answer.entry.data)) == entry
        answer = await ask(GetChunk(block, 1, bytes.fromhex(entry.chunks[1])))
        assert isinstance(answer, Chunk) and bytes(answer.data.data) == payload.read(*entry.chunk_range(1))
        assert isinstance(await ask(Chunk(blob_of(b"x"))), Error), "an answer is no request"
        hosts.cancel_scope.cancel()


async def test_a_file_that_was_changed_is_not_shared_any_more(tmp_path: Path, blocks: Blocks) -> None:
    entry, payload = blocks[0]
    block = bytes.fromhex(entry.digest)[:16]
    async with nodes_of(tmp_path, {}) as (node,), trio.open_nursery() as hosts:
        node.sharing.share(entry, payload)
        ask = await _asker(node, hosts)
        (tmp_path / "block-0.bin").write_bytes(bytes(payload.size))
        assert isinstance(await ask(GetChunk(block, 0, bytes.fromhex(entry.chunks[0]))), Error)
        assert await ask(WhichChunks((block,))) == ChunksHeld((b"",), (b"",))
        hosts.cancel_scope.cancel()


async def test_rates_are_kept(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    class NoHost:
        pass

    sharing = Sharing(NoHost(), max_rate=1000)  # type: ignore[arg-type]
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(sharing._pace, "chunks", 2000)
    assert trio.current_time() - began == pytest.approx(9.0, abs=1.1)
    fetching = module.Fetching(None, sharing, None, "m", max_rate=1000)  # type: ignore[arg-type]
    began = trio.current_time()
    for _ in range(5):
        await fetching.pace(2000)
    assert trio.current_time() - began == pytest.approx(9.0, abs=1.1)
